//! What a connection must not forget when the daemon ends: requests that were read and have no
//! response yet, and responses that are not sent yet.
//!
//! A journal is a memfd that systemd keeps together with the connection. SIGKILL ends a process
//! between two system calls, or at the end of one: what the kernel has counted by then is exact.
//!
//! - Bytes are looked at in the socket, noted here, and then taken off. How many of the noted bytes
//!   have been taken off the kernel knows: it is the socket's peek offset (`SO_PEEK_OFF`, socket(7)).
//! - A response is noted as a whole, and sent with sendfile(2). How much of it has been sent is the
//!   file's position, which the kernel advances with the sending.
//!
//! So no byte is lost, read twice or sent twice, wherever the process ends. Writes to a head are
//! within one page: they happen as a whole or not at all.

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

use super::frame::{Assembler, Frame, HEADER, SKIPPED, TYPE, TooLong};

const MAGIC: u32 = 0x5353_6431;
/// The version of the layout that is written. Read are this one and the one before.
const VERSION: u32 = 1;

const PAGE: u64 = 4096;
/// The head of the incoming side: magic, version, then `start`, `end` and `settled`.
const IN_HEAD: u64 = 0;
/// The head of the outgoing side: `end`, then the stream of the last response.
const OUT_HEAD: u64 = 64;
/// Where incoming bytes are noted.
const IN_BASE: u64 = PAGE;
/// Beyond this position the incoming bytes that are still needed move to the front again.
const IN_LIMIT: u64 = 256 << 20;
/// So much, in bytes and in number, may be unanswered on one connection; any further request is answered with an
/// error. Well below [`IN_LIMIT`]: what is kept can move to the front.
const OPEN_BYTES: u64 = 64 << 20;
const OPEN_COUNT: usize = 8192;
/// Where outgoing bytes are noted.
const OUT_BASE: u64 = 1 << 30;
/// So much that is not needed any more is left standing.
const SLACK: u64 = 64 << 10;

/// What can go wrong with a journal.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The memory can't be read or written.
    #[error("can't use the request journal of a connection: {0}")]
    Io(#[from] io::Error),
    /// What was kept is no journal.
    #[error("the descriptor kept with a connection is not a request journal")]
    Malformed,
    /// It belongs to a newer version of this program.
    #[error("the request journal of a connection has version {found}, this program reads up to {VERSION}")]
    Newer {
        /// Its version.
        found: u32,
    },
    /// A response is longer than the protocol allows.
    #[error("can't encode a response: {0}")]
    Frame(#[from] TooLong),
}

impl From<Errno> for Error {
    fn from(errno: Errno) -> Self {
        Self::Io(errno.into())
    }
}

/// A position in the incoming bytes: where the log of a connection begins and ends.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Head {
    start: u64,
    /// What is noted ends here.
    end: u64,
    /// What was known to be taken off the socket ended here.
    settled: u64,
}

/// The journal of one connection.
#[derive(Debug)]
pub struct Journal {
    file: File,
    head: Head,
    assembler: Assembler,
    /// Requests without a response: by stream, their place in the log.
    open: BTreeMap<u32, (u64, u64)>,
    /// The length of all of them.
    open_bytes: u64,
    /// That there are many was said.
    is_told: bool,
    /// Answers to requests that are not kept.
    refusals: Vec<Refusal>,
    out_end: u64,
    out_sent: u64,
    /// The pages of what was sent are given back up to here.
    out_freed: u64,
}

/// What a request is answered that is not kept.
#[derive(Debug)]
struct Refusal {
    answer: Frame,
    /// Where the request begins in the log.
    at: u64,
    /// What takes the place of its type, once it is answered: nobody serves it.
    mark: u8,
}

impl Refusal {
    /// As containerd's own ttrpc answers a frame that is too long.
    fn too_long(at: u64, refused: TooLong) -> Self {
        let answer = Frame::refusal(refused.stream, Code::RESOURCE_EXHAUSTED, refused.to_string());
        Self { answer, at, mark: SKIPPED }
    }
}

/// What an earlier daemon has left in a journal.
#[derive(Debug)]
pub struct Found {
    /// The journal, which goes on.
    pub journal: Journal,
    /// Requests that were read and have no response, in their order.
    pub unanswered: Vec<Frame>,
    /// The last thing that was noted may still be in the socket.
    pub in_socket: bool,
}

