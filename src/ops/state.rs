//! State, Connect, Pids: answered from memory and from the cgroup, never waiting for anything.

use crate::cgroup;
use crate::id::TaskKey;
use crate::task::phase::{Exit, Phase};
use crate::task::request::Create;

use super::{Error, Shim};

/// A task's state in containerd's words.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Status {
    /// It waits for Start.
    Created,
    /// It runs.
    Running,
    /// It has ended.
    Stopped,
}

/// What State tells.
#[derive(Clone, Debug)]
pub struct State {
    /// The status.
    pub status: Status,
    /// The init process; after its end, the one it was.
    pub pid: u32,
    /// How it ended.
    pub exit: Option<Exit>,
    /// Bundle and stdio as received.
    pub request: Create,
}

impl Shim {
    /// A task's state.
    ///
    /// # Errors
    /// There is no such task.
    pub fn state(&self, key: &TaskKey) -> Result<State, Error> {
        let entry = self.created(key)?;
        let task = entry.task();
        let status = match task.init {
            Phase::Creating { .. } | Phase::Created { .. } | Phase::Starting { .. } => Status::Created,
            Phase::Running { .. } => Status::Running,
            Phase::Stopped { .. } => Status::Stopped,
        };
        Ok(State {
            status,
            pid: task.init.pid().unwrap_or_default(),
            exit: task.init.exit(),
            request: task.request.clone(),
        })
    }

    /// A task's init process, 0 if there is no such task: Connect never fails.
    pub fn init_pid(&self, key: &TaskKey) -> u32 {
        self.registry.get(key).and_then(|entry| entry.task().init.pid()).unwrap_or_default()
    }

    /// The processes of a container.
    ///
    /// For one that has ended the process that it was: containerd up to 2.3.3 takes an empty list for
    /// a leaked shim when it restarts, and would delete the task with its exit code.
    ///
    /// # Errors
    /// There is no such task, or its cgroup can't be read.
    pub fn pids(&self, key: &TaskKey) -> Result<Vec<u32>, Error> {
        let task = self.created(key)?.task().clone();
        let init = task.init.pid().unwrap_or_default();
        if task.init.exit().is_some() {
            return Ok(vec![init]);
        }
        let mut pids = match &task.cgroup {
            Some(cgroup) => cgroup::processes(cgroup)?,
            None => Vec::new(),
        };
        if !pids.contains(&init) {
            pids.insert(0, init);
        }
        Ok(pids)
    }
}
