//! Opens the streams of a process that is about to start, and reopens those of a process that an earlier daemon
//! started.

use std::collections::HashMap;
use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::fcntl::OFlag;

use crate::config;
use crate::launch::pipes;
use crate::stdio::aside::Aside;
use crate::stdio::console::Console;
use crate::stdio::fifo;
use crate::stdio::log_file::LogFile;
use crate::stdio::pipe::PipePair;
use crate::stdio::pump::{self, Sinks, Source};
use crate::stdio::threads;
use crate::stdio::uri::Kind;
use crate::sys::guard::is_listener;
use crate::sys::quota;
use crate::task::wiring::{Copied, Input, JournalCopy, Sink, Wiring};

use super::Error;
use super::fds::{Claimed, Claims, StreamFds, StreamKind};
use super::plan::Plan;

/// The state of the process whose streams are reopened after a restart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReopenMode {
    /// It is about to run.
    Starting,
    /// It runs: its terminal has been received.
    Running,
    /// It has ended: only what systemd keeps is of use.
    Ended,
}

/// What is open for a process that is about to run.
#[derive(Default)]
pub struct OpenStreams {
    /// The writing end of the client's stdin.
    pub(super) stdin: Option<File>,
    /// Its reading end, for a terminal.
    pub(super) input: Option<File>,
    pub(super) copies: Vec<Copy>,
    /// The terminal, if it has been received.
    pub(super) terminal: Option<OwnedFd>,
    /// The pipes of the logger. The daemon keeps them open for writing until the process has them: the logger must not
    /// see end of file before.
    logger: Vec<File>,
    /// Reading ends of the logger's pipes.
    pub(super) logger_readers: Vec<File>,
    ready: Option<File>,
    console: Option<Console>,
}

/// One stream of output.
pub(super) struct Copy {
    pub(super) kind: StreamKind,
    pub(super) from: From,
    pub(super) sinks: Sinks,
}

/// Where a stream of output comes from.
pub(super) enum From {
    Fifo(Source),
    /// The terminal, which has not been received yet.
    Terminal,
    /// The terminal, by way of a pipe.
    Bridge(PipePair),
    /// An earlier daemon has delivered everything but the journal's copy.
    Delivered,
}

impl OpenStreams {
    /// A duplicate of the client's FIFO for input.
    ///
    /// # Errors
    /// There are no more descriptors.
    pub fn client_input(&self) -> Result<Option<OwnedFd>, Error> {
        // A terminal whose input was closed before has only the reader.
        let fifo = self.stdin.as_ref().or(self.input.as_ref());
        let input = fifo.map(|fifo| fifo.as_fd().try_clone_to_owned());
        input.transpose().map_err(Error::Watch)
    }

    /// Whether the daemon copies output to the journal.
    pub fn has_journal_copy(&self) -> bool {
        let is_journal = |sink: &pump::Sink| matches!(sink, pump::Sink::Journal(_));
        self.copies.iter().any(|copy| copy.sinks.aside.is_some() || copy.sinks.copies.iter().any(is_journal))
    }

    /// The pipe on which the logger says that it is ready, once.
    pub fn take_ready(&mut self) -> Option<File> {
        self.ready.take()
    }

    /// The process has its ends: the daemon's duplicates of the logger's pipes are not needed any more.
    pub fn close_logger(&mut self) {
        threads::discard(std::mem::take(&mut self.logger));
    }

    /// The socket on which the terminal is still to come.
    pub fn take_console(&mut self) -> Option<Console> {
        self.console.take().filter(|_| self.terminal.is_none())
    }

    /// The terminal has been received.
    pub fn set_terminal(&mut self, master: OwnedFd) {
        self.terminal = Some(master);
    }
}

/// A client's log files, by the name of the daemon's FIFO whose output they get.
pub type LogFiles = HashMap<&'static str, LogFile>;

impl Plan {
    /// Whether the daemon has a part in the streams of the process.
    pub fn has_streams(&self) -> bool {
        let Wiring { terminal, stdin, logger, .. } = &self.wiring;
        *terminal || matches!(stdin, Input::Fifo(_)) || logger.is_some() || !self.wiring.copies().is_empty()
    }

