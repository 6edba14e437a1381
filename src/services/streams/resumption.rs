//! The streams of processes of an earlier daemon: claimed during recovery, and opened again while this daemon serves calls.

use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures_util::{StreamExt, stream};
use tokio::time::timeout;
use tokio_util::sync::{CancellationToken, DropGuard};

use crate::id::ProcessKey;
use crate::services::{Entry, Error, Process};
use crate::session::fds::Claims;
use crate::session::{Plan, ReopenMode};
use crate::suspect;

use super::Streams;

/// How many processes get their streams back at the same time.
const AT_ONCE: usize = 8;
/// How long others wait for the streams of one process.
const LIMIT: Duration = Duration::from_secs(1);
/// How long others wait for the streams of all processes that do not answer.
const PATIENCE: Duration = Duration::from_secs(3);
/// Streams that answer do so within this time.
const USUAL: Duration = Duration::from_millis(50);
/// How long an operation waits for the streams of its process.
const OPERATION_LIMIT: Duration = Duration::from_secs(5);

/// The streams of a process that are to be opened again.
pub(crate) struct Resumption {
    process: Arc<Process>,
    work: Pin<Box<dyn Future<Output = ()> + Send>>,
}

impl Streams {
    /// After a restart: claims the daemon's ends of the streams of a process that lives, or that has left output in them.
    /// `None` if there are none.
    pub(crate) fn recover(
        self: &Arc<Self>,
        entry: &Arc<Entry>,
        process: &Arc<Process>,
    ) -> Option<Resumption> {
        let plan = self.plan(entry, process).ok()?;
        if !plan.has_streams() {
            return None;
        }
        let mode = if process.has_ended() { ReopenMode::Ended } else { ReopenMode::Running };
        if mode == ReopenMode::Ended && !self.fds.has(plan.wiring.store_number) {
            return None;
        }
        if self.fds.lacks(&plan.wiring) {
            // If this opened them again, the daemon would lack descriptors to answer calls. The process waits once its
            // pipes are full.
            tracing::warn!(process = %process.key, "{}: its streams wait for a daemon that can open more files", process.key);
            return None;
        }
        // Recovery drops what is not claimed.
        let claims = self.fds.claim_streams(plan.wiring.store_number);
        let done = note_resuming(process);
        let work = {
            let (this, entry, process) = (self.clone(), entry.clone(), process.clone());
            suspect::inherit(async move {
                let _done = done;
                if let Err(error) = this.resume(&entry, &process, plan, mode, claims).await {
                    tracing::warn!(process = %process.key, %error, "{}: can't reopen its streams: {error}", process.key);
                }
            })
        };
        Some(Resumption { process: process.clone(), work: Box::pin(work) })
    }

    /// Opens the streams of all these processes again, a few at a time.
    pub(crate) async fn resume_all(&self, all: Vec<Resumption>) {
        let patience = &Patience::new();
        let resume =
            async |Resumption { process, work }: Resumption| settle(&process.key, work, patience).await;
        stream::iter(all).for_each_concurrent(AT_ONCE, resume).await;
    }

    /// Reopens the streams of a process of an earlier daemon, and copies again.
    async fn resume(
        &self,
        entry: &Entry,
        process: &Process,
        plan: Plan,
        mode: ReopenMode,
        claims: Claims,
    ) -> Result<(), Error> {
        let opened = self.reopen_claimed(Arc::new(plan), mode, claims).await?;
        if opened.has_journal_copy() {
            // Nothing is dropped while the daemon does not know the limit.
            entry.init.live().journal_policy.set(0, u32::MAX);
            self.later.spawn(self.set_journal_policy(entry));
        }
        self.begin(entry, process, opened).await
    }
}

/// How long streams that do not answer may still delay others.
#[derive(Debug)]
struct Patience(Mutex<Duration>);

impl Patience {
    fn new() -> Self {
        Self(Mutex::new(PATIENCE))
    }

    fn limit(&self) -> Duration {
        (*self.left()).clamp(USUAL, LIMIT)
    }

    fn use_up(&self, time: Duration) {
        let mut left = self.left();
        *left = left.saturating_sub(time);
    }

    fn left(&self) -> MutexGuard<'_, Duration> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Waits until the streams of a process are open again. A container can keep its streams busy: others do not wait for it.
async fn settle(key: &ProcessKey, work: impl Future<Output = ()> + Send + 'static, patience: &Patience) {
    let limit = patience.limit();
    if timeout(limit, tokio::spawn(work)).await.is_err() {
        patience.use_up(limit);
        tracing::warn!(process = %key, "{key}: its streams do not answer, so its output waits until they do");
    }
}

/// Notes that the streams of a process are not open again yet, until the result is dropped.
fn note_resuming(process: &Process) -> DropGuard {
    let done = CancellationToken::new();
    process.live().resuming = Some(done.clone());
    done.drop_guard()
}

/// Waits until the streams of a process are open again after a restart.
pub(super) async fn resumed(process: &Process) {
    let resuming = process.live().resuming.clone();
    if let Some(done) = resuming {
        // A container can keep its streams busy, and is removed nevertheless.
        let _ = timeout(OPERATION_LIMIT, done.cancelled()).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::future::pending;

    use tokio::time::{Instant, sleep};

    use crate::id::{Namespace, TaskId, TaskKey};
    use crate::services::Delivery;
    use crate::services::streams::cancel_pumps;
    use crate::simulation::harness::{Step, World};

    fn key() -> ProcessKey {
        TaskKey::usual(Namespace::new("n").unwrap(), TaskId::new("web").unwrap()).init()
    }

    #[test]
    fn the_removal_of_a_process_waits_until_its_streams_are_open_again() {
        let world = World::new("resumption");
        world.take(&[Step::Create], Delivery::First).unwrap().unwrap();
        let init = world.init();
        let waited = world.live(move |shim| async move {
            let process = shim.tasks.process(&init).unwrap().1;
            let wait = async || {
                let begun = Instant::now();
                cancel_pumps(&process).await;
                begun.elapsed()
            };
            let without = wait().await;
            let done = note_resuming(&process);
            let never = wait().await;
            tokio::spawn(async move {
                sleep(LIMIT).await;
                drop(done);
            });
            [without, never, wait().await, wait().await]
        });
        assert_eq!(waited, Some([Duration::ZERO, OPERATION_LIMIT, LIMIT, Duration::ZERO]));
    }

    #[tokio::test(start_paused = true)]
    async fn streams_that_do_not_answer_delay_others_for_a_limited_time() {
        let (key, patience, begun) = (key(), Patience::new(), Instant::now());
        for _ in 0..20 {
            settle(&key, pending(), &patience).await;
        }
        assert_eq!(begun.elapsed(), PATIENCE + 17 * USUAL);
        // Those that answer soon are waited for nevertheless.
        let done = CancellationToken::new();
        let guard = done.clone().drop_guard();
        let soon = async move {
            sleep(USUAL / 2).await;
            drop(guard);
        };
        settle(&key, soon, &patience).await;
        assert!(done.is_cancelled());
    }
}
