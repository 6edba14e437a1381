//! The streams of a process: what the daemon opens, copies and closes.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::fcntl::OFlag;
use tokio::io::AsyncReadExt;
use tokio::net::unix::pipe;
use tokio_util::sync::CancellationToken;
use tracing::Instrument;

use crate::config;
use crate::id::{ExecId, ProcessKey, UnitName};
use crate::launch::contract::Kind as LaunchKind;
use crate::launch::{command, pipes};
use crate::oci::face;
use crate::session::Session;
use crate::stdio::console::Console;
use crate::stdio::fifo;
use crate::stdio::journal::Lines;
use crate::stdio::pump::{self, Bridge, Sinks, Source};
use crate::stdio::rate::RateLimit;
use crate::stdio::terminal::Terminal;
use crate::stdio::uri::Kind;
use crate::task::Face;
use crate::task::wiring::{Copied, Input, Sink, Wiring};
use crate::unit::name;
use crate::unit::properties::{self, Shown};

use super::kept::{Earlier, Kept, Part};
use super::{Entry, Error, Process, Shim, blocking, waiting};

/// What the streams of a process depend on.
pub(super) struct Streams {
    key: ProcessKey,
    /// Where its FIFOs are.
    dir: PathBuf,
    /// Its console socket, for a terminal.
    console: PathBuf,
    wiring: Wiring,
    logger: Option<UnitName>,
    /// The container's unit: all output belongs to it.
    container: UnitName,
    slice: UnitName,
    face: Face,
    limit: Arc<RateLimit>,
}

/// Of what process streams are taken over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Whose {
    /// One that is about to run.
    Starting,
    /// One that runs: its terminal has been received.
    Running,
    /// One that has ended: what was not kept is over.
    Ended,
}

/// What is open for a process that is about to be.
#[derive(Default)]
pub(super) struct Opened {
    /// The kept writing end of the client's stdin.
    stdin: Option<File>,
    /// Its reading end, for a terminal.
    input: Option<File>,
    copies: Vec<Copy>,
    /// The terminal, if an earlier daemon has received it.
    terminal: Option<OwnedFd>,
    /// The logger's pipes. The daemon is a writer too, until the process is: the logger must not see
    /// EOF before.
    logger: Vec<File>,
    ready: Option<File>,
    console: Option<Console>,
}

/// One stream of output.
struct Copy {
    part: Part,
    from: From,
    sinks: Sinks,
}

/// Where it comes from.
enum From {
    Fifo(Source),
    /// The terminal itself, which is not there yet.
    Terminal,
    /// The terminal, by way of a pipe.
    Bridge(Bridge),
}

impl Opened {
    /// The client's FIFO for input once more.
    ///
    /// # Errors
    /// There are no more descriptors.
    pub(super) fn client_input(&self) -> Result<Option<OwnedFd>, Error> {
        let input = self.stdin.as_ref().map(|fifo| fifo.as_fd().try_clone_to_owned());
        input.transpose().map_err(Error::Watch)
    }
}

impl Shim {
    /// What the streams of a task's init, or of one of its execs, depend on.
    pub(super) fn streams(&self, entry: &Entry, exec: Option<&ExecId>) -> Option<Streams> {
        let limit = entry.init.live().journal_limit.clone();
        let task = entry.task();
        let (dir, unit, wiring, logger) = match exec {
            None => (self.store.dir(&task.key), &task.unit, &task.wiring, &task.logger),
            Some(id) => {
                let exec = task.execs.get(id)?;
                (self.store.exec_dir(&task.key, id), &exec.unit, &exec.wiring, &exec.logger)
            }
        };
        Some(Streams {
            key: ProcessKey { task: task.key.clone(), exec: exec.cloned() },
            dir,
            console: self.store.console(&name::short_name(unit)),
            wiring: wiring.clone(),
            logger: logger.clone(),
            container: task.unit.clone(),
            slice: task.placement.slice().clone(),
            face: task.face.clone(),
            limit,
        })
    }

    /// Opens what has to be open before the process is; starts its logger.
    ///
    /// # Errors
    /// A FIFO or a file can't be opened, nobody reads, or the logger is not ready.
    pub(super) async fn open_streams(&self, streams: &Arc<Streams>) -> Result<Opened, Error> {
        let (this, kept) = (streams.clone(), self.kept.clone());
        let mut opened = waiting(move || this.open_new(&kept)).await??;
        if let (Some(unit), Some(ready)) = (&streams.logger, opened.ready.take()) {
            self.start_logger(streams, unit, ready).await?;
        }
        Ok(opened)
    }

