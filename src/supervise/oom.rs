//! Processes that the kernel has killed for want of memory: containerd hears of each, and before it hears of
//! the container's end.
//!
//! When a container's main process ends systemd removes its cgroup at once, and with it the kernel's count.
//! The last kill may be in it: then systemd is asked, who has looked before it removed it.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::cgroup;
use crate::cgroup::stats::MemoryEvents;
use crate::services::{Entry, Error, Shim, now_usec};
use crate::task::phase::Seen;
use crate::task::{Placement, Task};

/// For so long a kill may not have been told: the kernel tells of `memory.events` at most every 10 ms, and
/// before it kills for want of memory it has told that there is none.
const UNTOLD: Duration = Duration::from_secs(1);

/// How long systemd and the journal may take to say how many processes were killed.
const ASK_LIMIT: Duration = Duration::from_secs(2);

impl Shim {
    /// The kernel has told that `memory.events` has changed, or may have.
    pub(crate) fn memory_changed(&self, entry: &Arc<Entry>) {
        entry.init.live().memory_changed = Some(Instant::now());
        self.note_oom_kills(entry);
    }

    /// Looks at the kernel's count. False if there is none any more.
    pub(crate) fn note_oom_kills(&self, entry: &Arc<Entry>) -> bool {
        let cgroup = memory_events_of(&entry.task()).map(Path::to_owned);
        let noted = match cgroup.map(|cgroup| MemoryEvents::read(&cgroup)) {
            Some(Ok(Some(events))) => {
                let kills = events.oom_kill;
                entry.init.live().memory_events = events;
                self.add_oom_kills(entry, kills).map(|()| true)
            }
            Some(Ok(None)) => Ok(false),
            Some(Err(error)) => Err(error.into()),
            None => Ok(true),
        };
        noted.unwrap_or_else(|error| {
            cant_note(entry, &error);
            false
        })
    }

    fn add_oom_kills(&self, entry: &Arc<Entry>, kills: u64) -> Result<(), Error> {
        self.tasks.note(entry, |task| {
            task.note_oom_kills(kills, now_usec());
            Ok(Vec::new())
        })?;
        Ok(())
    }

    /// A container has ended. True if all kills in it are known, as they are but for rare cases.
    pub(crate) fn knows_oom_kills(self: &Arc<Self>, entry: &Arc<Entry>, seen: Seen) -> bool {
        match self.cgroups.pending() {
            Ok(changes) => self.apply_changes(changes),
            Err(error) => cant_note(entry, &Error::Watch(error)),
        }
        let (is_watched, changed) = {
            let live = entry.init.live();
            (live.watched.is_some(), live.memory_changed)
        };
        let is_quiet = if is_watched {
            changed.is_none_or(|at| at.elapsed() > UNTOLD)
        } else {
            // It has ended while nobody was there to be told.
            seen.exit.status == 0
        };
        self.note_oom_kills(entry) || is_quiet || !cgroup::has_memory()
    }

    /// Asks systemd for the kills that the kernel does not tell of any more. The end of the container waits
    /// for the answer, and must not wait for a journal that hangs.
    pub(crate) async fn ask_for_oom_kills(&self, entry: &Arc<Entry>) {
        let asked = match tokio::time::timeout(ASK_LIMIT, self.manager.oom_kills(&entry.init.unit)).await {
            Ok(Ok(kills)) => self.add_oom_kills(entry, kills),
            Ok(Err(error)) => Err(error.into()),
            Err(_) => {
                tracing::warn!(task = %entry.key, "task {}: neither systemd nor the journal answered in time whether the kernel killed processes for lack of memory", entry.key);
                Ok(())
            }
        };
        asked.unwrap_or_else(|error| cant_note(entry, &error));
    }
}

fn cant_note(entry: &Entry, error: &Error) {
    tracing::error!(task = %entry.key, %error, "task {}: can't record kills for lack of memory: {error}", entry.key);
}

/// The cgroup whose memory events are those of the container. It is the unit's: that has the same limit, meets
/// it first, as the kernel charges it for the container's cgroup itself, and counts what is below it.
pub(crate) fn memory_events_of(task: &Task) -> Option<&Path> {
    let container = task.cgroup()?;
    match &task.placement {
        Placement::Unit { .. } => container.parent(),
        Placement::Foreign { .. } => Some(container),
    }
}
