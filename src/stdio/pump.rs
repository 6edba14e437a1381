//! Copies what processes write, in the daemon: from a FIFO of ours or a terminal to where the client,
//! the journal or a logger reads it.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use nix::errno::Errno;
use nix::fcntl::{OFlag, SpliceFFlags, splice, tee};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::unistd::pipe2;
use tokio::io::unix::AsyncFd;
use tokio_util::sync::CancellationToken;

use crate::sys::watch;

use super::journal::Lines;
use super::log_file::LogFile;
use super::terminal::Terminal;

/// What is moved at once: the size of a pipe.
const CHUNK: usize = 64 << 10;

/// What is looked at before it moves on: if the daemon ends in between, so much comes twice to a file
/// or to the journal.
const PIECE: usize = 4096;

/// How long the end of a line is waited for: it stays in the pipe until then, where it is safe.
const LINE_WAIT: Duration = Duration::from_secs(1);
/// The same where a client waits for what is there: a prompt.
const PROMPT_WAIT: Duration = Duration::from_millis(10);

/// How often the daemon tries to deliver input that waits until a program opens its terminal again.
const REOPEN_PAUSE: Duration = Duration::from_millis(200);

/// The kernel keeps at most 64 KiB of a terminal's output, and a page in its line discipline
/// (tty_buffer.c): what a process has written before its end is not more.
const TERMINAL_HOLDS: usize = 128 << 10;

/// Where output comes from.
#[derive(Debug)]
pub enum Source {
    /// A FIFO of ours, opened without blocking. The process has to hold its other end when copying
    /// begins, or have let go of it: a FIFO without a writer looks as if it had ended.
    Fifo(AsyncFd<OwnedFd>),
    /// A terminal.
    Terminal(Arc<Terminal>),
    /// A terminal, by way of a pipe: what has been read and not delivered is in there.
    Bridged(Arc<Terminal>, Bridge),
}

/// A pipe of ours, both ends without blocking.
#[derive(Debug)]
pub struct Bridge {
    reader: AsyncFd<OwnedFd>,
    writer: AsyncFd<OwnedFd>,
}

impl Source {
    /// A FIFO that was opened without blocking.
    ///
    /// # Errors
    /// It can't be watched. Needs the async runtime.
    pub fn fifo(file: File) -> io::Result<Self> {
        watch(file).map(Self::Fifo)
    }
}

impl Bridge {
    /// Takes both ends over.
    ///
    /// # Errors
    /// They can't be watched. Needs the async runtime.
    pub fn new(reader: OwnedFd, writer: OwnedFd) -> io::Result<Self> {
        Ok(Self { reader: watch(reader)?, writer: watch(writer)? })
    }
}

/// Where output goes.
#[derive(Debug, Default)]
pub struct Sinks {
    /// A FIFO, opened for reading and writing without blocking: it never lacks a reader, and one that
    /// goes away holds up the process, not the daemon.
    pub fifo: Option<AsyncFd<OwnedFd>>,
    /// Where else it goes.
    pub copies: Vec<Sink>,
    /// A FIFO that is only kept open until the end.
    pub held: Option<File>,
}

/// Where output goes that has to be looked at.
#[derive(Debug)]
pub enum Sink {
    /// A file.
    File(LogFile),
    /// The journal.
    Journal(Lines),
}

impl Sink {
    async fn write(&mut self, bytes: &[u8]) {
        match self {
            Self::File(file) => file.write(bytes).await,
            Self::Journal(lines) => lines.write(bytes).await,
        }
    }
}

/// Copies until the source has ended and nothing is left, or until `stop`.
///
/// `over` resolves when the process has ended. A terminal is read up to there and no further, though
/// others may hold it still; a FIFO is read on, as what the process left behind may have more to say.
/// A sink that takes nothing for a while is logged: the process and the other sinks go on, and so does the sink when
/// it takes output again.
///
/// Bytes are in the kernel at all times: they move from pipe to pipe (splice(2)), and what has to be
/// looked at is copied first (tee(2)) and then moved. If the daemon ends, none is lost, and the
/// client's FIFO gets none twice; a file or the journal gets the last piece ([`PIECE`]) twice if the
/// daemon ends between writing it and moving on.
pub async fn copy(source: Source, mut sinks: Sinks, over: impl Future<Output = ()>, stop: CancellationToken) {
    let copied = async {
        match (&source, &sinks.fifo) {
            (Source::Fifo(from), Some(to)) if sinks.copies.is_empty() => move_all(from, to).await,
            (Source::Fifo(from), _) => spread(from, &mut sinks, std::future::pending()).await,
            (Source::Terminal(terminal), Some(to)) => move_terminal(terminal, to, over).await,
            (Source::Terminal(_), None) => Ok(()),
            (Source::Bridged(terminal, bridge), _) => {
                let moved = CancellationToken::new();
                let spread = spread(&bridge.reader, &mut sinks, moved.cancelled());
                let first = async {
                    let result = move_terminal(terminal, &bridge.writer, over).await;
                    moved.cancel();
                    result
                };
                let (first, second) = tokio::join!(first, spread);
                first.and(second)
            }
        }
    };
    let copied = tokio::select! {
        copied = copied => copied,
        () = stop.cancelled() => Ok(()),
    };
    if let Err(error) = copied {
        tracing::error!(%error, "stopped copying output: {error}");
    }
    for sink in &mut sinks.copies {
        if let Sink::Journal(lines) = sink {
            lines.finish().await;
        }
    }
}

