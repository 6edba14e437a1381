//! The types of properties, asked from systemd once.

use std::collections::HashMap;
use std::sync::Arc;

use crate::id::UnitName;

use super::annotation::Types;
use super::error::Error;
use super::name;
use super::proxy::Manager;
use super::reading::{SERVICE_INTERFACE, UNIT_INTERFACE};

impl Manager {
    /// The types of a service's properties, as this systemd has them on the daemon's own unit. One that
    /// comes with a newer systemd is not known, and left to systemd.
    ///
    /// # Errors
    /// systemd can't be asked.
    pub async fn property_types(&self) -> Result<Arc<Types>, Error> {
        let types = self.types.get_or_try_init(async || {
            let unit = UnitName::new(name::DAEMON_SERVICE).map_err(|error| {
                // It is a constant.
                Error::Unreachable { reason: error.to_string() }
            })?;
            let mut types = HashMap::new();
            for interface in [UNIT_INTERFACE, SERVICE_INTERFACE] {
                let all = self.get_all(&unit, interface).await?;
                let all = all.into_iter();
                types.extend(all.map(|(name, value)| (name, value.value_signature().to_string())));
            }
            Ok(Arc::new(Types(types)))
        });
        types.await.cloned()
    }
}
