//! System calls on descriptors of processes, sockets and terminals that nix does not have. Where rustix does not have
//! them either, this module has the only `unsafe` of the project.

pub mod bounded;
pub mod bounded_file;
pub mod child;
pub mod crash;
pub mod exec;
pub mod guard;
mod heap;
mod huge;
pub mod interrupt;
pub mod mount_attributes;
mod poll;
pub mod quota;
mod receive;
mod room;
pub mod scheduling;
pub mod spawn;
pub mod tree;
pub mod user_namespace;

use std::io::IoSlice;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, IntoRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, SystemTime};

use nix::errno::Errno;
use nix::libc;
use nix::poll::{PollFd, PollFlags};
use nix::sched::CloneFlags;
use nix::sys::eventfd::EventFd;
use nix::sys::resource::{Resource, getrlimit};
use nix::sys::socket::{ControlMessage, MsgFlags, UnixCredentials, sendmsg};
use rustix::net::{self, AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use rustix::process::{Pid, PidfdFlags, WaitId, WaitIdOptions, waitid};
use rustix::termios::{Winsize, tcsetwinsize};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

pub use heap::{limit_unused_memory, return_unused_memory};
pub use huge::use_huge_pages;
pub use poll::poll;
pub use receive::{discard_message, peek_fds, peek_text, receive_from_process};
pub use room::once_there_is_room;

/// Connects to a Unix socket, without waiting for anything. The connection does not wait either.
///
/// # Errors
/// Nobody listens, or the listener's queue is full: clients come faster than it accepts them
/// ([`std::io::ErrorKind::WouldBlock`]).
pub fn connect_without_waiting(path: &Path) -> std::io::Result<UnixStream> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    net::connect(&socket, &SocketAddrUnix::new(path)?)?;
    Ok(socket.into())
}

/// The descriptors that systemd passed to this process, each with the name it gave them.
///
/// Removes `LISTEN_PID`, `LISTEN_FDS` and `LISTEN_FDNAMES` from the environment, so that children do not use them, and a
/// second call finds no descriptors.
///
/// # Errors
/// The environment announces descriptors that can't be received.
pub fn take_systemd_fds() -> Result<Vec<(String, OwnedFd)>, libsystemd::errors::SdError> {
    if std::env::var_os("LISTEN_FDS").is_none() {
        return Ok(Vec::new());
    }
    let received = libsystemd::activation::receive_descriptors_with_names(true)?;
    let own = |(fd, name): (libsystemd::activation::FileDescriptor, String)| {
        // SAFETY: systemd opened the descriptor for this process (LISTEN_PID was checked), no other
        // code owns it, and the environment that announced it has been removed.
        (name, unsafe { OwnedFd::from_raw_fd(fd.into_raw_fd()) })
    };
    Ok(received.into_iter().map(own).collect())
}

/// True if the system or this process lacks something that may be free later: descriptors, memory, or disk space. EAGAIN is
/// not in the list: it also means that a descriptor is not ready.
pub fn is_exhausted(errno: Errno) -> bool {
    use Errno::{EDQUOT, EMFILE, ENFILE, ENOBUFS, ENOMEM, ENOSPC};
    matches!(errno, EMFILE | ENFILE | ENOMEM | ENOBUFS | ENOSPC | EDQUOT)
}

/// [`is_exhausted`] for the error of an operation.
pub fn lacks_room(error: &std::io::Error) -> bool {
    error.raw_os_error().map(Errno::from_raw).is_some_and(is_exhausted)
}

/// How many files this process may have open (`RLIMIT_NOFILE`), and how many more it can open at the least: numbers below
/// the lowest free one are in use, numbers above it may be.
pub fn descriptors() -> (u64, u64) {
    let limit = getrlimit(Resource::RLIMIT_NOFILE).map_or(u64::MAX, |(soft, _)| soft);
    let lowest = match EventFd::new() {
        Ok(file) => u64::try_from(file.as_fd().as_raw_fd()).unwrap_or_default(),
        Err(_) => limit,
    };
    (limit, limit.saturating_sub(lowest))
}

