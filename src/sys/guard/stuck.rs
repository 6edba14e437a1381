//! What a guard does for a daemon that was killed, or has exited, and whose process can't end.
//!
//! A thread in uninterruptible sleep ends only once it wakes, and the kernel reports the end of a process after the last of its
//! threads. Until then, systemd takes the daemon for alive. All threads got SIGKILL, so none of them runs code of the daemon
//! again. The guard starts a process in the daemon's place, its *heir*. PID 1 is the heir's parent, systemd is told that it is
//! the main process, and it ends as the daemon did. So systemd starts the next daemon at once.
//!
//! The threads also keep the daemon's descriptors open. Once the next daemon has its own, the guard closes them: clients wait for
//! the ends of their streams.
//!
//! Everything here runs in a child of a process with threads, so it must be async-signal-safe: system calls only, no memory of
//! the heap.

use std::ffi::CStr;
use std::os::fd::RawFd;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use nix::libc;

/// How often a guard looks at the process that it was started for, once a signal said that a thread of it has ended.
const LOOK: libc::timespec = libc::timespec { tv_sec: 0, tv_nsec: 4_000_000 };
/// How often it looks. Processes that are not stuck go away within milliseconds.
const LOOKS: u32 = 15_000;
/// So many looks in a row must find the process dead and still there.
const STUCK_AFTER: u32 = 50;
/// How long the heir waits until systemd has read its message.
const BARRIER_MSEC: libc::c_int = 5000;
/// How long one process has for closing descriptors until the next one continues: one that a container keeps busy is not
/// closed before the container ends.
const CLOSE_MSEC: u32 = 50;
/// The name of a process that closes descriptors.
const CLOSER: &CStr = c"shim-guard-end";
/// How many processes close descriptors.
const CLOSERS: u32 = 256;

/// The address of systemd's notify socket.
#[derive(Clone, Copy)]
pub struct NotifyAddress {
    address: libc::sockaddr_un,
    length: libc::socklen_t,
}

impl NotifyAddress {
    /// `None` if systemd did not start this process.
    pub fn of_environment() -> Option<Self> {
        Self::at(Path::new(&std::env::var_os("NOTIFY_SOCKET")?))
    }

    fn at(path: &Path) -> Option<Self> {
        let path = path.as_os_str().as_bytes();
        // SAFETY: plain bytes and integers.
        let mut address: libc::sockaddr_un = unsafe { std::mem::zeroed() };
        address.sun_family = libc::sa_family_t::try_from(libc::AF_UNIX).ok()?;
        if path.is_empty() || path.len() >= address.sun_path.len() {
            return None;
        }
        for (to, from) in address.sun_path.iter_mut().zip(path) {
            *to = from.cast_signed() as libc::c_char;
        }
        if path[0] == b'@' {
            address.sun_path[0] = 0;
        }
        let length = std::mem::offset_of!(libc::sockaddr_un, sun_path) + path.len();
        Some(Self { address, length: length.try_into().ok()? })
    }
}

/// Waits until the process is gone: the parent of this one. If it is dead and stuck, returns the wait status with which it died.
///
/// # Safety
/// Async-signal-safe. All signals have to be blocked.
pub unsafe fn wait_for_end(parent: libc::pid_t, all: &libc::sigset_t) -> Option<libc::c_int> {
    // SAFETY: system calls, on memory of this function.
    unsafe {
        while libc::getppid() == parent {
            // The kernel sends a signal when the thread that has started this process ends, also if other threads continue.
            // The wait fails without a signal when a tracer attaches, and after SIGSTOP and SIGCONT (EINTR, signal(7)).
            if libc::sigwaitinfo(all, std::ptr::null_mut()) < 0 {
                continue;
            }
            let mut dead = 0;
            for _ in 0..LOOKS {
                libc::nanosleep(&LOOK, std::ptr::null_mut());
                if libc::getppid() != parent {
                    return None;
                }
                dead += 1;
                match died(parent) {
                    Some(status) if dead >= STUCK_AFTER => return Some(status),
                    Some(_) => {}
                    None => dead = 0,
                }
            }
        }
    }
    None
}

/// The wait status of a process whose first thread is dead. That thread ends only with the process.
///
/// # Safety
/// Async-signal-safe.
unsafe fn died(pid: libc::pid_t) -> Option<libc::c_int> {
    let mut path = Text::<32>::new();
    path.add(b"/proc/").number(pid).add(b"/stat\0");
    let mut text = [0u8; 1024];
    // SAFETY: the path ends with a zero, and the kernel writes at most as much as there is room.
    let length = unsafe {
        let file = libc::open(path.bytes.as_ptr().cast(), libc::O_RDONLY | libc::O_CLOEXEC);
        if file < 0 {
            return None;
        }
        let length = libc::read(file, text.as_mut_ptr().cast(), text.len());
        libc::close(file);
        usize::try_from(length).ok()?
    };
    parse(text.get(..length)?)
}

