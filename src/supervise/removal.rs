//! The removal of what a task has outside of the daemon: Delete, rollback and the `delete` command all take these steps.
//!
//! Every step is tried, even if an earlier one failed. If anything could not be removed, the caller gets the reasons and
//! keeps the record: the same steps can run again later and find what is left.

use std::fmt::Display;
use std::path::Path;
use std::time::Duration;

use crate::fault::{self, Point};
use crate::id::UnitName;
use crate::launch::contract::LAUNCHED;
use crate::oci::runtime::{self, OciRuntime};
use crate::oci::state::State;
use crate::oci::{mount, pod_files};
use crate::services::files::SlowFiles;
use crate::services::own_unit::OwnUnit;
use crate::services::runtime_files::RuntimeFiles;
use crate::services::{Error, WaitsFor};
use crate::sys;
use crate::task::Task;
use crate::task::phase::Phase;
use crate::unit::main_process::MainProcess;
use crate::unit::systemd::Systemd;

/// Why some things could not be removed.
#[derive(Debug, Default)]
pub struct Troubles(Vec<String>);

impl Troubles {
    /// Adds the error of a step, if it failed.
    pub fn add<E: Display>(&mut self, step: Result<(), E>) {
        self.0.extend(step.err().map(|error| error.to_string()));
    }

    /// Adds the errors of other steps.
    pub fn join(&mut self, other: Self) {
        self.0.extend(other.0);
    }

    /// Adds the error of a step that ran in another thread.
    fn add_run<E: Display>(&mut self, step: Result<Result<(), E>, Error>) {
        match step {
            Ok(done) => self.add(done),
            Err(error) => self.add(Err(error)),
        }
    }

    /// True if everything could be removed.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// All errors in one line.
    pub fn text(&self) -> String {
        self.0.join("; ")
    }
}

/// How long [`Stop::Killed`] waits for the main process of each unit. containerd kills `delete` after 5 s.
const DEATH_LIMIT: Duration = Duration::from_millis(300);

/// How a unit is stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stop {
    /// Waits until the unit has stopped. Only the daemon can: it listens to systemd.
    Awaited,
    /// Kills the processes of the unit, and waits for the end of its main process, at most [`DEATH_LIMIT`].
    Killed,
}

/// The removal of what a task has outside of the daemon.
pub struct Removal<'a> {
    pub manager: &'a dyn Systemd,
    pub oci: &'a dyn OciRuntime,
    /// Runs what touches the bundle.
    pub files: &'a SlowFiles,
    /// Runs what touches the state of the OCI runtime.
    pub runtime_files: &'a RuntimeFiles,
    pub task: &'a Task,
    /// The directory of the task.
    pub dir: &'a Path,
    /// How its units are stopped.
    pub stop: Stop,
}

