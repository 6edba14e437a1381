//! Stats: what the kernel counts in the container's cgroup.

use std::path::Path;

use crate::cgroup::stats::{MemoryEvents, Stats};
use crate::id::TaskKey;
use crate::services::{Error, blocking};
use crate::supervise::oom::memory_events_of;
use crate::task::Task;
use crate::unit::systemd::Systemd;

use super::Shim;

impl Shim {
    /// The statistics of a container, in any phase. systemd removes the cgroup when the main process ends: from then on the
    /// result has only what systemd and the record still know, and zeros.
    ///
    /// # Errors
    /// There is no such task, or its numbers can't be read.
    pub async fn stats(&self, key: &TaskKey) -> Result<Stats, Error> {
        let entry = self.tasks.created(key)?;
        let task = entry.task().clone();
        if task.init.exit().is_some() {
            let events = entry.init.live().cgroup.memory_events.clone();
            return last_stats(&*self.manager, &task, events).await;
        }
        let (Some(cgroup), Some(memory)) =
            (task.cgroup().map(Path::to_owned), memory_events_of(&task).map(Path::to_owned))
        else {
            return Ok(Stats::default());
        };
        blocking(move || Ok(Stats::read(&cgroup, &memory)?)).await?
    }
}

/// The statistics that systemd and the record keep when the cgroup does not exist any more.
async fn last_stats(manager: &dyn Systemd, task: &Task, events: MemoryEvents) -> Result<Stats, Error> {
    let account = manager.usage(task.unit()).await?;
    let mut stats = Stats::default();
    stats.cpu.stat.usage_usec = account.cpu_usec;
    stats.memory.peak = account.memory_peak;
    let oom_kills = task.init.phase.container().map_or(0, |container| container.oom_kills);
    stats.memory_events = Some(MemoryEvents { oom_kill: oom_kills, ..events });
    Ok(stats)
}
