//! Cleanup: the one procedure that removes what a task, or an exec, has outside of the daemon: for Delete, for
//! what failed half-way, and for the `delete` command.
//!
//! Every step is tried, whatever became of the one before. What could not be removed is said, and the record
//! stays: the same steps can be taken again, and find what is left.

use std::fmt::Display;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use crate::fault::{self, Point};
use crate::id::UnitName;
use crate::launch;
use crate::launch::contract::{EXEC_PID_FILE, PROCESS_SPEC};
use crate::oci::mount;
use crate::oci::runtime::{self, OciRuntime};
use crate::services::process::{lives_in, read_pid};
use crate::services::streams::{cut_off, drain, stored_number};
use crate::services::{Entry, Error, Process, Shim, blocking};
use crate::store;
use crate::task::Task;
use crate::unit::systemd::Systemd;

/// What could not be removed, in words.
#[derive(Debug, Default)]
pub struct Troubles(Vec<String>);

impl Troubles {
    /// Notes what became of a step.
    pub fn add<E: Display>(&mut self, step: Result<(), E>) {
        self.0.extend(step.err().map(|error| error.to_string()));
    }

    /// Adds those of other steps.
    pub fn join(&mut self, other: Self) {
        self.0.extend(other.0);
    }

    /// True if everything could be removed.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// All of them, in one line.
    pub fn text(&self) -> String {
        self.0.join("; ")
    }
}

/// Whether a unit's end is waited for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stop {
    /// It is, which takes somebody who listens to systemd.
    Awaited,
    /// Its processes are killed, and it is left to systemd.
    Killed,
}

