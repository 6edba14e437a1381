//! A client of our own daemon, for the `delete` command.

use std::time::Duration;

use containerd_shim_protos::api::{DeleteRequest, DeleteResponse};
use containerd_shim_protos::shim_async::TaskClient;
use tokio::time::sleep;
use ttrpc::asynchronous::Client;
use ttrpc::context;

use crate::config;
use crate::id::TaskKey;

use super::convert::{CLEAN_UP_KEY, NAMESPACE_KEY, OWNER_KEY};

/// How long after a connection has ended without an answer the next connection is tried.
const PAUSE: Duration = Duration::from_millis(100);

/// Why the daemon does not clean up.
#[derive(Debug)]
pub enum Error {
    /// Nobody listens at the daemon's socket.
    NoDaemon(ttrpc::Error),
    /// The daemon's answer.
    Refused(ttrpc::Status),
}

/// Asks the daemon to remove what is left of a task. systemd starts the daemon if it does not run. Tries again after
/// each connection that ends without an answer: the caller has a limit.
///
/// # Errors
/// The daemon can't be reached, or can't remove the task.
pub async fn clean_up(key: &TaskKey) -> Result<DeleteResponse, Error> {
    clean_up_at(config::SOCKET, key).await
}

async fn clean_up_at(socket: &str, key: &TaskKey) -> Result<DeleteResponse, Error> {
    let request = DeleteRequest { id: key.id.to_string(), ..DeleteRequest::default() };
    loop {
        let client = Client::connect(&format!("unix://{socket}")).await.map_err(Error::NoDaemon)?;
        // The daemon continues after the caller's limit.
        let mut metadata = context::with_timeout(0);
        metadata.add(NAMESPACE_KEY.to_owned(), key.namespace.to_string());
        metadata.add(CLEAN_UP_KEY.to_owned(), "1".to_owned());
        metadata.add(OWNER_KEY.to_owned(), key.owner.as_str().to_owned());
        match TaskClient::new(client).delete(metadata, &request).await {
            Ok(response) => return Ok(response),
            Err(ttrpc::Error::RpcStatus(status)) => return Err(Error::Refused(status)),
            // A daemon that has no room for a connection closes it. If systemd can't start the daemon, it closes the connection and
            // stops listening, so the next connect fails.
            Err(_) => sleep(PAUSE).await,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::id::{Namespace, TaskId};

    #[tokio::test]
    async fn a_connection_that_ends_without_an_answer_is_no_proof_that_there_is_no_daemon() {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("socket");
        let key = TaskKey::usual(Namespace::new("n").unwrap(), TaskId::new("web").unwrap());
        let listener = tokio::net::UnixListener::bind(&socket).unwrap();
        let closes_three = async {
            for _ in 0..3 {
                drop(listener.accept().await.unwrap());
            }
            drop(listener);
        };
        let (answer, ()) = tokio::join!(clean_up_at(socket.to_str().unwrap(), &key), closes_three);
        assert!(matches!(answer, Err(Error::NoDaemon(_))), "{answer:?}");
    }
}
