//! An exec, to be measured. It is made with the calls that clients make.

use std::time::Duration;

use containerd_client::services::v1::{DeleteProcessRequest, ExecProcessRequest, StartRequest, WaitRequest};
use prost_types::Any;
use serde_json::Value;

use super::common::container::Container;
use super::common::node::{Node, request, unique};
use super::common::spec::Spec;
use super::latency::Process;
use super::output::Output;

const EXIT_LIMIT: Duration = Duration::from_secs(60);

pub struct Exec<'n> {
    node: &'n Node,
    namespace: String,
    container_id: String,
    exec_id: String,
    process: Any,
    pub output: Output,
}

impl<'n> Exec<'n> {
    pub fn new(node: &'n Node, container: &Container, args: &[&str], output: Output) -> Exec<'n> {
        Exec {
            node,
            namespace: container.namespace.clone(),
            container_id: container.id.clone(),
            exec_id: unique("exec"),
            process: process(args, output.terminal),
            output,
        }
    }
}

/// The process of a container's spec with other arguments, as clients send it.
fn process(args: &[&str], terminal: bool) -> Any {
    let spec = Spec::new(args);
    let spec = if terminal { spec.terminal() } else { spec };
    let spec: Value = serde_json::from_slice(&spec.to_json()).expect("a spec is JSON");
    Any {
        type_url: "types.containerd.io/opencontainers/runtime-spec/1/Process".to_string(),
        value: spec["process"].to_string().into_bytes(),
    }
}

impl Process for Exec<'_> {
    fn create(&self) {
        let io = self.output.io();
        let exec = ExecProcessRequest {
            container_id: self.container_id.clone(),
            exec_id: self.exec_id.clone(),
            stdout: io.stdout,
            stderr: io.stderr,
            terminal: self.output.terminal,
            spec: Some(self.process.clone()),
            ..Default::default()
        };
        self.node.call(self.node.tasks().exec(request(&self.namespace, exec))).expect("exec");
    }

    fn waiting(&self) -> impl FnOnce() -> u32 {
        let wait = WaitRequest { container_id: self.container_id.clone(), exec_id: self.exec_id.clone() };
        let (mut tasks, wait) = (self.node.tasks(), request(&self.namespace, wait));
        let answer = self.node.spawn(async move { tasks.wait(wait).await });
        move || {
            let answer = self.node.block_on(async { tokio::time::timeout(EXIT_LIMIT, answer).await });
            let answer = answer.expect("an exit in time").expect("the future that waits does not panic");
            answer.expect("wait").into_inner().exit_status
        }
    }

    fn start(&self) {
        let start = StartRequest { container_id: self.container_id.clone(), exec_id: self.exec_id.clone() };
        self.node.call(self.node.tasks().start(request(&self.namespace, start))).expect("start");
    }

    fn delete(&self) {
        let delete =
            DeleteProcessRequest { container_id: self.container_id.clone(), exec_id: self.exec_id.clone() };
        self.node.call(self.node.tasks().delete_process(request(&self.namespace, delete))).expect("delete");
    }

    fn deleted(mut self) {
        assert_eq!(self.output.drain().bytes, 0, "true writes nothing");
    }
}
