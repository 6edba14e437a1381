//! The few system calls that no safe library offers: the only `unsafe` of the project.

pub mod crash;

use std::os::fd::{AsFd, AsRawFd, FromRawFd, IntoRawFd, OwnedFd, RawFd};

use nix::errno::Errno;
use nix::libc;
use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg};
use tokio::io::unix::AsyncFd;

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

/// How a child of this process has ended, if it has: `si_code` and `si_status` of waitid(2). The
/// child stays a zombie, for its next parent to find.
///
/// Not nix's waitid: that fails for a child that was killed by a real-time signal.
///
/// # Errors
/// `ECHILD`: it is no child of ours.
pub fn peek_exit(pid: u32) -> Result<Option<(i32, i32)>, Errno> {
    // SAFETY: all zeroes is a valid siginfo_t: plain integers, and pointers nobody reads.
    let mut info: libc::siginfo_t = unsafe { std::mem::zeroed() };
    let flags = libc::WEXITED | libc::WNOHANG | libc::WNOWAIT;
    // SAFETY: `info` is a siginfo_t of ours that outlives the call.
    Errno::result(unsafe { libc::waitid(libc::P_PID, pid, &mut info, flags) })?;
    // SAFETY: waitid has filled in the fields of a SIGCHLD, or left zeroes if there is no news.
    let (found, status) = unsafe { (info.si_pid(), info.si_status()) };
    Ok((found != 0).then_some((info.si_code, status)))
}

/// Ends this process by a signal that ends processes, without a core dump; returns if it does not.
pub fn die_by(signal: i32) {
    // What can't be done here shows in the caller still being alive.
    let _ = nix::sys::resource::setrlimit(nix::sys::resource::Resource::RLIMIT_CORE, 0, 0);
    // SAFETY: gives a signal its default action back and sends it to this thread; no handler of ours
    // is involved, and no memory but the kernel's.
    unsafe {
        libc::signal(signal, libc::SIG_DFL);
        libc::raise(signal);
    }
}

/// Has the async runtime watch a descriptor. It should be set not to block.
///
/// # Errors
/// The kernel can't watch it (a regular file).
pub fn watch(fd: impl Into<OwnedFd>) -> std::io::Result<AsyncFd<OwnedFd>> {
    watch_as_it_is(fd.into())
}

/// As [`watch`], for what owns a descriptor and can do more with it.
///
/// # Errors
/// As [`watch`].
pub fn watch_as_it_is<T: AsRawFd + Into<OwnedFd>>(fd: T) -> std::io::Result<AsyncFd<T>> {
    // SAFETY: the descriptor is owned by what is returned, so it stays open for as long as it is
    // registered, and no number of another takes its place.
    Ok(unsafe { AsyncFd::register(fd) }?)
}

/// Sets the size of a terminal's window, in characters (ioctl_tty(2), TIOCSWINSZ).
///
/// # Errors
/// It is no terminal.
pub fn set_window(terminal: &impl AsFd, columns: u16, rows: u16) -> Result<(), Errno> {
    let size = libc::winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
    let fd = terminal.as_fd().as_raw_fd();
    // SAFETY: the descriptor is open for as long as it is borrowed, and the kernel only reads `size`.
    Errno::result(unsafe { libc::ioctl(fd, libc::TIOCSWINSZ, &size) }).map(drop)
}

/// Takes one descriptor off a Unix socket (SCM_RIGHTS); nothing if none comes with the next message.
///
/// # Errors
/// The socket can't be read.
pub fn receive_fd(socket: &impl AsFd) -> Result<Option<OwnedFd>, Errno> {
    let mut data = [0; 4096];
    let mut space = nix::cmsg_space!([RawFd; 1]);
    let mut parts = [std::io::IoSliceMut::new(&mut data)];
    let flags = MsgFlags::MSG_CMSG_CLOEXEC;
    let message = recvmsg::<()>(socket.as_fd().as_raw_fd(), &mut parts, Some(&mut space), flags)?;
    let fds = message.cmsgs()?.filter_map(|part| match part {
        ControlMessageOwned::ScmRights(fds) => Some(fds),
        _ => None,
    });
    // SAFETY: the kernel has just put these descriptors into our table, and nobody else knows them.
    let mut fds = fds.flatten().map(|fd| unsafe { OwnedFd::from_raw_fd(fd) });
    let first = fds.next();
    // What was not asked for is closed.
    fds.for_each(drop);
    Ok(first)
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

/// How many bytes that were sent on a Unix socket the other side has not read, counted with the
/// kernel's own overhead (unix(7), `SIOCOUTQ`).
///
/// # Errors
/// It is no socket.
pub fn unread_by_peer(socket: &impl AsFd) -> Result<usize, Errno> {
    let mut bytes: libc::c_int = 0;
    // SAFETY: the descriptor is open for as long as it is borrowed, and the kernel writes one int.
    Errno::result(unsafe { libc::ioctl(socket.as_fd().as_raw_fd(), libc::TIOCOUTQ, &mut bytes) })?;
    usize::try_from(bytes).map_err(|_| Errno::EINVAL)
}

/// The peek offset of a socket: how many bytes at its front have been looked at and not taken; nothing
/// while that is not counted (socket(7), `SO_PEEK_OFF`).
///
/// # Errors
/// It is no socket.
pub fn peek_offset(socket: &impl AsFd) -> Result<Option<usize>, Errno> {
    let mut value: libc::c_int = 0;
    let mut length = libc::socklen_t::try_from(size_of_val(&value)).map_err(|_| Errno::EINVAL)?;
    let fd = socket.as_fd().as_raw_fd();
    let place = std::ptr::from_mut(&mut value).cast();
    // SAFETY: the descriptor is open for as long as it is borrowed; the kernel writes at most `length`
    // bytes to `value`, which has that size.
    let result = unsafe { libc::getsockopt(fd, libc::SOL_SOCKET, libc::SO_PEEK_OFF, place, &mut length) };
    Errno::result(result)?;
    Ok(usize::try_from(value).ok())
}

/// Has the kernel count from now on how many bytes have been looked at and not taken: none so far.
///
/// # Errors
/// The socket does not count.
pub fn count_peeked(socket: &impl AsFd) -> Result<(), Errno> {
    let value: libc::c_int = 0;
    let length = libc::socklen_t::try_from(size_of_val(&value)).map_err(|_| Errno::EINVAL)?;
    let fd = socket.as_fd().as_raw_fd();
    let place = std::ptr::from_ref(&value).cast();
    // SAFETY: the descriptor is open for as long as it is borrowed; the kernel reads `length` bytes of
    // `value`, which has that size.
    let result = unsafe { libc::setsockopt(fd, libc::SOL_SOCKET, libc::SO_PEEK_OFF, place, length) };
    Errno::result(result).map(drop)
}
