//! Serves calls: each connection has a task that answers them. ttrpc serves the connections that need it.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::sync::Arc;

use futures_util::stream::{self, BoxStream};
use futures_util::{Stream, StreamExt};
use tokio::sync::mpsc;
use ttrpc::asynchronous::Server;
use ttrpc::asynchronous::transport::{Listener, Socket as Connection};

use crate::api::direct::DirectCalls;
use crate::api::task::TaskService;
use crate::config;
use crate::fault;
use crate::ops::Shim;
use crate::transport::durable::{Direct, Durable, Unwatched};
use crate::transport::listener::{self, Adopted, Connections};
use crate::transport::sockets::Leases;

use super::Failure;

/// One of the daemon's sockets.
pub(super) struct Calls {
    service: Arc<TaskService>,
    connections: Arc<Connections>,
    /// The connections of earlier daemons that came from this socket.
    earlier: Vec<Unwatched>,
    listener: UnixListener,
}

/// The sockets that systemd has passed, each with the connections of earlier daemons.
///
/// # Errors
/// A descriptor is not one of the daemon's sockets.
pub(super) fn of_sockets(
    sockets: Vec<OwnedFd>,
    shim: &Arc<Shim>,
    connections: &Arc<Connections>,
    mut adopted: Vec<Adopted>,
) -> Result<Vec<Calls>, Failure> {
    let leases = Leases::new(config::STATE_DIR);
    let of_socket = |fd| {
        let (socket, listener) = listener::from_systemd(fd)
            .map_err(|error| Failure(format!("can't use a socket from systemd: {error}")))?;
        let service = Arc::new(TaskService::new(shim.clone(), socket, &leases));
        let earlier = adopted.extract_if(.., |(from, _)| *from == socket);
        let earlier = earlier.map(|(_, connection)| connection).collect();
        Ok(Calls { service, connections: connections.clone(), earlier, listener })
    };
    sockets.into_iter().map(of_socket).collect()
}

impl Calls {
    /// Serves calls. Resolves only after an error.
    pub(super) async fn serve(self) {
        let Self { service, connections, earlier, listener } = self;
        if fault::is_forgetful() {
            return match Listener::try_from(listener) {
                Ok(listener) => serve_with_ttrpc(listener.boxed(), service).await,
                Err(error) => tracing::error!(%error, "can't watch a socket: {error}"),
            };
        }
        let direct: Arc<dyn Direct> = Arc::new(DirectCalls::new(service.clone()));
        let (needing, mut needed) = mpsc::unbounded_channel();
        for connection in earlier {
            let (direct, needing) = (direct.clone(), needing.clone());
            tokio::spawn(async move {
                match connection.watch_once_possible().await {
                    Ok(connection) => serve_directly(Box::new(connection.answered_by(direct)), needing).await,
                    Err(error) => {
                        tracing::error!(%error, "can't watch a connection of an earlier daemon: {error}")
                    }
                }
            });
        }
        match connections.accept(listener) {
            Ok(new) => {
                let needed = stream::poll_fn(move |context| needed.poll_recv(context)).map(Ok);
                tokio::join!(accept(new, direct, needing), serve_with_ttrpc(needed.boxed(), service));
            }
            Err(error) => tracing::error!(%error, "can't watch a socket: {error}"),
        }
    }
}

async fn accept(
    new: impl Stream<Item = io::Result<Durable>>,
    direct: Arc<dyn Direct>,
    needing: mpsc::UnboundedSender<Connection>,
) {
    let mut new = std::pin::pin!(new);
    while let Some(accepted) = new.next().await {
        match accepted {
            Ok(connection) => {
                let connection = Box::new(connection.answered_by(direct.clone()));
                tokio::spawn(serve_directly(connection, needing.clone()));
            }
            Err(error) => tracing::error!(%error, "can't accept a connection: {error}"),
        }
    }
}

/// Answers the calls on a connection until ttrpc is needed for it, or until it ends.
async fn serve_directly(connection: Box<Durable>, needing: mpsc::UnboundedSender<Connection>) {
    if let Some(connection) = connection.until_needed().await {
        // Fails only while the daemon ends.
        let _ = needing.send(Connection::new(*connection));
    }
}

/// Serves calls with ttrpc. The dispatch tables are made for the first connection: most sockets never have one for ttrpc.
async fn serve_with_ttrpc(
    mut connections: BoxStream<'static, io::Result<Connection>>,
    service: Arc<TaskService>,
) {
    let Some(first) = connections.next().await else { return };
    let listener = Listener::new(stream::once(async { first }).chain(connections));
    let mut server = Server::new().add_listener(listener).register_service(service.services());
    match server.start().await {
        Ok(()) => std::future::pending().await,
        Err(error) => tracing::error!(%error, "can't serve: {error}"),
    }
}