impl Removal<'_> {
    /// Removes the state of the OCI runtime, the units and the mounts. `others` resolves to the units of the execs and of
    /// their loggers, once nothing copies output any more.
    pub async fn of_task(&self, others: impl Future<Output = Vec<OwnUnit>>) -> Troubles {
        let (mut troubles, task) = (Troubles::default(), self.task);
        if self.stop == Stop::Killed {
            // The OCI runtime only removes a container whose processes have ended.
            match self.unit().is_own(self.manager).await {
                Ok(true) => {
                    troubles.add(self.manager.kill_all(task.unit(), nix::libc::SIGKILL).await);
                }
                Ok(false) => {}
                Err(error) => troubles.add(Err(error)),
            }
        }
        troubles.join(self.of_init(others).await);
        fault::point(Point::DeleteUnit);
        troubles.join(self.of_logger().await);
        if let Some(places) = task.request.sandbox.as_ref().and_then(|sandbox| sandbox.places.clone()) {
            // containerd's directory may be on a disk that does not answer.
            let init = task.key.init();
            let removed = self.files.run(WaitsFor::Disk, &init, move || pod_files::remove(&places));
            troubles.add_run(removed.await);
        }
        if task.rootfs_on_host {
            let rootfs = task.request.bundle.join("rootfs");
            // The bundle may be on a disk that does not answer.
            troubles.add_run(
                self.files.run(WaitsFor::Disk, &task.key.init(), move || mount::unmount_all(&rootfs)).await,
            );
        }
        troubles
    }

    /// Removes the state of the OCI runtime, and meanwhile the units: first those to which `others` resolves, then that of the
    /// init process. Both leave no process of the container, and both accept that its cgroup is gone already.
    pub(super) async fn of_init(&self, others: impl Future<Output = Vec<OwnUnit>>) -> Troubles {
        let unit = self.unit();
        let cli = runtime::Cli::of(self.task, self.dir);
        let units = async {
            let mut troubles = Troubles::default();
            for unit in others.await {
                troubles.join(remove_unit(self.manager, &unit, self.stop).await);
            }
            let removed = remove_unit(self.manager, &unit, self.stop).await;
            if removed.is_empty() {
                // This is the last step: systemd unloads the unit when its last reference is gone.
                self.manager.release(unit.name()).await;
            }
            troubles.join(removed);
            troubles
        };
        let in_runtime = async {
            let deleted = self.delete_in_runtime(&cli).await;
            fault::point(Point::DeleteRuntime);
            deleted
        };
        let (mut deleted, mut troubles) = tokio::join!(in_runtime, units);
        // The runtime has recorded the container before `create` or `restore` ended with the unit, or it could not delete a
        // container that runs.
        match self.is_in_runtime().await {
            Ok(true) => deleted = self.delete_in_runtime(&cli).await,
            Ok(false) => {}
            // The same disk may have kept the runtime from deleting the container.
            Err(error) => deleted = deleted.and(Err(error)),
        }
        troubles.add(deleted);
        troubles
    }

    /// The unit of the init process.
    fn unit(&self) -> OwnUnit {
        OwnUnit::recorded(self.task.key.init(), &self.task.init, self.dir.to_owned())
    }

    /// True if the OCI runtime has state of this container.
    ///
    /// # Errors
    /// The disk with the state does not answer.
    async fn is_in_runtime(&self) -> Result<bool, Error> {
        if matches!(self.task.init.phase, Phase::Creating { .. } | Phase::Restoring { .. })
            && !self.dir.join(LAUNCHED).exists()
        {
            // The runtime has not run. State with this id is that of a container of somebody else.
            return Ok(false);
        }
        self.runtime_files.state(self.task, State::exists).await
    }

    /// Removes the state of the OCI runtime, if it has one of this container.
    ///
    /// # Errors
    /// The runtime refuses it, or the disk with the state does not answer. The call can be repeated.
    async fn delete_in_runtime(&self, cli: &runtime::Cli<'_>) -> Result<(), Error> {
        if !self.is_in_runtime().await? {
            self.oci.settle(cli).await;
            return Ok(());
        }
        let Err(error) = self.oci.delete(cli).await else { return Ok(()) };
        let leftover = error.leftover();
        match self.runtime_files.state(self.task, move |state| state.clear(leftover)).await? {
            Ok(true) => {
                let key = &self.task.key;
                tracing::warn!(task = %key, %error, "task {key}: the state of its container was removed without the OCI runtime: {error}");
                Ok(())
            }
            Ok(false) => Err(error.into()),
            Err(error) => Err(runtime::Error::Failed { verb: "delete", reason: error.to_string() }.into()),
        }
    }

    /// Removes the unit of the logger of the init process.
    pub(super) async fn of_logger(&self) -> Troubles {
        match OwnUnit::recorded_logger(self.task.key.init(), &self.task.init) {
            Some(logger) => remove_unit(self.manager, &logger, self.stop).await,
            None => Troubles::default(),
        }
    }
}

/// Unloads a unit, unless it is that of somebody else. One that ended cleanly is still active (RemainAfterExit), any other has
/// failed.
pub async fn remove_unit(manager: &dyn Systemd, unit: &OwnUnit, stop: Stop) -> Troubles {
    let mut troubles = Troubles::default();
    match unit.is_own(manager).await {
        Ok(true) => {}
        Ok(false) => return troubles,
        Err(error) => {
            troubles.add(Err(error));
            return troubles;
        }
    }
    let unit = unit.name();
    match stop {
        Stop::Awaited => troubles.add(manager.stop(unit).await),
        Stop::Killed => {
            troubles.add(manager.kill_all(unit, nix::libc::SIGKILL).await);
            end_of_main_process(manager, unit).await;
            troubles.add(manager.stop_without_waiting(unit).await);
        }
    }
    troubles.add(manager.reset_failed(unit).await);
    remove_log_fields(unit);
    troubles
}

/// Waits for the end of a main process that was killed, but not for long: a process that hangs in the kernel does not end. A unit
/// whose failed state is cleared before its main process has ended fails later, and then stays. systemd handles the end of a
/// process before it handles calls that come after the end.
async fn end_of_main_process(manager: &dyn Systemd, unit: &UnitName) {
    // Whatever fails here, the unit is stopped all the same.
    let Ok(Some(MainProcess { pid: Some(pid), .. })) = manager.main_process(unit).await else { return };
    let Ok(process) = sys::pidfd_open(pid) else { return };
    let _ = tokio::time::timeout(DEATH_LIMIT, sys::ended(process)).await;
}

/// systemd forgets this file of a transient unit (252 to 262), and the next unit of that name would
/// get the fields in it.
fn remove_log_fields(unit: &UnitName) {
    let path = Path::new("/run/systemd/units").join(format!("log-extra-fields:{unit}"));
    // The goal is that the file does not exist.
    let _ = std::fs::remove_file(path);
}
