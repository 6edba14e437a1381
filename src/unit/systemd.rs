//! The calls to systemd that operations make, as traits: one for each role, and [`Systemd`] for all of them.
//!
//! [`Manager`](super::manager::Manager) makes the calls over D-Bus, each trait in a file of its own. Tests use a fake instead. Calls
//! of `start` and `serve` that do not concern a task are not part of the traits.

use std::collections::HashSet;
use std::sync::Arc;

use async_trait::async_trait;
use tokio::sync::oneshot;

use crate::id::UnitName;

use super::annotation::{Additions, Types};
use super::error::Error;
use super::job::StartJob;
use super::main_process::MainProcess;
use super::properties::Properties;

/// How far the start of a oneshot service is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Starting {
    /// The unit does not exist.
    NotBegun,
    /// The process is about to run, or runs.
    UnderWay,
    /// The process has ended.
    Over,
}

/// True for the state of a unit that has been started (`ActiveState`, org.freedesktop.systemd1(5)) and has neither ended nor
/// failed.
pub fn is_under_way(state: &str) -> bool {
    !matches!(state, "inactive" | "failed")
}

/// The resources that a unit has used.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// Processor time in microseconds.
    pub cpu_usec: u64,
    /// The most memory that was in use, in bytes; 0 if systemd does not know it (before 256).
    pub memory_peak: u64,
}

/// What the settings of a unit say about its output in the journal.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct JournalSettings {
    /// The interval of the rate limit, in microseconds; 0 if it is not set.
    pub interval_usec: u64,
    /// The number of lines of the rate limit; 0 if it is not set.
    pub burst: u32,
    /// Fields of each line, `NAME=value`. They include those with which the unit was started.
    pub fields: Vec<Vec<u8>>,
}

/// All calls to systemd that operations make.
pub trait Systemd: Starts + Stops + Changes + Queries + Details + Obstacles + Slices + References {}

impl<T: Starts + Stops + Changes + Queries + Details + Obstacles + Slices + References> Systemd for T {}

/// Starting units, and waiting for their start jobs.
#[async_trait]
pub trait Starts: Send + Sync {
    /// Starts a transient unit and waits until its start job has ended.
    ///
    /// # Errors
    /// [`Error::Exists`], a refusal, or [`Error::Job`] if the unit did not start.
    async fn start_transient(&self, unit: &UnitName, properties: &Properties) -> Result<(), Error>;

    /// Asks for a transient unit to be started, and does not wait for it.
    ///
    /// # Errors
    /// [`Error::Exists`], or a refusal.
    async fn begin_transient(&self, unit: &UnitName, properties: &Properties) -> Result<StartJob, Error>;

    /// As [`Self::begin_transient`], with additional properties, which come last, and with a reference to the unit:
    /// systemd keeps the unit loaded, with the exit of its process, until [`References::release`].
    ///
    /// # Errors
    /// As [`Self::begin_transient`].
    async fn begin_referenced(
        &self,
        unit: &UnitName,
        properties: &Properties,
        additions: &Additions,
    ) -> Result<StartJob, Error>;

    /// Waits until a start job of this daemon has ended: the unit has started then, by the rule of its type.
    ///
    /// # Errors
    /// [`Error::Job`] if the unit did not start.
    async fn wait_for_start_job(&self, job: StartJob) -> Result<(), Error>;

    /// Waits until a unit has started whose start job an earlier daemon requested.
    ///
    /// # Errors
    /// [`Error::Job`] if the unit did not start.
    async fn wait_for_earlier_start_job(&self, unit: &UnitName) -> Result<(), Error>;
}

/// Stopping units, and what has to be done before a name can be used again.
#[async_trait]
pub trait Stops: Send + Sync {
    /// Stops a unit and waits until it is stopped. A unit that is not loaded counts as stopped.
    ///
    /// # Errors
    /// A refusal, or [`Error::Job`].
    async fn stop(&self, unit: &UnitName) -> Result<(), Error>;

