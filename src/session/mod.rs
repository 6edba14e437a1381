//! The live side of one process: what the daemon holds open and runs for one attempt to start it.
//!
//! A session is built when the process has its ends of the streams, and dropped whole: another attempt
//! gets a new session.

pub mod fds;
mod input;
mod open;
mod plan;
mod pumps;

use std::fmt;
use std::fs::File;
use std::io;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};

use tokio_util::sync::CancellationToken;
use tracing::Instrument;

use crate::id::{ProcessKey, TaskKey};
use crate::stdio::fifo;
use crate::stdio::pump::{self, Output, Source};
use crate::stdio::terminal::Terminal;
use crate::stdio::{terminal_pump, threads};
use crate::task::wiring::{Input, Wiring};

use fds::{StreamFds, StreamKind};
use input::InputWriter;
use open::{Copy, From};

pub use open::{LogFiles, OpenStreams, ReopenMode};
pub use plan::Plan;
pub use pumps::Pumps;

/// Why the streams of a process can't be used.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A stream can't be opened.
    #[error(transparent)]
    Stream(#[from] fifo::Error),
    /// A terminal can't be used.
    #[error("terminal: {0}")]
    Terminal(#[source] io::Error),
    /// A stream can't be watched.
    #[error("stdio: watch a stream: {0}")]
    Watch(#[source] io::Error),
}

/// Copies a client's input to a terminal.
struct Feed(Pin<Box<dyn Future<Output = ()> + Send>>);

impl fmt::Debug for Feed {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("Feed")
    }
}

/// The terminal of a process, until it hangs up.
type Slot = Arc<Mutex<Option<Arc<Terminal>>>>;

/// What the daemon attaches to one attempt to start a process.
#[derive(Debug, Default)]
pub struct Session {
    /// The writing end of the client's FIFO for input, until the input is closed.
    stdin: Option<InputWriter>,
    /// Reading ends of the logger's pipes. If the logger is killed, they keep the output of a process that has ended
    /// until systemd has started the logger again.
    logger_readers: Vec<File>,
    terminal: Slot,
    pumps: Pumps,
    /// The input of a terminal, until [`Self::start_input`].
    feed: Option<Feed>,
}

impl Session {
    /// Starts copying, except to a terminal ([`Self::start_input`]). The process has its ends of the streams, and the terminal, if it
    /// has one, has been received. `ended` makes futures that resolve when the process has ended.
    ///
    /// # Errors
    /// The terminal can't be used.
    pub fn start<F: Future<Output = ()> + Send + 'static>(
        key: &ProcessKey,
        opened: OpenStreams,
        wiring: &Wiring,
        fds: &Arc<StreamFds>,
        ended: impl Fn() -> F,
    ) -> Result<Self, Error> {
        let _threads = threads::enter();
        let OpenStreams { stdin, input, copies, terminal, logger_readers, .. } = opened;
        let number = wiring.store_number;
        let terminal = terminal.map(Terminal::new).transpose().map_err(Error::Terminal)?.map(Arc::new);
        let pumps = Pumps::default();
        let stdin = stdin.map(|writer| {
            if wiring.terminal {
                InputWriter::of_terminal(writer)
            } else {
                InputWriter::of_process(key, writer, ended(), pumps.stop().now)
            }
        });
        let slot = Arc::new(Mutex::new(terminal.clone()));
        let mut session = Self { stdin, logger_readers, terminal: slot, pumps, feed: None };
        // CloseIO may have come before there was a process; then the process has its input now, and no writer is
        // needed any more.
        if wiring.stdin_closed {
            session.close_stdin();
        }
        if session.stdin.is_none() && matches!(wiring.stdin, Input::Fifo(_)) {
            fds.close_input(wiring);
        }
        let exec = key.exec.as_ref().map(tracing::field::display);
        // Not within the span of the call that starts the process: the output outlives the call.
        let span = tracing::info_span!(
            parent: None,
            "output",
            namespace = %key.task.namespace,
            id = %key.task.id,
            exec_id = exec
        );
        for Copy { kind, from, sinks } in copies {
            let source = match (from, &terminal) {
                (From::Fifo(fifo), _) => fifo,
                (From::Terminal, Some(terminal)) => Source::Terminal(terminal.clone()),
                (From::Bridge(bridge), Some(terminal)) => Source::Bridged(terminal.clone(), bridge),
                (From::Delivered, _) => Source::Delivered,
                // The terminal hung up before a restart. The client of the output waits for the end.
                (From::Terminal | From::Bridge(_), None) => {
                    fds.forget(kind, number);
                    fds.forget(kind.aside(), number);
                    continue;
                }
            };
            let output = Box::new(Output { source, sinks });
            let (ended, stop, fds) = (Box::pin(ended()), session.pumps.stop(), fds.clone());
            let has_terminal = wiring.terminal;
            let copy = async move {
                let delivered = || {
                    fds.forget(kind, number);
                    if has_terminal {
                        fds.forget(StreamKind::Terminal, number);
                    }
                };
                pump::copy(output, ended, stop, delivered).await;
                fds.forget(kind.aside(), number);
            };
            session.pumps.spawn(&key.task, copy.instrument(span.clone()));
        }
        if let (Some(input), Some(terminal)) = (input, terminal) {
            let (slot, stop) = (session.terminal.clone(), session.pumps.stop().now);
            session.feed = Some(Feed(Box::pin(feed(key.clone(), input, terminal, slot, ended(), stop))));
        }
        Ok(session)
    }

    /// Starts copying the client's input to the terminal, if there is one. The window of the terminal has the size that the client
    /// has requested before.
    pub fn start_input(&mut self, task: &TaskKey) {
        if let Some(Feed(feed)) = self.feed.take() {
            threads::spawn(task, feed);
        }
    }

    /// The terminal, until it hangs up.
    pub fn terminal(&self) -> Option<Arc<Terminal>> {
        slot(&self.terminal).clone()
    }

    /// Closes the writing end of stdin. False if it was not open.
    pub fn close_stdin(&mut self) -> bool {
        self.stdin.take().map(InputWriter::close).is_some()
    }

    /// Closes the session's descriptor of the terminal, which hangs up once the pumps have closed theirs. Returns false
    /// if there was no terminal.
    pub fn close_terminal(&mut self) -> bool {
        let terminal = slot(&self.terminal).take();
        terminal.map(threads::discard).is_some()
    }

    /// True if there are no pumps, or if a call already waits for them.
    pub fn is_silent(&self) -> bool {
        self.pumps.is_empty()
    }

    /// Removes the pumps, to wait for them.
    pub fn take_pumps(&mut self) -> Pumps {
        self.pumps.take()
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        self.pumps.cancel();
        self.close_stdin();
        self.close_terminal();
        threads::discard(std::mem::take(&mut self.logger_readers));
    }
}

fn slot(terminal: &Slot) -> std::sync::MutexGuard<'_, Option<Arc<Terminal>>> {
    terminal.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Copies a client's input to a terminal. The end of the input hangs the terminal up, as with
/// containerd-shim-runc-v2.
async fn feed(
    key: ProcessKey,
    input: File,
    terminal: Arc<Terminal>,
    own: Slot,
    ended: impl Future<Output = ()>,
    stop: CancellationToken,
) {
    let fed = async {
        let input = crate::sys::watch(input)?;
        terminal_pump::input(&input, &terminal).await
    };
    tokio::select! {
        fed = fed => {
            if let Err(error) = fed {
                tracing::debug!(process = %key, %error, "can't write input to the terminal any more: {error}");
            }
            terminal.hang_up();
            slot(&own).take();
        }
        () = ended => {}
        () = stop.cancelled() => {}
    }
}

#[cfg(test)]
mod tests;
