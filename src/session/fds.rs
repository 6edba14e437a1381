//! The streams of processes in the descriptor store: pipes with bytes in them, terminals, and the ends without which
//! a process would see its reader or its writer gone while the daemon is down.

use std::collections::HashMap;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use nix::fcntl::{FcntlArg, OFlag, fcntl};

use crate::launch::pipes;
use crate::stdio::threads;
use crate::task::wiring::{Input, Wiring};
use crate::unit::fd_store::{self, FdStore};

/// What a descriptor in the store belongs to. The letter begins its name there; the number of the process follows.
/// Names are short, see `transport::listener`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum StreamKind {
    /// Standard input: the client's FIFO.
    Input,
    /// Standard output: the FIFO or pipe that is copied from, and the client's FIFO.
    Output,
    /// Standard error: the FIFO or pipe that is copied from, and the client's FIFO.
    ErrorOutput,
    /// The pipe with the journal's copy of standard output.
    OutputAside,
    /// The pipe with the journal's copy of standard error.
    ErrorAside,
    /// The master side of the terminal.
    Terminal,
    /// The socket at which a container notifies.
    Notify,
}

/// More numbers than all processes have that run at the same time.
const UNKNOWN_NUMBERS: u64 = 1 << 20;

impl StreamKind {
    const ALL: [Self; 7] = [
        Self::Input,
        Self::Output,
        Self::ErrorOutput,
        Self::OutputAside,
        Self::ErrorAside,
        Self::Terminal,
        Self::Notify,
    ];

    /// The kind of the output that a logger would get from this FIFO.
    pub fn of_log_pipe(name: &str) -> Self {
        if name == pipes::LOG_STDOUT { Self::Output } else { Self::ErrorOutput }
    }

    /// The kind of the journal's copy of a stream.
    pub fn aside(self) -> Self {
        if self == Self::ErrorOutput { Self::ErrorAside } else { Self::OutputAside }
    }

    fn letter(self) -> char {
        match self {
            Self::Input => 'i',
            Self::Output => 'o',
            Self::ErrorOutput => 'e',
            Self::OutputAside => 'a',
            Self::ErrorAside => 'b',
            Self::Terminal => 't',
            Self::Notify => 'n',
        }
    }

    fn name(self, number: u64) -> String {
        format!("{}{number}", self.letter())
    }

    /// Whether the store can have a socket under this name. Under the names of most streams, it has only FIFOs and pipes.
    pub fn may_have_sockets(name: &str) -> bool {
        // A terminal arrives at a socket.
        Self::parse(name).is_none_or(|(kind, _)| matches!(kind, Self::Terminal | Self::Notify))
    }

    fn parse(name: &str) -> Option<(Self, u64)> {
        let kind = Self::ALL.into_iter().find(|kind| name.starts_with(kind.letter()))?;
        Some((kind, number_in(name)?))
    }
}

/// The number of the process in the name of a stream, also of one whose kind only newer versions know.
fn number_in(name: &str) -> Option<u64> {
    name.strip_prefix(|letter: char| letter.is_ascii_lowercase())?.parse().ok()
}

/// The descriptors of one stream of a process that were in the store, sorted by how they were opened.
#[derive(Debug, Default)]
pub struct Claimed {
    /// Opened for reading only.
    pub readers: Vec<OwnedFd>,
    /// Opened for writing only.
    pub writers: Vec<OwnedFd>,
    /// Opened for both: a client's FIFO, or a terminal.
    pub both: Vec<OwnedFd>,
}

impl Claimed {
    /// True if the store had no descriptors of the stream.
    pub fn is_empty(&self) -> bool {
        self.readers.is_empty() && self.writers.is_empty() && self.both.is_empty()
    }

    fn sort(all: Vec<OwnedFd>) -> Self {
        let mut sorted = Self::default();
        for fd in all {
            match access(&fd) {
                OFlag::O_RDONLY => sorted.readers.push(fd),
                OFlag::O_WRONLY => sorted.writers.push(fd),
                _ => sorted.both.push(fd),
            }
        }
        sorted
    }
}

