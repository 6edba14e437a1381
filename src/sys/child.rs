//! What a child does between fork and exec. Everything in here must be async-signal-safe: it runs in a copy of
//! a process whose other threads are gone.

use std::ffi::CStr;
use std::io;
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::sync::atomic::{AtomicU64, Ordering};

use nix::errno::Errno;
use nix::libc;
use nix::sys::resource::{Resource, getrlimit, setrlimit};

/// The data limit that this process had before [`limit_data`]. `u64::MAX` is the value for no limit
/// (`RLIM_INFINITY`).
static EARLIER_DATA_LIMIT: AtomicU64 = AtomicU64::new(libc::RLIM_INFINITY);

/// Limits the private memory of this process in bytes (`RLIMIT_DATA`, getrlimit(2)): an allocation beyond it aborts this
/// process. Children have the earlier limit if they call [`begin_as_usual`].
///
/// # Errors
/// The limit can't be set.
pub fn limit_data(bytes: u64) -> Result<(), Errno> {
    let (soft, hard) = getrlimit(Resource::RLIMIT_DATA)?;
    EARLIER_DATA_LIMIT.store(soft, Ordering::Relaxed);
    setrlimit(Resource::RLIMIT_DATA, soft.min(bytes), hard)
}

/// The error of a spawn if another process holds the child's lock. Neither fork(2) nor execve(2) fails with it.
pub const LOCK_IS_HELD: Errno = Errno::EDEADLK;

/// Makes this child hold a record lock (fcntl(2), `F_SETLK`) on a file, which becomes its stdin.
///
/// The lock belongs to the process itself: execve(2) keeps the lock, the end of the process releases it, and children of
/// the process do not have it. If another process holds the lock, the error is [`LOCK_IS_HELD`].
///
/// # Errors
/// The file can't be opened or locked.
///
/// # Safety
/// To be called between fork and exec only: it replaces descriptor 0.
pub unsafe fn lock(file: &CStr) -> Result<(), Errno> {
    // The lock is made over the descriptor that stays: closing any other of this file would release it.
    // SAFETY: plain system calls, on a path and a descriptor that are this child's alone.
    unsafe {
        let flags = libc::O_RDWR | libc::O_CREAT | libc::O_CLOEXEC;
        let opened = Errno::result(libc::open(file.as_ptr(), flags, 0o600))?;
        Errno::result(libc::dup2(opened, libc::STDIN_FILENO))?;
        libc::close(opened);
        let lock = whole_file(libc::F_WRLCK);
        match Errno::result(libc::fcntl(libc::STDIN_FILENO, libc::F_SETLK, &lock)) {
            Err(Errno::EAGAIN | Errno::EACCES) => Err(LOCK_IS_HELD),
            result => result.map(drop),
        }
    }
}

/// The daemon's own score would protect whatever its children run, such as hooks. A kernel that refuses changes
/// nothing that matters here.
///
/// # Safety
/// The caller has to do nothing: the function only makes system calls. It is marked unsafe because it is meant for the time
/// between fork and exec.
pub unsafe fn be_ordinary_to_the_oom_killer() {
    // SAFETY: the strings are constant, and no other code has the descriptor.
    unsafe {
        let score = libc::open(c"/proc/self/oom_score_adj".as_ptr(), libc::O_WRONLY | libc::O_CLOEXEC);
        if score >= 0 {
            libc::write(score, c"0".as_ptr().cast(), 1);
            libc::close(score);
        }
    }
}

/// A record lock on a whole file.
pub fn whole_file(kind: libc::c_int) -> libc::flock {
    // SAFETY: all zeroes is a valid flock: plain integers.
    let mut lock: libc::flock = unsafe { std::mem::zeroed() };
    lock.l_type = kind as libc::c_short;
    lock.l_whence = libc::SEEK_SET as libc::c_short;
    lock
}

/// Makes the child unblock the signals that this process has blocked, and gives it the earlier limits of this process.
pub fn begins_as_usual(command: &mut Command) {
    // SAFETY: the closure makes system calls only; it allocates nothing and takes no lock of this program.
    unsafe { command.pre_exec(|| begin_as_usual().map_err(io::Error::from)) };
}

/// Unblocks the signals that the parent of this child has blocked, and restores the limits that the parent had at first.
///
/// # Errors
/// None that is known (sigprocmask(2), setrlimit(2)).
///
/// # Safety
/// To be called between fork and exec only.
pub unsafe fn begin_as_usual() -> Result<(), Errno> {
    // SAFETY: an empty set of this function's own is read, nothing is written. The limit is read and written in place.
    unsafe {
        let mut none = std::mem::zeroed();
        libc::sigemptyset(&mut none);
        Errno::result(libc::sigprocmask(libc::SIG_SETMASK, &none, std::ptr::null_mut()))?;
        let mut limit: libc::rlimit = std::mem::zeroed();
        Errno::result(libc::getrlimit(libc::RLIMIT_DATA, &mut limit))?;
        limit.rlim_cur = EARLIER_DATA_LIMIT.load(Ordering::Relaxed).min(limit.rlim_max);
        Errno::result(libc::setrlimit(libc::RLIMIT_DATA, &limit)).map(drop)
    }
}
