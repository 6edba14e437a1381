//! Cleanup: the one procedure that removes what a task or an exec has outside of the daemon. Delete, rollback and the
//! `delete` command use it.
//!
//! Every step is tried, even if an earlier one failed. If anything could not be removed, the caller gets the reasons and
//! keeps the record: the same steps can run again later and find what is left.

use std::fmt::Display;
use std::path::Path;
use std::sync::Arc;

use tokio::sync::oneshot;
use tokio::task::JoinHandle;

use crate::fault::{self, Point};
use crate::id::UnitName;
use crate::launch;
use crate::launch::contract::{EXEC_PID_FILE, LAUNCH_ERROR, LAUNCHED, PID_FILE, PROCESS_SPEC};
use crate::launch::pipes::NO_INPUT;
use crate::oci::runtime::{self, OciRuntime};
use crate::oci::state::State;
use crate::oci::{mount, mount_options, pod_files};
use crate::services::changes::Noted;
use crate::services::files::ClientFiles;
use crate::services::live::UnitStop;
use crate::services::process::{lives_in, read_pid};
use crate::services::runtime_files::RuntimeFiles;
use crate::services::streams::{Streams, cancel_pumps, stored_number};
use crate::services::{Entry, Error, Process, Tasks, WaitsFor, exec_share};
use crate::session::fds::StreamFds;
use crate::stdio::threads;
use crate::store::{self, Store};
use crate::task::Task;
use crate::unit::search_path;
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

/// How a unit is stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stop {
    /// Waits until the unit has stopped. Only the daemon can: it listens to systemd.
    Awaited,
    /// Kills the processes of the unit and does not wait.
    Killed,
}

