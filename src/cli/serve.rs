//! `serve`: the daemon. Connects its parts in this order: receive systemd's signals, recover, publish events, serve calls,
//! notify systemd.

use std::convert::Infallible;
use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{mpsc, oneshot};

use crate::api::status;
use crate::cgroup::watch::Watch;
use crate::fault::{self, Point};
use crate::guard::{self, Guard};
use crate::launch;
use crate::oci::command::CommandLine;
use crate::oci::namespaces;
use crate::ops::{Parts, Shim};
use crate::services::Entry;
use crate::services::files::SlowFiles;
use crate::services::runtime_files::RuntimeFiles;
use crate::session::fds::{StreamFds, StreamKind};
use crate::store::Store;
use crate::store::delete_replies::DeleteReplies;
use crate::store::failures::Failures;
use crate::suspect::{self, Crashes};
use crate::transport::ConnectionStore;
use crate::transport::event_connection::EventConnections;
use crate::transport::listener::{Adopted, Connections};
use crate::transport::sockets::Socket;
use crate::unit::fd_store::FdStore;
use crate::unit::manager::Manager;
use crate::unit::notify::THREAD_INTERVAL;
use crate::unit::refs::{self, Refs};
use crate::unit::relay::Relay;
use crate::unit::{bus_config, name, notify, properties, watch};
use crate::{config, recovery, sys, telemetry};

use self::waking::Waking;
use self::workers::Workers;
use super::{Failure, calls, first_threads, serving};

mod waking;
mod workers;

/// The number of threads for D-Bus signals and requests, which all do short work.
const WORKERS: usize = 2;
/// There are as many heaps as worker threads.
const HEAPS: i32 = 2;
/// Idle threads for blocking work end after this time, which frees their stacks. At least one always exists
/// ([`keep_alive`](crate::unit::notify::Notifier::keep_alive)): if the system allows no new thread, blocking work
/// continues, although slowly.
const IDLE_THREAD: Duration = THREAD_INTERVAL.saturating_mul(2).saturating_add(Duration::from_secs(2));
const MAX_BLOCKING_THREADS: usize = 64;
/// The private memory of the daemon, in bytes. With 1,000 containers it has some 30 MB. A request that needs more because
/// of a bug crashes the daemon, and the crash is recorded. Without this limit, the kernel's OOM killer would end
/// containers first, and the daemon last.
const MAX_DATA: u64 = 2 << 30;
/// After this time, everything that recovery began is done. A later crash is not attributed to a record.
const RECOVERED: Duration = Duration::from_secs(60);
/// How long the removal of empty cgroups may delay the end of the daemon.
const SWEEP_LIMIT: Duration = Duration::from_secs(2);

pub(super) fn run() -> Result<(), Failure> {
    telemetry::init();
    sys::limit_unused_memory(HEAPS);
    // A drop-in for all services can give the daemon its own mount namespace with read-only directories. But the daemon
    // mounts and unmounts for containers, and writes below /run.
    if let Err(error) = namespaces::enter_mounts_of_init() {
        tracing::warn!(%error, "can't enter the host's mount namespace, so the daemon stays in its own: {error}");
    }
    if let Err(error) = sys::child::limit_data(MAX_DATA) {
        tracing::warn!(%error, "can't limit the memory of the daemon: {error}");
    }
    let mut earlier = guard::Earlier::find();
    // Before anything is accepted or opened.
    let guard = Guard::start();
    // Before any thread starts, as this changes the environment.
    let passed = take_passed()?;
    first_threads::start(WORKERS, &mut earlier)?;
    let mut builder = tokio::runtime::Builder::new_multi_thread();
    builder
        .worker_threads(WORKERS)
        .thread_stack_size(1 << 20)
        .thread_keep_alive(IDLE_THREAD)
        .max_blocking_threads(MAX_BLOCKING_THREADS)
        .enable_all();
    let runtime = sys::quota::runtime(builder, || ())
        .map_err(|error| Failure(format!("can't set up the async runtime: {error}")))?;
    let served = runtime.block_on(serve(passed, guard, earlier));
    // Skips destructors, as with SIGKILL: they would remove descriptors and sockets that the next daemon needs.
    std::mem::forget(runtime);
    served
}

/// What systemd passes to the daemon.
struct Passed {
    /// The sockets to listen on.
    sockets: Vec<OwnedFd>,
    /// The contents of the descriptor store, by name.
    stored: Vec<(String, OwnedFd)>,
}

/// True if systemd passed descriptors. Otherwise the daemon was started by hand, or without its socket.
pub(super) fn has_work() -> bool {
    std::env::var_os("LISTEN_FDS").is_some()
}

