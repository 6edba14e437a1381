//! Publishes what the outboxes hold: in order, at least once, until containerd has accepted it.
//!
//! One worker per containerd. A containerd that is down holds up its own tasks' events and no
//! other's; they wait in the records.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use containerd_shim_protos::api::ForwardRequest;
use containerd_shim_protos::shim_async::EventsClient;
use protobuf::MessageField;
use tokio::sync::mpsc;
use ttrpc::asynchronous::Client;
use ttrpc::{Code, context};

use crate::ops::{Entry, Outgoing, Shim};

use super::convert::{self, NAMESPACE_KEY};

/// How long containerd may take for an event. As in containerd-shim-runc-v2.
const FORWARD_LIMIT: Duration = Duration::from_secs(5);

const FIRST_PAUSE: Duration = Duration::from_millis(50);
const LONGEST_PAUSE: Duration = Duration::from_secs(5);

/// Publishes for all tasks that come out of `outgoing`, until it is closed.
pub async fn publish(shim: Arc<Shim>, mut outgoing: mpsc::UnboundedReceiver<Arc<Entry>>) {
    let mut workers: HashMap<String, mpsc::UnboundedSender<Arc<Entry>>> = HashMap::new();
    while let Some(entry) = outgoing.recv().await {
        let address = entry.task().containerd.ttrpc_address.clone();
        let worker = workers.entry(address.clone()).or_insert_with(|| {
            let (sender, receiver) = mpsc::unbounded_channel();
            tokio::spawn(serve(shim.clone(), address, receiver));
            sender
        });
        // A worker ends with this loop only.
        let _ = worker.send(entry);
    }
}

async fn serve(shim: Arc<Shim>, address: String, mut tasks: mpsc::UnboundedReceiver<Arc<Entry>>) {
    let mut link = Link { address, client: None };
    while let Some(entry) = tasks.recv().await {
        while let Some(outgoing) = shim.first_owed(&entry) {
            link.deliver(&outgoing).await;
            shim.accepted(&entry, outgoing.seq);
        }
    }
}

/// The connection to one containerd, made when it is needed.
struct Link {
    address: String,
    client: Option<EventsClient>,
}

/// Why an event was not accepted.
enum Failure {
    /// It never will be.
    Refused(String),
    /// containerd can't be reached, or is busy.
    Later(String),
}

impl Link {
    /// Returns when containerd has accepted the event, or has said that it never will.
    async fn deliver(&mut self, outgoing: &Outgoing) {
        let task = &outgoing.task.key;
        let mut pause = FIRST_PAUSE;
        let mut told = false;
        loop {
            match self.forward(outgoing).await {
                Ok(()) => {
                    if told {
                        tracing::info!(
                            address = self.address,
                            "containerd at {} takes events again",
                            self.address
                        );
                    }
                    return;
                }
                Err(Failure::Refused(reason)) => {
                    tracing::error!(%task, seq = outgoing.seq, "task {task}: containerd refuses an event, it is dropped: {reason}");
                    return;
                }
                Err(Failure::Later(reason)) => {
                    self.client = None;
                    if !told {
                        tracing::warn!(%task, "containerd at {} takes no events, trying on: {reason}", self.address);
                        told = true;
                    }
                    // Nothing announces that containerd is back: its socket has to be tried.
                    tokio::time::sleep(pause).await;
                    pause = (pause * 2).min(LONGEST_PAUSE);
                }
            }
        }
    }

    async fn forward(&mut self, outgoing: &Outgoing) -> Result<(), Failure> {
        let envelope = convert::envelope(outgoing).map_err(|error| Failure::Refused(error.to_string()))?;
        let request = ForwardRequest { envelope: MessageField::some(envelope), ..ForwardRequest::default() };
        let limit = i64::try_from(FORWARD_LIMIT.as_nanos()).unwrap_or(i64::MAX);
        let mut metadata = context::with_timeout(limit);
        metadata.add(NAMESPACE_KEY.to_owned(), outgoing.task.key.namespace.to_string());
        let client = self.connected().await?;
        match client.forward(metadata, &request).await {
            Ok(_) => Ok(()),
            Err(ttrpc::Error::RpcStatus(status)) if status.code() == Code::INVALID_ARGUMENT => {
                Err(Failure::Refused(status.message().to_owned()))
            }
            Err(error) => Err(Failure::Later(error.to_string())),
        }
    }

    async fn connected(&mut self) -> Result<&EventsClient, Failure> {
        let client = match self.client.take() {
            Some(client) => client,
            None => {
                let address = format!("unix://{}", self.address.trim_start_matches("unix://"));
                let client = tokio::time::timeout(FORWARD_LIMIT, Client::connect(&address)).await;
                let client = client.map_err(|_| Failure::Later("no connection in time".to_owned()))?;
                EventsClient::new(client.map_err(|error| Failure::Later(error.to_string()))?)
            }
        };
        Ok(self.client.insert(client))
    }
}
