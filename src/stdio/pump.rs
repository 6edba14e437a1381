//! Copies what processes write, in the daemon: from a FIFO of ours or a terminal to where the client,
//! the journal or a logger reads it.

use std::fs::{DirBuilder, File, OpenOptions};
use std::io::{self, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::Path;
use std::pin::pin;
use std::sync::Arc;

use nix::errno::Errno;
use nix::fcntl::{SpliceFFlags, splice};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use tokio::io::unix::AsyncFd;
use tokio_util::sync::CancellationToken;

use crate::sys::watch;

use super::fifo::{Error, error};
use super::journal::Lines;
use super::terminal::Terminal;

/// What is moved at once: the size of a pipe.
const CHUNK: usize = 64 << 10;

/// What the kernel gives out of a terminal at once.
const TERMINAL_CHUNK: usize = 4096;
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

/// Where output goes.
#[derive(Debug)]
pub enum Sink {
    /// A FIFO, opened for reading and writing without blocking: it never lacks a reader, and one that
    /// goes away holds up the process, not the daemon.
    Fifo(AsyncFd<OwnedFd>),
    /// A file.
    File(Option<File>),
    /// The journal.
    Journal(Lines),
    /// A FIFO that is only kept open until the end.
    EndOnly {
        /// Closed with this.
        _fifo: File,
    },
}

impl Sink {
    /// A FIFO that was opened without blocking.
    ///
    /// # Errors
    /// As [`Source::fifo`].
    pub fn fifo(file: File) -> io::Result<Self> {
        watch(file).map(Self::Fifo)
    }

    async fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        match self {
            Self::Fifo(fifo) => write_all(fifo, bytes).await,
            Self::File(file) => write_file(file, bytes).await,
            Self::Journal(lines) => lines.write(bytes).await,
            Self::EndOnly { .. } => Ok(()),
        }
    }
}

/// Opens a file for appending; with `create` it and its directories are made.
///
/// # Errors
/// [`Error::Io`]
pub fn open_file(path: &Path, create: bool) -> Result<File, Error> {
    if let (true, Some(parent)) = (create, path.parent()) {
        DirBuilder::new().recursive(true).mode(0o755).create(parent).map_err(error("create", parent))?;
    }
    let mut options = OpenOptions::new();
    options.append(true).create(create).mode(0o644).open(path).map_err(error("open", path))
}

/// Copies until the source has ended and nothing is left, or until `stop`.
///
/// `over` resolves when the process has ended. A terminal is read up to there and no further, though
/// others may hold it still; a FIFO is read on, as what the process left behind may have more to say.
/// A sink that fails is logged and left out: the process goes on, and so do the other sinks.
pub async fn copy(
    source: Source,
    mut sinks: Vec<Sink>,
    over: impl Future<Output = ()>,
    stop: CancellationToken,
) {
    let copied = async {
        match (&source, sinks.as_slice()) {
            (Source::Fifo(from), [Sink::Fifo(to)]) => move_all(from, to).await,
            (Source::Fifo(from), _) => copy_all(from, &mut sinks).await,
            (Source::Terminal(terminal), _) => copy_terminal(terminal, &mut sinks, over).await,
        }
    };
    let copied = tokio::select! {
        copied = copied => copied,
        () = stop.cancelled() => Ok(()),
    };
    if let Err(error) = copied {
        tracing::error!(%error, "output can't be copied any more: {error}");
    }
    for sink in &mut sinks {
        if let Sink::Journal(lines) = sink
            && let Err(error) = lines.finish().await
        {
            tracing::error!(%error, "the last line does not reach the journal: {error}");
        }
    }
}

