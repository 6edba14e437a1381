//! A connection to the bus that carries no descriptors, and no signals that are for the daemon alone (see `wire`).
//!
//! Every user of the machine can send a signal with descriptors to a client of the bus that accepts them. Whoever closes the
//! last copy of a descriptor may have to wait: for the peer of a TCP connection with `SO_LINGER`, as long as its owner
//! likes. The bus delivers no descriptors to a client that has not asked for them.

use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;

use async_trait::async_trait;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use zbus::connection::Builder;
use zbus::connection::socket::{ReadHalf, Socket, Split, WriteHalf};

use super::wire::Filter;
use crate::sys;

/// Where the system bus listens.
const BUS: &str = "/run/dbus/system_bus_socket";

/// Connects to the system bus.
///
/// # Errors
/// There is no bus, or too many clients wait for it.
pub(super) async fn connect() -> zbus::Result<UnixStream> {
    UnixStream::connect(BUS).await.map_err(|error| zbus::Error::InputOutput(Arc::new(error)))
}

/// Checks that somebody accepts connections to the system bus, without waiting for anything.
///
/// # Errors
/// There is no bus.
pub(super) fn check() -> zbus::Result<()> {
    match sys::connect_without_waiting(Path::new(BUS)) {
        // The queue is full: clients come faster than the bus accepts them.
        Err(error) if error.kind() != io::ErrorKind::WouldBlock => {
            Err(zbus::Error::InputOutput(Arc::new(error)))
        }
        _ => Ok(()),
    }
}

/// A client of the bus over `stream`.
pub(super) fn client(stream: UnixStream) -> Builder<'static> {
    Builder::socket(WithoutDescriptors(stream))
}

struct WithoutDescriptors(UnixStream);

impl Socket for WithoutDescriptors {
    type ReadHalf = Reader;
    type WriteHalf = Writer;

    fn split(self) -> Split<Reader, Writer> {
        let (reader, writer) = self.0.into_split();
        Split::new(Reader { socket: reader, filter: Filter::default() }, Writer(writer))
    }
}

#[derive(Debug)]
struct Reader {
    socket: OwnedReadHalf,
    filter: Filter,
}

#[async_trait]
impl ReadHalf for Reader {
    async fn recvmsg(&mut self, buffer: &mut [u8]) -> io::Result<(usize, Vec<OwnedFd>)> {
        loop {
            let taken = self.filter.take(buffer);
            if taken > 0 || buffer.is_empty() {
                return Ok((taken, Vec::new()));
            }
            if self.socket.read_buf(self.filter.arrived()).await? == 0 {
                return Ok((0, Vec::new()));
            }
        }
    }
}

#[derive(Debug)]
struct Writer(OwnedWriteHalf);

#[async_trait]
impl WriteHalf for Writer {
    async fn sendmsg(&mut self, buffer: &[u8], _: &[BorrowedFd<'_>]) -> io::Result<usize> {
        self.0.write(buffer).await
    }

    async fn flush(&mut self) -> io::Result<()> {
        self.0.flush().await
    }

    async fn close(&mut self) -> io::Result<()> {
        self.0.shutdown().await
    }
}
