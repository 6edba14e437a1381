//! The start of an exec.
//!
//! An exec's unit runs `launch`. `launch` lets the OCI runtime put the process into the container, makes the process
//! the unit's main process, reports to the daemon and exits. systemd reports the end of the process. If the process
//! ended before systemd took it over, `launch` reports the end.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use tokio::io::AsyncReadExt;
use tokio::net::unix::pipe::Receiver;
use tokio::sync::oneshot;

use crate::config;
use crate::fault::{self, Point};
use crate::id::ExecId;
use crate::launch::contract::{LAUNCHED, Outcome, PROCESS_SPEC, UnitKind};
use crate::launch::{command, pipes, report};
use crate::services::own_unit::OwnUnit;
use crate::services::process::{hold, init_has_ended, init_is_gone};
use crate::services::{Entry, Error, Process};
use crate::session::{OpenStreams, ReopenMode};
use crate::stdio::{fifo, uri};
use crate::supervise::removal::{Stop, remove_unit};
use crate::task::Task;
use crate::task::exec::Exec;
use crate::task::lifecycle::Exit;
use crate::unit::job::StartJob;
use crate::unit::properties;
use crate::unit::systemd::Starting;

use super::Shim;
use super::request_unit::{Daemon, NameTaken, request_unit};

/// An exec that has run for this long is not a probe.
const LONG_EXEC: Duration = Duration::from_secs(2);

/// How long a start may take in addition to the limit of the OCI runtime: a client opens two FIFOs, and systemd accepts
/// the process as main process of the unit.
const HANDOVER_LIMIT: Duration =
    config::STDIO_LIMIT.saturating_mul(2).saturating_add(config::BARRIER_LIMIT.saturating_mul(2));

/// A start that systemd was asked for.
struct Attempted {
    /// `launch` rings it when it has written its report.
    doorbell: Receiver,
    /// The start job of the unit, if this daemon has asked for it.
    job: Option<StartJob>,
}

impl Shim {
    /// Starts the unit of an exec. Returns the pid, and the exit status if the process ended before systemd took it over.
    pub(super) async fn launch_exec(
        self: &Arc<Self>,
        entry: &Arc<Entry>,
        process: &Arc<Process>,
        id: &ExecId,
    ) -> Result<(u32, Option<Exit>), Error> {
        fault::point(Point::ExecStartRecorded);
        // The files of an earlier start may still exist, if its rollback could not remove them. They must not be read as those
        // of this start.
        self.cleanup.clear_exec_dir(process, Some(PROCESS_SPEC))?;
        let task = entry.task().clone();
        let exec = task.execs.get(id).ok_or_else(|| Error::UnknownExec { key: process.key.clone() })?;
        let plan = Arc::new(self.streams.plan(entry, process)?);
        let given_up = process.live().attempt.given_up.clone();
        let is_over = async {
            tokio::select! {
                () = given_up.cancelled() => Error::GivenUp { process: process.key.clone() },
                () = init_has_ended(entry) => Error::InitGone { key: entry.key.clone() },
            }
        };
        let opened = self.streams.open_unless(&plan, is_over).await?;
        // A start that fails can be tried again, with the same input. The output is not kept open: clients wait for its end
        // before they return the error.
        process.live().client_input = opened.client_input()?;
        fault::point(Point::ExecStartOpened);
        let dir = self.store.process_dir(&process.key);
        let doorbell = open_doorbell(&dir)?;
        process.live().attempt.unit_ended = Arc::default();
        let job = self.start_exec_unit(&task, exec, process, Daemon::This).await?;
        self.await_outcome(entry, process, &dir, Attempted { doorbell, job }, opened).await
    }

    /// Asks systemd to start the unit. Returns the job, or `None` if systemd already had the request of an earlier daemon.
    async fn start_exec_unit(
        &self,
        task: &Task,
        exec: &Exec,
        process: &Process,
        begun_by: Daemon,
    ) -> Result<Option<StartJob>, Error> {
        let command = self.launcher.command(UnitKind::Exec, &process.key);
        let environment =
            command::environment(self.launcher.sealed_runtime(&self.files, task).await?.as_ref(), None);
        let launched = self.store.process_dir(&process.key).join(LAUNCHED);
        let properties = properties::exec(&exec.description, task.unit(), &command, &environment, &launched);
        let begin = || self.manager.begin_transient(&exec.unit, &properties);
        let own = self.own_exec_unit(process);
        let taken = NameTaken {
            is_own: || async {
                // The order matters: `launch` reports before its unit ends.
                let under_way = self.manager.starting(&exec.unit).await? == Starting::UnderWay
                    && own.is_own(&*self.manager).await?;
                Ok(under_way || report::read(&self.store.process_dir(&process.key))?.is_some())
            },
            remove: || async {
                let left = remove_unit(&*self.manager, &own, Stop::Awaited).await;
                if left.is_empty() {
                    return Ok(());
                }
                Err(Error::NotRemoved { process: process.key.to_string(), reason: left.text() })
            },
        };
        let mut requested = request_unit(&*self.manager, &exec.unit, begun_by, begin, taken).await?;
        if let Some(job) = &mut requested {
            fault::point(Point::ExecStartBegun);
            self.launcher.warm_up_after(job.spawned());
        }
        Ok(requested)
    }

