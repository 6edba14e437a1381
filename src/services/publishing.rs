//! What calls and the publisher of events tell each other: a call is a reason to try a containerd again that could not be
//! reached, and a Delete waits until containerd has accepted the exit.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::{Notify, watch};

use crate::id::ExecId;

use super::{Entry, Tasks};

/// How long a Delete waits for containerd to accept events.
const ACCEPT_LIMIT: Duration = Duration::from_secs(2);

/// What the publisher and the calls know of each other.
#[derive(Default)]
pub struct Publishing {
    /// Counts the signs that a containerd runs: connections and calls.
    signs: watch::Sender<u64>,
    /// The containerds that can't be reached, by address: how many signs there were when the last attempt began.
    unreachable: Mutex<HashMap<String, u64>>,
    /// Notified when an event is accepted, and when an attempt to reach a containerd has failed.
    progress: Notify,
}

impl Publishing {
    /// A containerd has connected or called. Returns how many signs there are now.
    pub fn note_sign(&self) -> u64 {
        let mut count = 0;
        self.signs.send_modify(|signs| {
            *signs += 1;
            count = *signs;
        });
        count
    }

    /// Counts the signs that a containerd runs.
    pub fn signs(&self) -> watch::Receiver<u64> {
        self.signs.subscribe()
    }

    fn unreachable(&self) -> MutexGuard<'_, HashMap<String, u64>> {
        self.unreachable.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// An attempt to reach a containerd has failed. There were so many signs when it began.
    pub fn note_unreachable(&self, address: &str, signs: u64) {
        self.unreachable().insert(address.to_owned(), signs);
        self.progress.notify_waiters();
    }

    /// A containerd that could not be reached can be reached again.
    pub fn note_reachable(&self, address: &str) {
        self.unreachable().remove(address);
    }

    /// An event was accepted.
    pub(super) fn note_accepted(&self) {
        self.progress.notify_waiters();
    }

    /// Whether an attempt that began after this sign has failed.
    fn is_unreachable_since(&self, address: &str, sign: u64) -> bool {
        self.unreachable().get(address).is_some_and(|signs| *signs >= sign)
    }
}

impl Tasks {
    /// Waits until containerd has accepted the events of an exec, or all events of the task if `exec` is `None`. Gives up if
    /// containerd can't be reached or needs too long. A Delete calls this before it is answered: another process may get
    /// the id afterwards, and the client would take a late exit for the exit of that process.
    pub(crate) async fn await_accepted(&self, entry: &Entry, exec: Option<&ExecId>) {
        let (last, address) = {
            let task = entry.task();
            let Some(last) = task.outbox.last_of(exec) else {
                return;
            };
            (last, task.containerd.ttrpc_address.clone())
        };
        // A containerd that starts deletes tasks, one after the other, before it accepts events. So one failed attempt is
        // enough to answer. No client can call such a containerd: it accepts events before it accepts clients.
        let sign = self.publishing.note_sign();
        let accepted = async {
            loop {
                let progress = self.publishing.progress.notified();
                let is_owed = entry.task().outbox.first().is_some_and(|first| first.seq <= last);
                if !is_owed || self.publishing.is_unreachable_since(&address, sign) {
                    return;
                }
                progress.await;
            }
        };
        // After the limit, the Delete continues: the events stay in the record.
        let _ = tokio::time::timeout(ACCEPT_LIMIT, accepted).await;
    }
}
