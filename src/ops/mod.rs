//! What the calls of the Task API do: one verb, one file.
//!
//! The verbs join the adapters (`unit`, `oci`, `stdio`, `cgroup`, `store`), which don't know each
//! other, around the domain in `task`.

mod additions;
mod cgroups;
pub mod cleanup;
mod create;
mod delete;
mod error;
mod exec;
pub mod kept;
mod kill;
mod memory;
mod notify;
mod observe;
mod owner;
mod pause;
mod publish;
mod record;
mod start;
mod state;
mod stats;
mod streams;
mod update;
mod wait;

#[cfg(test)]
mod crashes;
#[cfg(test)]
mod harness;
#[cfg(test)]
mod scenarios;

use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Instant, SystemTime};

use tokio::sync::{Notify, mpsc, oneshot};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use crate::cgroup;
use crate::cgroup::stats::MemoryEvents;
use crate::cgroup::watch::{Watch, Watched};
use crate::config;
use crate::id::{ProcessKey, TaskKey, UnitName};
use crate::launch;
use crate::oci::runtime::OciRuntime;
use crate::oci::sealed::{self, Copies};
use crate::session::Session;
use crate::stdio::rate::RateLimit;
use crate::store::Store;
use crate::store::answers::{Answers, Deleted};
use crate::suspect;
use crate::sys;
use crate::task::limits::Limits;
use crate::task::outbox::TaskEvent;
use crate::task::registry::Registry;
use crate::task::{Task, registry};
use crate::unit::relay::Relay;
use crate::unit::systemd::Systemd;

use kept::Kept;
use record::{Owings, Stored, Unwritten};

pub use create::CreateTask;
pub use error::Error;
pub use exec::AddExec;
pub use state::{State, Status};

/// A live task, with what the running daemon attaches to it.
pub type Entry = registry::Entry<Live>;
/// One of its processes.
pub type Process = registry::Process<Live>;

/// How often a call has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Attempt {
    /// Once.
    First,
    /// A daemon before this one has read it, and may have carried it out, in part or in full. What it
    /// has done stands, and is answered as if this one had.
    Replayed,
}

/// What the running daemon attaches to a process. Recovery makes it anew.
#[derive(Default)]
pub struct Live {
    /// The process. Held since it is known: its number can't be taken by another.
    process: Option<OwnedFd>,
    /// Its streams, once it has them.
    session: Session,
    /// The size of its terminal's window, columns and rows, as last asked for.
    window: Option<(u16, u16)>,
    /// The client's FIFO for input, from a start that is under way or has failed: input is not lost before another
    /// start or Delete.
    client_input: Option<OwnedFd>,
    /// How much of the container's output the daemon copies to the journal: of init, for all its execs.
    journal_limit: Arc<RateLimit>,
    /// What the container says to systemd.
    listening: Option<notify::Listening>,
    /// Told when the unit ends while it is being started.
    attempt_ended: Arc<Notify>,
    /// Cancelled when a Create or a Start that is under way is not wanted any more.
    given_up: CancellationToken,
    /// The unit of an exec that has ended is being removed.
    removal: Option<JoinHandle<Result<(), Error>>>,
    /// Its cgroup is watched.
    watched: Option<Watched<TaskKey>>,
    /// Limits that were set while it was frozen.
    unshown: Limits,
    /// What its `memory.events` has told last.
    memory_events: MemoryEvents,
    /// When that has changed last.
    memory_changed: Option<Instant>,
    /// It has ended, and systemd is being asked why.
    is_ending: bool,
    /// Where the task is on disk.
    stored: Stored,
    /// What is on disk is older than the task in memory: it waits for [`Shim::write_pending`].
    is_unwritten: bool,
    /// The task waits for the publisher.
    is_announced: bool,
}

