//! The daemon's side of a process's terminal.

use std::io;
use std::os::fd::OwnedFd;

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use tokio::io::unix::AsyncFd;
use tokio_util::sync::CancellationToken;

/// The master side of a pseudo-terminal. When the last reference goes, the terminal hangs up, and
/// its session gets SIGHUP.
#[derive(Debug)]
pub struct Terminal {
    master: AsyncFd<OwnedFd>,
    hung_up: CancellationToken,
}

impl Terminal {
    /// Takes a master side over.
    ///
    /// # Errors
    /// It can't be set to non-blocking, or be watched.
    pub fn new(master: OwnedFd) -> io::Result<Self> {
        let flags = OFlag::from_bits_retain(fcntl(&master, FcntlArg::F_GETFL)?);
        fcntl(&master, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))?;
        Ok(Self { master: crate::sys::watch(master)?, hung_up: CancellationToken::new() })
    }

    /// The master side, for moving bytes in and out.
    pub(super) fn master(&self) -> &AsyncFd<OwnedFd> {
        &self.master
    }

    /// Sets the size of its window, in characters.
    ///
    /// # Errors
    /// It is no terminal.
    pub fn resize(&self, columns: u16, rows: u16) -> io::Result<()> {
        Ok(crate::sys::set_window(self.master.get_ref(), columns, rows)?)
    }

    /// Makes those who read it let go of it.
    pub fn hang_up(&self) {
        self.hung_up.cancel();
    }

    /// Resolves when it has been hung up.
    pub(super) async fn hung_up(&self) {
        self.hung_up.cancelled().await;
    }
}