    /// The unit of an exec that is being started.
    fn own_exec_unit(&self, process: &Process) -> OwnUnit {
        let dir = self.store.process_dir(&process.key);
        OwnUnit::of(process.key.clone(), process.unit.clone(), dir, false)
    }

    /// Waits for the outcome of a start, and starts the session of the process.
    async fn await_outcome(
        self: &Arc<Self>,
        entry: &Arc<Entry>,
        process: &Arc<Process>,
        dir: &Path,
        attempted: Attempted,
        opened: OpenStreams,
    ) -> Result<(u32, Option<Exit>), Error> {
        let (pid, exit) = match self.outcome(entry, process, dir, attempted).await? {
            Outcome::Started { pid } => (pid, None),
            Outcome::Ended { pid, exit } => (pid, Some(exit)),
            Outcome::Failed { reason } => {
                return Err(self.with_settings(&process.unit, Error::Launch(reason)).await);
            }
        };
        fault::point(Point::ExecStartOutcome);
        if exit.is_none() {
            hold(entry, process, pid);
            self.cancel_long_start_job(entry, process);
        }
        self.streams.start_session(entry, process, opened).await?;
        fault::point(Point::ExecStartPumping);
        Ok((pid, exit))
    }

    /// Waits until `launch` rings the doorbell, or the unit or its start job ends. Fails if the start is cancelled or takes too long.
    async fn outcome(
        &self,
        entry: &Entry,
        process: &Process,
        dir: &Path,
        attempted: Attempted,
    ) -> Result<Outcome, Error> {
        let (unit, mut nothing) = (&process.unit, [0]);
        let Attempted { mut doorbell, job } = attempted;
        let (ended, given_up) = {
            let live = process.live();
            (live.attempt.unit_ended.clone(), live.attempt.given_up.clone())
        };
        // `launch` enforces the limit of the OCI runtime itself.
        let limit = entry.task().runtime.limit() + HANDOVER_LIMIT;
        let too_long = tokio::time::sleep(limit);
        let gone = init_is_gone(entry);
        // The job lasts as long as the process. If systemd does not run `launch`, only the end of the job shows it.
        let mut is_begun = job.is_some();
        let begun = async {
            match job {
                Some(job) => self.manager.wait_for_start_job(job).await,
                None => std::future::pending().await,
            }
        };
        tokio::pin!(too_long, gone, begun);
        loop {
            if let Some(outcome) = report::read(dir)? {
                return Ok(outcome);
            }
            tokio::select! {
                rung = doorbell.read(&mut nothing) => drop(rung.map_err(Error::Watch)?),
                // This may be a late report about an earlier unit of this name.
                () = ended.notified() => self.check_exec_unit(process, dir).await?,
                _ = &mut begun, if is_begun => {
                    is_begun = false;
                    self.check_exec_unit(process, dir).await?;
                }
                () = given_up.cancelled() => return Err(Error::GivenUp { process: process.key.clone() }),
                () = &mut gone => return Err(Error::InitGone { key: entry.key.clone() }),
                () = &mut too_long => return Err(Error::StartTimedOut { unit: unit.to_string(), limit }),
            }
        }
    }

    /// Fails if the unit of an exec has ended and `launch` has reported nothing.
    async fn check_exec_unit(&self, process: &Process, dir: &Path) -> Result<(), Error> {
        let unit = &process.unit;
        if self.manager.starting(unit).await? == Starting::UnderWay || report::read(dir)?.is_some() {
            return Ok(());
        }
        Err(self.exec_failure(process, dir).await)
    }