/// The wait status of a dead process in a line of `/proc/PID/stat` (proc(5)). Its name can have any characters.
fn parse(stat: &[u8]) -> Option<libc::c_int> {
    let end = stat.iter().rposition(|byte| *byte == b')')?;
    let mut fields = stat.get(end + 1..)?.trim_ascii().split(|byte| *byte == b' ');
    if fields.next()? != b"Z" {
        return None;
    }
    fields.next_back()?.iter().try_fold(0, |number: libc::c_int, digit| {
        let digit = digit.checked_sub(b'0').filter(|digit| *digit < 10)?;
        number.checked_mul(10)?.checked_add(digit.into())
    })
}

/// Text without memory of the heap. What does not fit is left out.
struct Text<const N: usize> {
    bytes: [u8; N],
    length: usize,
}

impl<const N: usize> Text<N> {
    fn new() -> Self {
        Self { bytes: [0; N], length: 0 }
    }

    fn add(&mut self, text: &[u8]) -> &mut Self {
        for byte in text {
            if let Some(place) = self.bytes.get_mut(self.length) {
                *place = *byte;
                self.length += 1;
            }
        }
        self
    }

    fn number(&mut self, number: libc::pid_t) -> &mut Self {
        if number >= 10 {
            self.number(number / 10);
        }
        self.add(&[b'0' + u8::try_from(number % 10).unwrap_or(0)])
    }
}

/// A child of this process that shares its descriptors.
///
/// # Safety
/// As for fork(2) in a process with threads: the child has to be async-signal-safe.
unsafe fn child() -> libc::c_long {
    // SAFETY: the caller takes care of the child.
    unsafe { super::sharing_descriptors(0, libc::SIGCHLD) }
}

/// Starts the heir of a stuck process: systemd takes it for the main process, and it ends with this wait status.
///
/// # Safety
/// Async-signal-safe. All signals have to be blocked.
pub unsafe fn start_heir(stuck: libc::pid_t, status: libc::c_int, systemd: &NotifyAddress) {
    // SAFETY: system calls, on memory of this function.
    unsafe {
        let between = child();
        if between == 0 {
            let between = libc::getpid();
            if child() == 0 {
                // PID 1 gets the process once its parent has ended.
                while libc::getppid() == between {
                    libc::nanosleep(&LOOK, std::ptr::null_mut());
                }
                replace(stuck, systemd);
                if libc::WIFSIGNALED(status) {
                    libc::kill(libc::getpid(), libc::SIGKILL);
                }
                libc::_exit(libc::WEXITSTATUS(status));
            }
            libc::_exit(0);
        }
        if between > 0 {
            libc::waitpid(between as libc::pid_t, std::ptr::null_mut(), 0);
        }
    }
}

/// Tells systemd, in the name of the stuck main process, that this process is the main process. Waits until systemd has read it.
///
/// # Safety
/// Async-signal-safe.
unsafe fn replace(stuck: libc::pid_t, systemd: &NotifyAddress) {
    let mut text = Text::<32>::new();
    // SAFETY: system calls, on memory of this function.
    unsafe {
        text.add(b"MAINPID=").number(libc::getpid());
        let socket = libc::socket(libc::AF_UNIX, libc::SOCK_DGRAM | libc::SOCK_CLOEXEC, 0);
        let (address, length) = (&raw const systemd.address, systemd.length);
        if socket < 0 || libc::connect(socket, address.cast(), length) < 0 {
            return;
        }
        let sender = libc::ucred { pid: stuck, uid: 0, gid: 0 };
        send(socket, &text.bytes[..text.length], libc::SCM_CREDENTIALS, &sender);
        let mut pipe: [RawFd; 2] = [-1; 2];
        if libc::pipe2(pipe.as_mut_ptr(), libc::O_CLOEXEC) < 0 {
            return;
        }
        send(socket, b"BARRIER=1", libc::SCM_RIGHTS, &pipe[1]);
        libc::close(pipe[1]);
        let mut read = libc::pollfd { fd: pipe[0], events: 0, revents: 0 };
        libc::poll(&raw mut read, 1, BARRIER_MSEC);
        libc::close(pipe[0]);
        libc::close(socket);
    }
}

/// Sends a message with a control message to systemd. It is not important if that fails: systemd waits longer then.
///
/// # Safety
/// Async-signal-safe.
unsafe fn send<T: Copy>(socket: RawFd, text: &[u8], kind: libc::c_int, value: &T) {
    #[repr(C)]
    struct Control<T> {
        header: libc::cmsghdr,
        value: T,
    }
    // SAFETY: plain integers; the value of a control message follows its header without a gap, as it needs no larger alignment.
    unsafe {
        let mut header: libc::cmsghdr = std::mem::zeroed();
        header.cmsg_len = (size_of::<libc::cmsghdr>() + size_of::<T>()) as _;
        (header.cmsg_level, header.cmsg_type) = (libc::SOL_SOCKET, kind);
        let control = Control { header, value: *value };
        let mut part = libc::iovec { iov_base: text.as_ptr().cast_mut().cast(), iov_len: text.len() };
        let mut message: libc::msghdr = std::mem::zeroed();
        (message.msg_iov, message.msg_iovlen) = (&raw mut part, 1);
        message.msg_control = (&raw const control).cast_mut().cast();
        message.msg_controllen = size_of::<Control<T>>() as _;
        libc::sendmsg(socket, &raw const message, libc::MSG_NOSIGNAL);
    }
}

