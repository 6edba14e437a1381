//! The resources that a unit has used, even after its cgroup was removed, and the limits that only systemd knows.

use crate::id::UnitName;
use crate::unit::bus::SERVICE_INTERFACE;
use crate::unit::error::Error;
use crate::unit::policy;
use crate::unit::search_path::Directories;

use super::Manager;
use super::start::of_files;

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

impl Manager {
    /// The resources that a unit has used since its start.
    ///
    /// # Errors
    /// systemd can't be reached.
    pub async fn usage(&self, unit: &UnitName) -> Result<Usage, Error> {
        let number = async |name| {
            let number = self.property::<u64>(unit, SERVICE_INTERFACE, name).await?;
            // systemd reports the maximum for a resource that it does not account.
            Ok::<u64, Error>(number.filter(|number| *number != u64::MAX).unwrap_or_default())
        };
        Ok(Usage { cpu_usec: number("CPUUsageNSec").await? / 1000, memory_peak: number("MemoryPeak").await? })
    }

    /// How long a unit may take to stop, in microseconds.
    ///
    /// # Errors
    /// systemd can't be reached.
    pub async fn stop_limit(&self, unit: &UnitName) -> Result<u64, Error> {
        Ok(self.property(unit, SERVICE_INTERFACE, "TimeoutStopUSec").await?.unwrap_or_default())
    }

    /// What the settings of a unit say about its output in the journal. systemd is asked only if a drop-in has such a setting, or if
    /// the unit was started with such a property (`is_given`).
    ///
    /// # Errors
    /// systemd can't be reached.
    pub async fn journal_settings(&self, unit: &UnitName, is_given: bool) -> Result<JournalSettings, Error> {
        let look = |unit: &str| policy::sets_journal(&Directories::open_all(), unit).then_some(());
        if !is_given && of_files(unit, look).await.is_none() {
            return Ok(JournalSettings::default());
        }
        let interval = self.property(unit, SERVICE_INTERFACE, "LogRateLimitIntervalUSec").await?;
        let burst = self.property(unit, SERVICE_INTERFACE, "LogRateLimitBurst").await?;
        let fields = self.property(unit, SERVICE_INTERFACE, "LogExtraFields").await?;
        Ok(JournalSettings {
            interval_usec: interval.unwrap_or_default(),
            burst: burst.unwrap_or_default(),
            fields: fields.unwrap_or_default(),
        })
    }
}