    /// As [`Self::stop`]. Sends to `accepted` once systemd has a job for it: from then on, systemd stops the unit whatever
    /// becomes of the daemon.
    ///
    /// # Errors
    /// As [`Self::stop`].
    async fn stop_accepted(&self, unit: &UnitName, accepted: oneshot::Sender<()>) -> Result<(), Error>;

    /// Asks for a unit to be stopped, and does not wait for it.
    ///
    /// # Errors
    /// A refusal.
    async fn stop_without_waiting(&self, unit: &UnitName) -> Result<(), Error>;

    /// Cancels the start job of a unit, if it has one. The unit stays as it is. A stop job of somebody else, which may have
    /// replaced the start job, stays, too.
    ///
    /// # Errors
    /// A refusal.
    async fn cancel_start_job_of(&self, unit: &UnitName) -> Result<(), Error>;

    /// Sends a signal to every process of a unit. A unit that is not loaded has none.
    ///
    /// # Errors
    /// A refusal.
    async fn kill_all(&self, unit: &UnitName, signal: i32) -> Result<(), Error>;

    /// Clears the failed state of a unit. A unit that is not loaded has none.
    ///
    /// # Errors
    /// A refusal.
    async fn reset_failed(&self, unit: &UnitName) -> Result<(), Error>;

    /// Frees the name of a transient unit that has ended and that systemd can't unload, because another unit names it
    /// (`After=`, `Wants=`). Returns false for a unit that runs or that has a file elsewhere: it belongs to somebody else.
    ///
    /// # Errors
    /// A refusal.
    async fn free_name(&self, unit: &UnitName) -> Result<bool, Error>;
}

/// Changing a unit that is loaded.
#[async_trait]
pub trait Changes: Send + Sync {
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

    /// Sets properties of a running unit; returns once its cgroup reflects them. They live in the transient unit's file
    /// and vanish with it. The cgroup of a frozen unit stays as it is until the unit is thawed (256, 257).
    ///
    /// # Errors
    /// A refusal, which names the property.
    async fn set_properties(&self, unit: &UnitName, properties: &Properties) -> Result<(), Error>;
}

/// Queries about the states of units and their main processes.
#[async_trait]
pub trait Queries: Send + Sync {
    /// The units of containers and execs whose main processes run.
    ///
    /// # Errors
    /// systemd can't be reached.
    async fn running_units(&self) -> Result<HashSet<UnitName>, Error>;

    /// The state of a unit: `active`, `failed`, …, or `None` if it is not loaded. A unit whose start is queued counts as
    /// `activating`: systemd calls it `inactive` until the job runs.
    ///
    /// # Errors
    /// systemd can't be reached.
    async fn active_state(&self, unit: &UnitName) -> Result<Option<String>, Error>;

    /// True if a transient unit has this name that has neither ended nor failed, so that no other unit gets the name. systemd is
    /// asked only if it has a file of such a unit.
    ///
    /// # Errors
    /// systemd can't be reached.
    async fn is_taken(&self, unit: &UnitName) -> Result<bool, Error>;

    /// True if a service is loaded that has a command with these arguments, whatever its program is: an upgrade may have moved
    /// the program.
    ///
    /// # Errors
    /// systemd can't be reached.
    async fn has_command(&self, unit: &UnitName, arguments: &[String]) -> Result<bool, Error>;

    /// How far the start of a unit is.
    ///
    /// # Errors
    /// systemd can't be reached.
    async fn starting(&self, unit: &UnitName) -> Result<Starting, Error>;

    /// True if a service did not start within `TimeoutStartSec=`. False if systemd can't be reached.
    async fn has_timed_out(&self, unit: &UnitName) -> bool;

    /// The main process of a service, or `None` if the service is not loaded.
    ///
    /// # Errors
    /// systemd can't be reached.
    async fn main_process(&self, unit: &UnitName) -> Result<Option<MainProcess>, Error>;

    /// As [`Self::main_process`], for a oneshot service with one command whose main process has ended.
    ///
    /// # Errors
    /// systemd can't be reached.
    async fn ended_process(&self, unit: &UnitName) -> Result<Option<MainProcess>, Error>;

