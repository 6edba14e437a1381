//! Serves calls: each connection has a task that answers them.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::sync::Arc;

use futures_util::{Stream, StreamExt};

use crate::api::dispatch::Dispatcher;
use crate::api::task::TaskService;
use crate::config;
use crate::fault;
use crate::ops::Shim;
use crate::services::Tasks;
use crate::transport::durable::{Dispatch, Durable, Unwatched};
use crate::transport::listener::{self, Adopted, Connections};
use crate::transport::sockets::Leases;

use super::Failure;

/// One of the daemon's sockets.
pub(super) struct Calls {
    service: Arc<TaskService>,
    tasks: Arc<Tasks>,
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
        Ok(Calls { service, tasks: shim.tasks.clone(), connections: connections.clone(), earlier, listener })
    };
    sockets.into_iter().map(of_socket).collect()
}

impl Calls {
    /// Serves calls. Resolves only after an error.
    pub(super) async fn serve(self) {
        let Self { service, tasks, connections, earlier, listener } = self;
        if fault::is_forgetful() {
            return serve_plainly(listener, service).await;
        }
        let calls: Arc<dyn Dispatch> = Arc::new(Dispatcher::new(service));
        for connection in earlier {
            let calls = calls.clone();
            tokio::spawn(async move {
                match connection.watch_once_possible().await {
                    Ok(connection) => Box::new(connection).serve(calls).await,
                    Err(error) => {
                        tracing::error!(%error, "can't watch a connection of an earlier daemon: {error}")
                    }
                }
            });
        }
        match connections.accept(listener) {
            Ok(new) => accept(new, calls, &tasks).await,
            Err(error) => tracing::error!(%error, "can't watch a socket: {error}"),
        }
    }
}

async fn accept(new: impl Stream<Item = io::Result<Durable>>, calls: Arc<dyn Dispatch>, tasks: &Tasks) {
    let mut new = std::pin::pin!(new);
    while let Some(accepted) = new.next().await {
        match accepted {
            Ok(connection) => {
                tasks.publishing.note_sign();
                tokio::spawn(Box::new(connection).serve(calls.clone()));
            }
            Err(error) => tracing::error!(%error, "can't accept a connection: {error}"),
        }
    }
}

/// Serves calls with ttrpc, over connections that end with the daemon. Only tests and benchmarks want this.
async fn serve_plainly(listener: UnixListener, service: Arc<TaskService>) {
    let listener = match ttrpc::asynchronous::transport::Listener::try_from(listener) {
        Ok(listener) => listener,
        Err(error) => return tracing::error!(%error, "can't watch a socket: {error}"),
    };
    let mut server =
        ttrpc::asynchronous::Server::new().add_listener(listener).register_service(service.services());
    match server.start().await {
        Ok(()) => std::future::pending().await,
        Err(error) => tracing::error!(%error, "can't serve: {error}"),
    }
}