/// The removal of what a task has outside of the daemon.
pub struct Removal<'a> {
    pub manager: &'a dyn Systemd,
    pub oci: &'a dyn OciRuntime,
    /// Runs what touches the bundle.
    pub files: &'a ClientFiles,
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
    pub async fn of_task(&self, others: impl Future<Output = Vec<UnitName>>) -> Troubles {
        let (mut troubles, task) = (Troubles::default(), self.task);
        if self.stop == Stop::Killed {
            // The OCI runtime only removes a container whose processes have ended.
            troubles.add(self.manager.kill_all(task.unit(), nix::libc::SIGKILL).await);
        }
        let others = async {
            fault::point(Point::DeleteRuntime);
            others.await
        };
        troubles.join(self.of_init(others).await);
        fault::point(Point::DeleteUnit);
        troubles.join(self.of_logger().await);
        if let Some(places) = task.request.sandbox.as_ref().and_then(|sandbox| sandbox.places.clone()) {
            // containerd's directory may be on a disk that does not answer.
            let init = task.key.init();
            let removed = self.files.run(WaitsFor::Bundle, &init, move || pod_files::remove(&places));
            troubles.add_run(removed.await);
        }
        if task.rootfs_on_host {
            let rootfs = task.request.bundle.join("rootfs");
            // The bundle may be on a disk that does not answer.
            troubles.add_run(
                self.files.run(WaitsFor::Bundle, &task.key.init(), move || mount::unmount_all(&rootfs)).await,
            );
        }
        troubles
    }

    /// Removes the state of the OCI runtime, and meanwhile the units: first those to which `others` resolves, then that of the
    /// init process. Both leave no process of the container, and both accept that its cgroup is gone already.
    async fn of_init(&self, others: impl Future<Output = Vec<UnitName>>) -> Troubles {
        let unit = self.task.unit();
        let cli = runtime::Cli::of(self.task, self.dir);
        let units = async {
            let mut troubles = Troubles::default();
            for unit in others.await {
                troubles.join(remove_unit(self.manager, &unit, self.stop).await);
            }
            let removed = remove_unit(self.manager, unit, self.stop).await;
            if removed.is_empty() {
                // This is the last step: systemd unloads the unit when its last reference is gone.
                self.manager.release(unit).await;
            }
            troubles.join(removed);
            troubles
        };
        let (mut deleted, mut troubles) = tokio::join!(self.delete_in_runtime(&cli), units);
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

    /// True if the OCI runtime has state of this container.
    ///
    /// # Errors
    /// The disk with the state does not answer.
    async fn is_in_runtime(&self) -> Result<bool, Error> {
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
    async fn of_logger(&self) -> Troubles {
        match &self.task.init.logger {
            Some(logger) => remove_unit(self.manager, logger, self.stop).await,
            None => Troubles::default(),
        }
    }
}

/// Unloads a unit. One that ended cleanly is still active (RemainAfterExit), any other has failed.
pub async fn remove_unit(manager: &dyn Systemd, unit: &UnitName, stop: Stop) -> Troubles {
    let mut troubles = Troubles::default();
    match stop {
        Stop::Awaited => troubles.add(manager.stop(unit).await),
        Stop::Killed => {
            troubles.add(manager.kill_all(unit, nix::libc::SIGKILL).await);
            troubles.add(manager.stop_without_waiting(unit).await);
        }
    }
    troubles.add(manager.reset_failed(unit).await);
    remove_log_fields(unit);
    troubles
}

/// The unit of the logger of a process, if the process has one.
fn logger_of(entry: &Entry, process: &Process) -> Option<UnitName> {
    entry.task().process(process.exec()).and_then(|recorded| recorded.logger.clone())
}

/// systemd forgets this file of a transient unit (252 to 262), and the next unit of that name would
/// get the fields in it.
fn remove_log_fields(unit: &UnitName) {
    let path = Path::new("/run/systemd/units").join(format!("log-extra-fields:{unit}"));
    // The goal is that the file does not exist.
    let _ = std::fs::remove_file(path);
}

/// Removes tasks, execs, and what failed operations have left.
pub struct Cleanup {
    /// The live tasks and their records.
    pub(crate) tasks: Arc<Tasks>,
    /// The directories of tasks.
    pub(crate) store: Store,
    /// The streams in the descriptor store.
    pub(crate) fds: Arc<StreamFds>,
    /// The sessions of processes.
    pub(crate) streams: Arc<Streams>,
    pub(crate) manager: Arc<dyn Systemd>,
    pub(crate) oci: Arc<dyn OciRuntime>,
    /// Runs work on files that clients have named.
    pub(crate) files: ClientFiles,
    /// Runs work on the files of OCI runtimes.
    pub(crate) runtime_files: RuntimeFiles,
}

impl Cleanup {
    fn removal<'a>(&'a self, task: &'a Task, dir: &'a Path) -> Removal<'a> {
        let (manager, oci) = (&*self.manager, &*self.oci);
        let (files, runtime_files) = (&self.files, &self.runtime_files);
        Removal { manager, oci, files, runtime_files, task, dir, stop: Stop::Awaited }
    }

    /// Removes what a task has outside of the daemon. Output of execs that the client has not read by now is lost, as with
    /// containerd-shim-runc-v2.
    pub(crate) async fn remove_container(&self, task: &Task, entry: &Arc<Entry>) -> Troubles {
        let mut in_execs = Troubles::default();
        let others = async {
            entry.init.live().cgroup.watched = None;
            entry.init.live().listening = None;
            self.streams.drain(&entry.init).await;
            for process in entry.execs() {
                cancel_pumps(&process).await;
                in_execs.join(self.remove_exec(entry, &process).await);
            }
            // Execs that were deleted just now.
            self.tasks.registry.until_stopped(&task.key, |_| true).await;
            Vec::new()
        };
        let dir = self.store.dir(&task.key);
        let mut troubles = self.removal(task, &dir).of_task(others).await;
        troubles.join(in_execs);
        if task.request.rootfs.iter().any(mount_options::leaves_a_daemon) {
            launch::cgroup::kill(&task.runtime, task.unit());
        }
        launch::cgroup::remove(&task.runtime, task.unit());
        self.fds.forget_all(task.init.wiring.store_number);
        troubles
    }

    /// Removes what an exec has outside of the daemon. The exec has ended or never ran.
    async fn remove_exec(&self, entry: &Entry, process: &Process) -> Troubles {
        let stop = begin_removal(process).map(|stop| stop.done);
        let troubles = self.after_stop(entry, process, stop).await;
        self.remove_rest_of_exec(entry, process, troubles).await
    }

    /// As [`Self::remove_exec`], for the Delete of an exec. systemd may still be stopping the unit afterwards: it has accepted
    /// the job, and the process has ended.
    pub(crate) async fn remove_deleted_exec(
        self: &Arc<Self>,
        entry: &Arc<Entry>,
        process: &Arc<Process>,
    ) -> Troubles {
        let stop = begin_removal(process);
        let troubles = self.remove_unit_of_exec(entry, process, stop).await;
        self.remove_rest_of_exec(entry, process, troubles).await
    }

    /// Removes what an exec has besides its unit. `troubles`: those with the unit.
    async fn remove_rest_of_exec(
        &self,
        entry: &Entry,
        process: &Process,
        mut troubles: Troubles,
    ) -> Troubles {
        let logger = logger_of(entry, process);
        if let Some(logger) = logger {
            troubles.join(remove_unit(&*self.manager, &logger, Stop::Awaited).await);
        }
        stored_number(entry, process).into_iter().for_each(|number| self.fds.forget_all(number));
        if troubles.is_empty() {
            // The record stays until the Delete is answered.
            troubles.add(self.clear_exec_dir(process, None));
        }
        troubles
    }

    /// Removes the unit of an exec. If systemd has accepted the job that stops the unit, the rest happens in the background.
    async fn remove_unit_of_exec(
        self: &Arc<Self>,
        entry: &Arc<Entry>,
        process: &Arc<Process>,
        stop: Option<UnitStop>,
    ) -> Troubles {
        let Some(UnitStop { accepted, done }) = stop else {
            return self.after_stop(entry, process, None).await;
        };
        let stopping = match accepted.await {
            Ok(()) => self.tasks.registry.stopping(process),
            Err(_) => None,
        };
        let Some(stopping) = stopping else {
            return self.after_stop(entry, process, Some(done)).await;
        };
        let (this, entry, process) = (self.clone(), entry.clone(), process.clone());
        tokio::spawn(async move {
            let troubles = this.after_stop(&entry, &process, Some(done)).await;
            if !troubles.is_empty() {
                let (key, text) = (&process.key, troubles.text());
                tracing::error!(process = %key, "{key} was deleted, but its unit could not be removed: {text}");
            }
            drop(stopping);
        });
        Troubles::default()
    }

    /// Waits until the unit of an exec is stopped, if it is being stopped, and removes what is left of it.
    async fn after_stop(
        &self,
        entry: &Entry,
        process: &Process,
        stop: Option<JoinHandle<Result<(), Error>>>,
    ) -> Troubles {
        let mut troubles = Troubles::default();
        let stopped = match stop {
            Some(stop) => stop.await.is_ok_and(|stopped| stopped.is_ok()),
            None => false,
        };
        // A unit that has failed while it was stopped (`ExecStopPost=` of a drop-in, a process that did not end) is still loaded,
        // and keeps that of its container loaded.
        if !stopped || search_path::has_transient_file(&process.unit) {
            troubles.join(remove_unit(&*self.manager, &process.unit, Stop::Awaited).await);
        }
        remove_runtime_of_exec(entry, process, false);
        troubles
    }

    /// Rolls back a Create, however far it got. If something can't be removed, the record stays and is marked: the daemon
    /// tries again after a while, when the id is used again, when containerd gives the task up, and when it starts.
    pub(crate) async fn roll_back_create(self: &Arc<Self>, entry: &Arc<Entry>) {
        let task = entry.task().clone();
        // The OCI runtime, its hooks and its mounts may hang. None of them is in the cgroup of the unit.
        launch::cgroup::kill(&task.runtime, task.unit());
        let mut troubles = self.remove_container(&task, entry).await;
        // `launch` may have moved there in the meantime.
        launch::cgroup::kill(&task.runtime, task.unit());
        if troubles.is_empty() {
            troubles.add(self.tasks.note_rolled_back(entry));
        }
        if troubles.is_empty() {
            self.tasks.remove(&task.key);
            return;
        }
        let text = troubles.text();
        tracing::error!(task = %task.key, "task {}: its failed create could not be rolled back completely, so the daemon will try again: {text}", task.key);
        // No phase refuses this change.
        let _ = self.tasks.note(entry, |task| {
            task.is_leftover = true;
            Ok(Vec::new())
        });
    }

    /// Waits for the current operation on the init process, and rolls back a Create that has failed or was given up.
    ///
    /// # Errors
    /// Something could still not be removed.
    pub(crate) async fn remove_leftover(self: &Arc<Self>, entry: &Arc<Entry>) -> Result<(), Error> {
        let _verb = entry.init.verb.lock().await;
        let is_there = || self.tasks.is_live(entry);
        if is_there() && entry.task().is_to_be_rolled_back() {
            self.roll_back_create(entry).await;
            if is_there() {
                return Err(Error::Leftover { key: entry.key.clone() });
            }
        }
        Ok(())
    }

    /// Closes what only a running exec needs, if the exec has ended.
    pub(crate) fn close_ended_exec(&self, entry: &Entry, process: &Process) {
        if process.exec().is_some() && entry.has_recorded_end(process) {
            self.streams.close_input(entry, process);
            process.live().process = None;
        }
    }

    /// As [`Self::close_ended_exec`], and removes the process spec of an exec that has run, and the unit of an exec that has
    /// ended, which keeps the exit status until the record has it. `noted`: whether the last change of the exec is in the record.
    pub(crate) fn after_exec(self: &Arc<Self>, entry: &Entry, process: &Arc<Process>, noted: Noted) {
        self.close_ended_exec(entry, process);
        if noted == Noted::Written {
            exec_share::remove_spec(&self.store, entry, process);
            self.remove_ended_exec(entry, process);
        }
    }

    /// Removes the unit of an exec whose end is recorded, in the background: nothing needs the unit any more, and the
    /// client may still read the output.
    pub(crate) fn remove_ended_exec(self: &Arc<Self>, entry: &Entry, process: &Arc<Process>) {
        if !entry.has_recorded_end(process) {
            return;
        }
        let mut live = process.live();
        if live.unit_stop.is_none() && !live.is_deleted {
            let (manager, unit) = (self.manager.clone(), process.unit.clone());
            let (accept, accepted) = oneshot::channel();
            // systemd unloads the unit when it stops: it does not stay as a failed unit. But it does if somebody has removed its
            // file and systemd has read all units again.
            let done = tokio::spawn(async move {
                let had_file = search_path::has_transient_file(&unit);
                manager.stop_accepted(&unit, accept).await?;
                if !had_file {
                    manager.reset_failed(&unit).await?;
                }
                Ok(())
            });
            live.unit_stop = Some(UnitStop { accepted, done });
        }
    }

    /// Background task: writes the records that could not be written, as soon as they can be. Never returns.
    pub async fn write_pending(self: Arc<Self>) {
        let written = |entry: &Arc<Entry>| {
            for process in entry.execs() {
                exec_share::remove_spec(&self.store, entry, &process);
                self.remove_ended_exec(entry, &process);
            }
        };
        self.tasks.write_pending(written).await;
    }

    /// Rolls back the start of an exec, however far it got. Errors are logged: the caller already has one to return.
    pub(crate) async fn roll_back_start(&self, entry: &Arc<Entry>, process: &Arc<Process>) {
        let failed = |error: Error| {
            tracing::error!(process = %process.key, %error, "{}: its failed start could not be rolled back completely: {error}", process.key);
        };
        let dir = self.store.process_dir(&process.key);
        kill_leftover(entry, &dir);
        let logger = logger_of(entry, process);
        for unit in [Some(process.unit.clone()), logger].into_iter().flatten() {
            // Delete removes what is left.
            let left = remove_unit(&*self.manager, &unit, Stop::Awaited).await;
            if !left.is_empty() {
                failed(Error::NotRemoved { process: process.key.to_string(), reason: left.text() });
            }
        }
        remove_runtime_of_exec(entry, process, true);
        cancel_pumps(process).await;
        self.streams.close_input(entry, process);
        stored_number(entry, process).into_iter().for_each(|number| self.fds.forget_all(number));
        // Another start needs the process spec.
        let cleared = self.clear_exec_dir(process, Some(PROCESS_SPEC));
        cleared.unwrap_or_else(|error| failed(error.into()));
    }

    /// Rolls back a restore, however far it got, so that another Start can be made. The rootfs stays mounted. Errors are
    /// logged: the caller already has one to return.
    pub(crate) async fn roll_back_restore(&self, entry: &Arc<Entry>) {
        let task = entry.task().clone();
        let dir = self.store.dir(&task.key);
        // The OCI runtime and criu may hang. Neither is in the cgroup of the unit.
        launch::cgroup::kill(&task.runtime, task.unit());
        let removal = self.removal(&task, &dir);
        let mut troubles = removal.of_init(std::future::ready(Vec::new())).await;
        troubles.join(removal.of_logger().await);
        // `launch` may have moved there in the meantime.
        launch::cgroup::kill(&task.runtime, task.unit());
        launch::cgroup::remove(&task.runtime, task.unit());
        {
            let mut live = entry.init.live();
            (live.cgroup.watched, live.listening, live.process) = (None, None, None);
        }
        cancel_pumps(&entry.init).await;
        self.fds.forget_all(task.init.wiring.store_number);
        let own = task.init.wiring.own_pipes();
        let files = [LAUNCHED, LAUNCH_ERROR, PID_FILE, NO_INPUT];
        let names: Vec<_> = own.into_iter().chain(files).collect();
        troubles.add(self.store.remove_scratch(&task.key, &names));
        if !troubles.is_empty() {
            let text = troubles.text();
            tracing::error!(task = %task.key, "task {}: its failed restore could not be rolled back completely: {text}", task.key);
        }
    }

    /// Removes the files in the directory of an exec, except its record and the file named `kept`.
    ///
    /// # Errors
    /// A file can't be removed.
    pub(crate) fn clear_exec_dir(&self, process: &Process, kept: Option<&str>) -> Result<(), store::Error> {
        process.exec().map_or(Ok(()), |exec| self.store.clear_exec_dir(&process.key.task, exec, kept))
    }
}

