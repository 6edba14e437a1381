//! Connections that outlive the process.
//!
//! containerd treats a closed connection as a dead shim. So the descriptor store keeps the connections ([`ConnectionStore`]), and the
//! next daemon continues them where the last one ended ([`durable`]). The connections to containerd for events are kept, too
//! ([`event_connection`]).

mod budget;
pub mod durable;
pub mod event_connection;
pub mod frame;
pub mod journal;
pub mod listener;
#[cfg(test)]
mod model;
pub mod sockets;
pub mod weight;

use std::collections::HashMap;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use async_trait::async_trait;

/// Keeps descriptors for the next daemon.
#[async_trait]
pub trait ConnectionStore: Send + Sync {
    /// Keeps descriptors under a name.
    ///
    /// # Errors
    /// The descriptors can't be kept. A connection is refused then.
    async fn keep(&self, name: &str, fds: &[BorrowedFd<'_>]) -> std::io::Result<()>;
    /// Closes all descriptors that are kept under a name.
    fn forget(&self, name: &str);
}

/// Takes what is kept under names of this prefix and a number out of `kept`. Returns the descriptors by number.
fn take_numbered(prefix: &str, kept: &mut Vec<(String, OwnedFd)>) -> HashMap<u64, Vec<OwnedFd>> {
    let mut taken: HashMap<u64, Vec<OwnedFd>> = HashMap::new();
    for (name, fd) in std::mem::take(kept) {
        match name.strip_prefix(prefix).and_then(|number| number.parse().ok()) {
            Some(number) => taken.entry(number).or_default().push(fd),
            None => kept.push((name, fd)),
        }
    }
    taken
}

/// A number of connections.
#[derive(Clone, Debug, Default)]
struct Count(Arc<AtomicUsize>);

impl Count {
    /// The number.
    fn get(&self) -> usize {
        self.0.load(Ordering::Relaxed)
    }

    /// Counts a connection until the returned value is dropped.
    fn add(&self) -> Counted {
        self.0.fetch_add(1, Ordering::Relaxed);
        Counted(self.0.clone())
    }
}

/// A connection that is counted.
#[derive(Debug)]
struct Counted(Arc<AtomicUsize>);

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// The entry of a connection in the descriptor store.
pub struct StoreEntry {
    store: Arc<dyn ConnectionStore>,
    /// The name under which the connection is kept.
    name: String,
    /// Counts the connection.
    _counted: Counted,
}

impl StoreEntry {
    /// The entry of a connection that is kept under a name.
    fn new(store: Arc<dyn ConnectionStore>, name: String, count: &Count) -> Self {
        Self { store, name, _counted: count.add() }
    }

    /// Closes the descriptors that are kept.
    fn forget(&self) {
        self.store.forget(&self.name);
    }
}
