//! The client's side of a process's stdio: a scratch directory, FIFOs in it, and readers with a time limit.

use std::fs::{self, File};
use std::io::{self, ErrorKind, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, channel};
use std::thread;
use std::time::Duration;

use nix::libc::{EIO, O_NONBLOCK};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::stat::Mode;

use super::node::unique;
use super::process;
use super::spec::Spec;
use super::task::Io;
use super::wait;

/// A scratch directory on the guest's disk, removed on drop.
pub struct Scratch {
    pub path: PathBuf,
}

impl Scratch {
    pub fn new(name: &str) -> Scratch {
        // Not below /run, which may be mounted noexec: some tests put programs there.
        let path = Path::new("/var/tmp/e2e").join(unique(name));
        fs::create_dir_all(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        Scratch { path }
    }

    pub fn join(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }

    /// The path of a file in the directory, as text.
    pub fn text(&self, name: &str) -> String {
        self.join(name).to_string_lossy().into_owned()
    }

    pub fn as_str(&self) -> &str {
        self.path.to_str().expect("a scratch path is plain text")
    }

    /// The text of a file; empty if the file does not exist yet.
    pub fn read(&self, name: &str) -> String {
        fs::read_to_string(self.join(name)).unwrap_or_default()
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        // An error does no harm: names are unique, and the guest is thrown away after the run.
        let _ = fs::remove_dir_all(&self.path);
    }
}

/// FIFOs as containerd's clients make them.
pub struct Fifos {
    scratch: Scratch,
}

impl Fifos {
    pub fn new(name: &str) -> Fifos {
        let scratch = Scratch::new(name);
        for name in ["stdin", "stdout", "stderr"] {
            make_fifo(&scratch.join(name));
        }
        Fifos { scratch }
    }

    /// stdin, stdout and stderr.
    pub fn io(&self) -> Io {
        Io { stdin: self.scratch.text("stdin"), ..self.output() }
    }

    /// stdout and stderr.
    pub fn output(&self) -> Io {
        Io { stdout: self.scratch.text("stdout"), stderr: self.scratch.text("stderr"), ..Io::default() }
    }

    /// stdin and stdout, for a terminal.
    pub fn terminal(&self) -> Io {
        Io { stderr: String::new(), ..self.io() }
    }

    /// Open the readers before the task is created: a shim may wait for them.
    pub fn stdout(&self) -> Reader {
        Reader::open(&self.scratch.join("stdout"))
    }

    pub fn stderr(&self) -> Reader {
        Reader::open(&self.scratch.join("stderr"))
    }

    /// Opens the client's end of stdin, as clients do: before there is a reader.
    pub fn open_stdin(&self) -> Opening {
        open_to_write(self.scratch.join("stdin"))
    }

    /// The client's end of stdin. Waits until the FIFO has a reader.
    pub fn stdin(&self) -> File {
        self.open_stdin().file()
    }

    /// As a client that has closed its end of stdin for good.
    pub fn remove_stdin(&self) {
        fs::remove_file(self.scratch.join("stdin")).expect("remove the FIFO");
    }
}

/// Blocks a script in a container until the test releases it: a FIFO that the script reads.
pub struct Gate {
    scratch: Scratch,
}

impl Gate {
    /// The command of a script that waits for [`Gate::open`]. It reads to the end of the file: otherwise a quick script could
    /// come to its next gate while the test has not closed this one yet, and would pass both.
    pub const WAIT: &str = "while read go; do :; done </gate/fifo";

    pub fn new() -> Gate {
        let scratch = Scratch::new("gate");
        make_fifo(&scratch.join("fifo"));
        Gate { scratch }
    }

    /// The spec with the gate mounted where [`Gate::WAIT`] looks for it.
    pub fn bind(&self, spec: Spec) -> Spec {
        spec.bind(self.scratch.as_str(), "/gate", &["ro"])
    }

