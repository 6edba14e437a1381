//! The calls to systemd that operations make, as a trait.
//!
//! [`Manager`] makes them over D-Bus. Tests use a fake instead. Calls of `start` and `serve` that do not concern a task are
//! not part of the trait.

use std::collections::HashSet;
use std::sync::Arc;

use async_trait::async_trait;
use tokio::sync::oneshot;

use crate::id::UnitName;

use super::annotation::{Additions, Types};
use super::error::Error;
use super::job::StartJob;
use super::main_process::MainProcess;
use super::manager::Manager;
use super::manager::query::Starting;
use super::manager::usage::{JournalSettings, Usage};
use super::properties::Properties;

/// The calls to systemd that operations make.
#[async_trait]
pub trait Systemd: Send + Sync {
    /// The types of a service's properties in this version of systemd.
    ///
    /// # Errors
    /// systemd can't be reached.
    async fn property_types(&self) -> Result<Arc<Types>, Error>;

    /// Starts a transient unit and waits until its job has ended.
    ///
    /// # Errors
    /// [`Error::Exists`], a refusal, or [`Error::Job`] if the unit did not start.
    async fn start_transient(&self, unit: &UnitName, properties: &Properties) -> Result<(), Error>;

    /// Asks for a transient unit to be started.
    ///
    /// # Errors
    /// [`Error::Exists`], or a refusal.
    async fn begin_transient(&self, unit: &UnitName, properties: &Properties) -> Result<StartJob, Error>;

    /// As [`Self::begin_transient`], with additional properties, which come last, and with a reference to the unit:
    /// systemd keeps the unit loaded, with the exit of its process, until [`Self::release`].
    ///
    /// # Errors
    /// As [`Self::begin_transient`].
    async fn begin_referenced(
        &self,
        unit: &UnitName,
        properties: &Properties,
        additions: &Additions,
    ) -> Result<StartJob, Error>;

    /// Waits until a unit has started, by the rule of its type.
    ///
    /// # Errors
    /// [`Error::Job`] if the unit did not start.
    async fn wait_for_start(&self, job: StartJob) -> Result<(), Error>;

    /// Waits until a unit has started whose start an earlier daemon requested.
    ///
    /// # Errors
    /// [`Error::Job`] if the unit did not start.
    async fn wait_until_started(&self, unit: &UnitName) -> Result<(), Error>;

    /// Adds a reference to a unit that an earlier daemon started, or whose reference was lost with the bus. A unit that is
    /// not loaded needs none.
    ///
    /// # Errors
    /// systemd can't be reached, or refuses it.
    async fn reference(&self, unit: &UnitName) -> Result<(), Error>;

    /// Removes the reference to a unit: systemd unloads the unit once it is stopped.
    async fn release(&self, unit: &UnitName);

    /// Stops a unit and waits until it is stopped. A unit that is not loaded counts as stopped.
    ///
    /// # Errors
    /// A refusal, or [`Error::Job`].
    async fn stop(&self, unit: &UnitName) -> Result<(), Error>;

    /// As [`Self::stop`]. Sends to `accepted` once systemd has a job for it: from then on, systemd stops the unit whatever
    /// becomes of the daemon.
    async fn stop_accepted(&self, unit: &UnitName, accepted: oneshot::Sender<()>) -> Result<(), Error>;

    /// Asks for a unit to be stopped, and does not wait for it.
    ///
    /// # Errors
    /// A refusal.
    async fn stop_without_waiting(&self, unit: &UnitName) -> Result<(), Error>;

    /// Clears the failed state of a unit. A unit that is not loaded has none.
    ///
    /// # Errors
    /// A refusal.
    async fn reset_failed(&self, unit: &UnitName) -> Result<(), Error>;

    /// Frees the name of a transient unit that has ended but stays loaded, as another unit names it. Returns false for a
    /// unit that does not belong to this runtime.
    ///
    /// # Errors
    /// A refusal.
    async fn free_name(&self, unit: &UnitName) -> Result<bool, Error>;

