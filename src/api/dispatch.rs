//! Passes the requests on connections to the handlers of our services, as ttrpc's own server does.

use std::collections::HashMap;
use std::future;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use tokio::time::timeout;
use ttrpc::asynchronous::{MethodHandler, Service, TtrpcContext};
use ttrpc::proto::MESSAGE_LENGTH_MAX;
use ttrpc::{Code, MessageHeader, Request, context};

use crate::transport::durable::{Answer, Dispatch};
use crate::transport::frame::Frame;

use super::task::TaskService;

type Tables = HashMap<String, Service>;

/// Knows the handler of each method.
pub struct Dispatcher {
    service: Arc<TaskService>,
    /// Made at the first request: most sockets never have one.
    tables: OnceLock<Arc<Tables>>,
}

impl Dispatcher {
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

impl Dispatch for Dispatcher {
    fn answer(&self, frame: &Frame) -> Option<Answer> {
        let stream = frame.stream();
        let refuse = |reason: &str| {
            let refusal = Frame::refusal(stream, Code::INVALID_ARGUMENT, reason.to_owned());
            Some(Box::pin(future::ready(refusal)) as Answer)
        };
        if !frame.is_request() && !frame.is_data() {
            // A frame of a later version of the protocol.
            return None;
        }
        // PROTOCOL.md: the streams of clients are odd.
        if stream.is_multiple_of(2) {
            return refuse("stream id must be odd");
        }
        if frame.is_data() {
            // None of our methods has a stream of messages.
            return refuse("stream is no longer active");
        }
        let Some(request) = frame.request() else {
            return refuse("the request can't be decoded");
        };
        self.service.shim.tasks.publishing.note_sign();
        Some(Box::pin(respond(self.tables().clone(), stream, frame.flags(), request)))
    }
}

/// Calls the handler of a request.
async fn respond(tables: Arc<Tables>, stream: u32, flags: u8, request: Request) -> Frame {
    let Some(handler) = handler(&tables, &request) else {
        // The status of Go's ttrpc. containerd has other calls for shims without a method.
        let reason = format!("service {} has no method {}", request.service, request.method);
        return Frame::refusal(stream, Code::UNIMPLEMENTED, reason);
    };
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
    match result {
        Ok(Ok(response)) => Frame::response(stream, &response).unwrap_or_else(|| {
            let reason = format!("the response is longer than {MESSAGE_LENGTH_MAX} bytes");
            Frame::refusal(stream, Code::INVALID_ARGUMENT, reason)
        }),
        Ok(Err(error)) => Frame::refusal(stream, Code::UNKNOWN, error.to_string()),
        Err(_) => Frame::refusal(stream, Code::DEADLINE_EXCEEDED, "timeout".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use containerd_shim_protos::api::StateRequest;
    use protobuf::Message;
    use ttrpc::proto::{KeyValue, MESSAGE_TYPE_DATA, MESSAGE_TYPE_REQUEST, MESSAGE_TYPE_RESPONSE};

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
    fn each_request_shows_the_publisher_of_events_that_a_containerd_runs() {
        let counts = World::new("signs").live(|shim| async move {
            let signs = shim.tasks.publishing.signs();
            let service = TaskService::new(shim, Socket::Any, &Leases::new("/no/leases"));
            let dispatcher = Dispatcher::new(Arc::new(service));
            let before = *signs.borrow();
            for stream in [1, 3] {
                dispatcher.answer(&request(stream, V3, "State", "web")).unwrap().await;
            }
            *signs.borrow() - before
        });
        assert_eq!(counts, Some(2));
    }

    #[test]
    fn requests_of_every_method_are_passed_on_and_all_others_refused() {
        let answers = World::new("dispatch").live(|shim| async move {
            let service = TaskService::new(shim, Socket::Any, &Leases::new("/no/leases"));
            let dispatcher = Dispatcher::new(Arc::new(service));
            let mut answers = Vec::new();
            for service in [V2, V3] {
                for method in ["State", "Stats", "Start", "Delete", "Wait", "Kill", "CloseIO", "Pids"] {
                    let answer = dispatcher.answer(&request(7, service, method, "web"));
                    answers.push((answer.unwrap().await, 7, "absent/web"));
                }
            }
            let of_kind = |kind| Frame { bytes: frame(9, kind, b"\xff") };
            for (asked, reason) in [
                (request(9, V2, "Fly", "web"), "has no method Fly"),
                (request(9, "other.Task", "State", "web"), "service other.Task has no method State"),
                (request(8, V2, "State", "web"), "must be odd"),
                (of_kind(MESSAGE_TYPE_REQUEST), "can't be decoded"),
                (of_kind(MESSAGE_TYPE_DATA), "no longer active"),
            ] {
                answers.push((dispatcher.answer(&asked).unwrap().await, asked.stream(), reason));
            }
            for kind in [0, MESSAGE_TYPE_RESPONSE, 4, 200] {
                assert!(dispatcher.answer(&of_kind(kind)).is_none(), "{kind}");
            }
            answers
        });
        for (answer, stream, reason) in answers.unwrap() {
            assert_eq!(answer.stream(), stream);
            assert!(answer.reason().contains(reason), "{reason}: {}", answer.reason());
        }
    }
}
