//! cgroup v2: the cgroup that a client requests, and operations on cgroups.
//!
//! The attributes of a unit's own cgroup belong to systemd. This module only changes sub-cgroups.

pub mod cgroups_path;
pub mod format;
pub mod limits;
pub mod processes;
mod removal;
pub mod stats;
pub mod watch;

use std::ffi::OsStr;
use std::fs;
use std::io::{self, Read, Seek};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::chown;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags};

use crate::files;
use crate::path_error::{PathError, io_error};
use crate::sys::poll;

pub use processes::processes;
pub use removal::{kill, kill_blocking, kill_within, remove, remove_blocking};

/// The cgroup v2 hierarchy.
pub const ROOT: &str = "/sys/fs/cgroup";

/// What can go wrong in the cgroup file system.
#[derive(Debug, thiserror::Error)]
#[error(transparent)]
pub struct Error(#[from] PathError);

impl Error {
    /// True if the cgroup does not exist.
    pub fn is_gone(&self) -> bool {
        is_gone(self.0.io())
    }

    /// True if a wait reached its time limit.
    pub fn is_timeout(&self) -> bool {
        self.0.io().kind() == io::ErrorKind::TimedOut
    }
}

#[cfg(not(test))]
fn root() -> &'static Path {
    Path::new(ROOT)
}

#[cfg(not(test))]
fn proc_file(pid: u32) -> PathBuf {
    PathBuf::from(format!("/proc/{pid}/cgroup"))
}

#[cfg(test)]
pub mod fake;
#[cfg(test)]
use fake::{proc_file, root};

/// True if the unified hierarchy is mounted where systemd mounts it.
pub fn is_unified() -> bool {
    nix::sys::statfs::statfs(ROOT)
        .is_ok_and(|fs| fs.filesystem_type() == nix::sys::statfs::CGROUP2_SUPER_MAGIC)
}

/// The available controllers: the text of the hierarchy's `cgroup.controllers`.
///
/// # Errors
/// The file can't be read.
pub fn controllers() -> Result<String, Error> {
    let path = root().join("cgroup.controllers");
    Ok(fs::read_to_string(&path).map_err(io_error("read", &path))?)
}

/// True if the kernel has the memory controller.
pub fn has_memory() -> bool {
    controllers().unwrap_or_default().split_whitespace().any(|controller| controller == "memory")
}

/// The cgroup of a process: its path below [`ROOT`], beginning with `/`.
///
/// # Errors
/// The process does not exist, or is not in the unified hierarchy.
pub fn of_process(pid: u32) -> Result<PathBuf, Error> {
    of_proc_file(&proc_file(pid))
}

/// The cgroup of this process.
///
/// # Errors
/// As [`of_process`].
pub fn of_self() -> Result<PathBuf, Error> {
    of_proc_file(Path::new("/proc/self/cgroup"))
}

fn of_proc_file(path: &Path) -> Result<PathBuf, Error> {
    // The name of a cgroup can have any byte, also a line break, which the kernel shows as `\012`.
    let text = fs::read(path).map_err(io_error("read", path))?;
    let unified = text.split(|byte| *byte == b'\n').find_map(|line| line.strip_prefix(b"0::"));
    unified
        .map(|path| PathBuf::from(OsStr::from_bytes(path)))
        .ok_or_else(|| io_error("find a cgroup v2 in", path)(io::ErrorKind::NotFound).into())
}

/// How many cgroups a container may make. systemd removes them one by one when the container ends, and does nothing else
/// meanwhile: 4 s for 20,000 cgroups. A container with systemd and a Kubernetes node in it needs some 1,000.
const MAX_DESCENDANTS: u32 = 4096;
/// How deep the cgroups of a container may be nested. systemd does not remove what is more than 100 deep (`DEFAULT_RECURSION_MAX` in
/// recurse-dir.c), and the cost of a cgroup grows with its depth.
const MAX_DEPTH: u32 = 64;

/// The directory of a cgroup given by its path below [`ROOT`].
pub fn dir(cgroup: &Path) -> PathBuf {
    root().join(cgroup.strip_prefix("/").unwrap_or(cgroup))
}

/// Freezes or thaws every process in a cgroup and below it. Does nothing if the cgroup does not exist.
///
/// # Errors
/// The kernel refused.
pub fn freeze(cgroup: &Path, frozen: bool) -> Result<(), Error> {
    let path = dir(cgroup).join("cgroup.freeze");
    match fs::write(&path, if frozen { "1" } else { "0" }) {
        Err(e) if is_gone(&e) => Ok(()),
        result => Ok(result.map_err(io_error("write", &path))?),
    }
}

/// Waits until a cgroup is frozen, or thawed, or does not exist.
///
/// # Errors
/// The state is not reached within `limit`.
pub fn until_frozen(cgroup: &Path, frozen: bool, limit: Duration) -> Result<(), Error> {
    let path = dir(cgroup).join("cgroup.events");
    let done = || -> io::Result<()> {
        let mut file = fs::File::open(&path)?;
        let end = Instant::now() + limit;
        loop {
            // poll(2) reports changes since the last read of the file.
            let mut text = String::new();
            file.rewind()?;
            file.read_to_string(&mut text)?;
            if text.lines().any(|line| line == if frozen { "frozen 1" } else { "frozen 0" }) {
                return Ok(());
            }
            let left = end.saturating_duration_since(Instant::now());
            if !poll(&mut [PollFd::new(file.as_fd(), PollFlags::POLLPRI)], left)? {
                return Err(io::ErrorKind::TimedOut.into());
            }
        }
    };
    match done() {
        Err(e) if is_gone(&e) => Ok(()),
        done => Ok(done.map_err(io_error(
            if frozen { "wait for the freeze in" } else { "wait for the thaw in" },
            &path,
        ))?),
    }
}

