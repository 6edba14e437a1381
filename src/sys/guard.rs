//! A process that shares the descriptor table of this process (clone(2), `CLONE_FILES`) and does nothing else: a
//! descriptor that is open in this process stays open for some time after its end. If this process can't end, the other one
//! helps ([`stuck`]). It also makes systemd start the next daemon in time ([`wake`]).

mod stuck;
mod wake;

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::time::Duration;

use nix::errno::Errno;
use nix::libc;
use nix::sys::socket::{getsockopt, sockopt};
use rustix::process::{PidfdGetfdFlags, pidfd_getfd};

use super::errno;

/// The name of such a process (proc(5), `comm`).
pub const NAME: &std::ffi::CStr = c"shim-guard";

/// The signal that asks a guard to end, and to close the descriptors if its process can't.
pub const END: libc::c_int = libc::SIGUSR2;

/// True for the name of such a process, or of one that it has started.
pub fn is_name_of_guard(name: &str) -> bool {
    NAME.to_str().is_ok_and(|prefix| name.starts_with(prefix))
}

/// Starts a process that shares all descriptors with this process, in a cgroup or in that of this process. It ends `limit`
/// after this process. Returns a descriptor of it.
///
/// # Errors
/// The kernel can't start a process there. `ENODEV`: the cgroup has been removed meanwhile.
pub fn start(cgroup: Option<BorrowedFd<'_>>, limit: Duration) -> Result<OwnedFd, Errno> {
    let limit = libc::timespec {
        tv_sec: libc::time_t::try_from(limit.as_secs()).unwrap_or(libc::time_t::MAX),
        tv_nsec: 0,
    };
    let parent = nix::unistd::getpid().as_raw();
    let systemd = stuck::NotifyAddress::of_environment();
    let mut process: libc::c_int = -1;
    // SAFETY: all zeroes is a valid clone_args: plain integers.
    let mut args: libc::clone_args = unsafe { std::mem::zeroed() };
    args.flags = libc::CLONE_PIDFD as u64 | libc::CLONE_FILES as u64;
    args.pidfd = std::ptr::from_mut(&mut process) as u64;
    args.exit_signal = libc::SIGCHLD as u64;
    if let Some(cgroup) = cgroup {
        args.flags |= super::spawn::INTO_CGROUP;
        args.cgroup = u64::try_from(cgroup.as_raw_fd()).map_err(|_| Errno::EBADF)?;
    }
    // SAFETY: without `CLONE_VM` and without a stack of its own the call returns twice, as fork(2) does. The child has
    // a copy of this process's memory, and only makes system calls. It opens and closes no descriptor: the table is
    // that of this process.
    let pid = unsafe { libc::syscall(libc::SYS_clone3, &args, size_of::<libc::clone_args>()) };
    if pid == 0 {
        // SAFETY: this is the child.
        unsafe { be_guard(parent, &limit, systemd.as_ref()) }
    }
    Errno::result(pid).map_err(|errno| if errno == Errno::ENOENT { Errno::ENODEV } else { errno })?;
    // SAFETY: the kernel has just opened it, and no other code owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(process) })
}

/// # Safety
/// To be called in a child of clone3(2) only. Everything in here must be async-signal-safe.
unsafe fn be_guard(parent: libc::pid_t, limit: &libc::timespec, systemd: Option<&stuck::NotifyAddress>) -> ! {
    // SAFETY: system calls, on memory of this function.
    unsafe {
        let mut all: libc::sigset_t = std::mem::zeroed();
        libc::sigfillset(&mut all);
        libc::sigprocmask(libc::SIG_SETMASK, &all, std::ptr::null_mut());
        libc::prctl(libc::PR_SET_NAME, NAME.as_ptr());
        libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGUSR1);
        let mut end: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&raw mut end);
        libc::sigaddset(&raw mut end, END);
        libc::sigdelset(&raw mut all, END);
        // Other signals are ignored. A signal from before the prctl(2) is not missed: the parent is checked first.
        let status = stuck::wait_for_end(parent, &all);
        if let (Some(status), Some(systemd)) = (status, systemd) {
            stuck::start_heir(parent, status, systemd);
        }
        if systemd.is_none() || !wake::systemd_until(&end) {
            libc::sigtimedwait(&raw const end, std::ptr::null_mut(), limit);
        }
        if status.is_some() && libc::getppid() == parent {
            stuck::close_all();
        }
        libc::_exit(0)
    }
}

