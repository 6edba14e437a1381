//! The streams of a process: what the daemon opens, copies and closes.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::io::AsyncReadExt;
use tokio::net::unix::pipe;
use tracing::Instrument;

use crate::config;
use crate::id::{ExecId, ProcessKey, UnitName};
use crate::oci::face;
use crate::stdio::console::Console;
use crate::stdio::fifo;
use crate::stdio::journal::Lines;
use crate::stdio::pump::{self, Source};
use crate::stdio::terminal::Terminal;
use crate::task::wiring::{self, Copied, Input, Sink, Wiring};
use crate::task::{Face, Task};
use crate::unit::name;
use crate::unit::properties::{self, Shown};

use super::{Entry, Error, Live, Process, Shim, blocking};

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
}

/// What is open for a process that is about to be.
#[derive(Default)]
pub(super) struct Opened {
    /// The kept writing end of the client's stdin.
    stdin: Option<File>,
    /// Its reading end, for a terminal.
    input: Option<File>,
    copies: Vec<(Option<Source>, Vec<pump::Sink>)>,
    /// The logger's pipes. The daemon is a writer too, until the process is: the logger must not see
    /// EOF before.
    logger: Vec<File>,
    ready: Option<File>,
    console: Option<Console>,
}

impl Shim {
    /// What the streams of a task's init, or of one of its execs, depend on.
    pub(super) fn streams(&self, task: &Task, exec: Option<&ExecId>) -> Option<Streams> {
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
        })
    }

    /// Opens what has to be open before the process is; starts its logger.
    ///
    /// # Errors
    /// A FIFO or a file can't be opened, nobody reads, or the logger is not ready.
    pub(super) async fn open_streams(&self, streams: &Arc<Streams>) -> Result<Opened, Error> {
        let this = streams.clone();
        let mut opened = blocking(move || this.open_new()).await??;
        if let (Some(unit), Some(ready)) = (&streams.logger, opened.ready.take()) {
            self.start_logger(streams, unit, ready).await?;
        }
        Ok(opened)
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
        let Opened { stdin, input, copies, logger, console, .. } = opened;
        drop(logger);
        let terminal = match console {
            Some(console) => {
                let master = blocking(move || console.receive(config::STDIO_LIMIT)).await??;
                Some(Arc::new(Terminal::new(master).map_err(Error::Terminal)?))
            }
            None => None,
        };
        let mut live = process.live();
        // It may have been closed before there was a process; then the process has it now, and no
        // writer is needed any more.
        let closed =
            entry.task().wiring_mut(process.key.exec.as_ref()).is_none_or(|wiring| wiring.stdin_closed);
        live.stdin = stdin.filter(|_| !closed);
        if let (Some(terminal), Some((columns, rows))) = (&terminal, live.window) {
            terminal.resize(columns, rows).map_err(Error::Terminal)?;
        }
        let span = tracing::info_span!("output", process = %process.key);
        for (source, sinks) in copies {
            let Some(source) = source.or_else(|| terminal.clone().map(Source::Terminal)) else {
                continue;
            };
            let over = process.clone();
            let over = async move {
                over.ended().await;
            };
            let copy = pump::copy(source, sinks, over, live.stop.clone());
            live.pumps.push(tokio::spawn(copy.instrument(span.clone())));
        }
        if let (Some(input), Some(terminal)) = (input, &terminal) {
            tokio::spawn(feed(process.clone(), input, terminal.clone()));
        }
        live.terminal = terminal;
        Ok(())
    }

    /// After a restart: the daemon's ends of the streams of a process that lives.
    pub(super) async fn recover_streams(&self, entry: &Entry, process: &Arc<Process>, streams: Streams) {
        let reopened = blocking(move || streams.reopen()).await;
        let started = match reopened {
            Ok(Ok(opened)) => self.start_pumps(entry, process, opened).await,
            Ok(Err(error)) | Err(error) => Err(error),
        };
        if let Err(error) = started {
            tracing::warn!(process = %process.key, %error, "{}: can't open its streams again: {error}", process.key);
        }
    }

    /// Starts the logger in a unit of its own, and waits until it is ready.
    async fn start_logger(&self, streams: &Streams, unit: &UnitName, ready: File) -> Result<(), Error> {
        let Some(logger) = &streams.wiring.logger else {
            return Ok(());
        };
        let command = self.launch_command(&streams.key, "logger");
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
        self.change(&entry, |task| {
            task.wiring_mut(key.exec.as_ref()).into_iter().for_each(|wiring| wiring.stdin_closed = true);
            Ok(Vec::new())
        })?;
        process.live().stdin = None;
        Ok(())
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
        match &live.terminal {
            Some(terminal) => terminal.resize(columns, rows).map_err(Error::Terminal),
            None => Ok(()),
        }
    }
}

/// Waits until everything that a process wrote is where it belongs. Something that outlives the
/// process and holds its output is not waited for without end.
pub(super) async fn drain(process: &Process) {
    let (pumps, stop) = {
        let mut live = process.live();
        (std::mem::take(&mut live.pumps), live.stop.clone())
    };
    let limit = tokio::time::Instant::now() + DRAIN_LIMIT;
    for mut pump in pumps {
        if tokio::time::timeout_at(limit, &mut pump).await.is_err() {
            let key = &process.key;
            tracing::info!(process = %key, "{key}: output is still open after the end, it is closed now");
            stop.cancel();
            // It ends at once now; that it was cut short is known.
            let _ = pump.await;
        }
    }
}