    /// Starts the logger of a process whose start was cut off, if it has one that does not run.
    ///
    /// # Errors
    /// It is not ready.
    pub(super) async fn resume_logger(&self, streams: &Streams, opened: &mut Opened) -> Result<(), Error> {
        let (Some(unit), Some(ready)) = (&streams.logger, opened.ready.take()) else {
            return Ok(());
        };
        if self.manager.active_state(unit).await?.is_some() {
            return Ok(());
        }
        self.start_logger(streams, unit, ready).await
    }

    /// Takes over what an earlier daemon had opened, and opens again what was not kept.
    ///
    /// # Errors
    /// As [`Self::open_streams`].
    pub(super) async fn reopen_streams(&self, streams: Arc<Streams>, whose: Whose) -> Result<Opened, Error> {
        let kept = self.kept.clone();
        blocking(move || streams.reopen(&kept, whose)).await?
    }

    /// Receives the terminal, if there is one, and starts copying. The process has its ends now.
    ///
    /// # Errors
    /// The terminal does not come.
    pub(super) async fn start_pumps(
        &self,
        entry: &Entry,
        process: &Arc<Process>,
        opened: Opened,
    ) -> Result<(), Error> {
        let Opened { stdin, input, copies, terminal, logger, console, .. } = opened;
        drop(logger);
        // It may have been closed before there was a process; then the process has it now, and no
        // writer is needed any more.
        let wiring = entry.task().wiring_mut(process.key.exec.as_ref()).cloned().unwrap_or_default();
        let number = wiring.kept;
        let master = match (terminal, console) {
            (Some(master), _) => Some(master),
            (None, Some(console)) => {
                let kept = self.kept.clone();
                let received = move || {
                    let master = console.receive(config::STDIO_LIMIT)?;
                    kept.keep(Part::Terminal, number, &[master.as_fd()]);
                    Ok::<_, Error>(master)
                };
                Some(waiting(received).await??)
            }
            (None, None) => None,
        };
        if wiring.copies().iter().any(|(_, _, to)| to.journal) {
            self.set_journal_limit(entry).await;
        }
        let terminal = master.map(Terminal::new).transpose().map_err(Error::Terminal)?.map(Arc::new);
        let mut session = Session::new(stdin.filter(|_| !wiring.stdin_closed), terminal.clone());
        if !session.has_stdin() && input.is_none() && wiring.stdin != Input::Null {
            self.kept.forget(Part::Input, number);
        }
        let span = tracing::info_span!("output", process = %process.key);
        for Copy { part, from, sinks } in copies {
            let source = match (from, &terminal) {
                (From::Fifo(fifo), _) => fifo,
                (From::Terminal, Some(terminal)) => Source::Terminal(terminal.clone()),
                (From::Bridge(bridge), Some(terminal)) => Source::Bridged(terminal.clone(), bridge),
                (From::Terminal | From::Bridge(_), None) => continue,
            };
            let (over, stop, kept) = (process.clone(), session.stop(), self.kept.clone());
            let copy = async move {
                let over = async {
                    over.ended().await;
                };
                pump::copy(source, sinks, over, stop).await;
                kept.forget(part, number);
                if wiring.terminal {
                    kept.forget(Part::Terminal, number);
                }
            };
            session.pump(copy.instrument(span.clone()));
        }
        if let (Some(input), Some(terminal)) = (input, &terminal) {
            tokio::spawn(feed(process.clone(), input, terminal.clone(), session.stop()));
        }
        let mut live = process.live();
        if let (Some(terminal), Some((columns, rows))) = (&terminal, live.window) {
            terminal.resize(columns, rows).map_err(Error::Terminal)?;
        }
        live.session = session;
        live.client_input = None;
        Ok(())
    }

    /// After a restart: the daemon's ends of the streams of a process that lives, or has left something
    /// in them.
    pub(super) async fn recover_streams(&self, entry: &Entry, process: &Arc<Process>) {
        let Some(streams) = self.streams(entry, process.key.exec.as_ref()) else {
            return;
        };
        let whose = if process.has_ended() { Whose::Ended } else { Whose::Running };
        if whose == Whose::Ended && !self.kept.has(streams.wiring.kept) {
            return;
        }
        let started = match self.reopen_streams(Arc::new(streams), whose).await {
            Ok(opened) => self.start_pumps(entry, process, opened).await,
            Err(error) => Err(error),
        };
        if let Err(error) = started {
            tracing::warn!(process = %process.key, %error, "{}: can't open its streams again: {error}", process.key);
        }
    }

