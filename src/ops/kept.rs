//! Descriptors of processes' streams that systemd keeps: pipes with bytes in them, terminals, and the
//! ends without which a process would see its reader or its writer gone while the daemon is down.

use std::collections::HashMap;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use nix::fcntl::{FcntlArg, OFlag, fcntl};

use crate::unit::fd_store::{self, FdStore};

/// What a kept descriptor belongs to. The letter begins the name by which systemd keeps it; the
/// process's number follows. Names are short, see `transport::listener`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Part {
    /// Standard input: the client's FIFO.
    Input,
    /// Standard output: the FIFO or pipe that is copied from, and the client's FIFO.
    Output,
    /// Standard error, likewise.
    ErrorOutput,
    /// The master side of the terminal.
    Terminal,
    /// The socket at which a container notifies.
    Notify,
}

impl Earlier {
    /// Nothing was kept.
    pub fn is_empty(&self) -> bool {
        self.readers.is_empty() && self.writers.is_empty() && self.both.is_empty()
    }
}

impl Part {
    const ALL: [Self; 5] = [Self::Input, Self::Output, Self::ErrorOutput, Self::Terminal, Self::Notify];

    fn letter(self) -> char {
        match self {
            Self::Input => 'i',
            Self::Output => 'o',
            Self::ErrorOutput => 'e',
            Self::Terminal => 't',
            Self::Notify => 'n',
        }
    }

    fn name(self, number: u64) -> String {
        format!("{}{number}", self.letter())
    }

    fn parse(name: &str) -> Option<(Self, u64)> {
        let part = Self::ALL.into_iter().find(|part| name.starts_with(part.letter()))?;
        Some((part, name[1..].parse().ok()?))
    }
}

/// What was kept of one part of a process's streams, told apart by how it was opened.
#[derive(Debug, Default)]
pub struct Earlier {
    /// Opened for reading only.
    pub readers: Vec<OwnedFd>,
    /// Opened for writing only.
    pub writers: Vec<OwnedFd>,
    /// Opened for both: a client's FIFO, or a terminal.
    pub both: Vec<OwnedFd>,
}

/// All that is kept.
#[derive(Debug)]
pub struct Kept {
    store: Arc<FdStore>,
    next: AtomicU64,
    earlier: Mutex<HashMap<(Part, u64), Earlier>>,
}

impl Kept {
    /// Takes over what earlier daemons have had kept.
    pub fn new(store: Arc<FdStore>, fds: Vec<(String, OwnedFd)>) -> Self {
        let mut earlier: HashMap<(Part, u64), Earlier> = HashMap::new();
        for (name, fd) in fds {
            let Some(key) = Part::parse(&name) else {
                tracing::warn!(name, "{name}: kept by systemd, and not known here");
                store.forget(&name);
                continue;
            };
            let found = earlier.entry(key).or_default();
            match access(&fd) {
                OFlag::O_RDONLY => found.readers.push(fd),
                OFlag::O_WRONLY => found.writers.push(fd),
                _ => found.both.push(fd),
            }
        }
        Self { store, next: AtomicU64::default(), earlier: Mutex::new(earlier) }
    }

    /// A number that no process has had. Those in records have to be told first ([`Self::used`]).
    pub fn number(&self) -> u64 {
        self.next.fetch_add(1, Ordering::Relaxed)
    }

    /// A process of an earlier daemon has this number.
    pub fn used(&self, number: u64) {
        self.next.fetch_max(number + 1, Ordering::Relaxed);
    }

    /// Whether there is room for the descriptors of one more process.
    ///
    /// # Errors
    /// There is none.
    pub fn has_room(&self) -> Result<(), fd_store::Error> {
        self.store.has_room()
    }

    /// Has systemd keep descriptors.
    pub fn keep(&self, part: Part, number: u64, fds: &[BorrowedFd<'_>]) {
        if fds.is_empty() {
            return;
        }
        if let Err(error) = self.store.keep(&part.name(number), fds) {
            tracing::error!(%error, "a restart of the daemon would cut off a stream: {error}");
        }
    }

    /// They are not needed any more. Nobody sees an end of file before.
    pub fn forget(&self, part: Part, number: u64) {
        self.store.forget(&part.name(number));
    }

    /// What an earlier daemon has had kept of a part of a process's streams.
    pub fn take(&self, part: Part, number: u64) -> Earlier {
        let mut earlier = self.earlier.lock().unwrap_or_else(PoisonError::into_inner);
        earlier.remove(&(part, number)).unwrap_or_default()
    }

    /// They are not needed any more, nor is anything else of this process.
    pub fn forget_all(&self, number: u64) {
        Part::ALL.into_iter().for_each(|part| self.forget(part, number));
    }

    /// True if an earlier daemon has left something of a process's streams.
    pub fn has(&self, number: u64) -> bool {
        let earlier = self.earlier.lock().unwrap_or_else(PoisonError::into_inner);
        earlier.keys().any(|(_, found)| *found == number)
    }

    /// Lets go of what belongs to no process any more.
    pub fn forget_rest(&self) {
        let rest = std::mem::take(&mut *self.earlier.lock().unwrap_or_else(PoisonError::into_inner));
        for (part, number) in rest.into_keys() {
            self.used(number);
            self.forget(part, number);
        }
    }
}

fn access(fd: &impl AsFd) -> OFlag {
    let flags = fcntl(fd, FcntlArg::F_GETFL).unwrap_or_default();
    OFlag::from_bits_retain(flags) & OFlag::O_ACCMODE
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_read_back_and_no_connection_is_taken_for_a_stream() {
        for part in Part::ALL {
            assert_eq!(Part::parse(&part.name(42)), Some((part, 42)));
        }
        for other in ["c1", "o", "o-1", "", "containerd-shim-systemd-v1.socket"] {
            assert_eq!(Part::parse(other), None, "{other}");
        }
    }
}
