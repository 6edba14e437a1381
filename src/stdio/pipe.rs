//! Operations on pipes: move bytes, or read them without removing them.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, SpliceFFlags, fcntl, splice, tee};
use nix::poll::{PollFd, PollFlags};
use nix::unistd::pipe2;
use tokio::io::unix::AsyncFd;

use crate::sys::{self, poll, watch};

pub(super) const NO_WAIT: SpliceFFlags = SpliceFFlags::SPLICE_F_NONBLOCK;

/// How many bytes are moved at once: the size of a pipe.
pub(super) const CHUNK: usize = 64 << 10;

/// The number of bytes that are read before they are moved. If the daemon ends between the two, a file or the journal gets up to
/// this many bytes twice.
pub(super) const PIECE: usize = 4096;

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
        Ok(Self { reader: watch(reader)?, writer: watch(writer)? })
    }
}

/// A buffer for reading a pipe without removing its content.
#[derive(Debug)]
pub(super) struct Scratch {
    copy: OwnedFd,
    copied: OwnedFd,
    pub(super) buffer: Vec<u8>,
}

/// The pause before the next attempt to open something, after no descriptor was free.
const ROOM_PAUSE: Duration = Duration::from_millis(100);

/// Opens something as soon as a descriptor is free. Output waits in its pipe meanwhile.
///
/// # Errors
/// It can't be opened for another reason.
pub(super) async fn once_there_is_room<T>(open: impl Fn() -> io::Result<T>) -> io::Result<T> {
    let mut is_logged = false;
    loop {
        match open() {
            Err(error) if error.raw_os_error().map(Errno::from_raw).is_some_and(sys::is_exhausted) => {
                if !is_logged {
                    tracing::warn!(%error, "output waits for a free descriptor: {error}");
                    is_logged = true;
                }
                tokio::time::sleep(ROOM_PAUSE).await;
            }
            opened => return opened,
        }
    }
}

impl Scratch {
    /// A buffer of this size, which is a [`CHUNK`] at most.
    pub(super) fn new(size: usize) -> Result<Self, Errno> {
        let (copy, copied) = pipe2(OFlag::O_CLOEXEC | OFlag::O_NONBLOCK)?;
        Ok(Self { copy, copied, buffer: vec![0; size] })
    }

    /// Copies up to `most` bytes of a pipe to the buffer. Returns the length: 0 at the end of the pipe, EAGAIN if it is empty.
    pub(super) fn look(&mut self, from: &AsyncFd<OwnedFd>, most: usize) -> Result<usize, Errno> {
        let length = tee(from, &self.copied, most.min(self.buffer.len()), NO_WAIT)?;
        let mut filled = 0;
        while filled < length {
            filled += nix::unistd::read(&self.copy, &mut self.buffer[filled..length])?;
        }
        Ok(length)
    }
}

/// True if poll(2) reports this event, and not only that the other side is closed.
pub(super) fn found(fd: &impl AsFd, event: PollFlags) -> io::Result<bool> {
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
pub(super) async fn data_in(from: &AsyncFd<OwnedFd>) -> io::Result<()> {
    let mut readable = from.readable().await?;
    if !is_ready(from, PollFlags::POLLIN)? {
        readable.clear_ready();
    }
    Ok(())
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

/// Moves bytes between two pipes. Returns their number, 0 at the end.
pub(super) async fn move_some(
    from: &AsyncFd<OwnedFd>,
    to: &AsyncFd<OwnedFd>,
    length: usize,
) -> io::Result<usize> {
    loop {
        // Tries before it waits: a FIFO that is opened again after its writer has closed it never becomes ready.
        match splice(from, None, to, None, length, NO_WAIT) {
            Ok(moved) => return Ok(moved),
            // The kernel does not report which of the two sides is not ready.
            Err(Errno::EAGAIN) => {
                data_in(from).await?;
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

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::Cell;

    #[tokio::test(start_paused = true)]
    async fn a_pipe_that_finds_no_free_descriptor_is_opened_once_there_is_one() {
        let missing = Cell::new(3);
        let open = || match missing.get() {
            0 => Ok(7),
            left => {
                missing.set(left - 1);
                Err(if left == 2 { Errno::ENFILE } else { Errno::EMFILE }.into())
            }
        };
        assert_eq!(once_there_is_room(open).await.unwrap(), 7);
        let denied = once_there_is_room(|| Err::<(), _>(Errno::EACCES.into())).await;
        assert_eq!(denied.unwrap_err().raw_os_error(), Some(Errno::EACCES as i32));
    }
}