    /// Whether the client wants its output in files.
    pub fn has_log_files(&self) -> bool {
        self.wiring.copies().iter().any(|(_, _, to)| matches!(to.client, Some(Sink::File { .. })))
    }

    /// Opens the client's log files. Waits for the disks that they are on.
    ///
    /// # Errors
    /// A file can't be opened.
    pub fn open_log_files(&self) -> Result<LogFiles, Error> {
        let owner = self.owner();
        self.log_files(|path, create| LogFile::open(path, create, &owner))
    }

    /// The container, for [`LogFile`].
    fn owner(&self) -> Arc<str> {
        self.key.task.to_string().into()
    }

    fn log_files(
        &self,
        open: impl Fn(&Path, bool) -> Result<LogFile, fifo::Error>,
    ) -> Result<LogFiles, Error> {
        let mut files = LogFiles::new();
        for (_, log_pipe, to) in self.wiring.copies() {
            if let Some(Sink::File { path, create }) = &to.client {
                files.insert(log_pipe, open(path, *create)?);
            }
        }
        Ok(files)
    }

    /// Opens what has to be open before the process runs, beside `files`. Waits for the client for a limited time.
    ///
    /// # Errors
    /// A FIFO can't be opened, nobody reads, or the wait was interrupted.
    pub fn open(&self, fds: &StreamFds, files: LogFiles) -> Result<OpenStreams, Error> {
        for name in self.wiring.own_pipes() {
            fifo::make(&self.pipe(name))?;
        }
        let nothing = &mut |_| Claimed::default();
        let client = |path: &Path, limit| fifo::open_output_nonblocking(path, limit, &self.interrupt);
        let opened = self.open_all(fds, ReopenMode::Starting, nothing, files, client)?;
        Ok(OpenStreams { console: self.console(fds)?, ..opened })
    }

    /// Takes over what an earlier daemon opened, and opens again what systemd did not keep. Does not wait for the client,
    /// which has opened its ends already.
    ///
    /// # Errors
    /// A FIFO or a file can't be opened.
    pub fn reopen(&self, fds: &StreamFds, claims: &Claims, mode: ReopenMode) -> Result<OpenStreams, Error> {
        for name in self.wiring.own_pipes() {
            let path = self.pipe(name);
            // The earlier daemon ended before it had made all of them.
            if mode == ReopenMode::Starting && fifo::kind(&path) == Kind::Missing {
                fifo::make(&path)?;
            }
        }
        let mut claim = |kind| claims.take(kind);
        let (mut terminals, sockets): (Vec<_>, Vec<_>) = claim(StreamKind::Terminal)
            .both
            .into_iter()
            .partition(|fd| nix::unistd::isatty(fd).unwrap_or(false));
        let terminal = terminals.pop();
        let (mut consoles, mut accepted): (Vec<_>, Vec<_>) = sockets.into_iter().partition(is_listener);
        let owner = self.owner();
        let files = self.log_files(|path, create| Ok(LogFile::later(path, create, &owner)))?;
        let client = |path: &Path, _| fifo::open_both_nonblocking(path);
        let opened = self.open_all(fds, mode, &mut claim, files, client)?;
        // If the terminal has not arrived yet, it may still arrive.
        let may_come = terminal.is_none() && mode == ReopenMode::Starting;
        let console = match consoles.pop() {
            Some(listener) if may_come => {
                let not_kept = fds.claim_console(&self.console);
                if let Some(connection) = &not_kept {
                    fds.store(StreamKind::Terminal, self.wiring.store_number, &[connection.as_fd()]);
                }
                Some(Console::adopt(listener, accepted.pop().or(not_kept), &self.console))
            }
            None if may_come => self.console(fds)?,
            Some(_) | None => None,
        };
        if console.is_none() && self.wiring.terminal {
            // The earlier daemon may have ended before it removed the socket.
            let _ = std::fs::remove_file(&self.console);
        }
        claims.rest().for_each(|kind| fds.forget(kind, self.wiring.store_number));
        Ok(OpenStreams { terminal, console, ..opened })
    }

