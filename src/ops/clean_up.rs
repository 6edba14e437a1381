//! The `delete` command: removes a task that containerd has given up.

use std::sync::Arc;

use crate::id::{Owner, TaskKey};
use crate::services::{Entry, Error, Tasks};
use crate::store::delete_replies::Deleted;

use super::Shim;
use super::delete::kill_and_wait;

impl Shim {
    /// Removes a task that containerd has given up, and kills its processes first.
    ///
    /// # Errors
    /// As [`Self::delete`]. A task that belongs to another containerd than `owner` is not found.
    pub async fn clean_up(self: &Arc<Self>, key: &TaskKey, owner: &Owner) -> Result<Deleted, Error> {
        let entry = self.tasks.entry(key)?;
        if !Tasks::is_own(&entry, owner) {
            return Err(Error::UnknownTask { key: key.clone() });
        }
        let entry = self.end_create(&entry).await?;
        self.mute(&entry)?;
        self.kill_and_delete(&entry).await
    }

    /// Cancels and rolls back a Create that is still under way, and removes what a failed one has left.
    ///
    /// # Errors
    /// No task is left, or something can't be removed.
    pub(super) async fn end_create(self: &Arc<Self>, entry: &Arc<Entry>) -> Result<Arc<Entry>, Error> {
        let is_busy = entry.task().init.pid().is_none() || entry.init.live().is_checkpointing;
        if is_busy {
            entry.init.live().attempt.given_up.cancel();
        }
        drop(entry.init.verb.lock().await);
        self.cleanup.remove_leftover(entry).await?;
        self.tasks.created(&entry.key)
    }

    /// Drops the events of a task that containerd has given up: containerd publishes the end of the task itself.
    ///
    /// # Errors
    /// None: no phase refuses this change.
    fn mute(&self, entry: &Arc<Entry>) -> Result<(), Error> {
        self.tasks.note(entry, |task| {
            task.muted = true;
            task.outbox.clear();
            Ok(Vec::new())
        })?;
        Ok(())
    }

    pub(super) async fn kill_and_delete(self: &Arc<Self>, entry: &Arc<Entry>) -> Result<Deleted, Error> {
        let alive = {
            let task = entry.task();
            task.init.exit().is_none() && task.init.pid().is_some()
        };
        if alive {
            kill_and_wait(entry).await?;
        }
        self.delete_task(&entry.key).await
    }

    /// After a restart: removes a task that containerd has given up and that an earlier daemon could not remove.
    pub(crate) async fn remove_given_up(self: &Arc<Self>, entry: &Arc<Entry>) {
        match self.kill_and_delete(entry).await {
            Ok(_) | Err(Error::UnknownTask { .. }) => {}
            Err(error) => {
                tracing::error!(task = %entry.key, %error, "task {}: containerd has given it up, but it can't be removed: {error}", entry.key);
            }
        }
    }
}
