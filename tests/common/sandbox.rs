//! Sandboxes over containerd's own API: its store of sandboxes, and its controller `shim`, which calls the shim.

use std::collections::HashMap;

use containerd_client::services::v1::sandbox::controller_client::ControllerClient;
use containerd_client::services::v1::sandbox::store_client::StoreClient;
use containerd_client::services::v1::sandbox::{
    ControllerCreateRequest, ControllerMetricsRequest, ControllerShutdownRequest, ControllerStartRequest,
    ControllerStatusRequest, ControllerStatusResponse, ControllerStopRequest, ControllerWaitRequest,
    ControllerWaitResponse, StoreCreateRequest, StoreDeleteRequest,
};
use containerd_client::tonic::transport::Channel;
use containerd_client::tonic::{Response, Status};
use containerd_client::types::sandbox::Runtime;
use containerd_client::types::{Metric, Sandbox as Stored};
use prost_types::Any;
use tokio::task::JoinHandle;

use super::node::{NAMESPACE, Node, request, unique};

const SPEC: &str = "types.containerd.io/opencontainers/runtime-spec/1/Spec";

const CONTROLLER: &str = "shim";

/// CRI's names of the states of a sandbox.
pub const READY: &str = "SANDBOX_READY";
pub const NOT_READY: &str = "SANDBOX_NOTREADY";

/// A call of Wait that has no response yet.
pub type Waiter = JoinHandle<Result<Response<ControllerWaitResponse>, Status>>;

/// A sandbox in the tests' namespace. It is removed on drop.
pub struct Sandbox<'n> {
    node: &'n Node,
    pub id: String,
}

impl<'n> Sandbox<'n> {
    /// A sandbox that is created, but not started.
    pub fn create(node: &'n Node, name: &str) -> Sandbox<'n> {
        Sandbox::create_with(node, name, None, None)
            .unwrap_or_else(|error| panic!("create {name}: {error:?}"))
    }

    /// As [`Self::create`], with options of the sandbox and of the runtime.
    pub fn create_with(
        node: &'n Node,
        name: &str,
        options: Option<Any>,
        runtime: Option<Any>,
    ) -> Result<Sandbox<'n>, Status> {
        let sandbox = Sandbox::unmade(node, name);
        sandbox.try_create(options, runtime)?;
        Ok(sandbox)
    }

