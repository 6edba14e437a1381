//! Pids: the processes of a container.

use std::collections::HashMap;
use std::path::Path;

use crate::cgroup;
use crate::id::{ExecId, TaskKey};
use crate::services::{Error, Tasks, blocking};

impl Tasks {
    /// The processes of a container, and which of them are execs.
    ///
    /// For a container that has ended, the list has the former init process: containerd up to 2.3.3, when it restarts,
    /// takes an empty list for a leaked shim and deletes the task with its exit code.
    ///
    /// # Errors
    /// There is no such task, or its cgroup can't be read.
    pub async fn pids(&self, key: &TaskKey) -> Result<Vec<(u32, Option<ExecId>)>, Error> {
        let task = self.created(key)?.task().clone();
        let init = task.init.pid().unwrap_or_default();
        if task.init.exit().is_some() {
            return Ok(vec![(init, None)]);
        }
        let mut pids = match task.cgroup().map(Path::to_owned) {
            Some(cgroup) => blocking(move || cgroup::processes(&cgroup)).await??,
            None => Vec::new(),
        };
        if !pids.contains(&init) {
            pids.insert(0, init);
        }
        let execs: HashMap<u32, &ExecId> = task
            .execs
            .iter()
            .filter(|(_, exec)| exec.is_alive())
            .filter_map(|(id, exec)| exec.pid().map(|pid| (pid, id)))
            .collect();
        Ok(pids.into_iter().map(|pid| (pid, execs.get(&pid).map(|id| (*id).clone()))).collect())
    }
}