/// Closes all descriptors of this process, which a stuck process shares.
///
/// # Safety
/// Async-signal-safe. All signals have to be blocked.
pub unsafe fn close_all() {
    // SAFETY: system calls, on memory of this function.
    unsafe {
        for _ in 0..CLOSERS {
            let closer = child();
            if closer == 0 {
                libc::prctl(libc::PR_SET_NAME, CLOSER.as_ptr());
                libc::syscall(libc::SYS_close_range, 0, libc::c_uint::MAX, 0);
                libc::_exit(0);
            }
            if closer < 0 || has_ended(closer as libc::pid_t) {
                return;
            }
        }
    }
}

/// Waits a moment until a child has ended.
///
/// # Safety
/// Async-signal-safe.
unsafe fn has_ended(child: libc::pid_t) -> bool {
    let pause = libc::timespec { tv_sec: 0, tv_nsec: 1_000_000 };
    // SAFETY: system calls, on memory of this function.
    unsafe {
        for _ in 0..CLOSE_MSEC {
            if libc::waitpid(child, std::ptr::null_mut(), libc::WNOHANG) == child {
                return true;
            }
            libc::nanosleep(&pause, std::ptr::null_mut());
        }
    }
    false
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;
    use std::os::fd::AsRawFd;
    use std::os::unix::net::UnixDatagram;

    #[test]
    fn the_status_of_a_dead_process_is_found_whatever_its_name_is() {
        assert_eq!(parse(b"7 (a) Z 1) Z 1 7 7 0 -1 0 9\n"), Some(9));
        assert_eq!(parse(b"7 (a) Z 1) Z 1 7 7 0 -1 0 256\n"), Some(256));
        for other in
            [&b"7 (a) S 1 7 9"[..], b"7 (a) D 1 9", b"7 (a", b"", b"7 (a) Z x", b"7 (a) Z 99999999999"]
        {
            assert_eq!(parse(other), None);
        }
    }

    #[test]
    fn a_process_that_runs_is_not_dead_and_one_that_nobody_has_reaped_is() {
        // SAFETY: the child only ends.
        let child = unsafe { libc::fork() };
        if child == 0 {
            // SAFETY: ends this process.
            unsafe { libc::_exit(3) }
        }
        // SAFETY: any process may call it.
        let found = std::iter::repeat_with(|| unsafe { died(child) }).find_map(|died| died).unwrap();
        assert_eq!(libc::WEXITSTATUS(found), 3);
        // SAFETY: as above.
        assert_eq!(unsafe { died(libc::getpid()) }, None);
        nix::sys::wait::waitpid(nix::unistd::Pid::from_raw(child), None).unwrap();
    }

    #[test]
    fn systemd_is_told_who_is_the_main_process_and_asked_to_answer() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("notify");
        let socket = UnixDatagram::bind(&path).unwrap();
        nix::sys::socket::setsockopt(&socket, nix::sys::socket::sockopt::PassCred, &true).unwrap();
        let systemd = NotifyAddress::at(&path).unwrap();
        std::thread::scope(|scope| {
            // SAFETY: any process may call it.
            scope.spawn(|| unsafe { replace(libc::getpid(), &systemd) });
            let mut bytes = [0; 64];
            let length = socket.recv(&mut bytes).unwrap();
            assert_eq!(bytes[..length], *format!("MAINPID={}", std::process::id()).as_bytes());
            // Its descriptor is closed here, which is the answer.
            let length = socket.recv(&mut bytes).unwrap();
            assert_eq!(bytes[..length], *b"BARRIER=1");
        });
        assert!(NotifyAddress::at(Path::new("")).is_none());
        assert!(NotifyAddress::at(Path::new(&"x".repeat(200))).is_none());
    }

    #[test]
    fn a_descriptor_of_a_shared_table_is_closed() {
        let (reader, writer) = nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC).unwrap();
        // SAFETY: the child only makes system calls.
        let process = unsafe { libc::fork() };
        if process == 0 {
            // SAFETY: the descriptors are those of this process, which has a copy of the table.
            unsafe {
                let shared = child();
                if shared == 0 {
                    close_all();
                    libc::_exit(0);
                }
                libc::waitpid(shared as libc::pid_t, std::ptr::null_mut(), 0);
                let is_closed = libc::fcntl(writer.as_raw_fd(), libc::F_GETFD) < 0;
                libc::_exit(if is_closed { 0 } else { 1 });
            }
        }
        let ended = nix::sys::wait::waitpid(nix::unistd::Pid::from_raw(process), None).unwrap();
        assert!(matches!(ended, nix::sys::wait::WaitStatus::Exited(_, 0)), "{ended:?}");
        drop(writer);
        let (mut reader, mut rest) = (std::fs::File::from(reader), Vec::new());
        reader.read_to_end(&mut rest).unwrap();
    }
}
