//! Receives all events from the first to the last, and compares them with what the clients did.

use std::sync::Arc;
use std::sync::mpsc::{self, Sender};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::common::audit::Audit;
use super::common::events::Events;
use super::common::node::{NAMESPACE, Node};
use super::common::wait;
use super::tally::{Count, Fault};
use super::{Shared, pause, thread};

/// How long the auditor waits for an event before it checks whether to end.
const PERIOD: Duration = Duration::from_millis(200);

pub struct Auditor {
    shared: Arc<Shared>,
    end: Sender<()>,
    thread: JoinHandle<()>,
}

/// Starts to receive events; returns when the subscription exists.
pub fn start(shared: &Arc<Shared>) -> Auditor {
    let (end, ended) = mpsc::channel();
    let (ready, is_ready) = mpsc::channel();
    let (shared, for_thread) = (shared.clone(), shared.clone());
    let thread = thread("auditor", move || listen(&for_thread, &ready, &ended));
    is_ready.recv().expect("the auditor listens");
    Auditor { shared, end, thread }
}

impl Auditor {
    /// Receives events until none is missing, and counts faults.
    pub fn end(self) {
        drop(self.end);
        if self.thread.join().is_err() {
            self.shared.tally.fault(Fault::Other, "the auditor panicked");
        }
    }
}

fn listen(shared: &Shared, ready: &Sender<()>, ended: &mpsc::Receiver<()>) {
    let node = Node::shared();
    let mut audit = Audit::default();
    let mut deadline: Option<Instant> = None;
    let mut events = subscribe(&node, shared);
    ready.send(()).expect("somebody waits for the auditor");
    loop {
        match events.next(NAMESPACE, PERIOD) {
            Ok(Some(event)) => {
                shared.tally.add(Count::Events, 1);
                audit.add(event);
                continue;
            }
            Ok(None) => {}
            Err(_) => events = subscribe(&node, shared),
        }
        if deadline.is_none() && !pause(ended, Duration::ZERO) {
            deadline = Some(Instant::now() + wait::LIMIT);
        }
        if deadline.is_some_and(|deadline| {
            Instant::now() > deadline || shared.ledger.is_complete(&audit, &shared.containerd)
        }) {
            break;
        }
    }
    shared.tally.add(Count::Repeats, audit.repeats as u64);
    shared.ledger.compare(&audit, &shared.containerd, &shared.tally);
}

fn subscribe(node: &Node, shared: &Shared) -> Events {
    wait::until("a subscription to events", || {
        let begin = shared.containerd.now();
        let events = node.try_subscribe().ok()?;
        // A subscription to a containerd that is being killed says nothing about the next containerd.
        shared.containerd.lasts_since(begin).then(|| {
            shared.containerd.subscribed();
            events
        })
    })
}
