//! The console socket: where the OCI runtime hands over the other side of a container's terminal.
//!
//! The protocol is runc's (docs/terminals.md there, "detached with terminal"): the runtime connects
//! to a Unix socket, and sends one descriptor.

use std::fs;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::DirBuilderExt;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::fifo::{Error, error};

/// A console socket that waits for its one visitor. Its path goes with it.
#[derive(Debug)]
pub struct Console {
    listener: UnixListener,
    path: PathBuf,
}

impl Console {
    /// Listens at `path`; its directory is made, for root alone.
    ///
    /// # Errors
    /// [`Error::Io`]
    pub fn listen(path: &Path) -> Result<Self, Error> {
        if let Some(parent) = path.parent() {
            let made = fs::DirBuilder::new().recursive(true).mode(0o700).create(parent);
            made.map_err(error("create", parent))?;
        }
        // What a daemon before this one has left.
        let _ = fs::remove_file(path);
        let listener = UnixListener::bind(path).map_err(error("listen at", path))?;
        Ok(Self { listener, path: path.to_owned() })
    }

    /// Goes on listening where an earlier daemon has begun to: the visitor may be there already.
    pub fn adopt(listener: OwnedFd, path: &Path) -> Self {
        Self { listener: listener.into(), path: path.to_owned() }
    }

    /// For systemd to keep: a terminal that has been handed over and not received is in it.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.listener.as_fd()
    }

    /// The terminal's master side, as soon as it comes. Blocks.
    ///
    /// # Errors
    /// [`Error::Io`], with `TimedOut` if it does not come within `limit`.
    pub fn receive(self, limit: Duration) -> Result<OwnedFd, Error> {
        let received = || -> io::Result<OwnedFd> {
            wait(&self.listener, limit)?;
            let (stream, _) = self.listener.accept()?;
            wait(&stream, limit)?;
            crate::sys::receive_fd(&stream)?
                .ok_or_else(|| io::Error::other("no terminal came with the message"))
        };
        received().map_err(error("receive a terminal at", &self.path))
    }
}

impl Drop for Console {
    fn drop(&mut self) {
        // Gone already is what we want.
        let _ = fs::remove_file(&self.path);
    }
}

fn wait(fd: &impl AsFd, limit: Duration) -> io::Result<()> {
    let mut fds = [PollFd::new(fd.as_fd(), PollFlags::POLLIN)];
    let limit = PollTimeout::try_from(limit).unwrap_or(PollTimeout::MAX);
    match poll(&mut fds, limit)? {
        0 => Err(io::ErrorKind::TimedOut.into()),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
    use std::io::{IoSlice, Read, Write};
    use std::os::fd::AsRawFd;
    use std::os::unix::net::UnixStream;

    fn path(name: &str) -> PathBuf {
        std::env::temp_dir().join(format!("console-test-{}", std::process::id())).join(name)
    }

    #[test]
    fn the_descriptor_that_is_sent_arrives_and_the_socket_goes() {
        let path = path("ok");
        let console = Console::listen(&path).unwrap();
        let (mut here, there) = UnixStream::pair().unwrap();
        let runtime = UnixStream::connect(&path).unwrap();
        let fds = [there.as_raw_fd()];
        let (name, rights) = ([IoSlice::new(b"/dev/ptmx")], [ControlMessage::ScmRights(&fds)]);
        sendmsg::<()>(runtime.as_raw_fd(), &name, &rights, MsgFlags::empty(), None).unwrap();
        drop(there);
        let mut received = std::fs::File::from(console.receive(Duration::from_secs(5)).unwrap());
        received.write_all(b"x").unwrap();
        let mut byte = [0];
        here.read_exact(&mut byte).unwrap();
        assert_eq!((&byte, path.exists()), (b"x", false));
    }

    #[test]
    fn a_terminal_that_does_not_come_is_given_up() {
        let console = Console::listen(&path("none")).unwrap();
        let error = console.receive(Duration::from_millis(10)).unwrap_err();
        assert!(error.to_string().contains("receive a terminal"), "{error}");
    }

    #[test]
    fn a_message_without_a_descriptor_is_refused() {
        let path = path("empty");
        let console = Console::listen(&path).unwrap();
        UnixStream::connect(&path).unwrap().write_all(b"hello").unwrap();
        assert!(console.receive(Duration::from_secs(5)).is_err());
    }
}
