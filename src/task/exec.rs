//! An exec: a process added to a task, and the one function that changes its phase.
//!
//! ```text
//!         start begun            started            exited
//! Added ───────────────▶ Starting ─────────▶ Running ─────────▶ Stopped
//!   ◀──── start failed ─────┘
//! ```
//!
//! An exit can be noticed before Start is over: it is kept in the phase, as with init.

use serde::{Deserialize, Serialize};

use crate::id::UnitName;

use super::phase::{Announce, Exit, Refusal, Seen, Step, stay};
use super::request::Stdio;
use super::wiring::Wiring;

/// An exec: everything about it that must outlive the daemon, but for its process spec, which is a
/// file of its own.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Exec {
    /// Its unit. Chosen once, when it is added.
    pub unit: UnitName,
    /// The unit of its `binary://` logger, if it has one.
    pub logger: Option<UnitName>,
    /// The stdio strings as received.
    pub stdio: Stdio,
    /// Where its streams lead.
    pub wiring: Wiring,
    /// The unit's Description.
    pub description: String,
    /// Where it is in its life.
    pub phase: ExecPhase,
}

/// Where an exec is in its life.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "name", rename_all = "snake_case")]
pub enum ExecPhase {
    /// It is known, and nothing runs.
    Added,
    /// Its unit is being started.
    Starting {
        /// A process of the unit has ended: the last that was noticed.
        exit: Option<Seen>,
    },
    /// It runs.
    Running {
        /// Its process.
        pid: u32,
    },
    /// It has ended, and waits for Delete.
    Stopped {
        /// The process that it was.
        pid: u32,
        /// How it ended.
        exit: Exit,
    },
}

impl ExecPhase {
    /// The process, once it is known; after the end, the one it was.
    pub fn pid(&self) -> Option<u32> {
        match self {
            Self::Added | Self::Starting { .. } => None,
            Self::Running { pid } | Self::Stopped { pid, .. } => Some(*pid),
        }
    }

    /// How it ended, once containerd may know.
    pub fn exit(&self) -> Option<Exit> {
        match self {
            Self::Stopped { exit, .. } => Some(*exit),
            Self::Added | Self::Starting { .. } | Self::Running { .. } => None,
        }
    }

    /// There is, or is about to be, a process: the task's own end is told after its.
    pub fn is_live(&self) -> bool {
        matches!(self, Self::Starting { .. } | Self::Running { .. })
    }

    /// The phase in containerd's words, for messages.
    fn word(&self) -> &'static str {
        match self {
            Self::Added => "created",
            Self::Starting { .. } => "starting",
            Self::Running { .. } => "running",
            Self::Stopped { .. } => "stopped",
        }
    }
}

/// What happens to an exec.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ExecEvent {
    /// Its unit is about to be started.
    StartBegun,
    /// Its unit is up, and this is its main process.
    Started {
        /// The main process.
        pid: u32,
    },
    /// Its unit did not come up.
    StartFailed,
    /// The main process has ended.
    Exited(Seen),
}

impl ExecEvent {
    fn verb(self) -> &'static str {
        match self {
            Self::StartBegun => "start",
            Self::Started { .. } | Self::StartFailed => "finish starting",
            Self::Exited(_) => "end",
        }
    }
}

fn stop(pid: u32, exit: Exit, mut announce: Vec<Announce>) -> Step<ExecPhase> {
    announce.push(Announce::Exited { pid, exit });
    Step { next: ExecPhase::Stopped { pid, exit }, announce }
}

