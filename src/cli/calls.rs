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
use crate::transport::sockets::{Leases, Socket};

use super::Failure;

/// One of the daemon's sockets.
pub(super) struct Calls {
    service: Arc<TaskService>,
    tasks: Arc<Tasks>,
    connections: Arc<Connections>,
    /// The connections of earlier daemons that came from this socket.
    earlier: Vec<Unwatched>,
    /// `None` if systemd does not listen: there are no new connections then.
    listener: Option<UnixListener>,
}

/// The sockets that systemd has passed, each with the connections of earlier daemons; and the sockets that only have such
/// connections, because the socket unit is not active.
///
/// # Errors
/// A descriptor is not one of the daemon's sockets.
pub(super) fn of_sockets(
    sockets: Vec<OwnedFd>,
    shim: &Arc<Shim>,
    connections: &Arc<Connections>,
    adopted: Vec<Adopted>,
) -> Result<Vec<Calls>, Failure> {
    let leases = Leases::new(config::STATE_DIR);
    let mut listeners = Vec::new();
    for fd in sockets {
        let (socket, listener) = listener::from_systemd(fd)
            .map_err(|error| Failure(format!("can't use a socket from systemd: {error}")))?;
        listeners.push((socket, Some(listener)));
    }
    let calls = grouped(listeners, adopted).into_iter().map(|(socket, listener, earlier)| {
        let service = Arc::new(TaskService::new(shim.clone(), socket, &leases));
        Calls { service, tasks: shim.tasks.clone(), connections: connections.clone(), earlier, listener }
    });
    Ok(calls.collect())
}

/// Each socket with its listener, if it has one, and the connections that came from it.
fn grouped<L, C>(
    listeners: Vec<(Socket, Option<L>)>,
    mut connections: Vec<(Socket, C)>,
) -> Vec<(Socket, Option<L>, Vec<C>)> {
    let has_listener = |socket: &Socket| listeners.iter().any(|(other, _)| other == socket);
    let others: Vec<Socket> = Socket::all().filter(|socket| !has_listener(socket)).collect();
    let mut groups = Vec::new();
    for (socket, listener) in listeners.into_iter().chain(others.into_iter().map(|socket| (socket, None))) {
        let own = connections.extract_if(.., |(from, _)| *from == socket);
        let own: Vec<C> = own.map(|(_, connection)| connection).collect();
        if listener.is_some() || !own.is_empty() {
            groups.push((socket, listener, own));
        }
    }
    groups
}

impl Calls {
    /// Serves calls. Resolves only after an error.
    pub(super) async fn serve(self) {
        let Self { service, tasks, connections, earlier, listener } = self;
        if fault::is_forgetful()
            && let Some(listener) = listener
        {
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
        let Some(listener) = listener else {
            return std::future::pending().await;
        };
        match connections.accept(listener) {
            Ok(new) => accept(new, calls, &tasks).await,
            Err(error) => tracing::error!(%error, "can't watch a socket: {error}"),
        }
    }
}

async fn accept(new: impl Stream<Item = io::Result<Durable>>, calls: Arc<dyn Dispatch>, tasks: &Tasks) {
    let mut new = std::pin::pin!(new);
    let mut failures = Failures::default();
    while let Some(accepted) = new.next().await {
        if let Some(connection) = failures.log(accepted) {
            tasks.publishing.note_sign();
            tokio::spawn(Box::new(connection).serve(calls.clone()));
        }
    }
}

/// Logs the first of consecutive errors, and that they are over: an error that lasts comes back with every attempt, many times a
/// second.
#[derive(Default)]
struct Failures {
    has_failed: bool,
}

impl Failures {
    fn log<T>(&mut self, accepted: io::Result<T>) -> Option<T> {
        let had_failed = std::mem::replace(&mut self.has_failed, accepted.is_err());
        match &accepted {
            Ok(_) if had_failed => tracing::info!("connections are accepted again"),
            Err(error) if !had_failed => {
                tracing::error!(%error, "can't accept a connection, trying again: {error}");
            }
            Ok(_) | Err(_) => {}
        }
        accepted.ok()
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

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use tracing::{Event, Level, Subscriber};
    use tracing_subscriber::layer::{Context, Layer, SubscriberExt};

    use super::*;

    /// The levels of what was logged.
    #[derive(Clone, Default)]
    struct Logged(Arc<Mutex<Vec<Level>>>);

    impl<S: Subscriber> Layer<S> for Logged {
        fn on_event(&self, event: &Event<'_>, _: Context<'_, S>) {
            self.0.lock().unwrap().push(*event.metadata().level());
        }
    }

    #[test]
    fn the_first_of_consecutive_errors_and_their_end_are_logged() {
        let (logged, mut failures) = (Logged::default(), Failures::default());
        let results = [Ok(1), Err(()), Err(()), Err(()), Ok(2), Ok(3), Err(())];
        tracing::subscriber::with_default(tracing_subscriber::registry().with(logged.clone()), || {
            let accepted =
                results.map(|result| failures.log(result.map_err(|()| io::ErrorKind::Other.into())));
            assert_eq!(accepted.into_iter().flatten().collect::<Vec<u8>>(), [1, 2, 3]);
        });
        assert_eq!(*logged.0.lock().unwrap(), [Level::ERROR, Level::INFO, Level::ERROR]);
    }

    #[test]
    fn connections_are_served_whether_or_not_systemd_listens_on_their_socket() {
        let connections =
            || vec![(Socket::Of(3), 'a'), (Socket::Any, 'b'), (Socket::Of(3), 'c'), (Socket::Of(5), 'd')];
        let without = [
            (Socket::Any, None::<u8>, vec!['b']),
            (Socket::Of(3), None, vec!['a', 'c']),
            (Socket::Of(5), None, vec!['d']),
        ];
        assert_eq!(grouped(Vec::new(), connections()), without);
        let listeners = vec![(Socket::Of(3), Some(7)), (Socket::Of(4), Some(8))];
        let with = [
            (Socket::Of(3), Some(7), vec!['a', 'c']),
            (Socket::Of(4), Some(8), vec![]),
            (Socket::Any, None, vec!['b']),
            (Socket::Of(5), None, vec!['d']),
        ];
        assert_eq!(grouped(listeners, connections()), with);
    }
}
