//! Removes a task that containerd has given up: by the `delete` command, or by a Delete during its Create. What can't be removed
//! at once is removed later.
//!
//! containerd does not ask again, so the record says first that the task is given up.

use std::sync::Arc;
use std::time::Duration;

use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use tokio::time::{Instant, MissedTickBehavior};
use tokio_util::sync::CancellationToken;

use crate::id::{Owner, TaskKey};
use crate::services::{Delivery, Entry, Error, Tasks};
use crate::store::delete_replies::Deleted;
use crate::{config, suspect};

use super::Shim;
use super::delete::kill_and_wait;
use super::kill::end_all;

/// How long a Delete waits for the bundle, to note the end of a Create.
const NOTE_LIMIT: Duration = Duration::from_secs(1);

/// How often the daemon looks whether something is left. Also the pause after the first attempt to remove it.
const SHORTEST_PAUSE: Duration = Duration::from_secs(10);

/// Each pause between attempts is twice as long as the one before, up to this.
const LONGEST_PAUSE: Duration = Duration::from_secs(300);

impl Shim {
    /// Removes a task that containerd has given up, and kills its processes first. If this fails, or the daemon ends meanwhile,
    /// the task is removed later.
    ///
    /// # Errors
    /// As [`Self::delete`]. A task that belongs to another containerd than `owner` is not found.
    pub async fn clean_up(self: &Arc<Self>, key: &TaskKey, owner: &Owner) -> Result<Deleted, Error> {
        let entry = self.tasks.entry(key)?;
        if !Tasks::is_own(&entry, owner) {
            return Err(Error::UnknownTask { key: key.clone() });
        }
        self.give_up(&entry)?;
        self.remove_given_up(&entry).await
    }

    /// Records that containerd has given a task up, and cancels what is under way for the task.
    ///
    /// # Errors
    /// None: no phase refuses this change.
    pub(super) fn give_up(&self, entry: &Arc<Entry>) -> Result<(), Error> {
        self.tasks.note(entry, |task| {
            task.give_up();
            Ok(Vec::new())
        })?;
        entry.init.live().attempt.given_up.cancel();
        Ok(())
    }

    /// Gives up a Create that is under way, and returns true. Also waits, for a limited time, until nothing is left of the task:
    /// afterwards containerd removes the bundle, which the Create needs.
    ///
    /// # Errors
    /// Something is left, and the record does not say yet that the task is given up.
    pub(super) async fn give_up_create(
        self: &Arc<Self>,
        entry: &Arc<Entry>,
        delivery: Delivery,
    ) -> Result<bool, Error> {
        let end = Instant::now() + config::DELETE_LIMIT;
        let is_under_way = entry.task().is_being_created();
        // Before the record says it: otherwise the next daemon might remove the task, and then begin the Create once more. If this
        // is a replay, the Create may be replayed, too, and after this.
        if is_under_way || delivery == Delivery::Replayed {
            self.note_end_of_create(entry).await;
        }
        if !is_under_way {
            return Ok(false);
        }
        let mut is_under_way = false;
        self.tasks.note(entry, |task| {
            is_under_way = task.is_being_created();
            if is_under_way {
                task.give_up();
            }
            Ok(Vec::new())
        })?;
        if !is_under_way {
            // It has just ended.
            return Ok(false);
        }
        entry.init.live().attempt.given_up.cancel();
        let (shim, left) = (self.clone(), entry.clone());
        let removing = suspect::inherit(async move { shim.try_to_remove_left(&left).await });
        // If the limit passes, the removal continues.
        let _ = tokio::time::timeout_at(end, tokio::spawn(removing)).await;
        if self.tasks.is_live(entry) && entry.init.live().disk.is_unwritten {
            let (process, reason) = (entry.key.to_string(), "its record can't be written now".to_owned());
            return Err(Error::NotRemoved { process, reason });
        }
        Ok(true)
    }

    /// Notes that no daemon carries out the Create of a task any more. Has a time limit: the bundle may be on a disk that does not
    /// answer, and containerd does not wait for long.
    async fn note_end_of_create(&self, entry: &Entry) {
        let (key, bundle) = (&entry.init.key, entry.task().request.bundle.clone());
        let given_up = Error::GivenUp { process: key.clone() };
        let noting = self.note_failure_of_any_call(key, bundle, &given_up);
        if tokio::time::timeout(NOTE_LIMIT, noting).await.is_err() {
            tracing::warn!(task = %entry.key, "task {}: its bundle does not answer in time, so if the daemon ends now, the Create that was given up is begun once more", entry.key);
        }
    }

