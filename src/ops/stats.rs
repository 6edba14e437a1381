//! Stats: what the kernel counts in the container's cgroup.

use crate::cgroup::stats::{MemoryEvents, Stats};
use crate::id::TaskKey;
use crate::task::Task;

use super::{Error, Shim, blocking};

impl Shim {
    /// The statistics of a container, in any phase. When its cgroup is gone, with the end of its main process,
    /// those that are known all the same; the others are zero.
    ///
    /// # Errors
    /// There is no such task, or its numbers can't be read.
    pub async fn stats(&self, key: &TaskKey) -> Result<Stats, Error> {
        let task = self.created(key)?.task().clone();
        if task.init.exit().is_some() {
            return self.last_stats(&task).await;
        }
        let Some(cgroup) = task.cgroup else { return Ok(Stats::default()) };
        Ok(blocking(move || Stats::read(&cgroup)).await??)
    }

    /// systemd keeps accounts of what it has removed, and the record those that containerd asks for.
    async fn last_stats(&self, task: &Task) -> Result<Stats, Error> {
        let account = self.manager.account(&task.unit).await?;
        let mut stats = Stats::default();
        stats.cpu.stat.usage_usec = account.cpu_usec;
        stats.memory.peak = account.memory_peak;
        stats.memory_events = Some(MemoryEvents { oom_kill: task.oom_kills, ..MemoryEvents::default() });
        Ok(stats)
    }
}