/// The descriptors of one process that were in the store.
#[derive(Clone, Debug, Default)]
pub struct Claims(Arc<Mutex<HashMap<StreamKind, Vec<OwnedFd>>>>);

impl Claims {
    /// The descriptors of one stream; they are returned once.
    pub fn take(&self, kind: StreamKind) -> Claimed {
        let all = self.all().remove(&kind);
        Claimed::sort(all.unwrap_or_default())
    }

    /// Closes the descriptors that nobody has taken. Returns their streams.
    pub fn rest(&self) -> impl Iterator<Item = StreamKind> + use<> {
        std::mem::take(&mut *self.all()).into_keys()
    }

    fn all(&self) -> MutexGuard<'_, HashMap<StreamKind, Vec<OwnedFd>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The descriptors of the streams of all processes.
#[derive(Debug)]
pub struct StreamFds {
    store: Arc<FdStore>,
    next: AtomicU64,
    unclaimed: Mutex<HashMap<(StreamKind, u64), Vec<OwnedFd>>>,
    /// Connections at console sockets that an earlier daemon had accepted and not kept, by the path of the socket.
    consoles: Mutex<HashMap<PathBuf, OwnedFd>>,
}

impl StreamFds {
    /// Takes what earlier daemons have put into the store.
    pub fn new(store: Arc<FdStore>, fds: Vec<(String, OwnedFd)>) -> Self {
        let mut earlier: HashMap<(StreamKind, u64), Vec<OwnedFd>> = HashMap::new();
        let next = AtomicU64::default();
        for (name, fd) in fds {
            if let Some(key) = StreamKind::parse(&name) {
                earlier.entry(key).or_default().push(fd);
            } else if let Some(number) = number_in(&name) {
                tracing::warn!(
                    name,
                    "descriptor store: {name} stays, a process of a newer version needs the descriptor"
                );
                next.fetch_max(number + 1, Ordering::Relaxed);
            } else {
                tracing::warn!(
                    name,
                    "descriptor store: removing {name}, no process uses a descriptor of this name"
                );
                store.forget(&name);
            }
        }
        Self { store, next, unclaimed: Mutex::new(earlier), consoles: Mutex::default() }
    }

    /// Adds a connection at a console socket that an earlier daemon had accepted and not kept.
    pub fn add_console(&self, path: PathBuf, connection: OwnedFd) {
        self.consoles.lock().unwrap_or_else(PoisonError::into_inner).insert(path, connection);
    }

    /// The connection at a console socket that an earlier daemon had accepted and not kept; it is returned once.
    pub fn claim_console(&self, path: &Path) -> Option<OwnedFd> {
        self.consoles.lock().unwrap_or_else(PoisonError::into_inner).remove(path)
    }

    /// A number that no process has had. Those in records have to be reserved first ([`Self::reserve`]).
    pub fn next_number(&self) -> u64 {
        self.next.fetch_add(1, Ordering::Relaxed)
    }

    /// A process of an earlier daemon has this number.
    pub fn reserve(&self, number: u64) {
        self.next.fetch_max(number + 1, Ordering::Relaxed);
    }

    /// Whether there is room for the descriptors of one more process.
    ///
    /// # Errors
    /// There is none.
    pub fn has_room(&self) -> Result<(), fd_store::Error> {
        self.store.has_room()
    }

    /// The number of entries of the store, without empty ones.
    pub fn count(&self) -> usize {
        self.store.count()
    }

    /// The number of entries that the streams of a process have.
    pub fn count_of(&self, number: u64) -> usize {
        StreamKind::ALL.into_iter().map(|kind| self.store.count_of(&kind.name(number))).sum()
    }

