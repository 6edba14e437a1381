//! Changing a unit that is loaded.

use crate::id::UnitName;
use crate::unit::error::{Error, call_error};
use crate::unit::properties::Properties;

use super::Manager;

impl Manager {
    /// Freezes all processes of a unit; returns once they are frozen.
    ///
    /// # Errors
    /// A refusal: the unit is not active, or has a job.
    pub async fn freeze(&self, unit: &UnitName) -> Result<(), Error> {
        let frozen = self.bus.call(|manager| async move { manager.freeze_unit(unit.as_str()).await }).await;
        frozen.map_err(|error| call_error("freeze", unit, error))
    }

    /// Thaws all processes of a unit. It is no error if the unit is not frozen, or not loaded.
    ///
    /// # Errors
    /// A refusal: its slice is frozen (257).
    pub async fn thaw(&self, unit: &UnitName) -> Result<(), Error> {
        let thawed = self.bus.call(|manager| async move { manager.thaw_unit(unit.as_str()).await }).await;
        match thawed.map_err(|error| call_error("thaw", unit, error)) {
            Err(Error::NotLoaded { .. }) => Ok(()),
            thawed => thawed,
        }
    }

    /// Sets properties of a running unit; returns once the cgroup reflects them. They live in the transient unit's file
    /// and vanish with it.
    ///
    /// The cgroup of a frozen unit stays as it is until the unit is thawed (256, 257).
    ///
    /// # Errors
    /// A refusal, which names the property.
    pub async fn set_properties(&self, unit: &UnitName, properties: &Properties) -> Result<(), Error> {
        let set = self.bus.call(|manager| async move {
            manager.set_unit_properties(unit.as_str(), true, &properties.0).await
        });
        set.await.map_err(|error| call_error("set properties of", unit, error))?;
        // systemd writes the cgroup after the reply, and before it handles the next call (manager_loop, 252 to 262).
        self.supported_version().await.map(drop)
    }
}
