//! A process of a task: its init process, or an exec.

use serde::{Deserialize, Serialize};

use crate::id::UnitName;

use super::phase::{Announce, Event, Exit, Refusal};
use super::request::Stdio;
use super::wiring::Wiring;

/// A process of a task: everything about it that must outlive the daemon. `P` is the type of its phase.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Process<P: ?Sized> {
    /// Its unit. Chosen once, never derived again.
    pub unit: UnitName,
    /// The unit of its `binary://` logger, if it has one.
    pub logger: Option<UnitName>,
    /// The stdio strings as received: State and the events repeat them.
    pub stdio: Stdio,
    /// Where its streams lead.
    pub wiring: Wiring,
    /// The unit's Description.
    pub description: String,
    /// Where it is in its life.
    pub phase: P,
}

/// What the phases of an init process and of an exec have in common.
pub trait Lifecycle {
    /// The process, once it is known; after the end, the one it was.
    fn pid(&self) -> Option<u32>;
    /// How it ended, once containerd may know.
    fn exit(&self) -> Option<Exit>;
    /// There is a process, as far as is known.
    fn is_alive(&self) -> bool;
    /// It runs, or has run: Start is over.
    fn has_run(&self) -> bool;
    /// Start is under way.
    fn is_starting(&self) -> bool;
    /// The phase in containerd's words, for messages.
    fn word(&self) -> &'static str;
    /// Changes the phase. Returns what has to be announced, in order.
    ///
    /// # Errors
    /// The phase refuses the event; then nothing has changed.
    fn apply(&mut self, event: Event) -> Result<Vec<Announce>, Refusal>;
}

impl<P: Lifecycle + ?Sized> Process<P> {
    /// The process, once it is known; after the end, the one it was.
    pub fn pid(&self) -> Option<u32> {
        self.phase.pid()
    }

    /// How it ended, once containerd may know.
    pub fn exit(&self) -> Option<Exit> {
        self.phase.exit()
    }

    /// There is a process, as far as is known.
    pub fn is_alive(&self) -> bool {
        self.phase.is_alive()
    }

    /// It runs, or has run: Start is over.
    pub fn has_run(&self) -> bool {
        self.phase.has_run()
    }

    /// Start is under way.
    pub fn is_starting(&self) -> bool {
        self.phase.is_starting()
    }

    /// The phase in containerd's words, for messages.
    pub fn word(&self) -> &'static str {
        self.phase.word()
    }
}
