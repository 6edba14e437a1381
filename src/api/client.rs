//! A caller of our own daemon: for the `delete` command.

use containerd_shim_protos::api::{DeleteRequest, DeleteResponse};
use containerd_shim_protos::shim_async::TaskClient;
use ttrpc::asynchronous::Client;
use ttrpc::context;

use crate::config;
use crate::id::TaskKey;

use super::convert::{CLEAN_UP_KEY, NAMESPACE_KEY, OWNER_KEY};

/// Asks the daemon to take away what a task left; it starts if it does not run.
///
/// # Errors
/// It can't be reached, or it can't do it.
pub async fn clean_up(key: &TaskKey) -> ttrpc::Result<DeleteResponse> {
    let client = Client::connect(&format!("unix://{}", config::SOCKET)).await?;
    // The caller has a limit of its own; the daemon goes on whatever it is.
    let mut metadata = context::with_timeout(0);
    metadata.add(NAMESPACE_KEY.to_owned(), key.namespace.to_string());
    metadata.add(CLEAN_UP_KEY.to_owned(), "1".to_owned());
    metadata.add(OWNER_KEY.to_owned(), key.owner.as_str().to_owned());
    let request = DeleteRequest { id: key.id.to_string(), ..DeleteRequest::default() };
    TaskClient::new(client).delete(metadata, &request).await
}
