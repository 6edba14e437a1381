//! Waiting for the ends of systemd's jobs.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::mpsc;
use zbus::OwnedObjectPath;

use crate::id::UnitName;

use super::error::Error;

/// A job that has ended, and its result.
type JobEnd = (OwnedObjectPath, String);

type Waiters = HashMap<UnitName, Vec<mpsc::UnboundedSender<JobEnd>>>;

/// Everything that waits for a job, by unit.
#[derive(Clone, Default)]
pub(super) struct Jobs(Arc<Mutex<Waiters>>);

impl Jobs {
    fn waiters(&self) -> MutexGuard<'_, Waiters> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Receives the ends of a unit's jobs. It must exist before the call that makes the job, or the job can end unnoticed.
    pub(super) fn wait_for(&self, unit: &UnitName) -> JobWaiter {
        let (sender, receiver) = mpsc::unbounded_channel();
        self.waiters().entry(unit.clone()).or_default().push(sender);
        JobWaiter { jobs: self.clone(), unit: unit.clone(), receiver }
    }

    /// Reports to all waiters of a unit that a job has ended.
    pub(super) fn ended(&self, unit: &UnitName, job: &OwnedObjectPath, result: &str) {
        for waiter in self.waiters().get(unit).into_iter().flatten() {
            // A waiter that is being dropped needs no report.
            let _ = waiter.send((job.clone(), result.to_owned()));
        }
    }

    /// Removes the waiters of a unit that were dropped.
    fn sweep(&self, unit: &UnitName) {
        let mut jobs = self.waiters();
        if let Some(waiters) = jobs.get_mut(unit) {
            waiters.retain(|waiter| !waiter.is_closed());
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

/// Waits for a job of one unit.
pub(super) struct JobWaiter {
    jobs: Jobs,
    unit: UnitName,
    receiver: mpsc::UnboundedReceiver<JobEnd>,
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
