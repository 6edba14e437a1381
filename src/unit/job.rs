//! Waiting for systemd's jobs.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::{mpsc, oneshot};
use zbus::OwnedObjectPath;

use crate::id::UnitName;

use super::error::Error;

/// A job that has ended, and its result.
type JobEnd = (OwnedObjectPath, String);

type Waiters = HashMap<UnitName, Vec<Waiter>>;

/// The other side of a [`JobWaiter`].
struct Waiter {
    ends: mpsc::UnboundedSender<JobEnd>,
    /// Used once.
    spawned: Option<oneshot::Sender<()>>,
}

/// Everything that waits for a job, by unit.
#[derive(Clone, Default)]
pub(super) struct Jobs(Arc<Mutex<Waiters>>);

impl Jobs {
    fn waiters(&self) -> MutexGuard<'_, Waiters> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Receives the ends of a unit's jobs. It must exist before the call that makes the job, or the job can end unnoticed.
    pub(super) fn wait_for(&self, unit: &UnitName) -> JobWaiter {
        let (ends, receiver) = mpsc::unbounded_channel();
        let (sender, spawned) = oneshot::channel();
        self.waiters().entry(unit.clone()).or_default().push(Waiter { ends, spawned: Some(sender) });
        JobWaiter { jobs: self.clone(), unit: unit.clone(), receiver, spawned: Some(spawned) }
    }

    /// Reports to all waiters of a unit that it has a main process.
    pub(super) fn spawned(&self, unit: &UnitName) {
        for waiter in self.waiters().get_mut(unit).into_iter().flatten() {
            // Not every waiter receives this.
            let _ = waiter.spawned.take().map(|waiter| waiter.send(()));
        }
    }

    /// Reports to all waiters of a unit that a job has ended.
    pub(super) fn ended(&self, unit: &UnitName, job: &OwnedObjectPath, result: &str) {
        for waiter in self.waiters().get(unit).into_iter().flatten() {
            // A waiter that is being dropped needs no report.
            let _ = waiter.ends.send((job.clone(), result.to_owned()));
        }
    }

    /// Removes the waiters of a unit that were dropped.
    fn sweep(&self, unit: &UnitName) {
        let mut jobs = self.waiters();
        if let Some(waiters) = jobs.get_mut(unit) {
            waiters.retain(|waiter| !waiter.ends.is_closed());
            if waiters.is_empty() {
                jobs.remove(unit);
            }
        }
    }

    /// Ends all waits with [`Error::Lost`]: the ends of current jobs may have been missed.
    pub(super) fn lose_all(&self) {
        self.waiters().clear();
    }
}

/// A unit that is being started.
pub struct StartJob {
    pub(super) waiter: JobWaiter,
    /// `None` if systemd did not answer the call.
    pub(super) job: Option<OwnedObjectPath>,
}

impl StartJob {
    /// Resolves to true once systemd reports the main process of the unit, for the first caller. False if the wait for the
    /// job ends before.
    pub fn spawned(&mut self) -> impl Future<Output = bool> + Send + use<> {
        let spawned = self.waiter.spawned.take();
        async move {
            match spawned {
                Some(spawned) => spawned.await.is_ok(),
                None => false,
            }
        }
    }
}

/// Waits for a job of one unit.
pub(super) struct JobWaiter {
    jobs: Jobs,
    unit: UnitName,
    receiver: mpsc::UnboundedReceiver<JobEnd>,
    spawned: Option<oneshot::Receiver<()>>,
}

impl JobWaiter {
    /// The unit that the job belongs to.
    pub(super) fn unit(&self) -> &UnitName {
        &self.unit
    }

    /// Waits until the job ends, or any job of the unit if `job` is `None`.
    pub(super) async fn ended(
        mut self,
        verb: &'static str,
        job: Option<OwnedObjectPath>,
    ) -> Result<(), Error> {
        let unit = self.unit.to_string();
        while let Some((ended, result)) = self.receiver.recv().await {
            if job.as_ref().is_none_or(|job| *job == ended) {
                return match result.as_str() {
                    "done" => Ok(()),
                    _ => Err(Error::Job { verb, unit, result }),
                };
            }
        }
        Err(Error::Lost { verb, unit })
    }
}

impl Drop for JobWaiter {
    fn drop(&mut self) {
        self.receiver.close();
        self.jobs.sweep(&self.unit);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_spawned_process_is_reported_once_and_not_after_the_wait_for_the_job() {
        let (jobs, unit) = (Jobs::default(), UnitName::new("a.service").unwrap());
        let start = || StartJob { waiter: jobs.wait_for(&unit), job: None };
        let (mut first, mut second) = (start(), start());
        let (spawned, again) = (first.spawned(), first.spawned());
        jobs.spawned(&UnitName::new("b.service").unwrap());
        jobs.spawned(&unit);
        jobs.spawned(&unit);
        assert!(spawned.await);
        assert!(!again.await);
        assert!(second.spawned().await);
        let mut third = start();
        let spawned = third.spawned();
        drop(third);
        assert!(!spawned.await);
    }

    #[test]
    fn a_dropped_waiter_leaves_nothing() {
        let (jobs, unit) = (Jobs::default(), UnitName::new("a.service").unwrap());
        let (first, second) = (jobs.wait_for(&unit), jobs.wait_for(&unit));
        drop(first);
        assert_eq!(jobs.waiters()[&unit].len(), 1);
        drop(second);
        assert!(jobs.waiters().is_empty());
    }
}