    /// Whether a stream of a process may be in an entry of the store that this daemon could not read.
    pub fn lacks(&self, wiring: &Wiring) -> bool {
        if !self.store.has_unread() {
            return false;
        }
        let earlier = self.unclaimed.lock().unwrap_or_else(PoisonError::into_inner);
        let is_missing = |kind| !earlier.contains_key(&(kind, wiring.store_number));
        // The daemon reads the rest of a terminal's input.
        let has_input = matches!(wiring.stdin, Input::Fifo(_)) && (wiring.terminal || !wiring.stdin_closed);
        (has_input && is_missing(StreamKind::Input))
            || (wiring.terminal && is_missing(StreamKind::Terminal))
            || wiring.copies().iter().any(|(_, log_pipe, _)| is_missing(StreamKind::of_log_pipe(log_pipe)))
    }

    /// Puts descriptors into the store.
    pub fn store(&self, kind: StreamKind, number: u64, fds: &[BorrowedFd<'_>]) {
        if fds.is_empty() {
            return;
        }
        if let Err(error) = self.store.keep(&kind.name(number), fds) {
            tracing::error!(%error, "can't put a stream into the descriptor store, a restart of the daemon will cut it off: {error}");
        }
    }

    /// Removes from the store what keeps the client's FIFO for input open for writing. For a terminal, the reader stays: the
    /// FIFO may have unread input, which the daemon reads.
    pub fn close_input(&self, wiring: &Wiring) {
        if !wiring.terminal {
            return self.forget(StreamKind::Input, wiring.store_number);
        }
        let name = StreamKind::Input.name(wiring.store_number);
        if let Err(error) = self.store.retain(&name, |fd| access(fd) == OFlag::O_RDONLY) {
            tracing::warn!(%error, "can't remove the writer of {name} from the descriptor store, its terminal gets no end of input: {error}");
        }
    }

    /// Removes the descriptors of a stream from the store. Peers see end of file some time after this.
    pub fn forget(&self, kind: StreamKind, number: u64) {
        self.forget_each([(kind, number)]);
    }

    /// Removes all descriptors of a process from the store.
    pub fn forget_all(&self, number: u64) {
        self.forget_each(StreamKind::ALL.map(|kind| (kind, number)));
    }

    fn forget_each(&self, streams: impl IntoIterator<Item = (StreamKind, u64)>) {
        let names = streams.into_iter().map(|(kind, number)| kind.name(number));
        let closes: Vec<_> = names.filter_map(|name| self.store.forget_later(&name)).collect();
        if !closes.is_empty() {
            threads::run(move || closes.into_iter().for_each(|close| close()));
        }
    }

    /// What an earlier daemon has put into the store; it is returned once.
    pub fn claim(&self, kind: StreamKind, number: u64) -> Claimed {
        Claimed::sort(self.take(kind, number).unwrap_or_default())
    }

    fn take(&self, kind: StreamKind, number: u64) -> Option<Vec<OwnedFd>> {
        self.unclaimed.lock().unwrap_or_else(PoisonError::into_inner).remove(&(kind, number))
    }

    /// As [`Self::claim`], for all streams of a process.
    pub fn claim_streams(&self, number: u64) -> Claims {
        let streams = StreamKind::ALL.into_iter().filter(|kind| *kind != StreamKind::Notify);
        let claimed = streams.filter_map(|kind| Some((kind, self.take(kind, number)?)));
        Claims(Arc::new(Mutex::new(claimed.collect())))
    }

    /// True if an earlier daemon has left something of a process that is not claimed yet.
    pub fn has(&self, number: u64) -> bool {
        let earlier = self.unclaimed.lock().unwrap_or_else(PoisonError::into_inner);
        earlier.keys().any(|(_, found)| *found == number)
    }

    /// Removes from the store what no process has claimed. The descriptors stay there for the next daemon if some may belong to
    /// processes that this daemon does not manage, or if this daemon could not read all entries: without them, a terminal
    /// hangs up, and whoever writes output waits for ever.
    pub fn end_claims(&self, has_unmanaged: bool) {
        self.consoles.lock().unwrap_or_else(PoisonError::into_inner).clear();
        let rest = std::mem::take(&mut *self.unclaimed.lock().unwrap_or_else(PoisonError::into_inner));
        rest.keys().for_each(|(_, number)| self.reserve(*number));
        if has_unmanaged {
            // A record that can't be read may have a number of which the store has nothing.
            self.next.fetch_add(UNKNOWN_NUMBERS, Ordering::Relaxed);
        }
        if has_unmanaged || self.store.has_unread() {
            if !rest.is_empty() {
                tracing::warn!(
                    "{} streams of processes that this daemon does not manage stay in the descriptor store",
                    rest.len()
                );
            }
        } else {
            self.forget_each(rest.keys().copied());
        }
        threads::discard(rest);
    }
}

fn access(fd: &impl AsFd) -> OFlag {
    let flags = fcntl(fd, FcntlArg::F_GETFL).unwrap_or_default();
    OFlag::from_bits_retain(flags) & OFlag::O_ACCMODE
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::unit::fd_store::testing::Systemd;

    /// What an earlier daemon has put into the store under these names.
    fn of_an_earlier_daemon(names: &[&str]) -> (Systemd, StreamFds) {
        let (systemd, notifier) = Systemd::new();
        let (store, _) = FdStore::with(notifier, 1000, Vec::new());
        let (file, mut kept) = (std::fs::File::open("/dev/null").unwrap(), Vec::new());
        for name in names {
            store.keep(name, &[file.as_fd()]).unwrap();
        }
        systemd.read(&mut kept);
        let (systemd, notifier) = Systemd::new();
        let (store, found) = FdStore::with(notifier, 1000, kept);
        (systemd, StreamFds::new(Arc::new(store), found))
    }

    #[test]
    fn the_entries_of_a_process_are_counted() {
        let (_systemd, notifier) = Systemd::new();
        let (store, _) = FdStore::with(notifier, 1000, Vec::new());
        let fds = StreamFds::new(Arc::new(store), Vec::new());
        let file = std::fs::File::open("/dev/null").unwrap();
        for (kind, number) in [
            (StreamKind::Terminal, 4),
            (StreamKind::Terminal, 4),
            (StreamKind::Input, 4),
            (StreamKind::Input, 44),
        ] {
            fds.store(kind, number, &[file.as_fd(), file.as_fd()]);
        }
        assert_eq!((fds.count_of(4), fds.count_of(44), fds.count()), (3, 1, 4));
        fds.forget(StreamKind::Terminal, 4);
        assert_eq!((fds.count_of(4), fds.count_of(44), fds.count()), (1, 1, 2));
    }

    #[test]
    fn what_may_belong_to_an_unmanaged_process_stays_in_the_store() {
        for has_unmanaged in [false, true] {
            let (_systemd, fds) = of_an_earlier_daemon(&["t7", "o7", "o8"]);
            assert!(!fds.claim(StreamKind::Output, 8).is_empty());
            fds.end_claims(has_unmanaged);
            assert_eq!(fds.count_of(7), if has_unmanaged { 2 } else { 0 });
            assert_eq!((fds.count_of(8), fds.has(7)), (1, false), "claimed");
            let next = fds.next_number();
            assert!(if has_unmanaged { next > UNKNOWN_NUMBERS } else { next == 8 }, "{next}");
        }
    }

    #[test]
    fn a_stream_of_a_newer_version_stays_in_the_store_and_nobody_gets_its_number() {
        let (_systemd, fds) = of_an_earlier_daemon(&["z7", "unknown"]);
        fds.end_claims(false);
        assert_eq!((fds.store.count_of("z7"), fds.count(), fds.next_number()), (1, 1, 8));
    }

    #[test]
    fn names_are_read_back_and_no_connection_is_taken_for_a_stream() {
        for kind in StreamKind::ALL {
            assert_eq!(StreamKind::parse(&kind.name(42)), Some((kind, 42)));
        }
        for other in ["c1", "o", "o-1", "", "containerd-shim-systemd-v1.socket"] {
            assert_eq!(StreamKind::parse(other), None, "{other}");
            assert!(StreamKind::may_have_sockets(other), "{other}");
        }
        let pipes = ["i1", "o1", "e1", "a1", "b1"].map(StreamKind::may_have_sockets);
        assert_eq!((pipes, ["t1", "n1"].map(StreamKind::may_have_sockets)), ([false; 5], [true; 2]));
    }
}
