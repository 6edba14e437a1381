//! Calls that connections answer without ttrpc: those that only read, and that clients make again and again.
//!
//! ttrpc passes each request to a task of its own, and its response to another one. On a node with many containers that are
//! polled, this costs more than the call itself. The handlers are the same.

use std::sync::Arc;
use std::time::Duration;

use containerd_shim_protos::shim_async::create_task;
use tokio::time::timeout;
use ttrpc::asynchronous::{MethodHandler, TtrpcContext};
use ttrpc::{MessageHeader, Request, context};

use crate::transport::durable::{Answer, Direct};
use crate::transport::frame::Frame;

use super::task::{TaskService, V2, V3, suspected};

/// The names of these calls.
const METHODS: [&str; 2] = ["State", "Stats"];

/// A longer request is none of these calls. It is not worth decoding it twice.
const MOST_BYTES: usize = 1024;

type Handler = Arc<dyn MethodHandler + Send + Sync>;

/// The handlers of these calls.
pub struct DirectCalls([Option<Handler>; METHODS.len()]);

impl DirectCalls {
    /// The handlers of a service.
    pub fn new(service: &Arc<TaskService>) -> Self {
        let tables = create_task(service.clone()).into_iter().map(suspected);
        let mut methods: Vec<_> = tables.flat_map(|(_, service)| service.methods).collect();
        Self(METHODS.map(|name| {
            let at = methods.iter().position(|(found, _)| found == name)?;
            Some(Arc::from(methods.swap_remove(at).1))
        }))
    }

    fn handler(&self, request: &Request) -> Option<Handler> {
        let method = METHODS.iter().position(|name| *name == request.method)?;
        self.0[method].clone().filter(|_| [V2, V3].contains(&request.service.as_str()))
    }
}

impl Direct for DirectCalls {
    fn answer(&self, request: &Frame) -> Option<Answer> {
        let (stream, flags) = (request.stream(), request.flags());
        let request = Some(request).filter(|frame| frame.bytes.len() <= MOST_BYTES)?.request()?;
        let handler = self.handler(&request)?;
        Some(Box::pin(respond(handler, stream, flags, request)))
    }
}

/// Calls a handler as ttrpc does. `None` if its response is too long.
async fn respond(handler: Handler, stream: u32, flags: u8, request: Request) -> Option<Frame> {
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
        Ok(Ok(response)) => Frame::response(stream, &response),
        Ok(Err(error)) => Some(Frame::refusal(stream, ttrpc::Code::UNKNOWN, error.to_string())),
        Err(_) => Some(Frame::refusal(stream, ttrpc::Code::DEADLINE_EXCEEDED, "timeout".to_owned())),
    }
}

#[cfg(test)]
mod tests {
    use containerd_shim_protos::api::StateRequest;
    use protobuf::Message;
    use ttrpc::proto::{KeyValue, MESSAGE_TYPE_REQUEST};

    use crate::api::convert::NAMESPACE_KEY;
    use crate::simulation::harness::World;
    use crate::transport::frame::frame;
    use crate::transport::sockets::{Leases, Socket};

    use super::*;

    fn request(service: &str, method: &str, id: &str) -> Frame {
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
        Frame { bytes: frame(7, MESSAGE_TYPE_REQUEST, &request.write_to_bytes().unwrap()) }
    }

    #[test]
    fn calls_that_only_read_are_answered_and_all_others_left() {
        let answered = World::new("direct").live(|shim| async move {
            let service = TaskService::new(shim, Socket::Any, &Leases::new("/no/leases"));
            let direct = DirectCalls::new(&Arc::new(service));
            for (service, method) in [(V2, "Kill"), (V3, "Wait"), ("other.Task", "State")] {
                assert!(direct.answer(&request(service, method, "web")).is_none(), "{service} {method}");
            }
            assert!(
                direct.answer(&request(V2, "State", &"x".repeat(MOST_BYTES))).is_none(),
                "it is too long"
            );
            let mut answered = Vec::new();
            for (service, method) in [(V2, "State"), (V3, "State"), (V2, "Stats"), (V3, "Stats")] {
                let answer = direct.answer(&request(service, method, "web")).unwrap().await.unwrap();
                answered.push((answer.stream(), answer.reason()));
            }
            answered
        });
        for (stream, reason) in answered.unwrap() {
            assert_eq!(stream, 7);
            assert!(reason.contains("absent/web"), "{reason}");
        }
    }
}
