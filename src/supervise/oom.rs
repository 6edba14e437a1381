//! Reports each kill for lack of memory to containerd, before the end of the container.
//!
//! When the main process of a container ends, systemd removes the cgroup at once, and with it the count of the kernel.
//! If the last kill may be missing, the daemon asks systemd, which reads the count before it removes the cgroup.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::cgroup;
use crate::cgroup::stats::MemoryEvents;
use crate::services::{Entry, Error};
use crate::sys;
use crate::task::lifecycle::ObservedExit;
use crate::task::{Placement, Task};

use super::Cgroups;

/// How long the kernel may delay its report of a kill: it reports changes of `memory.events` at most every 10 ms, and a
/// change without a kill comes before every kill for lack of memory.
const UNTOLD: Duration = Duration::from_secs(1);

/// How long systemd and the journal may take to answer how many processes were killed.
const ASK_LIMIT: Duration = Duration::from_secs(5);

impl Cgroups {
    /// Handles a report of the kernel that `memory.events` may have changed.
    pub(crate) fn memory_changed(&self, entry: &Arc<Entry>) {
        entry.init.live().cgroup.memory_changed = Some(Instant::now());
        self.note_oom_kills(entry);
    }

    /// Reads the count of the kernel. False if the cgroup does not exist any more.
    pub(crate) fn note_oom_kills(&self, entry: &Arc<Entry>) -> bool {
        let cgroup = memory_events_of(&entry.task()).map(Path::to_owned);
        let noted = match cgroup.map(|cgroup| MemoryEvents::read(&cgroup)) {
            Some(Ok(Some(events))) => {
                let kills = events.oom_kill;
                entry.init.live().cgroup.memory_events = events;
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

    /// The kernel reports every change of `memory.events`, up to 100 times a second for a container at its limit. Almost none is
    /// a kill, and a note copies the task.
    fn add_oom_kills(&self, entry: &Arc<Entry>, kills: u64) -> Result<(), Error> {
        if entry.task().init.phase.container().is_none_or(|container| kills <= container.oom_kills) {
            return Ok(());
        }
        self.tasks.note(entry, |task| {
            task.note_oom_kills(kills, sys::now_usec());
            Ok(Vec::new())
        })?;
        Ok(())
    }

    /// Whether all kills in a container that has ended are known. Almost always true.
    pub(crate) fn knows_oom_kills(self: &Arc<Self>, entry: &Arc<Entry>, seen: ObservedExit) -> bool {
        match self.watch.pending() {
            Ok(changes) => self.apply_changes(changes),
            Err(error) => cant_note(entry, &Error::Watch(error)),
        }
        let (is_watched, changed) = {
            let live = entry.init.live();
            (live.cgroup.watched.is_some(), live.cgroup.memory_changed)
        };
        let is_quiet = if is_watched {
            changed.is_none_or(|at| at.elapsed() > UNTOLD)
        } else {
            // The container has ended while there was no daemon.
            seen.exit.status == 0
        };
        self.note_oom_kills(entry) || is_quiet || !cgroup::has_memory()
    }

    /// Asks systemd how many processes were killed in a cgroup that does not exist any more. Has a time limit: the report of the
    /// end waits for the answer, and must not wait for a journal that hangs.
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

/// The cgroup that counts the memory events of the container. This is the unit's cgroup: it has the same limit and reaches
/// it first, as the kernel also charges it for the cgroup of the container itself, and it counts the events below it.
pub(crate) fn memory_events_of(task: &Task) -> Option<&Path> {
    let container = task.cgroup()?;
    match &task.placement {
        Placement::Unit { .. } => container.parent(),
        Placement::Foreign { .. } => Some(container),
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::services::Delivery;
    use crate::services::changes::NOTES;
    use crate::simulation::harness::{Step, World};

    #[test]
    fn a_change_of_memory_events_without_a_kill_copies_no_task() {
        let world = World::new("no-kills");
        world.take(&[Step::Create, Step::Start], Delivery::First).unwrap().unwrap();
        let init = world.init();
        let notes = world.live(move |shim| async move {
            let entry = shim.tasks.process(&init).unwrap().0;
            let events = cgroup::dir(memory_events_of(&entry.task()).unwrap()).join("memory.events");
            let notes_of = |text: &str| {
                fs::write(&events, text).unwrap();
                let before = NOTES.get();
                shim.cgroups.memory_changed(&entry);
                NOTES.get() - before
            };
            let counts = ["max 7\noom_kill 0\n", "max 8\noom_kill 1\n", "max 9\noom_kill 1\n"].map(notes_of);
            (counts, entry.init.live().cgroup.memory_events.max)
        });
        assert_eq!(notes, Some(([0, 1, 0], 9)));
        assert_eq!(world.events(), ["create", "start", "oom"]);
    }

    #[test]
    fn a_repeated_report_of_an_end_does_not_overtake_the_query_for_kills() {
        let world = World::new("oom-repeated");
        world.take(&[Step::Create, Step::Start], Delivery::First).unwrap().unwrap();
        world.systemd.set_oom_kills(Some(1));
        world.systemd.delay_oom_kills(Duration::from_secs(2));
        let (systemd, unit, init) = (world.systemd.clone(), world.unit(), world.init());
        let exits = world.live(move |shim| async move {
            let entry = shim.tasks.process(&init).unwrap().0;
            shim.cgroups.memory_changed(&entry);
            systemd.end(&unit, 9);
            tokio::time::sleep(Duration::from_secs(1)).await;
            // The last change is older than `UNTOLD` now.
            entry.init.live().cgroup.memory_changed = None;
            systemd.tell(&unit);
            tokio::time::sleep(Duration::from_millis(500)).await;
            let before = shim.tasks.state(&init).unwrap().exit.is_some();
            tokio::time::sleep(Duration::from_secs(1)).await;
            (before, shim.tasks.state(&init).unwrap().exit.map(|exit| exit.status))
        });
        assert_eq!(exits, Some((false, Some(9))));
        assert_eq!(world.events(), ["create", "start", "oom", "exit"]);
    }
}
