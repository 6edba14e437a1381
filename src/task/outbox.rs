//! The events of a task that containerd has not accepted yet, in order.

use std::collections::VecDeque;

use serde::{Deserialize, Serialize};

use crate::id::ExecId;

use super::lifecycle::Exit;
use super::optional_pid;

/// An event of a task, in containerd's terms.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum TaskEvent {
    /// `/tasks/create`
    Created {
        /// The init process. `None` if Start restores it.
        #[serde(with = "optional_pid")]
        pid: Option<u32>,
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
    /// `/tasks/oom`: the kernel killed one of its processes because memory ran out
    OutOfMemory,
    /// `/tasks/exit` of the init process
    Exited {
        /// The process that it was.
        pid: u32,
        /// How it ended.
        exit: Exit,
    },
    /// `/tasks/exec-added`
    ExecAdded { exec: ExecId },
    /// `/tasks/exec-started`
    ExecStarted {
        exec: ExecId,
        /// Its process.
        pid: u32,
    },
    /// `/tasks/exit` of an exec
    ExecExited {
        exec: ExecId,
        /// The process that it was.
        pid: u32,
        /// How it ended.
        exit: Exit,
    },
    /// `/tasks/delete`
    Deleted {
        /// The process that it was. `None` if there was none.
        #[serde(with = "optional_pid")]
        pid: Option<u32>,
        /// How it ended.
        exit: Exit,
    },
}

impl TaskEvent {
    /// The exec that it is about.
    pub fn exec(&self) -> Option<&ExecId> {
        match self {
            Self::ExecAdded { exec } | Self::ExecStarted { exec, .. } | Self::ExecExited { exec, .. } => {
                Some(exec)
            }
            Self::Created { .. }
            | Self::Started { .. }
            | Self::Paused
            | Self::Resumed
            | Self::OutOfMemory
            | Self::Exited { .. }
            | Self::Deleted { .. } => None,
        }
    }

    fn is_of_freezer(&self) -> bool {
        matches!(self, Self::Paused | Self::Resumed)
    }
}

/// The largest number of events in the outbox of each kind that can be repeated without limit.
const MAX_REPEATED: usize = 100;

