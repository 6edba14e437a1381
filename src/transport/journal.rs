//! The request journal: what a connection must keep when the daemon ends, that is, requests that were read and not
//! answered, and responses that were not sent.
//!
//! A journal is a memfd that is kept together with its connection. SIGKILL ends a process between two system calls, or at
//! the end of one, so the counters of the kernel are exact:
//!
//! - The daemon peeks at bytes in the socket, journals them, and then removes them from the socket. The socket's peek
//!   offset (`SO_PEEK_OFF`, socket(7)) shows how many of the journaled bytes were removed.
//! - The daemon journals a response whole, and sends it with sendfile(2). The file's position, which the kernel advances
//!   while sending, shows how much was sent.
//!
//! So no byte is lost, read twice or sent twice, wherever the process ends. A head lies within one page: it is written
//! whole or not at all.

mod head;

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;

use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, fallocate};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::sendfile::sendfile;
use ttrpc::Code;

use crate::fault::{self, Point};
use crate::sys;

use super::budget::{Budget, Share};
use super::frame::{Assembler, Frame, HEADER, SKIPPED, TYPE, TooLong};
use super::weight::weigh;

use head::{Head, VERSION};

pub use head::is_journal;

/// Overwrites the type of a request that is answered. No frame has this type.
const ANSWERED: u8 = 0;

const PAGE: u64 = 4096;
/// The position of the incoming bytes.
const IN_BASE: u64 = PAGE;
/// Beyond this position, the incoming bytes that are still needed are moved to the front.
const IN_LIMIT: u64 = 256 << 20;
/// How many bytes and how many requests may be unanswered on one connection. Further requests get an error. Well below
/// [`IN_LIMIT`], so that everything fits at the front.
const OPEN_BYTES: u64 = 64 << 20;
const OPEN_COUNT: usize = 8192;
/// How many bytes of the log are read at once.
const PIECE: u64 = 1 << 20;
/// The position of the outgoing bytes.
const OUT_BASE: u64 = 1 << 30;
/// How many bytes that are not needed any more are kept before their memory is freed.
const SLACK: u64 = 64 << 10;

const NO_ROOM: &str =
    "the unanswered requests on all connections of the runtime's daemon need too much memory";

/// What can go wrong with a journal.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The memory can't be read or written.
    #[error("can't use the request journal of a connection: {0}")]
    Io(#[from] io::Error),
    /// The kept descriptor is not a journal.
    #[error("the descriptor kept with a connection is not a request journal")]
    Malformed,
    /// The journal was written by a newer version of this program.
    #[error("the request journal of a connection has version {found}, this program reads up to {VERSION}")]
    Newer {
        /// The version of its layout.
        found: u32,
    },
}

impl From<Errno> for Error {
    fn from(errno: Errno) -> Self {
        Self::Io(errno.into())
    }
}

/// The journal of one connection.
#[derive(Debug)]
pub struct Journal {
    file: File,
    head: Head,
    assembler: Assembler,
    /// The unanswered requests, by stream.
    open: BTreeMap<u32, Open>,
    /// The total length of the unanswered requests.
    open_bytes: u64,
    /// What this connection uses of the budget of all connections.
    share: Share,
    /// The warning about many unanswered requests was logged.
    is_warned: bool,
    /// Error responses to requests that are refused.
    refusals: Vec<Refusal>,
    out_end: u64,
    out_sent: u64,
    /// The pages of sent responses are freed up to this position.
    out_freed: u64,
}

/// An unanswered request.
#[derive(Clone, Copy, Debug)]
struct Open {
    /// Its position in the log.
    at: u64,
    length: u64,
    weight: u64,
}

/// The error response to a request that is refused.
#[derive(Debug)]
struct Refusal {
    answer: Frame,
    /// The position of the request in the log.
    at: u64,
    /// Overwrites the request's type once it is answered, so that it is not served.
    mark: u8,
}