impl Journal {
    /// An empty one.
    ///
    /// # Errors
    /// [`Error::Io`]
    pub fn new() -> Result<Self, Error> {
        let file = File::from(memfd_create("shim-connection", MFdFlags::MFD_CLOEXEC)?);
        let journal = Self {
            file,
            head: Head::default(),
            assembler: Assembler::default(),
            open: BTreeMap::new(),
            open_bytes: 0,
            is_told: false,
            refusals: Vec::new(),
            out_end: 0,
            out_sent: 0,
            out_freed: 0,
        };
        // What is skipped is not written: it has to be readable all the same.
        journal.file.set_len(OUT_BASE)?;
        journal.write_head()?;
        journal.write_out_head(0)?;
        (&journal.file).seek(SeekFrom::Start(OUT_BASE))?;
        Ok(journal)
    }

    /// Takes over what an earlier daemon has left.
    ///
    /// # Errors
    /// It is no journal, or one of a newer version.
    pub fn adopt(kept: OwnedFd) -> Result<Found, Error> {
        let file = File::from(kept);
        let (head, out_end, last) = read_heads(&file)?;
        if file.metadata()?.len() < OUT_BASE {
            file.set_len(OUT_BASE)?;
        }
        let mut noted = vec![0; usize::try_from(head.end - head.start).map_err(|_| Error::Malformed)?];
        file.read_exact_at(&mut noted, IN_BASE + head.start)?;
        let mut assembler = Assembler::default();
        let (mut open, mut open_bytes, mut unanswered) = (BTreeMap::new(), 0, Vec::new());
        for (at, frame) in assembler.push(&noted) {
            // Its response was noted, and the daemon ended before it could say so here.
            if frame.is_request() && Some(frame.stream()) != last {
                let length = frame.bytes.len() as u64;
                open.insert(frame.stream(), (head.start + at, length));
                open_bytes += length;
                unanswered.push(frame);
            }
        }
        // Likewise one that was too long.
        let refused = assembler.take_refused().into_iter();
        let refused = refused.filter(|(_, refused)| Some(refused.stream) != last);
        let refusals = refused.map(|(at, refused)| Refusal::too_long(head.start + at, refused)).collect();
        let position = (&file).stream_position()?;
        let out_sent = match position.checked_sub(OUT_BASE) {
            Some(sent) if sent <= out_end => sent,
            // It was being emptied: everything in it is sent.
            Some(_) => (&file).seek(SeekFrom::Start(OUT_BASE + out_end))? - OUT_BASE,
            None => return Err(Error::Malformed),
        };
        let in_socket = head.end > head.settled;
        let (is_told, out_freed) = (false, 0);
        let journal =
            Self { file, head, assembler, open, open_bytes, is_told, refusals, out_end, out_sent, out_freed };
        Ok(Found { journal, unanswered, in_socket })
    }

    /// Everything that is noted has been taken off the socket: to be called before it is looked at
    /// again.
    ///
    /// # Errors
    /// [`Error::Io`]
    pub fn settle(&mut self) -> Result<(), Error> {
        if self.head.settled != self.head.end {
            self.head.settled = self.head.end;
            self.write_head()?;
        }
        Ok(())
    }

    /// Notes bytes that have been looked at. Returns the frames that are whole now and to be served.
    ///
    /// # Errors
    /// Nothing more can be noted.
    pub fn note(&mut self, bytes: &[u8]) -> Result<Vec<Frame>, Error> {
        let begun = self.head.end - self.assembler.pending();
        if !self.assembler.skips(bytes.len()) {
            self.file.write_all_at(bytes, IN_BASE + self.head.end)?;
        }
        self.head.end += bytes.len() as u64;
        self.write_head()?;
        let mut frames = Vec::new();
        for (at, frame) in self.assembler.push(bytes) {
            if frame.is_request() && !self.has_room_for(&frame) {
                let reason = format!("there are {} unanswered requests on this connection", self.open.len());
                let answer = Frame::refusal(frame.stream(), Code::RESOURCE_EXHAUSTED, reason);
                self.refusals.push(Refusal { answer, at: begun + at, mark: 0 });
                continue;
            }
            if frame.is_request() {
                let length = frame.bytes.len() as u64;
                let earlier = self.open.insert(frame.stream(), (begun + at, length));
                self.open_bytes += length - earlier.map_or(0, |(_, length)| length);
            }
            frames.push(frame);
        }
        let refused = self.assembler.take_refused().into_iter();
        self.refusals.extend(refused.map(|(at, refused)| Refusal::too_long(begun + at, refused)));
        Ok(frames)
    }