/// Now, in microseconds since 1970.
pub fn now_usec() -> u64 {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_micros()).unwrap_or(u64::MAX)
}

/// A descriptor for a process (pidfd_open(2)).
///
/// # Errors
/// `ESRCH`: there is no such process.
pub fn pidfd_open(pid: u32) -> Result<OwnedFd, Errno> {
    rustix::process::pidfd_open(process(pid)?, PidfdFlags::empty()).map_err(errno)
}

/// True if the process of a pidfd ends within this time. Blocks.
///
/// # Errors
/// Those of poll(2), which only lacks memory or descriptors.
pub fn ends_within(process: &OwnedFd, limit: Duration) -> Result<bool, Errno> {
    poll(&mut [PollFd::new(process.as_fd(), PollFlags::POLLIN)], limit)
}

/// Converts a process id for rustix. `ESRCH` for a number that can't be a process id.
fn process(pid: u32) -> Result<Pid, Errno> {
    i32::try_from(pid).ok().and_then(Pid::from_raw).ok_or(Errno::ESRCH)
}

fn errno(error: rustix::io::Errno) -> Errno {
    Errno::from_raw(error.raw_os_error())
}

/// Sends a signal to a process by its descriptor (pidfd_send_signal(2)). Real-time signals work, too: rustix has no safe
/// value for them.
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

/// The wait status of a child of this process, if the child has ended: `si_code` and `si_status` of waitid(2). The
/// child stays a zombie, which its next parent can wait for.
///
/// Not nix's waitid: that fails for a child that was killed by a real-time signal.
///
/// # Errors
/// `ECHILD`: it is not a child of this process.
pub fn peek_exit(pid: u32) -> Result<Option<(i32, i32)>, Errno> {
    peek(pid, WaitIdOptions::NOHANG)
}

/// Waits until a child of this process has ended, and returns its wait status as [`peek_exit`] does.
///
/// The end of the child is not enough: while another process traces it (ptrace(2)), its parent does not see its wait
/// status, although its pidfd is readable.
///
/// # Errors
/// `ECHILD`: it is not a child of this process.
pub fn wait_for_exit(pid: u32) -> Result<(i32, i32), Errno> {
    loop {
        match peek(pid, WaitIdOptions::empty()) {
            Ok(Some(ended)) => return Ok(ended),
            Ok(None) | Err(Errno::EINTR) => {}
            Err(errno) => return Err(errno),
        }
    }
}

fn peek(pid: u32, options: WaitIdOptions) -> Result<Option<(i32, i32)>, Errno> {
    let flags = WaitIdOptions::EXITED | WaitIdOptions::NOWAIT | options;
    let ended = waitid(WaitId::Pid(process(pid)?), flags).map_err(errno)?;
    Ok(ended.and_then(|ended| {
        let status = ended.exit_status().or_else(|| ended.terminating_signal())?;
        Some((ended.raw_code(), status))
    }))
}

/// Ends this process by a signal, without a core dump. Returns if the signal does not end it.
pub fn die_by(signal: i32) {
    // If a call fails, this process survives, and the caller continues.
    let _ = nix::sys::resource::setrlimit(nix::sys::resource::Resource::RLIMIT_CORE, 0, 0);
    // SAFETY: restores the default action of a signal and sends it to this thread. No handler of ours
    // runs, and no memory but the kernel's changes.
    unsafe {
        libc::signal(signal, libc::SIG_DFL);
        libc::raise(signal);
    }
}

/// Registers a function that runs when this process ends (atexit(3)). False if the C library has refused it.
#[cfg(test)]
pub fn at_exit(run: extern "C" fn()) -> bool {
    // SAFETY: the function is safe to call at any time, and is part of the program, which is never unloaded.
    unsafe { libc::atexit(run) == 0 }
}

/// Resolves when a process has ended.
///
/// # Errors
/// The kernel can't watch it.
pub async fn ended(process: OwnedFd) -> std::io::Result<()> {
    watch(process)?.readable().await.map(drop)
}

