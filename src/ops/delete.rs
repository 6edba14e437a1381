//! Delete: takes away everything that a task left.

use std::path::Path;
use std::sync::Arc;

use crate::config;
use crate::id::{TaskKey, UnitName};
use crate::oci::runtime;
use crate::task::Task;
use crate::task::outbox::TaskEvent;
use crate::task::phase::{Exit, Phase};

use super::create::unmount;
use super::kill::kill_all;
use super::{Entry, Error, Shim, blocking, now_usec};

impl Shim {
    /// Removes a task that has ended, or one that was never started (it is killed first). Returns
    /// the process that it was, and how it ended.
    ///
    /// # Errors
    /// It runs, or something can't be taken away; it can be called again then.
    pub async fn delete(self: &Arc<Self>, key: &TaskKey) -> Result<(u32, Exit), Error> {
        let entry = self.created(key)?;
        let _verb = entry.verb.lock().await;
        // Another Delete may have been first.
        self.created(key)?;
        let phase = entry.task().init.clone();
        let exit = match phase {
            Phase::Stopped { exit, .. } => exit,
            Phase::Created { .. } => self.kill_created(&entry).await?,
            Phase::Creating { .. } | Phase::Starting { .. } | Phase::Running { .. } => {
                return Err(Error::NotDeletable { phase: "running" });
            }
        };
        let task = entry.task().clone();
        let pid = task.init.pid().unwrap_or_default();
        self.remove_container(&task, &entry).await?;
        self.forget(&entry, TaskEvent::Deleted { pid, exit })?;
        Ok((pid, exit))
    }

    /// containerd has given the task up and publishes its end itself.
    ///
    /// # Errors
    /// There is no such task, or the record can't be written.
    pub fn mute(&self, key: &TaskKey) -> Result<(), Error> {
        let entry = self.entry(key)?;
        let mut task = entry.task();
        let mut next = task.clone();
        next.muted = true;
        next.outbox.clear();
        self.store.save(&next)?;
        *task = next;
        Ok(())
    }

    async fn kill_created(&self, entry: &Arc<Entry>) -> Result<Exit, Error> {
        let task = entry.task().clone();
        kill_all(&task, nix::libc::SIGKILL as u32)?;
        tokio::time::timeout(config::KILL_LIMIT, entry.ended())
            .await
            .map_err(|_| Error::NotEnding { key: task.key, unit: task.unit.to_string() })
    }

    /// Takes away what is outside of the daemon: the runtime's state, the units, the mounts.
    pub(super) async fn remove_container(&self, task: &Task, entry: &Arc<Entry>) -> Result<(), Error> {
        let dir = self.store.dir(&task.key);
        let cli = runtime::Cli { runtime: &task.runtime, id: &task.key.id, dir: &dir };
        if cli.knows() {
            cli.delete().await?;
        }
        self.drain(entry).await;
        self.remove_unit(&task.unit).await?;
        if let Some(logger) = &task.logger {
            self.stop_logger(logger).await?;
            remove_log_fields(logger);
        }
        if task.rootfs_on_host {
            unmount(task.request.bundle.clone()).await?;
        }
        Ok(())
    }

    /// Unloads a unit whose processes have ended. One that ended cleanly is still active
    /// (RemainAfterExit), any other has failed.
    async fn remove_unit(&self, unit: &UnitName) -> Result<(), Error> {
        self.manager.stop(unit).await?;
        self.manager.reset_failed(unit).await?;
        remove_log_fields(unit);
        Ok(())
    }

    /// Drops record and memory; the last events move to where the publisher finds them.
    fn forget(&self, entry: &Arc<Entry>, event: TaskEvent) -> Result<(), Error> {
        {
            let mut task = entry.task();
            let mut last = task.clone();
            last.owe(event, now_usec());
            if !last.outbox.is_empty() {
                entry.live().owing = Some(self.store.keep_owed(&last)?);
            }
            *task = last;
            self.store.remove(&task.key)?;
        }
        self.registry.remove(&entry.key);
        self.announce(entry);
        Ok(())
    }

    /// Takes away what a task left when containerd has given it up: kills it if it lives.
    ///
    /// # Errors
    /// As [`Self::delete`].
    pub async fn clean_up(self: &Arc<Self>, key: &TaskKey) -> Result<(u32, Exit), Error> {
        let entry = self.entry(key)?;
        // containerd gives up while its Create is still under way: that ends first.
        drop(entry.verb.lock().await);
        let entry = self.created(key)?;
        self.mute(key)?;
        let task = entry.task().clone();
        if task.init.exit().is_none() {
            let killed = blocking(move || kill_all(&task, nix::libc::SIGKILL as u32)).await?;
            killed?;
            let unit = entry.unit.to_string();
            tokio::time::timeout(config::KILL_LIMIT, entry.ended())
                .await
                .map_err(|_| Error::NotEnding { key: key.clone(), unit })?;
        }
        self.delete(key).await
    }
}

/// systemd forgets this file of a transient unit (252 to 262), and the next unit of that name would
/// get the fields in it.
fn remove_log_fields(unit: &UnitName) {
    let path = Path::new("/run/systemd/units").join(format!("log-extra-fields:{unit}"));
    // Not there is what we want.
    let _ = std::fs::remove_file(path);
}