/// The daemon's inside: everything a verb needs.
pub struct Shim {
    store: Store,
    answers: Answers,
    /// What systemd keeps for the next daemon.
    kept: Arc<Kept>,
    registry: Registry<Live>,
    manager: Arc<dyn Systemd>,
    oci: Arc<dyn OciRuntime>,
    /// To systemd, for what containers say.
    relay: Relay,
    /// This program, for units that run it.
    program: PathBuf,
    copies: Arc<Copies>,
    /// What happens to the containers' cgroups.
    cgroups: Arc<Watch<TaskKey>>,
    /// The kernel is getting ready for moves between cgroups.
    warming: Arc<AtomicBool>,
    /// Units are being referred to.
    referring: tokio::sync::Mutex<()>,
    /// They have to be referred to once more.
    refer_again: AtomicBool,
    /// Tasks that owe events, for the publisher.
    outgoing: mpsc::UnboundedSender<Arc<Entry>>,
    /// Tasks whose records could not be written.
    unwritten: Unwritten,
    /// Told of each task that is deleted.
    pub deleted: Arc<Notify>,
    /// Deleted tasks that owe events.
    owings: Owings,
}

impl Shim {
    /// Puts the parts together. Tasks that owe events come out of the returned receiver. It holds each task
    /// once at most; the events are in the outboxes.
    pub fn new(
        store: Store,
        answers: Answers,
        kept: Kept,
        cgroups: Arc<Watch<TaskKey>>,
        manager: Arc<dyn Systemd>,
        oci: Arc<dyn OciRuntime>,
        program: PathBuf,
    ) -> (Arc<Self>, mpsc::UnboundedReceiver<Arc<Entry>>) {
        let (outgoing, receiver) = mpsc::unbounded_channel();
        let shim = Self {
            store,
            answers,
            kept: Arc::new(kept),
            registry: Registry::default(),
            manager,
            oci,
            relay: Relay::new(),
            program,
            copies: Arc::default(),
            cgroups,
            warming: Arc::default(),
            referring: tokio::sync::Mutex::default(),
            refer_again: AtomicBool::default(),
            outgoing,
            unwritten: Unwritten::default(),
            deleted: Arc::default(),
            owings: Owings::default(),
        };
        (Arc::new(shim), receiver)
    }

    /// Whether a task is in a slice, or in one below it.
    pub fn uses_slice(&self, slice: &UnitName) -> bool {
        let stem = slice.as_str().trim_end_matches(".slice");
        let is_in = |used: &str| {
            used.strip_prefix(stem).is_some_and(|rest| rest == ".slice" || rest.starts_with('-'))
        };
        self.registry.all().iter().any(|entry| is_in(entry.task().placement.slice().as_str()))
    }

    /// How many tasks there are.
    pub fn task_count(&self) -> usize {
        self.registry.all().len()
    }

    fn entry(&self, key: &TaskKey) -> Result<Arc<Entry>, Error> {
        self.registry.get(key).ok_or_else(|| Error::UnknownTask { key: key.clone() })
    }

    /// A task that has been created: while Create is under way there is none for others.
    fn created(&self, key: &TaskKey) -> Result<Arc<Entry>, Error> {
        let entry = self.entry(key)?;
        if entry.task().init.pid().is_none() {
            return Err(Error::UnknownTask { key: key.clone() });
        }
        Ok(entry)
    }

    /// A process of a task that has been created.
    fn process(&self, key: &ProcessKey) -> Result<(Arc<Entry>, Arc<Process>), Error> {
        let entry = self.created(&key.task)?;
        let process = entry.process(key.exec.as_ref());
        let process = process.ok_or_else(|| Error::UnknownExec { key: key.clone() })?;
        Ok((entry, process))
    }

    /// What a Delete that came before has answered, or would have.
    fn answered(&self, key: &ProcessKey, attempt: Attempt) -> Option<Deleted> {
        if attempt == Attempt::First { None } else { self.answers.find(key) }
    }

