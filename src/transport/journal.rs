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

use crate::fault::{self, Point};
use crate::sys;

use super::frame::{Assembler, Frame, TooLong};

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
/// Where outgoing bytes are noted.
const OUT_BASE: u64 = 1 << 30;
/// So much that is not needed any more is left standing.
const SLACK: u64 = 64 << 10;

/// What can go wrong with a journal.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The memory can't be read or written.
    #[error("the journal of a connection: {0}")]
    Io(#[from] io::Error),
    /// What was kept is no journal.
    #[error("what was kept with a connection is no journal of requests")]
    Malformed,
    /// It belongs to a newer version of this program.
    #[error("the journal of a connection has version {found}, this program reads up to {VERSION}")]
    Newer {
        /// Its version.
        found: u32,
    },
    /// The client does not speak the protocol.
    #[error(transparent)]
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
    out_end: u64,
    out_sent: u64,
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
            out_end: 0,
            out_sent: 0,
        };
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
        let mut noted = vec![0; usize::try_from(head.end - head.start).map_err(|_| Error::Malformed)?];
        file.read_exact_at(&mut noted, IN_BASE + head.start)?;
        let mut assembler = Assembler::default();
        let (mut open, mut unanswered, mut at) = (BTreeMap::new(), Vec::new(), head.start);
        for frame in assembler.push(&noted)? {
            let length = frame.bytes.len() as u64;
            // Its response was noted, and the daemon ended before it could say so here.
            if frame.is_request() && Some(frame.stream()) != last {
                open.insert(frame.stream(), (at, length));
                unanswered.push(frame);
            }
            at += length;
        }
        let position = (&file).stream_position()?;
        let out_sent = match position.checked_sub(OUT_BASE) {
            Some(sent) if sent <= out_end => sent,
            // It was being emptied: everything in it is sent.
            Some(_) => (&file).seek(SeekFrom::Start(OUT_BASE + out_end))? - OUT_BASE,
            None => return Err(Error::Malformed),
        };
        let in_socket = head.end > head.settled;
        let journal = Self { file, head, assembler, open, out_end, out_sent };
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

    /// Notes bytes that have been looked at. Returns the frames that are whole now.
    ///
    /// # Errors
    /// Nothing more can be noted, or the client does not speak the protocol.
    pub fn note(&mut self, bytes: &[u8]) -> Result<Vec<Frame>, Error> {
        let mut at = self.head.end - self.assembler.pending() as u64;
        self.file.write_all_at(bytes, IN_BASE + self.head.end)?;
        self.head.end += bytes.len() as u64;
        self.write_head()?;
        let frames = self.assembler.push(bytes)?;
        for frame in &frames {
            let length = frame.bytes.len() as u64;
            if frame.is_request() {
                self.open.insert(frame.stream(), (at, length));
            }
            at += length;
        }
        Ok(frames)
    }

    /// Notes a response, which from now on is sent whatever happens; its request needs none any more.
    /// The socket is the one that it will be sent on.
    ///
    /// # Errors
    /// [`Error::Io`]; nothing is noted then.
    pub fn respond(&mut self, socket: BorrowedFd<'_>, response: &Frame) -> Result<(), Error> {
        self.empty_sent(socket)?;
        self.file.write_all_at(&response.bytes, OUT_BASE + self.out_end)?;
        self.out_end += response.bytes.len() as u64;
        self.write_out_head(response.stream())?;
        fault::point(Point::ConnectionAnswered);
        self.answered(response.stream())
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
        if self.open.is_empty() && self.assembler.pending() == 0 {
            let old = std::mem::take(&mut self.head);
            self.write_head()?;
            return self.release(IN_BASE, old.start, old.end);
        }
        const TYPE: u64 = 8;
        debug_assert!(length > TYPE);
        self.file.write_all_at(&[0], IN_BASE + at + TYPE)?;
        self.compact()
    }

    /// Moves what is still needed together, when most is not.
    fn compact(&mut self) -> Result<(), Error> {
        let needed: u64 = self.open.values().map(|(_, length)| length).sum();
        let pending = self.assembler.pending() as u64;
        if self.head.end - self.head.start < 2 * (needed + pending) + SLACK {
            return Ok(());
        }
        let old = self.head;
        let front = old.end > IN_LIMIT && needed + pending <= old.start / PAGE * PAGE;
        let start = if front { 0 } else { old.end.next_multiple_of(PAGE) };
        let mut places = BTreeMap::new();
        let mut end = start;
        for (stream, (at, length)) in &self.open {
            self.copy(*at, *length, end)?;
            places.insert(*stream, (end, *length));
            end += length;
        }
        self.copy(old.end - pending, pending, end)?;
        end += pending;
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

    /// Begins at the front again when everything is sent and read: the pages of a sent response are
    /// the socket's until then (sendfile does not copy).
    fn empty_sent(&mut self, socket: BorrowedFd<'_>) -> Result<(), Error> {
        if self.unsent() > 0 || self.out_end == 0 || sys::unread_by_peer(&socket)? > 0 {
            return Ok(());
        }
        let end = std::mem::take(&mut self.out_end);
        // This before the position: one that lies behind the end is known to be from before.
        self.file.write_all_at(&self.out_end.to_le_bytes(), OUT_HEAD)?;
        self.out_sent = 0;
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