/// From pipe to pipe, until the first one ends.
async fn move_all(from: &AsyncFd<OwnedFd>, to: &AsyncFd<OwnedFd>) -> io::Result<()> {
    while move_some(from, to, CHUNK).await? > 0 {
        tokio::task::consume_budget().await;
    }
    Ok(())
}

/// Moves something between two pipes; 0 at the end.
async fn move_some(from: &AsyncFd<OwnedFd>, to: &AsyncFd<OwnedFd>, length: usize) -> io::Result<usize> {
    loop {
        // Tried first: a FIFO that is opened again after its writer has gone never gets ready.
        match splice(from, None, to, None, length, NO_WAIT) {
            Ok(moved) => return Ok(moved),
            // The kernel does not say which side has to be waited for.
            Err(Errno::EAGAIN) => {
                let mut readable = from.readable().await?;
                if !is_ready(from, PollFlags::POLLIN)? {
                    readable.clear_ready();
                }
                let mut writable = to.writable().await?;
                if !is_ready(to, PollFlags::POLLOUT)? {
                    writable.clear_ready();
                }
            }
            Err(Errno::EINTR) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
}

const NO_WAIT: SpliceFFlags = SpliceFFlags::SPLICE_F_NONBLOCK;

/// From a terminal to a pipe until the process has ended, and then what it has left.
async fn move_terminal(
    terminal: &Terminal,
    to: &AsyncFd<OwnedFd>,
    over: impl Future<Output = ()>,
) -> io::Result<()> {
    let mut over = pin!(async {
        tokio::select! {
            () = over => {}
            () = terminal.hung_up() => {}
        }
    });
    let all = async {
        loop {
            // When nobody has the terminal open, a program can open it again for as long as the process lives.
            if !move_output(terminal, to, CHUNK).await? {
                terminal.output().await?;
            }
            tokio::task::consume_budget().await;
        }
    };
    let ended: io::Result<()> = tokio::select! {
        failed = all => failed,
        () = &mut over => Ok(()),
    };
    ended?;
    let mut left = TERMINAL_HOLDS;
    // The kernel brings up what it still has in its buffers before it says that there is none
    // (n_tty_poll).
    while left > 0 && is_ready(terminal.master(), PollFlags::POLLIN)? {
        match splice(terminal.master(), None, to, None, left, NO_WAIT) {
            Ok(0) | Err(Errno::EIO) => break,
            Ok(moved) => left = left.saturating_sub(moved),
            Err(Errno::EAGAIN) => room_in(to).await?,
            Err(Errno::EINTR) => {}
            Err(errno) => return Err(errno.into()),
        }
        tokio::task::consume_budget().await;
    }
    Ok(())
}

/// Moves something from a terminal to a pipe; false if nobody has the terminal open.
async fn move_output(terminal: &Terminal, to: &AsyncFd<OwnedFd>, length: usize) -> io::Result<bool> {
    loop {
        match splice(terminal.master(), None, to, None, length, NO_WAIT) {
            Ok(0) | Err(Errno::EIO) => return Ok(false),
            Ok(_) => return Ok(true),
            // The kernel does not say which side has to be waited for. If both sides are ready by now, none has.
            Err(Errno::EAGAIN) if !is_ready(to, PollFlags::POLLOUT)? => room_in(to).await?,
            Err(Errno::EAGAIN) if !is_ready(terminal.master(), PollFlags::POLLIN)? => {
                terminal.output().await?
            }
            Err(Errno::EAGAIN) => tokio::task::consume_budget().await,
            Err(Errno::EINTR) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
}

/// Waits until a pipe has room.
async fn room_in(to: &AsyncFd<OwnedFd>) -> io::Result<()> {
    loop {
        let mut writable = to.writable().await?;
        if is_ready(to, PollFlags::POLLOUT)? {
            return Ok(());
        }
        writable.clear_ready();
    }
}

/// From a pipe to every sink, until the pipe ends; or, once `complete`, until it is empty.
async fn spread(
    from: &AsyncFd<OwnedFd>,
    sinks: &mut Sinks,
    complete: impl Future<Output = ()>,
) -> io::Result<()> {
    let (copy, copied) = pipe2(OFlag::O_CLOEXEC | OFlag::O_NONBLOCK)?;
    let nowhere = OpenOptions::new().write(true).open("/dev/null")?;
    let mut buffer = [0; PIECE];
    let mut complete = pin!(complete);
    let wait = if sinks.fifo.is_some() { PROMPT_WAIT } else { LINE_WAIT };
    let (mut is_complete, mut take_part) = (false, false);
    loop {
        let mut length = match tee(from, &copied, PIECE, NO_WAIT) {
            Ok(0) => return Ok(()),
            Ok(length) => length,
            Err(Errno::EAGAIN) if is_complete => return Ok(()),
            Err(Errno::EAGAIN) => {
                tokio::select! {
                    readable = from.readable() => {
                        let mut readable = readable?;
                        if !is_ready(from, PollFlags::POLLIN)? {
                            readable.clear_ready();
                        }
                    }
                    () = &mut complete => is_complete = true,
                }
                continue;
            }
            Err(Errno::EINTR) => continue,
            Err(errno) => return Err(errno.into()),
        };
        let mut filled = 0;
        while filled < length {
            filled += nix::unistd::read(&copy, &mut buffer[filled..length])?;
        }
        match buffer[..length].iter().rposition(|byte| *byte == b'\n') {
            Some(end) => length = end + 1,
            None if take_part || is_complete || length == PIECE || !has_writer(from)? => {}
            None => {
                // A line that is not finished waits in the pipe, where it is safe.
                let more = async {
                    from.readable().await?.clear_ready();
                    from.readable().await.map(drop)
                };
                take_part = tokio::time::timeout(wait, more).await.is_err();
                continue;
            }
        }
        take_part = false;
        write_to(&mut sinks.copies, &buffer[..length]).await;
        let mut left = length;
        while left > 0 {
            let moved = match &sinks.fifo {
                Some(fifo) => move_some(from, fifo, left).await?,
                None => splice(from, None, &nowhere, None, left, NO_WAIT)?,
            };
            if moved == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            left -= moved;
        }
        tokio::task::consume_budget().await;
    }
}

fn is_ready(fd: &impl AsFd, event: PollFlags) -> io::Result<bool> {
    let mut fds = [PollFd::new(fd.as_fd(), event)];
    Ok(poll(&mut fds, PollTimeout::ZERO)? > 0)
}

/// More may come from a pipe than there is.
fn has_writer(pipe: &impl AsFd) -> io::Result<bool> {
    let mut fds = [PollFd::new(pipe.as_fd(), PollFlags::empty())];
    poll(&mut fds, PollTimeout::ZERO)?;
    Ok(!fds[0].revents().is_some_and(|found| found.contains(PollFlags::POLLHUP)))
}

async fn write_to(sinks: &mut [Sink], bytes: &[u8]) {
    for sink in sinks {
        sink.write(bytes).await;
    }
}

/// Copies a client's input to a terminal until every writer is gone. While nobody has the terminal open, the input
/// waits in the FIFO.
///
/// # Errors
/// The terminal can't be written, or the FIFO can't be read.
pub async fn input(fifo: &AsyncFd<OwnedFd>, terminal: &Terminal) -> io::Result<()> {
    loop {
        match splice(fifo, None, terminal.master(), None, CHUNK, NO_WAIT) {
            Ok(0) => return Ok(()),
            Ok(_) => {}
            // Nobody has the terminal open. The kernel does not report that somebody opens it again.
            Err(Errno::EIO) => tokio::time::sleep(REOPEN_PAUSE).await,
            Err(Errno::EAGAIN) if !is_ready(fifo, PollFlags::POLLIN)? => {
                let mut readable = fifo.readable().await?;
                if !is_ready(fifo, PollFlags::POLLIN)? {
                    readable.clear_ready();
                }
            }
            Err(Errno::EAGAIN) if !is_ready(terminal.master(), PollFlags::POLLOUT)? => {
                terminal.room().await?
            }
            Err(Errno::EAGAIN | Errno::EINTR) => {}
            Err(errno) => return Err(errno.into()),
        }
        tokio::task::consume_budget().await;
    }
}
