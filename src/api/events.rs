//! Publishes the events in the outboxes: in order, at least once, until containerd has accepted them. An event is sent twice
//! only if the connection ended before containerd has answered, or if it could not be kept.
//!
//! Each containerd has one worker, as long as there are tasks of this containerd. A containerd that is down delays the events of
//! its own tasks only; these events wait in the records. An event that containerd does not accept delays the events of its own
//! task only. Tasks take turns, so a task with many events does not delay those of the others either.

use std::collections::{HashMap, HashSet};
use std::io;
use std::sync::Arc;
use std::time::Duration;

use containerd_shim_protos::api::ForwardRequest;
use protobuf::{Message, MessageField};
use tokio::sync::{mpsc, watch};
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
/// After so many eager pauses (10 s), the shortest pause is longer.
const MOST_EAGER: u32 = 200;
const LATER_PAUSE: Duration = Duration::from_secs(1);
/// How long the pauses are the shortest ones after a sign that a containerd runs: when containerd starts, it connects and
/// calls some time before it accepts events.
const EAGER: Duration = Duration::from_secs(2);

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
    let mut workers: HashMap<String, Worker> = HashMap::new();
    while let Some(entry) = outgoing.recv().await {
        let address = entry.task().containerd.ttrpc_address.clone();
        if !workers.contains_key(&address) {
            // Containerds that are gone leave no worker and no connection behind: there are as many as there were containerds at
            // one time.
            let used = tasks.containerds();
            let paths: HashSet<&str> = used.iter().map(|used| path(used)).chain([path(&address)]).collect();
            workers.retain(|address, worker| used.contains(address) || worker.is_busy());
            earlier.retain(|earlier, _| paths.contains(&**earlier));
        }
        let worker = workers.entry(address.clone()).or_insert_with(|| {
            let earlier = earlier.remove(path(&address));
            let link = Link::new(tasks.clone(), connections.clone(), address.clone(), earlier);
            Worker::start(tasks.clone(), link)
        });
        worker.publish(entry);
    }
}

/// The worker of one containerd. It ends when this is dropped.
struct Worker {
    /// Bounded like the queue of all tasks: each task is in the queue at most once.
    queue: mpsc::UnboundedSender<Assigned>,
    /// Each [`Assigned`] has a copy.
    assigned: Arc<()>,
}

/// A task that a worker has: in its queue, in its hands, or among those that are held up.
struct Assigned {
    entry: Arc<Entry>,
    _assigned: Arc<()>,
}

impl Worker {
    fn start(tasks: Arc<Tasks>, link: Link) -> Self {
        let (queue, owing) = mpsc::unbounded_channel();
        tokio::spawn(serve(tasks, link, owing));
        Self { queue, assigned: Arc::default() }
    }

    fn publish(&self, entry: Arc<Entry>) {
        // The send can't fail: a worker ends only after its queue.
        let _ = self.queue.send(Assigned { entry, _assigned: self.assigned.clone() });
    }

    /// True if the worker has a task. No other worker may publish events of this task meanwhile.
    fn is_busy(&self) -> bool {
        Arc::strong_count(&self.assigned) > 1
    }
}

async fn serve(tasks: Arc<Tasks>, mut link: Link, mut owing: mpsc::UnboundedReceiver<Assigned>) {
    let mut held_up = HeldUp::default();
    loop {
        let (assigned, pause) = tokio::select! {
            assigned = owing.recv() => match assigned {
                // The task is tried again when its pause is over.
                Some(assigned) if held_up.holds(&assigned.entry) => continue,
                Some(assigned) => (assigned, FIRST_PAUSE),
                None => return,
            },
            held = held_up.next(), if !held_up.is_empty() => held,
        };
        let entry = &assigned.entry;
        tasks.begin_publishing(entry);
        // One event, and then the other tasks have their turn: a container whose processes are killed all the time, for lack of
        // memory, owes new events as fast as containerd accepts them.
        let Some(outgoing) = tasks.first_owed(entry) else {
            continue;
        };
        if link.deliver(&outgoing).await {
            tasks.accepted(entry, outgoing.seq);
            tasks.announce(entry);
        } else {
            held_up.add(assigned, pause);
        }
    }
}

/// Tasks whose next event containerd did not accept, although it could be reached. They do not delay other tasks.
#[derive(Default)]
struct HeldUp {
    tasks: Vec<(Instant, Duration, Assigned)>,
}

impl HeldUp {
    fn is_empty(&self) -> bool {
        self.tasks.is_empty()
    }

    fn holds(&self, entry: &Arc<Entry>) -> bool {
        self.tasks.iter().any(|(_, _, held)| Arc::ptr_eq(&held.entry, entry))
    }