/// True if the cgroup exists, and it or one below it has a process.
///
/// # Errors
/// The file can't be read.
pub fn is_in_use(cgroup: &Path) -> Result<bool, Error> {
    let path = dir(cgroup).join("cgroup.events");
    match fs::read_to_string(&path) {
        Ok(text) => Ok(is_populated_by(&text)),
        Err(error) if is_gone(&error) => Ok(false),
        Err(error) => Err(io_error("read", &path)(error).into()),
    }
}

/// True if the cgroup or one below it is known to have a process.
pub fn is_populated(cgroup: &Path) -> bool {
    is_in_use(cgroup).unwrap_or(false)
}

/// True if this text of `cgroup.events` says that there is a process.
fn is_populated_by(events: &str) -> bool {
    events.lines().any(|line| line == "populated 1")
}

/// Moves this process into a cgroup. Creates the cgroup if it does not exist.
///
/// # Errors
/// The kernel refused.
pub fn enter(cgroup: &Path) -> Result<(), Error> {
    in_made(cgroup, |dir| {
        let path = dir.join("cgroup.procs");
        fs::write(&path, "0").map_err(io_error("write", &path))
    })
}

/// Limits how many cgroups there can be below a cgroup, and how deep. Does nothing if the cgroup does not exist.
///
/// # Errors
/// The kernel refused.
pub fn limit_descendants(cgroup: &Path) -> Result<(), Error> {
    let dir = dir(cgroup);
    for (file, limit) in [("cgroup.max.descendants", MAX_DESCENDANTS), ("cgroup.max.depth", MAX_DEPTH)] {
        let path = dir.join(file);
        match fs::write(&path, limit.to_string()) {
            Err(error) if is_gone(&error) => {}
            written => written.map_err(io_error("write", &path))?,
        }
    }
    Ok(())
}

/// Lets a user make cgroups below a cgroup and move processes there (cgroups(7), "Cgroups delegation: delegating a hierarchy to a
/// less privileged user"). Creates the cgroup if it does not exist.
///
/// # Errors
/// The kernel refused.
pub fn give_to(cgroup: &Path, uid: u32) -> Result<(), Error> {
    in_made(cgroup, |dir| {
        for file in ["", "cgroup.procs", "cgroup.threads", "cgroup.subtree_control"] {
            let path = dir.join(file);
            chown(&path, Some(uid), None).map_err(io_error("give to the container's user", &path))?;
        }
        Ok(())
    })
}

/// Opens the directory of a cgroup. Creates the cgroup if it does not exist.
///
/// # Errors
/// The kernel refused.
pub fn open_made(cgroup: &Path) -> Result<OwnedFd, Error> {
    in_made(cgroup, |dir| fs::File::open(dir).map(OwnedFd::from).map_err(io_error("open", dir)))
}

/// Creates a cgroup and uses it. Tries again if it is removed in between: the daemon and systemd remove empty cgroups.
fn in_made<T>(cgroup: &Path, used: impl Fn(&Path) -> Result<T, PathError>) -> Result<T, Error> {
    const TRIES: u32 = 100;
    let dir = dir(cgroup);
    let mut tries = 0;
    loop {
        files::make_dir(&dir, 0o755).map_err(io_error("create", &dir))?;
        tries += 1;
        match used(&dir) {
            Err(e) if is_gone(e.io()) && tries < TRIES => {}
            result => return Ok(result?),
        }
    }
}

/// The cgroups directly below a cgroup, none if it does not exist.
pub fn children(cgroup: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(dir(cgroup)).into_iter().flatten().flatten();
    let dirs = entries.filter(|entry| entry.file_type().is_ok_and(|found| found.is_dir()));
    dirs.map(|entry| cgroup.join(entry.file_name())).collect()
}

/// Prepares the kernel for moves of processes into cgroups.
///
/// The first move after a while waits for an RCU grace period of 10 ms or more; moves soon after it do not
/// (cgroup_threadgroup_rwsem, a percpu_rw_semaphore). This moves the process into the cgroup that it is in already, so
/// that the wait overlaps with other work.
///
/// # Errors
/// The kernel refused.
pub fn warm_up() -> Result<(), Error> {
    let path = dir(&of_self()?).join("cgroup.procs");
    Ok(fs::write(&path, "0").map_err(io_error("write", &path))?)
}

/// True if a cgroup was removed: it is not found, or its open files report ENODEV.
fn is_gone(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::NotFound || error.raw_os_error() == Some(Errno::ENODEV as i32)
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::thread;

    use super::*;

    #[test]
    fn a_cgroup_is_made_while_empty_cgroups_are_removed() {
        let cgroup = Path::new("/swept/commands/one");
        let (mut failed, made) = (Vec::new(), AtomicUsize::new(0));
        let sweep = || cgroup.ancestors().take(3).filter(|empty| fs::remove_dir(dir(empty)).is_ok()).count();
        thread::scope(|scope| {
            let sweeping = scope.spawn(|| {
                let mut removed = 0;
                while removed < 300 {
                    // Fewer removals than tries, however fast this thread is.
                    let before = made.load(Ordering::Relaxed);
                    removed += (0..10).map(|_| sweep()).sum::<usize>();
                    while made.load(Ordering::Relaxed) == before {
                        thread::yield_now();
                    }
                }
            });
            while !sweeping.is_finished() {
                failed.extend(open_made(cgroup).err());
                made.fetch_add(1, Ordering::Relaxed);
            }
        });
        assert!(failed.is_empty(), "{failed:?}");
        fake::remove(Path::new("/swept"));
    }
}
