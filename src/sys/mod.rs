//! The few system calls that no safe library offers: the only `unsafe` of the project.

use std::os::fd::{AsFd, AsRawFd, FromRawFd, IntoRawFd, OwnedFd, RawFd};

use nix::errno::Errno;
use nix::libc;

/// The descriptors that systemd passed to this process, each with the name it gave them.
///
/// Takes `LISTEN_PID`, `LISTEN_FDS` and `LISTEN_FDNAMES` out of the environment, so that children
/// don't take them for theirs, and a second call finds none.
///
/// # Errors
/// Descriptors were announced, and can't be received.
pub fn take_systemd_fds() -> Result<Vec<(String, OwnedFd)>, libsystemd::errors::SdError> {
    if std::env::var_os("LISTEN_FDS").is_none() {
        return Ok(Vec::new());
    }
    let received = libsystemd::activation::receive_descriptors_with_names(true)?;
    let own = |(fd, name): (libsystemd::activation::FileDescriptor, String)| {
        // SAFETY: systemd opened the descriptor for this process (LISTEN_PID was checked), nobody
        // else has been given it, and the environment that announced it is gone.
        (name, unsafe { OwnedFd::from_raw_fd(fd.into_raw_fd()) })
    };
    Ok(received.into_iter().map(own).collect())
}

/// A descriptor for a process (pidfd_open(2)).
///
/// # Errors
/// `ESRCH`: there is no such process.
pub fn pidfd_open(pid: u32) -> Result<OwnedFd, Errno> {
    // SAFETY: the call takes two integers and returns a descriptor that is ours alone.
    let fd = Errno::result(unsafe { libc::syscall(libc::SYS_pidfd_open, pid as libc::pid_t, 0) })?;
    let fd = RawFd::try_from(fd).map_err(|_| Errno::EBADF)?;
    // SAFETY: the kernel has just made this descriptor, and nobody else has seen its number.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// A signal to a process by its descriptor (pidfd_send_signal(2)), also a real-time one.
///
/// # Errors
/// `ESRCH`: the process has ended. `EINVAL`: no such signal.
pub fn pidfd_send_signal(process: &impl AsFd, signal: u32) -> Result<(), Errno> {
    let fd = process.as_fd().as_raw_fd();
    let info = std::ptr::null::<libc::siginfo_t>();
    // SAFETY: the descriptor is open for as long as it is borrowed; no siginfo is passed.
    let result = unsafe { libc::syscall(libc::SYS_pidfd_send_signal, fd, signal as libc::c_int, info, 0) };
    Errno::result(result).map(drop)
}

/// Puts descriptors at 3, 4, 5, …, where a program that is about to be run expects them.
///
/// # Errors
/// A descriptor can't be moved; the process should end then.
pub fn place_from_three(fds: Vec<OwnedFd>) -> Result<(), Errno> {
    const FIRST: RawFd = 3;
    let count = RawFd::try_from(fds.len()).map_err(|_| Errno::EMFILE)?;
    // Out of the way first, so that no target number is a source that comes later.
    let mut above = Vec::new();
    for fd in &fds {
        above.push(Errno::result(
            // SAFETY: duplicates an open descriptor to a free number at or above the given one.
            unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_DUPFD_CLOEXEC, FIRST + count) },
        )?);
    }
    drop(fds);
    for (number, fd) in (FIRST..).zip(above) {
        // SAFETY: `fd` is ours; whatever had `number` is closed, which is what is asked for: the
        // caller runs another program next, and keeps no descriptor of its own but 0, 1 and 2.
        Errno::result(unsafe { libc::dup2(fd, number) })?;
    }
    Ok(())
}
