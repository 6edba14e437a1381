//! A client of our own daemon, for the `delete` command.

use containerd_shim_protos::api::{DeleteRequest, DeleteResponse};
use containerd_shim_protos::shim_async::TaskClient;
use ttrpc::asynchronous::Client;
use ttrpc::context;

use crate::config;
use crate::id::TaskKey;

use super::convert::{CLEAN_UP_KEY, NAMESPACE_KEY, OWNER_KEY};

/// Asks the daemon to remove what is left of a task. systemd starts the daemon if it does not run.
///
/// # Errors
/// The daemon can't be reached, or can't remove the task.
pub async fn clean_up(key: &TaskKey) -> ttrpc::Result<DeleteResponse> {
    let client = Client::connect(&format!("unix://{}", config::SOCKET)).await?;
    // The caller has a shorter limit. The daemon continues after that limit.
    let mut metadata = context::with_timeout(0);
    metadata.add(NAMESPACE_KEY.to_owned(), key.namespace.to_string());
    metadata.add(CLEAN_UP_KEY.to_owned(), "1".to_owned());
    metadata.add(OWNER_KEY.to_owned(), key.owner.as_str().to_owned());
    let request = DeleteRequest { id: key.id.to_string(), ..DeleteRequest::default() };
    TaskClient::new(client).delete(metadata, &request).await
}
