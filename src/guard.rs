//! Descriptors of the daemon outlive the daemon, even before they are in systemd's descriptor store.
//!
//! Between accept(2) or open(2) and the descriptor store ([`crate::unit::fd_store`]), only the daemon has a descriptor. If
//! the daemon were killed there, a client would lose its connection, or see the end of the output of a process that has
//! just begun. So the daemon has a *guard*: a process that shares its descriptor table, and that stays for a while after
//! the daemon's end. The next daemon takes the connections out of the table of the guard, opens the client's FIFOs again,
//! and then ends the guard.
//!
//! A daemon with a thread in uninterruptible sleep can't end. Its guard lets systemd start the next daemon nevertheless.
//!
//! The guard is in a cgroup beside that of the daemon's service, so `systemctl kill` of the service does not kill it.

use std::collections::HashSet;
use std::fs;
use std::os::fd::{AsFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use nix::errno::Errno;
use nix::libc::{self, SIGKILL};
use nix::sys::stat::fstat;

use crate::cgroup::{self, processes};
use crate::launch;
use crate::sys::{self, guard as process};

/// How long a guard stays after the end of its daemon if no next daemon ends it.
const LIMIT: Duration = Duration::from_secs(30);
/// How many guards are kept during recovery. A daemon that crashes again and again leaves one each time.
const MAX_EARLIER: usize = 8;
/// How long a guard may take to end after the signal [`process::END`]. Guards of earlier versions ignore this signal.
const END_LIMIT: Duration = Duration::from_secs(10);
/// A guard that has ended is replaced after this time.
const PAUSE: Duration = Duration::from_secs(1);
/// A guard that could not be started is tried again after this time.
const RETRY: Duration = Duration::from_secs(10);
/// How often a start is tried again because the empty cgroup was removed meanwhile.
const TRIES: u32 = 5;

/// Why there is no guard.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The cgroup of the guards can't be used.
    #[error(transparent)]
    Cgroup(#[from] cgroup::Error),
    /// The process can't be started.
    #[error("can't start a process that shares the daemon's descriptors: {0}")]
    Start(#[from] Errno),
}

/// The guard of this process.
#[derive(Debug)]
pub struct Guard(OwnedFd);

impl Guard {
    /// Starts the guard of this process.
    ///
    /// # Errors
    /// The guard can't be started. The daemon works without it, but can lose a descriptor when it is killed.
    pub fn start() -> Result<Self, Error> {
        let cgroup = launch::cgroup::of_guards()?;
        let mut tries = 0;
        loop {
            let dir = cgroup::open_made(&cgroup)?;
            tries += 1;
            match process::start(Some(dir.as_fd()), LIMIT) {
                Err(Errno::ENODEV) if tries < TRIES => {}
                started => return Ok(Self(started?)),
            }
        }
    }
}

/// Starts another guard whenever there is none: because somebody killed it, or because it could not be started. Never
/// returns.
pub async fn keep(mut guard: Result<Guard, Error>) {
    let mut is_logged = false;
    loop {
        match guard {
            Ok(Guard(process)) => {
                is_logged = false;
                if let Err(error) = sys::reaped(&process).await {
                    tracing::warn!(%error, "can't watch the guard of this daemon: {error}");
                    return std::future::pending().await;
                }
                tokio::time::sleep(PAUSE).await;
            }
            Err(error) => {
                if !std::mem::replace(&mut is_logged, true) {
                    tracing::warn!(%error, "{NO_GUARD}: {error}");
                }
                tokio::time::sleep(RETRY).await;
            }
        }
        guard = Guard::start();
    }
}

/// The consequence of a missing guard, for a log message.
const NO_GUARD: &str =
    "if the daemon is killed while it accepts a connection or opens a client's FIFO, that call can fail";

/// The guards of earlier daemons.
#[derive(Debug, Default)]
pub struct Earlier(Vec<Other>);

/// The guard of an earlier daemon.
#[derive(Debug)]
struct Other {
    pid: u32,
    process: OwnedFd,
    /// Collects its sockets. `None` if there is no such thread.
    sockets: Option<JoinHandle<Vec<(RawFd, u64)>>>,
}

/// Which sockets are known.
#[derive(Debug, Default)]
pub struct Inodes(HashSet<u64>);

impl Inodes {
    /// The inodes of these descriptors.
    pub fn of<'f>(fds: impl Iterator<Item = &'f OwnedFd>) -> Self {
        let mut inodes = Self::default();
        inodes.add(fds);
        inodes
    }

    /// Adds the inodes of these descriptors.
    pub fn add<'f>(&mut self, fds: impl Iterator<Item = &'f OwnedFd>) {
        self.0.extend(fds.filter_map(|fd| Some(fstat(fd).ok()?.st_ino)));
    }
}

/// The connections that only an ended daemon had, each with the path of the socket at which it was accepted.
pub type Rescued = Vec<(PathBuf, UnixStream)>;

