//! Pipes, and what is done with their bytes: moved, or looked at and left where they are.

use std::io;
use std::os::fd::{AsFd, OwnedFd};

use nix::errno::Errno;
use nix::fcntl::{OFlag, SpliceFFlags, splice, tee};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::unistd::pipe2;
use tokio::io::unix::AsyncFd;

use crate::sys::watch;

pub(super) const NO_WAIT: SpliceFFlags = SpliceFFlags::SPLICE_F_NONBLOCK;

/// What is looked at before it moves on: if the daemon ends in between, so much comes twice to a file
/// or to the journal.
pub(super) const PIECE: usize = 4096;

/// A pipe of ours, both ends without blocking.
#[derive(Debug)]
pub struct Bridge {
    pub(super) reader: AsyncFd<OwnedFd>,
    pub(super) writer: AsyncFd<OwnedFd>,
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

/// A way to see what is in a pipe and to leave it there.
#[derive(Debug)]
pub(super) struct Scratch {
    copy: OwnedFd,
    copied: OwnedFd,
    pub(super) buffer: Vec<u8>,
}

impl Scratch {
    pub(super) fn new() -> Result<Self, Errno> {
        let (copy, copied) = pipe2(OFlag::O_CLOEXEC | OFlag::O_NONBLOCK)?;
        Ok(Self { copy, copied, buffer: vec![0; PIECE] })
    }

    /// Fills the beginning of the buffer; 0 at the end of the pipe, EAGAIN if nothing is there.
    pub(super) fn look(&mut self, from: &AsyncFd<OwnedFd>) -> Result<usize, Errno> {
        let length = tee(from, &self.copied, PIECE, NO_WAIT)?;
        let mut filled = 0;
        while filled < length {
            filled += nix::unistd::read(&self.copy, &mut self.buffer[filled..length])?;
        }
        Ok(length)
    }
}

/// Whether the event itself is reported, and not only the end of the other side.
pub(super) fn found(fd: &impl AsFd, event: PollFlags) -> io::Result<bool> {
    let mut fds = [PollFd::new(fd.as_fd(), event)];
    poll(&mut fds, PollTimeout::ZERO)?;
    Ok(fds[0].revents().is_some_and(|found| found.contains(event)))
}

pub(super) fn is_ready(fd: &impl AsFd, event: PollFlags) -> io::Result<bool> {
    let mut fds = [PollFd::new(fd.as_fd(), event)];
    Ok(poll(&mut fds, PollTimeout::ZERO)? > 0)
}

/// More may come from a pipe than there is.
pub(super) fn has_writer(pipe: &impl AsFd) -> io::Result<bool> {
    let mut fds = [PollFd::new(pipe.as_fd(), PollFlags::empty())];
    poll(&mut fds, PollTimeout::ZERO)?;
    Ok(!fds[0].revents().is_some_and(|found| found.contains(PollFlags::POLLHUP)))
}

/// Waits until a pipe has room.
pub(super) async fn room_in(to: &AsyncFd<OwnedFd>) -> io::Result<()> {
    loop {
        let mut writable = to.writable().await?;
        if is_ready(to, PollFlags::POLLOUT)? {
            return Ok(());
        }
        writable.clear_ready();
    }
}

/// Moves something between two pipes; 0 at the end.
pub(super) async fn move_some(
    from: &AsyncFd<OwnedFd>,
    to: &AsyncFd<OwnedFd>,
    length: usize,
) -> io::Result<usize> {
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

pub(super) async fn move_exactly(
    from: &AsyncFd<OwnedFd>,
    to: &AsyncFd<OwnedFd>,
    mut length: usize,
) -> io::Result<()> {
    while length > 0 {
        match move_some(from, to, length).await? {
            0 => return Err(io::ErrorKind::UnexpectedEof.into()),
            moved => length -= moved,
        }
    }
    Ok(())
}
