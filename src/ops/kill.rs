//! Kill: sends a signal to a process, or to all processes of a container.

use std::os::fd::OwnedFd;
use std::path::Path;

use nix::errno::Errno;

use crate::cgroup;
use crate::fault::{self, Point};
use crate::id::ProcessKey;
use crate::services::{Delivery, Entry, Error, Process, Tasks, WaitsFor, waiting_in_any_thread};
use crate::sys;
use crate::task::Task;
use crate::task::phase::Phase;

const SIGKILL: u32 = nix::libc::SIGKILL as u32;
/// The last signal of the kernel (`_NSIG`).
const LAST_SIGNAL: u32 = 64;

impl Tasks {
    /// Sends a signal. Takes no lock that a slow operation could hold. `all` has an effect for init only. Signal 0 only asks
    /// whether the process exists (kill(2)).
    ///
    /// # Errors
    /// The process has ended or was never started, or there is no such signal.
    pub async fn kill(
        &self,
        key: &ProcessKey,
        signal: u32,
        all: bool,
        delivery: Delivery,
    ) -> Result<(), Error> {
        let killed = self.send(key, signal, all).await;
        fault::point(Point::KillSent);
        match (delivery, killed) {
            // An earlier daemon may have sent the signal, and the process has ended.
            (
                Delivery::Replayed,
                Err(Error::Finished | Error::UnknownTask { .. } | Error::UnknownExec { .. }),
            ) => Ok(()),
            (_, killed) => killed,
        }
    }

    async fn send(&self, key: &ProcessKey, signal: u32, all: bool) -> Result<(), Error> {
        if signal > LAST_SIGNAL {
            return Err(Error::Signal(signal));
        }
        let (entry, process) = self.process(key)?;
        let task = entry.task().clone();
        if task.init.phase.container().is_none() {
            // The process waits for its restore, or is being restored.
            if matches!(task.init.phase, Phase::Restoring { .. }) && ends_a_restore(signal) {
                entry.init.live().attempt.interrupted.cancel();
                return Ok(());
            }
            return Err(Error::UnknownTask { key: key.task.clone() });
        }
        let ends_task = key.exec.is_none() && signal == SIGKILL && task.init.is_alive();
        if all && key.exec.is_none() {
            if ends_task {
                end_all(&entry, &task).await?;
            } else {
                kill_all(&task, signal).await?;
            }
        } else {
            signal_process(&task, &process, signal)?;
        }
        if ends_task {
            // criu may hang in a checkpoint, which would delay the Delete.
            entry.init.live().attempt.interrupted.cancel();
        }
        Ok(())
    }
}

/// Sends a signal to one process.
fn signal_process(task: &Task, process: &Process, signal: u32) -> Result<(), Error> {
    let recorded = task.process(process.exec()).ok_or(Error::NotStarted)?;
    if recorded.exit().is_some() {
        return Err(Error::Finished);
    }
    let pid = recorded.pid().ok_or(Error::NotStarted)?;
    let key = &process.key;
    let failed = |source: Errno| Error::Kill { signal, process: key.to_string(), source: source.into() };
    let held = process.live().process.as_ref().map(|held| held.try_clone()).transpose();
    let held = held.map_err(|source| Error::Kill { signal, process: key.to_string(), source })?;
    let sent = match held {
        // Through the pidfd: the pid may belong to another process by now.
        Some(held) => sys::pidfd_send_signal(&held, signal),
        None => held_again(task, pid, sys::pidfd_open(pid))
            .and_then(|process| sys::pidfd_send_signal(&process, signal)),
    };
    match sent {
        Err(Errno::ESRCH) => Err(Error::Finished),
        sent => sent.map_err(failed),
    }
}

/// True for the signals with which clients end a task. Processes that are being restored get no signal: they may not
/// have their signal handlers yet.
fn ends_a_restore(signal: u32) -> bool {
    use nix::libc::{SIGINT, SIGKILL, SIGQUIT, SIGTERM};
    [SIGINT, SIGKILL, SIGQUIT, SIGTERM].iter().any(|ending| u32::try_from(*ending) == Ok(signal))
}

/// A pidfd that was opened only now: it could not be opened before, for lack of descriptors for example, or nobody tried. Fails
/// with `ESRCH` only if the process has ended; a process with this pid in another cgroup is another process.
fn held_again(task: &Task, pid: u32, opened: Result<OwnedFd, Errno>) -> Result<OwnedFd, Errno> {
    let process = opened?;
    match (task.cgroup(), cgroup::of_process(pid)) {
        (Some(container), Ok(lives_in)) if lives_in.starts_with(container) => Ok(process),
        (Some(_), Err(error)) if error.is_gone() => Err(Errno::ESRCH),
        // A process may hide its cgroup behind a path that is too long to be read, but not keep itself from being killed.
        (Some(_), Err(_)) => Ok(process),
        _ => Err(Errno::ESRCH),
    }
}

