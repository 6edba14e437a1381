//! The seam between the daemon and systemd: the calls that operations make.
//!
//! [`Manager`] makes them over D-Bus. Tests put a fake in its place. Calls of `start` and `serve` that concern no
//! task are not part of it.

use std::collections::HashSet;
use std::sync::Arc;

use async_trait::async_trait;

use crate::id::UnitName;

use super::annotation::{Additions, Types};
use super::error::Error;
use super::job::StartJob;
use super::main_process::MainProcess;
use super::manager::Manager;
use super::manager::query::Starting;
use super::manager::usage::Usage;
use super::properties::Properties;

/// What operations ask of systemd.
#[async_trait]
pub trait Systemd: Send + Sync {
    /// The types of a service's properties, as this systemd has them.
    ///
    /// # Errors
    /// systemd can't be asked.
    async fn property_types(&self) -> Result<Arc<Types>, Error>;

    /// Starts a transient unit and waits until its job has ended.
    ///
    /// # Errors
    /// [`Error::Exists`], a refusal, or [`Error::Job`] when the unit did not come up.
    async fn start_transient(&self, unit: &UnitName, properties: &Properties) -> Result<(), Error>;

    /// Asks for a transient unit to be started.
    ///
    /// # Errors
    /// [`Error::Exists`], or a refusal.
    async fn begin_transient(&self, unit: &UnitName, properties: &Properties) -> Result<StartJob, Error>;

    /// As [`Self::begin_transient`], with more properties, which come last, and with a reference to the unit:
    /// it stays loaded, and tells how its process ended, until [`Self::release`].
    ///
    /// # Errors
    /// As [`Self::begin_transient`].
    async fn begin_referenced(
        &self,
        unit: &UnitName,
        properties: &Properties,
        additions: &Additions,
    ) -> Result<StartJob, Error>;

    /// Resolves when a unit that was asked for is up, by the rule of its type.
    ///
    /// # Errors
    /// [`Error::Job`] when it did not come up.
    async fn done(&self, job: StartJob) -> Result<(), Error>;

    /// Resolves when a unit that an earlier daemon has asked for is up.
    ///
    /// # Errors
    /// [`Error::Job`] when it did not come up.
    async fn up(&self, unit: &UnitName) -> Result<(), Error>;

    /// Refers to a unit that an earlier daemon has started, or that was referred to over a bus that is gone.
    async fn refer_to(&self, unit: &UnitName);

    /// Gives a reference back: systemd unloads the unit when it is stopped.
    async fn release(&self, unit: &UnitName);

    /// Stops a unit and waits until it is down. A unit that is not loaded is down.
    ///
    /// # Errors
    /// A refusal, or [`Error::Job`].
    async fn stop(&self, unit: &UnitName) -> Result<(), Error>;

    /// Asks for a unit to be stopped, and does not wait for it.
    ///
    /// # Errors
    /// A refusal.
    async fn stop_without_waiting(&self, unit: &UnitName) -> Result<(), Error>;

    /// Makes systemd forget that a unit has failed. A unit that is not loaded needs no such thing.
    ///
    /// # Errors
    /// A refusal.
    async fn reset_failed(&self, unit: &UnitName) -> Result<(), Error>;

    /// Frees the name of a transient unit that has ended and that another unit names. False for a unit that
    /// belongs to somebody else.
    ///
    /// # Errors
    /// A refusal.
    async fn free_name(&self, unit: &UnitName) -> Result<bool, Error>;

    /// Makes systemd forget the job that a unit has, if it has one. The unit stays as it is.
    ///
    /// # Errors
    /// A refusal.
    async fn forget_job(&self, unit: &UnitName) -> Result<(), Error>;

    /// Sends a signal to every process of a unit. A unit that is not loaded has none.
    ///
    /// # Errors
    /// A refusal.
    async fn kill_all(&self, unit: &UnitName, signal: i32) -> Result<(), Error>;

    /// Freezes all processes of a unit; resolves when they are frozen.
    ///
    /// # Errors
    /// A refusal: the unit is not active, or has a job.
    async fn freeze(&self, unit: &UnitName) -> Result<(), Error>;

    /// Thaws all processes of a unit. One that is not frozen, or not loaded, is fine.
    ///
    /// # Errors
    /// A refusal: its slice is frozen (257).
    async fn thaw(&self, unit: &UnitName) -> Result<(), Error>;

    /// Sets properties of a unit that runs; resolves when its cgroup shows them.
    ///
    /// # Errors
    /// A refusal, which names the property.
    async fn set_properties(&self, unit: &UnitName, properties: &Properties) -> Result<(), Error>;

    /// The units of containers and execs whose main processes live.
    ///
    /// # Errors
    /// systemd can't be asked.
    async fn living(&self) -> Result<HashSet<UnitName>, Error>;

    /// The state of a unit: `active`, `failed`, …; nothing if it is not loaded.
    ///
    /// # Errors
    /// systemd can't be asked.
    async fn active_state(&self, unit: &UnitName) -> Result<Option<String>, Error>;

    /// True if a service did not come up within `TimeoutStartSec=`. False if systemd can't be asked.
    async fn has_timed_out(&self, unit: &UnitName) -> bool;

