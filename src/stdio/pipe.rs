//! Operations on pipes: move bytes, or read them without removing them.

use std::future::poll_fn;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, SpliceFFlags, fcntl, tee};
use nix::poll::{PollFd, PollFlags};
use nix::unistd::pipe2;
use tokio::io::unix::AsyncFd;

use crate::sys::{poll, watch, watch_writable};

pub(super) const NO_WAIT: SpliceFFlags = SpliceFFlags::SPLICE_F_NONBLOCK;

/// How many bytes are moved at once: the size of a pipe.
pub(super) const CHUNK: usize = 64 << 10;

/// The number of bytes that are read before they are moved. If the daemon ends between the two, a file or the journal gets up to
/// this many bytes twice.
pub(super) const PIECE: usize = 4096;

/// A pipe has only buffers without bytes. Before Linux 6.15, a write(2) that fails with EFAULT leaves such a buffer, poll(2) reports the
/// pipe as readable, and tee(2) returns 0, as at the end.
pub(super) const ONLY_EMPTY: Errno = Errno::ENODATA;

/// The size of a pipe with as many buffers as a user without privileges can give a pipe (`pipe-max-size`, pipe(7)).
const MOST_BUFFERS: i32 = 1 << 20;

/// A pipe of the daemon with both ends in non-blocking mode.
#[derive(Debug)]
pub struct PipePair {
    pub(super) reader: AsyncFd<OwnedFd>,
    pub(super) writer: AsyncFd<OwnedFd>,
}

impl PipePair {
    /// Makes a pipe of its two ends.
    ///
    /// # Errors
    /// The ends can't be watched. Needs the async runtime.
    pub fn new(reader: OwnedFd, writer: OwnedFd) -> io::Result<Self> {
        Ok(Self { reader: watch(reader)?, writer: watch_writable(writer)? })
    }
}

/// A buffer for reading a pipe without removing its content.
#[derive(Debug)]
pub(super) struct Scratch {
    copy: OwnedFd,
    copied: OwnedFd,
    pub(super) buffer: Vec<u8>,
}

impl Scratch {
    /// A buffer of this size, which is a [`CHUNK`] at most.
    pub(super) fn new(size: usize) -> Result<Self, Errno> {
        let (copy, copied) = pipe2(OFlag::O_CLOEXEC | OFlag::O_NONBLOCK)?;
        Ok(Self { copy, copied, buffer: vec![0; size] })
    }

    /// Copies up to `most` bytes of a pipe to the buffer. Returns the length: 0 at the end of the pipe, EAGAIN if it is empty,
    /// [`ONLY_EMPTY`] if nothing can be read until somebody writes or closes.
    pub(super) fn look(&mut self, from: &AsyncFd<OwnedFd>, most: usize) -> Result<usize, Errno> {
        let most = most.min(self.buffer.len());
        let mut has_grown = false;
        let length = loop {
            let length = tee(from, &self.copied, most, NO_WAIT)?;
            // A pipe whose writers were gone before it was opened has no buffers, and nothing else shows that it has no writer.
            let is_only_empty = || Ok(found(from, PollFlags::POLLIN)? && has_writer(from)?);
            if length > 0 || !is_only_empty().map_err(|_: io::Error| Errno::EIO)? {
                break length;
            }
            // The copies of empty buffers take up room, and read(2) removes them.
            let _ = nix::unistd::read(&self.copy, &mut [0]);
            // More empty buffers than this pipe has room for may be in front of bytes.
            if has_grown || length_in(from) == 0 || !self.resize_as(from) {
                return Err(ONLY_EMPTY);
            }
            has_grown = true;
        };
        let mut filled = 0;
        while filled < length {
            filled += nix::unistd::read(&self.copy, &mut self.buffer[filled..length])?;
        }
        Ok(length)
    }