    fn console(&self, fds: &StreamFds) -> Result<Option<Console>, Error> {
        if !self.wiring.terminal {
            return Ok(None);
        }
        let console = Console::listen(&self.console)?;
        fds.store(StreamKind::Terminal, self.wiring.store_number, &[console.fd()]);
        Ok(Some(console))
    }

    /// `claim` returns what an earlier daemon opened of a stream. `client` opens a client's FIFO for writing, for which
    /// it may take the given time.
    fn open_all(
        &self,
        fds: &StreamFds,
        mode: ReopenMode,
        claim: &mut dyn FnMut(StreamKind) -> Claimed,
        mut files: LogFiles,
        client: impl Fn(&Path, Duration) -> Result<File, fifo::Error>,
    ) -> Result<OpenStreams, Error> {
        let (mut opened, number) = (OpenStreams::default(), self.wiring.store_number);
        if let (Input::Fifo(path), ReopenMode::Starting | ReopenMode::Running) = (&self.wiring.stdin, mode) {
            let before = claim(StreamKind::Input);
            match self.open_input(fds, path, before) {
                Ok((input, stdin)) => (opened.input, opened.stdin) = (input, stdin),
                // The client may have removed its FIFO. The process's output does not depend on it.
                Err(error) if mode == ReopenMode::Running => {
                    tracing::warn!(process = %self.key, %error, "{}: can't reopen its input, so the process gets no more input: {error}", self.key);
                }
                Err(error) => return Err(error),
            }
        }
        if self.wiring.logger.is_some() && mode == ReopenMode::Starting {
            opened.ready = Some(fifo::open_reader(&self.pipe(pipes::READY))?);
            for name in [pipes::LOG_STDOUT, pipes::LOG_STDERR] {
                opened.logger.push(fifo::open_both(&self.pipe(name))?);
            }
        }
        if self.wiring.logger.is_some() {
            for path in [pipes::LOG_STDOUT, pipes::LOG_STDERR].map(|name| self.pipe(name)) {
                if fifo::kind(&path) == Kind::Fifo {
                    opened.logger_readers.push(fifo::open_reader(&path)?);
                }
            }
        }
        let begun = Instant::now();
        let client = |path: &Path| client(path, config::STDIO_LIMIT.saturating_sub(begun.elapsed()));
        for (from, log_pipe, to) in self.wiring.copies() {
            let kind = StreamKind::of_log_pipe(log_pipe);
            let mut before = claim(kind);
            let aside = if to.journal == JournalCopy::Aside {
                self.open_aside(fds, mode, claim(kind.aside()), kind.aside(), log_pipe)?
            } else {
                None
            };
            if mode == ReopenMode::Ended && before.is_empty() {
                if aside.is_some() {
                    let sinks = Sinks { aside, ..Sinks::default() };
                    opened.copies.push(Copy { kind, from: From::Delivered, sinks });
                }
                continue;
            }
            let (reader, both) = (from.and_then(|_| before.readers.pop()), before.both.pop());
            let is_stored = [reader.is_some(), both.is_some()];
            let source = match from {
                Some(name) => Some(or_open(reader, || fifo::open_reader(&self.pipe(name)))?),
                None => None,
            };
            let fifo = self.client_fifo(both, log_pipe, to, &client)?;
            fds.store(kind, number, &missing([&source, &fifo], is_stored));
            let copies = self.copies(log_pipe, to, files.remove(log_pipe));
            let mut sinks = Sinks { copies, aside, ..Sinks::default() };
            match (&to.client, fifo) {
                (Some(Sink::EndOnly(_)), fifo) => sinks.keep_open = fifo,
                (_, Some(fifo)) => {
                    sinks.fifo = Some(crate::sys::watch_writable(fifo).map_err(Error::Watch)?);
                }
                (_, None) => {}
            }
            let from = match source {
                Some(fifo) => From::Fifo(Source::fifo(fifo).map_err(Error::Watch)?),
                None if sinks.fifo.is_some() && sinks.copies.is_empty() && sinks.aside.is_none() => {
                    From::Terminal
                }
                None => {
                    let (reader, writer) = pipe(before.readers.pop(), before.writers.pop(), |ends| {
                        fds.store(kind, number, ends);
                    })?;
                    From::Bridge(PipePair::new(reader, writer).map_err(Error::Watch)?)
                }
            };
            opened.copies.push(Copy { kind, from, sinks });
        }
        Ok(opened)
    }