/// Starts a process that shares all descriptors with this process. `flags` are those of clone3(2) besides `CLONE_FILES`. With
/// `CLONE_PARENT`, its parent is the parent of this process, and `exit_signal` has to be 0.
///
/// # Safety
/// As for fork(2) in a process with threads: the call returns twice, and the child has to be async-signal-safe.
unsafe fn sharing_descriptors(flags: libc::c_int, exit_signal: libc::c_int) -> libc::c_long {
    // SAFETY: all zeroes is a valid clone_args; without `CLONE_VM` the call returns twice, as fork(2) does.
    unsafe {
        let mut args: libc::clone_args = std::mem::zeroed();
        args.flags = (libc::CLONE_FILES | flags) as u64;
        args.exit_signal = exit_signal as u64;
        libc::syscall(libc::SYS_clone3, &args, size_of::<libc::clone_args>())
    }
}

/// A copy of a descriptor of another process (pidfd_getfd(2)).
///
/// # Errors
/// `EBADF`: the other process has no such descriptor. `ESRCH`: it has ended. `EPERM`: the kernel allows no process to look
/// into another one (Yama's ptrace_scope is 3).
pub fn descriptor_of(process: &impl AsFd, number: RawFd) -> Result<OwnedFd, Errno> {
    pidfd_getfd(process, number, PidfdGetfdFlags::empty()).map_err(errno)
}

/// True for a socket that listens for connections.
pub fn is_listener(socket: &impl AsFd) -> bool {
    getsockopt(socket, sockopt::AcceptConn).unwrap_or(false)
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::fcntl::OFlag;
    use std::fs;
    use std::io::Read;

    #[test]
    fn descriptors_of_a_process_stay_open_after_its_end_until_the_guard_ends() {
        let (reader, writer) = nix::unistd::pipe2(OFlag::O_CLOEXEC).unwrap();
        let (until, end) = nix::unistd::pipe2(OFlag::O_CLOEXEC).unwrap();
        // SAFETY: the child only makes system calls.
        let child = unsafe { libc::fork() };
        if child == 0 {
            let keeps = [&reader, &writer, &until].map(AsRawFd::as_raw_fd);
            // Other tests wait for their descriptors to be closed.
            for number in (3..4096).filter(|number| !keeps.contains(number)) {
                // SAFETY: the table is a copy, and this child ends without using what it has closed.
                unsafe { libc::close(number) };
            }
            // The pidfd stays open: the table is shared.
            let started = start(None, Duration::from_secs(30)).map(std::mem::forget);
            // This child has to live until the test has found the guard.
            let (_, _) = (nix::unistd::write(&writer, &[0]), nix::unistd::read(&until, &mut [0]));
            // SAFETY: ends this process.
            unsafe { libc::_exit(i32::from(started.is_err())) }
        }
        drop(writer);
        let reader = fs::File::from(reader);
        (&reader).read_exact(&mut [0]).expect("the child has called `start`");
        let guard = fs::read_to_string(format!("/proc/{child}/task/{child}/children")).unwrap();
        let guard = super::super::pidfd_open(guard.trim().parse().unwrap()).unwrap();
        nix::unistd::write(&end, &[0]).unwrap();
        let ended = nix::sys::wait::waitpid(nix::unistd::Pid::from_raw(child), None).unwrap();
        assert!(matches!(ended, nix::sys::wait::WaitStatus::Exited(_, 0)), "{ended:?}");
        nix::fcntl::fcntl(&reader, nix::fcntl::FcntlArg::F_SETFL(OFlag::O_NONBLOCK)).unwrap();
        let open = (&reader).read(&mut [0]).unwrap_err();
        assert_eq!(open.kind(), std::io::ErrorKind::WouldBlock, "the writing end is still open");
        let copy = descriptor_of(&guard, reader.as_raw_fd()).unwrap();
        assert!(!is_listener(&copy));
        super::super::pidfd_send_signal(&guard, libc::SIGKILL as u32).unwrap();
        nix::poll::poll(
            &mut [nix::poll::PollFd::new(reader.as_fd(), nix::poll::PollFlags::empty())],
            nix::poll::PollTimeout::from(10_000u16),
        )
        .unwrap();
        assert_eq!((&reader).read(&mut [0]).unwrap(), 0);
    }
}
