//! Delete: takes away everything that a task left.

use std::sync::Arc;

use crate::config;
use crate::fault::{self, Point};
use crate::id::{Owner, ProcessKey, TaskKey};
use crate::task::outbox::TaskEvent;
use crate::task::phase::{Exit, Phase};
use crate::task::registry::End;

use super::kill::kill_all;
use super::{Attempt, Deleted, Entry, Error, Shim, blocking};

impl Shim {
    /// Removes a process that has ended or was never started: an exec, or a task with all of its
    /// execs. Returns the process that it was, and how it ended.
    ///
    /// # Errors
    /// It runs, or something can't be taken away; it can be called again then.
    pub async fn delete(self: &Arc<Self>, key: &ProcessKey, attempt: Attempt) -> Result<Deleted, Error> {
        let deleted = match &key.exec {
            None => self.delete_task(&key.task).await,
            Some(exec) => self.delete_exec(key, exec).await,
        };
        match deleted {
            Err(error @ (Error::UnknownTask { .. } | Error::UnknownExec { .. })) => {
                self.answered(key, attempt).ok_or(error)
            }
            deleted => deleted,
        }
    }

    /// A task that was never started is killed first.
    async fn delete_task(self: &Arc<Self>, key: &TaskKey) -> Result<Deleted, Error> {
        let entry = self.created(key)?;
        let _verb = entry.init.verb.lock().await;
        // Another Delete may have been first.
        self.created(key)?;
        let phase = entry.task().init.clone();
        let exit = match phase {
            Phase::Stopped { exit, .. } => exit,
            Phase::Created { .. } => self.kill_and_wait(&entry).await?,
            Phase::Creating { .. }
            | Phase::Starting { .. }
            | Phase::Running { .. }
            | Phase::Ending { .. } => {
                return Err(Error::NotDeletable { phase: "running" });
            }
            Phase::Paused { .. } => return Err(Error::NotDeletable { phase: "paused" }),
        };
        fault::point(Point::DeleteBegun);
        let task = entry.task().clone();
        let pid = task.init.pid().unwrap_or_default();
        let troubles = self.remove_container(&task, &entry).await;
        if !troubles.is_empty() {
            return Err(Error::NotRemoved { process: key.to_string(), reason: troubles.text() });
        }
        let deleted = Deleted { pid, exit: Some(exit) };
        self.answers.keep(&entry.init.key, deleted)?;
        self.forget(&entry, TaskEvent::Deleted { pid, exit })?;
        fault::point(Point::DeleteForgotten);
        Ok(deleted)
    }

    /// containerd has given the task up and publishes its end itself.
    ///
    /// # Errors
    /// None: a note of this kind is never refused.
    fn mute(&self, entry: &Arc<Entry>) -> Result<(), Error> {
        self.note(entry, |task| {
            task.muted = true;
            task.outbox.clear();
            Ok(Vec::new())
        })?;
        Ok(())
    }

    /// Kills all of a task, and waits until its end is known.
    async fn kill_and_wait(&self, entry: &Arc<Entry>) -> Result<Exit, Error> {
        let task = entry.task().clone();
        blocking(move || kill_all(&task, nix::libc::SIGKILL as u32)).await??;
        let unknown = || Error::UnknownTask { key: entry.key.clone() };
        match tokio::time::timeout(config::KILL_LIMIT, entry.init.ended()).await {
            Ok(End::Exited(exit)) => Ok(exit),
            Ok(End::Deleted) => Err(unknown()),
            Err(_) => Err(Error::NotEnding { key: entry.key.clone(), unit: entry.init.unit.to_string() }),
        }
    }

    /// Drops record and memory; the last events move to where the publisher finds them.
    fn forget(&self, entry: &Arc<Entry>, event: TaskEvent) -> Result<(), Error> {
        self.note_deleted(entry, event)?;
        self.registry.remove(&entry.key);
        self.deleted.notify_one();
        self.announce(entry);
        Ok(())
    }

    /// Takes away what a task left when containerd has given it up: kills it if it lives.
    ///
    /// # Errors
    /// As [`Self::delete`]. The task of another containerd than `owner` is unknown to it.
    pub async fn clean_up(self: &Arc<Self>, key: &TaskKey, owner: &Owner) -> Result<Deleted, Error> {
        let entry = self.entry(key)?;
        if !Self::is_own(&entry, owner) {
            return Err(Error::UnknownTask { key: key.clone() });
        }
        // containerd gives up while its Create is still under way: that is taken back first.
        if entry.task().init.pid().is_none() {
            entry.init.live().given_up.cancel();
        }
        drop(entry.init.verb.lock().await);
        self.remove_leftover(&entry).await?;
        let entry = self.created(key)?;
        self.mute(&entry)?;
        self.kill_and_delete(&entry).await
    }

    async fn kill_and_delete(self: &Arc<Self>, entry: &Arc<Entry>) -> Result<Deleted, Error> {
        let alive = entry.task().init.exit().is_none();
        if alive {
            self.kill_and_wait(entry).await?;
        }
        self.delete_task(&entry.key).await
    }

    /// After a restart: containerd has given a task up, and an earlier daemon could not remove it.
    pub(super) async fn remove_given_up(self: &Arc<Self>, entry: &Arc<Entry>) {
        match self.kill_and_delete(entry).await {
            Ok(_) | Err(Error::UnknownTask { .. }) => {}
            Err(error) => {
                tracing::error!(task = %entry.key, %error, "task {}: was given up and can't be removed: {error}", entry.key);
            }
        }
    }
}