    /// The daemon's copy of a container's output has the rate limit of its unit.
    async fn set_journal_limit(&self, entry: &Entry) {
        match self.manager.log_rate_limit(&entry.init.unit).await {
            Ok((interval_usec, burst)) => entry.init.live().journal_limit.set(interval_usec, burst),
            Err(error) => {
                tracing::debug!(task = %entry.key, %error, "task {}: its rate limit is journald's default: {error}", entry.key);
            }
        }
    }

    /// Starts the logger in a unit of its own, and waits until it is ready.
    async fn start_logger(&self, streams: &Streams, unit: &UnitName, ready: File) -> Result<(), Error> {
        let Some(logger) = &streams.wiring.logger else {
            return Ok(());
        };
        let command = command::command_line(&self.program, LaunchKind::Logger, &streams.key);
        let description = match &streams.key.exec {
            None => format!("Logger of {}", streams.face.description),
            Some(exec) => format!("Logger of exec {exec} in {}", streams.face.description),
        };
        let shown = Shown {
            description: &description,
            identifier: face::identifier(&streams.face),
            fields: &streams.face.fields,
            slice: &streams.slice,
        };
        self.manager.start_transient(unit, &properties::logger(&shown, &command)).await?;
        let failed = |reason: String| Error::Logger { program: logger.program.display().to_string(), reason };
        match tokio::time::timeout(config::STDIO_LIMIT, is_ready(ready)).await {
            Ok(Ok(byte)) if byte || !logger.strict => Ok(()),
            Ok(Ok(_)) => Err(failed("it closed its pipe without a byte".to_owned())),
            Ok(Err(error)) => Err(failed(error.to_string())),
            Err(_) => Err(failed(format!("nothing within {} s", config::STDIO_LIMIT.as_secs()))),
        }
    }

    /// CloseIO: the process sees EOF on its stdin once every client has closed it as well.
    ///
    /// # Errors
    /// There is no such process.
    pub fn close_stdin(&self, key: &ProcessKey) -> Result<(), Error> {
        let (entry, process) = self.process(key)?;
        self.note(&entry, |task| {
            task.wiring_mut(key.exec.as_ref()).into_iter().for_each(|wiring| wiring.stdin_closed = true);
            Ok(Vec::new())
        })?;
        self.close_writer(&entry, &process);
        Ok(())
    }

    /// Lets go of the writing end that keeps a process's input open.
    fn close_writer(&self, entry: &Entry, process: &Process) {
        let writer = process.live().session.take_stdin();
        if let (Some(_), Some(number)) = (writer, kept_number(entry, process)) {
            self.kept.forget(Part::Input, number);
        }
    }

    /// The process has ended: nobody reads its stdin any more.
    pub(super) fn close_input(&self, entry: &Entry, process: &Process) {
        self.close_writer(entry, process);
        let (terminal, silent) = {
            let session = &mut process.live().session;
            (session.take_terminal(), session.is_silent())
        };
        if let (Some(_), Some(number), true) = (terminal, kept_number(entry, process), silent) {
            self.kept.forget(Part::Terminal, number);
        }
    }

    /// ResizePty: sets the size of a terminal's window, in characters. One that is not there yet gets
    /// it when it is; without a terminal there is no window.
    ///
    /// # Errors
    /// There is no such process, or an exec has ended.
    pub fn resize(&self, key: &ProcessKey, columns: u32, rows: u32) -> Result<(), Error> {
        let (entry, process) = self.process(key)?;
        let over = |exec| entry.task().execs.get(exec).is_some_and(|exec| exec.phase.exit().is_some());
        if key.exec.as_ref().is_some_and(over) {
            return Err(Error::ResizeStopped);
        }
        let clip = |size: u32| u16::try_from(size).unwrap_or(u16::MAX);
        let (columns, rows) = (clip(columns), clip(rows));
        let mut live = process.live();
        live.window = Some((columns, rows));
        match live.session.terminal() {
            Some(terminal) => terminal.resize(columns, rows).map_err(Error::Terminal),
            None => Ok(()),
        }
    }
}

/// The number under which systemd keeps a process's streams.
pub(super) fn kept_number(entry: &Entry, process: &Process) -> Option<u64> {
    entry.task().wiring_mut(process.key.exec.as_ref()).map(|wiring| wiring.kept)
}

/// Waits until everything that a process wrote has arrived, for a limited time.
pub(super) async fn drain(process: &Process) {
    let pumps = process.live().session.take_pumps();
    if !pumps.drain().await {
        let key = &process.key;
        tracing::info!(process = %key, "{key}: output is still open after the end, it is closed now");
    }
}

