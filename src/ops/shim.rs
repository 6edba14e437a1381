//! `Shim`: the operations, and the services that they combine.

use std::path::PathBuf;
use std::sync::Arc;

use tokio::sync::mpsc;

use crate::cgroup::watch::Watch;
use crate::id::TaskKey;
use crate::oci::runtime::OciRuntime;
use crate::services::files::SlowFiles;
use crate::services::later::Later;
use crate::services::launcher::Launcher;
use crate::services::notifications::Notifications;
use crate::services::runtime_files::RuntimeFiles;
use crate::services::streams::Streams;
use crate::services::{Entry, Error, Tasks};
use crate::session::fds::StreamFds;
use crate::store::Store;
use crate::store::delete_replies::DeleteReplies;
use crate::store::failures::Failures;
use crate::supervise::{Cgroups, Cleanup, Units};
use crate::unit::relay::Relay;
use crate::unit::systemd::Systemd;

/// The parts from which the services are made.
pub struct Parts {
    /// The directories of tasks.
    pub store: Store,
    /// The last responses to Delete.
    pub delete_replies: DeleteReplies,
    /// Why operations have failed.
    pub failures: Failures,
    /// The status code of an error.
    pub code: fn(&Error) -> i32,
    /// The streams in the descriptor store.
    pub fds: StreamFds,
    /// Watches the cgroups of containers.
    pub cgroups: Arc<Watch<TaskKey>>,
    pub manager: Arc<dyn Systemd>,
    pub oci: Arc<dyn OciRuntime>,
    /// This program, which units run.
    pub program: PathBuf,
    /// Runs work on files that clients have named.
    pub files: SlowFiles,
    /// Runs work on the files of OCI runtimes.
    pub runtime_files: RuntimeFiles,
    /// Forwards the notifications of containers to systemd.
    pub relay: Relay,
}

/// The operations that need more than the tasks in memory. Supervision has parts of its own with fewer services; an
/// operation that needs only the tasks is a method of [`Tasks`].
pub struct Shim {
    /// The live tasks and their records.
    pub tasks: Arc<Tasks>,
    /// Applies what systemd reports about units.
    pub units: Arc<Units>,
    /// Applies what the kernel reports about cgroups.
    pub cgroups: Arc<Cgroups>,
    /// Removes tasks and parts of them.
    pub cleanup: Arc<Cleanup>,
    /// The directories of tasks.
    pub(crate) store: Store,
    /// The streams in the descriptor store.
    pub(crate) fds: Arc<StreamFds>,
    /// The sessions of processes, and their loggers.
    pub(crate) streams: Arc<Streams>,
    /// The notify sockets of containers.
    pub(crate) notifications: Notifications,
    /// The last responses to Delete.
    pub(super) delete_replies: DeleteReplies,
    /// Why operations have failed.
    pub(super) failures: Failures,
    /// The status code of an error.
    pub(super) code: fn(&Error) -> i32,
    /// Runs work on files that clients have named.
    pub(crate) files: SlowFiles,
    /// Runs work on the files of OCI runtimes.
    pub(crate) runtime_files: RuntimeFiles,
    pub(super) manager: Arc<dyn Systemd>,
    pub(super) oci: Arc<dyn OciRuntime>,
    /// How units run this program.
    pub(super) launcher: Arc<Launcher>,
    /// Begins what recovery has put off.
    pub(crate) later: Arc<Later>,
}

impl Shim {
    /// Puts the services together. Tasks that owe events come out of the returned receiver. It holds each task
    /// once at most; the events are in the outboxes.
    pub fn new(parts: Parts) -> (Arc<Self>, mpsc::UnboundedReceiver<Arc<Entry>>) {
        let Parts { store, delete_replies, failures, code, fds, .. } = parts;
        let Parts { cgroups, manager, oci, program, files, runtime_files, relay, .. } = parts;
        let (tasks, receiver) = Tasks::new(store.clone());
        let (tasks, fds, launcher) = (Arc::new(tasks), Arc::new(fds), Arc::new(Launcher::new(program)));
        let later = Arc::new(Later::new());
        let streams = Arc::new(Streams::new(
            fds.clone(),
            files.clone(),
            store.clone(),
            manager.clone(),
            launcher.clone(),
            later.clone(),
        ));
        let notifications = Notifications::new(fds.clone(), store.clone(), manager.clone(), relay);
        let cleanup = Arc::new(Cleanup {
            tasks: tasks.clone(),
            store: store.clone(),
            fds: fds.clone(),
            streams: streams.clone(),
            manager: manager.clone(),
            oci: oci.clone(),
            files: files.clone(),
            runtime_files: runtime_files.clone(),
            launcher: launcher.clone(),
        });
        let cgroups = Arc::new(Cgroups::new(tasks.clone(), manager.clone(), cgroups, later.clone()));
        let units =
            Units::new(tasks.clone(), manager.clone(), streams.clone(), cgroups.clone(), cleanup.clone());
        let shim = Self {
            tasks,
            units: Arc::new(units),
            cgroups,
            cleanup,
            store,
            fds,
            streams,
            notifications,
            delete_replies,
            failures,
            code,
            files,
            runtime_files,
            manager,
            oci,
            launcher,
            later,
        };
        (Arc::new(shim), receiver)
    }

    /// Background task: drops copies of OCI runtimes that have been idle for a while, and empty cgroups of OCI runtimes.
    /// Never returns.
    pub async fn forget_idle_runtimes(self: Arc<Self>) {
        self.launcher.forget_idle().await;
    }

    /// Removes the cgroups of OCI runtimes that have no processes.
    pub async fn remove_empty_cgroups(&self) {
        self.launcher.remove_empty_cgroups().await;
    }
}
