//! The listening sockets of the daemon, and which containerd and namespace each of them is for.
//!
//! Ids are unique only per containerd and namespace. containerd sends the namespace of a call in its metadata from 2.0 on;
//! 1.6 and 1.7 do not (tested: 1.6.20, 1.7.24). No version sends its own identity. So `start` gives an older containerd the
//! address of a socket for one of its namespaces, and a newer containerd other than the usual one the address of a socket
//! of its own. systemd holds all sockets, so they are available even while no daemon runs.
//!
//! Small files (`<state>/.sockets/<number>`) record the lease of each socket. `start` writes them under a lock, and the
//! daemon reads them. A socket whose lessee has no tasks can be leased to another one.

use std::fs::{self, DirBuilder, OpenOptions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use crate::id::{Namespace, Owner};
use crate::{config, files};

/// The number of sockets to lease: one for each namespace of an older containerd, one for each newer containerd other than
/// the default one.
pub const COUNT: usize = 32;

/// A lessee for which `start` was called within this time may be about to have a task.
const SETTLED: Duration = Duration::from_secs(600);

/// One of the daemon's sockets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Socket {
    /// The socket of the usual containerd if it sends the namespace, and of every caller without a lease.
    Any,
    /// A leased socket, by its number.
    Of(usize),
}

impl Socket {
    /// All sockets.
    pub fn all() -> impl Iterator<Item = Self> {
        std::iter::once(Self::Any).chain((0..COUNT).map(Self::Of))
    }

    /// The path of the socket.
    pub fn path(self) -> PathBuf {
        match self {
            Self::Any => config::SOCKET.into(),
            Self::Of(number) => format!("{}.{number}", config::SOCKET).into(),
        }
    }

    /// The socket at a path.
    pub fn at(path: &Path) -> Option<Self> {
        Self::all().find(|socket| socket.path() == path)
    }
}

/// The lessee of a socket.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Lease {
    /// The containerd. Earlier versions did not record it.
    pub owner: Option<Owner>,
    /// The namespace. `None` if the calls contain it.
    pub namespace: Option<Namespace>,
}

/// A lease, and when it was claimed last, in seconds since the machine's start. Unlike the time of day, that clock does not
/// jump.
struct Leased {
    lease: Lease,
    at: u64,
}

/// The files with the leases.
#[derive(Clone, Debug)]
pub struct Leases {
    state: PathBuf,
    lock_limit: Duration,
}

impl Leases {
    /// The leases below the directory of all records.
    pub fn new(state: impl Into<PathBuf>) -> Self {
        Self { state: state.into(), lock_limit: config::START_LIMIT }
    }

    fn dir(&self) -> PathBuf {
        self.state.join(".sockets")
    }

    /// The lease of a socket, for repeated reads.
    pub fn holder(&self, number: usize) -> Holder {
        Holder { file: self.dir().join(number.to_string()), known: Mutex::default() }
    }

    /// The socket of a containerd, for one of its namespaces or for all. Leases one if it has none. `None` if all are in
    /// use.
    ///
    /// # Errors
    /// The files can't be read or written.
    pub fn claim(&self, owner: &Owner, namespace: Option<&Namespace>) -> io::Result<Option<Socket>> {
        self.claim_at(owner, namespace, since_boot()?)
    }

    fn claim_at(&self, owner: &Owner, namespace: Option<&Namespace>, now: u64) -> io::Result<Option<Socket>> {
        DirBuilder::new().recursive(true).mode(0o700).create(self.dir())?;
        let lock = files::lock(&self.dir().join(".lock"), self.lock_limit)?;
        let _lock = lock.ok_or_else(|| {
            io::Error::new(io::ErrorKind::TimedOut, "another process holds the lock of the leases")
        })?;
        // A lease that can't be read is not free.
        let leases: Vec<Option<Leased>> =
            (0..COUNT).map(|number| read(&self.dir().join(number.to_string()))).collect::<io::Result<_>>()?;
        let wanted = Lease { owner: Some(owner.clone()), namespace: namespace.cloned() };
        // A lease of an earlier version.
        let earlier = Lease { owner: None, namespace: namespace.cloned() };
        let held = |lease: &Lease| {
            leases.iter().position(|held| held.as_ref().is_some_and(|held| held.lease == *lease))
        };
        let own = held(&wanted).or_else(|| held(&earlier).filter(|_| owner.is_usual()));
        let number = own.or_else(|| leases.iter().position(Option::is_none)).or_else(|| {
            leases.iter().position(|held| held.as_ref().is_none_or(|held| self.is_idle(held, now)))
        });
        let Some(number) = number else {
            return Ok(None);
        };
        // Also written for its current lessee, as it contains the time of the last claim.
        let text =
            format!("{}\n{owner}\n{now}\n", namespace.map_or("", Namespace::as_str), owner = owner.as_str());
        let new = self.dir().join(format!(".{number}.new"));
        let mut options = OpenOptions::new();
        let mut file = options.write(true).create(true).truncate(true).mode(0o600).open(&new)?;
        io::Write::write_all(&mut file, text.as_bytes())?;
        fs::rename(&new, self.dir().join(number.to_string()))?;
        Ok(Some(Socket::Of(number)))
    }

