//! The daemon's sockets: connections that are there already, and those that come.

use std::collections::HashMap;
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
use crate::sys;

use super::Keep;
use super::durable::Durable;
use super::journal::{self, Journal};
use super::sockets::Socket;

/// The names by which connections are kept begin with this, and go on with a number. They are short:
/// systemd passes the names of all descriptors in one environment variable, which the kernel limits
/// to 128 KiB (execve(2)).
const PREFIX: &str = "c";

/// All connections of the daemon.
pub struct Connections {
    keeper: Arc<dyn Keep>,
    /// The next number.
    next: AtomicU64,
    /// Watches all of them, for when nobody reads them.
    news: Epoll,
    /// Each connection has one.
    count: Arc<()>,
}

/// A connection that an earlier daemon has accepted, and the socket over which it came.
pub type Adopted = (Socket, Durable);

impl Connections {
    /// Takes over what was kept of an earlier daemon's connections. What is not one stays in `kept`.
    /// Needs the async runtime.
    ///
    /// # Errors
    /// Connections can't be watched.
    pub fn adopt(
        keeper: Arc<dyn Keep>,
        kept: &mut Vec<(String, OwnedFd)>,
        crashes: &Crashes,
    ) -> io::Result<(Arc<Self>, Vec<Adopted>)> {
        let (news, count) = (Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?, Arc::new(()));
        let mut pairs: HashMap<u64, Vec<OwnedFd>> = HashMap::new();
        for (name, fd) in std::mem::take(kept) {
            match number(&name) {
                Some(number) => pairs.entry(number).or_default().push(fd),
                None => kept.push((name, fd)),
            }
        }
        let next = pairs.keys().max().map_or(0, |last| last + 1);
        let mut adopted = Vec::new();
        for (number, fds) in pairs {
            let name = format!("{PREFIX}{number}");
            match adopt(fds, crashes, &keeper, &name, &news, &count) {
                Ok(connection) => adopted.push(connection),
                Err(reason) => {
                    tracing::error!("can't adopt a connection of an earlier daemon: {reason}");
                    keeper.forget(&name);
                }
            }
        }
        Ok((Arc::new(Self { keeper, next: AtomicU64::new(next), news, count }), adopted))
    }

    /// How many connections there are.
    pub fn count(&self) -> usize {
        Arc::strong_count(&self.count) - 1
    }

    /// Readable as soon as any of them is, also when this process has ended.
    pub fn news(&self) -> BorrowedFd<'_> {
        self.news.0.as_fd()
    }

    /// The connections of callers with this process's own uid, as they come. Others are closed at once:
    /// the socket's mode keeps them out already, unless somebody has changed it.
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
            // Made before there is a connection: from accept to keep is the one moment at which it
            // would be lost with the process.
            let accepted = match Journal::new() {
                Ok(journal) => this.next(&listener, journal).await,
                Err(error) => Err(io::Error::other(error)),
            };
            if accepted.is_err() {
                // Out of descriptors, mostly: the caller logs it, and others may still come.
                tokio::time::sleep(PAUSE_AFTER_ERROR).await;
            }
            Some((accepted, (this, listener)))
        })
        .boxed())
    }

    async fn next(&self, listener: &AsyncFd<UnixListener>, journal: Journal) -> io::Result<Durable> {
        let own_uid = nix::unistd::geteuid().as_raw();
        let name = format!("{PREFIX}{}", self.next.fetch_add(1, Ordering::Relaxed));
        loop {
            let mut readable = listener.readable().await?;
            let accepted = readable.try_io(|listener| {
                let (stream, _) = listener.get_ref().accept()?;
                if is_over(&stream) {
                    return Ok(None);
                }
                // One that is not kept would be lost with the daemon, and its tasks with it. Better now.
                self.keeper.keep(&name, &[stream.as_fd(), journal.fd()])?;
                fault::point(Point::ConnectionKept);
                Ok(Some(stream))
            });
            let Ok(stream) = accepted else {
                continue;
            };
            let Some(stream) = stream? else {
                continue;
            };
            match getsockopt(&stream, PeerCredentials) {
                Ok(peer) if peer.uid() == own_uid => {
                    stream.set_nonblocking(true)?;
                    self.news.add(&stream, EpollEvent::new(EpollFlags::EPOLLIN, 0))?;
                    let (keeper, one) = (self.keeper.clone(), self.count.clone());
                    return Durable::new(stream.into(), journal, keeper, name, one).map_err(io::Error::other);
                }
                Ok(peer) => tracing::warn!(uid = peer.uid(), "refused a connection of user {}", peer.uid()),
                Err(error) => {
                    tracing::warn!(%error, "refused a connection, as its user can't be determined: {error}")
                }
            }
            self.keeper.forget(&name);
        }
    }
}

/// Whoever made it has gone without a word, as `start` does, which only looks whether somebody listens.
/// Not to keep it matters: for each descriptor that systemd lets go of, it makes a process.
fn is_over(stream: &UnixStream) -> bool {
    recv(stream.as_raw_fd(), &mut [0], MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT) == Ok(0)
}

/// The number in a connection's name.
fn number(name: &str) -> Option<u64> {
    name.strip_prefix(PREFIX)?.parse().ok()
}

fn adopt(
    fds: Vec<OwnedFd>,
    crashes: &Crashes,
    keeper: &Arc<dyn Keep>,
    name: &str,
    news: &Epoll,
    count: &Arc<()>,
) -> Result<Adopted, String> {
    let (mut journals, mut sockets): (Vec<_>, Vec<_>) = fds.into_iter().partition(journal::is_journal);
    let (Some(journal), Some(socket)) = (journals.pop(), sockets.pop()) else {
        return Err(format!("not both halves of {name} were kept"));
    };
    let socket = UnixStream::from(socket);
    let address = socket.local_addr().map_err(|error| error.to_string())?;
    let from = address.as_pathname().and_then(Socket::at).ok_or("it came over an unknown socket")?;
    news.add(&socket, EpollEvent::new(EpollFlags::EPOLLIN, 0)).map_err(|error| error.to_string())?;
    let (keeper, one) = (keeper.clone(), count.clone());
    let connection = Durable::adopt(socket.into(), journal, crashes, keeper, name.to_owned(), one);
    Ok((from, connection.map_err(|error| error.to_string())?))
}

/// A socket that systemd passed to the daemon, and which one it is.
///
/// # Errors
/// It is none of the daemon's listeners.
pub fn from_systemd(fd: OwnedFd) -> io::Result<(Socket, UnixListener)> {
    let listener = UnixListener::from(fd);
    let address = listener.local_addr()?;
    let socket = address.as_pathname().and_then(Socket::at).ok_or(io::ErrorKind::AddrNotAvailable)?;
    Ok((socket, listener))
}

/// Keeps a lasting error from taking all of a processor.
const PAUSE_AFTER_ERROR: std::time::Duration = std::time::Duration::from_millis(50);
