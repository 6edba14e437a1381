//! One process of a task, init process or exec: the calls that both have.

use std::time::Duration;

use containerd_client::services::v1::{
    CloseIoRequest, DeleteProcessRequest, DeleteResponse, DeleteTaskRequest, GetRequest, KillRequest,
    ResizePtyRequest, StartRequest, WaitRequest,
};
use containerd_client::tonic::{Code, Status};
use containerd_client::types::v1::{Process as State, Status as Phase};
use prost_types::Timestamp;

use super::node::{NAMESPACE, Node, request};

pub const SIGKILL: u32 = 9;
pub const SIGSEGV: u32 = 11;
pub const SIGTERM: u32 = 15;

/// The time of a process that has not exited: Go's zero time, the first second of year 1.
pub const YEAR_ONE: i64 = -62_135_596_800;

const EXIT_LIMIT: Duration = Duration::from_secs(60);

/// The stdio strings of a process: paths, URIs or empty texts.
#[derive(Clone, Debug, Default)]
pub struct Io {
    pub stdin: String,
    pub stdout: String,
    pub stderr: String,
}

/// The exit of a process, from `Wait`.
#[derive(Clone, Debug, PartialEq)]
pub struct Exit {
    pub status: u32,
    pub at: Option<Timestamp>,
}

/// A `Wait` call that has no response yet.
pub struct Waiting<'n> {
    node: &'n Node,
    answer: tokio::task::JoinHandle<Result<Exit, Status>>,
}

impl Waiting<'_> {
    pub fn exit(self) -> Result<Exit, Status> {
        self.exit_within(EXIT_LIMIT)
    }

    pub fn exit_within(self, limit: Duration) -> Result<Exit, Status> {
        self.node.block_on(async {
            match tokio::time::timeout(limit, self.answer).await {
                Ok(answer) => answer.expect("the future that waits does not panic"),
                Err(_) => Err(Status::deadline_exceeded(format!("Wait gave no answer in {limit:?}"))),
            }
        })
    }

    pub fn is_over(&self) -> bool {
        self.answer.is_finished()
    }
}

/// An init process or an exec, by its names. It need not exist.
#[derive(Clone)]
pub struct Process<'n> {
    pub node: &'n Node,
    pub namespace: String,
    /// The container's id.
    pub container: String,
    /// The exec's id; empty for the init process.
    pub exec: String,
}

impl<'n> Process<'n> {
    /// The init process of a container in the namespace of the tests, whoever has made it.
    pub fn init(node: &'n Node, id: &str) -> Self {
        Self { node, namespace: NAMESPACE.to_string(), container: id.to_string(), exec: String::new() }
    }

    /// Starts it; returns its pid.
    pub fn start(&self) -> Result<u32, Status> {
        let start = StartRequest { container_id: self.container.clone(), exec_id: self.exec.clone() };
        self.node.call(self.node.tasks().start(request(&self.namespace, start))).map(|answer| answer.pid)
    }

    pub fn kill(&self, signal: u32) -> Result<(), Status> {
        self.signal(signal, false)
    }

    pub fn kill_all(&self, signal: u32) -> Result<(), Status> {
        self.signal(signal, true)
    }

    fn signal(&self, signal: u32, all: bool) -> Result<(), Status> {
        let kill =
            KillRequest { container_id: self.container.clone(), exec_id: self.exec.clone(), signal, all };
        self.node.call(self.node.tasks().kill(request(&self.namespace, kill)))
    }

    pub fn state(&self) -> Result<State, Status> {
        let get = GetRequest { container_id: self.container.clone(), exec_id: self.exec.clone() };
        let answer = self.node.call(self.node.tasks().get(request(&self.namespace, get)))?;
        Ok(answer.process.expect("an answer to Get has a process"))
    }

    pub fn pid(&self) -> u32 {
        self.state().unwrap_or_else(|error| panic!("state of {}: {error}", self.name())).pid
    }

    pub fn phase(&self) -> Phase {
        self.state().unwrap_or_else(|error| panic!("state of {}: {error}", self.name())).status()
    }

    pub fn close_stdin(&self) -> Result<(), Status> {
        let close =
            CloseIoRequest { container_id: self.container.clone(), exec_id: self.exec.clone(), stdin: true };
        self.node.call(self.node.tasks().close_io(request(&self.namespace, close)))
    }

    /// Sets the size of its terminal.
    pub fn resize(&self, width: u32, height: u32) -> Result<(), Status> {
        let (container_id, exec_id) = (self.container.clone(), self.exec.clone());
        let resize = ResizePtyRequest { container_id, exec_id, width, height };
        self.node.call(self.node.tasks().resize_pty(request(&self.namespace, resize)))
    }

    /// Calls `Wait`. The returned value can wait for the response.
    pub fn waiting(&self) -> Waiting<'n> {
        let mut tasks = self.node.tasks();
        let wait = WaitRequest { container_id: self.container.clone(), exec_id: self.exec.clone() };
        let wait = request(&self.namespace, wait);
        let answer = self.node.spawn(async move {
            let answer = tasks.wait(wait).await?.into_inner();
            Ok(Exit { status: answer.exit_status, at: answer.exited_at })
        });
        Waiting { node: self.node, answer }
    }

    pub fn wait(&self) -> Result<Exit, Status> {
        self.waiting().exit()
    }

    /// Waits for the exit status; panics if it does not come in time.
    pub fn exit_status(&self) -> u32 {
        self.wait().unwrap_or_else(|error| panic!("wait for {}: {error}", self.name())).status
    }

    pub fn delete(&self) -> Result<DeleteResponse, Status> {
        let (mut tasks, container_id) = (self.node.tasks(), self.container.clone());
        if self.exec.is_empty() {
            let delete = DeleteTaskRequest { container_id };
            self.node.call(tasks.delete(request(&self.namespace, delete)))
        } else {
            let delete = DeleteProcessRequest { container_id, exec_id: self.exec.clone() };
            self.node.call(tasks.delete_process(request(&self.namespace, delete)))
        }
    }

    /// Kills the process if it exists, waits for its exit, and deletes it.
    pub fn end(&self) {
        // After an error there is nothing to wait for: the process has ended or never existed.
        if self.kill_all(SIGKILL).is_ok() {
            let _ = self.wait();
        }
        let _ = self.delete();
    }

    /// The name of the process in messages.
    pub fn name(&self) -> String {
        match self.exec.as_str() {
            "" => self.container.clone(),
            exec => format!("{}:{exec}", self.container),
        }
    }
}

/// Asserts that the phase does not allow a call. The stock shim returns Unknown, ours FailedPrecondition; no client
/// distinguishes them.
pub fn assert_refused<T: std::fmt::Debug>(answer: Result<T, Status>) {
    let refusal = answer.expect_err("not in this phase");
    assert!(matches!(refusal.code(), Code::FailedPrecondition | Code::Unknown), "{refusal}");
}