    fn is_idle(&self, held: &Leased, now: u64) -> bool {
        if now.saturating_sub(held.at) <= SETTLED.as_secs() {
            return false;
        }
        match (&held.lease.namespace, &held.lease.owner) {
            (Some(namespace), _) => !self.state.join(namespace.as_str()).exists(),
            (None, Some(owner)) => !self.has_tasks(owner),
            (None, None) => true,
        }
    }

    /// True if a containerd other than the usual one has tasks, or if that is unknown.
    fn has_tasks(&self, owner: &Owner) -> bool {
        let end = format!("+{}", owner.as_str());
        let names = |dir: &Path| -> io::Result<Vec<String>> {
            fs::read_dir(dir)?.map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned())).collect()
        };
        let Ok(namespaces) = names(&self.state) else {
            return true;
        };
        let mut namespaces = namespaces.into_iter().filter(|name| !name.starts_with('.'));
        namespaces.any(|namespace| {
            names(&self.state.join(namespace))
                .is_ok_and(|tasks| tasks.iter().any(|task| task.ends_with(&end)))
        })
    }
}

/// Reads the lease of one socket. Reads its file again only if the file was replaced.
#[derive(Debug)]
pub struct Holder {
    file: PathBuf,
    known: Mutex<Option<(FileIdentity, Lease)>>,
}

/// Identifies the content of a file: inode and time of the last change.
type FileIdentity = (u64, i64, i64);

impl Holder {
    /// The current lessee of the socket; `None` if it has none. The shim removes no lease, so a lease whose file somebody
    /// else has removed still holds.
    ///
    /// # Errors
    /// The file can't be read. The lessee is unknown then: the caller must not treat the socket as free.
    pub fn lease(&self) -> io::Result<Option<Lease>> {
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        let found = match fs::metadata(&self.file) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Ok(known.as_ref().map(|(_, lease)| lease.clone()));
            }
            found => found?,
        };
        let identity = (found.ino(), found.ctime(), found.ctime_nsec());
        if let Some((_, lease)) = known.as_ref().filter(|(of, _)| *of == identity) {
            return Ok(Some(lease.clone()));
        }
        // If the file is replaced meanwhile, the next call reads it again.
        let Some(Leased { lease, .. }) = read(&self.file)? else {
            return Ok(None);
        };
        *known = Some((identity, lease.clone()));
        Ok(Some(lease))
    }
}

/// `None` if there is no file, or if another program wrote it.
fn read(file: &Path) -> io::Result<Option<Leased>> {
    match fs::read(file) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        text => Ok(parse(&text?)),
    }
}

/// Reads three lines: namespace, owner, time. Earlier versions wrote only the first line.
fn parse(text: &[u8]) -> Option<Leased> {
    let text = std::str::from_utf8(text).ok()?;
    let mut lines = text.lines();
    let namespace = match lines.next()? {
        "" => None,
        namespace => Some(Namespace::new(namespace).ok()?),
    };
    let owner = lines.next().map(Owner::new).transpose().ok()?;
    let at = lines.next().and_then(|at| at.parse().ok()).unwrap_or_default();
    Some(Leased { lease: Lease { owner, namespace }, at })
}

