//! The connection to containerd for events, which outlives the process: the next daemon does not send an event again that
//! containerd has accepted, even if the last daemon ended before it had recorded that.
//!
//! One call is under way at a time. Its frame is in a memfd that is kept together with the connection, and is sent with
//! sendfile(2), so the position of the file shows how much was sent, wherever the process ends ([`super::journal`]). The
//! response stays in the socket until the memfd says that the call has ended.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use nix::errno::Errno;
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::socket::{MsgFlags, recv};
use protobuf::Message;
use serde::{Deserialize, Serialize};
use tokio::io::unix::AsyncFd;
use ttrpc::Response;
use ttrpc::proto::MESSAGE_LENGTH_MAX;

use crate::fault::{self, Point};
use crate::sys;

use super::durable::{discard, may_send};
use super::frame::{Frame, HEADER};
use super::journal::send;
use super::{ConnectionStore, take_numbered};

/// The prefix of the names under which connections are kept. A number follows.
const PREFIX: &str = "events-";

/// The head ends before this position, at which the frame of the call begins. The head is shorter than a page, so it is written
/// whole or not at all.
const FRAME: u64 = 4096;

/// Memory above this is freed after a call, in bytes.
const KEPT: u64 = 64 << 10;

/// How many of the last successful calls the head names. The caller has recorded earlier ones by then.
const MOST_SUCCEEDED: usize = 16;

/// Identifies a call. The caller chooses the numbers, and other numbers for each call.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CallId(pub u64, pub u64, pub u64);

/// What the memfd says about the calls.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
struct Head {
    /// The socket of containerd.
    address: String,
    /// The stream of the last call.
    stream: u32,
    /// The call that is under way, and the length of its frame.
    under_way: Option<(CallId, u64)>,
    /// Calls that succeeded, the last one at the end.
    succeeded: Vec<CallId>,
}

/// The connections to all containerds.
pub struct EventConnections {
    store: Arc<dyn ConnectionStore>,
    /// The number of the next one.
    next: AtomicU64,
}

impl EventConnections {
    /// Takes the connections of earlier daemons out of `kept`. Those that can't be used are not kept any longer. Returns the
    /// connections by address.
    pub fn adopt(
        store: Arc<dyn ConnectionStore>,
        kept: &mut Vec<(String, OwnedFd)>,
    ) -> (Arc<Self>, HashMap<String, Unwatched>) {
        let pairs = take_numbered(PREFIX, kept);
        let next = pairs.keys().max().map_or(0, |last| last + 1);
        let mut adopted = HashMap::new();
        for (number, fds) in pairs {
            let entry = Entry { store: store.clone(), name: format!("{PREFIX}{number}") };
            match Unwatched::adopt(fds, entry) {
                // A daemon has one connection for each containerd.
                Ok(connection) => drop(adopted.insert(connection.head.address.clone(), connection)),
                Err(error) => {
                    tracing::debug!(%error, "a connection for events of an earlier daemon is of no use: {error}");
                }
            }
        }
        (Arc::new(Self { store, next: AtomicU64::new(next) }), adopted)
    }

    /// Connects to a containerd. If the connection can't be kept, it ends with this process.
    ///
    /// # Errors
    /// Nobody listens there.
    pub async fn connect(&self, address: &str) -> io::Result<EventConnection> {
        let socket = tokio::net::UnixStream::connect(address).await?.into_std()?;
        let file = File::from(memfd_create("shim-events", MFdFlags::MFD_CLOEXEC)?);
        let head = Head { address: address.to_owned(), ..Head::default() };
        let name = format!("{PREFIX}{}", self.next.fetch_add(1, Ordering::Relaxed));
        write(&file, &head)?;
        if let Err(error) = self.store.keep(&name, &[socket.as_fd(), file.as_fd()]).await {
            tracing::debug!(%error, "can't keep a connection for events, so a daemon that is killed may send one twice: {error}");
        }
        let entry = Entry { store: self.store.clone(), name };
        Unwatched { socket: socket.into(), file, head, sent: 0, entry }.watch()
    }
}

/// The entry in the descriptor store. On drop, the connection is not kept any longer. Unlike the connections of clients,
/// it is not counted.
struct Entry {
    store: Arc<dyn ConnectionStore>,
    name: String,
}

impl Drop for Entry {
    fn drop(&mut self) {
        self.store.forget(&self.name);
    }
}