/// Ends the session of a process. Output that has not arrived is lost.
pub(super) async fn cut_off(process: &Process) {
    // The guard of `live` must not be held while the pumps end.
    let mut session = std::mem::take(&mut process.live().session);
    session.take_pumps().cut_off().await;
}

/// Copies a client's input to a terminal. Its end hangs the terminal up, as with
/// containerd-shim-runc-v2.
async fn feed(process: Arc<Process>, input: File, terminal: Arc<Terminal>, stop: CancellationToken) {
    let fed = async {
        let input = crate::sys::watch(input)?;
        pump::input(&input, &terminal).await
    };
    tokio::select! {
        fed = fed => {
            if let Err(error) = fed {
                tracing::debug!(process = %process.key, %error, "the terminal takes no more input: {error}");
            }
            terminal.hang_up();
            process.live().session.take_terminal();
        }
        _ = process.ended() => {}
        () = stop.cancelled() => {}
    }
}

impl Streams {
    fn open_new(&self, kept: &Kept) -> Result<Opened, Error> {
        for name in self.wiring.own_pipes() {
            fifo::make(&self.dir.join(name))?;
        }
        let nothing = &mut |_| Earlier::default();
        let opened = self.open(kept, Whose::Starting, nothing, fifo::open_output_nonblocking)?;
        Ok(Opened { console: self.console(kept)?, ..opened })
    }

    /// The client has been there before: nobody is waited for.
    fn reopen(&self, kept: &Kept, whose: Whose) -> Result<Opened, Error> {
        for name in self.wiring.own_pipes() {
            let path = self.dir.join(name);
            // It ended before they were all made.
            if whose == Whose::Starting && fifo::kind(&path) == Kind::Missing {
                fifo::make(&path)?;
            }
        }
        let number = self.wiring.kept;
        let mut earlier = |part| kept.take(part, number);
        let (mut terminals, mut consoles): (Vec<_>, Vec<_>) =
            earlier(Part::Terminal).both.into_iter().partition(|fd| nix::unistd::isatty(fd).unwrap_or(false));
        let terminal = terminals.pop();
        let opened = self.open(kept, whose, &mut earlier, |path, _| fifo::open_both_nonblocking(path))?;
        // Where it has not come yet, it may.
        let may_come = terminal.is_none() && whose == Whose::Starting;
        let console = match consoles.pop() {
            Some(listener) if may_come => Some(Console::adopt(listener, &self.console)),
            None if may_come => self.console(kept)?,
            Some(_) | None => None,
        };
        Ok(Opened { terminal, console, ..opened })
    }

    fn console(&self, kept: &Kept) -> Result<Option<Console>, Error> {
        if !self.wiring.terminal {
            return Ok(None);
        }
        let console = Console::listen(&self.console)?;
        kept.keep(Part::Terminal, self.wiring.kept, &[console.fd()]);
        Ok(Some(console))
    }

    /// `earlier` gives what an earlier daemon had opened of a part. `client` opens a client's FIFO for
    /// writing, for which it may take the given time.
    fn open(
        &self,
        kept: &Kept,
        whose: Whose,
        earlier: &mut dyn FnMut(Part) -> Earlier,
        client: impl Fn(&Path, Duration) -> Result<File, fifo::Error>,
    ) -> Result<Opened, Error> {
        let (mut opened, number) = (Opened::default(), self.wiring.kept);
        if let (Input::Fifo(path), Whose::Starting | Whose::Running) = (&self.wiring.stdin, whose) {
            let mut before = earlier(Part::Input);
            if self.wiring.terminal {
                opened.input = Some(or_open(before.readers.pop(), || fifo::open_reader(path))?);
            }
            opened.stdin = Some(or_open(before.both.pop(), || fifo::open_both(path))?);
            kept.keep(Part::Input, number, &fds([&opened.input, &opened.stdin]));
        }
        if self.wiring.logger.is_some() && whose == Whose::Starting {
            opened.ready = Some(fifo::open_reader(&self.dir.join(pipes::READY))?);
            for name in [pipes::LOG_STDOUT, pipes::LOG_STDERR] {
                opened.logger.push(fifo::open_both(&self.dir.join(name))?);
            }
        }
        let begun = Instant::now();
        let client = |path: &Path| client(path, config::STDIO_LIMIT.saturating_sub(begun.elapsed()));
        for (from, log_pipe, to) in self.wiring.copies() {
            let part = if log_pipe == pipes::LOG_STDOUT { Part::Output } else { Part::ErrorOutput };
            let mut before = earlier(part);
            if whose == Whose::Ended && before.is_empty() {
                continue;
            }
            let source = match from {
                Some(name) => {
                    Some(or_open(before.readers.pop(), || fifo::open_reader(&self.dir.join(name)))?)
                }
                None => None,
            };
            let fifo = self.client_fifo(before.both.pop(), log_pipe, to, &client)?;
            kept.keep(part, number, &fds([&source, &fifo]));
            let mut sinks = Sinks { copies: self.copies(log_pipe, to)?, ..Sinks::default() };
            match (&to.client, fifo) {
                (Some(Sink::EndOnly(_)), fifo) => sinks.held = fifo,
                (_, Some(fifo)) => {
                    fifo::enlarge(&fifo);
                    sinks.fifo = Some(crate::sys::watch(fifo).map_err(Error::Watch)?);
                }
                (_, None) => {}
            }
            let from = match source {
                Some(fifo) => From::Fifo(Source::fifo(fifo).map_err(Error::Watch)?),
                None if sinks.fifo.is_some() && sinks.copies.is_empty() => From::Terminal,
                None => From::Bridge(bridge(before.readers.pop(), before.writers.pop(), |ends| {
                    kept.keep(part, number, ends);
                })?),
            };
            opened.copies.push(Copy { part, from, sinks });
        }
        Ok(opened)
    }

