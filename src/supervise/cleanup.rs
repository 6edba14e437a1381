//! Cleanup by the daemon: removes tasks and execs, and what failed operations have left, by the steps of [`removal`](super::removal).

use std::path::Path;
use std::sync::Arc;

use tokio::sync::oneshot;
use tokio::task::JoinHandle;

use crate::launch;
use crate::launch::contract::{EXEC_PID_FILE, LAUNCH_ERROR, LAUNCHED, PID_FILE, PROCESS_SPEC};
use crate::launch::pipes::NO_INPUT;
use crate::oci::mount_options;
use crate::oci::runtime::OciRuntime;
use crate::services::changes::Noted;
use crate::services::files::SlowFiles;
use crate::services::launcher::Launcher;
use crate::services::live::UnitStop;
use crate::services::own_unit::OwnUnit;
use crate::services::process::{lives_in, read_pid};
use crate::services::runtime_files::RuntimeFiles;
use crate::services::streams::{Streams, cancel_pumps, stored_number};
use crate::services::{Entry, Error, Process, Tasks, exec_share};
use crate::session::fds::StreamFds;
use crate::stdio::threads;
use crate::store::{self, Store};
use crate::task::Task;
use crate::unit::search_path;
use crate::unit::systemd::Systemd;

use super::removal::{Removal, Stop, Troubles, remove_unit};

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
    pub(crate) files: SlowFiles,
    /// Runs work on the files of OCI runtimes.
    pub(crate) runtime_files: RuntimeFiles,
    /// Removes the cgroups in which processes were started.
    pub(crate) launcher: Arc<Launcher>,
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
            launch::cgroup::kill(&task.runtime, task.unit()).await;
        }
        self.launcher.remove_cgroup(&task.runtime, task.unit()).await;
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
            let unit = self.unit_of(entry, process);
            troubles.join(remove_unit(&*self.manager, &unit, Stop::Awaited).await);
        }
        self.remove_runtime_of_exec(entry, process, false).await;
        troubles
    }

    /// Rolls back a Create, however far it got. If something can't be removed, the record stays and is marked: the daemon
    /// tries again after a while, when the id is used again, when containerd gives the task up, and when it starts.
    pub(crate) async fn roll_back_create(self: &Arc<Self>, entry: &Arc<Entry>) {
        let task = entry.task().clone();
        // The OCI runtime, its hooks and its mounts may hang. None of them is in the cgroup of the unit.
        launch::cgroup::kill(&task.runtime, task.unit()).await;
        let mut troubles = self.remove_container(&task, entry).await;
        // `launch` may have moved there in the meantime.
        launch::cgroup::kill(&task.runtime, task.unit()).await;
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
            // systemd unloads a unit that has stopped. A unit that has failed stays loaded if somebody has removed its file and
            // systemd has read all units again.
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
        for unit in [Some(self.unit_of(entry, process)), logger].into_iter().flatten() {
            // Delete removes what is left.
            let left = remove_unit(&*self.manager, &unit, Stop::Awaited).await;
            if !left.is_empty() {
                failed(Error::NotRemoved { process: process.key.to_string(), reason: left.text() });
            }
        }
        self.remove_runtime_of_exec(entry, process, true).await;
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
        launch::cgroup::kill(&task.runtime, task.unit()).await;
        let removal = self.removal(&task, &dir);
        let mut troubles = removal.of_init(std::future::ready(Vec::new())).await;
        troubles.join(removal.of_logger().await);
        // `launch` may have moved there in the meantime.
        launch::cgroup::kill(&task.runtime, task.unit()).await;
        self.launcher.remove_cgroup(&task.runtime, task.unit()).await;
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

    /// The unit of an exec.
    fn unit_of(&self, entry: &Entry, process: &Process) -> OwnUnit {
        // Only an exec that has run is deleted, with its record, while its unit is still being stopped.
        let has_run = entry.task().process(process.exec()).is_none_or(|exec| exec.pid().is_some());
        let dir = self.store.process_dir(&process.key);
        OwnUnit::of(process.key.clone(), process.unit.clone(), dir, has_run)
    }

    /// Removes the cgroup in the ShimCgroup in which the OCI runtime started an exec. Without a ShimCgroup, the runtime works in
    /// the cgroup of the unit. `kills`: the runtime may hang.
    async fn remove_runtime_of_exec(&self, entry: &Entry, process: &Process, kills: bool) {
        let runtime = entry.task().runtime.clone();
        if runtime.cgroup.is_none() {
            return;
        }
        if kills {
            launch::cgroup::kill(&runtime, &process.unit).await;
        }
        self.launcher.remove_cgroup(&runtime, &process.unit).await;
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

/// The unit of the logger of a process, if the process has one.
fn logger_of(entry: &Entry, process: &Process) -> Option<OwnUnit> {
    OwnUnit::recorded_logger(process.key.clone(), entry.task().process(process.exec())?)
}