/// From pipe to pipe, without the bytes being touched.
async fn move_all(from: &AsyncFd<OwnedFd>, to: &AsyncFd<OwnedFd>) -> io::Result<()> {
    let flags = SpliceFFlags::SPLICE_F_NONBLOCK | SpliceFFlags::SPLICE_F_MOVE;
    loop {
        let mut readable = from.readable().await?;
        let mut writable = to.writable().await?;
        match splice(from, None, to, None, CHUNK, flags) {
            Ok(0) => return Ok(()),
            Ok(_) => tokio::task::consume_budget().await,
            // The kernel does not say which side has to be waited for.
            Err(Errno::EAGAIN) => {
                if !is_ready(from, PollFlags::POLLIN)? {
                    readable.clear_ready();
                }
                if !is_ready(to, PollFlags::POLLOUT)? {
                    writable.clear_ready();
                }
            }
            Err(Errno::EINTR) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
}

fn is_ready(fd: &impl AsFd, event: PollFlags) -> io::Result<bool> {
    let mut fds = [PollFd::new(fd.as_fd(), event)];
    Ok(poll(&mut fds, PollTimeout::ZERO)? > 0)
}

async fn copy_all(from: &AsyncFd<OwnedFd>, sinks: &mut Vec<Sink>) -> io::Result<()> {
    let mut buffer = vec![0; CHUNK];
    loop {
        match read(from, &mut buffer).await? {
            0 => return Ok(()),
            length => write_to(sinks, &buffer[..length]).await,
        }
    }
}

async fn copy_terminal(
    terminal: &Terminal,
    sinks: &mut Vec<Sink>,
    over: impl Future<Output = ()>,
) -> io::Result<()> {
    let mut buffer = vec![0; TERMINAL_CHUNK];
    let mut over = pin!(async {
        tokio::select! {
            () = over => {}
            () = terminal.hung_up() => {}
        }
    });
    loop {
        tokio::select! {
            length = terminal.read(&mut buffer) => match length? {
                0 => return Ok(()),
                length => write_to(sinks, &buffer[..length]).await,
            },
            () = &mut over => break,
        }
    }
    let mut left = TERMINAL_HOLDS;
    while left > 0
        && let Some(length @ 1..) = terminal.read_now(&mut buffer)?
    {
        write_to(sinks, &buffer[..length]).await;
        left = left.saturating_sub(length);
    }
    Ok(())
}

async fn write_to(sinks: &mut Vec<Sink>, bytes: &[u8]) {
    let mut failed = Vec::new();
    for (i, sink) in sinks.iter_mut().enumerate() {
        if let Err(error) = sink.write(bytes).await {
            tracing::error!(%error, "output is lost from here on: {error}");
            failed.push(i);
        }
    }
    for i in failed.into_iter().rev() {
        sinks.remove(i);
    }
}

/// Copies a client's input to a terminal until every writer is gone.
///
/// # Errors
/// The terminal has gone, or the FIFO can't be read.
pub async fn input(fifo: File, terminal: &Terminal) -> io::Result<()> {
    let fifo = watch(fifo)?;
    let mut buffer = vec![0; 4096];
    loop {
        match read(&fifo, &mut buffer).await? {
            0 => return Ok(()),
            length => terminal.write_all(&buffer[..length]).await?,
        }
    }
}

async fn read(fifo: &AsyncFd<OwnedFd>, buffer: &mut [u8]) -> io::Result<usize> {
    loop {
        let mut ready = fifo.readable().await?;
        if let Ok(result) = ready.try_io(|fifo| Ok(nix::unistd::read(fifo.get_ref(), buffer)?)) {
            return result;
        }
    }
}

async fn write_all(fifo: &AsyncFd<OwnedFd>, mut bytes: &[u8]) -> io::Result<()> {
    while !bytes.is_empty() {
        let mut ready = fifo.writable().await?;
        if let Ok(written) = ready.try_io(|fifo| Ok(nix::unistd::write(fifo.get_ref(), bytes)?)) {
            bytes = &bytes[written?..];
        }
    }
    Ok(())
}

/// On a thread for blocking work, a chunk at a time: a slow disk holds up this process's output, and
/// only that.
async fn write_file(file: &mut Option<File>, bytes: &[u8]) -> io::Result<()> {
    let Some(mut taken) = file.take() else {
        return Ok(());
    };
    let bytes = bytes.to_vec();
    let written = tokio::task::spawn_blocking(move || {
        let result = taken.write_all(&bytes);
        (taken, result)
    });
    let (taken, result) = written.await.map_err(io::Error::other)?;
    *file = Some(taken);
    result
}