/// Seconds since the machine's start (proc_uptime(5)).
fn since_boot() -> io::Result<u64> {
    let text = fs::read_to_string("/proc/uptime")?;
    let seconds = text.split('.').next().and_then(|seconds| seconds.parse().ok());
    seconds.ok_or_else(|| io::Error::other(format!("/proc/uptime: {text:?}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn leases(name: &str) -> Leases {
        let dir = std::env::temp_dir().join(format!("sockets-test-{name}-{}", std::process::id()));
        let _ = fs::remove_dir_all(&dir);
        Leases::new(dir)
    }

    fn namespace(text: &str) -> Namespace {
        Namespace::new(text).unwrap()
    }

    fn lease_of(leases: &Leases, socket: Option<Socket>) -> Option<Lease> {
        let Some(Socket::Of(number)) = socket else { unreachable!("{socket:?}") };
        leases.holder(number).lease().unwrap()
    }

    #[test]
    fn each_containerd_keeps_its_socket_for_a_namespace() {
        let leases = leases("keeps");
        let (usual, docker) = (Owner::default(), Owner::new("0123456789abcdef").unwrap());
        let a = Some(namespace("a"));
        let first = leases.claim(&usual, a.as_ref()).unwrap();
        let others = [
            leases.claim(&usual, Some(&namespace("b"))).unwrap(),
            leases.claim(&docker, a.as_ref()).unwrap(),
            leases.claim(&docker, None).unwrap(),
        ];
        assert!(others.iter().all(|other| *other != first && other.is_some()));
        assert_ne!(others[1], others[2]);
        assert_eq!(leases.claim(&usual, a.as_ref()).unwrap(), first);
        assert_eq!(leases.claim(&docker, None).unwrap(), others[2]);
        assert_eq!(lease_of(&leases, first), Some(Lease { owner: Some(usual), namespace: a.clone() }));
        assert_eq!(lease_of(&leases, others[1]), Some(Lease { owner: Some(docker.clone()), namespace: a }));
        assert_eq!(lease_of(&leases, others[2]), Some(Lease { owner: Some(docker), namespace: None }));
        fs::remove_dir_all(leases.state).unwrap();
    }

    #[test]
    fn a_lease_of_an_earlier_version_stays_with_its_namespace() {
        let leases = leases("earlier");
        fs::create_dir_all(leases.dir()).unwrap();
        fs::write(leases.dir().join("5"), "a").unwrap();
        let earlier = Lease { owner: None, namespace: Some(namespace("a")) };
        assert_eq!(leases.holder(5).lease().unwrap(), Some(earlier));
        let docker = Owner::new("0123456789abcdef").unwrap();
        assert_ne!(leases.claim(&docker, Some(&namespace("a"))).unwrap(), Some(Socket::Of(5)));
        assert_eq!(leases.claim(&Owner::default(), Some(&namespace("a"))).unwrap(), Some(Socket::Of(5)));
        fs::remove_dir_all(leases.state).unwrap();
    }

    #[test]
    fn an_idle_holder_gives_its_socket_away_and_a_busy_one_does_not() {
        let leases = leases("idle");
        let (usual, docker) = (Owner::default(), Owner::new("0123456789abcdef").unwrap());
        leases.claim_at(&docker, None, 0).unwrap().unwrap();
        for number in 1..COUNT {
            leases.claim_at(&usual, Some(&namespace(&format!("n{number}"))), 0).unwrap().unwrap();
        }
        let late = namespace("late");
        let soon = SETTLED.as_secs();
        assert_eq!(leases.claim_at(&usual, Some(&late), soon).unwrap(), None, "all were used just now");
        let holder = leases.holder(2);
        assert_eq!(holder.lease().unwrap().unwrap().namespace, Some(namespace("n2")));
        fs::create_dir_all(leases.state.join("n1")).unwrap();
        fs::create_dir_all(leases.state.join("n1/web+0123456789abcdef")).unwrap();
        let claimed = leases.claim_at(&usual, Some(&late), soon + 1).unwrap();
        assert_eq!(claimed, Some(Socket::Of(2)), "docker and n1 have tasks");
        assert_eq!(
            holder.lease().unwrap().unwrap().namespace,
            Some(late),
            "who remembers the holder hears of it"
        );
        fs::remove_dir_all(leases.state).unwrap();
    }

    #[test]
    fn a_process_that_holds_the_lock_of_the_leases_delays_others_for_a_limited_time() {
        let dir = tempfile::tempdir().unwrap();
        let mut leases = Leases::new(dir.path());
        leases.claim(&Owner::default(), Some(&namespace("a"))).unwrap();
        let _held = files::lock(&leases.dir().join(".lock"), Duration::from_secs(60)).unwrap().unwrap();
        leases.lock_limit = Duration::from_millis(20);
        let refused = leases.claim(&Owner::default(), Some(&namespace("b"))).unwrap_err();
        assert_eq!(refused.kind(), io::ErrorKind::TimedOut);
    }

    #[test]
    fn a_lease_whose_file_was_removed_still_holds() {
        let leases = leases("removed");
        let (owner, default) = (Owner::default(), namespace("default"));
        let socket = leases.claim(&owner, Some(&default)).unwrap();
        let Some(Socket::Of(number)) = socket else { unreachable!("{socket:?}") };
        let holder = leases.holder(number);
        let lease = holder.lease().unwrap();
        assert_eq!(lease.as_ref().and_then(|lease| lease.namespace.as_ref()), Some(&default));
        fs::remove_dir_all(leases.dir()).unwrap();
        assert_eq!(holder.lease().unwrap(), lease);
        // Another lessee replaces it.
        let other = namespace("other");
        assert_eq!(leases.claim(&owner, Some(&other)).unwrap(), Some(Socket::Of(number)));
        assert_eq!(holder.lease().unwrap().and_then(|lease| lease.namespace), Some(other));
    }

    #[test]
    fn sockets_are_known_by_their_paths() {
        for socket in Socket::all() {
            assert_eq!(Socket::at(&socket.path()), Some(socket));
        }
        assert_eq!(Socket::at(Path::new("/run/other.sock")), None);
    }

    #[test]
    fn a_lease_that_cant_be_read_is_neither_free_nor_for_everybody() {
        let dir = tempfile::tempdir().unwrap();
        let leases = Leases::new(dir.path());
        let lease = leases.dir().join("7");
        fs::create_dir_all(&lease).unwrap();
        leases.holder(7).lease().unwrap_err();
        leases.claim(&Owner::default(), Some(&namespace("a"))).unwrap_err();
        fs::remove_dir(&lease).unwrap();
        assert_eq!(leases.holder(7).lease().unwrap(), None);
        leases.claim(&Owner::default(), Some(&namespace("a"))).unwrap();
    }
}
