//! An exec: a process added to a task, and the one function that changes its phase.
//!
//! ```text
//!         start begun            started            exited
//! Added ───────────────▶ Starting ─────────▶ Running ─────────▶ Stopped
//!   ◀──── start failed ─────┘
//! ```
//!
//! An exit that is observed before Start is over is kept in the phase, as for an init process.

use serde::{Deserialize, Serialize};

use crate::id::ExecId;

use super::lifecycle::{self, Event, Exit, Lifecycle, ObservedExit, Refusal, stay};
use super::outbox::TaskEvent;
use super::process::Process;

/// An exec. Its process spec is a file of its own.
pub type Exec = Process<ExecPhase>;

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "name", rename_all = "snake_case")]
pub enum ExecPhase {
    /// The exec is recorded, and nothing runs.
    Added,
    /// Its unit is being started.
    Starting {
        /// The last observed exit of a process of the unit.
        exit: Option<ObservedExit>,
    },
    /// The process runs.
    Running {
        /// Its process.
        pid: u32,
    },
    /// The process has ended. Delete removes the exec.
    Stopped {
        /// The pid of the process.
        pid: u32,
        exit: Exit,
    },
}

impl ExecPhase {
    /// True if a process runs or is being started: the exit of the task is published after that of this exec.
    pub fn is_live(&self) -> bool {
        matches!(self, Self::Starting { .. } | Self::Running { .. })
    }

    /// Changes the phase. Returns the events to publish, in order.
    ///
    /// # Errors
    /// The phase does not allow the event. The phase stays as it is then.
    pub fn apply(&mut self, event: Event) -> Result<Vec<Announce>, Refusal> {
        let step = transition(self, event)?;
        *self = step.next;
        Ok(step.announce)
    }
}

impl Lifecycle for ExecPhase {
    fn pid(&self) -> Option<u32> {
        match self {
            Self::Added | Self::Starting { .. } => None,
            Self::Running { pid } | Self::Stopped { pid, .. } => Some(*pid),
        }
    }

    fn exit(&self) -> Option<Exit> {
        match self {
            Self::Stopped { exit, .. } => Some(*exit),
            Self::Added | Self::Starting { .. } | Self::Running { .. } => None,
        }
    }

    fn is_alive(&self) -> bool {
        matches!(self, Self::Running { .. })
    }

    fn has_run(&self) -> bool {
        matches!(self, Self::Running { .. } | Self::Stopped { .. })
    }

    fn is_starting(&self) -> bool {
        matches!(self, Self::Starting { .. })
    }

    fn word(&self) -> &'static str {
        match self {
            Self::Added => "created",
            Self::Starting { .. } => "starting",
            Self::Running { .. } => "running",
            Self::Stopped { .. } => "stopped",
        }
    }
}

/// An event to publish because of a change of the phase of an exec.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Announce {
    Started {
        /// The process.
        pid: u32,
    },
    Exited {
        /// The process that it was.
        pid: u32,
        /// How it ended.
        exit: Exit,
    },
}

impl Announce {
    /// The event of this exec.
    pub fn of(self, exec: ExecId) -> TaskEvent {
        match self {
            Self::Started { pid } => TaskEvent::ExecStarted { exec, pid },
            Self::Exited { pid, exit } => TaskEvent::ExecExited { exec, pid, exit },
        }
    }
}

type Step = lifecycle::Step<ExecPhase, Announce>;

fn stop(pid: u32, exit: Exit, mut announce: Vec<Announce>) -> Step {
    announce.push(Announce::Exited { pid, exit });
    Step { next: ExecPhase::Stopped { pid, exit }, announce }
}

