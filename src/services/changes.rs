//! The ways in which a task changes.
//!
//! A *change* is a decision of the daemon: the record is written first, and if that fails nothing changes.
//! A *note* records something that has already happened, such as an exit. It changes memory at once. If the record can't
//! be written now (`/run` is full, there is no descriptor left), the daemon writes it as soon as it can. If the daemon ends
//! before that, the next one reads the same from the unit; therefore a unit is removed only after the record is written.
//!
//! The record is written under the lock of the task, by the thread that serves the call. The records are on a tmpfs, so no
//! write waits for a disk, and a change writes only the files that it concerns: some 100 µs. Copying the task for a change is
//! a small part of that, because the task and its copy share the execs.

use std::sync::Arc;
use std::time::Duration;

use crate::store::{self, Cause};
use crate::sys;
use crate::task::lifecycle::{Event, Refusal};
use crate::task::outbox::TaskEvent;
use crate::task::{ExitNotice, Task};

use super::pending::{MOST_OWING, Stored};
use super::registry;
use super::tasks::Tasks;
use super::{Entry, Error, Process};

/// Pauses between attempts to write records: the first, and the longest.
const FIRST_PAUSE: Duration = Duration::from_millis(50);
const LONGEST_PAUSE: Duration = Duration::from_secs(2);
/// A round ends after this many failures: the remaining records would fail as well.
const FAILURES_PER_ROUND: usize = 8;

/// The result of a note.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Noted {
    /// It is in the record.
    Written,
    /// It is in memory, and will be in the record.
    Pending,
}

#[cfg(test)]
thread_local! {
    /// How many notes the daemons of this thread have made: each copies its task.
    pub(crate) static NOTES: std::cell::Cell<usize> = const { std::cell::Cell::new(0) };
}

impl Tasks {
    /// Applies a decision of the daemon to a process.
    ///
    /// # Errors
    /// The phase refuses it, or the record can't be written; then nothing has changed.
    pub(crate) fn apply(&self, entry: &Arc<Entry>, process: &Process, event: Event) -> Result<(), Error> {
        self.change(entry, |task| Ok(task.apply(process.exec(), event, sys::now_usec())?))
    }

    /// Applies something that has already happened to a process.
    ///
    /// # Errors
    /// The phase refuses it; then nothing has changed.
    pub(crate) fn note_event(
        &self,
        entry: &Arc<Entry>,
        process: &Process,
        event: Event,
    ) -> Result<Noted, Refusal> {
        self.note(entry, |task| task.apply(process.exec(), event, sys::now_usec()))
    }

    /// Changes a task: first the record, then memory. Then wakes the calls that wait for a process, and the publisher.
    ///
    /// # Errors
    /// The change is refused, or the record can't be written; then nothing has changed.
    pub(crate) fn change(
        &self,
        entry: &Arc<Entry>,
        change: impl FnOnce(&mut Task) -> Result<Vec<ExitNotice>, Error>,
    ) -> Result<(), Error> {
        let ended = {
            let mut task = entry.task();
            let mut next = task.clone();
            let ended = change(&mut next)?;
            if next == *task {
                return Ok(());
            }
            if let Err(error) = self.write(entry, &task, &next, Cause::Decision) {
                // A part of the change may be on disk.
                self.write_later(entry);
                return Err(error.into());
            }
            *task = next;
            ended
        };
        self.tell(entry, ended);
        Ok(())
    }

    /// Notes something that has happened to a task: changes memory in any case, and writes the record now or later.
    ///
    /// # Errors
    /// The change is refused; then nothing has changed.
    pub(crate) fn note(
        &self,
        entry: &Arc<Entry>,
        change: impl FnOnce(&mut Task) -> Result<Vec<ExitNotice>, Refusal>,
    ) -> Result<Noted, Refusal> {
        #[cfg(test)]
        NOTES.with(|notes| notes.set(notes.get() + 1));
        let (noted, ended) = {
            let mut task = entry.task();
            let mut next = task.clone();
            let ended = change(&mut next)?;
            if next == *task {
                let is_unwritten = entry.init.live().disk.is_unwritten;
                return Ok(if is_unwritten { Noted::Pending } else { Noted::Written });
            }
            let before = std::mem::replace(&mut *task, next);
            (self.write_now_or_later(entry, &before, &task), ended)
        };
        self.tell(entry, ended);
        Ok(noted)
    }

