//! The mount and network namespaces in which the OCI runtime works: those of the task's containerd.
//!
//! Under containerd-shim-runc-v2 the OCI runtime inherits them, as a child of containerd. A unit starts in the
//! namespaces of PID 1, or, with a drop-in such as `PrivateTmp=` or `ProtectSystem=` for all services, in a
//! mount namespace of its own.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use nix::fcntl::{OFlag, open as open_file};
use nix::sched::{CloneFlags, setns};
use nix::sys::socket::sockopt::PeerCredentials;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr, connect, getsockopt, socket};
use nix::sys::stat::Mode;
use nix::sys::statfs::{FsType, fstatfs};

use crate::path_error::{PathError, io_error};
use crate::sys;
use crate::task::request::{Containerd, Namespaces};
use crate::telemetry;

/// Why the namespaces can't be entered.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A namespace can't be read or entered.
    #[error(transparent)]
    Io(#[from] PathError),
    /// The namespaces exist, but this process may not enter them.
    #[error("can't enter the namespaces of containerd: {source}")]
    Refused {
        #[source]
        source: io::Error,
    },
    /// The containerd that called has ended, and no containerd with the same namespaces listens at its address.
    #[error(
        "containerd {address} called from mount or network namespaces of its own, and no containerd is in them \
         now: create the container again"
    )]
    Gone {
        /// The containerd's gRPC address.
        address: String,
    },
}

/// A namespace that a container or a pod is to join can't be joined.
#[derive(Debug, thiserror::Error)]
pub enum NotJoinable {
    /// Its file can't be opened.
    #[error("{kind} namespace: {source}")]
    Io {
        /// The kind of namespace, as the spec names it.
        kind: String,
        /// Why.
        source: PathError,
    },
    /// The file is something else.
    #[error("{kind} namespace: {path} is {what}")]
    Other {
        /// The kind of namespace, as the spec names it.
        kind: String,
        /// The file.
        path: PathBuf,
        /// What the file is.
        what: String,
    },
}

/// Checks that a file is a namespace of a kind, given by its name in a spec: OCI runtimes report only that they can't join it.
/// Accepts a relative path and a kind that is not known, which the OCI runtime checks.
///
/// # Errors
/// [`NotJoinable`]
pub fn check(kind: &str, path: &Path) -> Result<(), NotJoinable> {
    let expected = match kind {
        "network" => CloneFlags::CLONE_NEWNET,
        "mount" => CloneFlags::CLONE_NEWNS,
        "pid" => CloneFlags::CLONE_NEWPID,
        "ipc" => CloneFlags::CLONE_NEWIPC,
        "uts" => CloneFlags::CLONE_NEWUTS,
        "user" => CloneFlags::CLONE_NEWUSER,
        "cgroup" => CloneFlags::CLONE_NEWCGROUP,
        _ => return Ok(()),
    };
    if !path.is_absolute() {
        return Ok(());
    }
    let failed = |source| NotJoinable::Io { kind: kind.to_owned(), source };
    let other = |what: &str| NotJoinable::Other {
        kind: kind.to_owned(),
        path: path.to_owned(),
        what: what.to_owned(),
    };
    if path.starts_with("/proc/0") {
        return Err(other(NO_PID));
    }
    // With O_PATH, whatever the file is, this does not wait for it and has no effect on it.
    let flags = OFlag::O_PATH | OFlag::O_CLOEXEC;
    let found = open_file(path, flags, Mode::empty()).map_err(io_error("open", path)).map_err(failed)?;
    if !fstatfs(&found).is_ok_and(|found| found.filesystem_type() == NSFS) {
        return Err(other("no namespace"));
    }
    // The file is a namespace, so a real open does not wait either.
    let opened = File::open(format!("/proc/self/fd/{}", found.as_raw_fd()));
    let opened = opened.map_err(io_error("open", path)).map_err(failed)?;
    match sys::namespace_kind(&opened) {
        Ok(found) if found != expected => Err(other("a namespace of another kind")),
        // Without an answer of the kernel, the OCI runtime checks it.
        Ok(_) | Err(_) => Ok(()),
    }
}

/// containerd limits State to 2 s (`io.containerd.timeout.task.state`), and takes 0 for the pid of a task without an answer. Its
/// CRI plugin (1.6 and 1.7) asks for the pid of a pod's sandbox whenever it makes a container of the pod.
const NO_PID: &str =
    "of no process: containerd got no pid of the sandbox in time, so create the container again";

