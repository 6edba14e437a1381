//! Start: lets a created container's process run, or an exec.

use std::sync::Arc;

use crate::cgroup::limits::is_frozen;
use crate::fault::{self, Point};
use crate::id::{ExecId, ProcessKey, TaskKey};
use crate::oci::runtime;
use crate::services::{Attempt, Entry, Error, Process, Shim, blocking};
use crate::task::exec::ExecEvent;
use crate::task::phase::{Event, Exit, Refusal, Seen};

use super::kill::kill_all;

impl Shim {
    /// Starts a process; returns it.
    ///
    /// # Errors
    /// It is not in the phase for that, or the OCI runtime fails; then it stays as it was.
    pub async fn start(self: &Arc<Self>, key: &ProcessKey, attempt: Attempt) -> Result<u32, Error> {
        match &key.exec {
            None => self.start_init(&key.task, attempt).await,
            Some(exec) => self.start_exec(key, exec, attempt).await,
        }
    }

    async fn start_init(self: &Arc<Self>, key: &TaskKey, attempt: Attempt) -> Result<u32, Error> {
        let entry = self.tasks.created(key)?;
        let _verb = entry.init.verb.lock().await;
        let phase = entry.task().init.clone();
        if let (Attempt::Replayed, true, Some(pid)) = (attempt, phase.has_run(), phase.pid()) {
            return Ok(pid);
        }
        let task = entry.task().clone();
        if task.cgroup.as_deref().map(is_frozen).transpose()?.flatten() == Some(true) {
            // The OCI runtime would wait for it until somebody thaws it.
            return Err(Error::Refused(Refusal { verb: "start", phase: "paused" }));
        }
        self.tasks.apply(&entry, Event::StartBegun)?;
        fault::point(Point::StartRecorded);
        let dir = self.store.dir(key);
        let cli = runtime::Cli::of(&task, &dir);
        let started = tokio::select! {
            started = self.oci.start(&cli) => started.map_err(Error::from),
            () = Self::init_is_gone(&entry) => Err(Error::InitGone { key: key.clone() }),
        };
        if started.is_err() && !cli.waits_for_start() {
            // It has been let go, and nobody says so: it ends, as runc has it end when a poststart hook fails.
            let task = task.clone();
            blocking(move || kill_all(&task, nix::libc::SIGKILL as u32)).await??;
        }
        fault::point(Point::StartDone);
        let event = if started.is_ok() { Event::Started } else { Event::StartFailed };
        self.tasks.note_event(&entry, event)?;
        started?;
        fault::point(Point::StartNoted);
        // It may have been frozen meanwhile.
        self.note_freezer(&entry);
        Ok(task.init.pid().unwrap_or_default())
    }

    /// Starts an exec; returns its process.
    ///
    /// # Errors
    /// It has been started, its task has ended, or it can't be started; then it can be tried again.
    pub(crate) async fn start_exec(
        self: &Arc<Self>,
        key: &ProcessKey,
        id: &ExecId,
        attempt: Attempt,
    ) -> Result<u32, Error> {
        let (entry, process) = self.tasks.process(key)?;
        let _verb = process.verb.lock().await;
        let started = entry.task().execs.get(id).and_then(|exec| exec.phase.pid());
        if let (Attempt::Replayed, Some(pid)) = (attempt, started) {
            return Ok(pid);
        }
        let task = entry.task().clone();
        if !task.init.is_alive() {
            return Err(Error::InitGone { key: key.task.clone() });
        }
        if task.init.is_paused() {
            // The OCI runtime would wait in it until somebody thaws it.
            return Err(Error::NoExecIn { phase: task.init.word() });
        }
        if process.live().given_up.is_cancelled() {
            // A Delete waits. The same Start, replayed after a restart, may come between it and a start that hung.
            return Err(Error::GivenUp { process: key.clone() });
        }
        self.tasks.apply_exec(&entry, id, ExecEvent::StartBegun)?;
        fault::point(Point::ExecStartRecorded);
        let started = self.launch_exec(&entry, &process, id).await;
        self.conclude_start(&entry, &process, id, started).await
    }

    /// The last step of a start: notes what became of it.
    pub(super) async fn conclude_start(
        self: &Arc<Self>,
        entry: &Arc<Entry>,
        process: &Arc<Process>,
        id: &ExecId,
        started: Result<(u32, Option<Exit>), Error>,
    ) -> Result<u32, Error> {
        match started {
            Ok((pid, exit)) => {
                self.tasks.note_exec_event(entry, id, ExecEvent::Started { pid })?;
                if let Some(exit) = exit {
                    self.tasks.note_exec_event(
                        entry,
                        id,
                        ExecEvent::Exited(Seen { pid: Some(pid), exit }),
                    )?;
                }
                fault::point(Point::ExecStartNoted);
                self.after_exec(entry, process);
                Ok(pid)
            }
            Err(error) => {
                self.take_back_exec(entry, process, id).await;
                self.tasks.note_exec_event(entry, id, ExecEvent::StartFailed)?;
                Err(error)
            }
        }
    }
}
