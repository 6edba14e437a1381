//! Accepts containerd's connections.

use std::io;
use std::os::fd::OwnedFd;

use futures_util::Stream;
use futures_util::stream;
use tokio::net::{UnixListener, UnixStream};

use super::sockets::Socket;

/// A socket that systemd passed to the daemon, and which one it is.
///
/// # Errors
/// It is none of the daemon's listeners.
pub fn from_systemd(fd: OwnedFd) -> io::Result<(Socket, UnixListener)> {
    let listener = std::os::unix::net::UnixListener::from(fd);
    let address = listener.local_addr()?;
    let socket = address.as_pathname().and_then(Socket::at).ok_or(io::ErrorKind::AddrNotAvailable)?;
    listener.set_nonblocking(true)?;
    Ok((socket, UnixListener::from_std(listener)?))
}

/// The connections of callers with this process's own uid. Others are closed at once: the socket's
/// mode keeps them out already, unless somebody has changed it.
pub fn accepted(listener: UnixListener) -> impl Stream<Item = io::Result<UnixStream>> + Send + 'static {
    let own_uid = nix::unistd::geteuid().as_raw();
    stream::unfold(listener, move |listener| async move {
        loop {
            let connection = match listener.accept().await {
                Ok((connection, _)) => connection,
                Err(error) => {
                    // Out of descriptors, mostly: the caller logs it, and others may still come.
                    tokio::time::sleep(PAUSE_AFTER_ERROR).await;
                    return Some((Err(error), listener));
                }
            };
            match connection.peer_cred() {
                Ok(peer) if peer.uid() == own_uid => return Some((Ok(connection), listener)),
                Ok(peer) => tracing::warn!(uid = peer.uid(), "refused a connection of user {}", peer.uid()),
                Err(error) => tracing::warn!(%error, "refused a connection of an unknown user: {error}"),
            }
        }
    })
}

/// Keeps a lasting error from taking all of a processor.
const PAUSE_AFTER_ERROR: std::time::Duration = std::time::Duration::from_millis(50);
