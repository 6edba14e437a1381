//! The journal's copy of output: nobody waits for it, and what it misses is counted.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};
use tokio::io::unix::AsyncFd;

use super::journal::Lines;
use super::pipe::{Bridge, Scratch};
use super::rate::RateLimit;

/// What the pipe of an [`Aside`] may hold: as much as the default rate limit lets pass in lines of 100 bytes. The pipe
/// has the usual 64 KiB until it is full for the first time.
pub(super) const CAPACITY: i32 = 1 << 20;

/// The journal's copy of output, by way of a pipe: what the pipe has no room for is dropped and counted.
#[derive(Debug)]
pub struct Aside {
    pipe: Bridge,
    lines: Lines,
    limit: Arc<RateLimit>,
}

impl Aside {
    /// `lines` gets what comes out of the pipe, as far as the limit allows.
    pub fn new(pipe: Bridge, lines: Lines, limit: Arc<RateLimit>) -> Self {
        Self { pipe, lines, limit }
    }

    /// The way into the pipe, the way out of it, and what gets the bytes that come out.
    pub(super) fn split(self) -> (Diverter, AsyncFd<OwnedFd>, Lines) {
        (Diverter::new(self.pipe.writer, self.limit), self.pipe.reader, self.lines)
    }
}

/// The way into the pipe of an [`Aside`].
#[derive(Debug)]
pub struct Diverter {
    pipe: AsyncFd<OwnedFd>,
    pub(super) limit: Arc<RateLimit>,
    /// Something was dropped since the last copy.
    pub(super) has_gap: bool,
    /// While there is output.
    scratch: Option<Scratch>,
}

/// What became of the output that is in a pipe.
pub(super) enum Diverted {
    /// So many bytes were copied, or counted as dropped; 0 at the end.
    Copied(usize),
    /// Nothing may be copied at the moment.
    Skipped,
}

impl Diverter {
    pub(super) fn new(pipe: AsyncFd<OwnedFd>, limit: Arc<RateLimit>) -> Self {
        Self { pipe, limit, has_gap: false, scratch: None }
    }

    /// Copies what is in a pipe, and leaves it there. EAGAIN: there is nothing.
    ///
    /// The copy goes through a buffer: tee(2) into the pipe would take one of the pipe's 16 places for each write of the
    /// container, however short the write is.
    pub(super) async fn divert(&mut self, from: &AsyncFd<OwnedFd>) -> Result<Diverted, Errno> {
        if !self.is_open() && (self.limit.is_exhausted() || !self.opens_after_a_turn().await) {
            self.scratch = None;
            return Ok(Diverted::Skipped);
        }
        let mut scratch = match self.scratch.take() {
            Some(scratch) => scratch,
            None => Scratch::new()?,
        };
        let length = scratch.look(from)?;
        if length > 0 {
            self.write(&scratch.buffer[..length]).await;
            self.scratch = Some(scratch);
        }
        Ok(Diverted::Copied(length))
    }

    /// The journal's side runs in the same task: it gets one turn to empty the pipe, and nobody waits for more.
    async fn opens_after_a_turn(&mut self) -> bool {
        tokio::task::yield_now().await;
        self.is_open()
    }

    /// Copies output that was read.
    pub(super) async fn write(&mut self, bytes: &[u8]) {
        let mut written = 0;
        if self.is_open() {
            written = self.put(bytes);
            if written < bytes.len() {
                tokio::task::yield_now().await;
                written += self.put(&bytes[written..]);
            }
        }
        if written < bytes.len() {
            self.has_gap = true;
            self.limit.drop_bytes(bytes.len() - written);
        }
    }

    /// Puts as much into the pipe as it takes; the pipe grows when it is full.
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

    /// Whether anything may be copied now. What comes after a gap begins with a new line: the journal must not show
    /// two halves of different lines as one.
    fn is_open(&mut self) -> bool {
        self.has_gap |= self.limit.is_exhausted();
        if self.has_gap && !self.limit.is_exhausted() {
            self.has_gap = nix::unistd::write(&self.pipe, b"\n") != Ok(1);
        }
        !self.has_gap
    }
}
