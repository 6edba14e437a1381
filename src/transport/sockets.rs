//! The sockets of the daemon, and which namespace each of them is for.
//!
//! containerd names the namespace of a call in the call's metadata, but only from 2.0 on: 1.6 and 1.7
//! (seen: 1.6.20, 1.7.24) send nothing, and ids are unique per namespace only. So `start` gives an
//! older containerd the address of a socket that belongs to the namespace alone. systemd holds a
//! fixed number of them, as it holds the one for everybody else: like that one they are there
//! whatever becomes of the daemon.
//!
//! Which socket is whose is in small files (`<state>/.sockets/<number>`), written by `start` under a
//! lock and read by the daemon. A socket whose namespace has no tasks can be given to another one.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use nix::fcntl::{Flock, FlockArg};

use crate::config;
use crate::id::Namespace;

/// How many namespaces of an old containerd can have tasks at once.
pub const COUNT: usize = 32;

/// A namespace for which `start` was called so recently may have a task any moment.
const SETTLED: Duration = Duration::from_secs(600);

/// One of the daemon's sockets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Socket {
    /// For callers who name the namespace.
    Any,
    /// For the one namespace that has it, by its number.
    Of(usize),
}

impl Socket {
    /// All of them.
    pub fn all() -> impl Iterator<Item = Self> {
        std::iter::once(Self::Any).chain((0..COUNT).map(Self::Of))
    }

    /// Where it is.
    pub fn path(self) -> PathBuf {
        match self {
            Self::Any => config::SOCKET.into(),
            Self::Of(number) => format!("{}.{number}", config::SOCKET).into(),
        }
    }

    /// The one at that path.
    pub fn at(path: &Path) -> Option<Self> {
        Self::all().find(|socket| socket.path() == path)
    }
}

/// The files that say which socket is whose.
#[derive(Clone, Debug)]
pub struct Owners {
    state: PathBuf,
}

impl Owners {
    /// Below the directory of the records.
    pub fn new(state: impl Into<PathBuf>) -> Self {
        Self { state: state.into() }
    }

    fn dir(&self) -> PathBuf {
        self.state.join(".sockets")
    }

    /// The owner of a socket, for those who ask often.
    pub fn owner(&self, number: usize) -> Owner {
        Owner { file: self.dir().join(number.to_string()), known: Mutex::default() }
    }

    fn namespace(&self, number: usize) -> Option<Namespace> {
        read(&self.dir().join(number.to_string()))
    }

    /// The socket of a namespace; it gets one if it has none. Nothing if all are in use.
    ///
    /// # Errors
    /// The files can't be read or written.
    pub fn claim(&self, namespace: &Namespace) -> io::Result<Option<Socket>> {
        DirBuilder::new().recursive(true).mode(0o700).create(self.dir())?;
        let lock = File::create(self.dir().join(".lock"))?;
        let _lock = Flock::lock(lock, FlockArg::LockExclusive).map_err(|(_, errno)| errno)?;
        let owners: Vec<Option<Namespace>> = (0..COUNT).map(|number| self.namespace(number)).collect();
        let own = owners.iter().position(|owner| owner.as_ref() == Some(namespace));
        let number = own
            .or_else(|| owners.iter().position(Option::is_none))
            .or_else(|| (0..COUNT).find(|number| self.is_idle(*number, owners[*number].as_ref())));
        let Some(number) = number else {
            return Ok(None);
        };
        // Written anew for its own namespace as well: the time of the file is the last use.
        let new = self.dir().join(format!(".{number}.new"));
        let mut options = OpenOptions::new();
        let mut file = options.write(true).create(true).truncate(true).mode(0o600).open(&new)?;
        io::Write::write_all(&mut file, namespace.as_str().as_bytes())?;
        fs::rename(&new, self.dir().join(number.to_string()))?;
        Ok(Some(Socket::Of(number)))
    }

    fn is_idle(&self, number: usize, owner: Option<&Namespace>) -> bool {
        let used = fs::metadata(self.dir().join(number.to_string())).and_then(|file| file.modified());
        let settled =
            used.is_ok_and(|used| SystemTime::now().duration_since(used).is_ok_and(|age| age > SETTLED));
        settled && owner.is_none_or(|owner| !self.state.join(owner.as_str()).exists())
    }
}

/// The owner of one socket. The file is read again when there is another in its place.
#[derive(Debug)]
pub struct Owner {
    file: PathBuf,
    known: Mutex<Option<(Identity, Namespace)>>,
}

/// Tells a file from any that takes its place: inode, and when it last changed.
type Identity = (u64, i64, i64);

impl Owner {
    /// The namespace that has the socket now.
    pub fn namespace(&self) -> Option<Namespace> {
        let found = fs::metadata(&self.file).ok()?;
        let identity = (found.ino(), found.ctime(), found.ctime_nsec());
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, namespace)) = known.as_ref().filter(|(of, _)| *of == identity) {
            return Some(namespace.clone());
        }
        // If it is replaced meanwhile, the next call reads it again.
        let namespace = read(&self.file)?;
        *known = Some((identity, namespace.clone()));
        Some(namespace)
    }
}

fn read(file: &Path) -> Option<Namespace> {
    fs::read_to_string(file).ok().and_then(|text| Namespace::new(text).ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn owners(name: &str) -> Owners {
        let dir = std::env::temp_dir().join(format!("sockets-test-{name}-{}", std::process::id()));
        let _ = fs::remove_dir_all(&dir);
        Owners::new(dir)
    }

    fn namespace(text: &str) -> Namespace {
        Namespace::new(text).unwrap()
    }

    #[test]
    fn a_namespace_keeps_its_socket() {
        let owners = owners("keeps");
        let first = owners.claim(&namespace("a")).unwrap().unwrap();
        let second = owners.claim(&namespace("b")).unwrap().unwrap();
        assert_ne!(first, second);
        assert_eq!(owners.claim(&namespace("a")).unwrap(), Some(first));
        let Socket::Of(number) = second else { unreachable!() };
        assert_eq!(owners.namespace(number), Some(namespace("b")));
        fs::remove_dir_all(owners.state).unwrap();
    }

    #[test]
    fn an_idle_namespace_gives_its_socket_away_and_a_busy_one_does_not() {
        let owners = owners("idle");
        for number in 0..COUNT {
            owners.claim(&namespace(&format!("n{number}"))).unwrap().unwrap();
        }
        assert_eq!(owners.claim(&namespace("late")).unwrap(), None, "all were used just now");
        let owner = owners.owner(1);
        assert_eq!(owner.namespace(), Some(namespace("n1")));
        let old = SystemTime::now() - 2 * SETTLED;
        for number in 0..COUNT {
            File::open(owners.dir().join(number.to_string())).unwrap().set_modified(old).unwrap();
        }
        fs::create_dir_all(owners.state.join("n0")).unwrap();
        assert_eq!(owners.claim(&namespace("late")).unwrap(), Some(Socket::Of(1)), "n0 has tasks");
        assert_eq!(owner.namespace(), Some(namespace("late")), "who remembers the owner hears of it");
        fs::remove_dir_all(owners.state).unwrap();
    }

    #[test]
    fn sockets_are_known_by_their_paths() {
        for socket in Socket::all() {
            assert_eq!(Socket::at(&socket.path()), Some(socket));
        }
        assert_eq!(Socket::at(Path::new("/run/other.sock")), None);
    }
}
