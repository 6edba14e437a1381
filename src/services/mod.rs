//! What operations (`ops`) and supervision (`supervise`) share: the live tasks and their records, and the adapters
//! (`unit`, `oci`, `stdio`, `cgroup`, `store`), which don't know each other.

pub mod changes;
mod error;
mod files;
pub mod launcher;
mod owner;
pub mod process;
pub mod registry;
pub mod streams;
mod tasks;

use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Instant, SystemTime};

use tokio::sync::{Notify, mpsc, oneshot};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use crate::cgroup::stats::MemoryEvents;
use crate::cgroup::watch::{Watch, Watched};
use crate::id::{ProcessKey, TaskKey};
use crate::oci::runtime::OciRuntime;
use crate::session::Session;
use crate::session::fds::StreamFds;
use crate::stdio::rate::RateLimit;
use crate::store::Store;
use crate::store::delete_replies::{DeleteReplies, Deleted};
use crate::supervise::notify::Listening;
use crate::supervise::systemd::References;
use crate::suspect;
use crate::task::limits::Limits;
use crate::unit::relay::Relay;
use crate::unit::systemd::Systemd;

use changes::Stored;
use files::Looking;
use launcher::Launcher;

pub use error::Error;
pub use tasks::{Outgoing, Tasks};

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
    pub(crate) process: Option<OwnedFd>,
    /// Its streams, once it has them.
    pub(crate) session: Session,
    /// The size of its terminal's window, columns and rows, as last asked for.
    pub(crate) window: Option<(u16, u16)>,
    /// The client's FIFO for input, from a start that is under way or has failed: the input is not lost before
    /// another start or Delete.
    pub(crate) client_input: Option<OwnedFd>,
    /// How much of the container's output the daemon copies to the journal: of init, for all its execs.
    pub(crate) journal_limit: Arc<RateLimit>,
    /// What the container says to systemd.
    pub(crate) listening: Option<Listening>,
    /// Told when the unit ends while it is being started.
    pub(crate) attempt_ended: Arc<Notify>,
    /// Cancelled when a Create or a Start that is under way is not wanted any more.
    pub(crate) given_up: CancellationToken,
    /// The unit of an exec that has ended is being removed.
    pub(crate) removal: Option<JoinHandle<Result<(), Error>>>,
    /// Its cgroup is watched.
    pub(crate) watched: Option<Watched<TaskKey>>,
    /// Limits that were set while it was frozen.
    pub(crate) unshown: Limits,
    /// What its `memory.events` has told last.
    pub(crate) memory_events: MemoryEvents,
    /// When that has changed last.
    pub(crate) memory_changed: Option<Instant>,
    /// It has ended, and systemd is being asked why.
    pub(crate) is_ending: bool,
    /// Where the task is on disk.
    pub(crate) stored: Stored,
    /// What is on disk is older than the task in memory: it waits for [`Shim::write_pending`].
    pub(crate) is_unwritten: bool,
    /// The task waits for the publisher.
    pub(crate) is_announced: bool,
}

/// The services that operations and supervision use.
pub struct Shim {
    /// The live tasks and their records.
    pub tasks: Tasks,
    /// The directories of tasks.
    pub(crate) store: Store,
    /// The last responses to Delete.
    pub(crate) delete_replies: DeleteReplies,
    /// The streams in the descriptor store.
    pub(crate) fds: Arc<StreamFds>,
    /// systemd.
    pub(crate) manager: Arc<dyn Systemd>,
    /// The OCI runtime.
    pub(crate) oci: Arc<dyn OciRuntime>,
    /// How units run this program.
    pub(crate) launcher: Launcher,
    /// To systemd, for what containers say.
    pub(crate) relay: Relay,
    /// What happens to the containers' cgroups.
    pub(crate) cgroups: Arc<Watch<TaskKey>>,
    /// The references to units.
    pub(crate) references: References,
    /// Who looks at the files of clients.
    pub(crate) files: Arc<Looking>,
}

impl Shim {
    /// Puts the services together. Tasks that owe events come out of the returned receiver. It holds each task
    /// once at most; the events are in the outboxes.
    pub fn new(
        store: Store,
        delete_replies: DeleteReplies,
        fds: StreamFds,
        cgroups: Arc<Watch<TaskKey>>,
        manager: Arc<dyn Systemd>,
        oci: Arc<dyn OciRuntime>,
        program: PathBuf,
    ) -> (Arc<Self>, mpsc::UnboundedReceiver<Arc<Entry>>) {
        let (tasks, receiver) = Tasks::new(store.clone());
        let shim = Self {
            tasks,
            store,
            delete_replies,
            fds: Arc::new(fds),
            manager,
            oci,
            launcher: Launcher::new(program),
            relay: Relay::new(),
            cgroups,
            references: References::default(),
            files: Arc::default(),
        };
        (Arc::new(shim), receiver)
    }

    /// Background task: writes the records that could not be written, as soon as they can be. Never returns.
    pub async fn write_pending(self: Arc<Self>) {
        let written = |entry: &Arc<Entry>| {
            entry.execs().iter().for_each(|process| self.remove_ended_exec(entry, process));
        };
        self.tasks.write_pending(written).await;
    }

    /// What a Delete that came before has answered, or would have.
    pub(crate) fn answered(&self, key: &ProcessKey, attempt: Attempt) -> Option<Deleted> {
        if attempt == Attempt::First { None } else { self.delete_replies.find(key) }
    }
}

/// Now, in microseconds since 1970.
pub(crate) fn now_usec() -> u64 {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_micros()).unwrap_or(u64::MAX)
}

/// Resumes, in the background, an operation that an earlier daemon has started. Holds the process's `verb` lock, so that
/// a replay of the same call waits. Returns once `work` has claimed its descriptors from the descriptor store, or has
/// finished.
pub(crate) async fn resume_in_background<W: Future<Output = ()> + Send + 'static>(
    process: &Arc<Process>,
    work: impl FnOnce(oneshot::Sender<()>) -> W + Send + 'static,
) {
    let (claimed, is_claimed) = oneshot::channel();
    let process = process.clone();
    tokio::spawn(suspect::inherit(async move {
        let _verb = process.verb.lock().await;
        work(claimed).await;
    }));
    // Work that has finished sends nothing.
    let _ = is_claimed.await;
}

/// Runs blocking work (disk, mounts, clients' files) away from the async runtime.
pub(crate) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, Error> {
    tokio::task::spawn_blocking(suspect::inherit_fn(work)).await.map_err(|_| Error::Stopping)
}

/// Runs work that may wait for a client, a runtime or the kernel, in a thread of its own: as many slow clients as
/// there may be take no thread of [`blocking`] away from the other tasks. The work has to have a time limit.
pub(crate) async fn waiting<T: Send + 'static>(
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, Error> {
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