impl Earlier {
    /// Finds the guards. The guard of this process must not run yet.
    pub fn find() -> Self {
        let pids = launch::cgroup::of_guards().and_then(|cgroup| processes::processes(&cgroup));
        let mut pids = pids.unwrap_or_else(|error| {
            tracing::warn!(%error, "can't find the guards of earlier daemons: {error}");
            Vec::new()
        });
        // A process that a guard has started to close descriptors is left out: it waits for a container.
        let is_guard = |pid: &u32| {
            let name = fs::read_to_string(format!("/proc/{pid}/comm"));
            name.is_ok_and(|name| Ok(name.trim()) == process::NAME.to_str())
        };
        pids.retain(is_guard);
        // Sorted by start, except after the pids have wrapped around.
        pids.sort_unstable();
        let guard = |pid| Some(Other { pid, process: sys::pidfd_open(pid).ok()?, sockets: None });
        let mut guards: Vec<_> = pids.into_iter().filter_map(guard).collect();
        // The first guards have the descriptors that calls were waiting for. Later daemons ended during their recovery.
        let surplus = guards.split_off(guards.len().min(MAX_EARLIER));
        surplus.iter().for_each(|guard| end(&guard.process));
        Self(guards)
    }

    /// How many guards there are.
    pub fn count(&self) -> usize {
        self.0.len()
    }

    /// Begins to collect the sockets of the guards, each in a thread of its own: with 1,000 containers, a guard has 10,000
    /// descriptors, and the daemon has other work at this time.
    pub fn collect(&mut self) {
        for Other { pid, sockets: collected, .. } in &mut self.0 {
            let pid = *pid;
            *collected = thread::Builder::new().spawn(move || sockets(pid)).ok();
        }
    }

    /// The connections that ended daemons had accepted and not kept. `known` are the descriptors that systemd passed to
    /// this process, and those that were kept.
    pub fn connections(&mut self, known: Inodes) -> Rescued {
        let mut known = known.0;
        let mut rescued = Vec::new();
        for guard in &mut self.0 {
            let collected = guard.sockets.take().and_then(|thread| thread.join().ok());
            for (number, inode) in collected.unwrap_or_else(|| sockets(guard.pid)) {
                if !known.insert(inode) {
                    continue;
                }
                match process::descriptor_of(&guard.process, number) {
                    Ok(socket) => rescued.extend(accepted(socket)),
                    Err(Errno::EBADF | Errno::ESRCH) => {}
                    Err(error) => {
                        tracing::warn!(%error, "can't take a connection from the guard of an earlier daemon: {error}");
                        return rescued;
                    }
                }
            }
        }
        rescued
    }

    /// Ends the guards: this process has kept everything that it has opened again.
    /// The guards also close the descriptors of daemons that can't end. Needs the async runtime.
    pub fn end(self) {
        for Other { process: guard, .. } in self.0 {
            signal(&guard, process::END);
            tokio::spawn(async move {
                let Ok(other) = guard.try_clone() else { return };
                if tokio::time::timeout(END_LIMIT, sys::ended(other)).await.is_err() {
                    end(&guard);
                }
            });
        }
    }
}

/// Ends all guards, and waits a moment until their cgroup is empty: no daemon will follow. The caller ends within
/// [`PAUSE`], before another guard takes the place of its own.
pub async fn end_all() {
    let guards = Earlier::find().0;
    guards.iter().for_each(|guard| end(&guard.process));
    let ended = async {
        for guard in guards {
            // Without the wait, the cgroup of the guards stays a little longer.
            let _ = sys::ended(guard.process).await;
        }
    };
    // The guards end even if the wait fails.
    let _ = tokio::time::timeout(PAUSE / 2, ended).await;
}

fn end(guard: &OwnedFd) {
    signal(guard, SIGKILL);
}

fn signal(guard: &OwnedFd, signal: libc::c_int) {
    match sys::pidfd_send_signal(guard, signal as u32) {
        Ok(()) | Err(Errno::ESRCH) => {}
        Err(error) => tracing::warn!(%error, "can't end the guard of an earlier daemon: {error}"),
    }
}

/// The sockets of a process: the numbers of its descriptors, and the inodes.
fn sockets(pid: u32) -> Vec<(RawFd, u64)> {
    let entries = fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten();
    let socket = |entry: fs::DirEntry| {
        let number = entry.file_name().to_str()?.parse().ok()?;
        let target = fs::read_link(entry.path()).ok()?;
        let inode = target.to_str()?.strip_prefix("socket:[")?.strip_suffix(']')?;
        Some((number, inode.parse().ok()?))
    };
    entries.filter_map(socket).collect()
}

/// The socket, if it is a connection that was accepted at a path.
fn accepted(socket: OwnedFd) -> Option<(PathBuf, UnixStream)> {
    if process::is_listener(&socket) {
        return None;
    }
    let socket = UnixStream::from(socket);
    let address = socket.local_addr().ok()?;
    Some((address.as_pathname()?.to_owned(), socket))
}
