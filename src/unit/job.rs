//! systemd's jobs, and whoever waits for one to end.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};

use tokio::sync::mpsc;
use zbus::OwnedObjectPath;

use crate::id::UnitName;

use super::error::Error;

/// A job's end, sent to whoever waits for a job of that unit.
type JobEnd = (OwnedObjectPath, String);

/// Those that wait for jobs, by unit.
#[derive(Default)]
pub(super) struct Jobs(Mutex<HashMap<UnitName, Vec<mpsc::UnboundedSender<JobEnd>>>>);

impl Jobs {
    /// Listens for the ends of a unit's jobs; made before the call, or the end may come first.
    pub(super) fn wait_for(&self, unit: &UnitName) -> JobWaiter {
        let (sender, receiver) = mpsc::unbounded_channel();
        let mut jobs = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        jobs.entry(unit.clone()).or_default().push(sender);
        JobWaiter { unit: unit.clone(), receiver }
    }

    /// Tells them of an end.
    pub(super) fn ended(&self, unit: &UnitName, job: &OwnedObjectPath, result: &str) {
        let mut jobs = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(waiters) = jobs.get_mut(unit) {
            waiters.retain(|waiter| waiter.send((job.clone(), result.to_owned())).is_ok());
            if waiters.is_empty() {
                jobs.remove(unit);
            }
        }
    }

    /// Forgets those that no longer wait: their call failed before there was a job.
    pub(super) fn sweep(&self) {
        let mut jobs = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        jobs.retain(|_, waiters| {
            waiters.retain(|waiter| !waiter.is_closed());
            !waiters.is_empty()
        });
    }

    /// No more ends will be told of the jobs under way.
    pub(super) fn lose_all(&self) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clear();
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