/// The only place where an exec's phase changes. Repeats change nothing; the first exit wins.
///
/// # Errors
/// The phase does not allow the event.
pub fn transition(phase: &ExecPhase, event: ExecEvent) -> Result<Step<ExecPhase>, Refusal> {
    use ExecEvent::{Exited, StartBegun, StartFailed, Started};
    let refused = Refusal { verb: event.verb(), phase: phase.word() };
    match (phase.clone(), event) {
        (ExecPhase::Added, StartBegun) => Ok(stay(ExecPhase::Starting { exit: None })),
        // What an earlier start that failed has left ends now.
        (ExecPhase::Added, Exited(_)) => Ok(stay(ExecPhase::Added)),
        (ExecPhase::Added, Started { .. } | StartFailed) => Err(refused),

        (ExecPhase::Starting { exit }, Started { pid }) => {
            let announce = vec![Announce::Started { pid }];
            Ok(match exit.filter(|seen| seen.is_of(pid)) {
                None => Step { next: ExecPhase::Running { pid }, announce },
                Some(seen) => stop(pid, seen.exit, announce),
            })
        }
        // The end that was noticed was that of the attempt.
        (ExecPhase::Starting { .. }, StartFailed) => Ok(stay(ExecPhase::Added)),
        (ExecPhase::Starting { .. }, Exited(seen)) => Ok(stay(ExecPhase::Starting { exit: Some(seen) })),
        (ExecPhase::Starting { .. }, StartBegun) => Err(refused),

        (ExecPhase::Running { pid }, Exited(seen)) if seen.is_of(pid) => Ok(stop(pid, seen.exit, Vec::new())),
        (running @ ExecPhase::Running { .. }, Exited(_)) => Ok(stay(running)),
        (ExecPhase::Running { .. }, StartBegun | Started { .. } | StartFailed) => Err(refused),

        (stopped @ ExecPhase::Stopped { .. }, Exited(_)) => Ok(stay(stopped)),
        (ExecPhase::Stopped { .. }, StartBegun | Started { .. } | StartFailed) => Err(refused),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const EXIT: Exit = Exit { status: 7, at_usec: 5 };
    const LATER: Exit = Exit { status: 0, at_usec: 9 };
    const PID: u32 = 42;
    const SEEN: Seen = Seen { pid: Some(PID), exit: EXIT };

    fn run(events: &[ExecEvent]) -> (ExecPhase, Vec<Announce>) {
        let mut phase = ExecPhase::Added;
        let mut announce = Vec::new();
        for event in events {
            let step = transition(&phase, *event).unwrap();
            phase = step.next;
            announce.extend(step.announce);
        }
        (phase, announce)
    }

    #[test]
    fn every_pair_is_decided_and_an_exit_is_never_refused() {
        let phases = [
            ExecPhase::Added,
            ExecPhase::Starting { exit: None },
            ExecPhase::Starting { exit: Some(SEEN) },
            ExecPhase::Running { pid: PID },
            ExecPhase::Stopped { pid: PID, exit: EXIT },
        ];
        let events = [
            ExecEvent::StartBegun,
            ExecEvent::Started { pid: PID },
            ExecEvent::StartFailed,
            ExecEvent::Exited(Seen { pid: None, exit: LATER }),
        ];
        for phase in phases {
            for event in events {
                let step = transition(&phase, event);
                assert!(step.is_ok() || !matches!(event, ExecEvent::Exited(_)), "{phase:?} {event:?}");
                if let (Ok(step), Some(_)) = (step, phase.exit()) {
                    assert_eq!(step, stay(phase.clone()), "an end is final");
                }
            }
        }
    }

    #[test]
    fn an_exit_inside_start_is_announced_after_the_start() {
        let (phase, announce) =
            run(&[ExecEvent::StartBegun, ExecEvent::Exited(SEEN), ExecEvent::Started { pid: PID }]);
        assert_eq!(phase.exit(), Some(EXIT));
        let announced = [Announce::Started { pid: PID }, Announce::Exited { pid: PID, exit: EXIT }];
        assert_eq!(announce, announced);
    }

    #[test]
    fn a_failed_start_can_be_tried_again_and_announces_nothing() {
        let (phase, announce) =
            run(&[ExecEvent::StartBegun, ExecEvent::Exited(SEEN), ExecEvent::StartFailed]);
        assert_eq!((phase, announce.len()), (ExecPhase::Added, 0));
    }

    #[test]
    fn illegal_starts_are_refused_in_containerds_words() {
        let refused = |phase| transition(&phase, ExecEvent::StartBegun).unwrap_err().to_string();
        assert_eq!(refused(ExecPhase::Running { pid: PID }), "cannot start a running process");
        let stopped = ExecPhase::Stopped { pid: PID, exit: EXIT };
        assert_eq!(refused(stopped), "cannot start a stopped process");
    }
}
