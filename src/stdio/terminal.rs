//! The daemon's side of a process's terminal.

use std::io;
use std::os::fd::OwnedFd;

use nix::errno::Errno;
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

    /// Reads what the processes write; 0 when none of them has the terminal any more.
    pub(super) async fn read(&self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            let mut ready = self.master.readable().await?;
            if let Ok(result) = ready.try_io(|master| read(master.get_ref(), buffer)) {
                return result;
            }
        }
    }

    /// Reads what is there already; nothing if there is none. The kernel brings up what it still
    /// has in its buffers before it says so (n_tty_read).
    pub(super) fn read_now(&self, buffer: &mut [u8]) -> io::Result<Option<usize>> {
        match read(self.master.get_ref(), buffer) {
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => Ok(None),
            result => result.map(Some),
        }
    }

    /// Writes input for the processes, in full.
    pub(super) async fn write_all(&self, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            let mut ready = self.master.writable().await?;
            let written = ready.try_io(|master| Ok(nix::unistd::write(master.get_ref(), bytes)?));
            match written {
                Ok(Ok(count)) => bytes = &bytes[count..],
                Ok(Err(error)) => return Err(error),
                Err(_) => {}
            }
        }
        Ok(())
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

fn read(master: &OwnedFd, buffer: &mut [u8]) -> io::Result<usize> {
    match nix::unistd::read(master, buffer) {
        // The last process that had it open is gone.
        Err(Errno::EIO) => Ok(0),
        result => Ok(result?),
    }
}
