//! Calls that connections answer without ttrpc: the calls of all methods. The handlers are those that ttrpc has.
//!
//! ttrpc starts a task for each request, waits until that task runs, and passes the response to another task. On a node with
//! many containers that are polled, this costs more than the call itself.

use std::collections::HashMap;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use tokio::time::timeout;
use ttrpc::asynchronous::{MethodHandler, Service, TtrpcContext};
use ttrpc::proto::MESSAGE_LENGTH_MAX;
use ttrpc::{MessageHeader, Request, context};

use crate::transport::durable::{Answer, Direct};
use crate::transport::frame::Frame;

use super::task::TaskService;

type Tables = HashMap<String, Service>;

/// The handlers of these calls.
pub struct DirectCalls {
    service: Arc<TaskService>,
    /// Made at the first call: most sockets never have one.
    tables: OnceLock<Arc<Tables>>,
}

impl DirectCalls {
    /// The handlers of a service.
    pub fn new(service: Arc<TaskService>) -> Self {
        Self { service, tables: OnceLock::new() }
    }

    fn tables(&self) -> &Arc<Tables> {
        self.tables.get_or_init(|| Arc::new(self.service.clone().services()))
    }
}

fn handler<'t>(tables: &'t Tables, request: &Request) -> Option<&'t (dyn MethodHandler + Send + Sync)> {
    tables.get(&request.service)?.methods.get(&request.method).map(Box::as_ref)
}

impl Direct for DirectCalls {
    fn answer(&self, request: &Frame) -> Option<Answer> {
        let (stream, flags) = (request.stream(), request.flags());
        // Calls of clients have odd streams (PROTOCOL.md). ttrpc refuses others.
        if stream.is_multiple_of(2) {
            return None;
        }
        let request = request.request()?;
        let tables = self.tables();
        handler(tables, &request)?;
        Some(Box::pin(respond(tables.clone(), stream, flags, request)))
    }
}

/// Calls a handler as ttrpc does.
async fn respond(tables: Arc<Tables>, stream: u32, flags: u8, request: Request) -> Option<Frame> {
    let handler = handler(&tables, &request)?;
    let length = u32::try_from(request.payload.len()).unwrap_or(u32::MAX);
    let context = TtrpcContext {
        mh: MessageHeader { flags, ..MessageHeader::new_request(stream, length) },
        metadata: context::from_pb(&request.metadata),
        timeout_nano: request.timeout_nano,
        connection_data: Arc::default(),
    };
    let limit = u64::try_from(request.timeout_nano).ok().filter(|nanoseconds| *nanoseconds > 0);
    let work = handler.handler(context, request);
    let result = match limit {
        Some(nanoseconds) => timeout(Duration::from_nanos(nanoseconds), work).await,
        None => Ok(work.await),
    };
    Some(match result {
        Ok(Ok(response)) => Frame::response(stream, &response).unwrap_or_else(|| {
            let reason = format!("the response is longer than {MESSAGE_LENGTH_MAX} bytes");
            Frame::refusal(stream, ttrpc::Code::INVALID_ARGUMENT, reason)
        }),
        Ok(Err(error)) => Frame::refusal(stream, ttrpc::Code::UNKNOWN, error.to_string()),
        Err(_) => Frame::refusal(stream, ttrpc::Code::DEADLINE_EXCEEDED, "timeout".to_owned()),
    })
}

#[cfg(test)]
mod tests {
    use containerd_shim_protos::api::StateRequest;
    use protobuf::Message;
    use ttrpc::proto::{KeyValue, MESSAGE_TYPE_REQUEST};

    use crate::api::convert::NAMESPACE_KEY;
    use crate::api::task::{V2, V3};
    use crate::simulation::harness::World;
    use crate::transport::frame::frame;
    use crate::transport::sockets::{Leases, Socket};

    use super::*;

    fn request(stream: u32, service: &str, method: &str, id: &str) -> Frame {
        let payload = StateRequest { id: id.to_owned(), ..StateRequest::default() }.write_to_bytes().unwrap();
        let namespace =
            KeyValue { key: NAMESPACE_KEY.to_owned(), value: "absent".to_owned(), ..KeyValue::default() };
        let request = Request {
            service: service.to_owned(),
            method: method.to_owned(),
            payload,
            metadata: vec![namespace],
            ..Request::default()
        };
        Frame { bytes: frame(stream, MESSAGE_TYPE_REQUEST, &request.write_to_bytes().unwrap()) }
    }

    #[test]
    fn calls_of_every_method_are_answered_and_all_others_left() {
        let answered = World::new("direct").live(|shim| async move {
            let service = TaskService::new(shim, Socket::Any, &Leases::new("/no/leases"));
            let direct = DirectCalls::new(Arc::new(service));
            for (stream, service, method) in [(7, V2, "Fly"), (7, "other.Task", "State"), (8, V2, "State")] {
                let left = direct.answer(&request(stream, service, method, "web"));
                assert!(left.is_none(), "{stream} {service} {method}");
            }
            let mut answered = Vec::new();
            for service in [V2, V3] {
                for method in ["State", "Stats", "Start", "Delete", "Wait", "Kill", "CloseIO", "Pids"] {
                    let answer = direct.answer(&request(7, service, method, "web")).unwrap().await.unwrap();
                    answered.push((answer.stream(), answer.reason()));
                }
            }
            answered
        });
        for (stream, reason) in answered.unwrap() {
            assert_eq!(stream, 7);
            assert!(reason.contains("absent/web"), "{reason}");
        }
    }
}