impl Refusal {
    /// The response of containerd's own ttrpc to a frame that is too long.
    fn too_long(at: u64, refused: TooLong) -> Self {
        let answer = Frame::refusal(refused.stream, Code::RESOURCE_EXHAUSTED, refused.to_string());
        Self { answer, at, mark: SKIPPED }
    }

    /// The response to a frame that is skipped because there is no room for all of it.
    fn no_room(at: u64, stream: u32) -> Self {
        let answer = Frame::refusal(stream, Code::RESOURCE_EXHAUSTED, NO_ROOM.to_owned());
        Self { answer, at, mark: SKIPPED }
    }
}

/// A journal of an earlier daemon.
#[derive(Debug)]
pub struct Found {
    /// The journal, ready for use.
    pub journal: Journal,
    /// The unanswered requests, in the order in which they arrived.
    pub unanswered: Vec<Frame>,
    /// The bytes that were journaled last may still be in the socket.
    pub in_socket: bool,
}

impl Journal {
    /// Makes an empty journal.
    ///
    /// # Errors
    /// [`Error::Io`]
    pub fn new(budget: &Budget) -> Result<Self, Error> {
        let file = File::from(memfd_create("shim-connection", MFdFlags::MFD_CLOEXEC)?);
        let journal = Self::over(file, budget);
        // Skipped bytes are not written, but must be readable.
        journal.file.set_len(OUT_BASE)?;
        journal.head.write_both(&journal.file, 0, 0)?;
        (&journal.file).seek(SeekFrom::Start(OUT_BASE))?;
        Ok(journal)
    }

    fn over(file: File, budget: &Budget) -> Self {
        Self {
            file,
            head: Head::default(),
            assembler: Assembler::default(),
            open: BTreeMap::new(),
            open_bytes: 0,
            share: budget.share(),
            is_warned: false,
            refusals: Vec::new(),
            out_end: 0,
            out_sent: 0,
            out_freed: 0,
        }
    }

    /// Reads the journal of an earlier daemon. Requests for which there is no room are refused.
    ///
    /// # Errors
    /// The descriptor is not a journal, or has a newer version.
    pub fn adopt(kept: OwnedFd, budget: &Budget) -> Result<Found, Error> {
        let mut journal = Self::over(File::from(kept), budget);
        let (head, out_end, last) = head::read(&journal.file)?;
        if journal.file.metadata()?.len() < OUT_BASE {
            journal.file.set_len(OUT_BASE)?;
        }
        (journal.head, journal.out_end) = (head, out_end);
        let (mut unanswered, mut end) = (Vec::new(), head.start);
        while end < head.end {
            let mut piece = vec![0; usize::try_from(PIECE.min(head.end - end)).unwrap_or_default()];
            journal.file.read_exact_at(&mut piece, IN_BASE + end)?;
            let requests = journal.assemble(end, &piece, last)?.into_iter();
            unanswered.extend(requests.filter(Frame::is_request));
            end += piece.len() as u64;
        }
        journal.limit_incomplete(last)?;
        let position = (&journal.file).stream_position()?;
        journal.out_sent = match position.checked_sub(OUT_BASE) {
            Some(sent) if sent <= out_end => sent,
            // The daemon ended while it emptied the outgoing side, after it had sent everything.
            Some(_) => (&journal.file).seek(SeekFrom::Start(OUT_BASE + out_end))? - OUT_BASE,
            None => return Err(Error::Malformed),
        };
        let in_socket = head.end > head.settled;
        Ok(Found { journal, unanswered, in_socket })
    }

    /// Records that everything journaled was removed from the socket. Must be called before the next peek.
    ///
    /// # Errors
    /// [`Error::Io`]
    pub fn settle(&mut self) -> Result<(), Error> {
        if self.head.settled != self.head.end {
            self.head.settled = self.head.end;
            self.head.write(&self.file)?;
        }
        Ok(())
    }

