//! What the running daemon attaches to a process. It is not in the record: recovery builds it again.

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
use crate::stdio::journal_policy::JournalPolicy;
use crate::task::limits::Limits;

use super::Error;
use super::notifications::Listening;
use super::pending::OnDisk;

/// The live side of a process.
#[derive(Default)]
pub struct Live {
    /// A descriptor of the process, which shows whether the process has ended.
    pub(crate) process: Option<Arc<OwnedFd>>,
    /// Its streams, once it has them.
    pub(crate) session: Session,
    /// After a restart: cancelled once its streams are open again. `None` if it has no streams to open again.
    pub(crate) resuming: Option<CancellationToken>,
    /// The size of its terminal's window that was requested last: columns and rows.
    pub(crate) window: Option<(u16, u16)>,
    /// The client's FIFO for input, while a start is under way or after a start has failed. It keeps the input for
    /// another start, until Delete.
    pub(crate) client_input: Option<OwnedFd>,
    /// The limit of the output that the daemon copies to the journal. The init process has the limit of the whole
    /// container, for all execs.
    pub(crate) journal_policy: Arc<JournalPolicy>,
    /// The size of the file with the process spec of an exec, in bytes. 0 once the file is removed.
    pub(crate) spec_bytes: u64,
    /// The socket to which the container sends its notifications.
    pub(crate) listening: Option<Listening>,
    /// The operation that is under way.
    pub(crate) attempt: Attempt,
    /// The container's cgroup, for an init process.
    pub(crate) cgroup: LiveCgroup,
    /// The task on disk, for an init process.
    pub(crate) disk: OnDisk,
    /// True if the task waits for the publisher of events. For an init process.
    pub(crate) is_announced: bool,
    /// The stop of the unit of an exec that has ended.
    pub(crate) unit_stop: Option<UnitStop>,
    /// A Delete removes the exec. Its unit's name may be that of another exec soon.
    pub(crate) is_deleted: bool,
    /// True while criu dumps its processes: criu thaws and freezes them.
    pub(crate) is_checkpointing: bool,
    /// True from the report of init's end until the end is recorded.
    pub(crate) is_ending: bool,
    /// The containerd that its bundle belongs to, once that is known. Only the init process of a task has it, and only if
    /// the record does not say it.
    pub(crate) bundle_owner: Option<Owner>,
}

/// The stop of a unit, in the background.
pub(crate) struct UnitStop {
    /// Receives once systemd has the job: from then on, it stops the unit whatever becomes of the daemon.
    pub(crate) accepted: oneshot::Receiver<()>,
    /// Ends once the unit is stopped.
    pub(crate) done: JoinHandle<Result<(), Error>>,
}

/// Signals to an operation that is under way.
#[derive(Default)]
pub(crate) struct Attempt {
    /// Notified when the unit ends while it is being started.
    pub(crate) unit_ended: Arc<Notify>,
    /// Cancels a Create or a Start.
    pub(crate) given_up: CancellationToken,
    /// Ends a checkpoint or a restore, and nothing else: a Kill or a Delete has come. The next checkpoint or restore has
    /// another token.
    pub(crate) interrupted: CancellationToken,
    /// True if the unit was to be queried before the process was in the record: the query is due once it is.
    pub(crate) is_query_due: bool,
}

/// What the daemon has read from the cgroup of a container.
#[derive(Default)]
pub(crate) struct LiveCgroup {
    /// The watch of the cgroup.
    pub(crate) watched: Option<Watched<TaskKey>>,
    /// Limits that were set while the container was frozen, and that its unit does not have yet.
    pub(crate) unshown: Limits,
    /// The last known content of `memory.events`.
    pub(crate) memory_events: MemoryEvents,
    /// When `memory.events` changed last.
    pub(crate) memory_changed: Option<Instant>,
}
