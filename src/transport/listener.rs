//! The daemon's connections: those of earlier daemons, and new ones.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use futures_util::{Stream, StreamExt, stream};
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags};
use nix::sys::socket::sockopt::PeerCredentials;
use nix::sys::socket::{MsgFlags, getsockopt, recv};
use tokio::io::unix::AsyncFd;

use crate::fault::{self, Point};
use crate::suspect::Crashes;
use crate::sys::{self, quota};

use super::budget::Budget;
use super::durable::{Durable, Unwatched, failed};
use super::journal::{self, Journal};
use super::sockets::Socket;
use super::{ConnectionStore, Count, StoreEntry, take_numbered};

/// The prefix of the names under which connections are kept. A number follows.
const PREFIX: &str = "c";

/// All connections of the daemon.
pub struct Connections {
    store: Arc<dyn ConnectionStore>,
    /// The number of the next connection.
    next: AtomicU64,
    /// Watches all connections, for the time when no daemon reads them.
    wake: Epoll,
    /// The number of connections.
    count: Count,
    /// For the unanswered requests on all connections together.
    budget: Budget,
}

/// A connection that an earlier daemon accepted, and the listening socket that it came from.
pub type Adopted = (Socket, Unwatched);

impl Connections {
    /// Adopts the connections of earlier daemons: takes them out of `kept`.
    ///
    /// # Errors
    /// The system or this process lacks something that the next daemon may have. All connections stay kept.
    pub fn adopt(
        store: Arc<dyn ConnectionStore>,
        kept: &mut Vec<(String, OwnedFd)>,
        crashes: &Crashes,
    ) -> io::Result<(Arc<Self>, Vec<Adopted>)> {
        let wake = quota::apart(|| Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC))?;
        let count = Count::default();
        let budget = Budget::default();
        let pairs = take_numbered(PREFIX, kept);
        let next = pairs.keys().max().map_or(0, |last| last + 1);
        let mut adopted = Vec::new();
        for (number, fds) in pairs {
            let name = format!("{PREFIX}{number}");
            match adopt(fds, crashes, &store, &name, &wake, &count, &budget) {
                Ok(connection) => adopted.push(connection),
                Err(error) if sys::lacks_room(&error) => return Err(error),
                // containerd kills the task of a connection that is closed.
                Err(error) if is_of_newer(&error) => tracing::error!(
                    %error,
                    "a connection of a newer version stays in the descriptor store, its calls wait for a daemon of that version: {error}"
                ),
                Err(error) => {
                    tracing::error!(%error, "can't adopt a connection of an earlier daemon: {error}");
                    store.forget(&name);
                }
            }
        }
        Ok((Arc::new(Self { store, next: AtomicU64::new(next), wake, count, budget }), adopted))
    }

    /// The number of connections.
    pub fn count(&self) -> usize {
        self.count.get()
    }

    /// A descriptor that is readable when a connection is, even after this process has ended.
    pub fn wake_fd(&self) -> BorrowedFd<'_> {
        self.wake.0.as_fd()
    }

    /// Accepts connections of callers with this process's own uid. Others are closed: the mode of the socket refuses them
    /// already, unless somebody has changed it.
    ///
    /// # Errors
    /// The listener can't be watched. Needs the async runtime.
    pub fn accept(
        self: Arc<Self>,
        listener: UnixListener,
    ) -> io::Result<impl Stream<Item = io::Result<Durable>> + Send + 'static> {
        listener.set_nonblocking(true)?;
        let listener = sys::watch_as_it_is(listener)?;
        Ok(stream::unfold((self, listener), |(this, listener)| async move {
            // The journal is made first, so that little happens between accept and keep: if the process ends there, the
            // connection is lost.
            let accepted = match Journal::new(&this.budget) {
                Ok(journal) => this.next(&listener, journal).await,
                Err(error) => Err(io::Error::other(error)),
            };
            if accepted.is_err() {
                // Usually the process is out of descriptors. The caller logs the error, and later connections may work.
                tokio::time::sleep(PAUSE_AFTER_ERROR).await;
            }
            Some((accepted, (this, listener)))
        })
        .boxed())
    }

    async fn next(&self, listener: &AsyncFd<UnixListener>, journal: Journal) -> io::Result<Durable> {
        loop {
            let mut readable = listener.readable().await?;
            let Ok(stream) = readable.try_io(|listener| Ok(listener.get_ref().accept()?.0)) else {
                continue;
            };
            let stream = stream?;
            fault::point(Point::ConnectionAccepted);
            if let Some(name) = self.keep(&stream, &journal).await? {
                return self.connection(stream, journal, name);
            }
        }
    }

    /// Adopts a connection that an earlier daemon had accepted and not kept. `None` if the peer has closed it, or if it
    /// is refused.
    ///
    /// # Errors
    /// The connection can't be kept.
    pub async fn rescue(&self, from: Socket, stream: UnixStream) -> io::Result<Option<Adopted>> {
        let journal = Journal::new(&self.budget).map_err(io::Error::other)?;
        let Some(name) = self.keep(&stream, &journal).await? else {
            return Ok(None);
        };
        let connection = self.forgotten_after_error(&name, || {
            stream.set_nonblocking(true)?;
            wake_for(&self.wake, &stream);
            let entry = StoreEntry::new(self.store.clone(), name.clone(), &self.count);
            Unwatched::new(stream.into(), journal, entry).map_err(failed)
        })?;
        Ok(Some((from, connection)))
    }

    /// Keeps a new connection. Returns the name under which it is kept. `None` if the peer has closed it, or if it is
    /// refused.
    async fn keep(&self, stream: &UnixStream, journal: &Journal) -> io::Result<Option<String>> {
        if is_over(stream) {
            return Ok(None);
        }
        let name = format!("{PREFIX}{}", self.next.fetch_add(1, Ordering::Relaxed));
        // A connection that is not kept would end with the daemon, and containerd would give up its tasks. So it is
        // refused now.
        self.store.keep(&name, &[stream.as_fd(), journal.fd()]).await?;
        fault::point(Point::ConnectionKept);
        match getsockopt(stream, PeerCredentials) {
            Ok(peer) if peer.uid() == nix::unistd::geteuid().as_raw() => return Ok(Some(name)),
            Ok(peer) => tracing::warn!(uid = peer.uid(), "refused a connection of user {}", peer.uid()),
            Err(error) => {
                tracing::warn!(%error, "refused a connection, as its user can't be determined: {error}")
            }
        }
        self.store.forget(&name);
        Ok(None)
    }

    fn connection(&self, stream: UnixStream, journal: Journal, name: String) -> io::Result<Durable> {
        self.forgotten_after_error(&name, || {
            stream.set_nonblocking(true)?;
            self.wake.add(&stream, EpollEvent::new(EpollFlags::EPOLLIN, 0))?;
            let entry = StoreEntry::new(self.store.clone(), name.clone(), &self.count);
            Unwatched::new(stream.into(), journal, entry).map_err(failed)?.watch()
        })
    }

    /// Makes something of a connection that is kept. If that fails, the connection is not kept any longer: its client would
    /// wait for an answer forever.
    fn forgotten_after_error<T>(&self, name: &str, make: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
        make().inspect_err(|_| self.store.forget(name))
    }
}

