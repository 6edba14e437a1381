//! A connection that outlives the process: a byte stream for ttrpc with a [`Journal`].

use std::collections::VecDeque;
use std::future;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, Waker, ready};
use std::time::Duration;

use containerd_shim_protos::api::ConnectRequest;
use futures_util::Stream;
use futures_util::stream::FuturesUnordered;
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::socket::{MsgFlags, recv};
use protobuf::Message;
use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt, ReadBuf};

use crate::fault::{self, Point};
use crate::suspect::{self, Crashes, Suspect};
use crate::sys;

use super::StoreEntry;
use super::budget::Budget;
use super::frame::{Assembler, Frame};
use super::journal::{Error, Found, Journal};

/// How many bytes are read from the socket at once.
const CHUNK: usize = 16 << 10;
/// The metadata key for the namespace of a call (containerd 2.0 and later).
const NAMESPACE: &str = "containerd-namespace-ttrpc";
/// With this many unsent bytes, the writer has to wait.
const BACKLOG: u64 = 1 << 20;

/// A response that is being made. `None` if there can be none.
pub type Answer = Pin<Box<dyn Future<Output = Option<Frame>> + Send>>;

/// Waits until a socket may accept more.
type Room = Pin<Box<dyn Future<Output = io::Result<()>> + Send>>;

/// Answers requests without ttrpc, which passes each request to other tasks of the async runtime, and mostly to other
/// threads.
pub trait Direct: Send + Sync {
    /// Answers a request. `None` leaves it to ttrpc.
    fn answer(&self, request: &Frame) -> Option<Answer>;
}