/// The file system of namespaces (linux/magic.h, `NSFS_MAGIC`).
const NSFS: FsType = FsType(0x6e73_6673);

/// PID 1, whose namespaces are the host's.
const HOST: &str = "1";

/// A kind of namespace: its file in `/proc/PID/ns`, and its flag.
type Kind = (&'static str, CloneFlags);

const MOUNT: Kind = ("mnt", CloneFlags::CLONE_NEWNS);
const NETWORK: Kind = ("net", CloneFlags::CLONE_NEWNET);

fn file(process: &str, kind: &str) -> PathBuf {
    Path::new("/proc").join(process).join("ns").join(kind)
}

fn inode(process: &str, kind: &str) -> Result<u64, Error> {
    let path = file(process, kind);
    let found = std::fs::metadata(&path).map_err(io_error("look at", &path))?;
    Ok(found.ino())
}

fn inodes(process: &str) -> Result<[u64; 2], Error> {
    Ok([inode(process, MOUNT.0)?, inode(process, NETWORK.0)?])
}

/// The namespaces of this process, a child of containerd, if they are not those of PID 1.
///
/// # Errors
/// /proc can't be read.
pub fn of_caller() -> Result<Option<Namespaces>, Error> {
    let [mount, network] = inodes("self")?;
    let differ = [mount, network] != inodes(HOST)?;
    let containerd = nix::unistd::getppid().as_raw();
    Ok(differ.then_some(Namespaces { containerd, mount, network }))
}

/// Enters the namespaces of the task's containerd, or those of the host if the record names no others. Only for a process
/// with one thread.
///
/// # Errors
/// A namespace of a containerd can't be entered. The process may have entered the other one, so it must end.
pub fn enter(containerd: &Containerd) -> Result<(), Error> {
    match &containerd.namespaces {
        None => {
            enter_host();
            Ok(())
        }
        Some(recorded) => enter_those_of(&find(recorded, &containerd.grpc_address)?),
    }
}

/// Enters the namespaces of the task's containerd as [`open`] finds them. If this fails, prints a warning, and the process
/// works in the namespaces of the host. Only for a process with one thread.
pub fn enter_or_stay(containerd: &Containerd) {
    let entered = open(containerd).and_then(|found| {
        let enter = |namespace: &OwnedFd| setns(namespace, CloneFlags::empty());
        found.iter().try_for_each(enter).map_err(|errno| Error::Refused { source: errno.into() })
    });
    match (entered, &containerd.namespaces) {
        (Ok(()), Some(_)) => return,
        (Ok(()), None) => {}
        (Err(error), _) => telemetry::say(&format!("continuing in the namespaces of the host: {error}")),
    }
    enter_host();
}

/// Enters the namespaces of PID 1. If a drop-in for all services forbids setns(2), the process stays in the namespaces that
/// systemd has made for the unit.
fn enter_host() {
    if let Err(error) = enter_those_of(HOST) {
        telemetry::say(&format!("continuing in the namespaces of the unit: {error}"));
    }
}

/// The namespaces in which commands for an existing task run: those in which it was created; if nothing is left of
/// these, those of the containerd that listens at the same address now. Empty for those of the host.
///
/// containerd-shim-runc-v2 stays in the first namespaces as long as the task exists.
///
/// # Errors
/// No containerd listens at its address, or its namespaces can't be opened.
pub fn open(containerd: &Containerd) -> Result<Vec<OwnedFd>, Error> {
    let Some(recorded) = &containerd.namespaces else {
        return Ok(Vec::new());
    };
    let process = match find(recorded, &containerd.grpc_address) {
        Err(Error::Gone { .. }) => present(&containerd.grpc_address)?,
        found => found?,
    };
    let open = |(kind, _): Kind| {
        let path = file(&process, kind);
        File::open(&path).map(OwnedFd::from).map_err(io_error("open", &path))
    };
    Ok([MOUNT, NETWORK].into_iter().map(open).collect::<Result<_, _>>()?)
}

/// Enters the mount namespace of PID 1, where containers and their files are.
///
/// # Errors
/// As [`enter`].
pub fn enter_mounts_of_init() -> Result<(), Error> {
    enter_one(HOST, MOUNT)
}

/// A process in the recorded namespaces: the containerd that called, or the containerd that listens at its address now.
fn find(recorded: &Namespaces, address: &str) -> Result<String, Error> {
    let is_there = |pid: &String| inodes(pid).is_ok_and(|found| found == [recorded.mount, recorded.network]);
    let caller = recorded.containerd.to_string();
    if is_there(&caller) {
        return Ok(caller);
    }
    let present = present(address)?;
    if is_there(&present) { Ok(present) } else { Err(Error::Gone { address: address.to_owned() }) }
}

/// The process that listens at a containerd's address. Does not wait.
fn present(address: &str) -> Result<String, Error> {
    let path = address.strip_prefix("unix://").unwrap_or(address);
    let peer = || -> nix::Result<_> {
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let socket = socket(AddressFamily::Unix, SockType::Stream, flags, None)?;
        connect(socket.as_raw_fd(), &UnixAddr::new(path)?)?;
        getsockopt(&socket, PeerCredentials)
    };
    let peer = peer().map_err(|_| Error::Gone { address: address.to_owned() })?;
    Ok(peer.pid().to_string())
}

fn enter_those_of(process: &str) -> Result<(), Error> {
    [MOUNT, NETWORK].into_iter().try_for_each(|kind| enter_one(process, kind))
}

fn enter_one(process: &str, (kind, flag): Kind) -> Result<(), Error> {
    if inode(process, kind)? == inode("self", kind)? {
        return Ok(());
    }
    let path = file(process, kind);
    let namespace = File::open(&path).map_err(io_error("open", &path))?;
    Ok(setns(namespace.as_fd(), flag).map_err(io_error("enter", &path))?)
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsRawFd;

    use nix::sys::socket::{Shutdown, shutdown};

    use super::*;

    #[test]
    fn a_process_in_other_namespaces_is_not_taken_for_containerd() {
        let own = inodes("self").unwrap();
        let here = Namespaces { containerd: 0, mount: own[0], network: own[1] };
        let recorded = Namespaces { containerd: std::process::id() as i32, ..here };
        assert_eq!(find(&recorded, "/nowhere").unwrap(), std::process::id().to_string());
        let other = Namespaces { mount: own[0] + 1, ..recorded };
        assert!(matches!(find(&other, "/nowhere"), Err(Error::Gone { .. })));
    }

    #[test]
    fn a_namespace_that_can_not_be_joined_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let missing = dir.path().join("missing");
        let reason = |kind, path: &Path| check(kind, path).err().map(|error| error.to_string());
        assert_eq!(reason("network", Path::new("/proc/self/ns/net")), None);
        for (kind, file) in [
            ("mount", "mnt"),
            ("pid", "pid"),
            ("ipc", "ipc"),
            ("uts", "uts"),
            ("user", "user"),
            ("cgroup", "cgroup"),
        ] {
            assert_eq!(reason(kind, &Path::new("/proc/self/ns").join(file)), None);
        }
        for other in [Path::new("relative"), Path::new("")] {
            assert_eq!(reason("network", other), None);
        }
        assert_eq!(reason("of the future", &missing), None);
        let cases = [
            (missing.clone(), format!("network namespace: can't open {}: No such file", missing.display())),
            (dir.path().to_owned(), format!("network namespace: {} is no namespace", dir.path().display())),
            ("/proc/self/ns/uts".into(), "/proc/self/ns/uts is a namespace of another kind".to_owned()),
            ("/dev/null".into(), "/dev/null is no namespace".to_owned()),
            ("/proc/0/ns/net".into(), format!("network namespace: /proc/0/ns/net is {NO_PID}")),
        ];
        for (path, expected) in cases {
            let found = reason("network", &path).unwrap();
            assert!(found.contains(&expected), "{found}");
        }
    }

    #[test]
    fn commands_for_a_task_use_the_containerd_that_is_there_now() {
        let dir = tempfile::tempdir().unwrap();
        let address = dir.path().join("containerd.sock");
        let listener = std::os::unix::net::UnixListener::bind(&address).unwrap();
        let namespaces = Some(Namespaces { containerd: 0, mount: 1, network: 1 });
        let grpc_address = address.to_str().unwrap().to_owned();
        let containerd = Containerd { namespaces, grpc_address, ..Containerd::default() };
        let opened = open(&containerd).unwrap();
        let inode = |fd: OwnedFd| File::from(fd).metadata().unwrap().ino();
        assert_eq!(opened.into_iter().map(inode).collect::<Vec<_>>(), inodes("self").unwrap());
        // A child of another test may have inherited the socket, so this process can't end it by closing its own descriptor.
        shutdown(listener.as_raw_fd(), Shutdown::Both).unwrap();
        assert!(matches!(open(&containerd), Err(Error::Gone { .. })));
        assert!(open(&Containerd { namespaces: None, ..containerd }).unwrap().is_empty());
    }
}
