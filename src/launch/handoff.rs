//! Makes a process that is not systemd's child the main process of a unit, without losing its exit.
//!
//! The process is a child of `launch`: the OCI runtime that started it has exited, and `launch` is a subreaper. `MAINPID=`
//! makes it the unit's main process. When `launch` exits, PID 1 becomes its parent and gets its exit. If the process ends
//! before that, it is a zombie whose exit only `launch` can read. `launch` does not reap it, reports its exit, and exits in
//! the same way:
//! - If systemd did not take the process over (it refuses a zombie), `launch` is still the main process.
//! - If systemd took it over while it ran, the zombie becomes a child of PID 1 when `launch` exits.
//!
//! A process that ends while `launch` exits becomes a zombie of PID 1 as well, which then reaps it as the main process.

use std::io;
use std::os::fd::AsFd;

use libsystemd::daemon::{NotifyState, notify, notify_with_fds};
use nix::poll::{PollFd, PollFlags};

use crate::config::BARRIER_LIMIT;
use crate::sys;
use crate::unit::main_process::WaitStatus;

/// A hundred years. systemd takes "infinity" for no extension.
const LONG_USEC: u64 = 100 * 365 * 24 * 3600 * 1_000_000;

/// Why a process can't be handed over.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The process does not exist, and its exit can't be read.
    #[error("process {pid} and its exit status can't be found: {source}")]
    Lost {
        /// The process.
        pid: u32,
        /// The error of the system call.
        source: io::Error,
    },
    /// systemd can't be notified.
    #[error("can't notify systemd of the process: {0}")]
    Notify(String),
    /// systemd does not answer.
    #[error("systemd did not confirm the process within {} s", BARRIER_LIMIT.as_secs())]
    Silent,
}

/// Hands the process over. If the process has ended already, returns its exit; the caller must then call [`end_as`].
pub(super) fn hand_over(pid: u32) -> Result<Option<WaitStatus>, Error> {
    if let Some(ended) = peek(pid)? {
        return Ok(Some(ended));
    }
    // A drop-in for all services may set `TimeoutStartSec=`. The process runs as long as it wants.
    let no_limit = NotifyState::Other(format!("EXTEND_TIMEOUT_USEC={LONG_USEC}"));
    tell(&[NotifyState::Other(format!("MAINPID={pid}")), no_limit])?;
    barrier()?;
    peek(pid)
}

fn peek(pid: u32) -> Result<Option<WaitStatus>, Error> {
    let ended = sys::peek_exit(pid).map_err(|errno| Error::Lost { pid, source: errno.into() })?;
    Ok(ended.map(|(code, status)| WaitStatus { code, status, at_usec: Some(sys::now_usec()) }))
}

fn tell(states: &[NotifyState]) -> Result<(), Error> {
    match notify(false, states) {
        Ok(true) => Ok(()),
        Ok(false) => Err(Error::Notify("NOTIFY_SOCKET is not set".to_owned())),
        Err(error) => Err(Error::Notify(error.to_string())),
    }
}

/// Waits until systemd has read all earlier notifications (sd_notify_barrier(3)).
fn barrier() -> Result<(), Error> {
    let (here, there) = nix::unistd::pipe().map_err(|errno| Error::Notify(errno.to_string()))?;
    let state = [NotifyState::Other("BARRIER=1".to_owned())];
    notify_with_fds(false, &state, &[std::os::fd::AsRawFd::as_raw_fd(&there)])
        .map_err(|error| Error::Notify(error.to_string()))?;
    drop(there);
    match sys::poll(&mut [PollFd::new(here.as_fd(), PollFlags::empty())], BARRIER_LIMIT) {
        Ok(true) => Ok(()),
        Ok(false) => Err(Error::Silent),
        Err(errno) => Err(Error::Notify(errno.to_string())),
    }
}

/// Exits in the same way as another process.
#[expect(clippy::disallowed_methods, reason = "the exit code is another process's, of all values")]
pub(super) fn end_as(ended: WaitStatus) -> ! {
    if let Some(signal) = ended.signal() {
        sys::die_by(signal);
    }
    std::process::exit(i32::try_from(ended.exit_status()).unwrap_or(255))
}
