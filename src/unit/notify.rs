//! What the daemon tells systemd about itself: ready, stopping, alive; and what it has systemd keep.

use std::collections::HashMap;
use std::io::{self, IoSlice};
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use libsystemd::daemon;
use nix::errno::Errno;
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};

use crate::fault;

/// So many descriptors systemd keeps for the daemon (`FileDescriptorStoreMax=`); it would close any more
/// without a word.
///
/// It passes the names of all of them in one environment variable, which the kernel limits to 128 KiB
/// (execve(2), `MAX_ARG_STRLEN`): with names of up to nine letters and digits they fit.
pub const STORE_LIMIT: u32 = 12_000;

/// From here on nothing new is begun, so that what is under way still finds room.
const STORE_RESERVE: u32 = 500;

/// How long one message may wait for systemd, which reads none while it reloads or executes itself again. Two
/// threads serve all calls, and systemd's watchdog ends a daemon that says nothing for 10 s.
const SEND_LIMIT: Duration = Duration::from_secs(4);

/// The pause after a sign of life that systemd had no room for.
const RETRY: Duration = Duration::from_millis(100);

/// Why a descriptor is not kept.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The store is full.
    #[error(
        "systemd keeps {count} descriptors for the runtime's daemon, the limit is {STORE_LIMIT}: delete tasks or execs that have ended, or close connections"
    )]
    Full {
        /// So many are in it.
        count: usize,
    },
    /// systemd can't be told.
    #[error("systemd could not be asked to keep a descriptor: {0}")]
    Send(#[from] Errno),
}

