//! Publishes the events in the outboxes: in order, at least once, until containerd has accepted them. An event is sent twice
//! only if the connection ended before containerd has answered, or if it could not be kept.
//!
//! Each containerd has one worker. A containerd that is down delays the events of its own tasks only; they wait in the
//! records. An event that containerd does not accept delays the events of its own task only. Tasks take turns, so a task with
//! many events does not delay those of the others either.

use std::collections::{HashMap, HashSet};
use std::io;
use std::sync::Arc;
use std::time::Duration;

use containerd_shim_protos::api::ForwardRequest;
use protobuf::{Message, MessageField};
use tokio::sync::mpsc;
use tokio::time::Instant;
use ttrpc::proto::{KeyValue, MESSAGE_LENGTH_MAX};
use ttrpc::{Code, Response};

use crate::id::stable_hash;
use crate::services::{Entry, Outgoing, Tasks};
use crate::transport::event_connection::{CallId, EventConnection, EventConnections, Unwatched};

use super::convert::NAMESPACE_KEY;
use super::envelope;

/// Time limit for containerd to accept an event; the same as in containerd-shim-runc-v2.
const FORWARD_LIMIT: Duration = Duration::from_secs(5);

/// The most bytes that an event can have: those of a ttrpc message, less the names and the metadata of the call.
const LARGEST: u64 = MESSAGE_LENGTH_MAX as u64 - 1024;

const FIRST_PAUSE: Duration = Duration::from_millis(50);
const LONGEST_PAUSE: Duration = Duration::from_secs(5);

/// The service of containerd that takes events, and its method (events.proto of containerd).
const SERVICE: &str = "containerd.services.events.ttrpc.v1.Events";
const METHOD: &str = "Forward";

/// Publishes the events of all tasks that `outgoing` delivers, until it is closed. `earlier`: the connections of earlier daemons,
/// by address.
pub async fn publish(
    tasks: Arc<Tasks>,
    mut outgoing: mpsc::UnboundedReceiver<Arc<Entry>>,
    connections: Arc<EventConnections>,
    mut earlier: HashMap<String, Unwatched>,
) {
    let mut workers: HashMap<String, mpsc::UnboundedSender<Arc<Entry>>> = HashMap::new();
    while let Some(entry) = outgoing.recv().await {
        let address = entry.task().containerd.ttrpc_address.clone();
        let worker = workers.entry(address.clone()).or_insert_with(|| {
            // Bounded like `outgoing`: each task is in the queue at most once.
            let (sender, receiver) = mpsc::unbounded_channel();
            let link = Link::new(connections.clone(), address.clone(), earlier.remove(path(&address)));
            tokio::spawn(serve(tasks.clone(), link, receiver));
            sender
        });
        // The send can't fail: a worker ends only after this loop.
        let _ = worker.send(entry);
    }
}

async fn serve(tasks: Arc<Tasks>, mut link: Link, mut owing: mpsc::UnboundedReceiver<Arc<Entry>>) {
    let mut held_up = HeldUp::default();
    loop {
        let (entry, pause) = tokio::select! {
            entry = owing.recv() => match entry {
                // The task is tried again when its pause is over.
                Some(entry) if held_up.holds(&entry) => continue,
                Some(entry) => (entry, FIRST_PAUSE),
                None => return,
            },
            held = held_up.next(), if !held_up.is_empty() => held,
        };
        tasks.begin_publishing(&entry);
        // One event, and then the other tasks have their turn: a container whose processes are killed all the time, for lack of
        // memory, owes new events as fast as containerd accepts them.
        let Some(outgoing) = tasks.first_owed(&entry) else {
            continue;
        };
        if link.deliver(&outgoing).await {
            tasks.accepted(&entry, outgoing.seq);
            tasks.announce(&entry);
        } else {
            held_up.add(entry, pause);
        }
    }
}

/// Tasks whose next event containerd did not accept, although it could be reached. They do not delay other tasks.
#[derive(Default)]
struct HeldUp {
    tasks: Vec<(Instant, Duration, Arc<Entry>)>,
}

impl HeldUp {
    fn is_empty(&self) -> bool {
        self.tasks.is_empty()
    }

    fn holds(&self, entry: &Arc<Entry>) -> bool {
        self.tasks.iter().any(|(_, _, held)| Arc::ptr_eq(held, entry))
    }

