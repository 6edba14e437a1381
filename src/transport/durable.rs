//! A connection that outlives the process: its requests and responses are in a [`Journal`] until they are answered and sent.
//!
//! The connection itself reads requests and sends responses. ttrpc's server starts a task for each request, waits until that
//! task runs, and passes the response to another task: on a node with many containers that are polled, this costs more than
//! the call itself.

use std::future;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use containerd_shim_protos::api::ConnectRequest;
use futures_util::Stream;
use futures_util::stream::FuturesUnordered;
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::socket::{MsgFlags, recv};
use protobuf::Message;
use tokio::io::unix::AsyncFd;

use crate::fault::{self, Point};
use crate::suspect::{self, Crashes, Suspect};
use crate::sys;

use super::StoreEntry;
use super::budget::Budget;
use super::frame::Frame;
use super::journal::{Error, Found, Journal};

/// How many bytes are read from the socket at once.
const CHUNK: usize = 16 << 10;
/// The metadata key for the namespace of a call (containerd 2.0 and later).
const NAMESPACE: &str = "containerd-namespace-ttrpc";
/// With more unsent bytes than this, nothing is read.
const BACKLOG: u64 = 1 << 20;

/// A response that is being made.
pub type Answer = Pin<Box<dyn Future<Output = Frame> + Send>>;

/// Waits until a socket may accept more.
type Room = Pin<Box<dyn Future<Output = io::Result<()>> + Send>>;

/// Answers the frames of clients.
pub trait Dispatch: Send + Sync {
    /// Answers a frame. `None` for a frame that gets no answer.
    fn answer(&self, frame: &Frame) -> Option<Answer>;
}

/// A connection of containerd.
pub struct Durable {
    socket: AsyncFd<OwnedFd>,
    journal: Journal,
    /// Requests that an earlier daemon has read, before they are answered.
    replayed: Vec<Frame>,
    /// Answers that are not complete.
    answers: FuturesUnordered<Answer>,
    /// Resolves when the socket may accept more, after it has refused something.
    room: Option<Room>,
    /// Its entry in the descriptor store.
    entry: StoreEntry,
    /// The peer has closed the connection, or it is broken: it is not kept any longer.
    over: bool,
}

/// A connection that the async runtime does not watch yet.
pub struct Unwatched {
    socket: OwnedFd,
    journal: Journal,
    replayed: Vec<Frame>,
    entry: StoreEntry,
}

impl Unwatched {
    /// Makes a connection of a new socket that is kept already.
    ///
    /// # Errors
    /// The descriptor is not a socket.
    pub fn new(socket: OwnedFd, journal: Journal, entry: StoreEntry) -> Result<Self, Error> {
        sys::count_peeked(&socket)?;
        Ok(Self { socket, journal, replayed: Vec::new(), entry })
    }

    /// Adopts a connection that an earlier daemon accepted. Requests without a response are read from it once more, marked
    /// as replayed. Requests that crashed earlier daemons, or for which there is no room, are answered with an error instead.
    ///
    /// # Errors
    /// The journal can't be read.
    pub fn adopt(
        socket: OwnedFd,
        kept: OwnedFd,
        crashes: &Crashes,
        budget: &Budget,
        entry: StoreEntry,
    ) -> Result<Self, Error> {
        let Found { mut journal, unanswered, in_socket } = Journal::adopt(kept, budget)?;
        let flags = OFlag::from_bits_retain(fcntl(&socket, FcntlArg::F_GETFL)?);
        fcntl(&socket, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))?;
        match sys::peek_offset(&socket)? {
            Some(noted) if in_socket => discard(&socket, noted)?,
            // Bytes that were peeked but not journaled are peeked again.
            Some(_) | None => sys::count_peeked(&socket)?,
        }
        journal.settle()?;
        journal.refuse(socket.as_fd())?;
        let mut replayed = Vec::with_capacity(unanswered.len());
        for frame in unanswered {
            match poison(&frame, crashes) {
                Some(refusal) => journal.respond(socket.as_fd(), &refusal)?,
                None => replayed.push(frame.replayed()),
            }
        }
        Ok(Self { socket, journal, replayed, entry })
    }

    /// Lets the async runtime watch the connection.
    ///
    /// # Errors
    /// The kernel can't watch it. Needs the async runtime.
    pub fn watch(self) -> io::Result<Durable> {
        let Self { socket, journal, replayed, entry } = self;
        Ok(Durable::over(sys::watch(socket)?, journal, replayed, entry))
    }

    /// As [`Self::watch`], as soon as the kernel can watch one more descriptor (epoll(7), `max_user_watches`): containerd takes a
    /// task whose connection is closed for dead.
    ///
    /// # Errors
    /// The kernel can't watch it for another reason. The connection is not kept any longer.
    pub async fn watch_once_possible(self) -> io::Result<Durable> {
        let Self { socket, journal, replayed, entry } = self;
        let watch = || sys::watch(socket.try_clone()?);
        match sys::once_there_is_room("a connection of an earlier daemon", watch).await {
            Ok(socket) => Ok(Durable::over(socket, journal, replayed, entry)),
            Err(error) => {
                entry.forget();
                Err(error)
            }
        }
    }
}

