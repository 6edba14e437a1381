//! What operations (`ops`) and supervision (`supervise`) share: the live tasks and their records, and the adapters
//! (`unit`, `oci`, `stdio`, `cgroup`, `store`), which don't know each other.

pub mod changes;
mod error;
pub mod files;
pub mod launcher;
pub mod notifications;
mod owner;
pub mod process;
pub mod registry;
pub mod streams;
mod tasks;
pub mod waiting;

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Instant;

use tokio::sync::{Notify, oneshot};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use crate::cgroup::stats::MemoryEvents;
use crate::cgroup::watch::Watched;
use crate::id::{Owner, TaskKey};
use crate::session::Session;
use crate::stdio::rate::RateLimit;
use crate::suspect;
use crate::task::limits::Limits;

use changes::Stored;
use notifications::Listening;

pub use error::Error;
pub use tasks::{Outgoing, Tasks};
pub(crate) use waiting::{WaitsFor, waiting};

/// A live task, with what the running daemon attaches to it.
pub type Entry = registry::Entry<Live>;
/// One of its processes.
pub type Process = registry::Process<Live>;

/// How a call has reached this daemon.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Delivery {
    /// No earlier daemon has read the call.
    First,
    /// An earlier daemon has read the call, and may have carried it out in part or in full. This daemon does not repeat
    /// what the earlier daemon has done, and answers as if it had done it itself.
    Replayed,
}

/// What the running daemon attaches to a process. It is not in the record: recovery builds it again.
#[derive(Default)]
pub struct Live {
    /// A descriptor of the process. While it is open, no other process gets the same pid.
    pub(crate) process: Option<OwnedFd>,
    /// Its streams, once it has them.
    pub(crate) session: Session,
    /// The size of its terminal's window that was requested last: columns and rows.
    pub(crate) window: Option<(u16, u16)>,
    /// The client's FIFO for input, while a start is under way or after a start has failed. It keeps the input for
    /// another start, until Delete.
    pub(crate) client_input: Option<OwnedFd>,
    /// The limit of the output that the daemon copies to the journal. The init process has the limit of the whole
    /// container, for all execs.
    pub(crate) journal_limit: Arc<RateLimit>,
    /// The socket to which the container sends its notifications.
    pub(crate) listening: Option<Listening>,
    /// Notified when the unit ends while it is being started.
    pub(crate) attempt_ended: Arc<Notify>,
    /// Cancels a Create or a Start that is under way.
    pub(crate) given_up: CancellationToken,
    /// Ends a checkpoint or a restore that is under way, and nothing else: a Kill or a Delete has come. The next checkpoint or
    /// restore has another token.
    pub(crate) interrupted: CancellationToken,
    /// The unit of an exec that has ended is being removed.
    pub(crate) removal: Option<JoinHandle<Result<(), Error>>>,
    /// The watch of its cgroup.
    pub(crate) watched: Option<Watched<TaskKey>>,
    /// Limits that were set while it was frozen, and that its unit does not have yet.
    pub(crate) unshown: Limits,
    /// The last known content of its `memory.events`.
    pub(crate) memory_events: MemoryEvents,
    /// When `memory_events` changed last.
    pub(crate) memory_changed: Option<Instant>,
    /// True while criu dumps its processes: criu thaws and freezes them.
    pub(crate) is_checkpointing: bool,
    /// True while the daemon queries systemd for the exit of the process.
    pub(crate) is_ending: bool,
    /// Where the task is on disk.
    pub(crate) stored: Stored,
    /// True if the record on disk is older than the task in memory. The background task of `supervise` writes it.
    pub(crate) is_unwritten: bool,
    /// True if the task waits for the publisher of events.
    pub(crate) is_announced: bool,
    /// The containerd that its bundle belongs to, once that is known. Only the init process of a task has it, and only if
    /// the record does not say it.
    pub(crate) bundle_owner: Option<Owner>,
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
