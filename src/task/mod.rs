//! Tasks: their data, their phases, and the events that containerd has not accepted (pure).
//!
//! No I/O and no clock: times are passed in. A [`Task`] in memory is a cache of its record on disk, which has the form of
//! `record`.

pub mod exec;
pub mod lifecycle;
pub mod limits;
pub mod optional_pid;
pub mod outbox;
pub mod phase;
pub mod process;
mod record;
pub mod request;
#[cfg(test)]
mod tests;
pub mod wiring;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::id::{ExecId, TaskKey, UnitName};

use exec::Exec;
use lifecycle::{Event, Exit, Lifecycle, Refusal};
use outbox::{Outbox, Owed, TaskEvent};
use phase::Phase;
use process::Process;
use record::Record;
use request::{Containerd, Create, DeviceAllow, Property, Runtime};

/// A task: everything about it that must outlive the daemon.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(from = "Record", into = "Record")]
pub struct Task {
    /// Its namespace and id, and the containerd that owns it.
    pub key: TaskKey,
    pub init: Process<Phase>,
    pub request: Create,
    /// The OCI runtime that created it.
    pub runtime: Runtime,
    /// Which containerd it belongs to.
    pub containerd: Containerd,
    /// The cgroup of its processes.
    pub placement: Placement,
    /// True if the rootfs is mounted in the host's mount namespace, and cleanup must unmount it.
    pub rootfs_on_host: bool,
    /// Journal fields of every line of the container's output, name and value.
    pub fields: Vec<(String, String)>,
    /// Properties of its unit that an annotation or an option requests.
    pub properties: Vec<Property>,
    /// The devices that it may use in addition to those of every container. `None` if systemd can't express them.
    pub devices: Option<Vec<DeviceAllow>>,
    /// True if it may notify systemd (sd_notify(3)).
    pub notify: bool,
    pub execs: BTreeMap<ExecId, Arc<Exec>>,
    /// Events that containerd has not accepted yet.
    pub outbox: Outbox,
    /// True once containerd has given up the task (`delete`) and publishes its exit itself.
    pub given_up: bool,
    /// True if its Create failed and cleanup is not complete.
    pub is_leftover: bool,
}

/// What systemd's tools and the journal show about a task.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct TaskMetadata {
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
    /// A literal path of the client, outside of the unit.
    Foreign {
        /// The slice of the (then empty) unit.
        slice: UnitName,
        /// The path below the cgroup root, beginning with `/`.
        path: PathBuf,
    },
}

impl Placement {
    pub fn slice(&self) -> &UnitName {
        match self {
            Self::Unit { slice, .. } | Self::Foreign { slice, .. } => slice,
        }
    }

    /// The parent cgroup that the client has named, below the cgroup root: that of a pod, if the task is in one.
    pub fn parent(&self) -> PathBuf {
        match self {
            Self::Unit { slice, .. } => slice.slice_cgroup(),
            Self::Foreign { path, .. } => path.parent().unwrap_or(path).to_owned(),
        }
    }

    /// The container's cgroup in the unit, below the cgroup root, by the rules that systemd and the OCI runtime follow.
    pub fn cgroup(&self, unit: &UnitName) -> PathBuf {
        match self {
            Self::Unit { slice, child } => slice.slice_cgroup().join(unit.as_str()).join(child),
            Self::Foreign { path, .. } => path.clone(),
        }
    }
}

/// A process that has ended, for calls of Wait.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExitNotice {
    /// The exec, or `None` for the init process.
    pub exec: Option<ExecId>,
    pub exit: Exit,
}

impl Task {
    /// The init process, or the exec with this id.
    pub fn process(&self, exec: Option<&ExecId>) -> Option<&Process<dyn Lifecycle>> {
        match exec {
            None => Some(&self.init),
            Some(id) => {
                let exec: &Exec = self.execs.get(id)?;
                Some(exec)
            }
        }
    }

    /// As [`Self::process`].
    pub fn process_mut(&mut self, exec: Option<&ExecId>) -> Option<&mut Process<dyn Lifecycle>> {
        match exec {
            None => Some(&mut self.init),
            Some(id) => {
                let exec: &mut Exec = Arc::make_mut(self.execs.get_mut(id)?);
                Some(exec)
            }
        }
    }

