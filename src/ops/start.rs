//! Start: lets the process of a created container run, or starts an exec.

use std::sync::Arc;

use tokio_util::sync::CancellationToken;

use crate::cgroup::limits::is_frozen;
use crate::fault::{self, Point};
use crate::id::ProcessKey;
use crate::oci::runtime;
use crate::oci::state::State;
use crate::services::process::init_is_gone;
use crate::services::{Delivery, Entry, Error, Process, exec_share};
use crate::sys;
use crate::task::Task;
use crate::task::lifecycle::{Event, Exit, ObservedExit, Refusal};

use super::Shim;
use super::kill::end_all;

impl Shim {
    /// Starts a process. Returns its pid.
    ///
    /// # Errors
    /// The phase does not allow it, the task has ended, or the start fails. A failed start can be repeated.
    pub async fn start(self: &Arc<Self>, key: &ProcessKey, delivery: Delivery) -> Result<u32, Error> {
        let (entry, process) = self.tasks.process(key)?;
        let _verb = process.verb.lock().await;
        let task = entry.task().clone();
        let recorded = task.process(process.exec()).map(|process| (process.has_run(), process.pid()));
        if let (Delivery::Replayed, Some((true, Some(pid)))) = (delivery, recorded) {
            return Ok(pid);
        }
        self.check_failure(key, self.store.process_dir(key), delivery).await?;
        let restores = process.exec().is_none() && task.request.checkpoint.is_some();
        if restores {
            process.live().attempt.interrupted = CancellationToken::new();
        }
        self.tasks.change(&entry, |task| {
            may_start(task, &process)?;
            let ended = task.apply(process.exec(), Event::StartBegun, sys::now_usec())?;
            self.has_room_for(task, &process)?;
            Ok(ended)
        })?;
        if restores {
            return self.restore_init(&entry, &task).await;
        }
        let started = match process.exec() {
            None => self.release_init(&entry, &task).await.map(|pid| (pid, None)),
            Some(id) => self.launch_exec(&entry, &process, id).await,
        };
        if let Err(error) = &started {
            self.note_failure(key, self.store.process_dir(key), error).await;
        }
        let concluded = self.conclude_start(&entry, &process, started).await;
        if concluded.is_err() {
            fault::point(Point::StartUndone);
        }
        concluded
    }

    /// Checks whether the streams of an exec, or of a container that is restored, have room. Those of any other container were
    /// opened by its Create.
    fn has_room_for(&self, task: &Task, process: &Process) -> Result<(), Error> {
        if process.exec().is_none() && task.request.checkpoint.is_none() {
            return Ok(());
        }
        self.fds.has_room()?;
        let Some((id, exec)) = process.exec().and_then(|id| task.execs.get_key_value(id)) else {
            return Ok(());
        };
        Ok(exec_share::check_streams(task, id, &exec.wiring, &self.fds)?)
    }

    /// Asks the OCI runtime to release the waiting init process.
    async fn release_init(&self, entry: &Entry, task: &Task) -> Result<u32, Error> {
        fault::point(Point::StartRecorded);
        let gone = || Error::InitGone { key: task.key.clone() };
        let pid = task.init.pid().ok_or_else(gone)?;
        let dir = self.store.dir(&task.key);
        let cli = runtime::Cli::of(task, &dir);
        let given_up = entry.init.live().attempt.given_up.clone();
        let ended_unreleased = async {
            init_is_gone(entry).await;
            // The command of an init that was released may still run hooks. It has a time limit of its own.
            if let Ok(false) = self.runtime_files.state(task, State::waits_for_start).await {
                std::future::pending::<()>().await;
            }
        };
        let started = tokio::select! {
            started = self.oci.start(&cli) => started.map_err(Error::from),
            () = ended_unreleased => Err(gone()),
            () = given_up.cancelled() => Err(Error::GivenUp { process: entry.init.key.clone() }),
        };
        // If the disk with the runtime's state does not answer, init stays: another Start finds out whether it was released.
        if started.is_err()
            && let Ok(false) = self.runtime_files.state(task, State::waits_for_start).await
        {
            // The runtime has released init and failed afterwards: kill it, as runc does when a poststart hook fails.
            end_all(entry, task).await?;
        }
        fault::point(Point::StartDone);
        started.map(|()| pid)
    }

    /// The last step of a start: records the result. The process may have ended already.
    pub(crate) async fn conclude_start(
        self: &Arc<Self>,
        entry: &Arc<Entry>,
        process: &Arc<Process>,
        started: Result<(u32, Option<Exit>), Error>,
    ) -> Result<u32, Error> {
        let (pid, exit) = match started {
            Ok(started) => started,
            Err(error) => {
                if process.exec().is_some() {
                    self.cleanup.roll_back_start(entry, process).await;
                }
                self.tasks.note_event(entry, process, Event::StartFailed)?;
                return Err(error);
            }
        };
        // The start and the end are recorded in one write: systemd does not know this process if it ended before the
        // handover. A daemon that finds only its start in the record would never learn of its end.
        let exited = exit.map(|exit| Event::Exited(ObservedExit { pid: Some(pid), exit }));
        let has_started = match process.exec() {
            None => Event::InitStarted,
            Some(_) => Event::ExecStarted { pid },
        };
        let noted = self.tasks.note(entry, |task| {
            let mut ended = Vec::new();
            for event in exited.into_iter().chain([has_started]) {
                ended.extend(task.apply(process.exec(), event, sys::now_usec())?);
            }
            Ok(ended)
        })?;
        if process.exec().is_some() {
            fault::point(Point::ExecStartNoted);
            // The exec may have ended by now.
            self.cleanup.after_exec(entry, process, noted);
        } else {
            fault::point(Point::StartNoted);
            // The container may have been frozen meanwhile.
            self.cgroups.note_freezer(entry);
        }
        self.units.query_if_due(entry, process);
        Ok(pid)
    }
}

/// Checks everything that can prevent a start, except the phase of the process itself.
fn may_start(task: &Task, process: &Process) -> Result<(), Error> {
    if process.exec().is_none() {
        // The OCI runtime would wait in a frozen cgroup until somebody thaws it.
        let is_frozen = task.cgroup().map(is_frozen).transpose()?.flatten() == Some(true);
        let refusal = Refusal { verb: "start", phase: "paused" };
        return if is_frozen { Err(Error::Refused(refusal)) } else { Ok(()) };
    }
    if !task.init.is_alive() {
        return Err(Error::InitGone { key: task.key.clone() });
    }
    if task.init.phase.is_paused() {
        return Err(Error::NoExecIn { phase: task.init.word() });
    }
    if process.live().attempt.given_up.is_cancelled() {
        // A Delete waits for the lock. A replay of this Start may get the lock before the Delete does.
        return Err(Error::GivenUp { process: process.key.clone() });
    }
    Ok(())
}
