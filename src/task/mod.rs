//! The domain, pure: what a task is, which phase it is in, what it owes to containerd.
//!
//! No I/O, no clock (times are passed in). The types here serialise: a [`Task`] is what the record
//! on disk holds, and memory is only a cache of it.

pub mod exec;
pub mod limits;
pub mod outbox;
pub mod phase;
pub mod request;
pub mod wiring;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::id::{ExecId, TaskKey, UnitName};

use exec::{Exec, ExecEvent};
use limits::Limits;
use outbox::{Outbox, TaskEvent};
use phase::{Announce, Event, Exit, Phase, Refusal, transition};
use request::{Containerd, Create, DeviceAllow, Property, Runtime};
use wiring::Wiring;

/// A task: everything about it that must outlive the daemon.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Task {
    /// What it is called.
    pub key: TaskKey,
    /// Its unit. Chosen once, at Create; never derived again.
    pub unit: UnitName,
    /// The unit of its `binary://` logger, if it has one.
    pub logger: Option<UnitName>,
    /// What containerd asked for.
    pub request: Create,
    /// Where its streams lead.
    pub wiring: Wiring,
    /// The OCI runtime that made it.
    pub runtime: Runtime,
    /// Which containerd it belongs to.
    pub containerd: Containerd,
    /// Where its processes live.
    pub placement: Placement,
    /// The container's cgroup as the kernel says, below the cgroup root; known once it is created.
    pub cgroup: Option<PathBuf>,
    /// The rootfs is mounted in the host's mount namespace, and is ours to unmount.
    pub rootfs_on_host: bool,
    /// The program file of init while it waits to be started: device and inode. Init has another one
    /// from then on.
    #[serde(default)]
    pub waiting_program: Option<(u64, u64)>,
    /// Its unit, as systemd is told to show it.
    pub face: Face,
    /// Properties of its unit that somebody asks for.
    #[serde(default)]
    pub properties: Vec<Property>,
    /// The devices that it may use beside those of every container, where systemd can say it.
    #[serde(default)]
    pub devices: Option<Vec<DeviceAllow>>,
    /// It may tell systemd of itself: sd_notify(3).
    #[serde(default)]
    pub notify: bool,
    /// Where its init process is in its life.
    pub init: Phase,
    /// The processes that were added to it.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub execs: BTreeMap<ExecId, Arc<Exec>>,
    /// Events that containerd has not accepted yet.
    pub outbox: Outbox,
    /// How many of its processes the kernel has killed for want of memory, as far as containerd is told.
    #[serde(default)]
    pub oom_kills: u64,
    /// The limits of its unit's cgroup as they were last compared with the container's.
    #[serde(default)]
    pub limits: Option<Limits>,
    /// containerd has given the task up (`delete`) and publishes the end itself.
    #[serde(default)]
    pub muted: bool,
    /// Its Create has failed, and something of it is still to be removed.
    #[serde(default)]
    pub is_leftover: bool,
}

/// How a person sees the task in systemd's tools and in the journal.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Face {
    /// The unit's Description.
    pub description: String,
    /// Journal fields of every line, name and value.
    pub fields: Vec<(String, String)>,
}

/// Where the container's cgroup is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Placement {
    /// A child of the unit's own cgroup; the unit is in `slice`.
    Unit {
        /// The unit's slice.
        slice: UnitName,
        /// The last element of the container's cgroup path.
        child: String,
    },
    /// A path that the client insists on, outside of the unit.
    Foreign {
        /// The slice of the (then empty) unit.
        slice: UnitName,
        /// The path below the cgroup root, beginning with `/`.
        path: PathBuf,
    },
}

impl Placement {
    /// The slice of the unit.
    pub fn slice(&self) -> &UnitName {
        match self {
            Self::Unit { slice, .. } | Self::Foreign { slice, .. } => slice,
        }
    }
}

/// A process that has ended, for those who wait for it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ended {
    /// The exec; nothing for init.
    pub exec: Option<ExecId>,
    /// How it ended.
    pub exit: Exit,
}