    /// Tries the task again after the pause.
    fn add(&mut self, entry: Arc<Entry>, pause: Duration) {
        self.tasks.push((Instant::now() + pause, pause, entry));
    }

    /// Waits until a pause is over; returns the task and its next pause.
    async fn next(&mut self) -> (Arc<Entry>, Duration) {
        let soonest = self.tasks.iter().enumerate().min_by_key(|(_, (due, ..))| *due);
        let Some((place, due)) = soonest.map(|(place, (due, ..))| (place, *due)) else {
            return std::future::pending().await;
        };
        tokio::time::sleep_until(due).await;
        let (_, pause, entry) = self.tasks.swap_remove(place);
        (entry, (pause * 2).min(LONGEST_PAUSE))
    }
}

/// The connection to one containerd, opened when it is needed.
struct Link {
    connections: Arc<EventConnections>,
    address: String,
    connection: Option<EventConnection>,
}

/// The path in an address.
fn path(address: &str) -> &str {
    address.trim_start_matches("unix://")
}

/// Identifies an event among all events of all tasks.
fn id(outgoing: &Outgoing) -> CallId {
    let key = &outgoing.task.key;
    let fields = [key.owner.as_str(), key.namespace.as_str(), key.id.as_str()].map(str::as_bytes);
    CallId(stable_hash(&fields), outgoing.at_usec, outgoing.seq)
}

/// Why an event was not accepted.
enum NotAccepted {
    /// containerd will never accept this event.
    Refused(String),
    /// containerd can't be reached.
    Unreachable(String),
    /// containerd can be reached, but did not accept this event.
    Later(String),
    /// The connection, opened for an earlier event, has ended.
    Stale,
}

impl Link {
    /// A link over a connection of an earlier daemon, if there is one.
    fn new(connections: Arc<EventConnections>, address: String, earlier: Option<Unwatched>) -> Self {
        let connection = earlier.map(Unwatched::watch).transpose().unwrap_or_else(|error| {
            tracing::debug!(%error, "can't watch a connection for events of an earlier daemon: {error}");
            None
        });
        Self { connections, address, connection }
    }

    /// Sends an event; returns true if containerd has accepted it, or will never accept it. Waits until containerd can be
    /// reached, because none of its tasks can be served before.
    async fn deliver(&mut self, outgoing: &Outgoing) -> bool {
        let task = &outgoing.task.key;
        let mut pause = FIRST_PAUSE;
        let mut told = false;
        loop {
            match self.forward(outgoing).await {
                Ok(()) => {
                    if told {
                        tracing::info!(
                            address = self.address,
                            "containerd at {} accepts events again",
                            self.address
                        );
                    }
                    return true;
                }
                Err(NotAccepted::Refused(reason)) => {
                    tracing::error!(%task, seq = outgoing.seq, "task {task}: containerd refuses an event, dropping it: {reason}");
                    return true;
                }
                Err(NotAccepted::Later(reason)) => {
                    self.connection = None;
                    tracing::warn!(%task, seq = outgoing.seq, "task {task}: containerd does not accept an event, sending it again: {reason}");
                    return false;
                }
                Err(NotAccepted::Stale) => self.connection = None,
                Err(NotAccepted::Unreachable(reason)) => {
                    if !told {
                        tracing::warn!(%task, "containerd at {} can't be reached for events, trying again: {reason}", self.address);
                        told = true;
                    }
                    // No event announces that containerd is back, so its socket is tried again.
                    tokio::time::sleep(pause).await;
                    pause = (pause * 2).min(LONGEST_PAUSE);
                }
            }
        }
    }

