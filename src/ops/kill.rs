//! Kill: a signal to the init process, or to all of the container.

use crate::cgroup;
use crate::id::TaskKey;
use crate::task::Task;

use super::{Entry, Error, Shim};

const SIGKILL: u32 = nix::libc::SIGKILL as u32;
/// The last signal of the kernel (`_NSIG`).
const LAST_SIGNAL: u32 = 64;

impl Shim {
    /// Sends a signal. Takes no lock that a slow verb could hold.
    ///
    /// # Errors
    /// The process has ended, or there is no such signal.
    pub fn kill(&self, key: &TaskKey, signal: u32, all: bool) -> Result<(), Error> {
        if !(1..=LAST_SIGNAL).contains(&signal) {
            return Err(Error::Signal(signal));
        }
        let entry = self.created(key)?;
        let task = entry.task().clone();
        if all {
            return kill_all(&task, signal);
        }
        if task.init.exit().is_some() {
            return Err(Error::Finished);
        }
        signal_init(&entry, &task, signal)
    }
}

/// Through the descriptor that is held: the number can't have become another process.
fn signal_init(entry: &Entry, task: &Task, signal: u32) -> Result<(), Error> {
    let live = entry.live();
    let Some(process) = &live.process else {
        return Err(Error::Finished);
    };
    match crate::sys::pidfd_send_signal(process, signal) {
        Ok(()) => Ok(()),
        Err(nix::errno::Errno::ESRCH) => Err(Error::Finished),
        Err(errno) => {
            Err(Error::Kill { signal, pid: task.init.pid().unwrap_or_default(), source: errno.into() })
        }
    }
}

/// Every process of the container. One that ends meanwhile is no error, nor is an empty container.
pub(super) fn kill_all(task: &Task, signal: u32) -> Result<(), Error> {
    let Some(cgroup) = &task.cgroup else {
        return Ok(());
    };
    if signal == SIGKILL {
        return Ok(cgroup::kill(cgroup)?);
    }
    for pid in cgroup::processes(cgroup)? {
        match crate::sys::pidfd_open(pid).and_then(|process| crate::sys::pidfd_send_signal(&process, signal))
        {
            Ok(()) | Err(nix::errno::Errno::ESRCH) => {}
            Err(errno) => return Err(Error::Kill { signal, pid, source: errno.into() }),
        }
    }
    Ok(())
}
