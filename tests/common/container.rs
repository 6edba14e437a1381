//! One container of a test: metadata, snapshot and task, created the way clients do, and removed on drop.

use std::ops::Deref;

use containerd_client::services::v1::container::Runtime;
use containerd_client::services::v1::snapshots::{PrepareSnapshotRequest, RemoveSnapshotRequest};
use containerd_client::services::v1::{
    CheckpointTaskRequest, Container as Metadata, CreateContainerRequest, CreateTaskRequest,
    DeleteContainerRequest, ListPidsRequest, MetricsRequest, PauseTaskRequest, ResumeTaskRequest,
    UpdateTaskRequest,
};
use containerd_client::tonic::Status;
use containerd_client::types::v1::ProcessInfo;
use containerd_client::types::{Descriptor, Mount};
use prost_types::Any;

use super::image;
use super::lease::{Images, Lease};
use super::node::{NAMESPACE, Node, request, unique};
use super::spec::Spec;
use super::task::Process;

pub use super::task::Io;
const SNAPSHOTTER: &str = "overlayfs";

/// A container that containerd does not know yet.
pub struct Builder<'n> {
    node: &'n Node,
    namespace: String,
    id: String,
    runtime: String,
    options: Option<Any>,
    sandbox: String,
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
            sandbox: String::new(),
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

    /// Runtime options in the container's metadata, as CRI and `ctr` send them.
    pub fn options(mut self, options: Any) -> Self {
        self.options = Some(options);
        self
    }

    /// Puts the container into a sandbox of containerd.
    pub fn sandbox(mut self, id: &str) -> Self {
        self.sandbox = id.to_string();
        self
    }

    /// Creates the snapshot and the metadata, but no task.
    pub fn make(self) -> Container<'n> {
        let id = self.id.clone();
        self.try_make().unwrap_or_else(|error| panic!("make container {id}: {error}"))
    }

    /// As [`Self::make`], but returns the error.
    pub fn try_make(self) -> Result<Container<'n>, Status> {
        let Builder { node, namespace, id, runtime, options, sandbox, spec } = self;
        let parent = image::chain_id(node, &namespace);
        let init = Process { node, namespace, container: id.clone(), exec: String::new() };
        let mut container = Container { init, id, terminal: spec.has_terminal(), mounts: Vec::new() };
        let prepare = PrepareSnapshotRequest {
            snapshotter: SNAPSHOTTER.to_string(),
            key: container.id.clone(),
            parent,
            labels: [("containerd.io/gc.root".to_string(), "e2e".to_string())].into(),
        };
        container.mounts =
            node.call(node.snapshots().prepare(request(&container.namespace, prepare)))?.mounts;
        let spec = spec.or_default_cgroups_path(&container.namespace, &container.id);
        let metadata = Metadata {
            id: container.id.clone(),
            image: image::IMAGE.to_string(),
            runtime: Some(Runtime { name: runtime, options }),
            sandbox,
            spec: Some(spec.to_any()),
            snapshotter: SNAPSHOTTER.to_string(),
            snapshot_key: container.id.clone(),
            ..Default::default()
        };
        let create = request(&container.namespace, CreateContainerRequest { container: Some(metadata) });
        node.call(node.containers().create(create))?;
        Ok(container)
    }

    /// Creates the container and its task.
    pub fn created(self, io: &Io) -> Container<'n> {
        let container = self.make();
        container.create(io).unwrap_or_else(|error| panic!("create task {}: {error}", container.id));
        container
    }

    /// Creates the container and its task, and starts the task.
    pub fn started(self, io: &Io) -> Container<'n> {
        let container = self.created(io);
        container.start().unwrap_or_else(|error| panic!("start task {}: {error}", container.id));
        container
    }
}

/// A container can be used in place of its init process.
pub struct Container<'n> {
    init: Process<'n>,
    pub id: String,
    terminal: bool,
    /// The mounts of the rootfs, from the snapshotter; a test may change them.
    pub mounts: Vec<Mount>,
}

impl<'n> Deref for Container<'n> {
    type Target = Process<'n>;

    fn deref(&self) -> &Process<'n> {
        &self.init
    }
}

impl<'n> Container<'n> {
    /// The bundle that containerd makes for the task.
    pub fn bundle(&self) -> String {
        format!("/run/containerd/io.containerd.runtime.v2.task/{}/{}", self.namespace, self.id)
    }

