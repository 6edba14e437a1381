//! What systemd knows of what a unit has used, also when its cgroup is gone.

use std::process::Stdio;

use tokio::process::Command;

use crate::id::UnitName;

use super::error::Error;
use super::proxy::Manager;
use super::reading::{SERVICE_INTERFACE, UNIT_INTERFACE};

/// What a unit has used.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Account {
    /// Processor time in microseconds.
    pub cpu_usec: u64,
    /// The most memory that was in use, in bytes; 0 if systemd does not tell (before 256).
    pub memory_peak: u64,
}

/// systemd's message about processes killed for want of memory (sd-messages.h, SD_MESSAGE_UNIT_OUT_OF_MEMORY). It looks for them whenever a
/// process of the unit ends, before it does anything about that (manager.c, 252 to 262).
const MESSAGE_ID: &str = "fe6faa94e7774663a0da52717891d8ef";

impl Manager {
    /// What a unit has used since it was started.
    ///
    /// # Errors
    /// systemd can't be asked.
    pub async fn account(&self, unit: &UnitName) -> Result<Account, Error> {
        let number = async |name| {
            let number = self.property::<u64>(unit, SERVICE_INTERFACE, name).await?;
            // Of what is not accounted for.
            Ok::<u64, Error>(number.filter(|number| *number != u64::MAX).unwrap_or_default())
        };
        Ok(Account {
            cpu_usec: number("CPUUsageNSec").await? / 1000,
            memory_peak: number("MemoryPeak").await?,
        })
    }

    /// How long a unit may take to stop, in microseconds.
    ///
    /// # Errors
    /// systemd can't be asked.
    pub async fn stop_limit(&self, unit: &UnitName) -> Result<u64, Error> {
        Ok(self.property(unit, SERVICE_INTERFACE, "TimeoutStopUSec").await?.unwrap_or_default())
    }

    /// The rate limit of a unit's output in the journal: microseconds and lines, each 0 if it is not set.
    ///
    /// # Errors
    /// systemd can't be asked.
    pub async fn log_rate_limit(&self, unit: &UnitName) -> Result<(u64, u32), Error> {
        let interval = self.property(unit, SERVICE_INTERFACE, "LogRateLimitIntervalUSec").await?;
        let burst = self.property(unit, SERVICE_INTERFACE, "LogRateLimitBurst").await?;
        Ok((interval.unwrap_or_default(), burst.unwrap_or_default()))
    }

    /// How many processes the kernel has killed for want of memory since the unit was started, also when its cgroup is gone. Before systemd 259 it
    /// tells of several at once as of one.
    ///
    /// # Errors
    /// systemd or the journal can't be asked.
    pub async fn oom_kills(&self, unit: &UnitName) -> Result<u64, Error> {
        if let Some(kills) = self.property::<u64>(unit, SERVICE_INTERFACE, "OOMKills").await? {
            return Ok(kills);
        }
        let invocation =
            self.property::<Vec<u8>>(unit, UNIT_INTERFACE, "InvocationID").await?.unwrap_or_default();
        let invocation: String = invocation.iter().map(|byte| format!("{byte:02x}")).collect();
        // What systemd has sent to the journal is in it after this.
        journalctl(&["--sync"]).await?;
        let matches = [format!("MESSAGE_ID={MESSAGE_ID}"), format!("INVOCATION_ID={invocation}")];
        let found = journalctl(&["--quiet", "--no-pager", "--output=cat", &matches[0], &matches[1]]).await?;
        Ok(found.lines().count() as u64)
    }
}

async fn journalctl(args: &[&str]) -> Result<String, Error> {
    let failed = |reason: String| Error::Journal { reason };
    let mut command = Command::new("journalctl");
    let output = command.args(args).stdin(Stdio::null()).kill_on_drop(true).output().await;
    let output = output.map_err(|error| failed(error.to_string()))?;
    if !output.status.success() {
        return Err(failed(String::from_utf8_lossy(&output.stderr).trim().to_owned()));
    }
    String::from_utf8(output.stdout).map_err(|error| failed(error.to_string()))
}