/// Kills every process of the container, and init also if somebody has moved it into another cgroup.
pub(super) async fn end_all(entry: &Entry, task: &Task) -> Result<(), Error> {
    let killed = kill_all(task, SIGKILL).await;
    // The kernel may not have killed the cgroup in time. The signal to init needs no lock of the cgroup.
    let signalled = match signal_process(task, &entry.init, SIGKILL) {
        Err(Error::Finished | Error::NotStarted) => Ok(()),
        signalled => signalled,
    };
    killed.and(signalled)
}

/// Sends a signal to every process of the container. It is no error if processes end meanwhile, or if there are none.
async fn kill_all(task: &Task, signal: u32) -> Result<(), Error> {
    let Some(cgroup) = task.cgroup().map(Path::to_owned) else {
        return Ok(());
    };
    if signal == SIGKILL {
        return Ok(cgroup::kill(&cgroup).await?);
    }
    let walked = task.clone();
    let walk = move || signal_each(&walked, &cgroup, signal);
    waiting_in_any_thread(WaitsFor::Processes, &task.key, walk).await?
}

/// Sends a signal to one process of a container after the other. Blocks.
fn signal_each(task: &Task, cgroup: &Path, signal: u32) -> Result<(), Error> {
    for pid in cgroup::processes(cgroup)? {
        // The list may be old by now: reading 100,000 cgroups takes seconds. A process that has left the container gets no signal.
        let sent = held_again(task, pid, sys::pidfd_open(pid))
            .and_then(|process| sys::pidfd_send_signal(&process, signal));
        match sent {
            Ok(()) | Err(Errno::ESRCH) => {}
            Err(errno) => {
                return Err(Error::Kill { signal, process: pid.to_string(), source: errno.into() });
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::services::process::hold;
    use crate::simulation::harness::{Step, World};
    use std::os::unix::ffi::OsStrExt;

    #[test]
    fn a_process_that_can_not_be_opened_has_not_ended() {
        let world = World::new("kill-again");
        world.take(&[Step::Create, Step::Start], Delivery::First).unwrap().unwrap();
        let init = world.init();
        let found = world.live(move |shim| async move {
            let (entry, _) = shim.tasks.process(&init).unwrap();
            let task = entry.task().clone();
            let pid = task.init.pid().unwrap();
            // This test's own process is in another cgroup, so it is not init, although the record gives its pid to
            // init.
            let stranger = std::process::id();
            [
                held_again(&task, pid, sys::pidfd_open(pid)),
                held_again(&task, pid, Err(Errno::EMFILE)),
                held_again(&task, stranger, sys::pidfd_open(stranger)),
                held_again(&task, pid, Err(Errno::ESRCH)),
            ]
            .map(|held| held.map(drop))
        });
        assert_eq!(found.unwrap(), [Ok(()), Err(Errno::EMFILE), Err(Errno::ESRCH), Err(Errno::ESRCH)]);
    }

    #[test]
    fn a_process_that_hides_its_cgroup_can_be_killed() {
        let world = World::new("kill-hidden");
        world.take(&[Step::Create, Step::Start], Delivery::First).unwrap().unwrap();
        let init = world.init();
        let killed = world.live(move |shim| async move {
            let (entry, process) = shim.tasks.process(&init).unwrap();
            let task = entry.task().clone();
            let pid = task.init.pid().unwrap();
            // A name that is no UTF-8, and one that can't be read.
            let nested = task.cgroup().unwrap().join(std::ffi::OsStr::from_bytes(b"\xff"));
            crate::cgroup::fake::make(&nested);
            crate::cgroup::fake::place(&nested, pid);
            let mut held = Vec::new();
            let mut hold_again = || {
                hold(&entry, &process, pid);
                held.push((
                    process.live().process.is_some(),
                    held_again(&task, pid, sys::pidfd_open(pid)).is_ok(),
                ));
            };
            hold_again();
            crate::cgroup::fake::hide(pid);
            hold_again();
            (held, signal_process(&task, &process, SIGKILL))
        });
        let (held, killed) = killed.unwrap();
        assert_eq!(held, [(true, true), (true, true)]);
        killed.unwrap();
    }
}
