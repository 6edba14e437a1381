//! Pids: the processes of a container.

use std::collections::HashMap;
use std::path::Path;

use crate::cgroup;
use crate::id::{ExecId, TaskKey};
use crate::services::{Error, Tasks, WaitsFor, waiting_in_any_thread};

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
            Some(cgroup) => {
                let list = move || cgroup::processes(&cgroup);
                waiting_in_any_thread(WaitsFor::Processes, key, list).await??
            }
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

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use crate::services::{Delivery, WaitsFor};
    use crate::simulation::harness::{Step, World};

    const SIGTERM: u32 = nix::libc::SIGTERM as u32;
    const SIGKILL: u32 = nix::libc::SIGKILL as u32;

    #[test]
    fn walks_through_the_cgroups_of_one_container_wait_for_each_other_and_delay_nothing_else() {
        let world = World::new("walks");
        world.take(&[Step::Create, Step::Start], Delivery::First).unwrap().unwrap();
        let init = world.init();
        let exit = world.live(move |shim| async move {
            let soon = Duration::from_secs(1);
            let tasks = &shim.tasks;
            let walks = WaitsFor::Processes.all_turns(&init.task).await;
            let term = tasks.kill(&init, SIGTERM, true, Delivery::First);
            assert!(tokio::time::timeout(soon, term).await.is_err(), "a signal for all waits");
            assert!(tokio::time::timeout(soon, tasks.pids(&init.task)).await.is_err(), "a list waits");
            drop(walks);
            assert_eq!(tasks.pids(&init.task).await.unwrap().len(), 1);
            let _walks = WaitsFor::Processes.all_turns(&init.task).await;
            tasks.kill(&init, SIGKILL, true, Delivery::First).await.unwrap();
            tokio::time::timeout(soon, shim.wait(&init, Delivery::First)).await.unwrap().unwrap().status
        });
        assert_eq!(exit, Some(137));
    }
}
