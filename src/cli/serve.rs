//! `serve`: the daemon. Connects its parts in this order: receive systemd's signals, recover, publish events, serve calls,
//! notify systemd.

use std::collections::HashMap;
use std::convert::Infallible;
use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinSet;

use crate::api::{events, status};
use crate::cgroup::watch::Watch;
use crate::fault::{self, Point};
use crate::guard::{self, Guard};
use crate::id::UnitName;
use crate::launch;
use crate::oci::command::CommandLine;
use crate::oci::namespaces;
use crate::ops::{Parts, Shim};
use crate::services::Entry;
use crate::services::files::ClientFiles;
use crate::services::runtime_files::RuntimeFiles;
use crate::session::fds::{StreamFds, StreamKind};
use crate::store::Store;
use crate::store::delete_replies::DeleteReplies;
use crate::store::failures::Failures;
use crate::supervise::{floods, slices};
use crate::suspect::{self, Crashes};
use crate::transport::ConnectionStore;
use crate::transport::event_connection::{self, EventConnections};
use crate::transport::listener::{Adopted, Connections};
use crate::transport::sockets::Socket;
use crate::unit::fd_store::FdStore;
use crate::unit::manager::Manager;
use crate::unit::notify::THREAD_INTERVAL;
use crate::unit::refs::{self, Refs};
use crate::unit::relay::Relay;
use crate::unit::{bus_config, name, notify, properties, watch};
use crate::{config, recovery, sys, telemetry};

use super::{Failure, calls, first_threads, serving};

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

/// Starts a unit that starts the daemon at the next call.
struct Waking {
    manager: Arc<Manager>,
    connections: Arc<Connections>,
    program: PathBuf,
}

impl Waking {
    /// True if the daemon is being stopped, and not restarted.
    async fn is_stopped(&self) -> Result<bool, String> {
        let job = self.manager.job_type(&name::daemon_service()).await;
        Ok(job.map_err(|error| error.to_string())?.as_deref() == Some("stop"))
    }

    /// Asks systemd to start the unit, which systemd does once this daemon has ended: the unit is ordered after it.
    async fn leave(&self) {
        let command = [self.program.to_string_lossy().into_owned(), "wake".to_owned()];
        let start = async {
            let wake =
                properties::wake(&command, self.connections.wake_fd()).map_err(|error| error.to_string())?;
            let begun = self.manager.begin_with_descriptor(&name::wake_service(), &wake).await;
            begun.map_err(|error| error.to_string())
        };
        let started = tokio::time::timeout(SHUTDOWN_CALL_LIMIT, start).await;
        if let Err(reason) = started.map_err(|_| "systemd does not answer".to_owned()).flatten() {
            tracing::warn!(
                "can't start the wake unit, so the next call of containerd will not start the daemon: {reason}"
            );
        }
    }

    /// While the machine shuts down, systemd stops the daemon as soon as the containers have ended, and at the same time as
    /// containerd and its clients. Those still have to learn how their containers ended, and to delete them: Docker would
    /// wait for that, and then record an unknown exit code. So the daemon serves until they have closed their connections.
    /// Returns whether the machine shuts down.
    async fn serve_last_calls(&self) -> bool {
        let is_shutting_down =
            tokio::time::timeout(SHUTDOWN_CALL_LIMIT, self.manager.is_shutting_down()).await;
        if !matches!(is_shutting_down, Ok(Ok(true))) {
            return false;
        }
        let unused = async {
            while self.connections.count() > 0 {
                tokio::time::sleep(LAST_CALLS_PAUSE).await;
            }
        };
        if tokio::time::timeout(LAST_CALLS_LIMIT, unused).await.is_err() {
            let count = self.connections.count();
            tracing::warn!(
                count,
                "the machine shuts down, and {count} connections of clients are still open"
            );
        }
        true
    }

    /// Prepares the end of the daemon. If the daemon is stopped and `keeps` says that systemd then keeps the descriptor store,
    /// the next call on a kept connection starts the daemon.
    async fn prepare(&self, keeps: bool) {
        let is_stopped = tokio::time::timeout(SHUTDOWN_CALL_LIMIT, self.is_stopped()).await;
        match is_stopped.map_err(|_| "systemd does not answer".to_owned()).flatten() {
            Ok(true) => {
                if keeps && self.connections.count() > 0 {
                    self.leave().await;
                }
                guard::end_all().await;
            }
            // The next daemon waits for calls itself, and ends the guard.
            Ok(false) => {}
            Err(error) => {
                tracing::warn!("can't find out whether the daemon is stopped or restarted: {error}");
            }
        }
    }