/// A connection that the async runtime does not watch yet.
pub struct Unwatched {
    socket: OwnedFd,
    file: File,
    head: Head,
    sent: u64,
    entry: Entry,
}

impl Unwatched {
    fn adopt(fds: Vec<OwnedFd>, entry: Entry) -> io::Result<Self> {
        let malformed = || io::Error::from(io::ErrorKind::InvalidData);
        let [socket, file] = <[OwnedFd; 2]>::try_from(fds).map_err(|_| malformed())?;
        // The order in which they were kept.
        let (socket, mut file) = (UnixStream::from(socket), File::from(file));
        socket.peer_addr()?;
        socket.set_nonblocking(true)?;
        let head = read(&file)?;
        let sent = file.stream_position()?.checked_sub(FRAME);
        let sent = if head.under_way.is_some() { sent.ok_or_else(malformed)? } else { 0 };
        Ok(Self { socket: socket.into(), file, head, sent, entry })
    }

    /// Lets the async runtime watch the connection.
    ///
    /// # Errors
    /// The kernel can't watch it.
    pub fn watch(self) -> io::Result<EventConnection> {
        let Self { socket, file, head, sent, entry } = self;
        Ok(EventConnection { socket: sys::watch(socket)?, file, head, sent, _entry: entry })
    }
}

/// A connection to one containerd. If a call fails, or is given up, the connection must be dropped.
pub struct EventConnection {
    socket: AsyncFd<OwnedFd>,
    file: File,
    head: Head,
    /// How much of the frame of the call that is under way was sent.
    sent: u64,
    _entry: Entry,
}

impl EventConnection {
    /// The call that is under way.
    pub fn under_way(&self) -> Option<CallId> {
        self.head.under_way.map(|(id, _)| id)
    }

    /// True if containerd is known to have accepted this call.
    pub fn has_succeeded(&self, id: CallId) -> bool {
        self.head.succeeded.contains(&id)
    }

    /// Begins a call. No other may be under way. [`Self::response`] sends it.
    ///
    /// # Errors
    /// The call can't be noted.
    pub fn begin(&mut self, id: CallId, request: &ttrpc::Request) -> io::Result<()> {
        // Streams of clients are odd, and grow (PROTOCOL.md of ttrpc). After the last one, another connection is needed.
        let stream = match self.head.stream {
            0 => 1,
            last => last.checked_add(2).ok_or(io::ErrorKind::QuotaExceeded)?,
        };
        let frame = Frame::of_request(stream, request).ok_or(io::ErrorKind::InvalidInput)?;
        self.file.seek(SeekFrom::Start(FRAME))?;
        self.file.write_all_at(&frame.bytes, FRAME)?;
        (self.head.stream, self.sent) = (stream, 0);
        self.head.under_way = Some((id, frame.bytes.len() as u64));
        write(&self.file, &self.head)?;
        fault::point(Point::PublishBegun);
        Ok(())
    }

    /// Sends what is not sent of the call that is under way, and waits for the response.
    ///
    /// # Errors
    /// The connection has ended, or no call is under way.
    pub async fn response(&mut self) -> io::Result<Response> {
        let (_, length) = self.head.under_way.ok_or(io::ErrorKind::InvalidInput)?;
        while let Err(errno) = send(self.socket.get_ref().as_fd(), &self.file, &mut self.sent, length) {
            match errno {
                Errno::EAGAIN => may_send(self.socket.get_ref().try_clone()).await?,
                other => return Err(other.into()),
            }
        }
        fault::point(Point::PublishSent);
        loop {
            let mut readable = self.socket.readable().await?;
            match peek(readable.get_inner())? {
                Some(frame) if frame.is_response() && frame.stream() == self.head.stream => {
                    let response = frame.bytes.get(HEADER..).unwrap_or_default();
                    return Response::parse_from_bytes(response).map_err(io::Error::other);
                }
                // The response to a call that is over.
                Some(frame) => discard(readable.get_inner(), frame.bytes.len())?,
                None => readable.clear_ready(),
            }
        }
    }

    /// Ends the call that is under way, after its response was received.
    ///
    /// # Errors
    /// The end can't be noted.
    pub fn end(&mut self, has_succeeded: bool) -> io::Result<()> {
        let Some((id, length)) = self.head.under_way.take() else { return Ok(()) };
        if has_succeeded {
            self.head.succeeded.push(id);
            let surplus = self.head.succeeded.len().saturating_sub(MOST_SUCCEEDED);
            self.head.succeeded.drain(..surplus);
        }
        // The response is still in the socket: the next call drops it.
        write(&self.file, &self.head)?;
        if length > KEPT {
            self.file.set_len(FRAME)?;
        }
        Ok(())
    }
}