/// Watches a connection of an earlier daemon for the time when no daemon reads it. It is served even without that.
fn wake_for(wake: &Epoll, socket: &UnixStream) {
    if let Err(error) = wake.add(socket, EpollEvent::new(EpollFlags::EPOLLIN, 0)) {
        tracing::warn!(%error, "can't watch a connection, so its next call does not start a daemon that is stopped: {error}");
    }
}

/// True if the peer has closed the connection without a request, as `start` does when it probes the socket. Such a
/// connection is not kept.
fn is_over(stream: &UnixStream) -> bool {
    recv(stream.as_raw_fd(), &mut [0], MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT) == Ok(0)
}

fn adopt(
    fds: Vec<OwnedFd>,
    crashes: &Crashes,
    store: &Arc<dyn ConnectionStore>,
    name: &str,
    wake: &Epoll,
    count: &Count,
    budget: &Budget,
) -> io::Result<Adopted> {
    let (mut journals, mut sockets): (Vec<_>, Vec<_>) = fds.into_iter().partition(journal::is_journal);
    let (Some(journal), Some(socket)) = (journals.pop(), sockets.pop()) else {
        let reason = format!("the descriptor store does not have both descriptors of {name}");
        return Err(io::Error::other(reason));
    };
    let socket = UnixStream::from(socket);
    let address = socket.local_addr()?;
    let from = address.as_pathname().and_then(Socket::at);
    let from = from.ok_or_else(|| io::Error::other("it came from an unknown socket"))?;
    let entry = StoreEntry::new(store.clone(), name.to_owned(), count);
    let watched = socket.try_clone()?;
    let adopted = Unwatched::adopt(socket.into(), journal, crashes, budget, entry).map_err(failed)?;
    // Only now: a call on a connection that this daemon does not serve would start the daemon again and again.
    wake_for(wake, &watched);
    Ok((from, adopted))
}

/// Whether a newer version has written what this version can't read.
fn is_of_newer(error: &io::Error) -> bool {
    let inner = error.get_ref().and_then(|inner| inner.downcast_ref::<journal::Error>());
    matches!(inner, Some(journal::Error::Newer { .. }))
}

/// Identifies a listening socket that systemd passed to the daemon.
///
/// # Errors
/// The socket is not one of the daemon's listeners.
pub fn from_systemd(fd: OwnedFd) -> io::Result<(Socket, UnixListener)> {
    let listener = UnixListener::from(fd);
    let address = listener.local_addr()?;
    let socket = address.as_pathname().and_then(Socket::at).ok_or(io::ErrorKind::AddrNotAvailable)?;
    Ok((socket, listener))
}

/// Keeps a persistent error from using a whole processor.
const PAUSE_AFTER_ERROR: std::time::Duration = std::time::Duration::from_millis(50);

#[cfg(test)]
mod tests;
