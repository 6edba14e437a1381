//! poll(2), which a signal does not end.

use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollTimeout};

/// Waits for an event of one of the descriptors. False if there was none within the time limit.
///
/// The kernel interrupts a poll(2) whenever its thread handles a signal, even one that would not wait. Any thread of the daemon
/// can get its SIGCHLD and SIGTERM.
///
/// # Errors
/// As poll(2), without `EINTR`.
pub fn poll(fds: &mut [PollFd<'_>], limit: Duration) -> Result<bool, Errno> {
    let begun = Instant::now();
    loop {
        let left = limit.saturating_sub(begun.elapsed());
        match nix::poll::poll(fds, PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX)) {
            Ok(0) if begun.elapsed() >= limit => return Ok(false),
            Ok(0) | Err(Errno::EINTR) => {}
            Ok(_) => return Ok(true),
            Err(errno) => return Err(errno),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::libc;
    use nix::poll::PollFlags;
    use std::os::fd::AsFd;
    use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

    static HANDLED: AtomicU32 = AtomicU32::new(0);

    extern "C" fn handle(_signal: libc::c_int) {
        HANDLED.fetch_add(1, Ordering::Relaxed);
    }

    /// Runs work in a thread that handles signals all the time, and returns its result and how many there were.
    fn with_signals<T: Send>(work: impl FnOnce() -> T + Send) -> (T, u32) {
        // SAFETY: the handler only changes an atomic number. SIGURG is ignored otherwise, and no other test uses it.
        unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = handle as *const () as usize;
            action.sa_flags = libc::SA_RESTART;
            libc::sigaction(libc::SIGURG, &action, std::ptr::null_mut());
        }
        let (before, done) = (HANDLED.load(Ordering::Relaxed), AtomicBool::new(false));
        let (tell, told) = std::sync::mpsc::channel();
        let worked = std::thread::scope(|scope| {
            let worker = scope.spawn(|| {
                // SAFETY: has no arguments.
                tell.send(unsafe { libc::pthread_self() }).unwrap();
                let worked = work();
                done.store(true, Ordering::Relaxed);
                worked
            });
            let thread = told.recv().unwrap();
            while !done.load(Ordering::Relaxed) {
                // SAFETY: the thread is not joined before the loop has ended.
                unsafe { libc::pthread_kill(thread, libc::SIGURG) };
                std::thread::yield_now();
            }
            worker.join().unwrap()
        });
        (worked, HANDLED.load(Ordering::Relaxed) - before)
    }

    #[test]
    fn signals_neither_end_nor_extend_a_wait() {
        let (silent, _writer) = nix::unistd::pipe().unwrap();
        let limit = Duration::from_millis(200);
        let begun = Instant::now();
        let wait = || poll(&mut [PollFd::new(silent.as_fd(), PollFlags::POLLIN)], limit);
        let (waited, signals) = with_signals(wait);
        assert_eq!(waited, Ok(false));
        assert!(signals > 0 && begun.elapsed() >= limit, "{signals} signals, {:?}", begun.elapsed());
    }
}