/// A whole frame in the socket, which stays there. `None` if there is none yet.
fn peek(socket: &OwnedFd) -> io::Result<Option<Frame>> {
    let flags = MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT;
    let mut wanted = HEADER;
    loop {
        let mut bytes = vec![0; wanted];
        let there = match recv(socket.as_raw_fd(), &mut bytes, flags) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(there) => there,
            Err(Errno::EAGAIN) => return Ok(None),
            Err(Errno::EINTR) => continue,
            Err(errno) => return Err(errno.into()),
        };
        if there < wanted {
            return Ok(None);
        }
        let frame = Frame { bytes };
        let whole = HEADER + frame.length();
        if whole > HEADER + MESSAGE_LENGTH_MAX {
            return Err(io::ErrorKind::InvalidData.into());
        }
        if whole == wanted {
            return Ok(Some(frame));
        }
        wanted = whole;
    }
}

/// Writes the head: its length, then the head itself.
fn write(file: &File, head: &Head) -> io::Result<()> {
    let text = serde_json::to_vec(head)?;
    let length = u32::try_from(text.len()).unwrap_or(u32::MAX);
    let bytes = [&length.to_le_bytes()[..], &text].concat();
    if bytes.len() as u64 > FRAME {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    file.write_all_at(&bytes, 0)
}

fn read(file: &File) -> io::Result<Head> {
    let mut length = [0; 4];
    file.read_exact_at(&mut length, 0)?;
    let length = u64::from(u32::from_le_bytes(length)).min(FRAME);
    let mut text = vec![0; usize::try_from(length).unwrap_or_default()];
    file.read_exact_at(&mut text, 4)?;
    Ok(serde_json::from_slice(&text)?)
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::os::fd::BorrowedFd;
    use std::os::unix::net::UnixListener;
    use std::sync::{Mutex, PoisonError};

    use futures_util::FutureExt;

    use super::*;
    use crate::transport::frame::Assembler;

    /// A descriptor store with one name.
    #[derive(Default)]
    struct Kept(Mutex<Vec<(String, OwnedFd)>>);

    impl Kept {
        /// What the next daemon gets.
        fn fds(&self) -> Vec<(String, OwnedFd)> {
            let kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            kept.iter().map(|(name, fd)| (name.clone(), fd.try_clone().unwrap())).collect()
        }
    }

    #[async_trait::async_trait]
    impl ConnectionStore for Kept {
        async fn keep(&self, name: &str, fds: &[BorrowedFd<'_>]) -> io::Result<()> {
            let mut kept = self.0.lock().unwrap();
            kept.extend(fds.iter().map(|fd| (name.to_owned(), fd.try_clone_to_owned().unwrap())));
            Ok(())
        }

        fn forget(&self, name: &str) {
            self.0.lock().unwrap_or_else(PoisonError::into_inner).retain(|(kept, _)| kept != name);
        }
    }

    struct Containerd {
        _dir: tempfile::TempDir,
        address: String,
        listener: UnixListener,
        store: Arc<Kept>,
    }

    impl Containerd {
        fn new() -> Self {
            let dir = tempfile::tempdir().unwrap();
            let address = dir.path().join("containerd.ttrpc").to_str().unwrap().to_owned();
            let listener = UnixListener::bind(&address).unwrap();
            Self { _dir: dir, address, listener, store: Arc::default() }
        }

        async fn connect(&self) -> (EventConnection, UnixStream) {
            let (connections, _) = EventConnections::adopt(self.store.clone(), &mut Vec::new());
            let connection = connections.connect(&self.address).await.unwrap();
            (connection, self.listener.accept().unwrap().0)
        }

        /// The connection of the next daemon. This one is killed: its connection closes nothing for anybody else.
        fn killed(&self, connection: EventConnection) -> EventConnection {
            let mut kept = self.store.fds();
            kept.push(("c1".to_owned(), connection.file.try_clone().unwrap().into()));
            std::mem::forget(connection._entry);
            drop((connection.socket, connection.file));
            let (_, mut adopted) = EventConnections::adopt(self.store.clone(), &mut kept);
            assert_eq!(kept.len(), 1, "the descriptors of others are left");
            adopted.remove(&self.address).unwrap().watch().unwrap()
        }
    }

    fn request(bytes: usize) -> ttrpc::Request {
        ttrpc::Request { method: "Forward".to_owned(), payload: vec![7; bytes], ..ttrpc::Request::default() }
    }

    /// Reads whole frames until `count` have come.
    fn receive(peer: &mut UnixStream, count: usize) -> Vec<Frame> {
        let (mut assembler, mut frames, mut bytes) = (Assembler::default(), Vec::new(), [0; 4096]);
        while frames.len() < count {
            let length = peer.read(&mut bytes).unwrap();
            assert!(length > 0);
            frames.extend(assembler.push(&bytes[..length]).into_iter().map(|(_, frame)| frame));
        }
        assert_eq!(assembler.pending(), 0);
        frames
    }

    fn respond(peer: &mut UnixStream, to: &Frame) {
        let response = Frame::response(to.stream(), &Response::new()).unwrap();
        peer.write_all(&response.bytes).unwrap();
    }

    fn assert_nothing_more(peer: &UnixStream) {
        peer.set_nonblocking(true).unwrap();
        assert_eq!((&mut &*peer).read(&mut [0]).unwrap_err().kind(), io::ErrorKind::WouldBlock);
        peer.set_nonblocking(false).unwrap();
    }

    #[tokio::test]
    async fn a_call_is_sent_once_wherever_the_daemon_ends() {
        let containerd = Containerd::new();
        let (mut connection, mut peer) = containerd.connect().await;
        // More than the socket takes at once, then usual ones. The stages of each call: noted, sent in part or whole, answered,
        // and ended.
        for (number, bytes) in (0..).zip([2 << 20, 10, 10]) {
            let id = CallId(1, 2, number);
            connection.begin(id, &request(bytes)).unwrap();
            connection = containerd.killed(connection);
            assert_eq!(connection.under_way(), Some(id));
            assert!(connection.response().now_or_never().is_none());
            connection = containerd.killed(connection);
            let reading = std::thread::spawn(move || (receive(&mut peer, 1).remove(0), peer));
            while !reading.is_finished() {
                let _ =
                    tokio::time::timeout(std::time::Duration::from_millis(5), connection.response()).await;
                connection = containerd.killed(connection);
            }
            let frame;
            (frame, peer) = reading.join().unwrap();
            assert_eq!(frame.request().unwrap().payload, request(bytes).payload);
            respond(&mut peer, &frame);
            assert_eq!(connection.response().await.unwrap(), Response::new());
            connection = containerd.killed(connection);
            assert_eq!(connection.response().await.unwrap(), Response::new());
            assert!(!connection.has_succeeded(id));
            connection.end(true).unwrap();
            connection = containerd.killed(connection);
            assert!(connection.has_succeeded(id) && connection.under_way().is_none());
            assert_nothing_more(&peer);
        }
    }

    #[tokio::test]
    async fn a_connection_whose_containerd_has_ended_is_not_kept() {
        let containerd = Containerd::new();
        let (mut connection, mut peer) = containerd.connect().await;
        connection.begin(CallId(1, 1, 1), &request(1)).unwrap();
        assert!(connection.response().now_or_never().is_none());
        receive(&mut peer, 1);
        drop(peer);
        assert!(connection.response().await.is_err());
        assert_eq!(containerd.store.fds().len(), 2);
        drop(connection);
        assert!(containerd.store.fds().is_empty());
    }

    #[tokio::test]
    async fn a_connection_has_an_end_after_its_last_stream() {
        let containerd = Containerd::new();
        let (mut connection, _peer) = containerd.connect().await;
        connection.head.stream = u32::MAX - 2;
        connection.begin(CallId(1, 1, 1), &request(1)).unwrap();
        connection.end(true).unwrap();
        assert!(connection.begin(CallId(1, 1, 2), &request(1)).is_err());
    }

    #[tokio::test]
    async fn what_is_no_event_connection_is_not_kept() {
        let containerd = Containerd::new();
        let (connection, peer) = containerd.connect().await;
        connection.file.write_all_at(&[0xff; 64], 0).unwrap();
        let mut kept = containerd.store.fds();
        let (_, adopted) = EventConnections::adopt(containerd.store.clone(), &mut kept);
        assert!(adopted.is_empty() && containerd.store.fds().is_empty());
        drop(peer);
    }
}
