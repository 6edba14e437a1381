//! systemd's jobs, and whoever waits for one to end.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::mpsc;
use zbus::OwnedObjectPath;

use crate::id::UnitName;

use super::error::Error;

/// A job's end, sent to whoever waits for a job of that unit.
type JobEnd = (OwnedObjectPath, String);

type Waiters = HashMap<UnitName, Vec<mpsc::UnboundedSender<JobEnd>>>;

/// Those that wait for jobs, by unit.
#[derive(Clone, Default)]
pub(super) struct Jobs(Arc<Mutex<Waiters>>);

impl Jobs {
    fn waiters(&self) -> MutexGuard<'_, Waiters> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Listens for the ends of a unit's jobs; made before the call, or the end may come first.
    pub(super) fn wait_for(&self, unit: &UnitName) -> JobWaiter {
        let (sender, receiver) = mpsc::unbounded_channel();
        self.waiters().entry(unit.clone()).or_default().push(sender);
        JobWaiter { jobs: self.clone(), unit: unit.clone(), receiver }
    }

    /// Tells them of an end.
    pub(super) fn ended(&self, unit: &UnitName, job: &OwnedObjectPath, result: &str) {
        for waiter in self.waiters().get(unit).into_iter().flatten() {
            // One that is about to go does not need it.
            let _ = waiter.send((job.clone(), result.to_owned()));
        }
    }

    /// Forgets those that no longer wait.
    fn sweep(&self, unit: &UnitName) {
        let mut jobs = self.waiters();
        if let Some(waiters) = jobs.get_mut(unit) {
            waiters.retain(|waiter| !waiter.is_closed());
            if waiters.is_empty() {
                jobs.remove(unit);
            }
        }
    }

    /// No more ends will be told of the jobs under way.
    pub(super) fn lose_all(&self) {
        self.waiters().clear();
    }
}

/// A unit that is being started.
pub struct StartJob {
    pub(super) waiter: JobWaiter,
    /// Not known if systemd went away before it could tell.
    pub(super) job: Option<OwnedObjectPath>,
}

/// Waits for a job of one unit.
pub(super) struct JobWaiter {
    jobs: Jobs,
    unit: UnitName,
    receiver: mpsc::UnboundedReceiver<JobEnd>,
}

impl JobWaiter {
    /// Whose job it is.
    pub(super) fn unit(&self) -> &UnitName {
        &self.unit
    }

    /// Resolves when that job ends; with any one of the unit if it is not known which.
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
    fn nothing_is_kept_of_those_who_have_waited() {
        let (jobs, unit) = (Jobs::default(), UnitName::new("a.service").unwrap());
        let (first, second) = (jobs.wait_for(&unit), jobs.wait_for(&unit));
        drop(first);
        assert_eq!(jobs.waiters()[&unit].len(), 1);
        drop(second);
        assert!(jobs.waiters().is_empty());
    }
}
