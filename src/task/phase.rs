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
//! A container with a checkpoint has no process before Start, which restores it:
//!
//! ```text
//!            prepared            start begun             created
//! Creating ───────────▶ Prepared ────────────▶ Restoring ───────▶ Running
//!                           ◀──── start failed ─────┘
//! ```
//!
//! An exit can be observed while Create or Start is still running. containerd requires the events in the order create,
//! start, exit, so such an exit is kept in the phase and takes effect when the call ends. containerd also requires the
//! exits of all execs before that of the init process: until then, the phase is Ending.

use super::lifecycle::{self, Container, Event, Exit, Lifecycle, ObservedExit, Program, Refusal, stay};
use super::outbox::TaskEvent;

/// The result of a transition. The events go to the outbox as they are.
type Step = lifecycle::Step<Phase, TaskEvent>;

/// The phase of an init process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Phase {
    /// The record is written; the unit may or may not exist yet.
    Creating {
        /// The last observed exit of a process of the unit.
        exit: Option<ObservedExit>,
    },
    /// The rootfs is mounted. There is no process: Start restores one from a checkpoint.
    Prepared,
    /// The restore was begun; the unit may or may not exist yet.
    Restoring {
        /// The last observed exit of a process of the unit.
        exit: Option<ObservedExit>,
    },
    /// The init process of the OCI runtime waits for Start.
    Created {
        container: Container,
        /// The program that init runs while it waits. It runs another one from the start on.
        program: Option<Program>,
    },
    /// The command `start` of the OCI runtime was begun.
    Starting {
        container: Container,
        /// As in [`Self::Created`].
        program: Option<Program>,
        /// The exit, if the process has ended already.
        exit: Option<Exit>,
    },
    /// The process runs.
    Running { container: Container },
    /// The process is frozen.
    Paused { container: Container },
    /// The process has ended. The exit is published after those of all execs.
    Ending {
        /// The container that it was.
        container: Container,
        /// How it ended.
        exit: Exit,
        /// True if it ended before a Start succeeded. False in a record of an earlier version.
        never_started: bool,
    },
    /// The process has ended. Delete removes the task.
    Stopped {
        /// The container that it was.
        container: Container,
        /// How it ended.
        exit: Exit,
        /// As in [`Self::Ending`].
        never_started: bool,
    },
}

impl Phase {
    /// The container, once the OCI runtime has made it.
    pub fn container(&self) -> Option<&Container> {
        match self {
            Self::Creating { .. } | Self::Prepared | Self::Restoring { .. } => None,
            Self::Created { container, .. }
            | Self::Starting { container, .. }
            | Self::Running { container }
            | Self::Paused { container }
            | Self::Ending { container, .. }
            | Self::Stopped { container, .. } => Some(container),
        }
    }

    /// As [`Self::container`].
    pub fn container_mut(&mut self) -> Option<&mut Container> {
        match self {
            Self::Creating { .. } | Self::Prepared | Self::Restoring { .. } => None,
            Self::Created { container, .. }
            | Self::Starting { container, .. }
            | Self::Running { container }
            | Self::Paused { container }
            | Self::Ending { container, .. }
            | Self::Stopped { container, .. } => Some(container),
        }
    }

    /// The program that init runs while it waits to be started.
    pub fn program(&self) -> Option<Program> {
        match self {
            Self::Created { program, .. } | Self::Starting { program, .. } => *program,
            Self::Creating { .. }
            | Self::Prepared
            | Self::Restoring { .. }
            | Self::Running { .. }
            | Self::Paused { .. }
            | Self::Ending { .. }
            | Self::Stopped { .. } => None,
        }
    }

    /// True if Create has not completed.
    pub fn is_creating(&self) -> bool {
        matches!(self, Self::Creating { .. })
    }

    /// True if the process is frozen: no exec can be added.
    pub fn is_paused(&self) -> bool {
        matches!(self, Self::Paused { .. })
    }

    /// Changes the phase. Returns the events to publish, in order.
    ///
    /// # Errors
    /// The phase does not allow the event. The phase stays as it is then.
    pub fn apply(&mut self, event: Event) -> Result<Vec<TaskEvent>, Refusal> {
        let step = transition(self, event)?;
        *self = step.next;
        Ok(step.announce)
    }
}

