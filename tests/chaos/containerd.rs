//! Tracks whether containerd runs. A call that was cut off by the end of containerd is no failure of the shim.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::common::disturb;
use super::common::node::Node;
use super::common::wait;

/// Time after a restart of containerd in which an event may still get lost.
const LATE: Duration = Duration::from_secs(10);

#[derive(Default)]
pub struct Containerd {
    /// The number of ends and starts of containerd: odd while containerd is down.
    generation: AtomicU64,
    /// From the end of containerd until the events are subscribed to again.
    outages: Mutex<Vec<(Instant, Option<Instant>)>>,
}

/// The containerd to which a call went.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Generation(u64);

impl Containerd {
    pub fn now(&self) -> Generation {
        Generation(self.generation.load(Ordering::SeqCst))
    }

    pub fn is_up(&self) -> bool {
        self.now().0.is_multiple_of(2)
    }

    /// Whether containerd has run without an interruption since a call began.
    pub fn lasts_since(&self, begin: Generation) -> bool {
        begin.0.is_multiple_of(2) && self.now() == begin
    }

    /// Kills containerd and starts it again.
    pub fn disturb(&self, node: &Node) {
        self.outages.lock().unwrap_or_else(PoisonError::into_inner).push((Instant::now(), None));
        self.generation.fetch_add(1, Ordering::SeqCst);
        disturb::kill_containerd();
        disturb::start_containerd();
        node.wait_for_containerd();
        self.generation.fetch_add(1, Ordering::SeqCst);
    }

    /// Waits until containerd runs.
    pub fn wait(&self, node: &Node) {
        wait::until_true("containerd is up", || self.is_up());
        node.wait_for_containerd();
    }

    /// Notes that events are received again.
    pub fn subscribed(&self) {
        let mut outages = self.outages.lock().unwrap_or_else(PoisonError::into_inner);
        outages.iter_mut().for_each(|(_, end)| *end = end.or_else(|| Some(Instant::now())));
    }

    /// Whether an event between these times may have been published without a subscriber.
    pub fn may_hide_events(&self, begin: Instant, end: Instant) -> bool {
        let outages = self.outages.lock().unwrap_or_else(PoisonError::into_inner);
        outages.iter().any(|(from, to)| *from <= end + LATE && to.is_none_or(|to| begin <= to))
    }
}
