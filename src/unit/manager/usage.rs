//! The resources that a unit has used, even after its cgroup was removed, and the limits that only systemd knows.

use crate::id::UnitName;
use crate::unit::bus::SERVICE_INTERFACE;
use crate::unit::error::Error;

use super::Manager;

/// The resources that a unit has used.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// Processor time in microseconds.
    pub cpu_usec: u64,
    /// The most memory that was in use, in bytes; 0 if systemd does not know it (before 256).
    pub memory_peak: u64,
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

    /// The rate limit of a unit's output in the journal: microseconds and lines, each 0 if it is not set.
    ///
    /// # Errors
    /// systemd can't be reached.
    pub async fn log_rate_limit(&self, unit: &UnitName) -> Result<(u64, u32), Error> {
        let interval = self.property(unit, SERVICE_INTERFACE, "LogRateLimitIntervalUSec").await?;
        let burst = self.property(unit, SERVICE_INTERFACE, "LogRateLimitBurst").await?;
        Ok((interval.unwrap_or_default(), burst.unwrap_or_default()))
    }
}