    /// The ends of a unit's main processes that systemd has reported until its last answer, and that were not handled yet.
    async fn unhandled_ends(&self, unit: &UnitName) -> Vec<MainProcess>;
}

/// What a unit has used, and what its settings are.
#[async_trait]
pub trait Details: Send + Sync {
    /// The resources that a unit has used since its start.
    ///
    /// # Errors
    /// systemd can't be reached.
    async fn usage(&self, unit: &UnitName) -> Result<Usage, Error>;

    /// How many processes of a unit the kernel has killed since the unit's start because memory ran out. Before version 259,
    /// systemd counts several that are killed at once as one, and this function counts no more than 1,000.
    ///
    /// # Errors
    /// systemd or the journal can't be read.
    async fn oom_kills(&self, unit: &UnitName) -> Result<u64, Error>;

    /// How long a unit may take to stop, in microseconds.
    ///
    /// # Errors
    /// systemd can't be reached.
    async fn stop_limit(&self, unit: &UnitName) -> Result<u64, Error>;

    /// What the settings of a unit say about its output in the journal. systemd is asked only if a drop-in has such a setting,
    /// or if the unit was started with such a property (`is_given`).
    ///
    /// # Errors
    /// systemd can't be reached.
    async fn journal_settings(&self, unit: &UnitName, is_given: bool) -> Result<JournalSettings, Error>;

    /// The types of a service's properties in this version of systemd. A property that the daemon's own unit does not show
    /// has no known type: systemd checks it.
    ///
    /// # Errors
    /// systemd can't be reached.
    async fn property_types(&self) -> Result<Arc<Types>, Error>;
}

/// What keeps a unit from running its command.
#[async_trait]
pub trait Obstacles: Send + Sync {
    /// Why systemd has not run the command of a service, in a sentence. `None` if that is not known.
    async fn obstacle(&self, unit: &UnitName) -> Option<String>;

    /// The settings in the drop-ins of a unit that restrict the OCI runtime, or end it, each with its file. `None` if there
    /// are none.
    async fn restrictions(&self, unit: &UnitName) -> Option<String>;
}

/// The slices of containers, and the slice that keeps the order of stops at shutdown.
#[async_trait]
pub trait Slices: Send + Sync {
    /// The active slices of namespaces and pods, and the slice that contains them.
    ///
    /// # Errors
    /// systemd can't be reached.
    async fn active_slices(&self) -> Result<Vec<UnitName>, Error>;

    /// Stops a slice and nothing else, if `is_free` still returns true while no unit is being started. systemd removes all
    /// cgroups below a slice that it stops, including the cgroup of a container that is being created.
    ///
    /// # Errors
    /// A refusal, or [`Error::Job`].
    async fn stop_alone_if(
        &self,
        slice: &UnitName,
        is_free: &(dyn Fn() -> bool + Send + Sync),
    ) -> Result<(), Error>;

    /// Asks for the slice that keeps the order of stops at shutdown to be started, unless it is active, and does not wait for
    /// it: containers that start before the slice are ordered after it, too.
    ///
    /// # Errors
    /// systemd can't be reached, or refuses it.
    async fn keep_order(&self) -> Result<(), Error>;
}

/// References to units, which keep a unit loaded, with the exit of its process.
#[async_trait]
pub trait References: Send + Sync {
    /// Adds a reference to a unit that an earlier daemon started, or whose reference was lost with the bus. A unit that is
    /// not loaded needs none.
    ///
    /// # Errors
    /// systemd can't be reached, or refuses it.
    async fn reference(&self, unit: &UnitName) -> Result<(), Error>;

    /// Releases a unit: removes the reference to it. systemd unloads the unit once it is stopped.
    async fn release(&self, unit: &UnitName);

    /// Releases the units of earlier daemons if there is not enough room for their references and for as many new ones.
    async fn make_room_for_references(&self, units: usize);

    /// Releases the units of earlier daemons, once this daemon has its own references.
    async fn forget_earlier_references(&self);
}