/// Resolves when a child of this process has ended, and reaps it.
///
/// # Errors
/// The kernel can't watch it.
pub async fn reaped(child: &OwnedFd) -> std::io::Result<()> {
    ended(child.try_clone()?).await?;
    waitid(WaitId::PidFd(child.as_fd()), WaitIdOptions::EXITED).map_err(errno)?;
    Ok(())
}

/// Registers a descriptor from which this process reads with the async runtime. The descriptor should be in non-blocking
/// mode.
///
/// Room for writing is not an event: the kernel would wake this process each time that a peer reads from a socket.
///
/// # Errors
/// The kernel can't watch it (a regular file).
pub fn watch(fd: impl Into<OwnedFd>) -> std::io::Result<AsyncFd<OwnedFd>> {
    watch_as_it_is(fd.into())
}

/// As [`watch`], for a descriptor to which this process writes: room for writing is an event, and what can be read is one, too.
///
/// # Errors
/// As [`watch`].
pub fn watch_writable(fd: impl Into<OwnedFd>) -> std::io::Result<AsyncFd<OwnedFd>> {
    register(fd.into(), Interest::READABLE | Interest::WRITABLE)
}

/// As [`watch`], for a type that owns a descriptor, such as a listener.
///
/// # Errors
/// As [`watch`].
pub fn watch_as_it_is<T: AsRawFd + Into<OwnedFd>>(fd: T) -> std::io::Result<AsyncFd<T>> {
    register(fd, Interest::READABLE)
}

fn register<T: AsRawFd + Into<OwnedFd>>(fd: T, interest: Interest) -> std::io::Result<AsyncFd<T>> {
    // SAFETY: the returned value owns the descriptor, so it stays open for as long as it is
    // registered, and its number is not reused.
    Ok(unsafe { AsyncFd::register_with_interest(fd, interest) }?)
}

/// Sets the size of a terminal's window, in characters (ioctl_tty(2), TIOCSWINSZ).
///
/// # Errors
/// It is no terminal.
pub fn set_window(terminal: &impl AsFd, columns: u16, rows: u16) -> Result<(), Errno> {
    let size = Winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
    tcsetwinsize(terminal, size).map_err(errno)
}

/// `FS_IMMUTABLE_FL` of ioctl_iflags(2).
const IMMUTABLE: libc::c_int = 0x10;

/// Makes a file immutable: neither its content nor its inode can be changed.
///
/// # Errors
/// The file system does not support it (memfds do since Linux 6.0), or this process is not allowed to.
pub fn set_immutable(file: &impl AsFd) -> Result<(), Errno> {
    set_flags(file, IMMUTABLE)
}

/// Sets a file's inode flags (ioctl_iflags(2)).
///
/// # Errors
/// As [`set_immutable`].
pub fn set_flags(file: &impl AsFd, flags: libc::c_int) -> Result<(), Errno> {
    // SAFETY: the descriptor is open for as long as it is borrowed; the kernel reads an int, whatever the number of the
    // call says of a long (put_user and get_user of fs/ioctl.c).
    Errno::result(unsafe { libc::ioctl(file.as_fd().as_raw_fd(), libc::FS_IOC_SETFLAGS as _, &flags) })
        .map(drop)
}

/// True if a file is immutable.
///
/// # Errors
/// The file system does not support it.
pub fn is_immutable(file: &impl AsFd) -> Result<bool, Errno> {
    let mut flags: libc::c_int = 0;
    // SAFETY: the descriptor is open for as long as it is borrowed; the kernel writes an int to `flags`.
    Errno::result(unsafe { libc::ioctl(file.as_fd().as_raw_fd(), libc::FS_IOC_GETFLAGS as _, &mut flags) })?;
    Ok(flags & IMMUTABLE != 0)
}

