//! What the phases of an init process and of an exec have in common: events, exits and refusals.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::limits::UnitLimits;

/// What the phases of an init process and of an exec have in common.
pub trait Lifecycle {
    /// The pid, once it is known. It stays known after the exit.
    fn pid(&self) -> Option<u32>;
    /// The exit, once it may be published.
    fn exit(&self) -> Option<Exit>;
    /// True if the process exists and no exit was observed.
    fn is_alive(&self) -> bool;
    /// True if the process runs or has run.
    fn has_run(&self) -> bool;
    /// True while the process is being started.
    fn is_starting(&self) -> bool;
    /// The phase in containerd's terms, for messages.
    fn word(&self) -> &'static str;
}

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
    /// The limits of its unit's cgroup. `None` if the container's cgroup is outside of the unit.
    pub limits: Option<UnitLimits>,
    /// How many OOM kills have been announced to containerd.
    pub oom_kills: u64,
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
    /// The OCI runtime has started the init process.
    InitStarted,
    /// The OCI runtime has started the exec.
    ExecStarted {
        /// Its process, which is not known before.
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
            Self::InitStarted | Self::ExecStarted { .. } | Self::StartFailed => "finish starting",
            Self::Frozen => "pause",
            Self::Thawed => "resume",
            Self::Exited(_) | Self::ExecsGone => "end",
        }
    }
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
pub struct Step<P, A> {
    /// The new phase.
    pub next: P,
    /// The events to publish because of it, in order.
    pub announce: Vec<A>,
}

/// A transition without events.
pub(super) fn stay<P, A>(phase: P) -> Step<P, A> {
    Step { next: phase, announce: Vec::new() }
}
