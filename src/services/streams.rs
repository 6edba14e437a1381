//! The sessions of processes: opened before a process runs, started when it has its ends of the streams, recovered
//! after a restart ([`resumption`]), and closed when it has ended.

pub(crate) mod resumption;

use std::fs::{self, File};
use std::io;
use std::path::Path;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use nix::sys::time::TimeSpec;
use nix::time::{ClockId, clock_gettime};
use tokio::io::AsyncReadExt;
use tokio::net::unix::pipe;

use crate::config;
use crate::launch::contract::{LOGGER_ERROR, UnitKind};
use crate::oci::metadata;
use crate::session::fds::{Claims, StreamFds, StreamKind};
use crate::session::{self, LogFiles, OpenStreams, Plan, ReopenMode, Session};
use crate::stdio::{journal, threads};
use crate::store::Store;
use crate::sys::interrupt::Interrupt;
use crate::unit::name;
use crate::unit::policy::is_of_journal;
use crate::unit::properties::{self, UnitMetadata};
use crate::unit::systemd::JournalSettings;
use crate::unit::systemd::Systemd;

use resumption::resumed;

use super::files::SlowFiles;
use super::later::Later;
use super::launcher::Launcher;
use super::own_unit::OwnUnit;
use super::{Entry, Error, Process, WaitsFor, blocking, waiting};

/// The file of a process in which the first daemon that waited for its output has noted the time.
const DRAINING: &str = "draining";

/// How long a change of a window's size may take.
const WINDOW_LIMIT: Duration = Duration::from_secs(5);

/// Output has usually arrived after this time.
const USUAL: Duration = Duration::from_millis(20);

/// Opens, starts, recovers and closes the sessions of processes, and starts their loggers.
pub struct Streams {
    /// The descriptors in the descriptor store.
    fds: Arc<StreamFds>,
    /// Where clients' log files are opened.
    files: SlowFiles,
    /// The directories of processes.
    store: Store,
    /// Starts loggers.
    manager: Arc<dyn Systemd>,
    launcher: Arc<Launcher>,
    later: Arc<Later>,
}

impl Streams {
    /// Puts the parts together.
    pub(crate) fn new(
        fds: Arc<StreamFds>,
        files: SlowFiles,
        store: Store,
        manager: Arc<dyn Systemd>,
        launcher: Arc<Launcher>,
        later: Arc<Later>,
    ) -> Self {
        Self { fds, files, store, manager, launcher, later }
    }

    /// What the streams of a process depend on.
    ///
    /// # Errors
    /// The process has been deleted.
    pub(crate) fn plan(&self, entry: &Entry, process: &Process) -> Result<Plan, Error> {
        let policy = entry.init.live().journal_policy.clone();
        let task = entry.task();
        let recorded = task.process(process.exec());
        let recorded = recorded.ok_or_else(|| Error::UnknownExec { key: process.key.clone() })?;
        Ok(Plan {
            key: process.key.clone(),
            dir: self.store.process_dir(&process.key),
            console: self.store.console(&name::short_name(&process.unit)),
            wiring: recorded.wiring.clone(),
            logger: recorded.logger.clone(),
            container: task.unit().clone(),
            slice: task.placement.slice().clone(),
            metadata: task.metadata(),
            policy,
            interrupt: Interrupt::default(),
        })
    }

    /// Opens what has to be open before the process runs; starts its logger.
    ///
    /// # Errors
    /// A FIFO or a file can't be opened, nobody reads, or the logger is not ready.
    pub(crate) async fn open(&self, plan: &Arc<Plan>) -> Result<OpenStreams, Error> {
        let mut files = LogFiles::new();
        if plan.has_log_files() {
            let this = plan.clone();
            files = self.files.run(WaitsFor::LogFile, &plan.key, move || this.open_log_files()).await??;
        }
        let (this, fds) = (plan.clone(), self.fds.clone());
        let mut opened = self
            .files
            .in_time(
                &plan.key,
                waiting(WaitsFor::Client, &plan.key.task, move || {
                    let _threads = threads::enter();
                    this.open(&fds, files)
                }),
            )
            .await??;
        self.start_logger(plan, opened.take_ready()).await?;
        Ok(opened)
    }