/// The number of a pseudo-terminal, by its master side (ioctl_tty(2), TIOCGPTN).
///
/// # Errors
/// `ENOTTY`: it is no master side.
pub fn terminal_number(master: &impl AsFd) -> Result<u32, Errno> {
    let mut number: libc::c_uint = 0;
    // SAFETY: the descriptor is open for as long as it is borrowed, and the kernel writes one unsigned int.
    Errno::result(unsafe { libc::ioctl(master.as_fd().as_raw_fd(), libc::TIOCGPTN, &mut number) })?;
    Ok(number)
}

/// True for the master side of a pseudo-terminal.
pub fn is_terminal_master(fd: &impl AsFd) -> bool {
    terminal_number(fd).is_ok()
}

/// Sends a datagram as another process of root's (unix(7), `SCM_CREDENTIALS`), which needs `CAP_SYS_ADMIN`.
///
/// # Errors
/// `ESRCH`: there is no such process. `EAGAIN`: the receiver is busy.
pub fn send_as(socket: &impl AsFd, text: &str, process: u32) -> std::io::Result<()> {
    let pid = libc::pid_t::try_from(process).map_err(|_| Errno::ESRCH)?;
    let sender = UnixCredentials::from(libc::ucred { pid, uid: 0, gid: 0 });
    let (parts, control) = ([IoSlice::new(text.as_bytes())], [ControlMessage::ScmCredentials(&sender)]);
    sendmsg::<()>(socket.as_fd().as_raw_fd(), &parts, &control, MsgFlags::MSG_NOSIGNAL, None)?;
    Ok(())
}

/// Moves descriptors to the numbers 3, 4, 5, …, where the program that runs next expects them.
///
/// # Errors
/// A descriptor can't be moved; the process should end then.
pub fn place_from_three(fds: Vec<OwnedFd>) -> Result<(), Errno> {
    const FIRST: RawFd = 3;
    let count = RawFd::try_from(fds.len()).map_err(|_| Errno::EMFILE)?;
    // First to high numbers, so that no target is the number of a later source.
    let mut above = Vec::new();
    for fd in &fds {
        above.push(rustix::io::fcntl_dupfd_cloexec(fd, FIRST + count).map_err(errno)?);
    }
    drop(fds);
    for (number, fd) in (FIRST..).zip(&above) {
        // SAFETY: `fd` is open. A descriptor that had `number` is closed, as intended: the caller
        // runs another program next, and keeps no descriptor of its own but 0, 1 and 2.
        Errno::result(unsafe { libc::dup2(fd.as_raw_fd(), number) })?;
    }
    Ok(())
}

/// The number of sent bytes on a Unix socket that the peer has not read, including the kernel's overhead (unix(7),
/// `SIOCOUTQ`).
///
/// # Errors
/// It is no socket.
pub fn unread_by_peer(socket: &impl AsFd) -> Result<usize, Errno> {
    let mut bytes: libc::c_int = 0;
    // SAFETY: the descriptor is open for as long as it is borrowed, and the kernel writes one int.
    Errno::result(unsafe { libc::ioctl(socket.as_fd().as_raw_fd(), libc::TIOCOUTQ, &mut bytes) })?;
    usize::try_from(bytes).map_err(|_| Errno::EINVAL)
}

/// The kind of a namespace (ioctl_nsfs(2), `NS_GET_NSTYPE`, Linux 4.11). The name that `/proc/self/fd` shows is not enough: for
/// a namespace that is mounted at a path, as CNI does it, that is the path.
///
/// # Errors
/// It is no namespace, or it was opened with `O_PATH`.
pub fn namespace_kind(namespace: &impl AsFd) -> Result<CloneFlags, Errno> {
    /// `_IO(0xb7, 3)`
    const GET_KIND: libc::c_ulong = 0xb703;
    // SAFETY: the descriptor is open for as long as it is borrowed, and the call has no argument.
    let found = Errno::result(unsafe { libc::ioctl(namespace.as_fd().as_raw_fd(), GET_KIND as _) })?;
    Ok(CloneFlags::from_bits_retain(found))
}

/// The peek offset of a socket: the number of bytes that were peeked at and not removed. `None` if the socket does not
/// count them (socket(7), `SO_PEEK_OFF`).
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

