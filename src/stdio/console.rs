//! The console socket, over which the OCI runtime sends the master side of a container's terminal.
//!
//! The protocol is runc's (docs/terminals.md there, "detached with terminal"): the runtime connects
//! to a Unix socket, and sends one descriptor.

use std::fs;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::poll::{PollFd, PollFlags};

use crate::fault::{self, Point};
use crate::files;
use crate::path_error::io_error;
use crate::sys;

use super::fifo::Error;

/// A console socket that waits for its only connection. Its path is removed on drop.
#[derive(Debug)]
pub struct Console {
    listener: UnixListener,
    /// The connection, if an earlier daemon has accepted it.
    accepted: Option<UnixStream>,
    path: PathBuf,
}

impl Console {
    /// Listens on `path`. Creates its directory, accessible for root only.
    ///
    /// # Errors
    /// [`Error::Io`]
    pub fn listen(path: &Path) -> Result<Self, Error> {
        if let Some(parent) = path.parent() {
            files::make_dir(parent, 0o700).map_err(io_error("create", parent))?;
        }
        // Removes the socket of an earlier daemon.
        let _ = fs::remove_file(path);
        let listener = UnixListener::bind(path).map_err(io_error("listen on", path))?;
        Ok(Self { listener, accepted: None, path: path.to_owned() })
    }

    /// Adopts the socket of an earlier daemon, and the connection that it had accepted. The OCI runtime may be connected
    /// already.
    pub fn adopt(listener: OwnedFd, accepted: Option<OwnedFd>, path: &Path) -> Self {
        Self { listener: listener.into(), accepted: accepted.map(UnixStream::from), path: path.to_owned() }
    }

    /// The descriptor to keep. It contains a terminal that was sent and not received yet.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.listener.as_fd()
    }

    /// Waits for the terminal's master side. Blocks. `keep` gets the connection, and then the terminal: the terminal stays
    /// in the connection until it is kept itself, so the end of the daemon loses neither.
    ///
    /// # Errors
    /// [`Error::Io`], with `TimedOut` after `limit`.
    pub fn receive(mut self, limit: Duration, keep: impl Fn(BorrowedFd<'_>)) -> Result<OwnedFd, Error> {
        let accepted = self.accepted.take();
        let received = || -> io::Result<OwnedFd> {
            let stream = match accepted {
                Some(stream) => stream,
                None => {
                    wait(&self.listener, limit)?;
                    let (stream, _) = self.listener.accept()?;
                    fault::point(Point::ConsoleAccepted);
                    keep(stream.as_fd());
                    fault::point(Point::ConsoleKept);
                    stream
                }
            };
            wait(&stream, limit)?;
            let (_, fds) = sys::peek_fds(&stream)?;
            let master = terminal(fds)?;
            fault::point(Point::ConsoleReceived);
            keep(master.as_fd());
            fault::point(Point::ConsoleStored);
            // The connection is kept, too: with the message, the terminal would stay open after its session.
            sys::discard_message(&stream)?;
            Ok(master)
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
        (Some(master), None) if sys::is_terminal_master(&master) => Ok(master),
        (Some(_), None) => Err(io::Error::other("the OCI runtime sent something other than a terminal")),
        (None, _) => Err(io::Error::other("the OCI runtime sent no terminal")),
        (Some(_), Some(_)) => Err(io::Error::other("the OCI runtime sent more than one descriptor")),
    }
}

fn wait(fd: &impl AsFd, limit: Duration) -> io::Result<()> {
    let mut fds = [PollFd::new(fd.as_fd(), PollFlags::POLLIN)];
    if sys::poll(&mut fds, limit)? { Ok(()) } else { Err(io::ErrorKind::TimedOut.into()) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::fcntl::OFlag;
    use nix::pty::{posix_openpt, ptsname_r};
    use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
    use std::io::{IoSlice, Write};
    use std::os::fd::AsRawFd;

    fn send(path: &Path, fds: &[std::os::fd::RawFd]) {
        let runtime = UnixStream::connect(path).unwrap();
        let (name, rights) = ([IoSlice::new(b"/dev/ptmx")], [ControlMessage::ScmRights(fds)]);
        sendmsg::<()>(runtime.as_raw_fd(), &name, &rights, MsgFlags::empty(), None).unwrap();
    }

    #[test]
    fn a_terminal_is_received_and_its_socket_removed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("made/console");
        let console = Console::listen(&path).unwrap();
        let flags = OFlag::O_RDWR | OFlag::O_NOCTTY;
        let master = posix_openpt(flags).unwrap();
        let name = ptsname_r(&master).unwrap();
        send(&path, &[master.as_raw_fd()]);
        drop(master);
        let received = console.receive(Duration::from_secs(5), |_| {}).unwrap();
        assert_eq!((ptsname_r_of(&received), path.exists()), (name, false));
    }

    #[test]
    fn the_terminal_stays_in_the_connection_until_it_is_kept() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("console");
        let console = Console::listen(&path).unwrap();
        let master = posix_openpt(OFlag::O_RDWR | OFlag::O_NOCTTY).unwrap();
        send(&path, &[master.as_raw_fd()]);
        // The first daemon ends while it keeps the terminal.
        let listener = console.listener.try_clone().unwrap();
        let (kept, copy) =
            (std::cell::RefCell::new(Vec::new()), |fd: BorrowedFd<'_>| fd.try_clone_to_owned());
        let limit = Duration::from_secs(5);
        let ended = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            console.receive(limit, |fd| {
                assert!(!sys::is_terminal_master(&fd), "the end");
                kept.borrow_mut().push(copy(fd).unwrap());
            })
        }));
        assert!(ended.is_err());
        // The next one has what was kept.
        let connection = kept.into_inner().pop();
        assert!(connection.is_some());
        let received = Console::adopt(listener.into(), connection, &path).receive(limit, |_| {}).unwrap();
        assert!(sys::is_terminal_master(&received));
    }

    fn ptsname_r_of(master: &OwnedFd) -> String {
        let link = std::fs::read_link(format!("/proc/self/fd/{}", master.as_raw_fd())).unwrap();
        assert_eq!(link.file_name().and_then(|name| name.to_str()), Some("ptmx"));
        crate::sys::terminal_number(master).map(|number| format!("/dev/pts/{number}")).unwrap()
    }

    #[test]
    fn a_descriptor_that_is_no_terminal_or_not_alone_is_refused() {
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
            let error = console.receive(Duration::from_secs(5), |_| {}).unwrap_err();
            assert!(error.to_string().contains(reason), "{error}");
        }
    }

    #[test]
    fn waiting_for_a_terminal_ends_after_a_limit() {
        let dir = tempfile::tempdir().unwrap();
        let console = Console::listen(&dir.path().join("console")).unwrap();
        let error = console.receive(Duration::from_millis(10), |_| {}).unwrap_err();
        assert!(error.to_string().contains("receive a terminal"), "{error}");
    }

    #[test]
    fn a_message_without_a_descriptor_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("made/console");
        let console = Console::listen(&path).unwrap();
        UnixStream::connect(&path).unwrap().write_all(b"hello").unwrap();
        assert!(console.receive(Duration::from_secs(5), |_| {}).is_err());
    }
}