    /// Only makes a name: containerd does not know the sandbox yet.
    pub fn unmade(node: &'n Node, name: &str) -> Sandbox<'n> {
        Sandbox { node, id: unique(name) }
    }

    pub fn try_create(&self, options: Option<Any>, runtime: Option<Any>) -> Result<(), Status> {
        let stored = Stored {
            sandbox_id: self.id.clone(),
            runtime: Some(Runtime { name: self.node.runtime.clone(), options: runtime }),
            sandboxer: CONTROLLER.to_string(),
            // Without a spec, containerd 2.1 panics.
            spec: Some(Any { type_url: SPEC.to_string(), value: b"{}".to_vec() }),
            ..Default::default()
        };
        let mut store = StoreClient::new(self.node.channel());
        let message = StoreCreateRequest { sandbox: Some(stored.clone()) };
        self.node.call(store.create(request(NAMESPACE, message)))?;
        let message = ControllerCreateRequest {
            sandbox_id: self.id.clone(),
            options,
            sandbox: Some(stored),
            sandboxer: CONTROLLER.to_string(),
            ..Default::default()
        };
        self.node.call(self.controller().create(request(NAMESPACE, message))).map(drop)
    }

    /// A sandbox that runs, and the pid of its first process.
    pub fn run(node: &'n Node, name: &str) -> (Sandbox<'n>, u32) {
        let sandbox = Sandbox::create(node, name);
        let pid = sandbox.start();
        (sandbox, pid)
    }

    fn controller(&self) -> ControllerClient<Channel> {
        ControllerClient::new(self.node.channel())
    }

    fn made<T>(&self, verb: &str, answer: Result<T, Status>) -> T {
        answer.unwrap_or_else(|error| panic!("{verb} {}: {error:?}", self.id))
    }

    pub fn start(&self) -> u32 {
        self.made("start", self.try_start())
    }

    pub fn try_start(&self) -> Result<u32, Status> {
        let message =
            ControllerStartRequest { sandbox_id: self.id.clone(), sandboxer: CONTROLLER.to_string() };
        Ok(self.node.call(self.controller().start(request(NAMESPACE, message)))?.pid)
    }

    pub fn status(&self) -> ControllerStatusResponse {
        self.made("status", self.try_status())
    }

    pub fn try_status(&self) -> Result<ControllerStatusResponse, Status> {
        let message = ControllerStatusRequest {
            sandbox_id: self.id.clone(),
            verbose: true,
            sandboxer: CONTROLLER.to_string(),
        };
        self.node.call(self.controller().status(request(NAMESPACE, message)))
    }

    pub fn metrics(&self) -> Metric {
        metrics_of(self.node, NAMESPACE, &self.id)
    }

    /// Waits for the end, in the background.
    pub fn wait(&self) -> Waiter {
        let message =
            ControllerWaitRequest { sandbox_id: self.id.clone(), sandboxer: CONTROLLER.to_string() };
        let mut controller = self.controller();
        self.node.spawn(async move { controller.wait(request(NAMESPACE, message)).await })
    }

    /// The exit status in the response to a Wait.
    pub fn waited(&self, waiter: Waiter) -> u32 {
        self.made("wait for", self.try_waited(waiter)).exit_status
    }

    pub fn try_waited(&self, waiter: Waiter) -> Result<ControllerWaitResponse, Status> {
        self.node.call(async { waiter.await.expect("the waiter") })
    }

    pub fn stop(&self) {
        self.made("stop", self.try_stop());
    }

    pub fn try_stop(&self) -> Result<(), Status> {
        let message = ControllerStopRequest {
            sandbox_id: self.id.clone(),
            timeout_secs: 20,
            sandboxer: CONTROLLER.to_string(),
        };
        self.node.call(self.controller().stop(request(NAMESPACE, message))).map(drop)
    }

    pub fn shut_down(&self) {
        self.made("shut down", self.try_shut_down());
    }

    pub fn try_shut_down(&self) -> Result<(), Status> {
        let message =
            ControllerShutdownRequest { sandbox_id: self.id.clone(), sandboxer: CONTROLLER.to_string() };
        self.node.call(self.controller().shutdown(request(NAMESPACE, message))).map(drop)
    }

    /// Removes it from containerd's store.
    pub fn try_forget(&self) -> Result<(), Status> {
        let message = StoreDeleteRequest { sandbox_id: self.id.clone() };
        let mut store = StoreClient::new(self.node.channel());
        self.node.call(store.delete(request(NAMESPACE, message))).map(drop)
    }

    /// The name of its unit.
    pub fn unit(&self) -> String {
        format!("containerd-{NAMESPACE}-{}.service", self.id)
    }

    /// The verbose part of the status, by name.
    pub fn info(&self) -> HashMap<String, String> {
        self.status().info
    }
}

/// The metrics of a sandbox, also of one of CRI's.
pub fn metrics_of(node: &Node, namespace: &str, id: &str) -> Metric {
    let message = ControllerMetricsRequest { sandbox_id: id.to_string(), sandboxer: CONTROLLER.to_string() };
    let answer = node.call(ControllerClient::new(node.channel()).metrics(request(namespace, message)));
    answer.unwrap_or_else(|error| panic!("metrics of {id}: {error:?}")).metrics.expect("metrics")
}

impl Drop for Sandbox<'_> {
    fn drop(&mut self) {
        // The test may have removed the sandbox already.
        let _ = self.try_shut_down();
        let _ = self.try_forget();
    }
}