impl Durable {
    fn over(socket: AsyncFd<OwnedFd>, journal: Journal, replayed: Vec<Frame>, entry: StoreEntry) -> Self {
        Self { socket, journal, replayed, answers: FuturesUnordered::new(), room: None, entry, over: false }
    }

    /// Sends all responses of earlier daemons, and then answers frames until the connection ends. Boxed, because a future can
    /// have its arguments twice.
    pub async fn serve(mut self: Box<Self>, calls: Arc<dyn Dispatch>) {
        let served = async {
            future::poll_fn(|context| self.poll_send(context)).await?;
            future::poll_fn(|context| self.poll_serve(&*calls, context)).await
        };
        if let Err(error) = served.await {
            tracing::debug!(%error, "a connection ended: {error}");
        }
        self.over = true;
    }

    /// Reads and answers frames. Ready at the end of the connection.
    fn poll_serve(&mut self, calls: &dyn Dispatch, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.answers
            .extend(std::mem::take(&mut self.replayed).iter().filter_map(|frame| calls.answer(frame)));
        loop {
            self.poll_answers(context).map_err(failed)?;
            let _ = self.poll_send(context)?;
            // Every further frame could cause another answer.
            if self.journal.unsent() > BACKLOG {
                return Poll::Pending;
            }
            let mut readable = ready!(self.socket.poll_read_ready(context))?;
            match take(readable.get_inner(), &mut self.journal) {
                Ok(Taken::Frames { frames, is_all }) => {
                    // As tokio does: the kernel reports what comes from now on.
                    if is_all {
                        readable.clear_ready();
                    }
                    self.answers.extend(frames.iter().filter_map(|frame| calls.answer(frame)));
                }
                Ok(Taken::End) => return Poll::Ready(Ok(())),
                Err(Error::Io(error)) if error.kind() == io::ErrorKind::WouldBlock => {
                    readable.clear_ready();
                }
                Err(Error::Io(error)) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Poll::Ready(Err(failed(error))),
            }
        }
    }

    /// Journals the answers that are complete. The task is woken when another one is.
    fn poll_answers(&mut self, context: &mut Context<'_>) -> Result<(), Error> {
        while let Poll::Ready(Some(answer)) = Pin::new(&mut self.answers).poll_next(context) {
            self.journal.respond(self.socket.get_ref().as_fd(), &answer)?;
            fault::point(Point::ConnectionUnsent);
        }
        Ok(())
    }

    /// Sends what the journal has. Pending for as long as the socket does not accept all of it.
    fn poll_send(&mut self, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let socket = self.socket.get_ref();
        while self.journal.unsent() > 0 {
            if let Some(waiting) = &mut self.room {
                ready!(waiting.as_mut().poll(context))?;
                self.room = None;
            }
            match self.journal.send(socket.as_fd()) {
                Ok(()) => fault::point(Point::ConnectionSent),
                Err(Errno::EAGAIN) => self.room = Some(Box::pin(may_send(socket.try_clone()))),
                Err(errno) => return Poll::Ready(Err(errno.into())),
            }
        }
        Poll::Ready(Ok(()))
    }
}

/// Waits until a socket may accept more. Few sockets need this: most accept everything at once.
pub(super) async fn may_send(socket: io::Result<OwnedFd>) -> io::Result<()> {
    /// How long to wait if the socket can't be watched.
    const PAUSE: Duration = Duration::from_millis(100);
    match socket.and_then(sys::watch_writable) {
        Ok(socket) => socket.writable().await.map(drop),
        Err(error) if sys::lacks_room(&error) => {
            tokio::time::sleep(PAUSE).await;
            Ok(())
        }
        Err(error) => Err(error),
    }
}

