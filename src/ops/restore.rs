//! Restore: a container with a checkpoint. Create only mounts the rootfs, into which containerd may unpack files; Start
//! restores the processes in the container's unit.

use std::path::Path;
use std::sync::Arc;

use tokio::sync::oneshot;

use crate::fault::{self, Point};
use crate::launch::contract::{CommandKind, restore_work};
use crate::oci::criu;
use crate::services::process::cancelled;
use crate::services::{Entry, Error, WaitsFor};
use crate::task::Task;
use crate::task::lifecycle::Event;

use super::Shim;
use super::checkpoint::{copy_log, with_log};
use super::request_unit::Daemon;

/// The copy of criu's log in the bundle.
const LOG_COPY: &str = "criu-restore.log";

impl Shim {
    /// The rest of a Create with a checkpoint. Starts no process. Can be repeated.
    pub(super) async fn prepare_restore(
        self: &Arc<Self>,
        entry: &Arc<Entry>,
        task: &Task,
        dir: &Path,
    ) -> Result<(), Error> {
        if !task.request.rootfs.is_empty() {
            self.launch_for(entry, task, dir, CommandKind::Mount).await.map_err(|error| match error {
                Error::Runtime(crate::oci::runtime::Error::Failed { reason, .. }) => Error::Launch(reason),
                error => error,
            })?;
        }
        fault::point(Point::CreateMounted);
        self.tasks.apply(entry, &entry.init, Event::Prepared)?;
        fault::point(Point::CreatePrepared);
        Ok(())
    }

    /// Restores the container. Returns the pid of its init process.
    pub(super) async fn restore_init(
        self: &Arc<Self>,
        entry: &Arc<Entry>,
        task: &Task,
    ) -> Result<u32, Error> {
        fault::point(Point::RestoreRecorded);
        let restored = async {
            self.check_criu(entry, task).await?;
            let dir = self.store.dir(&task.key);
            self.remove_log(entry, restore_work(&task.runtime, &dir).join(criu::RESTORE_LOG)).await?;
            let plan = Arc::new(self.streams.plan(entry, &entry.init)?);
            let opened = self.streams.open_unless(&plan, cancelled(entry)).await?;
            // A restore that fails can be tried again, with the same input.
            entry.init.live().client_input = opened.client_input()?;
            self.notifications.listen(entry).await?;
            fault::point(Point::RestoreOpened);
            self.start_unit(entry, task, &dir, Daemon::This).await?;
            self.finish_create(entry, task, &dir, opened).await
        };
        let restored = restored.await;
        self.conclude_restore(entry, restored, Daemon::This).await
    }

    /// After a restart: completes a restore that was interrupted.
    pub(crate) async fn resume_restore(self: &Arc<Self>, entry: &Arc<Entry>, claimed: oneshot::Sender<()>) {
        let restored = self.resume_unit(entry, claimed).await;
        if let Err(error) = self.conclude_restore(entry, restored, Daemon::Earlier).await {
            tracing::warn!(task = %entry.key, %error, "task {}: a restore that a restart interrupted has failed and was rolled back: {error}", entry.key);
        }
        self.units.query(entry, &entry.init).await;
    }

    async fn conclude_restore(
        self: &Arc<Self>,
        entry: &Arc<Entry>,
        restored: Result<u32, Error>,
        begun_by: Daemon,
    ) -> Result<u32, Error> {
        let error = match restored {
            Ok(pid) => {
                // The container may have been frozen meanwhile.
                self.cgroups.note_freezer(entry);
                return Ok(pid);
            }
            Err(error) => error.with_criu_problem(),
        };
        let task = entry.task().clone();
        let kept = match &error {
            Error::Launch(_) => {
                let work = restore_work(&task.runtime, &self.store.dir(&task.key));
                let (log, copy) = (work.join(criu::RESTORE_LOG), task.request.bundle.join(LOG_COPY));
                self.files
                    .run(WaitsFor::Disk, &entry.init.key, move || copy_log(&log, &copy))
                    .await
                    .unwrap_or(None)
            }
            _ => None,
        };
        let error = with_log(error, kept);
        if begun_by == Daemon::This || matches!(error, Error::Interrupted { .. }) {
            self.note_failure(&entry.init.key, self.store.dir(&entry.key), &error).await;
        }
        self.cleanup.roll_back_restore(entry).await;
        self.tasks.note_event(entry, &entry.init, Event::StartFailed)?;
        Err(error)
    }
}
