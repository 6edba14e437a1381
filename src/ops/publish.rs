//! The outboxes, as the publisher sees them.

use std::sync::Arc;

use crate::fault::{self, Point};

use super::{Entry, Outgoing, Shim};

impl Shim {
    /// The event that a task has to publish before any other.
    pub fn first_owed(&self, entry: &Entry) -> Option<Outgoing> {
        let task = entry.task();
        let owed = task.outbox.first()?.clone();
        Some(Outgoing { seq: owed.seq, at_usec: owed.at_usec, event: owed.event, task: task.clone() })
    }

    /// containerd has accepted a task's event.
    pub fn accepted(&self, entry: &Arc<Entry>, seq: u64) {
        fault::point(Point::PublishTaken);
        self.note_accepted(entry, seq);
        fault::point(Point::PublishNoted);
    }
}
