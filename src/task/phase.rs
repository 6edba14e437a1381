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

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::limits::Limits;
use super::process::Lifecycle;

/// The exit of a process.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Exit {
    /// containerd's exit status: 0 to 255, or 128 + the signal.
    pub status: u32,
    /// The time of the exit, in microseconds since 1970.
    pub at_usec: u64,
}

/// An exit that was observed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ObservedExit {
    /// The pid of the process, if it is known.
    pub pid: Option<u32>,
    pub exit: Exit,
}

impl ObservedExit {
    /// False if this exit belongs to another process, e.g. a late report about an earlier unit with the same name.
    pub(super) fn is_of(self, pid: u32) -> bool {
        self.pid.is_none_or(|seen| seen == pid)
    }
}

/// The file of a program: device and inode.
pub type Program = (u64, u64);

/// A container that the OCI runtime has made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Container {
    /// Its init process.
    pub pid: u32,
    /// Its cgroup, below the cgroup root.
    pub cgroup: PathBuf,
    /// The limits of its unit's cgroup when they were last compared with the container's own. `None` if the container's
    /// cgroup is outside of the unit.
    pub limits: Option<Limits>,
    /// How many OOM kills have been announced to containerd.
    pub oom_kills: u64,
}

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
    },
    /// The process has ended. Delete removes the task.
    Stopped {
        /// The container that it was.
        container: Container,
        /// How it ended.
        exit: Exit,
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
            Self::Running { .. } | Self::Paused { .. } | Self::Ending { .. } | Self::Stopped { .. } => true,
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

    fn apply(&mut self, event: Event) -> Result<Vec<Announce>, Refusal> {
        let step = transition(self, event)?;
        *self = step.next;
        Ok(step.announce)
    }
}

/// An event in the life of a process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// The rootfs of a container with a checkpoint is mounted.
    Prepared,
    /// The unit of an init process is up, and the OCI runtime has made the container, or restored it.
    Created {
        container: Container,
        /// The program that init runs while it waits.
        program: Option<Program>,
    },
    /// The OCI runtime is about to be asked to start it; for an exec, its unit is about to be started.
    StartBegun,
    /// The OCI runtime has started it.
    Started {
        /// The pid. The pid of an exec is not known before.
        pid: u32,
    },
    /// It could not be started.
    StartFailed,
    /// Its cgroup is frozen.
    Frozen,
    /// Its cgroup is thawed.
    Thawed,
    /// The main process has ended.
    Exited(ObservedExit),
    /// No exec runs any more.
    ExecsGone,
}

impl Event {
    pub(super) fn verb(&self) -> &'static str {
        match self {
            Self::Prepared | Self::Created { .. } => "create",
            Self::StartBegun => "start",
            Self::Started { .. } | Self::StartFailed => "finish starting",
            Self::Frozen => "pause",
            Self::Thawed => "resume",
            Self::Exited(_) | Self::ExecsGone => "end",
        }
    }
}

/// An event to publish because of a change of the phase.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Announce {
    /// The task exists.
    Created {
        /// Its process. `None` if Start restores it.
        pid: Option<u32>,
    },
    /// The task runs.
    Started {
        /// Its process.
        pid: u32,
    },
    /// The task is paused.
    Paused,
    /// The task runs again.
    Resumed,
    /// The process has ended. Calls of Wait return as well.
    Exited {
        /// The process that it was.
        pid: u32,
        /// How it ended.
        exit: Exit,
    },
}

/// The phase does not allow an event.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("cannot {verb} a {phase} process")]
pub struct Refusal {
    /// The requested action.
    pub verb: &'static str,
    /// The phase that refused it.
    pub phase: &'static str,
}

/// The result of a transition.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Step<P> {
    /// The new phase.
    pub next: P,
    /// The events to publish, in order.
    pub announce: Vec<Announce>,
}

/// A transition without events.
pub(super) fn stay<P>(phase: P) -> Step<P> {
    Step { next: phase, announce: Vec::new() }
}

fn end(container: Container, exit: Exit, announce: Vec<Announce>) -> Step<Phase> {
    Step { next: Phase::Ending { container, exit }, announce }
}