    /// Journals bytes that were peeked. Returns the frames that are complete now and must be served.
    ///
    /// # Errors
    /// The journal can't be written.
    pub fn note(&mut self, bytes: &[u8]) -> Result<Vec<Frame>, Error> {
        let end = self.head.end;
        if !self.assembler.skips(bytes.len()) {
            self.file.write_all_at(bytes, IN_BASE + end)?;
        }
        self.head.end += bytes.len() as u64;
        self.head.write(&self.file)?;
        let served = self.assemble(end, bytes, None)?;
        self.limit_incomplete(None)?;
        Ok(served)
    }

    /// Assembles frames from a piece of the log that begins at `end`, up to which the log is assembled already. Returns the
    /// frames that are complete now and must be served. `last` is the stream of the last response of an earlier daemon: it may
    /// have ended between the response and the mark of the request, which is marked now, as the next response takes the place of
    /// the last one.
    fn assemble(&mut self, end: u64, piece: &[u8], last: Option<u32>) -> Result<Vec<Frame>, Error> {
        let begun = end - self.assembler.pending();
        let mut served = Vec::new();
        let frames = self.assembler.push(piece);
        self.share.set_incomplete(0);
        for (at, frame) in frames {
            let at = begun + at;
            if !frame.is_request() {
                served.push(frame);
            } else if Some(frame.stream()) == last {
                self.mark(at, ANSWERED)?;
            } else if let Err(reason) = self.open(at, &frame) {
                let answer = Frame::refusal(frame.stream(), Code::RESOURCE_EXHAUSTED, reason);
                self.refusals.push(Refusal { answer, at, mark: ANSWERED });
            } else {
                served.push(frame);
            }
        }
        for (at, refused) in self.assembler.take_refused() {
            self.refuse_later(Refusal::too_long(begun + at, refused), last)?;
        }
        Ok(served)
    }

    /// Refuses the request that is incomplete at the end of the log, if there is no room for it or if an earlier daemon
    /// refused it: the rest of it is skipped.
    fn limit_incomplete(&mut self, last: Option<u32>) -> Result<(), Error> {
        let Some((stream, kept)) = self.assembler.incomplete() else {
            return Ok(());
        };
        if Some(stream) == last || !self.share.set_incomplete(kept) {
            self.assembler.give_up();
            self.refuse_later(Refusal::no_room(self.head.end - kept, stream), last)?;
        }
        Ok(())
    }

    /// Refuses a request once [`Self::refuse`] is called, unless an earlier daemon has answered it.
    fn refuse_later(&mut self, refusal: Refusal, last: Option<u32>) -> Result<(), Error> {
        if Some(refusal.answer.stream()) == last {
            return self.mark(refusal.at, refusal.mark);
        }
        self.refusals.push(refusal);
        Ok(())
    }

    /// Overwrites the type of a frame in the log.
    fn mark(&self, at: u64, mark: u8) -> Result<(), Error> {
        Ok(self.file.write_all_at(&[mark], IN_BASE + at + TYPE)?)
    }

    /// Adds a request to the unanswered ones. Otherwise the reason why it is refused.
    fn open(&mut self, at: u64, frame: &Frame) -> Result<(), String> {
        let weight = weigh(frame).map_err(|error| error.to_string())?;
        let stream = frame.stream();
        if self.open.contains_key(&stream) {
            // The earlier request would not count any longer.
            return Err(format!("the request on stream {stream} is not answered yet"));
        }
        if !self.has_room_for(frame) {
            return Err(format!("there are {} unanswered requests on this connection", self.open.len()));
        }
        if !self.share.add(weight) {
            return Err(NO_ROOM.to_owned());
        }
        let length = frame.bytes.len() as u64;
        self.open.insert(stream, Open { at, length, weight });
        self.open_bytes += length;
        Ok(())
    }

