//! Exec: a process added to a task. Adding it, starting it, taking it away.
//!
//! An exec's unit runs `launch`, which has the OCI runtime put the process into the container, makes
//! it the unit's main process, tells the daemon, and leaves. How the process ended is told by systemd,
//! or, for one that was gone before systemd had it, by `launch`.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use tokio::io::AsyncReadExt;
use tokio::net::unix::pipe::Receiver;
use tokio_util::sync::CancellationToken;

use crate::config;
use crate::fault::{self, Point};
use crate::id::{ExecId, ProcessKey};
use crate::launch::contract::{EXEC_PID_FILE, Kind, Outcome, PROCESS_SPEC};
use crate::launch::{command, pipes, report};
use crate::oci::{face, process};
use crate::services::process::{lives_in, read_pid};
use crate::services::registry::{Taken, Verb};
use crate::services::streams::{cut_off, drain, stored_number};
use crate::services::{Attempt, Entry, Error, Process, Shim, blocking, go_on, now_usec};
use crate::session::{OpenStreams, ReopenMode};
use crate::stdio::{fifo, uri};
use crate::store::answers::Deleted;
use crate::supervise::cleanup::{Stop, remove_unit};
use crate::task::Task;
use crate::task::exec::{Exec, ExecEvent, ExecPhase};
use crate::task::outbox::TaskEvent;
use crate::task::phase::{Exit, Seen};
use crate::task::request::Stdio;
use crate::task::wiring::Wiring;
use crate::unit::manager::query::Starting;
use crate::unit::{self, name, properties};

/// An exec that has run for so long is not a probe.
const LONG_EXEC: Duration = Duration::from_secs(2);

/// How long a start may take beside the OCI runtime: a client opens two FIFOs, systemd takes the process over, and
/// both may be slow.
const HANDOVER_LIMIT: Duration =
    config::STDIO_LIMIT.saturating_mul(2).saturating_add(config::BARRIER_LIMIT.saturating_mul(2));

/// An Exec call.
#[derive(Debug)]
pub struct AddExec {
    /// The task, and the exec to be.
    pub key: ProcessKey,
    /// Its stdio strings.
    pub stdio: Stdio,
    /// Its process spec (OCI, JSON).
    pub spec: Vec<u8>,
}

impl Shim {
    /// Notes a process that is to be added to a task. Nothing runs yet.
    ///
    /// # Errors
    /// The id is in use, the spec or the stdio strings are wrong, or the task has ended.
    pub async fn add_exec(self: &Arc<Self>, call: AddExec, attempt: Attempt) -> Result<(), Error> {
        let AddExec { key, stdio, spec } = call;
        let entry = self.tasks.created(&key.task)?;
        if attempt == Attempt::Replayed && entry.process(key.exec.as_ref()).is_some() {
            return Ok(());
        }
        let Some(id) = key.exec.clone().filter(|id| id.as_str() != key.task.id.as_str()) else {
            // Their exits could not be told apart.
            return Err(Error::ExecExists { exec: key.id().to_owned() });
        };
        self.fds.has_room()?;
        let spec = process::Process::read(&spec, stdio.terminal)?;
        let task = entry.task().clone();
        if task.init.is_paused() || !task.init.is_alive() {
            return Err(Error::NoExecIn { phase: task.init.word() });
        }
        let log = task.runtime.log;
        let kept = self.fds.next_number();
        let (stdio, wiring) = blocking(move || {
            let wiring = uri::wiring(&stdio, log, uri::Role::Exec, fifo::kind);
            wiring.map(|wiring| (stdio, Wiring { kept, ..wiring }))
        })
        .await??;
        let description = face::of_exec(&task.face, &id, &spec.args);
        let (process, _verb) = self.register_exec(&entry, &id)?;
        let noted = self.note_exec(&entry, &process, &id, stdio, wiring, description, &spec);
        if noted.is_err() {
            self.tasks.registry.remove_exec(&entry, &id);
            // The first error is the one to report.
            let _ = self.store.remove_exec_dir(&key.task, &id);
        }
        noted
    }

    #[allow(clippy::too_many_arguments)]
    fn note_exec(
        &self,
        entry: &Arc<Entry>,
        process: &Process,
        id: &ExecId,
        stdio: Stdio,
        wiring: Wiring,
        description: String,
        spec: &process::Process,
    ) -> Result<(), Error> {
        let dir = self.store.create_exec_dir(&entry.key, id)?;
        spec.write(&dir.join(PROCESS_SPEC))?;
        fault::point(Point::ExecPrepared);
        let unit = process.unit.clone();
        let logger = wiring.logger.as_ref().map(|_| name::logger(&unit)).transpose()?;
        let exec = Exec { unit, logger, stdio, wiring, description, phase: ExecPhase::Added };
        self.tasks.change(entry, |task| {
            task.execs.insert(id.clone(), Arc::new(exec));
            task.owe(TaskEvent::ExecAdded { exec: id.clone() }, now_usec());
            Ok(Vec::new())
        })?;
        fault::point(Point::ExecNoted);
        Ok(())
    }

