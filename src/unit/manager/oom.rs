//! How many processes of a unit the kernel has killed because memory ran out, even after the unit's cgroup was removed.

use std::process::Stdio;

use tokio::process::Command;

use crate::id::UnitName;
use crate::unit::bus::{SERVICE_INTERFACE, UNIT_INTERFACE};
use crate::unit::error::Error;

use super::Manager;

/// systemd's message about processes that the kernel killed because memory ran out (sd-messages.h,
/// SD_MESSAGE_UNIT_OUT_OF_MEMORY). systemd checks for them whenever a process of the unit ends, before it handles that
/// end (manager.c, 252 to 262).
const MESSAGE_ID: &str = "fe6faa94e7774663a0da52717891d8ef";

impl Manager {
    /// How many processes the kernel has killed since the unit's start because memory ran out. Before version 259, systemd
    /// counts several that are killed at once as one.
    ///
    /// # Errors
    /// systemd or the journal can't be read.
    pub async fn oom_kills(&self, unit: &UnitName) -> Result<u64, Error> {
        if let Some(kills) = self.property::<u64>(unit, SERVICE_INTERFACE, "OOMKills").await? {
            return Ok(kills);
        }
        let invocation =
            self.property::<Vec<u8>>(unit, UNIT_INTERFACE, "InvocationID").await?.unwrap_or_default();
        let invocation: String = invocation.iter().map(|byte| format!("{byte:02x}")).collect();
        // After this, the journal contains what systemd has sent to it.
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