    /// Stops the unit of an earlier daemon.
    async fn dismiss(manager: &Manager) -> Result<(), Failure> {
        manager.stop_without_waiting(&name::wake_service()).await.map_err(Failure::new)
    }
}

/// The permanent work of the daemon in addition to serving calls. If one worker ends, the daemon ends, and systemd restarts
/// it: without this work, the daemon would miss what happens to tasks.
#[derive(Default)]
struct Workers(JoinSet<&'static str>);

impl Workers {
    fn spawn(&mut self, name: &'static str, work: impl Future<Output = ()> + Send + 'static) {
        self.0.spawn(async move {
            work.await;
            name
        });
    }

    /// Waits until one of the workers has ended.
    async fn ended(&mut self) -> Failure {
        match self.0.join_next().await {
            Some(Ok(name)) => Failure(format!("{name} ended, so the daemon ends and systemd restarts it")),
            Some(Err(error)) => Failure(format!(
                "a part of the daemon failed, so the daemon ends and systemd restarts it: {error}"
            )),
            None => std::future::pending().await,
        }
    }
}

impl Drop for Workers {
    fn drop(&mut self) {
        // The workers end with the process.
        self.0.detach_all();
    }
}

impl ConnectionStore for FdStore {
    fn keep(&self, name: &str, fds: &[BorrowedFd<'_>]) -> io::Result<()> {
        self.has_room_for_connection().and_then(|()| Self::keep(self, name, fds)).map_err(io::Error::other)
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
    let crashes = Crashes::open(Path::new(config::CRASHES)).unwrap_or_else(|error| {
        tracing::error!(%error, "can't record crashes, so a request that crashes the daemon is tried again without limit: {error}");
        Crashes::default()
    });
    let crashes = Arc::new(crashes);
    let store = Store::new(config::STATE_DIR);
    // Another thread reads the records while this one takes over what systemd has kept.
    let records = recovery::read_records(store.clone(), crashes.clone());
    let Passed { sockets, stored } = passed;
    let mut inodes = guard::Inodes::of(sockets.iter().chain(stored.iter().map(|(_, fd)| fd)));
    let (fd_store, mut kept) = FdStore::adopt(stored)
        .map_err(|error| Failure(format!("can't connect to systemd's notify socket: {error}")))?;
    inodes.add(kept.iter().filter(|(name, _)| StreamKind::may_have_sockets(name)).map(|(_, fd)| fd));
    let rescued = earlier.connections(inodes);
    let fd_store = Arc::new(fd_store);
    let mut workers = Workers::default();
    workers.spawn("keeping a guard", guard::keep(guard));
    let alive = fd_store.clone();
    workers.spawn("sending watchdog messages", async move { alive.notifier().keep_alive().await });

    if let Some(interval) = notify::watchdog_interval() {
        workers.spawn("watching for requests that hang", suspect::end_if_hanging(interval / 2));
    }
    let (connections, adopted, consoles) = adopt_connections(&fd_store, &mut kept, rescued, &crashes)?;
    let event_connections = EventConnections::adopt(fd_store.clone(), &mut kept);
    let refs = Refs::new(fd_store.clone(), &mut kept, refs::limit(bus_config::match_rules()));
    let manager = Arc::new(Manager::with_refs(Arc::new(refs)));
    let (listening, first) = oneshot::channel();
    let listener = watch::run(manager.clone(), listening);
    workers.spawn("receiving systemd's signals", listener);
    first.await.map_err(|_| Failure::new("systemd's signals can't be received"))?;

    let systemd = manager.systemd().await.map_err(Failure::new)?;
    Waking::dismiss(&manager).await?;
    let program = std::env::current_exe()
        .map_err(|error| Failure(format!("can't find the path of this program: {error}")))?;
    let delete_replies = DeleteReplies::open(Path::new(config::STATE_DIR)).map_err(Failure::new)?;
    let failures = Failures::open(Path::new(config::STATE_DIR)).map_err(Failure::new)?;
    let fds = StreamFds::new(fd_store.clone(), kept);
    consoles.into_iter().for_each(|(path, connection)| fds.add_console(path, connection.into()));
    let keeps = systemd.has_fd_store_preserve();
    let waking =
        Waking { manager: manager.clone(), connections: connections.clone(), program: program.clone() };
    let cgroups = Watch::new();
    let commands = Arc::new(CommandLine::in_cgroup(launch::cgroup::of_commands().map_err(Failure::new)?));
    let (shim, outgoing) = Shim::new(Parts {
        store,
        delete_replies,
        failures,
        code: status::number,
        fds,
        cgroups,
        manager: manager.clone(),
        oci: commands,
        program,
        files: ClientFiles::new(config::FILES_LIMIT),
        runtime_files: RuntimeFiles::new(config::RUNTIME_FILES_LIMIT),
        relay: Relay::new(),
    });
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
    spawn_workers(&mut workers, &shim, manager, outgoing, event_connections);

    crashes.forget_answered();
    workers.spawn("forgetting crashes of records", async move {
        tokio::time::sleep(RECOVERED).await;
        crashes.forget_records();
        // The file stays open: the daemon has the same number of descriptors at any time.
        std::future::pending::<()>().await;
        drop(crashes);
    });

    for calls in calls::of_sockets(sockets, &shim, &connections, adopted)? {
        workers.spawn("serving calls", calls.serve());
    }
    serving::announce(Path::new(config::SERVING)).unwrap_or_else(|error| {
        tracing::warn!(%error, "can't make {}, so each start of a container asks whether the daemon serves: {error}", config::SERVING);
    });
    let tasks = shim.tasks.count();
    let (version, systemd) = (env!("CARGO_PKG_VERSION"), systemd.version());
    tracing::info!(
        version,
        systemd,
        tasks,
        "serving: version {version} on systemd {systemd}, {tasks} tasks recovered"
    );
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
    waking.prepare(keeps && !is_last).await;
    launch::cgroup::sweep();
    Ok(())
}

/// Makes the connections of earlier daemons usable again: those in the descriptor store, and those that an earlier daemon had
/// accepted and not kept. Returns them, and the connections to console sockets, with their paths.
fn adopt_connections(
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
            Some(from) => adopted.extend(connections.rescue(from, connection).unwrap_or_else(|error| {
                tracing::error!(%error, "can't adopt a connection that an earlier daemon had just accepted: {error}");
                None
            })),
            None => consoles.push((path, connection)),
        }
    }
    Ok((connections, adopted, consoles))
}

/// Starts the work that happens without a call.
fn spawn_workers(
    workers: &mut Workers,
    shim: &Arc<Shim>,
    manager: Arc<Manager>,
    outgoing: mpsc::UnboundedReceiver<Arc<Entry>>,
    (event_connections, earlier): (Arc<EventConnections>, HashMap<String, event_connection::Unwatched>),
) {
    let tasks = shim.tasks.clone();
    workers.spawn("publishing events", events::publish(tasks.clone(), outgoing, event_connections, earlier));
    workers.spawn("retrying failed writes of records", shim.cleanup.clone().write_pending());
    workers.spawn("removing what failed creates and given-up tasks left", shim.clone().remove_leftovers());
    workers.spawn("dropping unused copies of OCI runtimes", shim.clone().forget_idle_runtimes());
    workers.spawn("ending floods of children of systemd", floods::end(tasks.clone(), manager.clone()));
    let removed = tasks.removed.clone();
    let is_used = move |slice: &UnitName| tasks.uses_slice(slice);
    workers.spawn("observing units", shim.units.clone().observe(manager.observations.clone()));
    workers.spawn("removing unused slices", slices::run(manager, removed, is_used));
    workers.spawn("watching cgroups", shim.cgroups.clone().observe());
    workers.spawn(
        "looking for ends that systemd's signals did not report",
        shim.units.clone().find_missed_ends(),
    );
}

/// How long the daemon serves while the machine shuts down. systemd kills the daemon 10 s after it has begun to stop it.
const LAST_CALLS_LIMIT: Duration = Duration::from_secs(5);

/// How often the daemon looks whether it still has clients.
const LAST_CALLS_PAUSE: Duration = Duration::from_millis(50);

/// The time limit for the calls to systemd at the end.
const SHUTDOWN_CALL_LIMIT: Duration = Duration::from_secs(5);
