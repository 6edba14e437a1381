//! The daemon's side of a process's terminal.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use tokio::io::unix::AsyncFd;
use tokio_util::sync::CancellationToken;

/// The master side of a pseudo-terminal. When the last reference is dropped, the terminal hangs up, and its session gets
/// SIGHUP.
#[derive(Debug)]
pub struct Terminal {
    master: OwnedFd,
    output: Edges,
    room: Edges,
    hung_up: CancellationToken,
}

/// The changes of one direction of a terminal.
///
/// The readiness of the async runtime can't be used: once every program has closed the terminal, it reports "closed" for
/// ever, although a program may open the terminal again. An epoll instance between the runtime and the terminal reports
/// each change once, including "closed".
#[derive(Debug)]
struct Edges(AsyncFd<Changes>);

/// An epoll instance for the async runtime.
#[derive(Debug)]
struct Changes(Epoll);

impl AsRawFd for Changes {
    fn as_raw_fd(&self) -> RawFd {
        self.0.0.as_raw_fd()
    }
}

impl From<Changes> for OwnedFd {
    fn from(changes: Changes) -> Self {
        changes.0.0
    }
}

impl Edges {
    fn of(master: &OwnedFd, direction: EpollFlags) -> io::Result<Self> {
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
        epoll.add(master, EpollEvent::new(direction | EpollFlags::EPOLLET, 0))?;
        crate::sys::watch_as_it_is(Changes(epoll)).map(Self)
    }

    /// Waits for a change since the last call. Cancelling a call loses no change.
    async fn next(&self) -> io::Result<()> {
        loop {
            let mut ready = self.0.readable().await?;
            let mut change = [EpollEvent::empty()];
            match ready.get_inner().0.wait(&mut change, EpollTimeout::ZERO) {
                Ok(0) => ready.clear_ready(),
                Err(Errno::EINTR) => {}
                taken => return Ok(taken.map(drop)?),
            }
        }
    }
}

impl Terminal {
    /// Makes a terminal of a master side.
    ///
    /// # Errors
    /// The descriptor can't be made non-blocking, or can't be watched.
    pub fn new(master: OwnedFd) -> io::Result<Self> {
        let flags = OFlag::from_bits_retain(fcntl(&master, FcntlArg::F_GETFL)?);
        fcntl(&master, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))?;
        let (output, room) =
            (Edges::of(&master, EpollFlags::EPOLLIN)?, Edges::of(&master, EpollFlags::EPOLLOUT)?);
        Ok(Self { master, output, room, hung_up: CancellationToken::new() })
    }

    /// The master side, for reading and writing.
    pub(super) fn master(&self) -> &OwnedFd {
        &self.master
    }

    /// Waits until there may be more output, or the last program has closed the terminal.
    ///
    /// # Errors
    /// The terminal can't be watched.
    pub(super) async fn output(&self) -> io::Result<()> {
        self.output.next().await
    }

    /// Waits until there may be room for more input, or the last program has closed the terminal.
    ///
    /// # Errors
    /// The terminal can't be watched.
    pub(super) async fn room(&self) -> io::Result<()> {
        self.room.next().await
    }

    /// Sets the window size, in characters.
    ///
    /// # Errors
    /// The descriptor is not a terminal.
    pub fn resize(&self, columns: u16, rows: u16) -> io::Result<()> {
        Ok(crate::sys::set_window(&self.master, columns, rows)?)
    }

    /// Ends all pumps that use the terminal.
    pub fn hang_up(&self) {
        self.hung_up.cancel();
    }

    /// Waits until [`Self::hang_up`] was called.
    pub(super) async fn hung_up(&self) {
        self.hung_up.cancelled().await;
    }
}