    /// Why there is no process, according to systemd.
    async fn exec_failure(&self, process: &Process, dir: &Path) -> Error {
        let unit = &process.unit;
        match self.manager.obstacle(unit).await {
            Some(reason) if !dir.join(LAUNCHED).exists() => {
                Error::NotRun { process: process.key.clone(), reason }
            }
            // `launch` or the OCI runtime was killed, or crashed.
            Some(reason) => Error::Launch(format!("OCI runtime exec failed: {reason}")),
            // systemd has unloaded the unit.
            None => {
                let settings = self.manager.restrictions(unit).await;
                let hint = settings.map(|all| format!("; it may be because of {all}")).unwrap_or_default();
                Error::Launch(format!("OCI runtime exec failed: see journalctl -u {unit}{hint}"))
            }
        }
    }

    /// Cancels the start job of the unit if the exec runs for long. The job lasts as long as the process, and systemd does
    /// not finish a boot while there are jobs (manager.c, `manager_check_finished`). For an exec that ends before, nothing
    /// stays behind to wait.
    pub(crate) fn cancel_long_start_job(self: &Arc<Self>, entry: &Arc<Entry>, process: &Arc<Process>) {
        let (shim, entry, process) = (self.clone(), Arc::downgrade(entry), process.clone());
        tokio::spawn(async move {
            let is_long = tokio::time::timeout(LONG_EXEC, process.ended()).await.is_err();
            let runs = is_long && entry.upgrade().is_some_and(|entry| entry.still_runs(&process));
            if runs && let Err(error) = shim.manager.cancel_start_job_of(&process.unit).await {
                tracing::warn!(process = %process.key, %error, "{}: can't cancel the start job of its unit: {error}", process.key);
            }
        });
    }

    /// After a restart: completes a start that was interrupted, and starts nothing twice. Sends to `claimed` once it has
    /// claimed the descriptors of the streams from the descriptor store.
    pub(crate) async fn resume_exec(
        self: &Arc<Self>,
        entry: &Arc<Entry>,
        process: &Arc<Process>,
        claimed: oneshot::Sender<()>,
    ) {
        let resumed = async {
            let dir = self.store.process_dir(&process.key);
            // Opened before the queries: `launch` may ring at any time.
            let doorbell = open_doorbell(&dir)?;
            let starting = match self.manager.starting(&process.unit).await? {
                // A unit of somebody else has the name.
                Starting::UnderWay | Starting::Over
                    if !self.own_exec_unit(process).is_own(&*self.manager).await? =>
                {
                    Starting::NotBegun
                }
                starting => starting,
            };
            let known = report::read(&dir)?.is_some();
            let task = entry.task().clone();
            let gone = || Error::UnknownExec { key: process.key.clone() };
            let plan = Arc::new(self.streams.plan(entry, process)?);
            let mut opened = self.streams.reopen(plan.clone(), ReopenMode::Starting).await?;
            // The receiver was dropped if the daemon stops.
            let _ = claimed.send(());
            let job = match starting {
                _ if known => None,
                Starting::UnderWay => None,
                // The client has its ends of the streams open, and must not get EOF now.
                Starting::NotBegun => {
                    let exec = process.exec().and_then(|id| task.execs.get(id)).ok_or_else(gone)?;
                    self.streams.resume_logger(&plan, &mut opened).await?;
                    self.start_exec_unit(&task, exec, process, Daemon::Earlier).await?
                }
                Starting::Over => return Err(self.exec_failure(process, &dir).await),
            };
            self.await_outcome(entry, process, &dir, Attempted { doorbell, job }, opened).await
        };
        let resumed = resumed.await;
        // The rollback removes the report.
        let report = report::read(&self.store.process_dir(&process.key));
        if let (Err(error), Ok(Some(Outcome::Failed { .. }))) = (&resumed, &report) {
            self.note_failure(&process.key, self.store.process_dir(&process.key), error).await;
        }
        if let Err(error) = self.conclude_start(entry, process, resumed).await {
            tracing::warn!(process = %process.key, %error, "{}: a start that a restart interrupted has failed and was rolled back: {error}", process.key);
        }
        self.units.query(entry, process).await;
    }
}

/// Makes the FIFO by which `launch` announces that it has written its report. `launch` writes nothing to it: it opens and
/// closes it.
fn open_doorbell(dir: &Path) -> Result<Receiver, Error> {
    let path = dir.join(pipes::DOORBELL);
    if fifo::kind(&path) != uri::Kind::Fifo {
        fifo::make(&path)?;
    }
    Receiver::from_file(fifo::open_reader(&path)?).map_err(Error::Watch)
}