/// The error response to a request that crashed the daemon too often. `None` if the request is to be served.
fn poison(frame: &Frame, crashes: &Crashes) -> Option<Frame> {
    let request = frame.request()?;
    let suspect = Suspect::request(frame.stream(), &request.service, &request.method, &request.payload);
    let count = crashes.count(suspect);
    if count == 0 {
        return None;
    }
    let what = subject(&request);
    if count < suspect::LIMIT {
        tracing::warn!("{what} crashed or blocked the daemon and is tried again");
        return None;
    }
    tracing::error!("{what} crashed or blocked the daemon {count} times: answering it with an error");
    let reason = format!(
        "{what} crashed or blocked the runtime's daemon {count} times, so it is not tried again: see journalctl -u {}",
        crate::unit::name::DAEMON_SERVICE
    );
    Some(Frame::refusal(frame.stream(), ttrpc::Code::INTERNAL, reason))
}

/// Describes a request for people: method, id and namespace.
fn subject(request: &ttrpc::Request) -> String {
    // The id is the first field of every request of the Task API. The other fields are ignored.
    let id = ConnectRequest::parse_from_bytes(&request.payload).map(|message| message.id).unwrap_or_default();
    let mut metadata = request.metadata.iter();
    let namespace = metadata.find(|pair| pair.key == NAMESPACE).map(|pair| &pair.value);
    match namespace {
        Some(namespace) => format!("{} of task {namespace}/{id}", request.method),
        None => format!("{} of task {id}", request.method),
    }
}

/// What was read from the socket.
enum Taken {
    /// The client has closed the connection.
    End,
    /// Whole frames, perhaps none. `is_all`: nothing was left in the socket.
    Frames { frames: Vec<Frame>, is_all: bool },
}

/// Reads from the socket.
fn take(socket: &OwnedFd, journal: &mut Journal) -> Result<Taken, Error> {
    let Some((length, frames)) = look(socket, journal)? else {
        return Ok(Taken::End);
    };
    fault::point(Point::ConnectionNoted);
    discard(socket, length)?;
    fault::point(Point::ConnectionTaken);
    journal.refuse(socket.as_fd())?;
    Ok(Taken::Frames { frames, is_all: length < CHUNK })
}

/// Peeks at the socket and journals what it reads, which stays in the socket. Returns its length and the frames that are
/// complete now, or `None` at the end.
fn look(socket: &OwnedFd, journal: &mut Journal) -> Result<Option<(usize, Vec<Frame>)>, Error> {
    let mut bytes = [0; CHUNK];
    journal.settle()?;
    let length = recv(socket.as_raw_fd(), &mut bytes, MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT)?;
    if length == 0 {
        return Ok(None);
    }
    Ok(Some((length, journal.note(&bytes[..length])?)))
}

/// Removes bytes from the socket that were peeked.
pub(super) fn discard(socket: &OwnedFd, mut length: usize) -> Result<(), Errno> {
    let mut bytes = [0; CHUNK];
    while length > 0 {
        let part = length.min(CHUNK);
        match recv(socket.as_raw_fd(), &mut bytes[..part], MsgFlags::MSG_DONTWAIT) {
            Ok(0) => return Err(Errno::ECONNRESET),
            Ok(taken) => length -= taken,
            Err(Errno::EINTR) => {}
            Err(errno) => return Err(errno),
        }
    }
    Ok(())
}

pub(super) fn failed(error: Error) -> io::Error {
    match error {
        Error::Io(error) => error,
        other => io::Error::other(other),
    }
}

impl Drop for Durable {
    fn drop(&mut self) {
        if self.over {
            self.entry.forget();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixStream;

    #[tokio::test(start_paused = true)]
    async fn a_response_waits_until_its_client_reads_also_if_the_kernel_watches_nothing_more() {
        let (socket, mut client) = UnixStream::pair().unwrap();
        socket.set_nonblocking(true).unwrap();
        while io::Write::write(&mut &socket, &[0; 4096]).is_ok() {}
        let mut room = Box::pin(may_send(socket.try_clone().map(Into::into)));
        assert!(futures_util::poll!(&mut room).is_pending());
        let mut read = vec![0; 1 << 20];
        assert!(io::Read::read(&mut client, &mut read).unwrap() > 0);
        room.await.unwrap();
        may_send(Err(Errno::EMFILE.into())).await.unwrap();
        assert!(may_send(Err(Errno::EBADF.into())).await.is_err());
    }
}
