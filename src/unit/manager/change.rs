//! Changing a unit that is loaded.

use async_trait::async_trait;

use crate::id::UnitName;
use crate::unit::error::{Error, call_error};
use crate::unit::properties::Properties;
use crate::unit::systemd::Changes;

use super::Manager;

#[async_trait]
impl Changes for Manager {
    async fn freeze(&self, unit: &UnitName) -> Result<(), Error> {
        let frozen = self.bus.call(|manager| async move { manager.freeze_unit(unit.as_str()).await }).await;
        frozen.map_err(|error| call_error("freeze", unit, error))
    }

    async fn thaw(&self, unit: &UnitName) -> Result<(), Error> {
        let thawed = self.bus.call(|manager| async move { manager.thaw_unit(unit.as_str()).await }).await;
        match thawed.map_err(|error| call_error("thaw", unit, error)) {
            Err(Error::NotLoaded { .. }) => Ok(()),
            thawed => thawed,
        }
    }

    async fn set_properties(&self, unit: &UnitName, properties: &Properties) -> Result<(), Error> {
        let set = self.bus.call(|manager| async move {
            manager.set_unit_properties(unit.as_str(), true, &properties.0).await
        });
        set.await.map_err(|error| call_error("set properties of", unit, error))?;
        // systemd writes the cgroup after the reply, and before it handles the next call (manager_loop, 252 to 262).
        self.supported_version().await.map(drop)
    }
}