/// A connection of containerd.
pub struct Durable {
    socket: AsyncFd<OwnedFd>,
    journal: Journal,
    /// Requests that an earlier daemon has read, before they are answered or ready.
    replayed: Vec<Frame>,
    /// Whole frames that ttrpc has not read yet.
    ready: VecDeque<u8>,
    /// Answers requests before ttrpc reads them.
    direct: Option<Arc<dyn Direct>>,
    /// Its answers that are not complete. Never locked: ttrpc requires a connection to be `Sync`, which a future is not.
    answers: Mutex<FuturesUnordered<Answer>>,
    /// A response that ttrpc has not written completely.
    writing: Assembler,
    /// The journal has responses that do not come from ttrpc. The next read sends them.
    unsent: bool,
    /// Resolves when the socket may accept more, after it has refused something. Never locked, as `answers`.
    room: Mutex<Option<Room>>,
    /// The writer that waits until more can be sent. The socket wakes only the task that polled it last.
    writer: Option<Waker>,
    /// The reader that waits until these responses are sent.
    reader: Option<Waker>,
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
        Self {
            socket,
            journal,
            replayed,
            ready: VecDeque::new(),
            direct: None,
            answers: Mutex::default(),
            writing: Assembler::default(),
            unsent: false,
            room: Mutex::default(),
            writer: None,
            reader: None,
            entry,
            over: false,
        }
    }

    /// The same connection. From now on, `direct` has the first choice of its requests.
    pub fn answered_by(mut self, direct: Arc<dyn Direct>) -> Self {
        self.direct = Some(direct);
        self
    }

    /// Sends all responses of earlier daemons, and then answers requests until there is one for ttrpc. `None`: the connection
    /// is over. ttrpc has no tasks and no buffers for a connection before it is needed. Boxed, because a future can have its
    /// arguments twice.
    pub async fn until_needed(mut self: Box<Self>) -> Option<Box<Self>> {
        let served = async {
            self.flush().await?;
            future::poll_fn(|context| self.poll_requests(context)).await
        };
        match served.await {
            Ok(is_needed) => is_needed.then_some(self),
            Err(error) => {
                self.over = true;
                tracing::debug!(%error, "a connection ended: {error}");
                None
            }
        }
    }

    /// Reads until there are requests for ttrpc. False at the end.
    fn poll_requests(&mut self, context: &mut Context<'_>) -> Poll<io::Result<bool>> {
        std::mem::take(&mut self.replayed).into_iter().for_each(|frame| self.pass(frame));
        while self.ready.is_empty() {
            if let Err(error) = self.poll_answers(context) {
                self.over = true;
                return Poll::Ready(Err(failed(error)));
            }
            // Every further frame could cause another answer.
            if self.unsent || self.journal.unsent() > BACKLOG {
                ready!(self.poll_own(context))?;
            }
            let mut readable = ready!(self.socket.poll_read_ready(context))?;
            match take(readable.get_inner(), &mut self.journal) {
                Ok(Taken::Frames { frames, is_all }) => {
                    // As tokio does: the kernel reports what comes from now on.
                    if is_all {
                        readable.clear_ready();
                    }
                    self.unsent |= self.journal.unsent() > 0;
                    frames.into_iter().for_each(|frame| self.pass(frame));
                }
                Ok(Taken::End) => {
                    self.over = true;
                    return Poll::Ready(Ok(false));
                }
                Err(Error::Io(error)) if error.kind() == io::ErrorKind::WouldBlock => {
                    readable.clear_ready();
                }
                Err(Error::Io(error)) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => {
                    self.over = true;
                    return Poll::Ready(Err(failed(error)));
                }
            }
        }
        Poll::Ready(Ok(true))
    }

    /// Lets a frame be answered directly, or else by ttrpc.
    fn pass(&mut self, frame: Frame) {
        match self.direct.as_ref().and_then(|direct| direct.answer(&frame)) {
            Some(answer) => self.answers.get_mut().unwrap_or_else(PoisonError::into_inner).push(answer),
            None => self.ready.extend(frame.bytes),
        }
    }

    /// Journals the answers that are complete. The reader is woken when another one is.
    fn poll_answers(&mut self, context: &mut Context<'_>) -> Result<(), Error> {
        let answers = self.answers.get_mut().unwrap_or_else(PoisonError::into_inner);
        while let Poll::Ready(Some(answer)) = Pin::new(&mut *answers).poll_next(context) {
            if let Some(answer) = answer {
                self.journal.respond(self.socket.get_ref().as_fd(), &answer)?;
                fault::point(Point::ConnectionUnsent);
                self.unsent = true;
            }
        }
        Ok(())
    }

    fn respond(&mut self, bytes: &[u8]) -> Result<(), Error> {
        let frames = self.writing.push(bytes);
        // ttrpc checks the length itself.
        if let Some((_, refused)) = self.writing.take_refused().pop() {
            return Err(refused.into());
        }
        for (_, frame) in frames {
            self.journal.respond(self.socket.get_ref().as_fd(), &frame)?;
            fault::point(Point::ConnectionUnsent);
        }
        Ok(())
    }

    /// As [`Self::poll_send`], for the writer.
    fn poll_write_out(&mut self, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let sent = self.poll_send(context);
        self.writer = sent.is_pending().then(|| context.waker().clone());
        if sent.is_ready() {
            self.reader.take().into_iter().for_each(Waker::wake);
        }
        sent
    }

    /// For the reader: sends the responses that do not come from ttrpc. Pending for as long as the client leaves too many of
    /// them unread: every further request could cause another one.
    fn poll_own(&mut self, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.unsent = self.poll_send(context)?.is_pending();
        let is_late = self.journal.unsent() > BACKLOG;
        self.reader = is_late.then(|| context.waker().clone());
        self.writer.take().into_iter().for_each(Waker::wake);
        if is_late { Poll::Pending } else { Poll::Ready(Ok(())) }
    }

    fn poll_send(&mut self, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let socket = self.socket.get_ref();
        let room = self.room.get_mut().unwrap_or_else(PoisonError::into_inner);
        while self.journal.unsent() > 0 {
            if let Some(waiting) = room {
                ready!(waiting.as_mut().poll(context))?;
                *room = None;
            }
            match self.journal.send(socket.as_fd()) {
                Ok(()) => fault::point(Point::ConnectionSent),
                Err(Errno::EAGAIN) => *room = Some(Box::pin(may_send(socket.try_clone()))),
                Err(errno) => {
                    self.over = true;
                    return Poll::Ready(Err(errno.into()));
                }
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

impl AsyncRead for Durable {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = &mut *self;
        if !ready!(this.poll_requests(context))? {
            return Poll::Ready(Ok(()));
        }
        let (front, _) = this.ready.as_slices();
        let length = front.len().min(buffer.remaining());
        buffer.put_slice(&front[..length]);
        this.ready.drain(..length);
        if this.ready.is_empty() {
            // Frees the memory of a large request.
            this.ready = VecDeque::new();
        }
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Durable {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        if self.journal.unsent() > BACKLOG {
            ready!(self.poll_write_out(context))?;
        }
        if let Err(error) = self.respond(bytes) {
            self.over = true;
            return Poll::Ready(Err(failed(error)));
        }
        Poll::Ready(Ok(bytes.len()))
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.poll_write_out(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.poll_write_out(context)
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
