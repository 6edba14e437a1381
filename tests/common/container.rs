//! One container of a test: metadata, snapshot and task, made as a client makes them and removed on drop.

use std::time::Duration;

use containerd_client::services::v1::container::Runtime;
use containerd_client::services::v1::snapshots::{PrepareSnapshotRequest, RemoveSnapshotRequest};
use containerd_client::services::v1::{
    CloseIoRequest, Container as Metadata, CreateContainerRequest, CreateTaskRequest, DeleteContainerRequest,
    DeleteResponse, DeleteTaskRequest, GetRequest, KillRequest, ListPidsRequest, StartRequest, WaitRequest,
};
use containerd_client::tonic::Status;
use containerd_client::types::Mount;
use containerd_client::types::v1::Process;
use prost_types::{Any, Timestamp};

use super::image;
use super::node::{NAMESPACE, Node, request, unique};
use super::spec::Spec;

pub const SIGKILL: u32 = 9;
pub const SIGSEGV: u32 = 11;
pub const SIGTERM: u32 = 15;

/// How containerd writes "has not exited": Go's zero time, the first second of year 1.
pub const YEAR_ONE: i64 = -62_135_596_800;

const SNAPSHOTTER: &str = "overlayfs";
const EXIT_LIMIT: Duration = Duration::from_secs(60);

/// The stdio of a task as the API has it: paths, URIs or nothing.
#[derive(Clone, Debug, Default)]
pub struct Io {
    pub stdin: String,
    pub stdout: String,
    pub stderr: String,
}

/// How a task ended, as `Wait` tells it.
#[derive(Clone, Debug, PartialEq)]
pub struct Exit {
    pub status: u32,
    pub at: Option<Timestamp>,
}

/// A `Wait` under way.
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

/// What a container is to be, before containerd knows it.
pub struct Builder<'n> {
    node: &'n Node,
    namespace: String,
    id: String,
    runtime: String,
    options: Option<Any>,
    spec: Spec,
}

impl Node {
    /// A container whose id begins with `name`.
    pub fn container(&self, name: &str, spec: Spec) -> Builder<'_> {
        Builder {
            node: self,
            namespace: NAMESPACE.to_string(),
            id: unique(name),
            runtime: self.runtime.clone(),
            options: None,
            spec,
        }
    }
}

impl<'n> Builder<'n> {
    pub fn namespace(mut self, namespace: &str) -> Self {
        self.namespace = namespace.to_string();
        self
    }

    pub fn id(mut self, id: &str) -> Self {
        self.id = id.to_string();
        self
    }

    pub fn runtime(mut self, runtime: &str) -> Self {
        self.runtime = runtime.to_string();
        self
    }

    /// Runtime options, as CRI and `ctr` give them: on the container.
    pub fn options(mut self, options: Any) -> Self {
        self.options = Some(options);
        self
    }

    /// Makes snapshot and metadata; the task is still to be created.
    pub fn make(self) -> Container<'n> {
        let Builder { node, namespace, id, runtime, options, spec } = self;
        let parent = image::chain_id(node, &namespace);
        let mut container = Container { node, namespace, id, mounts: Vec::new() };
        let prepare = PrepareSnapshotRequest {
            snapshotter: SNAPSHOTTER.to_string(),
            key: container.id.clone(),
            parent,
            labels: [("containerd.io/gc.root".to_string(), "e2e".to_string())].into(),
        };
        container.mounts = node
            .call(node.snapshots().prepare(request(&container.namespace, prepare)))
            .unwrap_or_else(|error| panic!("prepare snapshot {}: {error}", container.id))
            .mounts;
        let spec = spec.or_default_cgroups_path(&container.namespace, &container.id);
        let metadata = Metadata {
            id: container.id.clone(),
            image: image::IMAGE.to_string(),
            runtime: Some(Runtime { name: runtime, options }),
            spec: Some(spec.to_any()),
            snapshotter: SNAPSHOTTER.to_string(),
            snapshot_key: container.id.clone(),
            ..Default::default()
        };
        let create = request(&container.namespace, CreateContainerRequest { container: Some(metadata) });
        node.call(node.containers().create(create))
            .unwrap_or_else(|error| panic!("create container {}: {error}", container.id));
        container
    }

    /// Makes the container and creates its task.
    pub fn created(self, io: &Io) -> Container<'n> {
        let container = self.make();
        container.create(io).unwrap_or_else(|error| panic!("create task {}: {error}", container.id));
        container
    }

    /// Makes the container, creates its task and starts it.
    pub fn started(self, io: &Io) -> Container<'n> {
        let container = self.created(io);
        container.start().unwrap_or_else(|error| panic!("start task {}: {error}", container.id));
        container
    }
}