    /// containerd has accepted a task's event.
    pub(crate) fn note_accepted(&self, entry: &Arc<Entry>, seq: u64) {
        let mut task = entry.task();
        let before = task.clone();
        task.outbox.accepted(seq);
        self.write_now_or_later(entry, &before, &task);
        let is_owed = matches!(entry.init.live().disk.stored, Stored::Owed(_) | Stored::OwedInMemory);
        if is_owed && task.outbox.is_empty() && !before.outbox.is_empty() {
            self.owings.end(&task.containerd.ttrpc_address);
        }
    }

    /// Removes the record of a deleted task. Its last events move to a file that the next daemon reads.
    ///
    /// # Errors
    /// The record can't be removed; then the task stays.
    pub(crate) fn note_deleted(&self, entry: &Arc<Entry>, event: TaskEvent) -> Result<(), Error> {
        let mut task = entry.task();
        let mut last = task.clone();
        last.owe(event, sys::now_usec());
        let address = &task.containerd.ttrpc_address;
        if !last.outbox.is_empty() && !self.owings.begin(address) {
            tracing::error!(task = %entry.key, "task {}: its last events are dropped: containerd at {address} has not accepted those of {MOST_OWING} other deleted tasks", entry.key);
            last.outbox.clear();
        }
        let owed = if last.outbox.is_empty() { Ok(None) } else { self.store.retain_owed(&last).map(Some) };
        crate::fault::point(crate::fault::Point::DeleteKept);
        if let Err(error) = self.store.remove(&task.key) {
            if !last.outbox.is_empty() {
                self.owings.end(address);
            }
            // The task stays, and its record has these events. If this fails, the next start discards them.
            let _ = owed.map(|owing| owing.map(|owing| owing.discard()));
            return Err(error.into());
        }
        *task = last;
        entry.init.live().disk.stored = match owed {
            Ok(None) => Stored::Nowhere,
            Ok(Some(owing)) => Stored::Owed(owing),
            Err(error) => {
                // The removal of the record has freed some space: the write may succeed now.
                tracing::warn!(task = %entry.key, %error, "task {}: can't write its last events yet, the daemon will try again: {error}", entry.key);
                Stored::OwedInMemory
            }
        };
        if matches!(entry.init.live().disk.stored, Stored::OwedInMemory) {
            self.write_now_or_later(entry, &task, &task);
        }
        Ok(())
    }

    /// Removes the record of a task whose Create is rolled back. Later changes of the task are not written: another task may
    /// have its id then.
    ///
    /// # Errors
    /// The record can't be removed; then the task stays.
    pub(crate) fn note_rolled_back(&self, entry: &Entry) -> Result<(), store::Error> {
        let task = entry.task();
        self.store.remove(&task.key)?;
        entry.init.live().disk.stored = Stored::Nowhere;
        Ok(())
    }

    /// Wakes the calls that wait for the end of a process, and the publisher.
    fn tell(&self, entry: &Arc<Entry>, ended: Vec<ExitNotice>) {
        for ExitNotice { exec, exit } in ended {
            if let Some(process) = entry.process(exec.as_ref()) {
                let (key, status) = (&process.key, exit.status);
                tracing::debug!(process = %key, status, "{key}: ended with status {status}");
                process.wake(registry::Completion::Exited(exit));
            }
        }
        self.announce(entry);
    }