impl Lifecycle for Phase {
    fn pid(&self) -> Option<u32> {
        self.container().map(|container| container.pid)
    }

    fn exit(&self) -> Option<Exit> {
        match self {
            Self::Stopped { exit, .. } => Some(*exit),
            Self::Creating { .. }
            | Self::Prepared
            | Self::Restoring { .. }
            | Self::Created { .. }
            | Self::Starting { .. }
            | Self::Running { .. }
            | Self::Paused { .. }
            | Self::Ending { .. } => None,
        }
    }

    fn is_alive(&self) -> bool {
        match self {
            Self::Created { .. }
            | Self::Starting { exit: None, .. }
            | Self::Running { .. }
            | Self::Paused { .. } => true,
            Self::Creating { .. }
            | Self::Prepared
            | Self::Restoring { .. }
            | Self::Starting { exit: Some(_), .. }
            | Self::Ending { .. }
            | Self::Stopped { .. } => false,
        }
    }

    fn has_run(&self) -> bool {
        match self {
            Self::Creating { .. }
            | Self::Prepared
            | Self::Restoring { .. }
            | Self::Created { .. }
            | Self::Starting { .. } => false,
            Self::Running { .. } | Self::Paused { .. } => true,
            Self::Ending { never_started, .. } | Self::Stopped { never_started, .. } => !never_started,
        }
    }

    fn is_starting(&self) -> bool {
        matches!(self, Self::Starting { .. } | Self::Restoring { .. })
    }

    fn word(&self) -> &'static str {
        match self {
            Self::Creating { .. } => "creating",
            Self::Prepared | Self::Created { .. } => "created",
            Self::Restoring { .. } | Self::Starting { .. } => "starting",
            Self::Running { .. } => "running",
            Self::Paused { .. } => "paused",
            Self::Ending { .. } | Self::Stopped { .. } => "stopped",
        }
    }
}

fn end(container: Container, exit: Exit, announce: Vec<TaskEvent>) -> Step {
    Step { next: Phase::Ending { container, exit, never_started: false }, announce }
}

/// The end of a process that no Start has released.
fn end_unstarted(container: Container, exit: Exit, announce: Vec<TaskEvent>) -> Step {
    Step { next: Phase::Ending { container, exit, never_started: true }, announce }
}

