//! Connections: bytes, and nothing of tasks.
//!
//! containerd takes a closed connection for a dead shim, so connections outlive the process: systemd
//! keeps them ([`Keep`]), and a new daemon goes on where the old one was ([`durable`]).

pub mod durable;
pub mod frame;
pub mod journal;
pub mod listener;
#[cfg(test)]
mod model;
pub mod sockets;

use std::os::fd::BorrowedFd;

/// Whoever keeps descriptors for the next daemon.
pub trait Keep: Send + Sync {
    /// Keeps descriptors by a name.
    ///
    /// # Errors
    /// They can't be kept: a connection is then better not accepted.
    fn keep(&self, name: &str, fds: &[BorrowedFd<'_>]) -> std::io::Result<()>;
    /// Lets go of all that have the name.
    fn forget(&self, name: &str);
}
