//! Makes a process that is not systemd's child the main process of a unit, without losing its exit.
//!
//! The process is a child of ours, as the OCI runtime that made it is gone and we are a subreaper.
//! systemd takes it with `MAINPID=`; when we leave, its parent is PID 1, which then gets its exit. But
//! it may end before that. Then it is a zombie that only we can ask. We leave it as it is, say how it
//! ended, and end in the same way:
//! - systemd has not taken it (it refuses a zombie): we are the main process ourselves;
//! - systemd has taken it while it lived: the zombie goes to PID 1 when we leave.
//!
//! One that ends while we leave goes to PID 1 as a zombie too, which by then waits for nothing else.

use std::io;
use std::os::fd::AsFd;
use std::time::{Instant, SystemTime};

use libsystemd::daemon::{NotifyState, notify, notify_with_fds};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::config::BARRIER_LIMIT;
use crate::sys;
use crate::unit::main_process::Ended;

/// Why a process can't be handed over.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// It is not there, and its exit is not either.
    #[error("process {pid} and its exit status can't be found: {source}")]
    Lost {
        /// The process.
        pid: u32,
        /// Why not.
        source: io::Error,
    },
    /// systemd can't be told.
    #[error("can't notify systemd of the process: {0}")]
    Notify(String),
    /// systemd does not react.
    #[error("systemd did not confirm the process within {} s", BARRIER_LIMIT.as_secs())]
    Silent,
}

/// Hands the process over. Says how it has ended if it has; [`end_as`] is to follow then.
pub(super) fn hand_over(pid: u32) -> Result<Option<Ended>, Error> {
    if let Some(ended) = peek(pid)? {
        return Ok(Some(ended));
    }
    tell(NotifyState::Other(format!("MAINPID={pid}")))?;
    barrier()?;
    peek(pid)
}

fn peek(pid: u32) -> Result<Option<Ended>, Error> {
    let ended = sys::peek_exit(pid).map_err(|errno| Error::Lost { pid, source: errno.into() })?;
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    let at_usec = u64::try_from(since.as_micros()).unwrap_or(u64::MAX);
    Ok(ended.map(|(code, status)| Ended { code, status, at_usec }))
}

fn tell(state: NotifyState) -> Result<(), Error> {
    match notify(false, &[state]) {
        Ok(true) => Ok(()),
        Ok(false) => Err(Error::Notify("NOTIFY_SOCKET is not set".to_owned())),
        Err(error) => Err(Error::Notify(error.to_string())),
    }
}

/// Returns when systemd has read all that it was told before (sd_notify_barrier(3)).
fn barrier() -> Result<(), Error> {
    let (here, there) = nix::unistd::pipe().map_err(|errno| Error::Notify(errno.to_string()))?;
    let state = [NotifyState::Other("BARRIER=1".to_owned())];
    notify_with_fds(false, &state, &[std::os::fd::AsRawFd::as_raw_fd(&there)])
        .map_err(|error| Error::Notify(error.to_string()))?;
    drop(there);
    let end = Instant::now() + BARRIER_LIMIT;
    loop {
        let mut fds = [PollFd::new(here.as_fd(), PollFlags::empty())];
        let left =
            PollTimeout::try_from(end.saturating_duration_since(Instant::now())).unwrap_or(PollTimeout::MAX);
        match poll(&mut fds, left) {
            Ok(0) => return Err(Error::Silent),
            Ok(_) => return Ok(()),
            Err(Errno::EINTR) => {}
            Err(errno) => return Err(Error::Notify(errno.to_string())),
        }
    }
}

/// Ends as another process did.
#[expect(clippy::disallowed_methods, reason = "the exit code is another process's, of all values")]
pub(super) fn end_as(ended: Ended) -> ! {
    if let Some(signal) = ended.signal() {
        sys::die_by(signal);
    }
    std::process::exit(i32::try_from(ended.exit_status()).unwrap_or(255))
}
