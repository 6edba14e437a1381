//! What the daemon tells systemd about itself: ready, stopping, alive; and what it has systemd keep.

use std::io::{self, IoSlice};
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::time::Duration;

use libsystemd::daemon::{self, NotifyState};
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};

use crate::fault;

/// Tells systemd that calls are served from now on. No effect outside of systemd.
pub fn ready(status: &str) {
    tell(&[NotifyState::Ready, NotifyState::Status(status.to_owned())]);
}

/// Tells systemd that the daemon is about to end.
pub fn stopping() {
    tell(&[NotifyState::Stopping]);
}

/// Tells systemd for as long as it is polled that the async runtime still runs: twice within the
/// time after which the watchdog would end the daemon. Resolves never.
pub async fn keep_alive() {
    let Some(limit) = daemon::watchdog_enabled(false) else {
        return std::future::pending().await;
    };
    let mut ticks = tokio::time::interval((limit / 2).max(Duration::from_millis(100)));
    loop {
        ticks.tick().await;
        tell(&[NotifyState::Watchdog]);
    }
}

fn tell(state: &[NotifyState]) {
    // A datagram to a local socket: it does not block. Failing to send it is for systemd to notice.
    if let Err(error) = daemon::notify(false, state) {
        tracing::warn!(%error, "can't notify systemd: {error}");
    }
}

/// systemd's store of descriptors (sd_notify(3), `FDSTORE=1`): what is in it stays open while the
/// daemon is down, and is passed to the next one.
///
/// `FDPOLL=0`: systemd would drop a pipe whose writer is gone, with the bytes in it, and a connection
/// that was closed, with the requests that it brought.
#[derive(Debug)]
pub struct FdStore {
    /// Nothing outside of systemd.
    socket: Option<UnixDatagram>,
}

impl FdStore {
    /// The store of the service that this process is.
    ///
    /// # Errors
    /// systemd's socket can't be reached.
    pub fn new() -> io::Result<Self> {
        let path = std::env::var_os("NOTIFY_SOCKET").filter(|_| !fault::is_forgetful());
        let Some(path) = path else {
            return Ok(Self { socket: None });
        };
        let address = match path.as_encoded_bytes().strip_prefix(b"@") {
            Some(name) => SocketAddr::from_abstract_name(name)?,
            None => SocketAddr::from_pathname(&path)?,
        };
        let socket = UnixDatagram::unbound()?;
        socket.connect_addr(&address)?;
        Ok(Self { socket: Some(socket) })
    }

    /// Puts descriptors into the store by a name: letters and digits.
    pub fn keep(&self, name: &str, fds: &[BorrowedFd<'_>]) {
        self.send(&format!("FDSTORE=1\nFDPOLL=0\nFDNAME={name}"), fds);
    }

    /// Takes all descriptors of that name out of the store.
    pub fn forget(&self, name: &str) {
        self.send(&format!("FDSTOREREMOVE=1\nFDNAME={name}"), &[]);
    }

    fn send(&self, message: &str, fds: &[BorrowedFd<'_>]) {
        let Some(socket) = &self.socket else {
            return;
        };
        let fds: Vec<RawFd> = fds.iter().map(AsRawFd::as_raw_fd).collect();
        let rights = [ControlMessage::ScmRights(&fds)];
        let rights = if fds.is_empty() { &[] } else { rights.as_slice() };
        let parts = [IoSlice::new(message.as_bytes())];
        // A datagram to a local socket: it waits only while systemd executes itself anew.
        let sent = sendmsg::<()>(socket.as_raw_fd(), &parts, rights, MsgFlags::MSG_NOSIGNAL, None);
        if let Err(error) = sent {
            tracing::error!(%error, "systemd keeps no descriptors, a restart would lose them: {error}");
        }
    }
}