/// An event in the outbox.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Owed {
    /// Its position in the order of the task's events.
    pub seq: u64,
    /// The time of the event, in microseconds since 1970.
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
    /// Adds an event at the end.
    ///
    /// The number of events that can be repeated is limited, however long containerd accepts none: the first OOM events and
    /// the last pauses are kept. Creates, starts, exits and deletes are always kept.
    pub fn push(&mut self, event: TaskEvent, at_usec: u64) {
        match event {
            TaskEvent::OutOfMemory if self.count(|owed| *owed == TaskEvent::OutOfMemory) >= MAX_REPEATED => {
                return;
            }
            TaskEvent::Paused | TaskEvent::Resumed
                if self.count(TaskEvent::is_of_freezer) >= MAX_REPEATED =>
            {
                // A pause and its resume cancel each other.
                let last = self.owed.iter().rposition(|owed| owed.event.is_of_freezer());
                if let Some(last) = last.filter(|last| self.owed[*last].event != event) {
                    self.owed.remove(last);
                }
                return;
            }
            _ => {}
        }
        self.owed.push_back(Owed { seq: self.next, at_usec, event });
        self.next += 1;
    }

    /// The events that this outbox has and `before`, its earlier state, does not have.
    pub fn since(&self, before: &Self) -> impl Iterator<Item = &Owed> {
        let next = before.next;
        self.owed.iter().filter(move |owed| owed.seq >= next)
    }

    /// Adds the events whose numbers this outbox never had. Returns whether there are any.
    pub fn catch_up(&mut self, mut events: Vec<Owed>) -> bool {
        events.retain(|owed| owed.seq >= self.next && owed.seq < u64::MAX / 2);
        events.sort_by_key(|owed| owed.seq);
        events.dedup_by_key(|owed| owed.seq);
        if let Some(last) = events.last() {
            self.next = last.seq + 1;
        }
        let has_new = !events.is_empty();
        self.owed.extend(events);
        has_new
    }

    /// Repairs an outbox that was read from a record: drops events above the limits of [`Self::push`], which earlier versions
    /// did not have, and numbers the events again if their numbers are not in order.
    pub fn mend(&mut self) {
        self.shorten();
        let numbers = || self.owed.iter().map(|owed| owed.seq);
        let in_order = numbers().zip(numbers().skip(1).chain([self.next])).all(|(one, next)| one < next);
        if !in_order || self.next > u64::MAX / 2 {
            self.next = 0;
            for owed in &mut self.owed {
                owed.seq = self.next;
                self.next += 1;
            }
        }
    }

    fn shorten(&mut self) {
        let (mut kills, of_freezer) = (0, self.count(TaskEvent::is_of_freezer));
        // Pauses and resumes alternate, so an even number of the oldest is dropped.
        let mut too_many = of_freezer.saturating_sub(MAX_REPEATED).next_multiple_of(2).min(of_freezer);
        self.owed.retain(|owed| match owed.event {
            TaskEvent::OutOfMemory => {
                kills += 1;
                kills <= MAX_REPEATED
            }
            TaskEvent::Paused | TaskEvent::Resumed if too_many > 0 => {
                too_many -= 1;
                false
            }
            _ => true,
        });
    }

    fn count(&self, is_one: impl Fn(&TaskEvent) -> bool) -> usize {
        self.owed.iter().filter(|owed| is_one(&owed.event)).count()
    }

    /// The event that has to be accepted before any other.
    pub fn first(&self) -> Option<&Owed> {
        self.owed.front()
    }

    /// The number of the last event of an exec, or of the last event if `exec` is `None`.
    pub fn last_of(&self, exec: Option<&ExecId>) -> Option<u64> {
        let is_of = |owed: &&Owed| exec.is_none() || owed.event.exec() == exec;
        self.owed.iter().rev().find(is_of).map(|owed| owed.seq)
    }

    /// Removes an event that containerd has accepted. Repeated calls change nothing.
    pub fn accepted(&mut self, seq: u64) {
        while self.owed.front().is_some_and(|owed| owed.seq <= seq) {
            self.owed.pop_front();
        }
    }

    /// Removes all events.
    pub fn clear(&mut self) {
        self.owed.clear();
    }

    /// True if there are no events.
    pub fn is_empty(&self) -> bool {
        self.owed.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Records of earlier versions have 0 for a process that does not exist, and those versions need the number.
    #[test]
    fn an_event_without_a_process_has_pid_0_in_the_record() {
        for (text, pid) in
            [(r#"{"event":"created","pid":0}"#, None), (r#"{"event":"created","pid":7}"#, Some(7))]
        {
            let event: TaskEvent = serde_json::from_str(text).unwrap();
            assert_eq!(event, TaskEvent::Created { pid });
            assert_eq!(serde_json::to_string(&event).unwrap(), text);
        }
        serde_json::from_str::<TaskEvent>(r#"{"event":"created","pid":null}"#).unwrap_err();
    }

    #[test]
    fn events_leave_in_the_order_they_came() {
        let mut outbox = Outbox::default();
        outbox.push(TaskEvent::Created { pid: Some(1) }, 10);
        outbox.push(TaskEvent::Started { pid: 1 }, 20);
        let first = outbox.first().unwrap().clone();
        assert_eq!(first.event, TaskEvent::Created { pid: Some(1) });
        outbox.accepted(first.seq);
        outbox.accepted(first.seq);
        assert_eq!(outbox.first().unwrap().event, TaskEvent::Started { pid: 1 });
    }

    #[test]
    fn an_outbox_has_a_bound_and_loses_neither_an_exit_nor_the_last_state() {
        let mut outbox = Outbox::default();
        for turn in 0..10_000 {
            outbox.push(TaskEvent::OutOfMemory, turn);
            outbox.push(TaskEvent::Paused, turn);
            outbox.push(TaskEvent::Resumed, turn);
        }
        outbox.push(TaskEvent::Paused, 10_000);
        let exit = Exit { status: 137, at_usec: 3 };
        outbox.push(TaskEvent::Exited { pid: 1, exit }, 10_001);
        assert!(outbox.owed.len() <= 2 * MAX_REPEATED + 1, "{}", outbox.owed.len());
        let before = outbox.clone();
        outbox.shorten();
        assert_eq!(outbox, before);
        let frozen = outbox.owed.iter().filter(|owed| owed.event.is_of_freezer());
        let mut is_frozen = false;
        for owed in frozen {
            assert_ne!(is_frozen, owed.event == TaskEvent::Paused, "they take turns");
            is_frozen = owed.event == TaskEvent::Paused;
        }
        assert!(is_frozen);
        assert_eq!(outbox.owed.back().unwrap().event, TaskEvent::Exited { pid: 1, exit });
    }

    #[test]
    fn an_outbox_of_an_earlier_version_gets_the_bound() {
        let event = |turn: u64| match turn % 3 {
            0 => TaskEvent::OutOfMemory,
            1 => TaskEvent::Paused,
            _ => TaskEvent::Resumed,
        };
        let owed = (0..10_000).map(|seq| Owed { seq, at_usec: seq, event: event(seq) });
        let mut outbox = Outbox { next: 10_000, owed: owed.collect() };
        let last = outbox.owed.iter().rfind(|owed| owed.event.is_of_freezer()).cloned();
        outbox.shorten();
        assert!(outbox.owed.len() <= 2 * MAX_REPEATED, "{}", outbox.owed.len());
        assert_eq!(outbox.owed.iter().rfind(|owed| owed.event.is_of_freezer()).cloned(), last);
        let first = outbox.owed.iter().find(|owed| owed.event.is_of_freezer());
        assert_eq!(first.map(|owed| &owed.event), Some(&TaskEvent::Paused));
    }

    #[test]
    fn an_outbox_whose_numbers_are_out_of_order_is_counted_again() {
        for (next, numbers) in [(9, [7, 3]), (0, [0, 1]), (2, [1, 1]), (u64::MAX, [5, u64::MAX - 1])] {
            let owed = numbers.map(|seq| Owed { seq, at_usec: seq, event: TaskEvent::Paused });
            let mut outbox = Outbox { next, owed: owed.into() };
            outbox.mend();
            outbox.push(TaskEvent::Resumed, 1);
            for expected in 0..3 {
                let seq = outbox.first().unwrap().seq;
                assert_eq!(seq, expected);
                outbox.accepted(seq);
            }
            assert!(outbox.is_empty());
        }
        let mut sound = Outbox::default();
        (0..3).for_each(|at| sound.push(TaskEvent::Paused, at));
        sound.accepted(0);
        let before = sound.clone();
        sound.mend();
        assert_eq!(sound, before);
    }

    #[test]
    fn the_last_event_of_an_exec_is_found_among_those_of_the_task() {
        let mut outbox = Outbox::default();
        assert_eq!(outbox.last_of(None), None);
        let exec = ExecId::new("probe").unwrap();
        outbox.push(TaskEvent::Started { pid: 1 }, 10);
        assert_eq!((outbox.last_of(None), outbox.last_of(Some(&exec))), (Some(0), None));
        outbox.push(TaskEvent::ExecStarted { exec: exec.clone(), pid: 2 }, 20);
        outbox.push(TaskEvent::ExecStarted { exec: ExecId::new("other").unwrap(), pid: 3 }, 30);
        assert_eq!((outbox.last_of(None), outbox.last_of(Some(&exec))), (Some(2), Some(1)));
    }

    #[test]
    fn an_outbox_survives_the_disk() {
        let mut outbox = Outbox::default();
        outbox.push(TaskEvent::Exited { pid: 1, exit: Exit { status: 137, at_usec: 3 } }, 10);
        let text = serde_json::to_string(&outbox).unwrap();
        assert_eq!(serde_json::from_str::<Outbox>(&text).unwrap(), outbox);
    }
}