    /// Cancels the job of a unit, if it has one. The unit keeps its state.
    ///
    /// # Errors
    /// A refusal.
    async fn cancel_start_job_of(&self, unit: &UnitName) -> Result<(), Error>;

    /// Sends a signal to every process of a unit. A unit that is not loaded has none.
    ///
    /// # Errors
    /// A refusal.
    async fn kill_all(&self, unit: &UnitName, signal: i32) -> Result<(), Error>;

    /// Freezes all processes of a unit; returns once they are frozen.
    ///
    /// # Errors
    /// A refusal: the unit is not active, or has a job.
    async fn freeze(&self, unit: &UnitName) -> Result<(), Error>;

    /// Thaws all processes of a unit. It is no error if the unit is not frozen, or not loaded.
    ///
    /// # Errors
    /// A refusal: its slice is frozen (257).
    async fn thaw(&self, unit: &UnitName) -> Result<(), Error>;

    /// Sets properties of a running unit; returns once its cgroup reflects them.
    ///
    /// # Errors
    /// A refusal, which names the property.
    async fn set_properties(&self, unit: &UnitName, properties: &Properties) -> Result<(), Error>;

    /// The units of containers and execs whose main processes run.
    ///
    /// # Errors
    /// systemd can't be reached.
    async fn running_units(&self) -> Result<HashSet<UnitName>, Error>;

    /// The state of a unit: `active`, `failed`, …, or `None` if it is not loaded. A unit whose start is queued counts as
    /// `activating`.
    ///
    /// # Errors
    /// systemd can't be reached.
    async fn active_state(&self, unit: &UnitName) -> Result<Option<String>, Error>;

    /// True if a service did not start within `TimeoutStartSec=`. False if systemd can't be reached.
    async fn has_timed_out(&self, unit: &UnitName) -> bool;

    /// Why systemd has not run the command of a service, in a sentence. `None` if that is not known.
    async fn obstacle(&self, unit: &UnitName) -> Option<String>;

    /// The settings in the drop-ins of a unit that restrict the OCI runtime, or end it, each with its file. `None` if there
    /// are none.
    async fn restrictions(&self, unit: &UnitName) -> Option<String>;

    /// How far the start of a unit is.
    ///
    /// # Errors
    /// systemd can't be reached.
    async fn starting(&self, unit: &UnitName) -> Result<Starting, Error>;

    /// The main process of a service, or `None` if the service is not loaded.
    ///
    /// # Errors
    /// systemd can't be reached.
    async fn main_process(&self, unit: &UnitName) -> Result<Option<MainProcess>, Error>;

    /// The ends of a unit's main processes that systemd has reported until its last answer, and that were not handled yet.
    async fn unhandled_ends(&self, unit: &UnitName) -> Vec<MainProcess>;

    /// As [`Systemd::main_process`], for a oneshot service whose main process has ended.
    ///
    /// # Errors
    /// systemd can't be reached.
    async fn ended_process(&self, unit: &UnitName) -> Result<Option<MainProcess>, Error>;

    /// The resources that a unit has used since its start.
    ///
    /// # Errors
    /// systemd can't be reached.
    async fn usage(&self, unit: &UnitName) -> Result<Usage, Error>;

    /// How many processes of a unit the kernel has killed since the unit's start because memory ran out.
    ///
    /// # Errors
    /// systemd or the journal can't be read.
    async fn oom_kills(&self, unit: &UnitName) -> Result<u64, Error>;

    /// How long a unit may take to stop, in microseconds.
    ///
    /// # Errors
    /// systemd can't be reached.
    async fn stop_limit(&self, unit: &UnitName) -> Result<u64, Error>;

    /// What the settings of a unit say about its output in the journal. `is_given`: it was started with such a property.
    ///
    /// # Errors
    /// systemd can't be reached.
    async fn journal_settings(&self, unit: &UnitName, is_given: bool) -> Result<JournalSettings, Error>;

