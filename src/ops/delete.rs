//! Delete: takes away everything that a task left.

use std::path::Path;
use std::sync::Arc;

use crate::config;
use crate::fault::{self, Point};
use crate::id::{Owner, ProcessKey, TaskKey, UnitName};
use crate::oci::runtime;
use crate::task::Task;
use crate::task::outbox::TaskEvent;
use crate::task::phase::{Exit, Phase};
use crate::task::registry::End;

use super::create::unmount;
use super::kill::kill_all;
use super::streams::{cut_off, drain};
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
        self.remove_container(&task, &entry).await?;
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

    /// Takes away what is outside of the daemon: the runtime's state, the units, the mounts.
    pub(super) async fn remove_container(&self, task: &Task, entry: &Arc<Entry>) -> Result<(), Error> {
        let dir = self.store.dir(&task.key);
        let cli = runtime::Cli { runtime: &task.runtime, id: &task.key.id, dir: &dir };
        if cli.knows() {
            cli.delete().await?;
        }
        entry.init.live().watched = None;
        fault::point(Point::DeleteRuntime);
        drain(&entry.init).await;
        for process in entry.execs() {
            // They vanish with the task; what their clients have not read by now is lost, as with
            // containerd-shim-runc-v2.
            cut_off(&process).await;
            if let Some(id) = &process.key.exec {
                self.remove_exec(entry, &process, id).await?;
            }
        }
        self.remove_unit(&task.unit).await?;
        // Last: with the reference the unit goes.
        self.manager.release(&task.unit).await;
        fault::point(Point::DeleteUnit);
        if let Some(logger) = &task.logger {
            self.remove_unit(logger).await?;
        }
        if task.rootfs_on_host {
            unmount(task.request.bundle.clone()).await?;
        }
        Ok(())
    }

    /// Unloads a unit whose processes have ended. One that ended cleanly is still active
    /// (RemainAfterExit), any other has failed.
    pub(super) async fn remove_unit(&self, unit: &UnitName) -> Result<(), Error> {
        self.manager.stop(unit).await?;
        self.manager.reset_failed(unit).await?;
        remove_log_fields(unit);
        Ok(())
    }

    /// Drops record and memory; the last events move to where the publisher finds them.
    fn forget(&self, entry: &Arc<Entry>, event: TaskEvent) -> Result<(), Error> {
        self.note_deleted(entry, event)?;
        self.registry.remove(&entry.key);
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
        // containerd gives up while its Create is still under way: that ends first.
        drop(entry.init.verb.lock().await);
        let entry = self.created(key)?;
        self.mute(&entry)?;
        let alive = entry.task().init.exit().is_none();
        if alive {
            self.kill_and_wait(&entry).await?;
        }
        self.delete_task(key).await
    }
}

/// systemd forgets this file of a transient unit (252 to 262), and the next unit of that name would
/// get the fields in it.
fn remove_log_fields(unit: &UnitName) {
    let path = Path::new("/run/systemd/units").join(format!("log-extra-fields:{unit}"));
    // Not there is what we want.
    let _ = std::fs::remove_file(path);
}