/// The first step of the removal of an exec. Returns the stop of its unit, if that has begun.
fn begin_removal(process: &Process) -> Option<UnitStop> {
    threads::discard(process.live().client_input.take());
    let mut live = process.live();
    live.is_deleted = true;
    live.unit_stop.take()
}

/// Removes the cgroup in the ShimCgroup in which the OCI runtime started an exec. Without a ShimCgroup, the runtime works in the
/// cgroup of the unit. `kills`: the runtime may hang.
fn remove_runtime_of_exec(entry: &Entry, process: &Process, kills: bool) {
    let runtime = Some(&entry.task().runtime).filter(|runtime| runtime.cgroup.is_some()).cloned();
    let Some(runtime) = runtime else {
        return;
    };
    if kills {
        launch::cgroup::kill(&runtime, &process.unit);
    }
    launch::cgroup::remove(&runtime, &process.unit);
}

/// Kills the process that the OCI runtime created before the start failed.
fn kill_leftover(entry: &Entry, dir: &Path) {
    let Some(pid) = read_pid(&dir.join(EXEC_PID_FILE)) else {
        return;
    };
    let Ok(process) = crate::sys::pidfd_open(pid) else {
        return;
    };
    if lives_in(&entry.task(), pid) {
        // The process may have ended by itself.
        let _ = crate::sys::pidfd_send_signal(&process, nix::libc::SIGKILL as u32);
    }
}