    fn has_room_for(&mut self, frame: &Frame) -> bool {
        let bytes = self.open_bytes + frame.bytes.len() as u64;
        let is_many = self.open.len() * 5 > OPEN_COUNT * 4 || bytes * 5 > OPEN_BYTES * 4;
        if is_many && !std::mem::replace(&mut self.is_told, is_many) {
            let count = self.open.len();
            tracing::warn!(
                "a client has {count} unanswered requests ({bytes} bytes) on one connection: from {OPEN_COUNT} requests or {OPEN_BYTES} bytes on, further requests are refused"
            );
        }
        bytes <= OPEN_BYTES && self.open.len() < OPEN_COUNT
    }

    /// Answers the requests that are not kept, and forgets them. To be called when everything that is noted has
    /// been taken off the socket.
    ///
    /// # Errors
    /// [`Error::Io`]
    pub fn refuse(&mut self, socket: BorrowedFd<'_>) -> Result<(), Error> {
        for Refusal { answer, at, mark } in std::mem::take(&mut self.refusals) {
            tracing::warn!("refused a request: {}", answer.reason());
            self.note_response(socket, &answer)?;
            self.file.write_all_at(&[mark], IN_BASE + at + TYPE)?;
        }
        self.compact_if_worthwhile()
    }

    /// Notes a response, which from now on is sent whatever happens; its request needs none any more.
    /// The socket is the one that it will be sent on.
    ///
    /// # Errors
    /// [`Error::Io`]; nothing is noted then.
    pub fn respond(&mut self, socket: BorrowedFd<'_>, response: &Frame) -> Result<(), Error> {
        self.note_response(socket, response)?;
        fault::point(Point::ConnectionAnswered);
        self.answered(response.stream())
    }

    fn note_response(&mut self, socket: BorrowedFd<'_>, response: &Frame) -> Result<(), Error> {
        self.free_sent(socket)?;
        self.file.write_all_at(&response.bytes, OUT_BASE + self.out_end)?;
        self.out_end += response.bytes.len() as u64;
        self.write_out_head(response.stream())
    }

    /// How much is noted and not sent, in bytes.
    pub fn unsent(&self) -> u64 {
        self.out_end - self.out_sent
    }

    /// Sends what it can.
    ///
    /// # Errors
    /// `EAGAIN`: the socket is full. Else the connection is broken.
    pub fn send(&mut self, socket: BorrowedFd<'_>) -> Result<(), Errno> {
        while self.unsent() > 0 {
            let length = usize::try_from(self.unsent()).unwrap_or(usize::MAX);
            match sendfile(socket, self.file.as_fd(), None, length) {
                Ok(0) => return Err(Errno::EIO),
                Ok(sent) => self.out_sent += sent as u64,
                Err(Errno::EINTR) => {}
                Err(errno) => return Err(errno),
            }
        }
        Ok(())
    }