    /// Removes a task that is recorded as given up.
    pub(crate) async fn remove_given_up(self: &Arc<Self>, entry: &Arc<Entry>) -> Result<Deleted, Error> {
        if is_alive(entry) {
            // The operation that is under way may wait for these processes. They are killed again below, where an error counts.
            let task = entry.task().clone();
            let _ = end_all(entry, &task).await;
        }
        self.cleanup.remove_leftover(entry).await?;
        self.kill_and_delete(entry).await
    }

    /// Cancels and rolls back a Create that is still under way, and removes what a failed one has left.
    ///
    /// # Errors
    /// Something can't be removed.
    pub(super) async fn end_create(self: &Arc<Self>, entry: &Arc<Entry>) -> Result<(), Error> {
        let is_busy = entry.task().init.pid().is_none() || entry.init.live().is_checkpointing;
        if is_busy {
            entry.init.live().attempt.given_up.cancel();
        }
        self.cleanup.remove_leftover(entry).await
    }

    pub(super) async fn kill_and_delete(self: &Arc<Self>, entry: &Arc<Entry>) -> Result<Deleted, Error> {
        // Its Create may be rolled back. Another task may have its cgroup by now.
        if self.tasks.is_live(entry) && is_alive(entry) {
            kill_and_wait(entry).await?;
        }
        self.delete_task(entry, &CancellationToken::new()).await
    }

    /// Makes sure that an id is free for a Create: removes what is left of a task that has it.
    ///
    /// # Errors
    /// A task has the id, or something can't be removed.
    pub(super) async fn free_id(self: &Arc<Self>, key: &TaskKey) -> Result<(), Error> {
        let Some(entry) = self.tasks.registry.get(key) else {
            return Ok(());
        };
        if !is_left(&entry) {
            return Err(Error::Exists { key: key.clone() });
        }
        self.remove_left(&entry).await
    }

    /// Removes what is left of a task whose Create has failed, or which containerd has given up.
    ///
    /// # Errors
    /// Something can't be removed.
    async fn remove_left(self: &Arc<Self>, entry: &Arc<Entry>) -> Result<(), Error> {
        let is_given_up = entry.task().given_up;
        if !is_given_up {
            return self.cleanup.remove_leftover(entry).await;
        }
        match self.remove_given_up(entry).await {
            Ok(_) | Err(Error::UnknownTask { .. }) => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// As [`Self::remove_left`], in the background. Errors are logged. Returns false if something is still there.
    pub(crate) async fn try_to_remove_left(self: &Arc<Self>, entry: &Arc<Entry>) -> bool {
        let removed = self.remove_left(entry).await;
        match &removed {
            // The rollback logs its errors.
            Ok(()) | Err(Error::Leftover { .. }) => {}
            Err(error) => {
                tracing::error!(task = %entry.key, %error, "task {}: containerd has given it up, but it can't be removed, so the daemon will try again: {error}", entry.key);
            }
        }
        removed.is_ok()
    }

    /// Background task: removes what failed Creates and tasks that containerd has given up have left, less and less often. Never
    /// returns.
    pub async fn remove_leftovers(self: Arc<Self>) {
        // A task that hangs or can't be removed does not delay the others: each has its own attempts, one at a time.
        let mut removing = FuturesUnordered::new();
        let mut known: Vec<Arc<Entry>> = Vec::new();
        let mut look = tokio::time::interval_at(Instant::now() + SHORTEST_PAUSE, SHORTEST_PAUSE);
        look.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                _ = look.tick() => {
                    for entry in self.tasks.registry.all() {
                        if is_left(&entry) && !known.iter().any(|other| Arc::ptr_eq(other, &entry)) {
                            removing.push(self.remove_until_nothing_is_left(entry.clone()));
                            known.push(entry);
                        }
                    }
                }
                Some(entry) = removing.next() => known.retain(|other| !Arc::ptr_eq(other, &entry)),
            }
        }
    }

    /// Removes what is left of a task, and returns the entry then.
    async fn remove_until_nothing_is_left(self: &Arc<Self>, entry: Arc<Entry>) -> Arc<Entry> {
        let mut pause = SHORTEST_PAUSE;
        // A Create with the same id may also remove it.
        while self.tasks.is_live(&entry) && !self.try_to_remove_left(&entry).await {
            tokio::time::sleep(pause).await;
            pause = LONGEST_PAUSE.min(pause * 2);
        }
        entry
    }
}

/// True if a task is only to be removed.
fn is_left(entry: &Entry) -> bool {
    let task = entry.task();
    task.is_leftover || task.given_up
}

/// True if a task has processes, as far as the daemon knows.
fn is_alive(entry: &Entry) -> bool {
    let task = entry.task();
    task.init.exit().is_none() && task.init.pid().is_some()
}
