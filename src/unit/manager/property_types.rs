//! The types of properties, read from systemd once.

use std::collections::HashMap;
use std::sync::Arc;

use crate::unit::annotation::Types;
use crate::unit::bus::{SERVICE_INTERFACE, UNIT_INTERFACE};
use crate::unit::error::Error;
use crate::unit::name;

use super::Manager;

impl Manager {
    /// The types of a service's properties in this version of systemd, read from the daemon's own unit. A property that
    /// the unit does not show has no known type: systemd checks it.
    ///
    /// # Errors
    /// systemd can't be reached.
    pub async fn property_types(&self) -> Result<Arc<Types>, Error> {
        let types = self.types.get_or_try_init(async || {
            let unit = name::daemon_service();
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
