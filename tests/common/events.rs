//! Task events, received as a client of containerd.

use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use containerd_client::events::{
    TaskCreate, TaskDelete, TaskExecAdded, TaskExecStarted, TaskExit, TaskOom, TaskPaused, TaskResumed,
    TaskStart,
};
use containerd_client::services::v1::events_client::EventsClient;
use containerd_client::services::v1::{PublishRequest, SubscribeRequest};
use containerd_client::tonic::Status;
use containerd_client::types::Envelope;
use prost::Message;
use prost_types::Any;

use super::container::Container;
use super::node::{NAMESPACE, Node, request, unique};
use super::wait;

#[derive(Clone, Debug, PartialEq)]
pub enum Event {
    Create(TaskCreate),
    Start(TaskStart),
    ExecAdded(TaskExecAdded),
    ExecStarted(TaskExecStarted),
    Exit(TaskExit),
    Delete(TaskDelete),
    Paused(TaskPaused),
    Resumed(TaskResumed),
    Oom(TaskOom),
    /// An event of a topic that the tests do not use.
    Other(String),
}

impl Event {
    fn decode(envelope: &Envelope) -> Event {
        let topic = envelope.topic.as_str();
        let body = envelope.event.as_ref().map(|any| any.value.as_slice()).unwrap_or_default();
        let decoded = match topic {
            "/tasks/create" => TaskCreate::decode(body).map(Event::Create),
            "/tasks/start" => TaskStart::decode(body).map(Event::Start),
            "/tasks/exec-added" => TaskExecAdded::decode(body).map(Event::ExecAdded),
            "/tasks/exec-started" => TaskExecStarted::decode(body).map(Event::ExecStarted),
            "/tasks/exit" => TaskExit::decode(body).map(Event::Exit),
            "/tasks/delete" => TaskDelete::decode(body).map(Event::Delete),
            "/tasks/paused" => TaskPaused::decode(body).map(Event::Paused),
            "/tasks/resumed" => TaskResumed::decode(body).map(Event::Resumed),
            "/tasks/oom" => TaskOom::decode(body).map(Event::Oom),
            other => Ok(Event::Other(other.to_string())),
        };
        decoded.unwrap_or_else(|error| panic!("an event of topic {topic} that can't be read: {error}"))
    }

    pub fn container(&self) -> Option<&str> {
        match self {
            Event::Create(event) => Some(&event.container_id),
            Event::Start(event) => Some(&event.container_id),
            Event::ExecAdded(event) => Some(&event.container_id),
            Event::ExecStarted(event) => Some(&event.container_id),
            Event::Exit(event) => Some(&event.container_id),
            Event::Delete(event) => Some(&event.container_id),
            Event::Paused(event) => Some(&event.container_id),
            Event::Resumed(event) => Some(&event.container_id),
            Event::Oom(event) => Some(&event.container_id),
            Event::Other(_) => None,
        }
    }

    /// The name of the event, to compare orders.
    pub fn name(&self) -> &str {
        match self {
            Event::Create(_) => "create",
            Event::Start(_) => "start",
            Event::ExecAdded(_) => "exec-added",
            Event::ExecStarted(_) => "exec-started",
            Event::Exit(event) if event.id != event.container_id => "exec-exit",
            Event::Exit(_) => "exit",
            Event::Delete(_) => "delete",
            Event::Paused(_) => "paused",
            Event::Resumed(_) => "resumed",
            Event::Oom(_) => "oom",
            Event::Other(topic) => topic,
        }
    }
}

/// A subscription to all events of all namespaces.
pub struct Events {
    envelopes: Receiver<Envelope>,
}

impl Node {
    /// Subscribes. No event is missed after this returns.
    pub fn subscribe(&self) -> Events {
        self.try_subscribe().unwrap_or_else(|error| panic!("subscribe: {error}"))
    }

    /// As [`Self::new`], but returns the error if containerd does not run.
    pub fn try_subscribe(&self) -> Result<Events, Status> {
        let (sender, envelopes) = channel();
        let mut client = EventsClient::new(self.channel());
        self.spawn(async move {
            let Ok(answer) = client.subscribe(request(NAMESPACE, SubscribeRequest::default())).await else {
                return;
            };
            let mut stream = answer.into_inner();
            while let Ok(Some(envelope)) = stream.message().await {
                if sender.send(envelope).is_err() {
                    return;
                }
            }
        });
        // containerd confirms a subscription with its first event only, so we send one.
        let topic = format!("/e2e/{}", unique("subscribed"));
        wait::until("the first event of a subscription", || {
            let publish = PublishRequest { topic: topic.clone(), event: Some(Any::default()) };
            let published = self.call(EventsClient::new(self.channel()).publish(request(NAMESPACE, publish)));
            match published {
                Ok(()) => match envelopes.recv_timeout(Duration::from_millis(50)) {
                    Ok(_) => Some(Ok(())),
                    Err(RecvTimeoutError::Timeout) => None,
                    // containerd has ended, and the next containerd does not have this subscription.
                    Err(RecvTimeoutError::Disconnected) => {
                        Some(Err(Status::unavailable("the subscription has ended")))
                    }
                },
                Err(error) => Some(Err(error)),
            }
        })?;
        Ok(Events { envelopes })
    }
}

/// The subscription has ended, because containerd has ended.
#[derive(Debug)]
pub struct Ended;

impl Events {
    /// The next event of a namespace. `None` if no event comes within the time limit.
    pub fn next(&self, namespace: &str, limit: Duration) -> Result<Option<Event>, Ended> {
        let deadline = Instant::now() + limit;
        loop {
            match self.envelopes.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
                Ok(envelope) if envelope.namespace == namespace => return Ok(Some(Event::decode(&envelope))),
                Ok(_) => {}
                Err(RecvTimeoutError::Timeout) => return Ok(None),
                Err(RecvTimeoutError::Disconnected) => return Err(Ended),
            }
        }
    }

    /// The container's events, up to and including the first of this name.
    pub fn up_to(&self, container: &Container, last: &str) -> Vec<Event> {
        let deadline = Instant::now() + wait::LIMIT;
        let mut seen = Vec::new();
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let Ok(envelope) = self.envelopes.recv_timeout(left) else {
                panic!("no {last} event of {} in {:?}; seen: {seen:?}", container.id, wait::LIMIT);
            };
            let event = Event::decode(&envelope);
            if envelope.namespace == container.namespace && event.container() == Some(container.id.as_str()) {
                let is_last = event.name() == last;
                seen.push(event);
                if is_last {
                    return seen;
                }
            }
        }
    }

    /// The names of the same events.
    pub fn names_up_to(&self, container: &Container, last: &str) -> Vec<String> {
        self.up_to(container, last).iter().map(|event| event.name().to_string()).collect()
    }

    /// The container's exit event.
    pub fn exit_of(&self, container: &Container) -> TaskExit {
        match self.up_to(container, "exit").pop() {
            Some(Event::Exit(exit)) => exit,
            other => panic!("not an exit: {other:?}"),
        }
    }
}
