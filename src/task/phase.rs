//! The phases of an init process, and the one function that changes them.
//!
//! ```text
//!            created              start begun            started           frozen
//! Creating ──────────▶ Created ───────────────▶ Starting ─────────▶ Running ◀──────▶ Paused
//!                         │  ◀─── start failed ────┘  │                │    thawed     │
//!                         └──────────── exited ───────┴────────────────┴───────────────┴──▶ Ending ──▶ Stopped
//!                                                                                       execs gone
//! ```
//!
//! An exit can be noticed while Create or Start is still under way. containerd wants create before
//! start before exit, so such an exit is kept in the phase and takes effect when the step ends. It
//! also wants the ends of all execs before that of init: until then the task is Ending.

use serde::{Deserialize, Serialize};

/// How a process ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Exit {
    /// 0 to 255, or 128 + the signal: what containerd calls exit status.
    pub status: u32,
    /// When, in microseconds since 1970.
    pub at_usec: u64,
}

/// An end that was noticed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Seen {
    /// Of which process. Not always told.
    pub pid: Option<u32>,
    /// How it ended.
    pub exit: Exit,
}

impl Seen {
    /// The end is not that of another process: one of an earlier unit with the same name, whose end is
    /// heard of late.
    pub(super) fn is_of(self, pid: u32) -> bool {
        self.pid.is_none_or(|seen| seen == pid)
    }
}

/// Where an init process is in its life.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "name", rename_all = "snake_case")]
pub enum Phase {
    /// The record is written; the unit may or may not exist yet.
    Creating {
        /// A process of the unit has ended: the last that was noticed.
        exit: Option<Seen>,
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
    /// It would run, but its cgroup is frozen.
    Paused {
        /// Its process.
        pid: u32,
    },
    /// It has ended, but containerd is not told before it has heard of the ends of all execs.
    Ending {
        /// The process that it was.
        pid: u32,
        /// How it ended.
        exit: Exit,
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
            | Self::Paused { pid }
            | Self::Ending { pid, .. }
            | Self::Stopped { pid, .. } => Some(*pid),
        }
    }

    /// How it ended, once containerd may know.
    pub fn exit(&self) -> Option<Exit> {
        match self {
            Self::Stopped { exit, .. } => Some(*exit),
            Self::Creating { .. }
            | Self::Created { .. }
            | Self::Starting { .. }
            | Self::Running { .. }
            | Self::Paused { .. }
            | Self::Ending { .. } => None,
        }
    }

    /// There is a process, as far as is known.
    pub fn is_alive(&self) -> bool {
        match self {
            Self::Created { .. }
            | Self::Starting { exit: None, .. }
            | Self::Running { .. }
            | Self::Paused { .. } => true,
            Self::Creating { .. }
            | Self::Starting { exit: Some(_), .. }
            | Self::Ending { .. }
            | Self::Stopped { .. } => false,
        }
    }

    /// It is frozen: nothing can be added to it.
    pub fn is_paused(&self) -> bool {
        matches!(self, Self::Paused { .. })
    }

    /// It runs, or has run: Start is over.
    pub fn has_run(&self) -> bool {
        match self {
            Self::Creating { .. } | Self::Created { .. } | Self::Starting { .. } => false,
            Self::Running { .. } | Self::Paused { .. } | Self::Ending { .. } | Self::Stopped { .. } => true,
        }
    }

    /// The phase in containerd's words, for messages.
    pub fn word(&self) -> &'static str {
        match self {
            Self::Creating { .. } => "creating",
            Self::Created { .. } => "created",
            Self::Starting { .. } => "starting",
            Self::Running { .. } => "running",
            Self::Paused { .. } => "paused",
            Self::Ending { .. } | Self::Stopped { .. } => "stopped",
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
    /// Its cgroup is frozen.
    Frozen,
    /// Its cgroup is frozen no more.
    Thawed,
    /// The main process has ended.
    Exited(Seen),
    /// No exec is live any more.
    ExecsGone,
}

impl Event {
    fn verb(self) -> &'static str {
        match self {
            Self::Created { .. } => "create",
            Self::StartBegun => "start",
            Self::Started | Self::StartFailed => "finish starting",
            Self::Frozen => "pause",
            Self::Thawed => "resume",
            Self::Exited(_) | Self::ExecsGone => "end",
        }
    }
}

