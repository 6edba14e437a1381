//! A container's init process, to be measured. Metadata and snapshot are made before the clock starts: they cost the same
//! under every runtime.

use containerd_client::services::v1::CreateTaskRequest;
use prost_types::Any;

use super::common::container::{Builder, Container};
use super::common::node::{Node, request};
use super::common::spec::Spec;
use super::latency::Process;
use super::output::Output;

pub struct Init<'n> {
    node: &'n Node,
    container: Container<'n>,
    output: Option<Output>,
    /// True if the program writes to its output.
    writes: bool,
}

impl<'n> Init<'n> {
    /// A container that runs this program and has this output, if any.
    pub fn new(node: &'n Node, runtime: &str, args: &[&str], output: Option<Output>) -> Init<'n> {
        Self::of(node, runtime, args, output, |container| container)
    }

    /// As [`Self::new`], with options of the runtime. The program writes something.
    pub fn with_options(
        node: &'n Node,
        runtime: &str,
        args: &[&str],
        output: Option<Output>,
        options: Any,
    ) -> Init<'n> {
        let init = Self::of(node, runtime, args, output, |container| container.options(options));
        Init { writes: true, ..init }
    }

    fn of(
        node: &'n Node,
        runtime: &str,
        args: &[&str],
        output: Option<Output>,
        change: impl FnOnce(Builder<'n>) -> Builder<'n>,
    ) -> Init<'n> {
        let spec = Spec::new(args);
        let spec = if output.as_ref().is_some_and(|output| output.terminal) { spec.terminal() } else { spec };
        let container = change(node.container("bench", spec).runtime(runtime)).make();
        Init { node, container, output, writes: false }
    }

    pub fn output(&mut self) -> &mut Output {
        self.output.as_mut().expect("an init that was made with output")
    }
}

impl Process for Init<'_> {
    fn create(&self) {
        let io = self.output.as_ref().map(Output::io).unwrap_or_default();
        let create = CreateTaskRequest {
            container_id: self.container.id.clone(),
            rootfs: self.container.mounts.clone(),
            stdout: io.stdout,
            stderr: io.stderr,
            terminal: self.output.as_ref().is_some_and(|output| output.terminal),
            ..Default::default()
        };
        self.node.call(self.node.tasks().create(request(&self.container.namespace, create))).expect("create");
    }

    fn waiting(&self) -> impl FnOnce() -> u32 {
        let waiting = self.container.waiting();
        move || waiting.exit().expect("wait").status
    }

    fn start(&self) {
        self.container.start().expect("start");
    }

    fn delete(&self) {
        self.container.delete().expect("delete");
    }

    fn deleted(self) {
        if let Some(mut output) = self.output {
            assert_eq!(output.drain().bytes > 0, self.writes, "the output of the program");
        }
    }
}