    /// How far a unit has been started.
    ///
    /// # Errors
    /// systemd can't be asked.
    async fn starting(&self, unit: &UnitName) -> Result<Starting, Error>;

    /// The main process of a loaded service; nothing if it is not loaded.
    ///
    /// # Errors
    /// systemd can't be asked.
    async fn main_process(&self, unit: &UnitName) -> Result<Option<MainProcess>, Error>;

    /// What a unit has used since it was started.
    ///
    /// # Errors
    /// systemd can't be asked.
    async fn usage(&self, unit: &UnitName) -> Result<Usage, Error>;

    /// How many processes of a unit the kernel has killed for want of memory since the unit was started.
    ///
    /// # Errors
    /// systemd or the journal can't be asked.
    async fn oom_kills(&self, unit: &UnitName) -> Result<u64, Error>;

    /// How long a unit may take to stop, in microseconds.
    ///
    /// # Errors
    /// systemd can't be asked.
    async fn stop_limit(&self, unit: &UnitName) -> Result<u64, Error>;

    /// The rate limit of a unit's output in the journal: microseconds and lines, each 0 if it is not set.
    ///
    /// # Errors
    /// systemd can't be asked.
    async fn log_rate_limit(&self, unit: &UnitName) -> Result<(u64, u32), Error>;

    /// Nothing needs the references of earlier daemons any more.
    fn forget_earlier_references(&self);
}

#[async_trait]
impl Systemd for Manager {
    async fn property_types(&self) -> Result<Arc<Types>, Error> {
        Self::property_types(self).await
    }

    async fn start_transient(&self, unit: &UnitName, properties: &Properties) -> Result<(), Error> {
        Self::start_transient(self, unit, properties).await
    }

    async fn begin_transient(&self, unit: &UnitName, properties: &Properties) -> Result<StartJob, Error> {
        Self::begin_transient(self, unit, properties).await
    }

    async fn begin_referenced(
        &self,
        unit: &UnitName,
        properties: &Properties,
        additions: &Additions,
    ) -> Result<StartJob, Error> {
        Self::begin_referenced(self, unit, properties, additions).await
    }

    async fn done(&self, job: StartJob) -> Result<(), Error> {
        Self::done(self, job).await
    }

    async fn up(&self, unit: &UnitName) -> Result<(), Error> {
        Self::up(self, unit).await
    }

    async fn refer_to(&self, unit: &UnitName) {
        Self::refer_to(self, unit).await
    }

    async fn release(&self, unit: &UnitName) {
        Self::release(self, unit).await
    }

    async fn stop(&self, unit: &UnitName) -> Result<(), Error> {
        Self::stop(self, unit).await
    }

    async fn stop_without_waiting(&self, unit: &UnitName) -> Result<(), Error> {
        Self::stop_without_waiting(self, unit).await
    }

    async fn reset_failed(&self, unit: &UnitName) -> Result<(), Error> {
        Self::reset_failed(self, unit).await
    }

    async fn free_name(&self, unit: &UnitName) -> Result<bool, Error> {
        Self::free_name(self, unit).await
    }

    async fn forget_job(&self, unit: &UnitName) -> Result<(), Error> {
        Self::forget_job(self, unit).await
    }

    async fn kill_all(&self, unit: &UnitName, signal: i32) -> Result<(), Error> {
        Self::kill_all(self, unit, signal).await
    }

    async fn freeze(&self, unit: &UnitName) -> Result<(), Error> {
        Self::freeze(self, unit).await
    }

    async fn thaw(&self, unit: &UnitName) -> Result<(), Error> {
        Self::thaw(self, unit).await
    }

    async fn set_properties(&self, unit: &UnitName, properties: &Properties) -> Result<(), Error> {
        Self::set_properties(self, unit, properties).await
    }

    async fn living(&self) -> Result<HashSet<UnitName>, Error> {
        Self::living(self).await
    }

    async fn active_state(&self, unit: &UnitName) -> Result<Option<String>, Error> {
        Self::active_state(self, unit).await
    }

    async fn has_timed_out(&self, unit: &UnitName) -> bool {
        Self::has_timed_out(self, unit).await
    }

    async fn starting(&self, unit: &UnitName) -> Result<Starting, Error> {
        Self::starting(self, unit).await
    }

    async fn main_process(&self, unit: &UnitName) -> Result<Option<MainProcess>, Error> {
        Self::main_process(self, unit).await
    }

    async fn usage(&self, unit: &UnitName) -> Result<Usage, Error> {
        Self::usage(self, unit).await
    }

    async fn oom_kills(&self, unit: &UnitName) -> Result<u64, Error> {
        Self::oom_kills(self, unit).await
    }

    async fn stop_limit(&self, unit: &UnitName) -> Result<u64, Error> {
        Self::stop_limit(self, unit).await
    }

    async fn log_rate_limit(&self, unit: &UnitName) -> Result<(u64, u32), Error> {
        Self::log_rate_limit(self, unit).await
    }

    fn forget_earlier_references(&self) {
        Self::forget_earlier_references(self);
    }
}