/// The only function that changes a phase.
///
/// Repeated events change nothing (signals of systemd can arrive twice, and queries of all units repeat them). The first
/// exit counts.
///
/// # Errors
/// The phase does not allow the event.
pub fn transition(phase: &Phase, event: Event) -> Result<Step<Phase>, Refusal> {
    use Event::{Created, ExecsGone, Exited, Frozen, Prepared, StartBegun, StartFailed, Started, Thawed};
    let refused = Refusal { verb: event.verb(), phase: phase.word() };
    if let (Exited(seen), Some(pid)) = (&event, phase.pid())
        && !seen.is_of(pid)
    {
        return Ok(stay(phase.clone()));
    }
    match (phase.clone(), event) {
        (Phase::Creating { exit }, Created { container, program }) => {
            let announce = vec![Announce::Created { pid: Some(container.pid) }];
            Ok(match exit.filter(|seen| seen.is_of(container.pid)) {
                None => Step { next: Phase::Created { container, program }, announce },
                Some(seen) => end(container, seen.exit, announce),
            })
        }
        (Phase::Creating { .. }, Exited(seen)) => Ok(stay(Phase::Creating { exit: Some(seen) })),
        (Phase::Creating { .. }, Prepared) => {
            Ok(Step { next: Phase::Prepared, announce: vec![Announce::Created { pid: None }] })
        }
        (Phase::Creating { .. }, StartBegun | Started { .. } | StartFailed) => Err(refused),

        (Phase::Prepared, StartBegun) => Ok(stay(Phase::Restoring { exit: None })),
        // The exit belongs to an earlier attempt.
        (Phase::Prepared, Exited(_)) => Ok(stay(Phase::Prepared)),
        (Phase::Prepared, Prepared | Created { .. } | Started { .. } | StartFailed) => Err(refused),

        (Phase::Restoring { exit }, Created { container, .. }) => {
            let announce = vec![Announce::Started { pid: container.pid }];
            Ok(match exit.filter(|seen| seen.is_of(container.pid)) {
                None => Step { next: Phase::Running { container }, announce },
                Some(seen) => end(container, seen.exit, announce),
            })
        }
        (Phase::Restoring { .. }, StartFailed) => Ok(stay(Phase::Prepared)),
        (Phase::Restoring { .. }, Exited(seen)) => Ok(stay(Phase::Restoring { exit: Some(seen) })),
        (Phase::Restoring { .. }, Prepared | StartBegun | Started { .. }) => Err(refused),

        (Phase::Created { container, program }, StartBegun) => {
            Ok(stay(Phase::Starting { container, program, exit: None }))
        }
        (
            Phase::Created { container, .. } | Phase::Running { container } | Phase::Paused { container },
            Exited(seen),
        ) => Ok(end(container, seen.exit, Vec::new())),
        (Phase::Created { .. }, Prepared | Created { .. } | Started { .. } | StartFailed) => Err(refused),

        (Phase::Starting { container, exit, .. }, Started { .. }) => {
            let announce = vec![Announce::Started { pid: container.pid }];
            Ok(match exit {
                None => Step { next: Phase::Running { container }, announce },
                Some(exit) => end(container, exit, announce),
            })
        }
        (Phase::Starting { container, program, exit }, StartFailed) => Ok(match exit {
            None => stay(Phase::Created { container, program }),
            Some(exit) => end(container, exit, Vec::new()),
        }),
        (Phase::Starting { container, program, exit }, Exited(seen)) => {
            Ok(stay(Phase::Starting { container, program, exit: exit.or(Some(seen.exit)) }))
        }
        (Phase::Starting { .. }, Prepared | Created { .. } | StartBegun) => Err(refused),

        (
            Phase::Running { .. } | Phase::Paused { .. },
            Prepared | Created { .. } | StartBegun | Started { .. } | StartFailed,
        ) => Err(refused),
        (Phase::Running { container }, Frozen) => {
            Ok(Step { next: Phase::Paused { container }, announce: vec![Announce::Paused] })
        }
        (Phase::Paused { container }, Thawed) => {
            Ok(Step { next: Phase::Running { container }, announce: vec![Announce::Resumed] })
        }

        (Phase::Ending { container, exit }, ExecsGone) => {
            let announce = vec![Announce::Exited { pid: container.pid, exit }];
            Ok(Step { next: Phase::Stopped { container, exit }, announce })
        }

        (ended @ (Phase::Ending { .. } | Phase::Stopped { .. }), Exited(_)) => Ok(stay(ended)),
        (
            Phase::Ending { .. } | Phase::Stopped { .. },
            Prepared | Created { .. } | StartBegun | Started { .. } | StartFailed,
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
