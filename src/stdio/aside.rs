//! The journal's copy of output. Nothing waits for it, and dropped output is counted.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};
use tokio::io::unix::AsyncFd;

use crate::sys;

use super::journal::Lines;
use super::journal_policy::JournalPolicy;
use super::pipe::{CHUNK, ONLY_EMPTY, Scratch};

/// The largest size of the pipe of an [`Aside`]: as much as the default rate limit allows in lines of 100 bytes. The pipe
/// has the default 64 KiB until it is full for the first time. It counts for no user that others need ([`sys::quota`]).
pub(super) const CAPACITY: i32 = 1 << 20;

/// The journal's copy of output, which goes through a pipe. Output that does not fit into the pipe is dropped and counted.
#[derive(Debug)]
pub struct Aside {
    reader: AsyncFd<OwnedFd>,
    writer: OwnedFd,
    lines: Lines,
    policy: Arc<JournalPolicy>,
}

impl Aside {
    /// Makes a copy: `lines` gets the output from the pipe with these ends, up to the limit.
    ///
    /// # Errors
    /// The reading end can't be watched. Needs the async runtime.
    pub fn new(
        (reader, writer): (OwnedFd, OwnedFd),
        lines: Lines,
        policy: Arc<JournalPolicy>,
    ) -> io::Result<Self> {
        Ok(Self { reader: sys::watch(reader)?, writer, lines, policy })
    }

    /// The writing side, the reading end of the pipe, and the journal's lines.
    pub(super) fn split(self) -> (Box<Diverter>, AsyncFd<OwnedFd>, Lines) {
        (Box::new(Diverter::new(self.writer, self.policy)), self.reader, self.lines)
    }
}

/// Writes to the pipe of an [`Aside`].
#[derive(Debug)]
pub struct Diverter {
    /// Nobody waits for room in it.
    pipe: OwnedFd,
    pub(super) policy: Arc<JournalPolicy>,
    /// True if output was dropped since the last copy.
    pub(super) has_gap: bool,
    /// Allocated while there is output.
    scratch: Option<Scratch>,
}

/// The result of copying output from a pipe.
pub(super) enum Diverted {
    /// This number of bytes was copied, or counted as dropped. 0 at the end.
    Copied(usize),
    /// Nothing may be copied at the moment.
    Skipped,
}

impl Diverter {
    pub(super) fn new(pipe: OwnedFd, policy: Arc<JournalPolicy>) -> Self {
        Self { pipe, policy, has_gap: false, scratch: None }
    }

    /// Copies up to `most` bytes of a pipe, and leaves them there. EAGAIN: the pipe is empty.
    ///
    /// The copy goes through a buffer: tee(2) into the pipe would use one of its 16 buffers for each write of the container,
    /// however short the write is.
    pub(super) async fn divert(&mut self, from: &AsyncFd<OwnedFd>, most: usize) -> Result<Diverted, Errno> {
        if !self.is_open() && (self.policy.is_exhausted() || !self.opens_after_a_turn().await) {
            self.scratch = None;
            return Ok(Diverted::Skipped);
        }
        let mut scratch = match self.scratch.take() {
            Some(scratch) => scratch,
            None => match Scratch::new(CHUNK) {
                // Nothing waits for the journal's copy.
                Err(errno) if sys::is_exhausted(errno) => return Ok(Diverted::Skipped),
                made => made?,
            },
        };
        let length = match scratch.look(from, most) {
            // splice(2) removes the empty buffers.
            Err(ONLY_EMPTY) => return Ok(Diverted::Skipped),
            found => found?,
        };
        if length > 0 {
            self.copy(&scratch.buffer[..length]).await;
            self.scratch = Some(scratch);
        }
        Ok(Diverted::Copied(length))
    }

    /// Lets the journal's side, which runs in the same task, empty the pipe once. Does not wait longer.
    async fn opens_after_a_turn(&mut self) -> bool {
        tokio::task::yield_now().await;
        self.is_open()
    }

    /// Copies output that was read, or counts it as dropped.
    pub(super) async fn write(&mut self, bytes: &[u8]) {
        if self.is_open() {
            self.copy(bytes).await;
        } else {
            self.policy.drop_bytes(bytes.len());
        }
    }

    /// Copies output to the open pipe. What does not fit is counted as dropped.
    async fn copy(&mut self, bytes: &[u8]) {
        let mut written = self.put(bytes);
        if written < bytes.len() {
            tokio::task::yield_now().await;
            written += self.put(&bytes[written..]);
        }
        if written < bytes.len() {
            self.has_gap = true;
            self.policy.drop_bytes(bytes.len() - written);
        }
    }

    /// Writes as much as fits into the pipe, which grows when it is full.
    fn put(&self, bytes: &[u8]) -> usize {
        let written = nix::unistd::write(&self.pipe, bytes).unwrap_or(0);
        if written == bytes.len()
            || !matches!(fcntl(&self.pipe, FcntlArg::F_GETPIPE_SZ), Ok(size) if size < CAPACITY)
        {
            return written;
        }
        match fcntl(&self.pipe, FcntlArg::F_SETPIPE_SZ(CAPACITY)) {
            Ok(_) => written + nix::unistd::write(&self.pipe, &bytes[written..]).unwrap_or(0),
            Err(_) => written,
        }
    }

    /// True if output may be copied now. After a gap, the copy starts with a new line: the journal must not join parts of
    /// different lines.
    fn is_open(&mut self) -> bool {
        self.has_gap |= self.policy.is_exhausted();
        if self.has_gap && !self.policy.is_exhausted() {
            self.has_gap = nix::unistd::write(&self.pipe, b"\n") != Ok(1);
        }
        !self.has_gap
    }
}
