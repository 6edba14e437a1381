//! `serve`: the daemon. Wires the parts and keeps the order: listen to systemd, recover, publish,
//! serve, say so.

use std::os::fd::{BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use futures_util::{StreamExt, stream};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{mpsc, oneshot};
use ttrpc::asynchronous::Server;
use ttrpc::asynchronous::transport::Listener;

use crate::api::{events, task::TaskService};
use crate::fault::{self, Point};
use crate::ops::Shim;
use crate::ops::kept::Kept;
use crate::store::Store;
use crate::store::answers::Answers;
use crate::transport::Keep;
use crate::transport::listener::{self, Connections};
use crate::transport::sockets::Owners;
use crate::unit::notify::FdStore;
use crate::unit::proxy::Manager;
use crate::unit::refs::Refs;
use crate::unit::{name, notify, watch};
use crate::{config, sys, telemetry};

use super::Failure;

/// D-Bus signals, requests and pumps are short work: two threads are plenty for a node.
const WORKERS: usize = 2;
/// Threads for blocking work go away after this, and their stacks with them.
const IDLE_THREAD: Duration = Duration::from_secs(2);
const MAX_BLOCKING_THREADS: usize = 64;

pub(super) fn run() -> Result<(), Failure> {
    // Before any thread: it takes the descriptors out of the environment.
    let passed = take_passed()?;
    telemetry::init();
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(WORKERS)
        .thread_stack_size(1 << 20)
        .thread_keep_alive(IDLE_THREAD)
        .max_blocking_threads(MAX_BLOCKING_THREADS)
        .enable_all()
        .build()
        .map_err(|error| Failure(format!("set up the runtime: {error}")))?;
    let served = runtime.block_on(serve(passed));
    // A verb that hangs in blocking work must not keep the daemon from ending.
    runtime.shutdown_timeout(Duration::from_secs(1));
    served
}

/// What systemd passes to the daemon.
struct Passed {
    /// The sockets to listen at.
    sockets: Vec<OwnedFd>,
    /// What earlier daemons have had it keep, by name.
    kept: Vec<(String, OwnedFd)>,
}

fn take_passed() -> Result<Passed, Failure> {
    let fds = sys::take_systemd_fds().map_err(|error| Failure(format!("take systemd's sockets: {error}")))?;
    let (sockets, kept): (Vec<_>, Vec<_>) =
        fds.into_iter().partition(|(found, _)| found == name::DAEMON_SOCKET);
    if sockets.is_empty() {
        return Err(Failure(format!("serve is for systemd: start {} instead", name::DAEMON_SOCKET)));
    }
    Ok(Passed { sockets: sockets.into_iter().map(|(_, fd)| fd).collect(), kept })
}

impl Keep for FdStore {
    fn keep(&self, name: &str, fds: &[BorrowedFd<'_>]) {
        Self::keep(self, name, fds);
    }

    fn forget(&self, name: &str) {
        Self::forget(self, name);
    }
}

async fn serve(passed: Passed) -> Result<(), Failure> {
    let mut terminate =
        signal(SignalKind::terminate()).map_err(|error| Failure(format!("listen to SIGTERM: {error}")))?;
    tokio::spawn(notify::keep_alive());

    let Passed { sockets, mut kept } = passed;
    let fd_store = FdStore::new().map_err(|error| Failure(format!("reach systemd's store: {error}")))?;
    let fd_store = Arc::new(fd_store);
    let (connections, mut adopted) = Connections::adopt(fd_store.clone(), &mut kept);
    let refs = Refs::new(fd_store.clone(), &mut kept);
    let manager = Arc::new(Manager::with_refs(Arc::new(refs)));
    let (observed, mut observations) = mpsc::unbounded_channel();
    let (listening, first) = oneshot::channel();
    tokio::spawn(watch::run(manager.clone(), observed, listening));
    first.await.map_err(|_| Failure::new("systemd's signals can't be received"))?;

    let systemd = manager.systemd().await.map_err(Failure::new)?;
    let program = std::env::current_exe().map_err(|error| Failure(format!("find this program: {error}")))?;
    let answers = Answers::open(Path::new(config::STATE_DIR)).map_err(Failure::new)?;
    let kept = Kept::new(fd_store, kept);
    let (shim, outgoing) = Shim::new(Store::new(config::STATE_DIR), answers, kept, manager, systemd, program);
    fault::point(Point::RecoverTaken);
    shim.recover().await.map_err(Failure::new)?;
    fault::point(Point::RecoverTasks);
    tokio::spawn(events::publish(shim.clone(), outgoing));
    tokio::spawn(shim.clone().forget_idle());
    let observer = shim.clone();
    tokio::spawn(async move {
        while let Some(observation) = observations.recv().await {
            observer.observe(observation).await;
        }
    });

    let owners = Owners::new(config::STATE_DIR);
    let mut servers = Vec::new();
    for fd in sockets {
        let (socket, listener) =
            listener::from_systemd(fd).map_err(|error| Failure(format!("a socket: {error}")))?;
        let services = TaskService::new(shim.clone(), socket, owners.clone()).services();
        let earlier = adopted.extract_if(.., |(from, _)| *from == socket);
        let earlier: Vec<_> = earlier.map(|(_, connection)| Ok(connection)).collect();
        let later = connections.clone().accept(listener);
        let later = later.map_err(|error| Failure(format!("watch a socket: {error}")))?;
        let listener = Listener::new(stream::iter(earlier).chain(later));
        let mut server = Server::new().add_listener(listener).register_service(services);
        server.start().await.map_err(|error| Failure(format!("serve: {error}")))?;
        servers.push(server);
    }

    let tasks = shim.task_count();
    let (version, systemd) = (env!("CARGO_PKG_VERSION"), systemd.version());
    tracing::info!(
        version,
        systemd,
        tasks,
        "version {version} on systemd {systemd} serves, {tasks} tasks found"
    );
    notify::ready(&format!("serving, {tasks} tasks found"));

    terminate.recv().await;
    // What is under way stays as it is, and the next daemon goes on with it: there is but one way to end.
    notify::stopping();
    tracing::info!("stopping");
    Ok(())
}
