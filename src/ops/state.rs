//! State: answered from memory, never waiting for anything.

use std::path::PathBuf;

use crate::id::ProcessKey;
use crate::services::{Error, Shim};
use crate::task::exec::ExecPhase;
use crate::task::phase::{Exit, Phase};
use crate::task::request::Stdio;

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
        let entry = self.tasks.created(&key.task)?;
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
}