/// Stops copying, whatever is left.
pub(super) async fn cut_off(process: &Process) {
    let pumps = {
        let mut live = process.live();
        live.stop.cancel();
        std::mem::take(&mut live.pumps)
    };
    for pump in pumps {
        // As in `drain`.
        let _ = pump.await;
    }
}

/// Copies a client's input to a terminal. Its end hangs the terminal up, as with
/// containerd-shim-runc-v2.
async fn feed(process: Arc<Process>, input: File, terminal: Arc<Terminal>) {
    tokio::select! {
        fed = pump::input(input, &terminal) => {
            if let Err(error) = fed {
                tracing::debug!(process = %process.key, %error, "the terminal takes no more input: {error}");
            }
            terminal.hang_up();
            process.live().terminal = None;
        }
        _ = process.ended() => {}
    }
}

impl Live {
    /// The process has ended: nobody reads its stdin any more.
    pub(super) fn close_input(&mut self) {
        self.stdin = None;
        self.terminal = None;
    }
}

impl Streams {
    fn open_new(&self) -> Result<Opened, Error> {
        for name in self.wiring.own_pipes() {
            fifo::make(&self.dir.join(name))?;
        }
        let mut opened = self.open(fifo::open_output_nonblocking)?;
        if self.wiring.terminal {
            opened.console = Some(Console::listen(&self.console)?);
        }
        Ok(opened)
    }

    /// The client has been there before: nobody is waited for.
    fn reopen(&self) -> Result<Opened, Error> {
        let mut opened = self.open(|path, _| fifo::open_both_nonblocking(path))?;
        opened.ready = None;
        Ok(opened)
    }

    /// `client` opens a client's FIFO for writing, for which it may take the given time.
    fn open(&self, client: impl Fn(&Path, Duration) -> Result<File, fifo::Error>) -> Result<Opened, Error> {
        let mut opened = Opened::default();
        if let Input::Fifo(path) = &self.wiring.stdin {
            if self.wiring.terminal {
                opened.input = Some(fifo::open_reader(path)?);
            }
            opened.stdin = Some(fifo::open_both(path)?);
        }
        if self.wiring.logger.is_some() {
            opened.ready = Some(fifo::open_reader(&self.dir.join(wiring::pipe::READY))?);
            for name in [wiring::pipe::LOG_STDOUT, wiring::pipe::LOG_STDERR] {
                opened.logger.push(fifo::open_both(&self.dir.join(name))?);
            }
        }
        let begun = Instant::now();
        let client = |path: &Path| client(path, config::STDIO_LIMIT.saturating_sub(begun.elapsed()));
        for (from, log_pipe, to) in self.wiring.copies() {
            let source = match from {
                Some(name) => {
                    let fifo = fifo::open_reader(&self.dir.join(name))?;
                    Some(Source::fifo(fifo).map_err(Error::Watch)?)
                }
                None => None,
            };
            opened.copies.push((source, self.sinks(log_pipe, to, &client)?));
        }
        Ok(opened)
    }

    fn sinks(
        &self,
        log_pipe: &str,
        to: &Copied,
        client: &impl Fn(&Path) -> Result<File, fifo::Error>,
    ) -> Result<Vec<pump::Sink>, Error> {
        let mut sinks = Vec::new();
        match &to.client {
            Some(Sink::Fifo(path)) => sinks.push(pump::Sink::fifo(client(path)?).map_err(Error::Watch)?),
            Some(Sink::EndOnly(path)) => sinks.push(pump::Sink::EndOnly { _fifo: client(path)? }),
            Some(Sink::File { path, create }) => {
                sinks.push(pump::Sink::File(Some(pump::open_file(path, *create)?)));
            }
            Some(Sink::Logger) => {
                let fifo = fifo::open_both_nonblocking(&self.dir.join(log_pipe))?;
                sinks.push(pump::Sink::fifo(fifo).map_err(Error::Watch)?);
            }
            None => {}
        }
        if to.journal {
            let fields = self.face.fields.iter().map(|(name, value)| (name.as_str(), value.as_str()));
            let exec = self.key.exec.as_ref().map(|exec| ("CONTAINER_EXEC_ID", exec.as_str()));
            let identifier = face::identifier(&self.face);
            let lines = Lines::new(self.container.as_str(), identifier, fields.chain(exec));
            sinks.push(pump::Sink::Journal(lines));
        }
        Ok(sinks)
    }
}

/// As containerd-shim-runc-v2.
const DRAIN_LIMIT: Duration = Duration::from_secs(10);

/// Waits for the first byte on a pipe, or for its end; true for a byte.
///
/// The pipe is read only once the kernel reports something: before its writer has come it would look
/// as if it had ended.
async fn is_ready(ready: File) -> io::Result<bool> {
    let mut ready = pipe::Receiver::from_file(ready)?;
    Ok(ready.read(&mut [0]).await? > 0)
}
