//! Whether the daemon serves calls.
//!
//! systemd holds the daemon's sockets, so a connection succeeds even if the daemon can't start: its unit fails each time, or its
//! recovery waits for a bus that is frozen. A call on this connection would wait without a limit. So `start` asks first.
//!
//! The daemon names itself in a symlink once it serves: its pid and when it started. While that process lives, `start` asks
//! nothing: the daemon would have to put each connection into systemd's descriptor store. A symlink needs no space on a full
//! tmpfs. After the end of the daemon it stays, and nobody believes it: no later process has the same pid and the same start.
//! A `start` in another pid namespace does not find the process, and asks.

use std::io::{self, Read, Write};
use std::os::unix::fs::symlink;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};
use std::{fs, process, thread};

use crate::sys;
use crate::sys::tree;
use crate::transport::frame::Frame;

/// The pause before the daemon is asked again, after it has ended or while too many others ask.
const PAUSE: Duration = Duration::from_millis(50);

/// Names this process as the daemon that serves.
///
/// # Errors
/// The symlink can't be made.
pub(super) fn announce(path: &Path) -> io::Result<()> {
    mark(path, process::id())
}

fn mark(path: &Path, pid: u32) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    symlink(name(pid).ok_or(io::ErrorKind::NotFound)?, path)
}

fn name(pid: u32) -> Option<String> {
    Some(format!("{pid}:{}", tree::started(pid)?))
}

/// True if the daemon that has named itself lives.
fn is_marked(path: &Path) -> bool {
    let Ok(found) = fs::read_link(path) else { return false };
    let found = found.to_string_lossy();
    let pid = found.split(':').next().and_then(|pid| pid.parse().ok());
    pid.is_some_and(|pid| name(pid).is_some_and(|name| name == *found) && !tree::first_thread_has_ended(pid))
}

/// The question whether the daemon serves. Earlier versions of the daemon answer it, too, and do not name themselves.
pub(super) struct Question<'p> {
    mark: &'p Path,
    socket: &'p Path,
    asked: Option<UnixStream>,
}

impl<'p> Question<'p> {
    pub(super) fn new(mark: &'p Path, socket: &'p Path) -> Self {
        Self { mark, socket, asked: None }
    }

    /// Waits until the daemon serves. False if it does not within `limit`; another call continues to wait.
    ///
    /// # Errors
    /// Nobody listens on the socket.
    pub(super) fn is_answered(&mut self, limit: Duration) -> io::Result<bool> {
        let begun = Instant::now();
        loop {
            if is_marked(self.mark) {
                return Ok(true);
            }
            let left = limit.saturating_sub(begun.elapsed());
            if left.is_zero() {
                return Ok(false);
            }
            if let Some(asked) = &mut self.asked {
                asked.set_read_timeout(Some(left))?;
                // The answer is an error, as there is no such service.
                match asked.read(&mut [0]) {
                    Ok(1..) => return Ok(true),
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(false),
                    // The daemon or its socket was stopped.
                    Ok(0) | Err(_) => self.asked = None,
                }
                pause(left);
                continue;
            }
            match self.ask() {
                Ok(asked) => self.asked = Some(asked),
                Err(error)
                    if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::BrokenPipe) =>
                {
                    pause(left);
                }
                Err(error) => return Err(error),
            }
        }
    }

    fn ask(&self) -> io::Result<UnixStream> {
        let mut stream = sys::connect_without_waiting(self.socket)?;
        stream.write_all(&question()?)?;
        stream.set_nonblocking(false)?;
        Ok(stream)
    }
}

#[expect(
    clippy::disallowed_methods,
    reason = "no event announces the next daemon, or that the queue has room"
)]
fn pause(most: Duration) {
    thread::sleep(PAUSE.min(most));
}

/// A request to a service that does not exist.
fn question() -> io::Result<Vec<u8>> {
    let request =
        ttrpc::Request { service: "serving".to_owned(), method: "Ask".to_owned(), ..Default::default() };
    let frame = Frame::of_request(1, &request);
    frame.map(|frame| frame.bytes).ok_or_else(|| io::Error::other("can't encode a request"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixListener;
    use std::process::{Command, Stdio};

    const SOON: Duration = Duration::from_millis(100);
    const LATE: Duration = Duration::from_secs(60);

    #[test]
    fn a_daemon_that_has_named_itself_serves_as_long_as_it_lives() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("serving");
        assert!(!is_marked(&path));
        let mut child = Command::new("cat").stdin(Stdio::piped()).spawn().unwrap();
        for _ in 0..2 {
            mark(&path, child.id()).unwrap();
            assert!(is_marked(&path));
        }
        assert!(Question::new(&path, &dir.path().join("absent")).is_answered(SOON).unwrap());
        let pid = child.id();
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(!is_marked(&path));
        // Another process has the pid.
        fs::remove_file(&path).unwrap();
        symlink(format!("{}:7", process::id()), &path).unwrap();
        assert!(!is_marked(&path));
        assert!(mark(&path, pid).is_err());
    }

    #[test]
    fn a_daemon_that_has_not_named_itself_is_asked() {
        let dir = tempfile::tempdir().unwrap();
        let (path, socket) = (dir.path().join("serving"), dir.path().join("socket"));
        let mut asking = Question::new(&path, &socket);
        assert_eq!(asking.is_answered(SOON).unwrap_err().kind(), io::ErrorKind::NotFound);
        // systemd listens, and no daemon accepts.
        let listener = UnixListener::bind(&socket).unwrap();
        assert!(!asking.is_answered(SOON).unwrap());
        let question = question().unwrap();
        let daemon = thread::spawn(move || {
            let asked = || {
                let (mut stream, _) = listener.accept().unwrap();
                let mut asked = vec![0; question.len()];
                stream.read_exact(&mut asked).unwrap();
                assert_eq!(asked, question);
                stream
            };
            // This daemon ends before it answers, and the next one is asked again.
            drop(asked());
            asked().write_all(b"no").unwrap();
        });
        assert!(asking.is_answered(LATE).unwrap());
        daemon.join().unwrap();
        // The socket was stopped.
        let mut asking = Question::new(&path, &socket);
        assert_eq!(asking.is_answered(LATE).unwrap_err().kind(), io::ErrorKind::ConnectionRefused);
    }

    #[test]
    fn a_daemon_that_too_many_others_ask_is_waited_for() {
        let dir = tempfile::tempdir().unwrap();
        let (path, socket) = (dir.path().join("serving"), dir.path().join("socket"));
        let listener = UnixListener::bind(&socket).unwrap();
        rustix::net::listen(&listener, 0).unwrap();
        let first = UnixStream::connect(&socket).unwrap();
        let mut asking = Question::new(&path, &socket);
        assert!(!asking.is_answered(SOON).unwrap());
        drop((first, listener.accept().unwrap()));
        let daemon = thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            // The end of the connection before the question is no answer.
            stream.read_exact(&mut [0]).unwrap();
            stream.write_all(b"no").unwrap();
        });
        assert!(asking.is_answered(LATE).unwrap());
        daemon.join().unwrap();
    }
}
