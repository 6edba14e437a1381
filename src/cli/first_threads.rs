//! The threads that the daemon starts first. tokio panics if it can't start a thread, so the daemon finds out before whether
//! it can.

use std::path::Path;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};
use std::{io, thread};

use nix::unistd::{Pid, gettid};

use crate::guard::Earlier;
use crate::stdio::threads;

use super::Failure;

/// The name of a thread that only shows that it can be started.
const NAME: &str = "check";
/// The stack size of a thread that only waits, in bytes.
const STACK: usize = 64 << 10;
/// The kernel normally releases an ended thread within microseconds. The daemon does not wait longer than this.
const RELEASE_LIMIT: Duration = Duration::from_secs(5);

/// Starts the threads for streams, and those that look into the guards of earlier daemons, if the system allows so many besides
/// those that the daemon can't do without. These are the workers of its runtime, one for blocking work, and that of
/// [`sys::quota`](crate::sys::quota), which would take the place of the one before.
///
/// # Errors
/// The system does not even allow the threads that the daemon can't do without.
pub(super) fn start(workers: usize, earlier: &mut Earlier) -> Result<(), Failure> {
    let needed = workers + 2;
    if let Err(error) = check(needed + threads::FIRST + earlier.count()).and_then(|()| threads::start()) {
        check(needed).map_err(|error| {
            Failure(format!(
                "the system does not allow the daemon {needed} threads: {error}; see TasksMax= of its service, and kernel.threads-max"
            ))
        })?;
        tracing::warn!(%error, "can't start threads for the streams of containers, so a container that keeps a stream busy delays the calls of others: {error}");
        return Ok(());
    }
    earlier.collect();
    Ok(())
}

/// Checks that the system allows so many threads: starts as many, which exist at the same time, and ends them.
fn check(number: usize) -> io::Result<()> {
    let all_started = Mutex::new(());
    let wait = || {
        drop(all_started.lock());
        gettid()
    };
    thread::scope(|scope| {
        let held = all_started.lock().unwrap_or_else(PoisonError::into_inner);
        let mut threads = Vec::new();
        let result = (0..number).try_for_each(|_| {
            let thread = thread::Builder::new().name(NAME.to_owned()).stack_size(STACK);
            threads.push(thread.spawn_scoped(scope, wait)?);
            Ok(())
        });
        drop(held);
        // A thread counts until the kernel has released it. The end of the scope does not wait for that.
        threads.into_iter().filter_map(|thread| thread.join().ok()).for_each(wait_for_release);
        result
    })
}

/// Waits until the kernel has released this thread, which has been joined. In rare cases that is a moment after the join, and
/// nothing reports it.
fn wait_for_release(ended: Pid) {
    let limit = Instant::now() + RELEASE_LIMIT;
    while exists(ended) && Instant::now() < limit {
        thread::yield_now();
    }
}

/// True until the kernel has released this thread of the daemon.
fn exists(thread: Pid) -> bool {
    Path::new(&format!("/proc/self/task/{thread}")).exists()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    /// True for a thread that only a check starts.
    fn is_of_check(thread: &fs::DirEntry) -> bool {
        fs::read_to_string(thread.path().join("comm")).is_ok_and(|name| name.trim() == NAME)
    }

    #[test]
    fn no_thread_is_left_after_a_check() {
        for _ in 0..500 {
            check(4).unwrap();
            let left = fs::read_dir("/proc/self/task").unwrap().flatten().filter(is_of_check).count();
            assert_eq!(left, 0);
        }
    }
}