/// The only function that changes a phase.
///
/// Repeated events change nothing (signals of systemd can arrive twice, and queries of all units repeat them). The first
/// exit counts.
///
/// # Errors
/// The phase does not allow the event.
pub fn transition(phase: &Phase, event: Event) -> Result<Step, Refusal> {
    use Event::{
        Created, ExecStarted, ExecsGone, Exited, Frozen, InitStarted, Prepared, StartBegun, StartFailed,
        Thawed,
    };
    let refused = Refusal { verb: event.verb(), phase: phase.word() };
    if let (Exited(seen), Some(pid)) = (&event, phase.pid())
        && !seen.is_of(pid)
    {
        return Ok(stay(phase.clone()));
    }
    match (phase.clone(), event) {
        (Phase::Creating { exit }, Created { container, program }) => {
            let announce = vec![TaskEvent::Created { pid: Some(container.pid) }];
            Ok(match exit.filter(|seen| seen.is_of(container.pid)) {
                None => Step { next: Phase::Created { container, program }, announce },
                Some(seen) => end_unstarted(container, seen.exit, announce),
            })
        }
        (Phase::Creating { .. }, Exited(seen)) => Ok(stay(Phase::Creating { exit: Some(seen) })),
        (Phase::Creating { .. }, Prepared) => {
            Ok(Step { next: Phase::Prepared, announce: vec![TaskEvent::Created { pid: None }] })
        }
        (Phase::Creating { .. }, StartBegun | InitStarted | ExecStarted { .. } | StartFailed) => Err(refused),

        (Phase::Prepared, StartBegun) => Ok(stay(Phase::Restoring { exit: None })),
        // The exit belongs to an earlier attempt.
        (Phase::Prepared, Exited(_)) => Ok(stay(Phase::Prepared)),
        (Phase::Prepared, Prepared | Created { .. } | InitStarted | ExecStarted { .. } | StartFailed) => {
            Err(refused)
        }

        (Phase::Restoring { exit }, Created { container, .. }) => {
            let announce = vec![TaskEvent::Started { pid: container.pid }];
            Ok(match exit.filter(|seen| seen.is_of(container.pid)) {
                None => Step { next: Phase::Running { container }, announce },
                Some(seen) => end(container, seen.exit, announce),
            })
        }
        (Phase::Restoring { .. }, StartFailed) => Ok(stay(Phase::Prepared)),
        (Phase::Restoring { .. }, Exited(seen)) => Ok(stay(Phase::Restoring { exit: Some(seen) })),
        (Phase::Restoring { .. }, Prepared | StartBegun | InitStarted | ExecStarted { .. }) => Err(refused),

        (Phase::Created { container, program }, StartBegun) => {
            Ok(stay(Phase::Starting { container, program, exit: None }))
        }
        (Phase::Created { container, .. }, Exited(seen)) => {
            Ok(end_unstarted(container, seen.exit, Vec::new()))
        }
        (Phase::Running { container } | Phase::Paused { container }, Exited(seen)) => {
            Ok(end(container, seen.exit, Vec::new()))
        }
        (
            Phase::Created { .. },
            Prepared | Created { .. } | InitStarted | ExecStarted { .. } | StartFailed,
        ) => Err(refused),

        (Phase::Starting { container, exit, .. }, InitStarted) => {
            let announce = vec![TaskEvent::Started { pid: container.pid }];
            Ok(match exit {
                None => Step { next: Phase::Running { container }, announce },
                Some(exit) => end(container, exit, announce),
            })
        }
        (Phase::Starting { container, program, exit }, StartFailed) => Ok(match exit {
            None => stay(Phase::Created { container, program }),
            Some(exit) => end_unstarted(container, exit, Vec::new()),
        }),
        (Phase::Starting { container, program, exit }, Exited(seen)) => {
            Ok(stay(Phase::Starting { container, program, exit: exit.or(Some(seen.exit)) }))
        }
        (Phase::Starting { .. }, Prepared | Created { .. } | StartBegun | ExecStarted { .. }) => Err(refused),

        (
            Phase::Running { .. } | Phase::Paused { .. },
            Prepared | Created { .. } | StartBegun | InitStarted | ExecStarted { .. } | StartFailed,
        ) => Err(refused),
        (Phase::Running { container }, Frozen) => {
            Ok(Step { next: Phase::Paused { container }, announce: vec![TaskEvent::Paused] })
        }
        (Phase::Paused { container }, Thawed) => {
            Ok(Step { next: Phase::Running { container }, announce: vec![TaskEvent::Resumed] })
        }

        (Phase::Ending { container, exit, never_started }, ExecsGone) => {
            let announce = vec![TaskEvent::Exited { pid: container.pid, exit }];
            Ok(Step { next: Phase::Stopped { container, exit, never_started }, announce })
        }

        (ended @ (Phase::Ending { .. } | Phase::Stopped { .. }), Exited(_)) => Ok(stay(ended)),
        (
            Phase::Ending { .. } | Phase::Stopped { .. },
            Prepared | Created { .. } | StartBegun | InitStarted | ExecStarted { .. } | StartFailed,
        ) => Err(refused),

        // This event only matters to an init process that has ended.
        (
            other @ (Phase::Creating { .. }
            | Phase::Prepared
            | Phase::Restoring { .. }
            | Phase::Created { .. }
            | Phase::Starting { .. }
            | Phase::Running { .. }
            | Phase::Paused { .. }
            | Phase::Stopped { .. }),
            ExecsGone,
        ) => Ok(stay(other)),
        (running @ Phase::Running { .. }, Thawed) => Ok(stay(running)),
        (paused @ Phase::Paused { .. }, Frozen) => Ok(stay(paused)),
        // For containerd, only a running task can be paused, whatever the state of its cgroup is.
        (
            other @ (Phase::Creating { .. }
            | Phase::Prepared
            | Phase::Restoring { .. }
            | Phase::Created { .. }
            | Phase::Starting { .. }
            | Phase::Ending { .. }
            | Phase::Stopped { .. }),
            Frozen | Thawed,
        ) => Ok(stay(other)),
    }
}

#[cfg(test)]
pub(super) mod tests;
