//! Notifications of the daemon about itself to systemd (sd_notify(3)): ready, stopping, watchdog.

use std::io::{self, IoSlice};
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use libsystemd::daemon;
use nix::errno::Errno;
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};

use crate::sys;

/// How long one message may wait until systemd reads it. systemd reads no messages while it reloads or executes itself
/// again.
pub(super) const SEND_LIMIT: Duration = Duration::from_secs(4);

/// The pause before a message is sent again that did not fit into systemd's socket.
pub(super) const RETRY: Duration = Duration::from_millis(100);

/// The interval of systemd's watchdog. `None` if it does not watch this process.
pub fn watchdog_interval() -> Option<Duration> {
    daemon::watchdog_enabled(false)
}

/// The longest time between two uses of a thread for blocking work. tokio ends a thread that is idle for longer.
pub const THREAD_INTERVAL: Duration = Duration::from_secs(5);

/// A connection to systemd's notify socket. `None` if systemd did not start this process.
///
/// # Errors
/// The socket can't be reached.
pub fn connect() -> io::Result<Option<UnixDatagram>> {
    let Some(path) = std::env::var_os("NOTIFY_SOCKET") else {
        return Ok(None);
    };
    let address = match path.as_encoded_bytes().strip_prefix(b"@") {
        Some(name) => SocketAddr::from_abstract_name(name)?,
        None => SocketAddr::from_pathname(&path)?,
    };
    let socket = UnixDatagram::unbound()?;
    socket.connect_addr(&address)?;
    Ok(Some(socket))
}

/// Sends messages to the systemd that started this process.
#[derive(Debug, Default)]
pub struct Notifier {
    /// `None` if systemd did not start this process.
    socket: Option<UnixDatagram>,
    /// systemd has not read the last message in time.
    is_late: AtomicBool,
}

impl Notifier {
    /// Connects to the socket whose path systemd passed to this process.
    ///
    /// # Errors
    /// The socket can't be reached.
    pub fn new() -> io::Result<Self> {
        connect()?.map_or(Ok(Self::default()), |socket| Self::over(socket, SEND_LIMIT))
    }

    fn over(socket: UnixDatagram, limit: Duration) -> io::Result<Self> {
        socket.set_write_timeout(Some(limit))?;
        Ok(Self { socket: Some(socket), ..Self::default() })
    }

    /// Sends its messages to this socket.
    #[cfg(test)]
    pub(super) fn to(socket: UnixDatagram) -> Self {
        Self { socket: Some(socket), ..Self::default() }
    }

    /// Whether systemd started this process.
    pub fn has_systemd(&self) -> bool {
        self.socket.is_some()
    }

    /// Tells systemd that calls are served from now on. Returns once systemd has room for the message: the job that starts the
    /// daemon waits for it without a limit.
    pub async fn ready(&self, status: &str) {
        let message = format!("READY=1\nSTATUS={status}");
        self.tell_once_there_is_room(&message).await;
    }

    /// Tells systemd that the daemon is about to end.
    pub fn stopping(&self) {
        self.tell("STOPPING=1");
    }

    /// Sends `WATCHDOG=1` twice per watchdog interval, as long as the async runtime runs. Also keeps one thread for
    /// blocking work in existence, with a watchdog or without one: the thread returns unused memory. Never returns.
    pub async fn keep_alive(&self) {
        let watchdog = watchdog_interval();
        let interval = watchdog.map_or(THREAD_INTERVAL, |limit| (limit / 2).clamp(RETRY, THREAD_INTERVAL));
        let mut ticks = tokio::time::interval(interval);
        loop {
            ticks.tick().await;
            // If tokio could not start a thread, queued blocking work waits until another call starts one: this call.
            // tokio panics if it has no thread and can't start one, so this call keeps the last thread from being idle for
            // too long.
            drop(tokio::task::spawn_blocking(sys::return_unused_memory));
            if watchdog.is_none() {
                continue;
            }
            // The send blocks neither of the two threads. systemd's watchdog does not run while systemd reads nothing.
            self.tell_once_there_is_room("WATCHDOG=1").await;
        }
    }

    /// Sends a message without blocking a thread.
    async fn tell_once_there_is_room(&self, message: &str) {
        loop {
            match self.send_at_once(message, &[]) {
                Ok(()) => return,
                Err(Errno::EAGAIN) => tokio::time::sleep(RETRY).await,
                Err(error) => {
                    tracing::warn!(%error, "can't notify systemd: {error}");
                    return;
                }
            }
        }
    }

    fn tell(&self, message: &str) {
        if let Err(error) = self.send(message, &[], MsgFlags::empty()) {
            tracing::warn!(%error, "can't notify systemd: {error}");
        }
    }