    /// As [`Self::open`], unless `over` resolves first.
    ///
    /// # Errors
    /// As [`Self::open`], or what `over` resolves to.
    pub(crate) async fn open_unless(
        &self,
        plan: &Arc<Plan>,
        over: impl Future<Output = Error>,
    ) -> Result<OpenStreams, Error> {
        let mut open = pin!(self.open(plan));
        tokio::select! {
            opened = &mut open => opened,
            error = over => {
                plan.interrupt.set();
                // The caller removes next what `open` has made, so `open` must have ended.
                threads::discard(open.await.ok());
                Err(error)
            }
        }
    }

    /// Starts the logger of a process whose start was interrupted, if the process has a logger and the logger does not run.
    ///
    /// # Errors
    /// The logger is not ready.
    pub(crate) async fn resume_logger(&self, plan: &Plan, opened: &mut OpenStreams) -> Result<(), Error> {
        let ready = opened.take_ready();
        if let Some(unit) = &plan.logger
            && OwnUnit::of_logger(plan.key.clone(), unit.clone(), false).is_own(&*self.manager).await?
        {
            return Ok(());
        }
        self.start_logger(plan, ready).await
    }

    /// Claims what an earlier daemon opened, and opens again what systemd did not keep.
    ///
    /// # Errors
    /// A FIFO or a file can't be opened.
    pub(crate) async fn reopen(&self, plan: Arc<Plan>, mode: ReopenMode) -> Result<OpenStreams, Error> {
        // Before any wait: recovery drops what is not claimed.
        let claims = self.fds.claim_streams(plan.wiring.store_number);
        self.reopen_claimed(plan, mode, claims).await
    }

    async fn reopen_claimed(
        &self,
        plan: Arc<Plan>,
        mode: ReopenMode,
        claims: Claims,
    ) -> Result<OpenStreams, Error> {
        let (fds, key) = (self.fds.clone(), plan.key.clone());
        let work = move || {
            let _threads = threads::enter();
            plan.reopen(&fds, &claims, mode)
        };
        match self.files.in_time(&key, waiting(WaitsFor::Client, &key.task, work.clone())).await {
            // If nothing held its streams open, the process would see their end.
            Err(Error::NoThread(_)) => Ok(self.files.in_time(&key, blocking(work)).await??),
            reopened => Ok(reopened??),
        }
    }

    /// Receives the terminal, if there is one, and starts copying. The process has its ends of the streams.
    ///
    /// # Errors
    /// The terminal does not come.
    pub(crate) async fn start_session(
        &self,
        entry: &Entry,
        process: &Process,
        opened: OpenStreams,
    ) -> Result<(), Error> {
        if opened.has_journal_copy() {
            self.set_journal_policy(entry).await;
        }
        self.begin(entry, process, opened).await
    }

    /// As [`Self::start_session`], without the rate limit of the journal's copy.
    async fn begin(&self, entry: &Entry, process: &Process, mut opened: OpenStreams) -> Result<(), Error> {
        opened.close_logger();
        // CloseIO may have closed the input since the plan was made.
        let wiring = entry.task().process(process.exec()).map(|process| process.wiring.clone());
        let wiring = wiring.unwrap_or_default();
        if let Some(console) = opened.take_console() {
            let (fds, number) = (self.fds.clone(), wiring.store_number);
            let received = move || {
                console.receive(config::STDIO_LIMIT, |fd| fds.store(StreamKind::Terminal, number, &[fd]))
            };
            opened.set_terminal(waiting(WaitsFor::Client, &process.key.task, received).await??);
        }
        let ended = || {
            let ended = process.ended();
            async move { _ = ended.await }
        };
        let session = Session::start(&process.key, opened, &wiring, &self.fds, ended)?;
        {
            let mut live = process.live();
            live.session = session;
            threads::discard(live.client_input.take());
        }
        // Before the input: the client may have typed it after the answer to its request for the size.
        set_window(process).await?;
        process.live().session.start_input(&process.key.task);
        // CloseIO may have come while the terminal was awaited. It found no session whose input it could close.
        // The process may also have ended meanwhile.
        let (is_closed, has_ended) = entry
            .task()
            .process(process.exec())
            .map(|process| (process.wiring.stdin_closed, process.exit().is_some()))
            .unwrap_or_default();
        if has_ended {
            self.close_input(entry, process);
        } else if is_closed {
            self.close_stdin_writer(entry, process);
        }
        Ok(())
    }