    fn has_room_for(&mut self, frame: &Frame) -> bool {
        let bytes = self.open_bytes + frame.bytes.len() as u64;
        let is_many = self.open.len() * 5 > OPEN_COUNT * 4 || bytes * 5 > OPEN_BYTES * 4;
        if is_many && !std::mem::replace(&mut self.is_warned, is_many) {
            let count = self.open.len();
            tracing::warn!(
                "a client has {count} unanswered requests ({bytes} bytes) on one connection: from {OPEN_COUNT} requests or {OPEN_BYTES} bytes on, further requests are refused"
            );
        }
        bytes <= OPEN_BYTES && self.open.len() < OPEN_COUNT
    }

    /// Answers the refused requests with an error, and drops them. Must be called when everything journaled was removed
    /// from the socket.
    ///
    /// # Errors
    /// [`Error::Io`]
    pub fn refuse(&mut self, socket: BorrowedFd<'_>) -> Result<(), Error> {
        for Refusal { answer, at, mark } in std::mem::take(&mut self.refusals) {
            tracing::warn!("refused a request: {}", answer.reason());
            self.note_response(socket, &answer)?;
            self.mark(at, mark)?;
        }
        self.compact_if_worthwhile()
    }

    /// Journals a response, which is sent from then on even if the daemon ends, and marks its request as answered.
    /// `socket`: the socket over which the response will be sent. Must be called when everything journaled was removed
    /// from it.
    ///
    /// # Errors
    /// [`Error::Io`]. The connection can't be used any longer.
    pub fn respond(&mut self, socket: BorrowedFd<'_>, response: &Frame) -> Result<(), Error> {
        let stream = response.stream();
        // The write of the response empties the log of requests, too.
        let emptied = self.is_last_open(stream).then(|| std::mem::take(&mut self.head));
        self.note_response(socket, response)?;
        fault::point(Point::ConnectionAnswered);
        let Some(Open { at, length, .. }) = self.answered(stream) else {
            return Ok(());
        };
        if let Some(old) = emptied {
            return self.release(IN_BASE, old.start, old.end);
        }
        debug_assert!(length > TYPE);
        self.mark(at, ANSWERED)?;
        self.compact_if_worthwhile()
    }

    /// True if nothing else in the log than the request on this stream is needed.
    fn is_last_open(&self, stream: u32) -> bool {
        self.open.len() == 1 && self.open.contains_key(&stream) && self.assembler.pending() == 0
    }

    /// Must be called when everything journaled was removed from the socket.
    fn note_response(&mut self, socket: BorrowedFd<'_>, response: &Frame) -> Result<(), Error> {
        let length = response.bytes.len() as u64;
        self.free_sent(socket, length)?;
        self.file.write_all_at(&response.bytes, OUT_BASE + self.out_end)?;
        self.out_end += length;
        self.head.settled = self.head.end;
        self.head.write_both(&self.file, self.out_end, response.stream())
    }

    /// The number of unsent bytes.
    pub fn unsent(&self) -> u64 {
        self.out_end - self.out_sent
    }

    /// Sends as much as the socket accepts.
    ///
    /// # Errors
    /// `EAGAIN`: the socket is full. Any other error: the connection is broken.
    pub fn send(&mut self, socket: BorrowedFd<'_>) -> Result<(), Errno> {
        send(socket, &self.file, &mut self.out_sent, self.out_end)
    }

    /// The descriptor to keep.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    /// Removes a request from the unanswered ones.
    fn answered(&mut self, stream: u32) -> Option<Open> {
        let request = self.open.remove(&stream)?;
        self.open_bytes -= request.length;
        self.share.remove(request.weight);
        self.is_warned &= !self.open.is_empty();
        Some(request)
    }

    /// Compacts the log if most of it is not needed any more.
    fn compact_if_worthwhile(&mut self) -> Result<(), Error> {
        let is_little = self.head.end - self.head.start < 2 * (self.open_bytes + self.tail()) + SLACK;
        if is_little { Ok(()) } else { self.compact() }
    }

