//! State: answered from memory, without waiting for anything.

use std::path::PathBuf;

use crate::id::ProcessKey;
use crate::services::{Error, Tasks};
use crate::task::lifecycle::Exit;
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

/// The answer to State.
#[derive(Clone, Debug)]
pub struct State {
    pub status: Status,
    /// The process, also after its end. `None` if there has been none.
    pub pid: Option<u32>,
    /// The exit of the process, if it has ended.
    pub exit: Option<Exit>,
    /// The task's bundle.
    pub bundle: PathBuf,
    /// Its stdio as received.
    pub stdio: Stdio,
}

impl Tasks {
    /// A process's state.
    ///
    /// # Errors
    /// There is no such process.
    pub fn state(&self, key: &ProcessKey) -> Result<State, Error> {
        let entry = self.created(&key.task)?;
        let task = entry.task();
        let process = task.process(key.exec.as_ref());
        let process = process.ok_or_else(|| Error::UnknownExec { key: key.clone() })?;
        let status = if process.exit().is_some() {
            Status::Stopped
        } else if !process.has_run() {
            Status::Created
        } else if task.init.phase.is_paused() {
            // An exec is frozen with its container.
            Status::Paused
        } else {
            Status::Running
        };
        Ok(State {
            status,
            pid: process.pid(),
            exit: process.exit(),
            bundle: task.request.bundle.clone(),
            stdio: process.stdio.clone(),
        })
    }
}
