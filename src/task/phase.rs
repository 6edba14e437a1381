//! The phases of an init process, and the one function that changes them.
//!
//! ```text
//!            created              start begun            started
//! Creating ──────────▶ Created ───────────────▶ Starting ─────────▶ Running
//!                         │  ◀─── start failed ────┘  │                │
//!                         └──────────── exited ───────┴────────────────┴──▶ Stopped
//! ```
//!
//! An exit can be noticed while Create or Start is still under way. containerd wants create before
//! start before exit, so such an exit is kept in the phase and takes effect when the step ends.

use serde::{Deserialize, Serialize};

/// How a process ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Exit {
    /// 0 to 255, or 128 + the signal: what containerd calls exit status.
    pub status: u32,
    /// When, in microseconds since 1970.
    pub at_usec: u64,
}

/// Where an init process is in its life.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "name", rename_all = "snake_case")]
pub enum Phase {
    /// The record is written; the unit may or may not exist yet.
    Creating {
        /// It has already ended.
        exit: Option<Exit>,
    },
    /// The OCI runtime's init waits to be started.
    Created {
        /// Its process.
        pid: u32,
    },
    /// The OCI runtime has been asked to start it.
    Starting {
        /// Its process.
        pid: u32,
        /// It has already ended.
        exit: Option<Exit>,
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

impl Phase {
    /// The process, once it is known; after the end, the one it was.
    pub fn pid(&self) -> Option<u32> {
        match self {
            Self::Creating { .. } => None,
            Self::Created { pid }
            | Self::Starting { pid, .. }
            | Self::Running { pid }
            | Self::Stopped { pid, .. } => Some(*pid),
        }
    }

    /// How it ended, once containerd may know.
    pub fn exit(&self) -> Option<Exit> {
        match self {
            Self::Stopped { exit, .. } => Some(*exit),
            Self::Creating { .. } | Self::Created { .. } | Self::Starting { .. } | Self::Running { .. } => {
                None
            }
        }
    }

    /// The phase in containerd's words, for messages.
    fn word(&self) -> &'static str {
        match self {
            Self::Creating { .. } => "creating",
            Self::Created { .. } => "created",
            Self::Starting { .. } => "starting",
            Self::Running { .. } => "running",
            Self::Stopped { .. } => "stopped",
        }
    }
}

/// What happens to an init process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// The unit is up, and this is its main process.
    Created {
        /// The main process.
        pid: u32,
    },
    /// The OCI runtime is about to be asked to start it.
    StartBegun,
    /// The OCI runtime has started it.
    Started,
    /// The OCI runtime could not start it.
    StartFailed,
    /// The main process has ended.
    Exited(Exit),
}

impl Event {
    fn verb(self) -> &'static str {
        match self {
            Self::Created { .. } => "create",
            Self::StartBegun => "start",
            Self::Started | Self::StartFailed => "finish starting",
            Self::Exited(_) => "end",
        }
    }
}

/// What a change of phase asks for, in order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Effect {
    /// Tell containerd that the task exists.
    AnnounceCreated {
        /// Its process.
        pid: u32,
    },
    /// Tell containerd that it runs.
    AnnounceStarted {
        /// Its process.
        pid: u32,
    },
    /// Tell containerd that it has ended.
    AnnounceExit {
        /// The process that it was.
        pid: u32,
        /// How it ended.
        exit: Exit,
    },
    /// Answer those who wait for the end.
    Wake,
}

/// An event that the phase does not allow.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("cannot {verb} a {phase} process")]
pub struct Refusal {
    /// What was asked.
    pub verb: &'static str,
    /// The phase that refused it.
    pub phase: &'static str,
}

/// A phase and what its change asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Step {
    /// The new phase.
    pub next: Phase,
    /// What to do, in order.
    pub effects: Vec<Effect>,
}

fn stay(phase: Phase) -> Step {
    Step { next: phase, effects: Vec::new() }
}

fn stop(pid: u32, exit: Exit, mut effects: Vec<Effect>) -> Step {
    effects.extend([Effect::AnnounceExit { pid, exit }, Effect::Wake]);
    Step { next: Phase::Stopped { pid, exit }, effects }
}