    /// Gives the pipe for the copies as many buffers as another pipe has, up to [`MOST_BUFFERS`]. Returns false if the kernel refuses.
    fn resize_as(&self, other: &impl AsFd) -> bool {
        let size = fcntl(other, FcntlArg::F_GETPIPE_SZ);
        size.is_ok_and(|size| fcntl(&self.copied, FcntlArg::F_SETPIPE_SZ(size.min(MOST_BUFFERS))).is_ok())
    }
}

/// True if poll(2) reports this event, and not only that the other side is closed.
pub(crate) fn found(fd: &impl AsFd, event: PollFlags) -> io::Result<bool> {
    let mut fds = [PollFd::new(fd.as_fd(), event)];
    poll(&mut fds, Duration::ZERO)?;
    Ok(fds[0].revents().is_some_and(|found| found.contains(event)))
}

pub(super) fn is_ready(fd: &impl AsFd, event: PollFlags) -> io::Result<bool> {
    let mut fds = [PollFd::new(fd.as_fd(), event)];
    Ok(poll(&mut fds, Duration::ZERO)?)
}

/// True if a pipe has a writer.
pub(super) fn has_writer(pipe: &impl AsFd) -> io::Result<bool> {
    let mut fds = [PollFd::new(pipe.as_fd(), PollFlags::empty())];
    poll(&mut fds, Duration::ZERO)?;
    Ok(!fds[0].revents().is_some_and(|found| found.contains(PollFlags::POLLHUP)))
}

/// The number of bytes in a pipe.
pub(super) fn length_in(pipe: &impl AsFd) -> usize {
    rustix::io::ioctl_fionread(pipe).ok().and_then(|length| usize::try_from(length).ok()).unwrap_or(0)
}

/// The number of bytes that a pipe has room for. A pipe with short writes has room for fewer.
pub(super) fn free_in(pipe: &impl AsFd) -> usize {
    let size = fcntl(pipe, FcntlArg::F_GETPIPE_SZ).ok().and_then(|size| usize::try_from(size).ok());
    size.unwrap_or(0).saturating_sub(length_in(pipe))
}

/// Waits until poll(2) may report data in a pipe, or its end. Returns without data now and then.
///
/// Only one task may wait for data in a pipe. So the future needs a tenth of the memory of [`AsyncFd::readable`], and the
/// output of each process waits here for most of its life.
pub(super) async fn data_in(from: &AsyncFd<OwnedFd>) -> io::Result<()> {
    let mut readable = poll_fn(|context| from.poll_read_ready(context)).await?;
    if !is_ready(from, PollFlags::POLLIN)? {
        readable.clear_ready();
    }
    Ok(())
}

/// Waits until a pipe has room. Only one task may wait for it, as for [`data_in`].
pub(super) async fn room_in(to: &AsyncFd<OwnedFd>) -> io::Result<()> {
    loop {
        let mut writable = poll_fn(|context| to.poll_write_ready(context)).await?;
        if is_ready(to, PollFlags::POLLOUT)? {
            return Ok(());
        }
        writable.clear_ready();
    }
}

/// The most that a pipe grows to: four times its usual size (pipe(7)).
const LARGEST: i32 = 256 << 10;

/// Doubles a pipe that is full, unless it is large already. Returns whether it has room now.
///
/// With splice(2), each write of a process takes a whole buffer of a pipe, so the usual 16 buffers are full after 16 short
/// lines. While a process runs, it waits then, as every process whose reader is slow. What it has left behind at its end
/// needs up to as many buffers again. Pipes do not grow before: the user who has made a FIFO may have only so much memory in
/// pipes, and a client's FIFO is root's.
pub(super) fn grow(pipe: &impl AsFd) -> bool {
    match fcntl(pipe, FcntlArg::F_GETPIPE_SZ) {
        Ok(size) if size < LARGEST => fcntl(pipe, FcntlArg::F_SETPIPE_SZ(2 * size)).is_ok(),
        Ok(_) | Err(_) => false,
    }
}
