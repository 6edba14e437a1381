//! The console socket, over which the OCI runtime sends the master side of a container's terminal.
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

use crate::path_error::io_error;

use super::fifo::Error;

/// A console socket that waits for its only connection. Its path is removed on drop.
#[derive(Debug)]
pub struct Console {
    listener: UnixListener,
    path: PathBuf,
}

impl Console {
    /// Listens on `path`. Creates its directory, accessible for root only.
    ///
    /// # Errors
    /// [`Error::Io`]
    pub fn listen(path: &Path) -> Result<Self, Error> {
        if let Some(parent) = path.parent() {
            let made = fs::DirBuilder::new().recursive(true).mode(0o700).create(parent);
            made.map_err(io_error("create", parent))?;
        }
        // Removes the socket of an earlier daemon.
        let _ = fs::remove_file(path);
        let listener = UnixListener::bind(path).map_err(io_error("listen on", path))?;
        Ok(Self { listener, path: path.to_owned() })
    }

    /// Adopts the socket of an earlier daemon. The OCI runtime may be connected already.
    pub fn adopt(listener: OwnedFd, path: &Path) -> Self {
        Self { listener: listener.into(), path: path.to_owned() }
    }

    /// The descriptor to keep. It contains a terminal that was sent and not received yet.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.listener.as_fd()
    }

    /// Waits for the terminal's master side. Blocks.
    ///
    /// # Errors
    /// [`Error::Io`], with `TimedOut` after `limit`.
    pub fn receive(self, limit: Duration) -> Result<OwnedFd, Error> {
        let received = || -> io::Result<OwnedFd> {
            wait(&self.listener, limit)?;
            let (stream, _) = self.listener.accept()?;
            wait(&stream, limit)?;
            terminal(crate::sys::receive_fds(&stream)?)
        };
        Ok(received().map_err(io_error("receive a terminal on", &self.path))?)
    }
}

impl Drop for Console {
    fn drop(&mut self) {
        // It is no error if it was removed already.
        let _ = fs::remove_file(&self.path);
    }
}

/// Checks that the received descriptor is the master side of a terminal: a rootfs without `/dev` can make the OCI runtime
/// open another file.
fn terminal(mut received: Vec<OwnedFd>) -> io::Result<OwnedFd> {
    match (received.pop(), received.pop()) {
        (Some(master), None) if crate::sys::is_terminal_master(&master) => Ok(master),
        (Some(_), None) => Err(io::Error::other("the OCI runtime sent something other than a terminal")),
        (None, _) => Err(io::Error::other("the OCI runtime sent no terminal")),
        (Some(_), Some(_)) => Err(io::Error::other("the OCI runtime sent more than one descriptor")),
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
    use nix::fcntl::OFlag;
    use nix::pty::{posix_openpt, ptsname_r};
    use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
    use std::io::{IoSlice, Write};
    use std::os::fd::AsRawFd;
    use std::os::unix::net::UnixStream;

    fn send(path: &Path, fds: &[std::os::fd::RawFd]) {
        let runtime = UnixStream::connect(path).unwrap();
        let (name, rights) = ([IoSlice::new(b"/dev/ptmx")], [ControlMessage::ScmRights(fds)]);
        sendmsg::<()>(runtime.as_raw_fd(), &name, &rights, MsgFlags::empty(), None).unwrap();
    }

    #[test]
    fn the_terminal_that_is_sent_arrives_and_the_socket_goes() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("made/console");
        let console = Console::listen(&path).unwrap();
        let flags = OFlag::O_RDWR | OFlag::O_NOCTTY;
        let master = posix_openpt(flags).unwrap();
        let name = ptsname_r(&master).unwrap();
        send(&path, &[master.as_raw_fd()]);
        drop(master);
        let received = console.receive(Duration::from_secs(5)).unwrap();
        assert_eq!((ptsname_r_of(&received), path.exists()), (name, false));
    }

    fn ptsname_r_of(master: &OwnedFd) -> String {
        let link = std::fs::read_link(format!("/proc/self/fd/{}", master.as_raw_fd())).unwrap();
        assert_eq!(link.file_name().and_then(|name| name.to_str()), Some("ptmx"));
        crate::sys::terminal_number(master).map(|number| format!("/dev/pts/{number}")).unwrap()
    }

    #[test]
    fn what_is_no_terminal_or_not_alone_is_refused() {
        let null = std::fs::File::open("/dev/null").unwrap();
        let master = posix_openpt(OFlag::O_RDWR | OFlag::O_NOCTTY).unwrap();
        for (fds, reason) in [
            (vec![null.as_raw_fd()], "something other"),
            (vec![master.as_raw_fd(), null.as_raw_fd()], "more than one"),
        ] {
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join("made/console");
            let console = Console::listen(&path).unwrap();
            send(&path, &fds);
            let error = console.receive(Duration::from_secs(5)).unwrap_err();
            assert!(error.to_string().contains(reason), "{error}");
        }
    }

    #[test]
    fn a_terminal_that_does_not_come_is_given_up() {
        let dir = tempfile::tempdir().unwrap();
        let console = Console::listen(&dir.path().join("console")).unwrap();
        let error = console.receive(Duration::from_millis(10)).unwrap_err();
        assert!(error.to_string().contains("receive a terminal"), "{error}");
    }

    #[test]
    fn a_message_without_a_descriptor_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("made/console");
        let console = Console::listen(&path).unwrap();
        UnixStream::connect(&path).unwrap().write_all(b"hello").unwrap();
        assert!(console.receive(Duration::from_secs(5)).is_err());
    }
}
