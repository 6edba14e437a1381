//! Stats: what the kernel counts in the container's cgroup.

use crate::cgroup::stats::Stats;
use crate::id::TaskKey;

use super::{Error, Shim, blocking};

impl Shim {
    /// The statistics of a container, in any phase; zeros when its cgroup is gone.
    ///
    /// # Errors
    /// There is no such task, or a file of its cgroup can't be read.
    pub async fn stats(&self, key: &TaskKey) -> Result<Stats, Error> {
        let cgroup = self.created(key)?.task().cgroup.clone();
        let Some(cgroup) = cgroup else { return Ok(Stats::default()) };
        Ok(blocking(move || Stats::read(&cgroup)).await??)
    }
}