    /// Sends a message with descriptors. No effect outside of systemd.
    pub(super) fn send(&self, message: &str, fds: &[BorrowedFd<'_>], flags: MsgFlags) -> Result<(), Errno> {
        let Some(socket) = &self.socket else {
            return Ok(());
        };
        let fds: Vec<RawFd> = fds.iter().map(AsRawFd::as_raw_fd).collect();
        let rights = [ControlMessage::ScmRights(&fds)];
        let rights = if fds.is_empty() { &[] } else { rights.as_slice() };
        let parts = [IoSlice::new(message.as_bytes())];
        let flags = flags | MsgFlags::MSG_NOSIGNAL;
        loop {
            // A send with a time limit is interrupted by every signal that its thread handles.
            match sendmsg::<()>(socket.as_raw_fd(), &parts, rights, flags, None) {
                Err(Errno::EINTR) => {}
                sent => return sent.map(drop),
            }
        }
    }

    /// As [`Self::send`], without waiting.
    ///
    /// # Errors
    /// `EAGAIN`: systemd has no room for the message now.
    pub(super) fn send_at_once(&self, message: &str, fds: &[BorrowedFd<'_>]) -> Result<(), Errno> {
        self.send(message, fds, MsgFlags::MSG_DONTWAIT)
    }

    /// As [`Self::send`], for messages of which a call sends several: only the first one that systemd does not read in time
    /// waits for it. The next ones fail at once, until systemd reads again.
    pub(super) fn send_one_of_many(&self, message: &str, fds: &[BorrowedFd<'_>]) -> Result<(), Errno> {
        let is_late = self.is_late.load(Ordering::Relaxed);
        let sent = self.send(message, fds, if is_late { MsgFlags::MSG_DONTWAIT } else { MsgFlags::empty() });
        self.is_late.store(sent == Err(Errno::EAGAIN), Ordering::Relaxed);
        sent
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsFd;
    use std::time::Instant;

    #[test]
    fn a_systemd_that_reads_nothing_delays_a_message_for_a_limited_time() {
        let (socket, systemd) = UnixDatagram::pair().unwrap();
        let limit = Duration::from_millis(50);
        let notifier = Notifier::over(socket, limit).unwrap();
        let begun = Instant::now();
        let mut sent = 0;
        // The kernel queues some messages.
        while notifier.send("STATUS=busy", &[], MsgFlags::empty()).is_ok() {
            sent += 1;
            assert!(sent < 100_000, "a socket has no room for so many messages");
        }
        let refused = notifier.send("STATUS=busy", &[systemd.as_fd()], MsgFlags::empty());
        assert_eq!(refused, Err(Errno::EAGAIN));
        assert!((limit..Duration::from_secs(20)).contains(&begun.elapsed()), "{:?}", begun.elapsed());
        // The watchdog's messages do not wait at all.
        assert_eq!(notifier.send("WATCHDOG=1", &[], MsgFlags::MSG_DONTWAIT), Err(Errno::EAGAIN));
        drop(systemd);
        assert!(notifier.send("STATUS=busy", &[], MsgFlags::empty()).is_err());
    }

    #[tokio::test(start_paused = true)]
    async fn a_systemd_that_reads_late_learns_that_the_daemon_is_ready() {
        let (socket, systemd) = UnixDatagram::pair().unwrap();
        let notifier = Notifier::to(socket);
        while notifier.send("STATUS=busy", &[], MsgFlags::MSG_DONTWAIT).is_ok() {}
        let read = async {
            tokio::time::sleep(SEND_LIMIT * 10).await;
            systemd.set_nonblocking(true).unwrap();
            while systemd.recv(&mut [0; 64]).is_ok() {}
        };
        tokio::join!(notifier.ready("serving"), read);
        let mut message = [0; 64];
        let length = systemd.recv(&mut message).unwrap();
        assert_eq!(&message[..length], b"READY=1\nSTATUS=serving");
    }

    #[test]
    fn of_many_messages_only_one_waits_until_systemd_reads_again() {
        let (socket, systemd) = UnixDatagram::pair().unwrap();
        let limit = Duration::from_millis(500);
        let notifier = Notifier::over(socket, limit).unwrap();
        for _ in 0..2 {
            while notifier.send("STATUS=busy", &[], MsgFlags::MSG_DONTWAIT).is_ok() {}
            let begun = Instant::now();
            for _ in 0..20 {
                assert_eq!(notifier.send_one_of_many("FDSTOREREMOVE=1", &[]), Err(Errno::EAGAIN));
            }
            assert!((limit..limit * 10).contains(&begun.elapsed()), "{:?}", begun.elapsed());
            systemd.set_nonblocking(true).unwrap();
            while systemd.recv(&mut [0; 64]).is_ok() {}
            assert_eq!(notifier.send_one_of_many("FDSTOREREMOVE=1", &[]), Ok(()));
        }
    }
}