    /// Creates the task; returns its pid.
    pub fn create(&self, io: &Io) -> Result<u32, Status> {
        self.create_with(None, io)
    }

    fn create_with(&self, checkpoint: Option<Descriptor>, io: &Io) -> Result<u32, Status> {
        let create = CreateTaskRequest {
            container_id: self.id.clone(),
            rootfs: self.mounts.clone(),
            stdin: io.stdin.clone(),
            stdout: io.stdout.clone(),
            stderr: io.stderr.clone(),
            terminal: self.terminal,
            checkpoint,
            ..Default::default()
        };
        self.node.call(self.node.tasks().create(request(&self.namespace, create))).map(|answer| answer.pid)
    }

    /// Creates the task from a checkpoint; returns its pid.
    pub fn create_from(&self, checkpoint: &Descriptor, io: &Io) -> Result<u32, Status> {
        self.create_with(Some(checkpoint.clone()), io)
    }

    /// Takes a checkpoint; returns its images.
    pub fn checkpoint(&self, options: Any) -> Result<Images<'n>, Status> {
        let lease = Lease::new(self.node, &self.namespace);
        let checkpoint = CheckpointTaskRequest {
            container_id: self.id.clone(),
            options: Some(options),
            ..Default::default()
        };
        let checkpoint = lease.request(checkpoint);
        let answer = self.node.call(self.node.tasks().checkpoint(checkpoint))?;
        let images = answer.descriptors.into_iter().find(|one| one.media_type.contains("criu.checkpoint"));
        Ok(Images { descriptor: images.expect("containerd returns the images"), _lease: lease })
    }

    pub fn pause(&self) -> Result<(), Status> {
        let pause = PauseTaskRequest { container_id: self.id.clone() };
        self.node.call(self.node.tasks().pause(request(&self.namespace, pause)))
    }

    pub fn resume(&self) -> Result<(), Status> {
        let resume = ResumeTaskRequest { container_id: self.id.clone() };
        self.node.call(self.node.tasks().resume(request(&self.namespace, resume)))
    }

    /// Changes the limits; the argument is OCI `LinuxResources`.
    pub fn update(&self, resources: &serde_json::Value) -> Result<(), Status> {
        let resources = Any {
            type_url: "types.containerd.io/opencontainers/runtime-spec/1/LinuxResources".to_string(),
            value: resources.to_string().into_bytes(),
        };
        let update = UpdateTaskRequest {
            container_id: self.id.clone(),
            resources: Some(resources),
            ..Default::default()
        };
        self.node.call(self.node.tasks().update(request(&self.namespace, update)))
    }

    pub fn pids(&self) -> Result<Vec<u32>, Status> {
        Ok(self.processes()?.into_iter().map(|process| process.pid).collect())
    }

    /// All processes, with the shim's details of each.
    pub fn processes(&self) -> Result<Vec<ProcessInfo>, Status> {
        let list = ListPidsRequest { container_id: self.id.clone() };
        let answer = self.node.call(self.node.tasks().list_pids(request(&self.namespace, list)))?;
        Ok(answer.processes)
    }

    /// The statistics; `None` if the shim has none, which containerd reports like an error.
    pub fn metrics(&self) -> Option<Any> {
        let filters = vec![format!("id=={}", self.id)];
        let answer =
            self.node.call(self.node.tasks().metrics(request(&self.namespace, MetricsRequest { filters })));
        let found = answer.unwrap_or_else(|error| panic!("metrics of {}: {error}", self.id)).metrics;
        found.into_iter().find(|metric| metric.id == self.id)?.data
    }

    pub fn remove_metadata(&self) -> Result<(), Status> {
        let delete = request(&self.namespace, DeleteContainerRequest { id: self.id.clone() });
        self.node.call(self.node.containers().delete(delete))
    }

    pub fn remove_snapshot(&self) -> Result<(), Status> {
        let remove = RemoveSnapshotRequest { snapshotter: SNAPSHOTTER.to_string(), key: self.id.clone() };
        self.node.call(self.node.snapshots().remove(request(&self.namespace, remove)))
    }

    /// A process of the task by exec id; it need not exist.
    pub fn process(&self, exec: &str) -> Process<'n> {
        Process { exec: exec.to_string(), ..self.init.clone() }
    }
}

impl Drop for Container<'_> {
    fn drop(&mut self) {
        self.end();
        // The test may have removed the container already, so an error is ignored.
        let _ = self.remove_metadata();
        let _ = self.remove_snapshot();
    }
}
