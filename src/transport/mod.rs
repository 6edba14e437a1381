//! Connections that outlive the process.
//!
//! containerd treats a closed connection as a dead shim. So the descriptor store keeps the connections ([`ConnectionStore`]), and the
//! next daemon continues them where the last one ended ([`durable`]).

pub mod durable;
pub mod frame;
pub mod journal;
pub mod listener;
#[cfg(test)]
mod model;
pub mod sockets;

use std::os::fd::BorrowedFd;

/// Keeps descriptors for the next daemon.
pub trait ConnectionStore: Send + Sync {
    /// Keeps descriptors under a name.
    ///
    /// # Errors
    /// The descriptors can't be kept. A connection is refused then.
    fn keep(&self, name: &str, fds: &[BorrowedFd<'_>]) -> std::io::Result<()>;
    /// Closes all descriptors that are kept under a name.
    fn forget(&self, name: &str);
}