/// What containerd, and those who wait, have to be told of a change, in order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Announce {
    /// Tell containerd that the task exists.
    Created {
        /// Its process.
        pid: u32,
    },
    /// Tell containerd that it runs.
    Started {
        /// Its process.
        pid: u32,
    },
    /// Tell containerd that it is paused.
    Paused,
    /// Tell containerd that it runs again.
    Resumed,
    /// Tell containerd, and those who wait, that it has ended.
    Exited {
        /// The process that it was.
        pid: u32,
        /// How it ended.
        exit: Exit,
    },
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
pub struct Step<P> {
    /// The new phase.
    pub next: P,
    /// What to do, in order.
    pub announce: Vec<Announce>,
}

/// A change that asks for nothing.
pub(super) fn stay<P>(phase: P) -> Step<P> {
    Step { next: phase, announce: Vec::new() }
}

fn end(pid: u32, exit: Exit, announce: Vec<Announce>) -> Step<Phase> {
    Step { next: Phase::Ending { pid, exit }, announce }
}

/// The only place where a phase changes.
///
/// Repeats of what has been seen already (signals of systemd come twice, resyncs repeat them)
/// change nothing; the first exit wins.
///
/// # Errors
/// The phase does not allow the event.
pub fn transition(phase: &Phase, event: Event) -> Result<Step<Phase>, Refusal> {
    use Event::{Created, ExecsGone, Exited, Frozen, StartBegun, StartFailed, Started, Thawed};
    let refused = Refusal { verb: event.verb(), phase: phase.word() };
    if let (Exited(seen), Some(pid)) = (event, phase.pid())
        && !seen.is_of(pid)
    {
        return Ok(stay(phase.clone()));
    }
    match (phase.clone(), event) {
        (Phase::Creating { exit }, Created { pid }) => {
            let announce = vec![Announce::Created { pid }];
            Ok(match exit.filter(|seen| seen.is_of(pid)) {
                None => Step { next: Phase::Created { pid }, announce },
                Some(seen) => end(pid, seen.exit, announce),
            })
        }
        (Phase::Creating { .. }, Exited(seen)) => Ok(stay(Phase::Creating { exit: Some(seen) })),
        (Phase::Creating { .. }, StartBegun | Started | StartFailed) => Err(refused),

        (Phase::Created { pid }, StartBegun) => Ok(stay(Phase::Starting { pid, exit: None })),
        (Phase::Created { pid } | Phase::Running { pid } | Phase::Paused { pid }, Exited(seen)) => {
            Ok(end(pid, seen.exit, Vec::new()))
        }
        (Phase::Created { .. }, Created { .. } | Started | StartFailed) => Err(refused),

        (Phase::Starting { pid, exit }, Started) => {
            let announce = vec![Announce::Started { pid }];
            Ok(match exit {
                None => Step { next: Phase::Running { pid }, announce },
                Some(exit) => end(pid, exit, announce),
            })
        }
        (Phase::Starting { pid, exit }, StartFailed) => Ok(match exit {
            None => stay(Phase::Created { pid }),
            Some(exit) => end(pid, exit, Vec::new()),
        }),
        (Phase::Starting { pid, exit }, Exited(seen)) => {
            Ok(stay(Phase::Starting { pid, exit: exit.or(Some(seen.exit)) }))
        }
        (Phase::Starting { .. }, Created { .. } | StartBegun) => Err(refused),

        (
            Phase::Running { .. } | Phase::Paused { .. },
            Created { .. } | StartBegun | Started | StartFailed,
        ) => Err(refused),
        (Phase::Running { pid }, Frozen) => {
            Ok(Step { next: Phase::Paused { pid }, announce: vec![Announce::Paused] })
        }
        (Phase::Paused { pid }, Thawed) => {
            Ok(Step { next: Phase::Running { pid }, announce: vec![Announce::Resumed] })
        }

        (Phase::Ending { pid, exit }, ExecsGone) => {
            Ok(Step { next: Phase::Stopped { pid, exit }, announce: vec![Announce::Exited { pid, exit }] })
        }

        (ended @ (Phase::Ending { .. } | Phase::Stopped { .. }), Exited(_)) => Ok(stay(ended)),
        (
            Phase::Ending { .. } | Phase::Stopped { .. },
            Created { .. } | StartBegun | Started | StartFailed,
        ) => Err(refused),

        // It matters to an init that has ended, and to no other.
        (
            other @ (Phase::Creating { .. }
            | Phase::Created { .. }
            | Phase::Starting { .. }
            | Phase::Running { .. }
            | Phase::Paused { .. }
            | Phase::Stopped { .. }),
            ExecsGone,
        ) => Ok(stay(other)),
        // One that does not run is not paused for containerd, whatever its cgroup is.
        (other, Frozen | Thawed) => Ok(stay(other)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const EXIT: Exit = Exit { status: 7, at_usec: 5 };
    const LATER: Exit = Exit { status: 0, at_usec: 9 };
    const PID: u32 = 42;
    const SEEN: Seen = Seen { pid: Some(PID), exit: EXIT };
    const SEEN_LATER: Seen = Seen { pid: None, exit: LATER };

    fn phases() -> Vec<Phase> {
        vec![
            Phase::Creating { exit: None },
            Phase::Creating { exit: Some(SEEN) },
            Phase::Created { pid: PID },
            Phase::Starting { pid: PID, exit: None },
            Phase::Starting { pid: PID, exit: Some(EXIT) },
            Phase::Running { pid: PID },
            Phase::Paused { pid: PID },
            Phase::Ending { pid: PID, exit: EXIT },
            Phase::Stopped { pid: PID, exit: EXIT },
        ]
    }

    fn events() -> Vec<Event> {
        vec![
            Event::Created { pid: PID },
            Event::StartBegun,
            Event::Started,
            Event::StartFailed,
            Event::Frozen,
            Event::Thawed,
            Event::Exited(SEEN_LATER),
            Event::ExecsGone,
        ]
    }

    fn run(events: &[Event]) -> (Phase, Vec<Announce>) {
        let mut phase = Phase::Creating { exit: None };
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
        for phase in phases() {
            for event in events() {
                let step = transition(&phase, event);
                if matches!(event, Event::Exited(_) | Event::ExecsGone) {
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
        let (phase, announce) = run(&[
            Event::Created { pid: PID },
            Event::StartBegun,
            Event::Started,
            Event::Exited(SEEN),
            Event::Exited(SEEN_LATER),
            Event::ExecsGone,
            Event::ExecsGone,
        ]);
        assert_eq!(phase.exit(), Some(EXIT));
        let exits = announce.iter().filter(|e| matches!(e, Announce::Exited { .. })).count();
        assert_eq!(exits, 1);
    }

    #[test]
    fn an_exit_inside_start_is_announced_after_the_start() {
        let (phase, announce) = run(&[
            Event::Created { pid: PID },
            Event::StartBegun,
            Event::Exited(SEEN),
            Event::Started,
            Event::ExecsGone,
        ]);
        assert_eq!(phase, Phase::Stopped { pid: PID, exit: EXIT });
        assert_eq!(
            announce,
            [
                Announce::Created { pid: PID },
                Announce::Started { pid: PID },
                Announce::Exited { pid: PID, exit: EXIT }
            ]
        );
    }

    #[test]
    fn an_exit_inside_create_is_announced_after_the_create() {
        let (phase, announce) = run(&[Event::Exited(SEEN), Event::Created { pid: PID }, Event::ExecsGone]);
        assert_eq!(phase, Phase::Stopped { pid: PID, exit: EXIT });
        assert_eq!(announce[0], Announce::Created { pid: PID });
    }

    #[test]
    fn the_end_of_another_process_is_not_this_ones() {
        let other = Event::Exited(Seen { pid: Some(PID + 1), exit: EXIT });
        let (phase, _) = run(&[
            other,
            Event::Created { pid: PID },
            other,
            Event::StartBegun,
            other,
            Event::Started,
            other,
        ]);
        assert_eq!(phase, Phase::Running { pid: PID });
    }

    #[test]
    fn a_freeze_is_told_once_and_only_of_what_runs() {
        let (phase, announce) = run(&[
            Event::Frozen,
            Event::Created { pid: PID },
            Event::Frozen,
            Event::Thawed,
            Event::StartBegun,
            Event::Started,
            Event::Frozen,
            Event::Frozen,
            Event::Thawed,
            Event::Thawed,
            Event::Frozen,
            Event::Exited(SEEN),
            Event::Thawed,
            Event::ExecsGone,
        ]);
        assert_eq!(phase, Phase::Stopped { pid: PID, exit: EXIT });
        let told = announce.iter().filter(|told| matches!(told, Announce::Paused | Announce::Resumed));
        assert_eq!(told.collect::<Vec<_>>(), [&Announce::Paused, &Announce::Resumed, &Announce::Paused]);
    }

    #[test]
    fn a_failed_start_leaves_a_created_process() {
        let (phase, _) = run(&[Event::Created { pid: PID }, Event::StartBegun, Event::StartFailed]);
        assert_eq!(phase, Phase::Created { pid: PID });
    }

    #[test]
    fn a_second_start_is_refused_in_containerds_words() {
        let refused = |phase: Phase| transition(&phase, Event::StartBegun).unwrap_err().to_string();
        assert_eq!(refused(Phase::Running { pid: PID }), "cannot start a running process");
        assert_eq!(refused(Phase::Paused { pid: PID }), "cannot start a paused process");
    }
}
