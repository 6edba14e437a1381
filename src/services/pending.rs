//! What is still to be written or published: the places of tasks on disk, records that could not be written, and events that
//! deleted tasks owe.

use std::collections::{HashMap, VecDeque};
use std::sync::{Mutex, PoisonError};

use tokio::sync::Notify;

use crate::store::OwedFile;

/// The place of a task on disk.
#[derive(Clone, Debug, Default)]
pub(crate) enum Stored {
    #[default]
    Record,
    /// The task is deleted, and its last events are in this file.
    Owed(OwedFile),
    /// As [`Self::Owed`], but the events could not be written to disk.
    OwedInMemory,
    /// The task is deleted, and owes nothing; or its Create was rolled back.
    Nowhere,
}

/// A task on disk.
#[derive(Debug, Default)]
pub(crate) struct OnDisk {
    pub(crate) stored: Stored,
    /// True if the record on disk is older than the task in memory. The background task of `supervise` writes it.
    pub(crate) is_unwritten: bool,
}

/// Tasks whose records could not be written. Each is in the queue once.
pub(crate) struct Unwritten<E> {
    entries: Mutex<VecDeque<E>>,
    /// Notified when an entry is added.
    pub(super) added: Notify,
}

impl<E> Default for Unwritten<E> {
    fn default() -> Self {
        Self { entries: Mutex::default(), added: Notify::new() }
    }
}

impl<E> Unwritten<E> {
    pub(super) fn push(&self, entry: E) {
        self.entries.lock().unwrap_or_else(PoisonError::into_inner).push_back(entry);
        self.added.notify_one();
    }

    pub(super) fn pop(&self) -> Option<E> {
        self.entries.lock().unwrap_or_else(PoisonError::into_inner).pop_front()
    }

    pub(super) fn count(&self) -> usize {
        self.entries.lock().unwrap_or_else(PoisonError::into_inner).len()
    }
}

/// How many deleted tasks of one containerd may owe it events. A containerd that was uninstalled never accepts them.
pub(super) const MOST_OWING: usize = 1024;

/// How many deleted tasks owe events, by the address of their containerd.
#[derive(Default)]
pub(crate) struct Owings(Mutex<HashMap<String, usize>>);

impl Owings {
    /// Counts one more task. False if there are too many.
    pub(crate) fn begin(&self, address: &str) -> bool {
        let mut counts = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let count = counts.entry(address.to_owned()).or_default();
        let fits = *count < MOST_OWING;
        *count += usize::from(fits);
        fits
    }

    /// The containerds that are owed events.
    pub(super) fn addresses(&self) -> Vec<String> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).keys().cloned().collect()
    }

    pub(super) fn end(&self, address: &str) {
        let mut counts = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(count) = counts.get_mut(address) {
            *count = count.saturating_sub(1);
            if *count == 0 {
                counts.remove(address);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_containerd_that_is_gone_leaves_room_for_the_others() {
        let owings = Owings::default();
        assert!((0..MOST_OWING).all(|_| owings.begin("/run/gone.sock")));
        assert!(!owings.begin("/run/gone.sock"));
        assert!(owings.begin("/run/containerd.sock"));
        owings.end("/run/gone.sock");
        assert!(owings.begin("/run/gone.sock"));
        owings.end("/run/containerd.sock");
        assert_eq!(owings.0.into_inner().unwrap().len(), 1);
    }
}