/// Sets the peek offset of a socket to 0. From now on, the kernel counts the bytes that are peeked at and not removed.
///
/// # Errors
/// The socket does not support it.
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

/// Lets the kernel drop every message that others send to a socket from now on, or none. Their descriptors are closed by the
/// senders.
///
/// # Errors
/// The kernel has no memory for it.
pub fn drop_messages(socket: &impl AsFd, all: bool) -> Result<(), Errno> {
    // A program that passes on 0 bytes of each message.
    let mut nothing = libc::sock_filter { code: (libc::BPF_RET | libc::BPF_K) as u16, jt: 0, jf: 0, k: 0 };
    let program = libc::sock_fprog { len: 1, filter: &raw mut nothing };
    let option = if all { libc::SO_ATTACH_FILTER } else { libc::SO_DETACH_FILTER };
    let length = libc::socklen_t::try_from(size_of_val(&program)).map_err(|_| Errno::EINVAL)?;
    let (fd, place) = (socket.as_fd().as_raw_fd(), std::ptr::from_ref(&program).cast());
    // SAFETY: the descriptor is open for as long as it is borrowed; the kernel reads `program`, which has that size, and copies
    // the instruction to which it points.
    let result = unsafe { libc::setsockopt(fd, libc::SOL_SOCKET, option, place, length) };
    Errno::result(result).map(drop)
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    #[test]
    fn an_exit_by_a_real_time_signal_is_read_and_left_for_the_parent() {
        let mut child = Command::new("sleep").arg("1000").spawn().unwrap();
        assert_eq!(peek_exit(child.id()), Ok(None));
        let held = pidfd_open(child.id()).unwrap();
        let signal = libc::SIGRTMIN() as u32;
        pidfd_send_signal(&held, signal).unwrap();
        rustix::process::waitid(WaitId::PidFd(held.as_fd()), WaitIdOptions::EXITED | WaitIdOptions::NOWAIT)
            .unwrap();
        for _ in 0..2 {
            assert_eq!(peek_exit(child.id()), Ok(Some((libc::CLD_KILLED, signal as i32))));
        }
        child.wait().unwrap();
        assert_eq!(peek_exit(child.id()), Err(Errno::ECHILD));
    }

    #[test]
    fn a_number_that_is_no_pid_is_no_process() {
        for pid in [0, u32::MAX] {
            assert_eq!(pidfd_open(pid).map(drop), Err(Errno::ESRCH));
        }
    }

    #[test]
    fn descriptors_get_the_numbers_from_three_in_their_order() {
        let flags = nix::sys::memfd::MFdFlags::MFD_CLOEXEC;
        let files = ["a", "b", "c"].map(|name| nix::sys::memfd::memfd_create(name, flags).unwrap());
        let raw = files.each_ref().map(|file| file.as_raw_fd());
        let placing = move || {
            // Other threads keep what has these numbers.
            nix::sched::unshare(CloneFlags::CLONE_FILES).unwrap();
            // SAFETY: this thread has a table of descriptors of its own, and nothing in the thread uses what had these numbers.
            unsafe {
                let above = raw.map(|fd| libc::fcntl(fd, libc::F_DUPFD_CLOEXEC, 10));
                // Each has the number that another one is to get.
                let numbers = [4, 5, 3];
                above
                    .iter()
                    .zip(numbers)
                    .for_each(|(from, number)| assert_eq!(libc::dup2(*from, number), number));
                place_from_three(numbers.map(|number| OwnedFd::from_raw_fd(number)).into()).unwrap();
                for (number, text) in (3..6).zip(["first", "second", "third"]) {
                    assert_eq!(libc::fcntl(number, libc::F_GETFD), 0, "the next program gets it");
                    libc::write(number, text.as_ptr().cast(), text.len());
                }
            }
        };
        std::thread::spawn(placing).join().unwrap();
        let texts =
            files.map(|file| std::fs::read_to_string(format!("/proc/self/fd/{}", file.as_raw_fd())).unwrap());
        assert_eq!(texts, ["first", "second", "third"]);
    }
}
