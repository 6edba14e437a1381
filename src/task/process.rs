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
    /// As [`Lifecycle::pid`].
    pub fn pid(&self) -> Option<u32> {
        self.phase.pid()
    }

    /// As [`Lifecycle::exit`].
    pub fn exit(&self) -> Option<Exit> {
        self.phase.exit()
    }

    /// As [`Lifecycle::is_alive`].
    pub fn is_alive(&self) -> bool {
        self.phase.is_alive()
    }

    /// As [`Lifecycle::has_run`].
    pub fn has_run(&self) -> bool {
        self.phase.has_run()
    }

    /// As [`Lifecycle::is_starting`].
    pub fn is_starting(&self) -> bool {
        self.phase.is_starting()
    }

    /// As [`Lifecycle::word`].
    pub fn word(&self) -> &'static str {
        self.phase.word()
    }
}