    /// The slices of this runtime that are active.
    ///
    /// # Errors
    /// systemd can't be reached.
    async fn active_slices(&self) -> Result<Vec<UnitName>, Error>;

    /// Stops a slice and nothing else, if `is_free` still returns true while no unit is being started.
    ///
    /// # Errors
    /// A refusal, or [`Error::Job`].
    async fn stop_alone_if(
        &self,
        slice: &UnitName,
        is_free: &(dyn Fn() -> bool + Send + Sync),
    ) -> Result<(), Error>;

    /// Starts the slice that keeps the order of stops at shutdown, unless it is active.
    ///
    /// # Errors
    /// systemd can't be reached, or refuses it.
    async fn keep_order(&self) -> Result<(), Error>;

    /// Removes the references of earlier daemons if there is not enough room for theirs and for as many new ones.
    async fn make_room_for_references(&self, units: usize);

    /// Removes the references of earlier daemons, once this one has its own.
    async fn forget_earlier_references(&self);
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

    async fn wait_for_start(&self, job: StartJob) -> Result<(), Error> {
        Self::wait_for_start(self, job).await
    }

    async fn wait_until_started(&self, unit: &UnitName) -> Result<(), Error> {
        Self::wait_until_started(self, unit).await
    }

    async fn reference(&self, unit: &UnitName) -> Result<(), Error> {
        Self::reference(self, unit).await
    }

    async fn release(&self, unit: &UnitName) {
        Self::release(self, unit).await
    }

    async fn stop(&self, unit: &UnitName) -> Result<(), Error> {
        Self::stop(self, unit).await
    }

    async fn stop_accepted(&self, unit: &UnitName, accepted: oneshot::Sender<()>) -> Result<(), Error> {
        Self::stop_accepted(self, unit, accepted).await
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

    async fn cancel_start_job_of(&self, unit: &UnitName) -> Result<(), Error> {
        Self::cancel_start_job_of(self, unit).await
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

    async fn running_units(&self) -> Result<HashSet<UnitName>, Error> {
        Self::running_units(self).await
    }

    async fn active_state(&self, unit: &UnitName) -> Result<Option<String>, Error> {
        Self::active_state(self, unit).await
    }

    async fn has_timed_out(&self, unit: &UnitName) -> bool {
        Self::has_timed_out(self, unit).await
    }

    async fn obstacle(&self, unit: &UnitName) -> Option<String> {
        Self::obstacle(self, unit).await
    }

    async fn restrictions(&self, unit: &UnitName) -> Option<String> {
        Self::restrictions(self, unit).await
    }

    async fn starting(&self, unit: &UnitName) -> Result<Starting, Error> {
        Self::starting(self, unit).await
    }

    async fn main_process(&self, unit: &UnitName) -> Result<Option<MainProcess>, Error> {
        Self::main_process(self, unit).await
    }

    async fn unhandled_ends(&self, unit: &UnitName) -> Vec<MainProcess> {
        Self::unhandled_ends(self, unit).await
    }

    async fn ended_process(&self, unit: &UnitName) -> Result<Option<MainProcess>, Error> {
        Self::ended_process(self, unit).await
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

    async fn journal_settings(&self, unit: &UnitName, is_given: bool) -> Result<JournalSettings, Error> {
        Self::journal_settings(self, unit, is_given).await
    }

    async fn active_slices(&self) -> Result<Vec<UnitName>, Error> {
        Self::active_slices(self).await
    }

    async fn stop_alone_if(
        &self,
        slice: &UnitName,
        is_free: &(dyn Fn() -> bool + Send + Sync),
    ) -> Result<(), Error> {
        Self::stop_alone_if(self, slice, is_free).await
    }

    async fn keep_order(&self) -> Result<(), Error> {
        Self::keep_order(self).await
    }

    async fn make_room_for_references(&self, units: usize) {
        Self::make_room_for_references(self, units).await;
    }

    async fn forget_earlier_references(&self) {
        Self::forget_earlier_references(self).await;
    }
}