    /// Claims the id and a unit's name.
    fn register_exec(&self, entry: &Entry, id: &ExecId) -> Result<(Arc<Process>, Verb), Error> {
        for unit in name::exec_candidates(&entry.init.unit, id) {
            match self.tasks.registry.insert_exec(entry, id, unit, None) {
                Ok(registered) => return Ok(registered),
                Err(Taken::Key) => return Err(Error::ExecExists { exec: id.to_string() }),
                Err(Taken::Unit) => {}
            }
        }
        Err(Error::NoUnitName { key: entry.key.clone() })
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
    async fn conclude_start(
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

    /// Brings the unit up. Returns the process, and how it ended if `launch` was there to see it.
    async fn launch_exec(
        self: &Arc<Self>,
        entry: &Arc<Entry>,
        process: &Arc<Process>,
        id: &ExecId,
    ) -> Result<(u32, Option<Exit>), Error> {
        let task = entry.task().clone();
        let gone = || Error::UnknownExec { key: process.key.clone() };
        let exec = task.execs.get(id).ok_or_else(gone)?;
        let plan = Arc::new(self.plan(entry, process)?);
        let opened = self.open_streams(&plan).await?;
        // A start that fails can be tried again, with the same input. The client does see the end of the output: clients
        // wait for it before they return the error.
        process.live().client_input = opened.client_input()?;
        fault::point(Point::ExecStartOpened);
        let dir = self.store.exec_dir(&entry.key, id);
        let doorbell = open_doorbell(&dir)?;
        process.live().attempt_ended = Arc::default();
        self.begin_exec(&task, exec, process).await?;
        self.see_through(entry, process, &dir, doorbell, opened).await
    }

    /// Asks for the unit.
    async fn begin_exec(&self, task: &Task, exec: &Exec, process: &Process) -> Result<(), Error> {
        let command = self.launcher.command(Kind::Exec, &process.key);
        let environment = command::environment(self.launcher.sealed_runtime(task).await?.as_ref(), None);
        let properties = properties::exec(&exec.description, &command, &environment);
        let mut begun = self.manager.begin_transient(&exec.unit, &properties).await;
        if let Err(unit::error::Error::Exists { .. }) = begun {
            // No exec of ours has this unit: it is what a failed one left behind.
            let left = remove_unit(&*self.manager, &exec.unit, Stop::Awaited).await;
            if !left.is_empty() {
                return Err(Error::NotRemoved { process: process.key.to_string(), reason: left.text() });
            }
            begun = self.manager.begin_transient(&exec.unit, &properties).await;
        }
        if let Err(unit::error::Error::Exists { .. }) = begun
            && self.manager.free_name(&exec.unit).await?
        {
            begun = self.manager.begin_transient(&exec.unit, &properties).await;
        }
        // The job goes on for as long as the process.
        drop(begun?);
        fault::point(Point::ExecStartBegun);
        self.launcher.warm_up();
        Ok(())
    }

    /// Waits for the outcome of a start, and connects the process's streams.
    async fn see_through(
        self: &Arc<Self>,
        entry: &Arc<Entry>,
        process: &Arc<Process>,
        dir: &Path,
        doorbell: Receiver,
        opened: OpenStreams,
    ) -> Result<(u32, Option<Exit>), Error> {
        let (pid, exit) = match self.outcome(entry, process, dir, doorbell).await? {
            Outcome::Started { pid } => (pid, None),
            Outcome::Ended { pid, exit } => (pid, Some(exit)),
            Outcome::Failed { reason } => return Err(Error::Launch(reason)),
        };
        fault::point(Point::ExecStartOutcome);
        if exit.is_none() {
            self.hold_exec(entry, process, pid);
            self.let_boot_finish(entry, process);
        }
        self.start_session(entry, process, opened).await?;
        fault::point(Point::ExecStartPumping);
        Ok((pid, exit))
    }

    /// What became of a start: known when the bell rings, or when the unit has ended. A start that is not wanted any
    /// more, or takes too long, has failed.
    async fn outcome(
        &self,
        entry: &Entry,
        process: &Process,
        dir: &Path,
        mut doorbell: Receiver,
    ) -> Result<Outcome, Error> {
        let (unit, mut nothing) = (&process.unit, [0]);
        let (ended, given_up) = {
            let live = process.live();
            (live.attempt_ended.clone(), live.given_up.clone())
        };
        // `launch` keeps the runtime's limit itself.
        let limit = entry.task().runtime.limit() + HANDOVER_LIMIT;
        let too_long = tokio::time::sleep(limit);
        let init_is_gone = Self::init_is_gone(entry);
        tokio::pin!(too_long, init_is_gone);
        loop {
            if let Some(outcome) = report::read(dir)? {
                return Ok(outcome);
            }
            tokio::select! {
                rung = doorbell.read(&mut nothing) => drop(rung.map_err(Error::Watch)?),
                () = ended.notified() => {
                    // It may be the end of an earlier unit with this name that is heard of late.
                    let under_way = self.manager.starting(unit).await? == Starting::UnderWay;
                    if !under_way && report::read(dir)?.is_none() {
                        return Err(Error::Launch(format!("OCI runtime exec failed: see systemctl status {unit}")));
                    }
                }
                () = given_up.cancelled() => return Err(Error::GivenUp { process: process.key.clone() }),
                () = &mut init_is_gone => return Err(Error::InitGone { key: entry.key.clone() }),
                () = &mut too_long => return Err(Error::StartTimedOut { unit: unit.to_string(), limit }),
            }
        }
    }

    /// The unit's start job lasts as long as the process, and systemd does not take a boot for finished
    /// while there are jobs (manager.c, `manager_check_finished`): that of a long exec is taken away.
    fn let_boot_finish(self: &Arc<Self>, entry: &Arc<Entry>, process: &Arc<Process>) {
        let (shim, entry, process) = (self.clone(), Arc::downgrade(entry), process.clone());
        tokio::spawn(async move {
            tokio::time::sleep(LONG_EXEC).await;
            let ended = entry.upgrade().is_none_or(|entry| Self::has_ended(&entry, &process));
            if !ended && let Err(error) = shim.manager.forget_job(&process.unit).await {
                tracing::warn!(process = %process.key, %error, "{}: its start job stays: {error}", process.key);
            }
        });
    }

    fn has_ended(entry: &Entry, process: &Process) -> bool {
        let id = process.key.exec.as_ref();
        id.is_some_and(|id| entry.task().execs.get(id).is_some_and(|exec| exec.phase.exit().is_some()))
    }

    /// Lets go of what only a live exec needs.
    pub(crate) fn after_exec(&self, entry: &Entry, process: &Process) {
        if Self::has_ended(entry, process) {
            self.close_input(entry, process);
            process.live().process = None;
        }
    }

    /// Nothing needs the unit of an exec that systemd has seen the end of: it goes while the client
    /// still reads.
    pub(crate) fn remove_ended_exec(self: &Arc<Self>, entry: &Entry, process: &Arc<Process>) {
        let mut live = process.live();
        if live.removal.is_none() && Self::has_ended(entry, process) {
            let (shim, unit) = (self.clone(), process.unit.clone());
            // It never counts as a failed one: with the stop it is unloaded.
            live.removal = Some(tokio::spawn(async move { Ok(shim.manager.stop(&unit).await?) }));
        }
    }

    /// Removes an exec that does not run. Returns the process that it was, and how it ended; nothing
    /// of both for one that never ran. One that is being started is given up: its client has gone away, as a probe
    /// does after its timeout, and the start may hang in the container.
    ///
    /// # Errors
    /// It runs, or something can't be taken away; it can be called again then.
    pub(crate) async fn delete_exec(
        self: &Arc<Self>,
        key: &ProcessKey,
        id: &ExecId,
    ) -> Result<Deleted, Error> {
        let (entry, process) = self.tasks.process(key)?;
        let phase = entry.task().execs.get(id).map(|exec| exec.phase.clone());
        if let Some(ExecPhase::Added | ExecPhase::Starting { .. }) = phase {
            process.live().given_up.cancel();
        }
        let deleted = self.delete_idle_exec(&entry, &process, key, id).await;
        if deleted.is_err() {
            process.live().given_up = CancellationToken::new();
        }
        deleted
    }

    async fn delete_idle_exec(
        self: &Arc<Self>,
        entry: &Arc<Entry>,
        process: &Arc<Process>,
        key: &ProcessKey,
        id: &ExecId,
    ) -> Result<Deleted, Error> {
        let _verb = process.verb.lock().await;
        // Another Delete may have been first.
        self.tasks.process(key)?;
        let unknown = || Error::UnknownExec { key: key.clone() };
        let phase = entry.task().execs.get(id).map(|exec| exec.phase.clone()).ok_or_else(unknown)?;
        if phase.is_live() {
            return Err(Error::NotDeletable { phase: "running" });
        }
        fault::point(Point::ExecDeleteBegun);
        drain(process).await;
        let troubles = self.remove_exec(entry, process, id).await;
        if !troubles.is_empty() {
            return Err(Error::NotRemoved { process: key.to_string(), reason: troubles.text() });
        }
        fault::point(Point::ExecDeleteUnit);
        let deleted = Deleted { pid: phase.pid().unwrap_or_default(), exit: phase.exit() };
        self.answers.keep(key, deleted)?;
        fault::point(Point::ExecDeleteKept);
        self.tasks.change(entry, |task| {
            task.execs.remove(id);
            Ok(Vec::new())
        })?;
        self.tasks.registry.remove_exec(entry, id);
        fault::point(Point::ExecDeleteForgotten);
        Ok(deleted)
    }

    /// After a restart: goes on with a start that was cut off, or takes it back; holds what runs.
    pub(crate) async fn recover_exec(
        self: &Arc<Self>,
        entry: &Arc<Entry>,
        process: &Arc<Process>,
        id: &ExecId,
    ) {
        let phase = entry.task().execs.get(id).map(|exec| exec.phase.clone());
        match phase {
            Some(ExecPhase::Starting { .. }) => {
                let (shim, entry, id) = (self.clone(), entry.clone(), id.clone());
                let starting = process.clone();
                go_on(process, |taken| async move {
                    shim.resume_start(&entry, &starting, &id, taken).await;
                })
                .await;
            }
            Some(ExecPhase::Running { pid }) => {
                self.hold_exec(entry, process, pid);
                self.let_boot_finish(entry, process);
            }
            Some(ExecPhase::Added | ExecPhase::Stopped { .. }) | None => {}
        }
        self.after_exec(entry, process);
    }

    /// Sees a start through that an earlier daemon has begun: what it has begun is not begun twice.
    /// `taken` hears when what was kept of its streams is taken over.
    async fn resume_start(
        self: &Arc<Self>,
        entry: &Arc<Entry>,
        process: &Arc<Process>,
        id: &ExecId,
        taken: tokio::sync::oneshot::Sender<()>,
    ) {
        let resumed = async {
            let dir = self.store.exec_dir(&entry.key, id);
            // Before looking: from now on it rings here.
            let doorbell = open_doorbell(&dir)?;
            let starting = self.manager.starting(&process.unit).await?;
            let known = report::read(&dir)?.is_some();
            let task = entry.task().clone();
            let gone = || Error::UnknownExec { key: process.key.clone() };
            let plan = Arc::new(self.plan(entry, process)?);
            let mut opened = self.reopen_streams(plan.clone(), ReopenMode::Starting).await?;
            // Nobody waits any more if the daemon ends.
            let _ = taken.send(());
            match starting {
                _ if known => {}
                Starting::UnderWay => {}
                // It was not begun yet. The client's end of its streams is open: it must see no end now.
                Starting::NotBegun => {
                    let exec = task.execs.get(id).ok_or_else(gone)?;
                    self.resume_logger(&plan, &mut opened).await?;
                    self.begin_exec(&task, exec, process).await?;
                }
                Starting::Over => {
                    return Err(Error::Launch(format!("see systemctl status {}", process.unit)));
                }
            }
            self.see_through(entry, process, &dir, doorbell, opened).await
        };
        let resumed = resumed.await;
        if let Err(error) = self.conclude_start(entry, process, id, resumed).await {
            tracing::warn!(process = %process.key, %error, "{}: a start that was cut off is taken back: {error}", process.key);
        }
        let looked = self.look_at_exec(entry, process, id).await;
        if let Err(error) = looked {
            tracing::warn!(process = %process.key, %error, "{}: can't look at its unit: {error}", process.key);
        }
    }

    /// Undoes a Start of an exec, however far it came. What can't be undone is logged: the caller has
    /// an error to report already.
    async fn take_back_exec(&self, entry: &Arc<Entry>, process: &Arc<Process>, id: &ExecId) {
        let failed = |error: Error| {
            tracing::error!(process = %process.key, %error, "{}: can't take back all of a failed start: {error}", process.key);
        };
        let dir = self.store.exec_dir(&entry.key, id);
        self.kill_leftover(entry, &dir);
        let logger = entry.task().execs.get(id).and_then(|exec| exec.logger.clone());
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
        let cleared = self.store.clear_exec_dir(&entry.key, id, Some(PROCESS_SPEC));
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
}

/// Makes the FIFO by which `launch` says that it is through. Nothing is written to it: that it is
/// opened and closed is the news.
fn open_doorbell(dir: &Path) -> Result<Receiver, Error> {
    let path = dir.join(pipes::DOORBELL);
    if fifo::kind(&path) != uri::Kind::Fifo {
        fifo::make(&path)?;
    }
    Receiver::from_file(fifo::open_reader(&path)?).map_err(Error::Watch)
}