    async fn forward(&mut self, outgoing: &Outgoing) -> Result<(), NotAccepted> {
        let envelope =
            envelope::envelope(outgoing).map_err(|error| NotAccepted::Refused(error.to_string()))?;
        let request = ForwardRequest { envelope: MessageField::some(envelope), ..ForwardRequest::default() };
        if request.compute_size() > LARGEST {
            return Err(NotAccepted::Refused("it is too large for a message".to_owned()));
        }
        let namespace = KeyValue {
            key: NAMESPACE_KEY.to_owned(),
            value: outgoing.task.key.namespace.to_string(),
            ..KeyValue::default()
        };
        let request = ttrpc::Request {
            service: SERVICE.to_owned(),
            method: METHOD.to_owned(),
            payload: request.write_to_bytes().map_err(|error| NotAccepted::Refused(error.to_string()))?,
            timeout_nano: i64::try_from(FORWARD_LIMIT.as_nanos()).unwrap_or(i64::MAX),
            metadata: vec![namespace],
            ..ttrpc::Request::default()
        };
        let is_new = self.connection.is_none();
        let connection = self.connected().await?;
        match tokio::time::timeout(FORWARD_LIMIT, call(connection, id(outgoing), &request)).await {
            Ok(Ok(Answer::Accepted)) => Ok(()),
            Ok(Ok(Answer::Error(Code::INVALID_ARGUMENT, reason))) => Err(NotAccepted::Refused(reason)),
            Ok(Ok(Answer::Error(_, reason))) => Err(NotAccepted::Later(reason)),
            Ok(Err(error)) if is_new => Err(NotAccepted::Later(error.to_string())),
            Ok(Err(_)) => Err(NotAccepted::Stale),
            Err(_) => Err(NotAccepted::Later("no answer in time".to_owned())),
        }
    }

    async fn connected(&mut self) -> Result<&mut EventConnection, NotAccepted> {
        let connection = match self.connection.take() {
            Some(connection) => connection,
            None => {
                let connection =
                    tokio::time::timeout(FORWARD_LIMIT, self.connections.connect(path(&self.address))).await;
                let connection =
                    connection.map_err(|_| NotAccepted::Unreachable("no connection in time".to_owned()))?;
                connection.map_err(|error| NotAccepted::Unreachable(error.to_string()))?
            }
        };
        Ok(self.connection.insert(connection))
    }
}

/// What containerd says of an event.
enum Answer {
    Accepted,
    Error(Code, String),
}

/// Calls containerd, unless an earlier daemon has done so. That daemon may also have begun another call, which ends first.
async fn call(connection: &mut EventConnection, id: CallId, request: &ttrpc::Request) -> io::Result<Answer> {
    if connection.under_way().is_some_and(|other| other != id) {
        finish(connection).await?;
    }
    if connection.has_succeeded(id) {
        return Ok(Answer::Accepted);
    }
    if connection.under_way().is_none() {
        connection.begin(id, request)?;
    }
    finish(connection).await
}

/// Waits for the answer to the call that is under way, which then has ended.
async fn finish(connection: &mut EventConnection) -> io::Result<Answer> {
    let answer = answer(&connection.response().await?);
    connection.end(matches!(answer, Answer::Accepted))?;
    Ok(answer)
}