impl Task {
    /// Applies an event to the init process; the events owed to containerd go to the outbox.
    ///
    /// Returns the processes whose end may be told now.
    ///
    /// # Errors
    /// The phase refuses the event; then nothing has changed.
    pub fn apply(&mut self, event: Event, now_usec: u64) -> Result<Vec<Ended>, Refusal> {
        let mut ended = Vec::new();
        self.step(event, now_usec, &mut ended)?;
        self.settle(now_usec, &mut ended)?;
        Ok(ended)
    }

    /// Applies an event to an exec, as [`Self::apply`] does to init. Nothing happens to one that is
    /// not there.
    ///
    /// # Errors
    /// The phase refuses the event; then nothing has changed.
    pub fn apply_exec(
        &mut self,
        id: &ExecId,
        event: ExecEvent,
        now_usec: u64,
    ) -> Result<Vec<Ended>, Refusal> {
        let mut ended = Vec::new();
        let Some(exec) = self.execs.get_mut(id) else {
            return Ok(ended);
        };
        let step = exec::transition(&exec.phase, event)?;
        if step.next != exec.phase {
            Arc::make_mut(exec).phase = step.next;
        }
        for effect in step.announce {
            let exec = id.clone();
            match effect {
                // An exec is announced when it is added, and paused with its task.
                Announce::Created { .. } | Announce::Paused | Announce::Resumed => {}
                Announce::Started { pid } => self.owe(TaskEvent::ExecStarted { exec, pid }, now_usec),
                Announce::Exited { pid, exit } => {
                    ended.push(Ended { exec: Some(id.clone()), exit });
                    self.owe(TaskEvent::ExecExited { exec, pid, exit }, now_usec);
                }
            }
        }
        self.settle(now_usec, &mut ended)?;
        Ok(ended)
    }

    fn step(&mut self, event: Event, now_usec: u64, ended: &mut Vec<Ended>) -> Result<(), Refusal> {
        let step = transition(&self.init, event)?;
        self.init = step.next;
        for effect in step.announce {
            let event = match effect {
                Announce::Created { pid } => TaskEvent::Created { pid },
                Announce::Started { pid } => TaskEvent::Started { pid },
                Announce::Paused => TaskEvent::Paused,
                Announce::Resumed => TaskEvent::Resumed,
                Announce::Exited { pid, exit } => {
                    ended.push(Ended { exec: None, exit });
                    TaskEvent::Exited { pid, exit }
                }
            };
            self.owe(event, now_usec);
        }
        Ok(())
    }

    /// The end of init is told once no exec is live.
    fn settle(&mut self, now_usec: u64, ended: &mut Vec<Ended>) -> Result<(), Refusal> {
        if self.execs.values().any(|exec| exec.phase.is_live()) {
            return Ok(());
        }
        self.step(Event::ExecsGone, now_usec, ended)
    }

    /// The streams of init, or of an exec.
    pub fn wiring_mut(&mut self, exec: Option<&ExecId>) -> Option<&mut Wiring> {
        match exec {
            None => Some(&mut self.wiring),
            Some(id) => self.execs.get_mut(id).map(|exec| &mut Arc::make_mut(exec).wiring),
        }
    }

    /// Tells of processes that the kernel has killed for want of memory, `kills` in all by now: once for
    /// each, but for very many.
    pub fn note_oom_kills(&mut self, kills: u64, now_usec: u64) {
        const MOST: u64 = 100;
        let new = kills.saturating_sub(self.oom_kills).min(MOST);
        (0..new).for_each(|_| self.owe(TaskEvent::OutOfMemory, now_usec));
        self.oom_kills = self.oom_kills.max(kills);
    }

    /// Puts an event into the outbox, unless containerd publishes for this task itself.
    pub fn owe(&mut self, event: TaskEvent, now_usec: u64) {
        if !self.muted {
            self.outbox.push(event, now_usec);
        }
    }
}
