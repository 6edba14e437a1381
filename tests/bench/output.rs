//! The output of a process: FIFOs that the client makes and opens before the process starts, and reads.

use std::fs::File;
use std::io::{ErrorKind, Read};
use std::os::fd::AsFd;
use std::os::unix::fs::OpenOptionsExt;
use std::time::{Duration, Instant};

use nix::libc::O_NONBLOCK;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::common::container::Io;
use super::common::stdio::Fifos;
use super::common::wait;

pub struct Output {
    pub terminal: bool,
    fifos: Fifos,
    stdout: File,
    _stderr: File,
}

/// The bytes of a stream up to its end.
pub struct Drained {
    pub bytes: u64,
    /// From the first byte to the last.
    pub elapsed: Duration,
}

impl Output {
    pub fn new(terminal: bool) -> Output {
        let fifos = Fifos::new("bench");
        let Io { stdout, stderr, .. } = fifos.output();
        Output { terminal, fifos, stdout: open(&stdout), _stderr: open(&stderr) }
    }

    /// stdout and stderr; for a terminal, stdout alone.
    pub fn io(&self) -> Io {
        let output = self.fifos.output();
        if self.terminal { Io { stdout: output.stdout, ..Io::default() } } else { output }
    }

    /// Reads stdout to its end.
    pub fn drain(&mut self) -> Drained {
        let mut chunk = vec![0; 64 * 1024];
        let (mut bytes, mut first, mut last) = (0, None, None);
        loop {
            match self.stdout.read(&mut chunk) {
                // A FIFO that no writer has opened yet looks the same as one at its end.
                Ok(0) if bytes > 0 || self.has_ended() => break,
                Ok(0) => self.wait_until_readable(),
                Ok(count) => {
                    let now = Instant::now();
                    first.get_or_insert(now);
                    last = Some(now);
                    bytes += count as u64;
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => self.wait_until_readable(),
                Err(error) => panic!("read stdout: {error}"),
            }
        }
        let elapsed = first.zip(last).map(|(first, last)| last - first).unwrap_or_default();
        Drained { bytes, elapsed }
    }

    fn has_ended(&self) -> bool {
        self.poll(PollTimeout::ZERO)
    }

    fn wait_until_readable(&self) {
        let limit = PollTimeout::try_from(wait::LIMIT).expect("a limit of seconds");
        assert!(self.poll(limit), "no output and no end of it in {:?}", wait::LIMIT);
    }

    /// True if there are bytes or an end. A FIFO that never had a writer has neither.
    fn poll(&self, limit: PollTimeout) -> bool {
        let mut fds = [PollFd::new(self.stdout.as_fd(), PollFlags::POLLIN)];
        poll(&mut fds, limit).expect("poll a FIFO") > 0
    }
}

/// Opens without blocking, because there is no writer yet.
fn open(path: &str) -> File {
    let file = File::options().read(true).custom_flags(O_NONBLOCK).open(path);
    file.unwrap_or_else(|error| panic!("{path}: {error}"))
}