    /// For systemd to keep.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    fn answered(&mut self, stream: u32) -> Result<(), Error> {
        let Some((at, length)) = self.open.remove(&stream) else {
            return Ok(());
        };
        self.open_bytes -= length;
        self.is_told &= !self.open.is_empty();
        if self.open.is_empty() && self.assembler.pending() == 0 {
            let old = std::mem::take(&mut self.head);
            self.write_head()?;
            return self.release(IN_BASE, old.start, old.end);
        }
        debug_assert!(length > TYPE);
        self.file.write_all_at(&[0], IN_BASE + at + TYPE)?;
        self.compact_if_worthwhile()
    }

    /// Moves what is still needed together when most is not.
    fn compact_if_worthwhile(&mut self) -> Result<(), Error> {
        let is_little = self.head.end - self.head.start < 2 * (self.open_bytes + self.tail()) + SLACK;
        if is_little { Ok(()) } else { self.compact() }
    }

    /// What has to be kept of a frame that is not whole.
    fn tail(&self) -> u64 {
        if self.assembler.skips(1) { HEADER as u64 } else { self.assembler.pending() }
    }

    /// Moves what is still needed together. Everything that is noted is off the socket by now.
    fn compact(&mut self) -> Result<(), Error> {
        let old = self.head;
        let front = old.end > IN_LIMIT && self.open_bytes + self.tail() <= old.start / PAGE * PAGE;
        let start = if front { 0 } else { old.end.next_multiple_of(PAGE) };
        let mut places = BTreeMap::new();
        let mut end = start;
        for (stream, (at, length)) in &self.open {
            self.copy(*at, *length, end)?;
            places.insert(*stream, (end, *length));
            end += length;
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
        self.write_head()?;
        self.open = places;
        self.release(IN_BASE, old.start, old.end)
    }

    fn copy(&self, from: u64, length: u64, to: u64) -> Result<(), Error> {
        let mut bytes = vec![0; usize::try_from(length).map_err(|_| Error::Malformed)?];
        self.file.read_exact_at(&mut bytes, IN_BASE + from)?;
        Ok(self.file.write_all_at(&bytes, IN_BASE + to)?)
    }

    /// Gives back the memory of responses that the other side has read: the pages of a sent response are the
    /// socket's until then (sendfile does not copy). Begins at the front again when everything is read.
    fn free_sent(&mut self, socket: BorrowedFd<'_>) -> Result<(), Error> {
        if self.out_end == 0 {
            return Ok(());
        }
        // Counted with the kernel's overhead: at most so much of what was sent is not read.
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
        // This before the position: one that lies behind the end is known to be from before.
        self.file.write_all_at(&self.out_end.to_le_bytes(), OUT_HEAD)?;
        (self.out_sent, self.out_freed) = (0, 0);
        (&self.file).seek(SeekFrom::Start(OUT_BASE))?;
        self.release(OUT_BASE, 0, end)
    }

    /// Gives memory back: the pages that lie between two positions, if there are many.
    fn release(&self, base: u64, start: u64, end: u64) -> Result<(), Error> {
        let (start, end) = (start / PAGE * PAGE, end.next_multiple_of(PAGE));
        if end - start <= PAGE {
            return Ok(());
        }
        let range = |position: u64| i64::try_from(position).map_err(|_| Error::Malformed);
        let flags = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        Ok(fallocate(&self.file, flags, range(base + start)?, range(end - start)?)?)
    }

    fn write_head(&self) -> Result<(), Error> {
        let mut bytes = [0; 32];
        bytes[..4].copy_from_slice(&MAGIC.to_le_bytes());
        bytes[4..8].copy_from_slice(&VERSION.to_le_bytes());
        bytes[8..16].copy_from_slice(&self.head.start.to_le_bytes());
        bytes[16..24].copy_from_slice(&self.head.end.to_le_bytes());
        bytes[24..].copy_from_slice(&self.head.settled.to_le_bytes());
        Ok(self.file.write_all_at(&bytes, IN_HEAD)?)
    }

    fn write_out_head(&self, stream: u32) -> Result<(), Error> {
        let mut bytes = [0; 12];
        bytes[..8].copy_from_slice(&self.out_end.to_le_bytes());
        bytes[8..].copy_from_slice(&stream.to_le_bytes());
        Ok(self.file.write_all_at(&bytes, OUT_HEAD)?)
    }
}

/// True if a kept descriptor looks like a journal.
pub fn is_journal(fd: &OwnedFd) -> bool {
    fd.try_clone().is_ok_and(|fd| read_u32(&File::from(fd), IN_HEAD).is_ok_and(|magic| magic == MAGIC))
}

/// The incoming head, where the outgoing bytes end, and the stream of the last response.
fn read_heads(file: &File) -> Result<(Head, u64, Option<u32>), Error> {
    let version = read_u32(file, IN_HEAD + 4)?;
    if read_u32(file, IN_HEAD)? != MAGIC {
        return Err(Error::Malformed);
    }
    if version > VERSION {
        return Err(Error::Newer { found: version });
    }
    let position = |at| read_u64(file, at);
    let head = Head { start: position(8)?, end: position(16)?, settled: position(24)? };
    let out_end = position(OUT_HEAD)?;
    let sane = head.start <= head.settled && head.settled <= head.end && head.end < OUT_BASE - IN_BASE;
    let last = read_u32(file, OUT_HEAD + 8)?;
    if sane { Ok((head, out_end, (last != 0).then_some(last))) } else { Err(Error::Malformed) }
}

fn read_u32(file: &File, at: u64) -> Result<u32, Error> {
    let mut bytes = [0; 4];
    file.read_exact_at(&mut bytes, at)?;
    Ok(u32::from_le_bytes(bytes))
}

fn read_u64(file: &File, at: u64) -> Result<u64, Error> {
    let mut bytes = [0; 8];
    file.read_exact_at(&mut bytes, at)?;
    Ok(u64::from_le_bytes(bytes))
}