    fn client_fifo(
        &self,
        before: Option<OwnedFd>,
        log_pipe: &str,
        to: &Copied,
        client: &impl Fn(&Path) -> Result<File, fifo::Error>,
    ) -> Result<Option<File>, Error> {
        let open = || match &to.client {
            Some(Sink::Fifo(path) | Sink::EndOnly(path)) => client(path).map(Some),
            Some(Sink::Logger) => fifo::open_both_nonblocking(&self.dir.join(log_pipe)).map(Some),
            Some(Sink::File { .. }) | None => Ok(None),
        };
        Ok(match before {
            Some(before) => Some(before.into()),
            None => open()?,
        })
    }

    fn copies(&self, log_pipe: &str, to: &Copied) -> Result<Vec<pump::Sink>, Error> {
        let mut copies = Vec::new();
        if let Some(Sink::File { path, create }) = &to.client {
            copies.push(pump::Sink::File(pump::LogFile::open(path, *create)?));
        }
        if to.journal {
            let fields = self.face.fields.iter().map(|(name, value)| (name.as_str(), value.as_str()));
            let exec = self.key.exec.as_ref().map(|exec| ("CONTAINER_EXEC_ID", exec.as_str()));
            let identifier = face::identifier(&self.face);
            let partial = self.dir.join(format!("{log_pipe}.partial"));
            let unit = self.container.as_str();
            let lines = Lines::new(unit, identifier, fields.chain(exec), partial, self.limit.clone());
            copies.push(pump::Sink::Journal(lines));
        }
        Ok(copies)
    }
}

fn or_open(before: Option<OwnedFd>, open: impl FnOnce() -> Result<File, fifo::Error>) -> Result<File, Error> {
    match before {
        Some(before) => Ok(before.into()),
        None => Ok(open()?),
    }
}

fn fds<const N: usize>(files: [&Option<File>; N]) -> Vec<BorrowedFd<'_>> {
    files.into_iter().flatten().map(AsFd::as_fd).collect()
}

/// The pipe of an earlier daemon, or a new one, which `keep` is told of.
fn bridge(
    reader: Option<OwnedFd>,
    writer: Option<OwnedFd>,
    keep: impl FnOnce(&[BorrowedFd<'_>]),
) -> Result<Bridge, Error> {
    let (reader, writer) = match (reader, writer) {
        (Some(reader), Some(writer)) => (reader, writer),
        _ => {
            let flags = OFlag::O_CLOEXEC | OFlag::O_NONBLOCK;
            let (reader, writer) = nix::unistd::pipe2(flags).map_err(|errno| Error::Watch(errno.into()))?;
            keep(&[reader.as_fd(), writer.as_fd()]);
            (reader, writer)
        }
    };
    Bridge::new(reader, writer).map_err(Error::Watch)
}

/// Waits for the first byte on a pipe, or for its end; true for a byte.
///
/// The pipe is read only once the kernel reports something: before its writer has come it would look
/// as if it had ended.
async fn is_ready(ready: File) -> io::Result<bool> {
    let mut ready = pipe::Receiver::from_file(ready)?;
    Ok(ready.read(&mut [0]).await? > 0)
}
