//! Whether containerd is there. Calls that its own end cuts off are no failures of the shim.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::common::disturb;
use super::common::node::Node;
use super::common::wait;

/// How long after containerd's return an event may still be on its way to nobody.
const LATE: Duration = Duration::from_secs(10);

#[derive(Default)]
pub struct Containerd {
    /// Odd while it is down.
    generation: AtomicU64,
    /// From its end until the events are subscribed to again.
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

    /// Whether a call begun then has had one and the same containerd until now.
    pub fn lasts_since(&self, begin: Generation) -> bool {
        begin.0.is_multiple_of(2) && self.now() == begin
    }

    /// Kills it and brings it back.
    pub fn disturb(&self, node: &Node) {
        self.outages.lock().unwrap_or_else(PoisonError::into_inner).push((Instant::now(), None));
        self.generation.fetch_add(1, Ordering::SeqCst);
        disturb::kill_containerd();
        disturb::start_containerd();
        node.wait_for_containerd();
        self.generation.fetch_add(1, Ordering::SeqCst);
    }

    /// Waits until it is up.
    pub fn wait(&self, node: &Node) {
        wait::until_true("containerd is up", || self.is_up());
        node.wait_for_containerd();
    }

    /// Events are heard again.
    pub fn subscribed(&self) {
        let mut outages = self.outages.lock().unwrap_or_else(PoisonError::into_inner);
        outages.iter_mut().for_each(|(_, end)| *end = end.or_else(|| Some(Instant::now())));
    }

    /// Whether an event between these times may have come while nobody could hear it.
    pub fn may_hide_events(&self, begin: Instant, end: Instant) -> bool {
        let outages = self.outages.lock().unwrap_or_else(PoisonError::into_inner);
        outages.iter().any(|(from, to)| *from <= end + LATE && to.is_none_or(|to| begin <= to))
    }
}