    /// The length of an incomplete frame in the log.
    fn tail(&self) -> u64 {
        if self.assembler.skips(1) { HEADER as u64 } else { self.assembler.pending() }
    }

    /// Moves the parts of the log that are still needed together. Everything journaled must be removed from the socket.
    fn compact(&mut self) -> Result<(), Error> {
        let old = self.head;
        let front = old.end > IN_LIMIT && self.open_bytes + self.tail() <= old.start / PAGE * PAGE;
        let start = if front { 0 } else { old.end.next_multiple_of(PAGE) };
        let mut places = BTreeMap::new();
        let mut end = start;
        for (stream, open) in &self.open {
            self.copy(open.at, open.length, end)?;
            places.insert(*stream, Open { at: end, ..*open });
            end += open.length;
        }
        let pending = self.assembler.pending();
        match self.assembler.shorten() {
            Some(header) => {
                self.file.write_all_at(&header, IN_BASE + end)?;
                end += HEADER as u64;
            }
            None => {
                self.copy(old.end - pending, pending, end)?;
                end += pending;
            }
        }
        self.head = Head { start, end, settled: end };
        self.head.write(&self.file)?;
        self.open = places;
        self.release(IN_BASE, old.start, old.end)
    }

    fn copy(&self, from: u64, length: u64, to: u64) -> Result<(), Error> {
        let mut bytes = vec![0; usize::try_from(length).map_err(|_| Error::Malformed)?];
        self.file.read_exact_at(&mut bytes, IN_BASE + from)?;
        Ok(self.file.write_all_at(&bytes, IN_BASE + to)?)
    }

    /// Frees the memory of responses that the peer has read. Until then the socket uses the pages of a sent response, as
    /// sendfile does not copy. Starts at the front again once the peer has read everything. Does nothing while the first page
    /// has room for the next response, of this length.
    fn free_sent(&mut self, socket: BorrowedFd<'_>, length: u64) -> Result<(), Error> {
        if self.out_end == 0 || self.out_end + length <= PAGE {
            return Ok(());
        }
        // Includes the kernel's overhead, so it is an upper bound of the unread bytes.
        let unread = sys::unread_by_peer(&socket)? as u64;
        if self.unsent() > 0 || unread > 0 {
            let read = self.out_sent.saturating_sub(unread) / PAGE * PAGE;
            if read >= self.out_freed + SLACK {
                self.release(OUT_BASE, self.out_freed, read)?;
                self.out_freed = read;
            }
            return Ok(());
        }
        let end = std::mem::take(&mut self.out_end);
        // The end is written before the position changes: a position beyond the end then shows an interrupted change.
        head::write_out_end(&self.file, self.out_end)?;
        (self.out_sent, self.out_freed) = (0, 0);
        (&self.file).seek(SeekFrom::Start(OUT_BASE))?;
        self.release(OUT_BASE, 0, end)
    }

    /// Frees the pages between two positions, if there is more than one.
    fn release(&self, base: u64, start: u64, end: u64) -> Result<(), Error> {
        let (start, end) = (start / PAGE * PAGE, end.next_multiple_of(PAGE));
        if end - start <= PAGE {
            return Ok(());
        }
        let range = |position: u64| i64::try_from(position).map_err(|_| Error::Malformed);
        let flags = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        Ok(fallocate(&self.file, flags, range(base + start)?, range(end - start)?)?)
    }
}

/// Sends from the position of a file until `sent` is `end`, or until the socket accepts no more.
///
/// # Errors
/// As [`Journal::send`].
pub(super) fn send(socket: BorrowedFd<'_>, file: &File, sent: &mut u64, end: u64) -> Result<(), Errno> {
    while *sent < end {
        let length = usize::try_from(end - *sent).unwrap_or(usize::MAX);
        match sendfile(socket, file, None, length) {
            Ok(0) => return Err(Errno::EIO),
            Ok(more) => *sent += more as u64,
            Err(Errno::EINTR) => {}
            Err(errno) => return Err(errno),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests;
