//! `serve`: the daemon. Wires the parts and keeps the order: listen to systemd, recover, publish,
//! serve, say so.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{mpsc, oneshot};
use tokio_util::task::TaskTracker;
use ttrpc::asynchronous::Server;
use ttrpc::asynchronous::transport::Listener;

use crate::api::{events, task::TaskService};
use crate::ops::Shim;
use crate::store::Store;
use crate::transport::listener;
use crate::transport::sockets::Owners;
use crate::unit::proxy::Manager;
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
    let sockets = take_sockets()?;
    telemetry::init();
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(WORKERS)
        .thread_stack_size(1 << 20)
        .thread_keep_alive(IDLE_THREAD)
        .max_blocking_threads(MAX_BLOCKING_THREADS)
        .enable_all()
        .build()
        .map_err(|error| Failure(format!("set up the runtime: {error}")))?;
    let served = runtime.block_on(serve(sockets));
    // A verb that hangs in blocking work must not keep the daemon from ending.
    runtime.shutdown_timeout(Duration::from_secs(1));
    served
}

fn take_sockets() -> Result<Vec<OwnedFd>, Failure> {
    let fds = sys::take_systemd_fds().map_err(|error| Failure(format!("take systemd's sockets: {error}")))?;
    let sockets: Vec<OwnedFd> =
        fds.into_iter().filter(|(found, _)| found == name::DAEMON_SOCKET).map(|(_, fd)| fd).collect();
    if sockets.is_empty() {
        return Err(Failure(format!("serve is for systemd: start {} instead", name::DAEMON_SOCKET)));
    }
    Ok(sockets)
}

async fn serve(sockets: Vec<OwnedFd>) -> Result<(), Failure> {
    let mut terminate =
        signal(SignalKind::terminate()).map_err(|error| Failure(format!("listen to SIGTERM: {error}")))?;
    tokio::spawn(notify::keep_alive());

    let manager = Arc::new(Manager::default());
    let (observed, mut observations) = mpsc::unbounded_channel();
    let (listening, first) = oneshot::channel();
    tokio::spawn(watch::run(manager.clone(), observed, listening));
    first.await.map_err(|_| Failure::new("systemd's signals can't be received"))?;

    let systemd = manager.systemd().await.map_err(Failure::new)?;
    let program = std::env::current_exe().map_err(|error| Failure(format!("find this program: {error}")))?;
    let (shim, outgoing) = Shim::new(Store::new(config::STATE_DIR), manager, systemd, program);
    shim.recover().await.map_err(Failure::new)?;
    tokio::spawn(events::publish(shim.clone(), outgoing));
    tokio::spawn(shim.clone().forget_idle());
    let observer = shim.clone();
    tokio::spawn(async move {
        while let Some(observation) = observations.recv().await {
            observer.observe(observation).await;
        }
    });

    let verbs = TaskTracker::new();
    let owners = Owners::new(config::STATE_DIR);
    let mut servers = Vec::new();
    for fd in sockets {
        let (socket, listener) =
            listener::from_systemd(fd).map_err(|error| Failure(format!("a socket: {error}")))?;
        let services = TaskService::new(shim.clone(), socket, owners.clone(), verbs.clone()).services();
        let listener = Listener::new(listener::accepted(listener));
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
    notify::stopping();
    tracing::info!("stopping");
    for server in &mut servers {
        server.stop_listen().await;
    }
    verbs.close();
    if tokio::time::timeout(STOP_LIMIT, verbs.wait()).await.is_err() {
        tracing::warn!("calls under way are cut off");
    }
    Ok(())
}

/// How long calls under way may take after SIGTERM.
const STOP_LIMIT: Duration = Duration::from_secs(5);