/// A connection to the socket at which systemd is notified; nothing outside of systemd.
///
/// # Errors
/// It can't be reached.
pub(super) fn connect() -> io::Result<Option<UnixDatagram>> {
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

/// The way to systemd, and its store of descriptors (sd_notify(3), `FDSTORE=1`): what is in it stays open
/// while the daemon is down, and is passed to the next one.
///
/// `FDPOLL=0`: systemd would drop a pipe whose writer is gone, with the bytes in it, and a connection
/// that was closed, with the requests that it brought.
#[derive(Debug)]
pub struct FdStore {
    /// Nothing outside of systemd.
    socket: Option<UnixDatagram>,
    kept: Mutex<Counted>,
}

/// How many descriptors are kept, by name and together. Nobody but this process changes that.
#[derive(Debug, Default)]
struct Counted {
    by_name: HashMap<String, usize>,
    total: usize,
    /// That it is nearly full was said.
    is_told: bool,
}

impl Counted {
    fn add(&mut self, name: &str, count: usize) {
        *self.by_name.entry(name.to_owned()).or_default() += count;
        self.total += count;
        if !self.is_told && self.total * 5 > STORE_LIMIT as usize * 4 {
            self.is_told = true;
            tracing::warn!(
                "systemd keeps {} descriptors for this daemon, the limit is {STORE_LIMIT}: at {} no container, exec or connection is accepted any more",
                self.total,
                STORE_LIMIT - STORE_RESERVE
            );
        }
    }

    fn remove(&mut self, name: &str) {
        self.total -= self.by_name.remove(name).unwrap_or_default();
        self.is_told &= self.total * 5 > STORE_LIMIT as usize * 3;
    }
}

impl FdStore {
    /// The store of the service that this process is, with what is in it already.
    ///
    /// # Errors
    /// systemd's socket can't be reached.
    pub fn new(kept: &[(String, OwnedFd)]) -> io::Result<Self> {
        let mut counted = Counted::default();
        kept.iter().for_each(|(name, _)| counted.add(name, 1));
        let kept = Mutex::new(counted);
        let socket = connect()?;
        if let Some(socket) = &socket {
            socket.set_write_timeout(Some(SEND_LIMIT))?;
        }
        Ok(Self { socket, kept })
    }

    /// Tells systemd that calls are served from now on. No effect outside of systemd.
    pub fn ready(&self, status: &str) {
        self.tell(&format!("READY=1\nSTATUS={status}"));
    }

    /// Tells systemd that the daemon is about to end.
    pub fn stopping(&self) {
        self.tell("STOPPING=1");
    }

    /// Tells systemd for as long as it is polled that the async runtime still runs: twice within the
    /// time after which the watchdog would end the daemon. Resolves never.
    pub async fn keep_alive(&self) {
        let Some(limit) = daemon::watchdog_enabled(false) else {
            return std::future::pending().await;
        };
        let mut ticks = tokio::time::interval((limit / 2).max(RETRY));
        loop {
            ticks.tick().await;
            // Whatever waits for a thread is taken up by this one.
            drop(tokio::task::spawn_blocking(|| ()));
            // One thread of two must not wait for systemd, which counts no time while it reads nothing.
            while self.send("WATCHDOG=1", &[], MsgFlags::MSG_DONTWAIT) == Err(Errno::EAGAIN) {
                tokio::time::sleep(RETRY).await;
            }
        }
    }

    /// Whether something new can be begun that needs descriptors to be kept.
    ///
    /// # Errors
    /// [`Error::Full`]
    pub fn has_room(&self) -> Result<(), Error> {
        let count = self.counted(|kept| kept.total);
        if count > (STORE_LIMIT - STORE_RESERVE) as usize { Err(Error::Full { count }) } else { Ok(()) }
    }

    /// Puts descriptors into the store by a name: letters and digits.
    ///
    /// # Errors
    /// It is full, or systemd can't be told: nothing is kept then.
    pub fn keep(&self, name: &str, fds: &[BorrowedFd<'_>]) -> Result<(), Error> {
        if fault::is_forgetful() {
            return Ok(());
        }
        let count = self.counted(|kept| kept.total);
        if count + fds.len() > STORE_LIMIT as usize {
            return Err(Error::Full { count });
        }
        self.send(&format!("FDSTORE=1\nFDPOLL=0\nFDNAME={name}"), fds, MsgFlags::empty())?;
        self.counted(|kept| kept.add(name, fds.len()));
        Ok(())
    }

    /// Takes all descriptors of that name out of the store.
    pub fn forget(&self, name: &str) {
        if self.counted(|kept| !kept.by_name.contains_key(name)) {
            return;
        }
        match self.send(&format!("FDSTOREREMOVE=1\nFDNAME={name}"), &[], MsgFlags::empty()) {
            Ok(()) => self.counted(|kept| kept.remove(name)),
            // The next daemon finds it, and lets go of it.
            Err(error) => tracing::warn!(%error, "systemd keeps {name}, which nobody needs: {error}"),
        }
    }

    fn counted<T>(&self, with: impl FnOnce(&mut Counted) -> T) -> T {
        with(&mut self.kept.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn tell(&self, message: &str) {
        if let Err(error) = self.send(message, &[], MsgFlags::empty()) {
            tracing::warn!(%error, "can't notify systemd: {error}");
        }
    }

    fn send(&self, message: &str, fds: &[BorrowedFd<'_>], flags: MsgFlags) -> Result<(), Errno> {
        let Some(socket) = &self.socket else {
            return Ok(());
        };
        let fds: Vec<RawFd> = fds.iter().map(AsRawFd::as_raw_fd).collect();
        let rights = [ControlMessage::ScmRights(&fds)];
        let rights = if fds.is_empty() { &[] } else { rights.as_slice() };
        let parts = [IoSlice::new(message.as_bytes())];
        sendmsg::<()>(socket.as_raw_fd(), &parts, rights, flags | MsgFlags::MSG_NOSIGNAL, None).map(drop)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsFd;

    fn store() -> FdStore {
        FdStore { socket: None, kept: Mutex::default() }
    }

    #[test]
    fn a_full_store_refuses_and_has_room_again_when_something_goes() {
        let store = store();
        let file = std::fs::File::open("/dev/null").unwrap();
        let pair = [file.as_fd(), file.as_fd()];
        for number in 0..STORE_LIMIT / 2 {
            let begins = number * 2 <= STORE_LIMIT - STORE_RESERVE;
            assert_eq!(store.has_room().is_ok(), begins, "{number}");
            store.keep(&format!("c{number}"), &pair).unwrap();
        }
        assert!(matches!(store.keep("o1", &[file.as_fd()]), Err(Error::Full { count: 12_000 })));
        store.forget("c7");
        store.forget("c7");
        store.keep("o1", &pair).unwrap();
        assert!(store.keep("o2", &[file.as_fd()]).is_err());
    }

    #[test]
    fn the_names_of_a_full_store_fit_into_one_variable_of_the_environment() {
        const MAX_ARG_STRLEN: u32 = 128 << 10;
        let name = "c12345678:";
        assert!(STORE_LIMIT * name.len() as u32 + ("LISTEN_FDNAMES=".len() as u32) < MAX_ARG_STRLEN);
    }
}
