//! Events that containerd has to hear, in order, until it has accepted them.

use std::collections::VecDeque;

use serde::{Deserialize, Serialize};

use crate::id::ExecId;

use super::phase::Exit;

/// What happened to a task, in containerd's vocabulary.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum TaskEvent {
    /// `/tasks/create`
    Created {
        /// The init process.
        pid: u32,
    },
    /// `/tasks/start`
    Started {
        /// The init process.
        pid: u32,
    },
    /// `/tasks/paused`
    Paused,
    /// `/tasks/resumed`
    Resumed,
    /// `/tasks/oom`: the kernel has killed a process of it for want of memory
    OutOfMemory,
    /// `/tasks/exit` of the init process
    Exited {
        /// The process that it was.
        pid: u32,
        /// How it ended.
        exit: Exit,
    },
    /// `/tasks/exec-added`
    ExecAdded {
        /// The exec.
        exec: ExecId,
    },
    /// `/tasks/exec-started`
    ExecStarted {
        /// The exec.
        exec: ExecId,
        /// Its process.
        pid: u32,
    },
    /// `/tasks/exit` of an exec
    ExecExited {
        /// The exec.
        exec: ExecId,
        /// The process that it was.
        pid: u32,
        /// How it ended.
        exit: Exit,
    },
    /// `/tasks/delete`
    Deleted {
        /// The process that it was, 0 if there was none.
        pid: u32,
        /// How it ended.
        exit: Exit,
    },
}

/// An event in the outbox.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Owed {
    /// Its place in the task's order.
    pub seq: u64,
    /// When it happened, in microseconds since 1970.
    pub at_usec: u64,
    /// What happened.
    #[serde(flatten)]
    pub event: TaskEvent,
}

/// The events of one task that containerd has not accepted yet, oldest first.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Outbox {
    next: u64,
    owed: VecDeque<Owed>,
}

impl Outbox {
    /// Adds an event behind all others.
    pub fn push(&mut self, event: TaskEvent, at_usec: u64) {
        self.owed.push_back(Owed { seq: self.next, at_usec, event });
        self.next += 1;
    }

    /// The event that has to be accepted before any other.
    pub fn first(&self) -> Option<&Owed> {
        self.owed.front()
    }

    /// Takes out what containerd has accepted; a repeat changes nothing.
    pub fn accepted(&mut self, seq: u64) {
        while self.owed.front().is_some_and(|owed| owed.seq <= seq) {
            self.owed.pop_front();
        }
    }

    /// Forgets all that is owed.
    pub fn clear(&mut self) {
        self.owed.clear();
    }

    /// Nothing is owed.
    pub fn is_empty(&self) -> bool {
        self.owed.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_leave_in_the_order_they_came() {
        let mut outbox = Outbox::default();
        outbox.push(TaskEvent::Created { pid: 1 }, 10);
        outbox.push(TaskEvent::Started { pid: 1 }, 20);
        let first = outbox.first().unwrap().clone();
        assert_eq!(first.event, TaskEvent::Created { pid: 1 });
        outbox.accepted(first.seq);
        outbox.accepted(first.seq);
        assert_eq!(outbox.first().unwrap().event, TaskEvent::Started { pid: 1 });
    }

    #[test]
    fn an_outbox_survives_the_disk() {
        let mut outbox = Outbox::default();
        outbox.push(TaskEvent::Exited { pid: 1, exit: Exit { status: 137, at_usec: 3 } }, 10);
        let text = serde_json::to_string(&outbox).unwrap();
        assert_eq!(serde_json::from_str::<Outbox>(&text).unwrap(), outbox);
    }
}