/// Removes what a task has outside of the daemon: the runtime's state, the units, the mounts. `others` are the
/// units of its execs and of their loggers, known once nothing copies output any more.
pub async fn remove_task(
    manager: &dyn Systemd,
    oci: &dyn OciRuntime,
    task: &Task,
    dir: &Path,
    stop: Stop,
    others: impl Future<Output = Vec<UnitName>>,
) -> Troubles {
    let mut troubles = Troubles::default();
    if stop == Stop::Killed {
        // The OCI runtime removes what has ended.
        troubles.add(manager.kill_all(task.unit(), nix::libc::SIGKILL).await);
    }
    let cli = runtime::Cli::of(task, dir);
    if cli.knows() {
        troubles.add(oci.delete(&cli).await);
    }
    fault::point(Point::DeleteRuntime);
    for unit in others.await {
        troubles.join(remove_unit(manager, &unit, stop).await);
    }
    let removed = remove_unit(manager, task.unit(), stop).await;
    if removed.is_empty() {
        // Last: with the reference the unit goes.
        manager.release(task.unit()).await;
    }
    troubles.join(removed);
    fault::point(Point::DeleteUnit);
    if let Some(logger) = &task.init.logger {
        troubles.join(remove_unit(manager, logger, stop).await);
    }
    if task.rootfs_on_host {
        let rootfs = task.request.bundle.join("rootfs");
        match blocking(move || mount::unmount_all(&rootfs)).await {
            Ok(unmounted) => troubles.add(unmounted),
            Err(error) => troubles.add(Err(error)),
        }
    }
    troubles
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

/// systemd forgets this file of a transient unit (252 to 262), and the next unit of that name would
/// get the fields in it.
fn remove_log_fields(unit: &UnitName) {
    let path = Path::new("/run/systemd/units").join(format!("log-extra-fields:{unit}"));
    // Not there is what we want.
    let _ = std::fs::remove_file(path);
}

impl Shim {
    /// Removes what a task has outside of the daemon. What its clients have not read by now of its execs' output
    /// is lost, as with containerd-shim-runc-v2.
    pub(crate) async fn remove_container(&self, task: &Task, entry: &Arc<Entry>) -> Troubles {
        let mut in_execs = Troubles::default();
        let others = async {
            entry.init.live().watched = None;
            entry.init.live().listening = None;
            drain(&entry.init).await;
            for process in entry.execs() {
                cut_off(&process).await;
                in_execs.join(self.remove_exec(entry, &process).await);
            }
            Vec::new()
        };
        let dir = self.store.dir(&task.key);
        let mut troubles = remove_task(&*self.manager, &*self.oci, task, &dir, Stop::Awaited, others).await;
        troubles.join(in_execs);
        if task.request.rootfs.iter().any(mount::leaves_a_daemon) {
            launch::cgroup::kill(task.unit());
        }
        launch::cgroup::remove(task.unit());
        troubles
    }

    /// Removes what an exec that has ended, or never ran, has outside of the daemon's memory.
    pub(crate) async fn remove_exec(&self, entry: &Entry, process: &Process) -> Troubles {
        let mut troubles = Troubles::default();
        process.live().client_input = None;
        let removal = process.live().removal.take();
        let removed = match removal {
            Some(removal) => removal.await.is_ok_and(|removed| removed.is_ok()),
            None => false,
        };
        if !removed {
            troubles.join(remove_unit(&*self.manager, &process.unit, Stop::Awaited).await);
        }
        let logger = entry.task().process(process.exec()).and_then(|exec| exec.logger.clone());
        if let Some(logger) = logger {
            troubles.join(remove_unit(&*self.manager, &logger, Stop::Awaited).await);
        }
        if troubles.is_empty() {
            // Its record goes when the Delete is answered.
            troubles.add(self.clear_exec_dir(process, None));
        }
        troubles
    }

    /// Background task: tries again and again to remove what failed Creates have left, less often the longer it takes.
    /// Never returns.
    pub async fn remove_leftovers(self: Arc<Self>) {
        const SHORTEST: Duration = Duration::from_secs(10);
        const LONGEST: Duration = Duration::from_secs(300);
        let mut pause = SHORTEST;
        loop {
            tokio::time::sleep(pause).await;
            let all = self.tasks.registry.all();
            let mut is_left = false;
            for entry in all.iter().filter(|entry| entry.task().is_leftover) {
                is_left |= self.remove_leftover(entry).await.is_err();
            }
            pause = if is_left { LONGEST.min(pause * 2) } else { SHORTEST };
        }
    }

    /// Undoes a Create, however far it came. What can't be undone now is marked in the record: it is tried again
    /// after a while, when the id is used again, when containerd gives the task up, and when the daemon starts.
    pub(crate) async fn take_back(self: &Arc<Self>, entry: &Arc<Entry>) {
        let task = entry.task().clone();
        // The OCI runtime may hang in it, and so may its hooks and mounts: none of them is in the unit's cgroup.
        launch::cgroup::kill(task.unit());
        let mut troubles = self.remove_container(&task, entry).await;
        // `launch` may just have been on its way there.
        launch::cgroup::kill(task.unit());
        if troubles.is_empty() {
            troubles.add(self.store.remove(&task.key));
        }
        if troubles.is_empty() {
            self.fds.forget_all(task.init.wiring.kept);
            self.tasks.remove(&task.key);
            return;
        }
        let text = troubles.text();
        tracing::error!(task = %task.key, "task {}: not all of a failed create can be removed yet: {text}", task.key);
        // A note of this kind is never refused.
        let _ = self.tasks.note(entry, |task| {
            task.is_leftover = true;
            Ok(Vec::new())
        });
    }

    /// Tries again to remove what a failed Create has left.
    ///
    /// # Errors
    /// Something is still left.
    pub(crate) async fn remove_leftover(self: &Arc<Self>, entry: &Arc<Entry>) -> Result<(), Error> {
        let _verb = entry.init.verb.lock().await;
        let is_there = || self.tasks.is_live(entry);
        if is_there() && entry.task().is_leftover {
            self.take_back(entry).await;
            if is_there() {
                return Err(Error::Leftover { key: entry.key.clone() });
            }
        }
        Ok(())
    }

    /// Lets go of what only a live exec needs.
    pub(crate) fn after_exec(&self, entry: &Entry, process: &Process) {
        if process.exec().is_some() && entry.has_recorded_end(process) {
            self.close_input(entry, process);
            process.live().process = None;
        }
    }

    /// Nothing needs the unit of an exec that systemd has seen the end of: it goes while the client
    /// still reads.
    pub(crate) fn remove_ended_exec(self: &Arc<Self>, entry: &Entry, process: &Arc<Process>) {
        let mut live = process.live();
        if live.removal.is_none() && entry.has_recorded_end(process) {
            let (shim, unit) = (self.clone(), process.unit.clone());
            // It never counts as a failed one: with the stop it is unloaded.
            live.removal = Some(tokio::spawn(async move { Ok(shim.manager.stop(&unit).await?) }));
        }
    }

    /// Undoes a Start of an exec, however far it came. What can't be undone is logged: the caller has
    /// an error to report already.
    pub(crate) async fn take_back_start(&self, entry: &Arc<Entry>, process: &Arc<Process>) {
        let failed = |error: Error| {
            tracing::error!(process = %process.key, %error, "{}: can't take back all of a failed start: {error}", process.key);
        };
        let dir = self.store.process_dir(&process.key);
        self.kill_leftover(entry, &dir);
        let logger = entry.task().process(process.exec()).and_then(|exec| exec.logger.clone());
        for unit in [Some(process.unit.clone()), logger].into_iter().flatten() {
            // What is left is removed with the exec.
            let left = remove_unit(&*self.manager, &unit, Stop::Awaited).await;
            if !left.is_empty() {
                failed(Error::NotRemoved { process: process.key.to_string(), reason: left.text() });
            }
        }
        cut_off(process).await;
        self.close_input(entry, process);
        stored_number(entry, process).into_iter().for_each(|number| self.fds.forget_all(number));
        // Its process spec stays, for another try.
        let cleared = self.clear_exec_dir(process, Some(PROCESS_SPEC));
        cleared.unwrap_or_else(|error| failed(error.into()));
    }

    /// Ends a process that the OCI runtime has made for a start that failed afterwards.
    fn kill_leftover(&self, entry: &Entry, dir: &Path) {
        let Some(pid) = read_pid(&dir.join(EXEC_PID_FILE)) else {
            return;
        };
        let Ok(process) = crate::sys::pidfd_open(pid) else {
            return;
        };
        if lives_in(&entry.task(), pid) {
            // It may end by itself just now.
            let _ = crate::sys::pidfd_send_signal(&process, nix::libc::SIGKILL as u32);
        }
    }

    fn clear_exec_dir(&self, process: &Process, kept: Option<&str>) -> Result<(), store::Error> {
        process.exec().map_or(Ok(()), |exec| self.store.clear_exec_dir(&process.key.task, exec, kept))
    }
}
