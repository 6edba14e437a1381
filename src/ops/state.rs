//! State, Connect, Pids: answered from memory and from the cgroup, never waiting for anything.

use std::collections::HashMap;
use std::path::PathBuf;

use crate::cgroup;
use crate::id::{ExecId, ProcessKey, TaskKey};
use crate::task::exec::ExecPhase;
use crate::task::phase::{Exit, Phase};
use crate::task::request::Stdio;

use super::{Error, Shim, blocking};

/// A process's state in containerd's words.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Status {
    /// It waits for Start.
    Created,
    /// It runs.
    Running,
    /// It is frozen.
    Paused,
    /// It has ended.
    Stopped,
}

/// What State tells.
#[derive(Clone, Debug)]
pub struct State {
    /// The status.
    pub status: Status,
    /// The process; after its end, the one it was; 0 if there has been none.
    pub pid: u32,
    /// How it ended.
    pub exit: Option<Exit>,
    /// The task's bundle.
    pub bundle: PathBuf,
    /// Its stdio as received.
    pub stdio: Stdio,
}

impl Shim {
    /// A process's state.
    ///
    /// # Errors
    /// There is no such process.
    pub fn state(&self, key: &ProcessKey) -> Result<State, Error> {
        let entry = self.created(&key.task)?;
        let task = entry.task();
        let bundle = task.request.bundle.clone();
        let Some(id) = &key.exec else {
            let status = match task.init {
                Phase::Creating { .. } | Phase::Created { .. } | Phase::Starting { .. } => Status::Created,
                Phase::Running { .. } | Phase::Ending { .. } => Status::Running,
                Phase::Paused { .. } => Status::Paused,
                Phase::Stopped { .. } => Status::Stopped,
            };
            let pid = task.init.pid().unwrap_or_default();
            return Ok(State {
                status,
                pid,
                exit: task.init.exit(),
                bundle,
                stdio: task.request.stdio.clone(),
            });
        };
        let exec = task.execs.get(id).ok_or_else(|| Error::UnknownExec { key: key.clone() })?;
        let status = match exec.phase {
            ExecPhase::Added | ExecPhase::Starting { .. } => Status::Created,
            // It is frozen with its container.
            ExecPhase::Running { .. } if task.init.is_paused() => Status::Paused,
            ExecPhase::Running { .. } => Status::Running,
            ExecPhase::Stopped { .. } => Status::Stopped,
        };
        let pid = exec.phase.pid().unwrap_or_default();
        Ok(State { status, pid, exit: exec.phase.exit(), bundle, stdio: exec.stdio.clone() })
    }

    /// A task's init process, 0 if there is no such task: Connect never fails.
    pub fn init_pid(&self, key: &TaskKey) -> u32 {
        self.registry.get(key).and_then(|entry| entry.task().init.pid()).unwrap_or_default()
    }

    /// The processes of a container, and which of them are execs.
    ///
    /// For one that has ended the process that it was: containerd up to 2.3.3 takes an empty list for
    /// a leaked shim when it restarts, and would delete the task with its exit code.
    ///
    /// # Errors
    /// There is no such task, or its cgroup can't be read.
    pub async fn pids(&self, key: &TaskKey) -> Result<Vec<(u32, Option<ExecId>)>, Error> {
        let task = self.created(key)?.task().clone();
        let init = task.init.pid().unwrap_or_default();
        if task.init.exit().is_some() {
            return Ok(vec![(init, None)]);
        }
        let mut pids = match &task.cgroup {
            Some(cgroup) => {
                let cgroup = cgroup.clone();
                blocking(move || cgroup::processes(&cgroup)).await??
            }
            None => Vec::new(),
        };
        if !pids.contains(&init) {
            pids.insert(0, init);
        }
        let execs: HashMap<u32, &ExecId> = task
            .execs
            .iter()
            .filter_map(|(id, exec)| match exec.phase {
                ExecPhase::Running { pid } => Some((pid, id)),
                ExecPhase::Added | ExecPhase::Starting { .. } | ExecPhase::Stopped { .. } => None,
            })
            .collect();
        Ok(pids.into_iter().map(|pid| (pid, execs.get(&pid).map(|id| (*id).clone()))).collect())
    }
}