    /// Tries the task again after the pause.
    fn add(&mut self, assigned: Assigned, pause: Duration) {
        self.tasks.push((Instant::now() + pause, pause, assigned));
    }

    /// Waits until a pause is over; returns the task and its next pause.
    async fn next(&mut self) -> (Assigned, Duration) {
        let soonest = self.tasks.iter().enumerate().min_by_key(|(_, (due, ..))| *due);
        let Some((place, due)) = soonest.map(|(place, (due, ..))| (place, *due)) else {
            return std::future::pending().await;
        };
        tokio::time::sleep_until(due).await;
        let (_, pause, assigned) = self.tasks.swap_remove(place);
        (assigned, (pause * 2).min(LONGEST_PAUSE))
    }
}

/// The connection to one containerd, opened when it is needed.
struct Link {
    tasks: Arc<Tasks>,
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
    fn new(
        tasks: Arc<Tasks>,
        connections: Arc<EventConnections>,
        address: String,
        earlier: Option<Unwatched>,
    ) -> Self {
        let connection = earlier.map(Unwatched::watch).transpose().unwrap_or_else(|error| {
            tracing::debug!(%error, "can't watch a connection for events of an earlier daemon: {error}");
            None
        });
        Self { tasks, connections, address, connection }
    }

    /// Sends an event; returns true if containerd has accepted it, or will never accept it. Waits until containerd can be
    /// reached, because none of its tasks can be served before.
    async fn deliver(&mut self, outgoing: &Outgoing) -> bool {
        let task = &outgoing.task.key;
        let mut pauses = Pauses::new(self.tasks.publishing.signs());
        let mut told = false;
        let is_done = loop {
            let signs = pauses.begin_attempt();
            match self.forward(outgoing).await {
                Ok(()) => {
                    if told {
                        tracing::info!(
                            address = self.address,
                            "containerd at {} accepts events again",
                            self.address
                        );
                    }
                    break true;
                }
                Err(NotAccepted::Refused(reason)) => {
                    tracing::error!(%task, seq = outgoing.seq, "task {task}: containerd refuses an event, dropping it: {reason}");
                    break true;
                }
                Err(NotAccepted::Later(reason)) => {
                    self.connection = None;
                    tracing::warn!(%task, seq = outgoing.seq, "task {task}: containerd does not accept an event, sending it again: {reason}");
                    break false;
                }
                Err(NotAccepted::Stale) => self.connection = None,
                Err(NotAccepted::Unreachable(reason)) => {
                    if !told {
                        tracing::warn!(%task, "containerd at {} can't be reached for events, trying again: {reason}", self.address);
                        told = true;
                    }
                    self.tasks.publishing.note_unreachable(&self.address, signs);
                    pauses.pause().await;
                }
            }
        };
        if told {
            self.tasks.publishing.note_reachable(&self.address);
        }
        is_done
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

/// The pauses between attempts to reach a containerd. They become longer, until a sign comes that a containerd runs. A
/// containerd whose tasks are all gone gives no sign when it is back, so its socket is tried again without one.
struct Pauses {
    signs: watch::Receiver<u64>,
    next: Duration,
    /// Until then, all pauses are the shortest ones.
    eager_until: Instant,
    /// How many of the pauses were eager.
    eager_pauses: u32,
}

impl Pauses {
    fn new(signs: watch::Receiver<u64>) -> Self {
        Self { signs, next: FIRST_PAUSE, eager_until: Instant::now(), eager_pauses: 0 }
    }

    /// An attempt begins. A sign that comes from now on ends the pause after the attempt. Returns how many signs there were.
    fn begin_attempt(&mut self) -> u64 {
        *self.signs.borrow_and_update()
    }

    async fn pause(&mut self) {
        // Any number of signs may come, also from another containerd, so there is a shortest pause. It becomes longer if many
        // attempts were in vain: this containerd may be gone for ever.
        let shortest = if self.eager_pauses < MOST_EAGER { FIRST_PAUSE } else { LATER_PAUSE };
        tokio::time::sleep(shortest).await;
        let is_eager = Instant::now() < self.eager_until;
        self.eager_pauses = self.eager_pauses.saturating_add(u32::from(is_eager));
        let rest = if is_eager { Duration::ZERO } else { self.next.saturating_sub(shortest) };
        if tokio::time::timeout(rest, self.signs.changed()).await.is_ok() {
            self.eager_until = Instant::now() + EAGER;
            self.next = FIRST_PAUSE;
        } else if !is_eager {
            self.next = (self.next * 2).min(LONGEST_PAUSE);
        }
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
mod tests;