pub struct Container<'n> {
    node: &'n Node,
    pub namespace: String,
    pub id: String,
    /// The rootfs, as the snapshotter wants it mounted; a test may break it.
    pub mounts: Vec<Mount>,
}

impl<'n> Container<'n> {
    /// Creates the task; returns its pid.
    pub fn create(&self, io: &Io) -> Result<u32, Status> {
        let create = CreateTaskRequest {
            container_id: self.id.clone(),
            rootfs: self.mounts.clone(),
            stdin: io.stdin.clone(),
            stdout: io.stdout.clone(),
            stderr: io.stderr.clone(),
            ..Default::default()
        };
        self.node.call(self.node.tasks().create(request(&self.namespace, create))).map(|answer| answer.pid)
    }

    pub fn start(&self) -> Result<u32, Status> {
        let start = StartRequest { container_id: self.id.clone(), ..Default::default() };
        self.node.call(self.node.tasks().start(request(&self.namespace, start))).map(|answer| answer.pid)
    }

    pub fn kill(&self, signal: u32) -> Result<(), Status> {
        self.signal(signal, false)
    }

    pub fn kill_all(&self, signal: u32) -> Result<(), Status> {
        self.signal(signal, true)
    }

    fn signal(&self, signal: u32, all: bool) -> Result<(), Status> {
        let kill = KillRequest { container_id: self.id.clone(), signal, all, ..Default::default() };
        self.node.call(self.node.tasks().kill(request(&self.namespace, kill)))
    }

    pub fn state(&self) -> Result<Process, Status> {
        let get = GetRequest { container_id: self.id.clone(), ..Default::default() };
        let answer = self.node.call(self.node.tasks().get(request(&self.namespace, get)))?;
        Ok(answer.process.expect("an answer to Get has a process"))
    }

    pub fn pid(&self) -> u32 {
        self.state().unwrap_or_else(|error| panic!("state of {}: {error}", self.id)).pid
    }

    pub fn pids(&self) -> Result<Vec<u32>, Status> {
        let list = ListPidsRequest { container_id: self.id.clone() };
        let answer = self.node.call(self.node.tasks().list_pids(request(&self.namespace, list)))?;
        Ok(answer.processes.into_iter().map(|process| process.pid).collect())
    }

    pub fn close_stdin(&self) -> Result<(), Status> {
        let close = CloseIoRequest { container_id: self.id.clone(), stdin: true, ..Default::default() };
        self.node.call(self.node.tasks().close_io(request(&self.namespace, close)))
    }

    /// Asks for the exit now and hands out the answer later.
    pub fn waiting(&self) -> Waiting<'n> {
        let mut tasks = self.node.tasks();
        let wait =
            request(&self.namespace, WaitRequest { container_id: self.id.clone(), ..Default::default() });
        let answer = self.node.spawn(async move {
            let answer = tasks.wait(wait).await?.into_inner();
            Ok(Exit { status: answer.exit_status, at: answer.exited_at })
        });
        Waiting { node: self.node, answer }
    }

    pub fn wait(&self) -> Result<Exit, Status> {
        self.waiting().exit()
    }

    /// The exit status; panics when there is none in time.
    pub fn exit_status(&self) -> u32 {
        self.wait().unwrap_or_else(|error| panic!("wait for {}: {error}", self.id)).status
    }

    pub fn delete(&self) -> Result<DeleteResponse, Status> {
        let delete = DeleteTaskRequest { container_id: self.id.clone() };
        self.node.call(self.node.tasks().delete(request(&self.namespace, delete)))
    }

    /// Kills the task, if there is one, and waits for its end.
    fn end(&self) {
        // An error says that it has ended or never was: then there is nothing to wait for.
        if self.kill_all(SIGKILL).is_ok() {
            let _ = self.wait();
        }
        let _ = self.delete();
    }
}

impl Drop for Container<'_> {
    fn drop(&mut self) {
        self.end();
        // What the test has removed itself is not there: nobody needs to hear of it.
        let delete = request(&self.namespace, DeleteContainerRequest { id: self.id.clone() });
        let _ = self.node.call(self.node.containers().delete(delete));
        let remove = RemoveSnapshotRequest { snapshotter: SNAPSHOTTER.to_string(), key: self.id.clone() };
        let _ = self.node.call(self.node.snapshots().remove(request(&self.namespace, remove)));
    }
}