    /// Writes a task to its place on disk. The caller holds the lock of the task.
    fn write(&self, entry: &Entry, before: &Task, task: &Task, cause: Cause) -> Result<(), store::Error> {
        let (stored, is_unwritten) = {
            let live = entry.init.live();
            (live.disk.stored.clone(), live.disk.is_unwritten)
        };
        match stored {
            Stored::Record if is_unwritten => self.store.save_whole(task, cause),
            Stored::Record => self.store.save(before, task, cause),
            Stored::Owed(owing) => owing.update(task),
            Stored::OwedInMemory if task.outbox.is_empty() => Ok(()),
            Stored::OwedInMemory => {
                entry.init.live().disk.stored = Stored::Owed(self.store.retain_owed(task)?);
                Ok(())
            }
            Stored::Nowhere => Ok(()),
        }
    }

    fn write_now_or_later(&self, entry: &Arc<Entry>, before: &Task, task: &Task) -> Noted {
        let Err(error) = self.write(entry, before, task, Cause::Observation) else {
            return Noted::Written;
        };
        if self.write_later(entry) {
            tracing::error!(task = %entry.key, %error, "task {}: can't write its record, the daemon will try again: {error}", entry.key);
        }
        Noted::Pending
    }

    /// Schedules a write of the whole record. False if it was scheduled already.
    pub(crate) fn write_later(&self, entry: &Arc<Entry>) -> bool {
        let waits = std::mem::replace(&mut entry.init.live().disk.is_unwritten, true);
        if !waits {
            self.unwritten.push(entry.clone());
        }
        !waits
    }

    /// Background task: retries the records that could not be written. No event announces free space, so it polls.
    /// Calls `written` with each task whose record it has written. Never returns.
    pub(crate) async fn write_pending(&self, written: impl Fn(&Arc<Entry>)) {
        let mut pause = FIRST_PAUSE;
        loop {
            if self.unwritten.count() == 0 {
                self.unwritten.added.notified().await;
                pause = FIRST_PAUSE;
                continue;
            }
            tokio::time::sleep(pause).await;
            let is_progress = self.write_round(&written);
            pause = if is_progress { FIRST_PAUSE } else { (pause * 2).min(LONGEST_PAUSE) };
        }
    }

    /// Tries each of the records once. True if one was written.
    fn write_round(&self, written: &impl Fn(&Arc<Entry>)) -> bool {
        let (mut failures, mut is_progress) = (0, false);
        for _ in 0..self.unwritten.count() {
            let Some(entry) = self.unwritten.pop() else {
                break;
            };
            if self.write_again(&entry) {
                written(&entry);
                is_progress = true;
                continue;
            }
            self.unwritten.push(entry);
            failures += 1;
            if failures == FAILURES_PER_ROUND {
                break;
            }
        }
        is_progress
    }

    fn write_again(&self, entry: &Arc<Entry>) -> bool {
        {
            let task = entry.task();
            if self.write(entry, &task, &task, Cause::Observation).is_err() {
                return false;
            }
            entry.init.live().disk.is_unwritten = false;
        }
        tracing::info!(task = %entry.key, "task {}: its record could be written", entry.key);
        true
    }
}

#[cfg(test)]
mod tests {
    use crate::services::{Delivery, Error};
    use crate::simulation::harness::{Step, World};
    use crate::store;

    #[test]
    fn a_change_that_is_too_large_is_refused_also_if_the_record_is_still_to_be_written() {
        let world = World::new("too-large");
        world.take(&[Step::Create], Delivery::First).unwrap().unwrap();
        let init = world.init();
        let (changed, was_unwritten, description) = world
            .live(move |shim| async move {
                let (entry, _) = shim.tasks.process(&init).unwrap();
                let large = || {
                    shim.tasks.change(&entry, |task| {
                        task.init.description = "x".repeat(33 << 20);
                        Ok(Vec::new())
                    })
                };
                let first = large();
                let was_unwritten = entry.init.live().disk.is_unwritten;
                let second = large();
                let found = shim.tasks.store.load(&entry.key).unwrap().unwrap().task;
                assert_eq!(found.init.description, entry.task().init.description);
                ([first, second], was_unwritten, found.init.description)
            })
            .unwrap();
        assert!(was_unwritten && description.len() < 1000);
        for changed in changed {
            assert!(matches!(changed, Err(Error::Store(store::Error::TooLarge { .. }))), "{changed:?}");
        }
    }
}