fn take_passed() -> Result<Passed, Failure> {
    let fds = sys::take_systemd_fds()
        .map_err(|error| Failure(format!("can't take the sockets from systemd: {error}")))?;
    let (sockets, stored): (Vec<_>, Vec<_>) =
        fds.into_iter().partition(|(found, _)| found == name::DAEMON_SOCKET);
    if sockets.is_empty() {
        // The service was started without its socket. Kept connections are served.
        tracing::warn!("no socket to listen on: {} is not active", name::DAEMON_SOCKET);
    }
    Ok(Passed { sockets: sockets.into_iter().map(|(_, fd)| fd).collect(), stored })
}

#[async_trait]
impl ConnectionStore for FdStore {
    async fn keep(&self, name: &str, fds: &[BorrowedFd<'_>]) -> io::Result<()> {
        self.has_room_for_connection().map_err(io::Error::other)?;
        self.keep_async(name, fds).await.map_err(io::Error::other)
    }

    fn forget(&self, name: &str) {
        Self::forget(self, name);
    }
}

async fn serve(
    passed: Passed,
    guard: Result<Guard, guard::Error>,
    mut earlier: guard::Earlier,
) -> Result<(), Failure> {
    let mut terminate =
        signal(SignalKind::terminate()).map_err(|error| Failure(format!("can't handle SIGTERM: {error}")))?;
    let crashes = open_crashes();
    let store = Store::new(config::STATE_DIR);
    // Another thread reads the records while this one takes over what systemd has kept.
    let records = recovery::read_records(store.clone(), crashes.clone());
    let mut workers = Workers::default();
    let TakenOver { sockets, fd_store, mut kept, connections, adopted, consoles } =
        take_over(passed, guard, &mut earlier, &crashes, &mut workers).await?;
    let event_connections = EventConnections::adopt(fd_store.clone(), &mut kept);
    let refs = Refs::new(fd_store.clone(), &mut kept, refs::limit(bus_config::match_rules()));
    let manager = Arc::new(Manager::with_refs(Arc::new(refs)));
    receive_signals(&manager, &mut workers).await?;
    let systemd = manager.supported_version().await.map_err(Failure::new)?;
    Waking::dismiss(&manager).await?;
    let program = std::env::current_exe()
        .map_err(|error| Failure(format!("can't find the path of this program: {error}")))?;
    let waking =
        Waking { manager: manager.clone(), connections: connections.clone(), program: program.clone() };
    let fds = StreamFds::new(fd_store.clone(), kept);
    consoles.into_iter().for_each(|(path, connection)| fds.add_console(path, connection.into()));
    let (shim, outgoing) = assemble(store, fds, manager.clone(), program)?;

    fault::point(Point::RecoverTaken);
    let records = records.await.map_err(Failure::new)?.map_err(Failure::new)?;
    let streams = shim.recover(records).await;
    tokio::spawn(async move {
        if streams.await.is_ok() {
            // This daemon has opened and kept everything that was open only in ended daemons.
            earlier.end();
        }
    });
    fault::point(Point::RecoverTasks);
    workers.spawn_all(&shim, manager, outgoing, event_connections);
    crashes.forget_answered();
    workers.spawn("forgetting crashes of records", forget_crashes(crashes));
    for calls in calls::of_sockets(sockets, &shim, &connections, adopted)? {
        workers.spawn("serving calls", calls.serve());
    }
    let tasks = shim.tasks.count();
    announce(&systemd, tasks);
    let ready = async {
        fd_store.notifier().ready(&format!("serving, {tasks} tasks recovered")).await;
        std::future::pending::<Infallible>().await
    };
    tokio::select! {
        _ = terminate.recv() => {}
        never = ready => match never {},
        failure = workers.ended() => return Err(failure),
    }
    // Running work is left as it is, and the next daemon continues it, as after a crash.
    fd_store.notifier().stopping();
    tracing::info!("stopping");
    // systemd starts no unit while the machine shuts down.
    let is_last = waking.serve_last_calls().await;
    waking.prepare(systemd.has_fd_store_preserve() && !is_last).await;
    // Cgroups for which the kernel needs longer stay until another daemon removes them.
    let _ = tokio::time::timeout(SWEEP_LIMIT, shim.remove_empty_cgroups()).await;
    Ok(())
}

fn open_crashes() -> Arc<Crashes> {
    let crashes = Crashes::open(Path::new(config::CRASHES)).unwrap_or_else(|error| {
        tracing::error!(%error, "can't record crashes, so a request that crashes the daemon is tried again without limit: {error}");
        Crashes::default()
    });
    Arc::new(crashes)
}

/// What earlier daemons have left.
struct TakenOver {
    /// The sockets to listen on.
    sockets: Vec<OwnedFd>,
    fd_store: Arc<FdStore>,
    /// What the descriptor store has besides `adopted`, by name.
    kept: Vec<(String, OwnedFd)>,
    connections: Arc<Connections>,
    /// The connections of clients.
    adopted: Vec<Adopted>,
    /// The connections to console sockets, with their paths.
    consoles: guard::Rescued,
}

/// Takes over what systemd has kept and what is open in earlier daemons. Starts the work that must not wait for recovery.
async fn take_over(
    passed: Passed,
    guard: Result<Guard, guard::Error>,
    earlier: &mut guard::Earlier,
    crashes: &Crashes,
    workers: &mut Workers,
) -> Result<TakenOver, Failure> {
    let Passed { sockets, stored } = passed;
    let mut inodes = guard::Inodes::of(sockets.iter().chain(stored.iter().map(|(_, fd)| fd)));
    let (fd_store, mut kept) = FdStore::adopt(stored)
        .map_err(|error| Failure(format!("can't connect to systemd's notify socket: {error}")))?;
    inodes.add(kept.iter().filter(|(name, _)| StreamKind::may_have_sockets(name)).map(|(_, fd)| fd));
    let rescued = earlier.connections(inodes);
    let fd_store = Arc::new(fd_store);
    workers.spawn("keeping a guard", guard::keep(guard));
    let alive = fd_store.clone();
    workers.spawn("sending watchdog messages", async move { alive.notifier().keep_alive().await });
    if let Some(interval) = notify::watchdog_interval() {
        workers.spawn("watching for requests that hang", suspect::end_if_hanging(interval / 2));
    }
    let (connections, adopted, consoles) = adopt_connections(&fd_store, &mut kept, rescued, crashes).await?;
    Ok(TakenOver { sockets, fd_store, kept, connections, adopted, consoles })
}

/// Receives systemd's signals from now on.
async fn receive_signals(manager: &Arc<Manager>, workers: &mut Workers) -> Result<(), Failure> {
    let (listening, first) = oneshot::channel();
    workers.spawn("receiving systemd's signals", watch::run(manager.clone(), listening));
    first.await.map_err(|_| Failure::new("systemd's signals can't be received"))
}

/// Puts the parts of the shim together. Returns it, and the tasks that have events to publish.
fn assemble(
    store: Store,
    fds: StreamFds,
    manager: Arc<Manager>,
    program: PathBuf,
) -> Result<(Arc<Shim>, mpsc::UnboundedReceiver<Arc<Entry>>), Failure> {
    let commands = launch::cgroup::of_commands().map_err(Failure::new)?;
    Ok(Shim::new(Parts {
        store,
        delete_replies: DeleteReplies::open(Path::new(config::STATE_DIR)).map_err(Failure::new)?,
        failures: Failures::open(Path::new(config::STATE_DIR)).map_err(Failure::new)?,
        code: status::number,
        fds,
        cgroups: Watch::new(),
        manager,
        oci: Arc::new(CommandLine::in_cgroup(commands)),
        program,
        files: SlowFiles::new(config::FILES_LIMIT),
        runtime_files: RuntimeFiles::new(config::RUNTIME_FILES_LIMIT),
        relay: Relay::new(),
    }))
}

/// Background task: forgets the crashes of records once recovery can't be their reason any more.
async fn forget_crashes(crashes: Arc<Crashes>) {
    tokio::time::sleep(RECOVERED).await;
    crashes.forget_records();
    // The file stays open: the daemon has the same number of descriptors at any time.
    std::future::pending::<()>().await;
    drop(crashes);
}

/// Tells `start` and the journal that the daemon serves.
fn announce(systemd: &properties::SystemdVersion, tasks: usize) {
    serving::announce(Path::new(config::SERVING)).unwrap_or_else(|error| {
        tracing::warn!(%error, "can't make {}, so each start of a container asks whether the daemon serves: {error}", config::SERVING);
    });
    let (version, systemd) = (env!("CARGO_PKG_VERSION"), systemd.number());
    tracing::info!(
        version,
        systemd,
        tasks,
        "serving: version {version} on systemd {systemd}, {tasks} tasks recovered"
    );
}

/// Makes the connections of earlier daemons usable again: those in the descriptor store, and those that an earlier daemon had
/// accepted and not kept. Returns them, and the connections to console sockets, with their paths.
async fn adopt_connections(
    fd_store: &Arc<FdStore>,
    kept: &mut Vec<(String, OwnedFd)>,
    rescued: guard::Rescued,
    crashes: &Crashes,
) -> Result<(Arc<Connections>, Vec<Adopted>, guard::Rescued), Failure> {
    let (connections, mut adopted) = Connections::adopt(fd_store.clone(), kept, crashes)
        .map_err(|error| Failure(format!("can't adopt kept connections: {error}")))?;
    let mut consoles = Vec::new();
    for (path, connection) in rescued {
        match Socket::at(&path) {
            Some(from) => adopted.extend(connections.rescue(from, connection).await.unwrap_or_else(|error| {
                tracing::error!(%error, "can't adopt a connection that an earlier daemon had just accepted: {error}");
                None
            })),
            None => consoles.push((path, connection)),
        }
    }
    Ok((connections, adopted, consoles))
}