    /// Releases one process, once it waits.
    pub fn open(&self) {
        feed(&open_to_write(self.scratch.join("fifo")).file(), b"go\n");
    }
}

/// A FIFO that waits for its reader.
pub struct Opening {
    file: Receiver<io::Result<File>>,
}

impl Opening {
    pub fn file(self) -> File {
        let opened = self.file.recv_timeout(wait::LIMIT);
        opened.expect("nobody has opened the FIFO to read").expect("open a FIFO to write")
    }
}

fn make_fifo(path: &Path) {
    nix::unistd::mkfifo(path, Mode::S_IRWXU).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
}

/// Opens a FIFO in the background, where the open waits for a reader. Returns once the open waits, so that it can't
/// miss a reader that closes the FIFO at once.
fn open_to_write(path: PathBuf) -> Opening {
    let ((sender, file), (named, thread)) = (channel(), channel());
    thread::spawn(move || {
        named.send(nix::unistd::gettid()).expect("the test waits for it");
        sender.send(File::options().write(true).open(path))
    });
    let thread = u32::try_from(thread.recv().expect("a thread has a number").as_raw()).expect("a number");
    wait::until_true("the client opens the FIFO", || {
        process::status(thread, "State").is_none_or(|state| state.starts_with('S'))
    });
    Opening { file }
}

/// Writes all bytes; panics with a clear message if there is no reader.
pub fn feed(mut file: &File, bytes: &[u8]) {
    file.write_all(bytes).expect("write to the container's stdin");
}

/// One stream of output, read without blocking.
pub struct Reader {
    file: File,
    path: PathBuf,
}

impl Reader {
    pub fn open(path: &Path) -> Reader {
        let file = File::options().read(true).custom_flags(O_NONBLOCK).open(path);
        Reader::of(file.unwrap_or_else(|error| panic!("{}: {error}", path.display())), path)
    }

    /// Reads from an open file; `path` is its name in messages.
    pub fn of(file: File, path: impl Into<PathBuf>) -> Reader {
        Reader { file, path: path.into() }
    }

    /// Everything up to EOF.
    pub fn rest(&mut self) -> Vec<u8> {
        let (bytes, ended) = self.collect(|_| false);
        assert!(ended, "{}: no EOF in {:?}; {} bytes so far", self.path.display(), wait::LIMIT, bytes.len());
        bytes
    }

    pub fn text(&mut self) -> String {
        String::from_utf8_lossy(&self.rest()).into_owned()
    }

    /// Reads until `enough` is true; panics if EOF comes before that.
    pub fn until(&mut self, enough: impl Fn(&[u8]) -> bool) -> Vec<u8> {
        let (bytes, _) = self.collect(&enough);
        assert!(enough(&bytes), "{}: only {:?}", self.path.display(), String::from_utf8_lossy(&bytes));
        bytes
    }

    /// Whether the stream is at EOF now, with nothing left to read.
    pub fn is_at_end(&mut self) -> bool {
        self.ready(Duration::ZERO) && matches!(self.file.read(&mut [0; 1]), Ok(0))
    }

    fn collect(&mut self, enough: impl Fn(&[u8]) -> bool) -> (Vec<u8>, bool) {
        let mut bytes = Vec::new();
        if enough(&bytes) {
            return (bytes, false);
        }
        let ended = self.each(|piece| {
            bytes.extend_from_slice(piece);
            !enough(&bytes)
        });
        (bytes, ended)
    }

    /// Calls `wants_more` with each piece of output until it returns false. Returns true at EOF, and false if `wants_more` did,
    /// or if no output came for [`wait::LIMIT`].
    pub fn each(&mut self, mut wants_more: impl FnMut(&[u8]) -> bool) -> bool {
        let mut chunk = [0; 64 * 1024];
        while self.ready(wait::LIMIT) {
            match self.file.read(&mut chunk) {
                Ok(0) => return true,
                Ok(count) => {
                    if !wants_more(&chunk[..count]) {
                        return false;
                    }
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                // A pseudo-terminal whose other side is closed.
                Err(error) if error.raw_os_error() == Some(EIO) => return true,
                Err(error) => panic!("read {}: {error}", self.path.display()),
            }
        }
        false
    }

    /// Waits for bytes or a hang-up. A FIFO that never had a writer reports neither, so EOF is only seen after a writer
    /// has opened the FIFO, as by a client whose open waits for a writer.
    fn ready(&self, limit: Duration) -> bool {
        let mut fds = [PollFd::new(self.file.as_fd(), PollFlags::POLLIN)];
        let limit = PollTimeout::try_from(limit).unwrap_or(PollTimeout::MAX);
        poll(&mut fds, limit).expect("poll a FIFO") > 0
    }
}
