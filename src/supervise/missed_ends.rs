//! Finds the ends of processes that systemd's signals have not reported.
//!
//! dbus-daemon drops a signal without notice if the queue of its receiver is too long, and any user of the machine can make the
//! daemon's queue long. So the daemon looks at its pidfds now and then: one poll(2), some 100 µs for 1,000 containers.

use std::collections::HashSet;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use futures_util::{StreamExt, stream};
use nix::poll::{PollFd, PollFlags};

use crate::id::ProcessKey;
use crate::services::Live;
use crate::services::process::has_ended;
use crate::services::registry::Found;
use crate::sys::poll;

use super::Units;
use super::systemd::MAX_QUERIES;

/// How often the daemon looks. A process counts at its second look, so its end is recorded within twice this time.
const INTERVAL: Duration = Duration::from_secs(10);

impl Units {
    /// Background task: queries the unit of each process that has ended, and whose end is still not recorded at the next look:
    /// the signal of systemd was lost. Never returns.
    pub async fn find_missed_ends(self: Arc<Self>) {
        let mut before: HashSet<ProcessKey> = HashSet::new();
        loop {
            tokio::time::sleep(INTERVAL).await;
            let ended = self.unrecorded_ends();
            let keys = ended.iter().map(|(_, process)| process.key.clone()).collect();
            let missed = ended.into_iter().filter(|(_, process)| before.contains(&process.key));
            let queries = stream::iter(missed).for_each_concurrent(MAX_QUERIES, |(entry, process)| {
                let this = &self;
                async move {
                    let key = &process.key;
                    tracing::info!(process = %key, "{key} has ended without a signal from systemd, so the daemon queries its unit");
                    this.query(&entry, &process).await;
                }
            });
            queries.await;
            before = keys;
        }
    }

    /// The processes that have ended, and whose ends are not recorded.
    pub(super) fn unrecorded_ends(&self) -> Vec<Found<Live>> {
        let (mut held, mut ended) = (Vec::<(Found<Live>, Arc<OwnedFd>)>::new(), Vec::new());
        for entry in self.tasks.registry.all() {
            for process in entry.processes() {
                let pid = {
                    let task = entry.task();
                    task.process(process.exec())
                        .filter(|process| process.is_alive())
                        .and_then(|process| process.pid())
                };
                let Some(pid) = pid else { continue };
                let pidfd = process.live().process.clone();
                match pidfd {
                    Some(pidfd) => held.push(((entry.clone(), process), pidfd)),
                    // It had ended when the daemon wanted to open its pidfd, or no pidfd could be opened.
                    None if has_ended(&entry.task(), pid) => ended.push((entry.clone(), process)),
                    None => {}
                }
            }
        }
        let mut polled: Vec<_> =
            held.iter().map(|(_, pidfd)| PollFd::new(pidfd.as_fd(), PollFlags::POLLIN)).collect();
        if let Err(error) = poll(&mut polled, Duration::ZERO) {
            tracing::warn!(%error, "can't look which processes have ended: {error}");
            return ended;
        }
        let is_over: Vec<bool> = polled.iter().map(|polled| polled.any().unwrap_or(false)).collect();
        ended.extend(held.into_iter().zip(is_over).filter_map(|((found, _), over)| over.then_some(found)));
        ended
    }
}