    /// A copy of the task's OCI runtime, if there can be one.
    async fn sealed_runtime(&self, task: &Task) -> Result<Option<sealed::Place>, Error> {
        let (copies, binary) = (self.copies.clone(), task.runtime.binary.clone());
        blocking(move || copies.place(&binary)).await
    }

    /// Resolves when a task's init process has ended, and what the OCI runtime does for it had its time to end as
    /// well. Never, if the process can't be watched: whoever waits has a limit besides.
    async fn init_is_gone(entry: &Entry) {
        let held = entry.init.live().process.as_ref().and_then(|process| process.try_clone().ok());
        let ended = async { sys::ended(held.ok_or(std::io::ErrorKind::NotFound)?).await };
        if ended.await.is_err() {
            std::future::pending::<()>().await;
        }
        tokio::time::sleep(config::AFTER_INIT_LIMIT).await;
    }

    /// A process is about to be moved between cgroups; see [`cgroup::warm_up`].
    fn warm_up(&self) {
        if self.warming.swap(true, Ordering::Relaxed) {
            return;
        }
        let warming = self.warming.clone();
        tokio::task::spawn_blocking(move || {
            if let Err(error) = cgroup::warm_up() {
                tracing::debug!(%error, "moves between cgroups are slower: {error}");
            }
            warming.store(false, Ordering::Relaxed);
        });
    }

    /// Gives up memory that has not been used for a while, for as long as it is polled.
    pub async fn forget_idle(self: Arc<Self>) {
        let mut ticks = tokio::time::interval(sealed::IDLE_LIMIT / 2);
        loop {
            ticks.tick().await;
            self.copies.sweep();
            launch::cgroup::sweep();
        }
    }
}

/// Now, in microseconds since 1970.
fn now_usec() -> u64 {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_micros()).unwrap_or(u64::MAX)
}

/// Goes on, beside the rest, with a verb that an earlier daemon has begun. The same call may come again at
/// once: it finds the verb locked. Resolves when `work` says that it has taken over what was kept of the
/// process's streams, or is over.
async fn go_on<W: Future<Output = ()> + Send + 'static>(
    process: &Arc<Process>,
    work: impl FnOnce(oneshot::Sender<()>) -> W + Send + 'static,
) {
    let (taken, is_taken) = oneshot::channel();
    let process = process.clone();
    tokio::spawn(suspect::inherit(async move {
        let _verb = process.verb.lock().await;
        work(taken).await;
    }));
    // One that is over says nothing.
    let _ = is_taken.await;
}

/// Runs blocking work (disk, mounts, clients' files) away from the async runtime.
async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Result<T, Error> {
    tokio::task::spawn_blocking(suspect::inherit_fn(work)).await.map_err(|_| Error::Stopping)
}

/// Runs work that may wait for a client, a runtime or the kernel, in a thread of its own: as many slow clients as
/// there may be take no thread of [`blocking`] away from the other tasks. The work has to have a time limit.
async fn waiting<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Result<T, Error> {
    /// Enough for opening and polling a few descriptors.
    const STACK: usize = 256 << 10;
    let (done, result) = oneshot::channel();
    let runtime = tokio::runtime::Handle::current();
    let work = suspect::inherit_fn(work);
    let run = move || {
        let _context = runtime.enter();
        // Nobody waits for it any more if the call was cancelled.
        let _ = done.send(work());
    };
    let thread = std::thread::Builder::new().name("waiting".to_owned()).stack_size(STACK).spawn(run);
    thread.map_err(Error::NoThread)?;
    result.await.map_err(|_| Error::Stopping)
}

/// An event in containerd's order, with what the publisher has to know.
pub struct Outgoing {
    /// Its place in the task's order.
    pub seq: u64,
    /// When it happened, in microseconds since 1970.
    pub at_usec: u64,
    /// What happened.
    pub event: TaskEvent,
    /// The task as it is now.
    pub task: Task,
}