    /// The container's cgroup below the cgroup root, once the container is created.
    pub fn cgroup(&self) -> Option<&Path> {
        self.init.phase.container().map(|container| container.cgroup.as_path())
    }

    /// The texts about the task for people.
    pub fn metadata(&self) -> TaskMetadata {
        TaskMetadata { description: self.init.description.clone(), fields: self.fields.clone() }
    }

    /// The unit of the container.
    pub fn unit(&self) -> &UnitName {
        &self.init.unit
    }

    /// Applies an event to a process, and adds the resulting events for containerd to the outbox. Does nothing if the exec
    /// does not exist.
    ///
    /// Returns the processes whose exits may be published now.
    ///
    /// # Errors
    /// The phase does not allow the event. The phase stays as it is then.
    pub fn apply(
        &mut self,
        exec: Option<&ExecId>,
        event: Event,
        now_usec: u64,
    ) -> Result<Vec<ExitNotice>, Refusal> {
        let mut ended = Vec::new();
        self.step(exec, event, now_usec, &mut ended)?;
        self.settle(now_usec, &mut ended)?;
        Ok(ended)
    }

    /// Publishes the exit of the init process once no exec is live.
    fn settle(&mut self, now_usec: u64, ended: &mut Vec<ExitNotice>) -> Result<(), Refusal> {
        if self.execs.values().any(|exec| exec.phase.is_live()) {
            return Ok(());
        }
        self.step(None, Event::ExecsGone, now_usec, ended)
    }

    /// Completes a change that a daemon has recorded for an exec, but not for the task: adds its `events`, and what follows
    /// from it for the init process. Returns whether there was anything to add.
    pub fn catch_up(&mut self, events: Vec<Owed>) -> bool {
        let is_behind = self.outbox.catch_up(events);
        let Phase::Ending { exit, .. } = self.init.phase else {
            return is_behind;
        };
        let mut ended = Vec::new();
        // The end of the execs is never refused.
        let _ = self.settle(exit.at_usec, &mut ended);
        is_behind || !ended.is_empty()
    }

    fn step(
        &mut self,
        exec: Option<&ExecId>,
        event: Event,
        now_usec: u64,
        ended: &mut Vec<ExitNotice>,
    ) -> Result<(), Refusal> {
        let announced = match exec {
            None => self.init.phase.apply(event)?,
            Some(id) => {
                let Some(exec) = self.execs.get_mut(id) else {
                    return Ok(());
                };
                let announced = Arc::make_mut(exec).phase.apply(event)?;
                announced.into_iter().map(|announce| announce.of(id.clone())).collect()
            }
        };
        for event in announced {
            if let TaskEvent::Exited { exit, .. } | TaskEvent::ExecExited { exit, .. } = event {
                ended.push(ExitNotice { exec: exec.cloned(), exit });
            }
            self.owe(event, now_usec);
        }
        Ok(())
    }

    /// Adds an OOM event for each process that the kernel killed because memory ran out, up to a limit. `kills` is their total
    /// number so far.
    pub fn note_oom_kills(&mut self, kills: u64, now_usec: u64) {
        const MOST: u64 = 100;
        let Some(container) = self.init.phase.container_mut() else {
            return;
        };
        let new = kills.saturating_sub(container.oom_kills).min(MOST);
        container.oom_kills = container.oom_kills.max(kills);
        (0..new).for_each(|_| self.owe(TaskEvent::OutOfMemory, now_usec));
    }

    /// Notes that containerd has given the task up. Drops its events: containerd publishes the end of the task itself.
    pub fn give_up(&mut self) {
        self.given_up = true;
        self.outbox.clear();
    }

    /// True if the Create of the task is under way, or was given up.
    pub fn is_being_created(&self) -> bool {
        self.init.phase.is_creating() && !self.is_leftover
    }

    /// True if the task never got past its Create and is only to be removed: the Create has failed, or containerd has given the
    /// task up meanwhile.
    pub fn is_to_be_rolled_back(&self) -> bool {
        self.is_leftover || (self.given_up && self.init.phase.is_creating())
    }

    /// Puts an event into the outbox, unless containerd publishes for this task itself.
    pub fn owe(&mut self, event: TaskEvent, now_usec: u64) {
        if !self.given_up {
            self.outbox.push(event, now_usec);
        }
    }
}