/// The only function that changes the phase of an exec. Repeated events change nothing, and the first exit counts.
///
/// # Errors
/// The phase does not allow the event.
pub fn transition(phase: &ExecPhase, event: Event) -> Result<Step, Refusal> {
    use Event::{
        Created, ExecStarted, ExecsGone, Exited, Frozen, InitStarted, Prepared, StartBegun, StartFailed,
        Thawed,
    };
    let refused = Refusal { verb: event.verb(), phase: phase.word() };
    match (phase.clone(), event) {
        (ExecPhase::Added, StartBegun) => Ok(stay(ExecPhase::Starting { exit: None })),
        // A late report about an earlier start that failed.
        (ExecPhase::Added, Exited(_)) => Ok(stay(ExecPhase::Added)),
        (ExecPhase::Added, ExecStarted { .. } | StartFailed) => Err(refused),

        (ExecPhase::Starting { exit }, ExecStarted { pid }) => {
            let announce = vec![Announce::Started { pid }];
            Ok(match exit.filter(|seen| seen.is_of(pid)) {
                None => Step { next: ExecPhase::Running { pid }, announce },
                Some(seen) => stop(pid, seen.exit, announce),
            })
        }
        // The observed exit belongs to the failed start.
        (ExecPhase::Starting { .. }, StartFailed) => Ok(stay(ExecPhase::Added)),
        (ExecPhase::Starting { .. }, Exited(seen)) => Ok(stay(ExecPhase::Starting { exit: Some(seen) })),
        (ExecPhase::Starting { .. }, StartBegun) => Err(refused),

        (ExecPhase::Running { pid }, Exited(seen)) if seen.is_of(pid) => Ok(stop(pid, seen.exit, Vec::new())),
        (running @ ExecPhase::Running { .. }, Exited(_)) => Ok(stay(running)),
        (ExecPhase::Running { .. }, StartBegun | ExecStarted { .. } | StartFailed) => Err(refused),

        (stopped @ ExecPhase::Stopped { .. }, Exited(_)) => Ok(stay(stopped)),
        (ExecPhase::Stopped { .. }, StartBegun | ExecStarted { .. } | StartFailed) => Err(refused),

        // An exec is frozen with its container, and has no execs of its own.
        (
            other @ (ExecPhase::Added
            | ExecPhase::Starting { .. }
            | ExecPhase::Running { .. }
            | ExecPhase::Stopped { .. }),
            Frozen | Thawed | ExecsGone,
        ) => Ok(stay(other)),
        (
            ExecPhase::Added
            | ExecPhase::Starting { .. }
            | ExecPhase::Running { .. }
            | ExecPhase::Stopped { .. },
            Prepared | Created { .. } | InitStarted,
        ) => Err(refused),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const EXIT: Exit = Exit { status: 7, at_usec: 5 };
    const LATER: Exit = Exit { status: 0, at_usec: 9 };
    const PID: u32 = 42;
    const SEEN: ObservedExit = ObservedExit { pid: Some(PID), exit: EXIT };

    fn run(events: &[Event]) -> (ExecPhase, Vec<Announce>) {
        let mut phase = ExecPhase::Added;
        let mut announce = Vec::new();
        for event in events {
            let step = transition(&phase, event.clone()).unwrap();
            phase = step.next;
            announce.extend(step.announce);
        }
        (phase, announce)
    }

    /// The phase after an event and the letters of what is announced; `-` for a refusal. A phase that has an early
    /// exit is in lower case.
    fn outcome(phase: &ExecPhase, event: Event) -> String {
        let Ok(step) = transition(phase, event) else {
            return "-".to_owned();
        };
        let letters = step.announce.iter().map(|announce| match announce {
            Announce::Started { .. } => 'S',
            Announce::Exited { .. } => 'E',
        });
        let letters: String = letters.collect();
        if letters.is_empty() {
            short(&step.next).to_owned()
        } else {
            format!("{}+{letters}", short(&step.next))
        }
    }

    fn short(phase: &ExecPhase) -> &'static str {
        match phase {
            ExecPhase::Added => "Added",
            ExecPhase::Starting { exit: None } => "Starting",
            ExecPhase::Starting { exit: Some(_) } => "starting",
            ExecPhase::Running { .. } => "Running",
            ExecPhase::Stopped { .. } => "Stopped",
        }
    }

    #[test]
    fn every_event_in_every_phase_does_what_the_table_says() {
        let phases = [
            ExecPhase::Added,
            ExecPhase::Starting { exit: None },
            ExecPhase::Starting { exit: Some(SEEN) },
            ExecPhase::Running { pid: PID },
            ExecPhase::Stopped { pid: PID, exit: EXIT },
        ];
        let events = [
            Event::StartBegun,
            Event::ExecStarted { pid: PID },
            Event::StartFailed,
            Event::Exited(ObservedExit { pid: None, exit: LATER }),
            Event::Exited(ObservedExit { pid: Some(PID + 1), exit: LATER }),
            Event::Frozen,
            Event::Thawed,
            Event::ExecsGone,
        ];
        #[rustfmt::skip]
        let table = [
            // phase, StartBegun, Started, StartFailed, Exited, Exited of another process, Frozen, Thawed, ExecsGone
            ("Added", ["Starting", "-", "-", "Added", "Added", "Added", "Added", "Added"]),
            ("Starting", ["-", "Running+S", "Added", "starting", "starting", "Starting", "Starting", "Starting"]),
            ("starting", ["-", "Stopped+SE", "Added", "starting", "starting", "starting", "starting", "starting"]),
            ("Running", ["-", "-", "-", "Stopped+E", "Running", "Running", "Running", "Running"]),
            ("Stopped", ["-", "-", "-", "Stopped", "Stopped", "Stopped", "Stopped", "Stopped"]),
        ];
        assert_eq!(phases.len(), table.len());
        for (phase, (name, row)) in phases.iter().zip(table) {
            assert_eq!(short(phase), name);
            let outcomes = events.clone().map(|event| outcome(phase, event));
            assert_eq!(outcomes, row, "{phase:?}");
        }
    }

    #[test]
    fn an_exit_inside_start_is_announced_after_the_start() {
        let (phase, announce) =
            run(&[Event::StartBegun, Event::Exited(SEEN), Event::ExecStarted { pid: PID }]);
        assert_eq!(phase.exit(), Some(EXIT));
        let announced = [Announce::Started { pid: PID }, Announce::Exited { pid: PID, exit: EXIT }];
        assert_eq!(announce, announced);
    }

    #[test]
    fn a_failed_start_can_be_tried_again_and_announces_nothing() {
        let (phase, announce) = run(&[Event::StartBegun, Event::Exited(SEEN), Event::StartFailed]);
        assert_eq!((phase, announce.len()), (ExecPhase::Added, 0));
    }

    #[test]
    fn what_only_an_init_process_does_is_refused() {
        for event in [Event::Prepared, Event::InitStarted] {
            assert_eq!(outcome(&ExecPhase::Starting { exit: None }, event), "-");
        }
    }

    #[test]
    fn illegal_starts_are_refused_in_containerds_words() {
        let refused = |phase| transition(&phase, Event::StartBegun).unwrap_err().to_string();
        assert_eq!(refused(ExecPhase::Running { pid: PID }), "cannot start a running process");
        let stopped = ExecPhase::Stopped { pid: PID, exit: EXIT };
        assert_eq!(refused(stopped), "cannot start a stopped process");
    }
}
