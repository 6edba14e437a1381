//! A process of a task: its init process, or an exec.

use serde::{Deserialize, Serialize};

use crate::id::UnitName;

use super::lifecycle::{Exit, Lifecycle};
use super::request::Stdio;
use super::wiring::Wiring;

/// A process of a task: everything about it that must outlive the daemon. `P` is the type of its phase.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Process<P: ?Sized> {
    /// Its unit. The name is chosen once and never changes.
    pub unit: UnitName,
    /// The unit of its `binary://` logger, if it has one.
    pub logger: Option<UnitName>,
    /// The stdio strings as the client sent them. State and the events repeat them.
    pub stdio: Stdio,
    /// The destinations of its streams.
    pub wiring: Wiring,
    /// The unit's Description.
    pub description: String,
    pub phase: P,
}

impl<P: Lifecycle + ?Sized> Process<P> {
    /// The pid, once it is known. It stays known after the exit.
    pub fn pid(&self) -> Option<u32> {
        self.phase.pid()
    }

    /// The exit, once it may be published.
    pub fn exit(&self) -> Option<Exit> {
        self.phase.exit()
    }

    /// True if the process exists and no exit was observed.
    pub fn is_alive(&self) -> bool {
        self.phase.is_alive()
    }

    /// True if the process runs or has run.
    pub fn has_run(&self) -> bool {
        self.phase.has_run()
    }

    /// True while the process is being started.
    pub fn is_starting(&self) -> bool {
        self.phase.is_starting()
    }

    /// The phase in containerd's terms, for messages.
    pub fn word(&self) -> &'static str {
        self.phase.word()
    }
}