    /// The client's FIFO for input: the reader, for a terminal, and the writer, unless nobody needs the writer any more.
    fn open_input(
        &self,
        fds: &StreamFds,
        path: &Path,
        mut before: Claimed,
    ) -> Result<(Option<File>, Option<File>), Error> {
        let Wiring { terminal, stdin_closed, store_number, .. } = self.wiring;
        let (reader, both) = (before.readers.pop(), before.both.pop());
        let is_stored = [reader.is_some(), both.is_some()];
        let open_reader = || or_open(reader, || fifo::open_reader(path));
        let open_writer = || or_open(both, || fifo::open_both(path));
        let reader = terminal.then(open_reader).transpose()?;
        // Without a terminal, the process may open its input again: see `InputWriter`.
        let writer = (!terminal || !stdin_closed).then(open_writer).transpose()?;
        fds.store(StreamKind::Input, store_number, &missing([&reader, &writer], is_stored));
        Ok((reader, writer))
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
            Some(Sink::Logger) => fifo::open_both_nonblocking(&self.pipe(log_pipe)).map(Some),
            Some(Sink::File { .. }) | None => Ok(None),
        };
        Ok(match before {
            Some(before) => Some(before.into()),
            None => open()?,
        })
    }

    /// The journal's copy of a stream, for which the client does not wait.
    fn open_aside(
        &self,
        fds: &StreamFds,
        mode: ReopenMode,
        mut before: Claimed,
        kind: StreamKind,
        log_pipe: &str,
    ) -> Result<Option<Box<Aside>>, Error> {
        if mode == ReopenMode::Ended && before.is_empty() {
            return Ok(None);
        }
        let ends = pipe(before.readers.pop(), before.writers.pop(), |ends| {
            fds.store(kind, self.wiring.store_number, ends);
        })?;
        let aside = Aside::new(ends, self.journal_lines(log_pipe), self.policy.clone());
        Ok(Some(Box::new(aside.map_err(Error::Watch)?)))
    }

    fn copies(&self, log_pipe: &str, to: &Copied, file: Option<LogFile>) -> Vec<pump::Sink> {
        let mut copies: Vec<_> = file.map(pump::Sink::File).into_iter().collect();
        if to.journal == JournalCopy::Complete {
            let lines = self.journal_lines(log_pipe);
            let is_alone = to.client.is_none() && self.key.exec.is_none();
            copies.push(pump::Sink::Journal(if is_alone { lines.alone() } else { lines }));
        }
        copies
    }
}

fn or_open(before: Option<OwnedFd>, open: impl FnOnce() -> Result<File, fifo::Error>) -> Result<File, Error> {
    match before {
        Some(before) => Ok(before.into()),
        None => Ok(open()?),
    }
}

/// The files that the store does not have. Storing a file again would use one more entry of the store after each restart.
fn missing<const N: usize>(files: [&Option<File>; N], is_stored: [bool; N]) -> Vec<BorrowedFd<'_>> {
    let missing = files.into_iter().zip(is_stored).filter(|(_, is_stored)| !is_stored);
    missing.filter_map(|(file, _)| file.as_ref().map(AsFd::as_fd)).collect()
}

/// Both ends of the pipe of an earlier daemon, or of a new one, which is passed to `store`.
fn pipe(
    reader: Option<OwnedFd>,
    writer: Option<OwnedFd>,
    store: impl FnOnce(&[BorrowedFd<'_>]),
) -> Result<(OwnedFd, OwnedFd), Error> {
    if let (Some(reader), Some(writer)) = (reader, writer) {
        return Ok((reader, writer));
    }
    let flags = OFlag::O_CLOEXEC | OFlag::O_NONBLOCK;
    // It exists as long as the process, and may grow.
    let made = quota::apart(move || nix::unistd::pipe2(flags));
    let (reader, writer) = made.map_err(|errno| Error::Watch(errno.into()))?;
    store(&[reader.as_fd(), writer.as_fd()]);
    Ok((reader, writer))
}
