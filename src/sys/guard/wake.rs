//! What a guard does so that systemd starts the next daemon when it is due.
//!
//! systemd waits for `RestartSec=` and then for up to 250 ms more: it lets timers expire together, to wake up rarely
//! (sd_event_add_time(3), `accuracy`), and no unit can change that. But each event makes it look at its timers. The end of a
//! child is such an event.
//!
//! Everything here must be async-signal-safe, as in `stuck`.

use nix::libc;

/// Between the ends of two children. So a child ends soon after the delay of the daemon's unit is over, which is 20 ms at first
/// and grows to 100 ms (`RestartSec=`, `RestartMaxDelaySec=`).
static PAUSE: libc::timespec = libc::timespec { tv_sec: 0, tv_nsec: 12_000_000 };
/// The last one ends 360 ms after the daemon, when systemd has looked at its timers anyway.
const TIMES: u32 = 30;

/// Wakes systemd, which is the parent of this process, several times. Returns true as soon as one of the signals comes.
///
/// # Safety
/// Async-signal-safe. The signals have to be blocked.
pub unsafe fn systemd_until(signals: &libc::sigset_t) -> bool {
    // SAFETY: system calls, on memory of this function.
    unsafe {
        for _ in 0..TIMES {
            if libc::sigtimedwait(signals, std::ptr::null_mut(), &raw const PAUSE) > 0 {
                return true;
            }
            wake_parent();
        }
    }
    false
}

/// Starts a child of this process's parent. The child ends at once.
///
/// # Safety
/// As for fork(2) in a process with threads: the child has to be async-signal-safe.
unsafe fn wake_parent() {
    // SAFETY: the child only ends.
    unsafe {
        if super::sharing_descriptors(libc::CLONE_PARENT, 0) == 0 {
            libc::_exit(0);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_parent_gets_a_child_that_has_ended() {
        // SAFETY: the children only make system calls.
        unsafe {
            let systemd = libc::fork();
            if systemd == 0 {
                let guard = libc::fork();
                if guard == 0 {
                    wake_parent();
                    libc::_exit(7);
                }
                let mut statuses = [-1; 2];
                let pids = [&raw mut statuses[0], &raw mut statuses[1]].map(|status| libc::wait(status));
                let others = pids.iter().zip(statuses).filter(|(pid, _)| **pid != guard);
                let is_ended = others.map(|(pid, status)| *pid > 0 && status == 0).eq([true]);
                libc::_exit(i32::from(!is_ended));
            }
            let mut status = -1;
            libc::waitpid(systemd, &raw mut status, 0);
            assert_eq!(status, 0);
        }
    }

    #[test]
    fn a_signal_ends_the_waking() {
        // SAFETY: as above.
        unsafe {
            let guard = libc::fork();
            if guard == 0 {
                let mut signals: libc::sigset_t = std::mem::zeroed();
                libc::sigemptyset(&raw mut signals);
                libc::sigaddset(&raw mut signals, libc::SIGUSR2);
                libc::sigprocmask(libc::SIG_BLOCK, &raw const signals, std::ptr::null_mut());
                libc::kill(libc::getpid(), libc::SIGUSR2);
                libc::_exit(i32::from(!systemd_until(&signals)));
            }
            let mut status = -1;
            libc::waitpid(guard, &raw mut status, 0);
            assert_eq!(status, 0);
        }
    }
}