fn answer(response: &Response) -> Answer {
    match response.status.as_ref() {
        Some(status) if status.code() != Code::OK => Answer::Error(status.code(), status.message.clone()),
        _ => Answer::Accepted,
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::BorrowedFd;
    use std::sync::Mutex;
    use std::sync::atomic::{AtomicIsize, Ordering};

    use async_trait::async_trait;
    use containerd_shim_protos::api::Empty;
    use containerd_shim_protos::shim_async::{Events, create_events};
    use tokio::sync::Notify;
    use ttrpc::asynchronous::{Server, TtrpcContext};

    use super::*;
    use crate::id::TaskId;
    use crate::services::Delivery;
    use crate::services::pending::Stored;
    use crate::simulation::harness::{Step, World};
    use crate::store::Store;
    use crate::task::lifecycle::Exit;
    use crate::task::outbox::TaskEvent;
    use crate::task::request::Mount;
    use crate::transport::ConnectionStore;

    /// A store that keeps nothing.
    struct Nowhere;

    #[async_trait]
    impl ConnectionStore for Nowhere {
        async fn keep(&self, _: &str, _: &[BorrowedFd<'_>]) -> io::Result<()> {
            Ok(())
        }

        fn forget(&self, _: &str) {}
    }

    /// A containerd. While it takes an event of a task that runs out of memory, another of its processes is killed.
    struct Containerd {
        tasks: Arc<Tasks>,
        noisy: Arc<Entry>,
        /// How many more processes will be killed.
        left: AtomicIsize,
        topics: Mutex<Vec<String>>,
        /// Notified once it has the exit of a task.
        exit: Arc<Notify>,
    }

    #[async_trait]
    impl Events for Containerd {
        async fn forward(&self, _: &TtrpcContext, request: ForwardRequest) -> ttrpc::Result<Empty> {
            let topic = request.envelope.topic.clone();
            if topic == "/tasks/exit" {
                self.exit.notify_one();
            } else if self.left.fetch_sub(1, Ordering::Relaxed) > 0 {
                self.noisy.task().owe(TaskEvent::OutOfMemory, 1);
                self.tasks.announce(&self.noisy);
            }
            self.topics.lock().unwrap().push(topic);
            Ok(Empty::default())
        }
    }

    #[test]
    fn a_task_that_always_owes_events_does_not_delay_those_of_others() {
        const KILLS: isize = 300;
        let world = World::new("taking-turns");
        world.take(&[Step::Create], Delivery::First).unwrap().unwrap();
        let init = world.init();
        let task = world
            .live(move |shim| async move { shim.tasks.process(&init).unwrap().0.task().clone() })
            .unwrap();
        let dir = tempfile::tempdir().unwrap();
        let address = dir.path().join("containerd.ttrpc").display().to_string();
        let deleted = |id: &str, events: Vec<TaskEvent>| {
            let mut task = task.clone();
            task.key.id = TaskId::new(id).unwrap();
            task.containerd.ttrpc_address = address.clone();
            task.outbox.clear();
            events.into_iter().for_each(|event| task.owe(event, 1));
            let entry = Arc::new(Entry::detached(task));
            entry.init.live().disk.stored = Stored::Nowhere;
            entry
        };
        let exit = TaskEvent::Exited { pid: 1, exit: Exit { status: 0, at_usec: 1 } };
        let noisy = deleted("noisy", vec![TaskEvent::OutOfMemory; 3]);
        let quiet = deleted("quiet", vec![exit]);
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let topics = runtime.block_on(async {
            let (tasks, outgoing) = Tasks::new(Store::new(dir.path().join("state")));
            let tasks = Arc::new(tasks);
            let containerd = Arc::new(Containerd {
                tasks: tasks.clone(),
                noisy: noisy.clone(),
                left: AtomicIsize::new(KILLS),
                topics: Mutex::default(),
                exit: Arc::default(),
            });
            let server = Server::new().bind(&format!("unix://{address}")).unwrap();
            let mut server = server.register_service(create_events(containerd.clone()));
            server.start().await.unwrap();
            tasks.announce(&noisy);
            tasks.announce(&quiet);
            let (connections, earlier) = EventConnections::adopt(Arc::new(Nowhere), &mut Vec::new());
            tokio::spawn(publish(tasks, outgoing, connections, earlier));
            containerd.exit.notified().await;
            containerd.topics.lock().unwrap().clone()
        });
        let before = topics.iter().take_while(|topic| *topic == "/tasks/oom").count();
        assert!(before <= 2, "{before} events of the other task came first");
    }

    #[test]
    fn an_event_that_fits_into_no_message_is_dropped_and_any_other_waits_for_containerd() {
        let world = World::new("too-long-event");
        world.take(&[Step::Create], Delivery::First).unwrap().unwrap();
        let init = world.init();
        let dropped = world.live(move |shim| async move {
            let (entry, _) = shim.tasks.process(&init).unwrap();
            // Nobody listens there.
            let (connections, _) = EventConnections::adopt(Arc::new(Nowhere), &mut Vec::new());
            let mut link = Link::new(connections, "/nonexistent".to_owned(), None);
            let mut dropped = Vec::new();
            for bytes in [LARGEST / 2, LARGEST] {
                // The event of a Create contains the mounts.
                let options = vec!["x".repeat(usize::try_from(bytes).unwrap())];
                let mut task = entry.task().clone();
                task.request.rootfs = vec![Mount { options, ..Mount::default() }];
                let event = TaskEvent::Created { pid: task.init.pid() };
                let outgoing = Outgoing { seq: 1, at_usec: 1, event, task };
                let delivery = tokio::time::timeout(FORWARD_LIMIT, link.deliver(&outgoing));
                dropped.push(delivery.await.unwrap_or(false));
            }
            dropped
        });
        assert_eq!(dropped, Some(vec![false, true]));
    }
}
