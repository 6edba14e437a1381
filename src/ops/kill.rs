//! Kill: a signal to a process, or to all of the container.

use std::os::fd::OwnedFd;

use nix::errno::Errno;

use crate::cgroup;
use crate::fault::{self, Point};
use crate::id::ProcessKey;
use crate::services::{Attempt, Error, Shim, blocking};
use crate::sys;
use crate::task::Task;

const SIGKILL: u32 = nix::libc::SIGKILL as u32;
/// The last signal of the kernel (`_NSIG`).
const LAST_SIGNAL: u32 = 64;

impl Shim {
    /// Sends a signal. Takes no lock that a slow verb could hold. `all` is for init: an exec has but
    /// one process.
    ///
    /// # Errors
    /// The process has ended or was never started, or there is no such signal.
    pub async fn kill(
        &self,
        key: &ProcessKey,
        signal: u32,
        all: bool,
        attempt: Attempt,
    ) -> Result<(), Error> {
        let killed = self.send(key, signal, all).await;
        fault::point(Point::KillSent);
        match (attempt, killed) {
            // What the signal was meant to end has ended.
            (
                Attempt::Replayed,
                Err(Error::Finished | Error::UnknownTask { .. } | Error::UnknownExec { .. }),
            ) => Ok(()),
            (_, killed) => killed,
        }
    }

    async fn send(&self, key: &ProcessKey, signal: u32, all: bool) -> Result<(), Error> {
        if !(1..=LAST_SIGNAL).contains(&signal) {
            return Err(Error::Signal(signal));
        }
        let (entry, process) = self.tasks.process(key)?;
        let task = entry.task().clone();
        if all && key.exec.is_none() {
            return blocking(move || kill_all(&task, signal)).await?;
        }
        let recorded = task.process(process.exec()).ok_or(Error::NotStarted)?;
        if recorded.exit().is_some() {
            return Err(Error::Finished);
        }
        let pid = recorded.pid().ok_or(Error::NotStarted)?;
        let failed = |source: Errno| Error::Kill { signal, process: key.to_string(), source: source.into() };
        let held = process.live().process.as_ref().map(|held| held.try_clone()).transpose();
        let held = held.map_err(|source| Error::Kill { signal, process: key.to_string(), source })?;
        let sent = match held {
            // Through the descriptor that is held: the number can't have become another process.
            Some(held) => sys::pidfd_send_signal(&held, signal),
            None => hold_again(&task, pid).and_then(|process| sys::pidfd_send_signal(&process, signal)),
        };
        match sent {
            Err(Errno::ESRCH) => Err(Error::Finished),
            sent => sent.map_err(failed),
        }
    }
}

/// A descriptor for a process that could not be held when it was found, such as for want of descriptors. `ESRCH` only if
/// the process has ended: whoever has its number and lives elsewhere is another.
fn hold_again(task: &Task, pid: u32) -> Result<OwnedFd, Errno> {
    let process = sys::pidfd_open(pid)?;
    let lives_in = cgroup::of_process(pid).ok();
    match (task.cgroup(), lives_in) {
        (Some(container), Some(lives_in)) if lives_in.starts_with(container) => Ok(process),
        _ => Err(Errno::ESRCH),
    }
}

/// Every process of the container: not for the async runtime. One that ends meanwhile is no error, nor is an empty container.
pub(crate) fn kill_all(task: &Task, signal: u32) -> Result<(), Error> {
    let Some(cgroup) = task.cgroup() else {
        return Ok(());
    };
    if signal == SIGKILL {
        return Ok(cgroup::kill(cgroup)?);
    }
    for pid in cgroup::processes(cgroup)? {
        match sys::pidfd_open(pid).and_then(|process| sys::pidfd_send_signal(&process, signal)) {
            Ok(()) | Err(Errno::ESRCH) => {}
            Err(errno) => {
                return Err(Error::Kill { signal, process: pid.to_string(), source: errno.into() });
            }
        }
    }
    Ok(())
}