    /// Gives the daemon's copy of a container's output the rate limit and the fields of its unit.
    fn set_journal_policy(&self, entry: &Entry) -> impl Future<Output = ()> + Send + use<> {
        let (manager, key, unit) = (self.manager.clone(), entry.key.clone(), entry.init.unit.clone());
        let policy = entry.init.live().journal_policy.clone();
        let (own, is_given) = {
            let task = entry.task();
            let is_given = task.properties.iter().any(|property| is_of_journal(&property.name));
            (task.fields.clone(), is_given)
        };
        async move {
            match manager.journal_settings(&unit, is_given).await {
                Ok(JournalSettings { interval_usec, burst, fields }) => {
                    let own: Vec<&str> = own.iter().map(|(name, _)| name.as_str()).collect();
                    policy.set_fields(journal::more_fields(&fields, &own));
                    policy.set(interval_usec, burst);
                }
                Err(error) => {
                    tracing::debug!(task = %key, %error, "task {key}: can't read the rate limit and the fields of its unit, using the defaults of journald: {error}");
                    policy.set(0, 0);
                }
            }
        }
    }

    /// Starts the logger, if there is one, in a unit of its own, and waits until it is ready.
    async fn start_logger(&self, plan: &Plan, ready: Option<File>) -> Result<(), Error> {
        let (Some(unit), Some(logger), Some(ready)) = (&plan.logger, &plan.wiring.logger, ready) else {
            return Ok(());
        };
        let command = self.launcher.command(UnitKind::Logger, &plan.key);
        let shown = UnitMetadata {
            description: &plan.logger_description(),
            identifier: metadata::identifier(&plan.metadata.fields),
            fields: &plan.metadata.fields,
            slice: &plan.slice,
            sandbox: None,
        };
        let failed = |reason: String| Error::Logger { program: logger.program.display().to_string(), reason };
        let refusal = plan.dir.join(LOGGER_ERROR);
        match fs::remove_file(&refusal) {
            // Of an earlier start.
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(failed(format!("can't remove {}: {error}", refusal.display()))),
        }
        self.manager.start_transient(unit, &properties::logger(&shown, &command)).await?;
        let answered = tokio::select! {
            answered = tokio::time::timeout(config::STDIO_LIMIT, is_ready(ready)) => answered,
            () = plan.interrupt.until_set() => return Err(failed("its process was given up".to_owned())),
        };
        match answered {
            Ok(Ok(true)) => Ok(()),
            // The pipe is closed without a byte.
            Ok(Ok(false)) => match fs::read_to_string(&refusal) {
                Ok(reason) => Err(failed(format!("it can't be executed: {reason}"))),
                Err(_) if logger.strict => Err(failed("it closed its pipe without a byte".to_owned())),
                Err(_) => Ok(()),
            },
            Ok(Err(error)) => Err(failed(error.to_string())),
            Err(_) => Err(failed(format!("nothing within {} s", config::STDIO_LIMIT.as_secs()))),
        }
    }

    /// Waits until everything that a process wrote has arrived, for a limited time: in this daemon and in those that waited
    /// before.
    pub(crate) async fn drain(&self, process: &Process) {
        resumed(process).await;
        let mut pumps = process.live().session.take_pumps();
        if pumps.wait(USUAL).await {
            return;
        }
        let mark = self.store.process_dir(&process.key).join(DRAINING);
        let waited = blocking(move || since_mark(&mark)).await.unwrap_or_default();
        if !pumps.drain(waited).await {
            let key = &process.key;
            tracing::info!(process = %key, "{key}: another process still holds its output after its end, or its client does not read it; the daemon closes it now");
        }
    }