/// The only place where a phase changes.
///
/// Repeats of what has been seen already (signals of systemd come twice, resyncs repeat them)
/// change nothing; the first exit wins.
///
/// # Errors
/// The phase does not allow the event.
pub fn transition(phase: &Phase, event: Event) -> Result<Step, Refusal> {
    let refused = Refusal { verb: event.verb(), phase: phase.word() };
    match (phase.clone(), event) {
        (Phase::Creating { exit }, Event::Created { pid }) => {
            let announce = vec![Effect::AnnounceCreated { pid }];
            Ok(match exit {
                None => Step { next: Phase::Created { pid }, effects: announce },
                Some(exit) => stop(pid, exit, announce),
            })
        }
        (Phase::Creating { exit }, Event::Exited(seen)) => {
            Ok(stay(Phase::Creating { exit: exit.or(Some(seen)) }))
        }
        (Phase::Creating { .. }, Event::StartBegun | Event::Started | Event::StartFailed) => Err(refused),

        (Phase::Created { pid }, Event::StartBegun) => Ok(stay(Phase::Starting { pid, exit: None })),
        (Phase::Created { pid }, Event::Exited(exit)) => Ok(stop(pid, exit, Vec::new())),
        (Phase::Created { .. }, Event::Created { .. } | Event::Started | Event::StartFailed) => Err(refused),

        (Phase::Starting { pid, exit }, Event::Started) => {
            let announce = vec![Effect::AnnounceStarted { pid }];
            Ok(match exit {
                None => Step { next: Phase::Running { pid }, effects: announce },
                Some(exit) => stop(pid, exit, announce),
            })
        }
        (Phase::Starting { pid, exit }, Event::StartFailed) => Ok(match exit {
            None => stay(Phase::Created { pid }),
            Some(exit) => stop(pid, exit, Vec::new()),
        }),
        (Phase::Starting { pid, exit }, Event::Exited(seen)) => {
            Ok(stay(Phase::Starting { pid, exit: exit.or(Some(seen)) }))
        }
        (Phase::Starting { .. }, Event::Created { .. } | Event::StartBegun) => Err(refused),

        (Phase::Running { pid }, Event::Exited(exit)) => Ok(stop(pid, exit, Vec::new())),
        (
            Phase::Running { .. },
            Event::Created { .. } | Event::StartBegun | Event::Started | Event::StartFailed,
        ) => Err(refused),

        (stopped @ Phase::Stopped { .. }, Event::Exited(_)) => Ok(stay(stopped)),
        (
            Phase::Stopped { .. },
            Event::Created { .. } | Event::StartBegun | Event::Started | Event::StartFailed,
        ) => Err(refused),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const EXIT: Exit = Exit { status: 7, at_usec: 5 };
    const LATER: Exit = Exit { status: 0, at_usec: 9 };
    const PID: u32 = 42;

    fn phases() -> Vec<Phase> {
        vec![
            Phase::Creating { exit: None },
            Phase::Creating { exit: Some(EXIT) },
            Phase::Created { pid: PID },
            Phase::Starting { pid: PID, exit: None },
            Phase::Starting { pid: PID, exit: Some(EXIT) },
            Phase::Running { pid: PID },
            Phase::Stopped { pid: PID, exit: EXIT },
        ]
    }

    fn events() -> Vec<Event> {
        vec![
            Event::Created { pid: PID },
            Event::StartBegun,
            Event::Started,
            Event::StartFailed,
            Event::Exited(LATER),
        ]
    }

    fn run(events: &[Event]) -> (Phase, Vec<Effect>) {
        let mut phase = Phase::Creating { exit: None };
        let mut effects = Vec::new();
        for event in events {
            let step = transition(&phase, *event).unwrap();
            phase = step.next;
            effects.extend(step.effects);
        }
        (phase, effects)
    }

    #[test]
    fn every_pair_is_decided_and_an_exit_is_never_refused() {
        for phase in phases() {
            for event in events() {
                let step = transition(&phase, event);
                if matches!(event, Event::Exited(_)) {
                    assert!(step.is_ok(), "{phase:?} {event:?}");
                }
                if let Ok(step) = step
                    && phase.exit().is_some()
                {
                    assert_eq!(step, stay(phase.clone()), "an end is final");
                }
            }
        }
    }

    #[test]
    fn an_exit_is_announced_once_and_the_first_one_wins() {
        let (phase, effects) = run(&[
            Event::Created { pid: PID },
            Event::StartBegun,
            Event::Started,
            Event::Exited(EXIT),
            Event::Exited(LATER),
        ]);
        assert_eq!(phase.exit(), Some(EXIT));
        let exits = effects.iter().filter(|e| matches!(e, Effect::AnnounceExit { .. })).count();
        assert_eq!(exits, 1);
    }

    #[test]
    fn an_exit_inside_start_is_announced_after_the_start() {
        let (phase, effects) =
            run(&[Event::Created { pid: PID }, Event::StartBegun, Event::Exited(EXIT), Event::Started]);
        assert_eq!(phase, Phase::Stopped { pid: PID, exit: EXIT });
        assert_eq!(
            effects,
            [
                Effect::AnnounceCreated { pid: PID },
                Effect::AnnounceStarted { pid: PID },
                Effect::AnnounceExit { pid: PID, exit: EXIT },
                Effect::Wake
            ]
        );
    }

    #[test]
    fn an_exit_inside_create_is_announced_after_the_create() {
        let (phase, effects) = run(&[Event::Exited(EXIT), Event::Created { pid: PID }]);
        assert_eq!(phase, Phase::Stopped { pid: PID, exit: EXIT });
        assert_eq!(effects[0], Effect::AnnounceCreated { pid: PID });
    }

    #[test]
    fn a_failed_start_leaves_a_created_process() {
        let (phase, _) = run(&[Event::Created { pid: PID }, Event::StartBegun, Event::StartFailed]);
        assert_eq!(phase, Phase::Created { pid: PID });
    }

    #[test]
    fn a_second_start_is_refused_in_containerds_words() {
        let refusal = transition(&Phase::Running { pid: PID }, Event::StartBegun).unwrap_err();
        assert_eq!(refusal.to_string(), "cannot start a running process");
    }
}