    /// Closes the writing end that keeps the input of a process open.
    pub(crate) fn close_stdin_writer(&self, entry: &Entry, process: &Process) {
        if process.live().session.close_stdin()
            && let Some(process) = entry.task().process(process.exec())
        {
            self.fds.close_input(&process.wiring);
        }
    }

    /// The process has ended: nobody reads its input any more.
    pub(crate) fn close_input(&self, entry: &Entry, process: &Process) {
        let is_unused = {
            let session = &mut process.live().session;
            session.close_stdin();
            session.close_terminal() && session.is_silent()
        };
        if let Some(number) = stored_number(entry, process) {
            self.fds.forget(StreamKind::Input, number);
            if is_unused {
                self.fds.forget(StreamKind::Terminal, number);
            }
        }
    }
}

/// The number under which systemd keeps the streams of a process.
pub(crate) fn stored_number(entry: &Entry, process: &Process) -> Option<u64> {
    entry.task().process(process.exec()).map(|process| process.wiring.store_number)
}

/// Gives the terminal of a process the size that was requested last. Without a terminal or a request, does nothing.
///
/// # Errors
/// The terminal does not answer, or the kernel refuses the size.
pub(crate) async fn set_window(process: &Process) -> Result<(), Error> {
    let (window, terminal) = {
        let live = process.live();
        (live.window, live.session.terminal())
    };
    let (Some((columns, rows)), Some(terminal)) = (window, terminal) else {
        return Ok(());
    };
    let set = waiting(WaitsFor::Terminal, &process.key.task, move || terminal.resize(columns, rows));
    let late = |_| Error::TerminalDoesNotAnswer { process: process.key.clone() };
    let set = tokio::time::timeout(WINDOW_LIMIT, set).await.map_err(late)??;
    Ok(set.map_err(session::Error::Terminal)?)
}

/// As [`set_window`], also for a process whose streams are being opened again after a restart: the client may type as soon as it
/// has the answer.
///
/// # Errors
/// As [`set_window`].
pub(crate) async fn set_window_once_resumed(process: &Process) -> Result<(), Error> {
    resumed(process).await;
    set_window(process).await
}

/// Ends the session of a process. Output that has not arrived is lost.
pub(crate) async fn cancel_pumps(process: &Process) {
    resumed(process).await;
    // The guard of `live` must not be held while the pumps end.
    let mut session = std::mem::take(&mut process.live().session);
    session.take_pumps().stop_now().await;
}

/// The time since the first call for the file `mark`, across restarts of the daemon. The clock that is used never jumps.
fn since_mark(mark: &Path) -> Duration {
    let now = Duration::from(clock_gettime(ClockId::CLOCK_BOOTTIME).unwrap_or_else(|_| TimeSpec::new(0, 0)));
    let noted = fs::read_to_string(mark).ok().and_then(|text| text.parse().ok());
    match noted.map(Duration::from_millis) {
        Some(noted) => now.saturating_sub(noted),
        None => {
            // Without the mark, the next daemon waits for the whole time again.
            let _ = fs::write(mark, now.as_millis().to_string());
            Duration::ZERO
        }
    }
}

/// Waits for the first byte on a pipe, or for its end; true for a byte.
///
/// The pipe is read only once the kernel reports an event: before a writer has opened the pipe, a read would return the end.
async fn is_ready(ready: File) -> io::Result<bool> {
    let mut ready = pipe::Receiver::from_file(ready)?;
    Ok(ready.read(&mut [0]).await? > 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_time_since_a_mark_goes_on_in_the_next_daemon() {
        let dir = tempfile::tempdir().unwrap();
        let mark = dir.path().join(DRAINING);
        assert_eq!(since_mark(&mark), Duration::ZERO);
        let noted: u64 = fs::read_to_string(&mark).unwrap().parse().unwrap();
        fs::write(&mark, (noted - 7000).to_string()).unwrap();
        assert_eq!(since_mark(&mark).as_secs(), 7);
        // The daemon was killed while it wrote the mark.
        fs::write(&mark, "").unwrap();
        assert_eq!(since_mark(&mark), Duration::ZERO);
        assert_eq!(fs::read_to_string(&mark).unwrap().len(), noted.to_string().len());
    }
}
