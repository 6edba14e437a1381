//! References to units, over the connection that holds them.

use async_trait::async_trait;

use crate::id::UnitName;
use crate::unit::error::{Error, call_error};
use crate::unit::systemd::References;

use super::Manager;

#[async_trait]
impl References for Manager {
    async fn reference(&self, unit: &UnitName) -> Result<(), Error> {
        let Some(refs) = &self.refs else {
            return Ok(());
        };
        let attempt = || async {
            let _turn = self.bus.turn().await;
            refs.reference(unit).await
        };
        self.bus.repeat(attempt).await.result.map_err(|error| call_error("reference", unit, error))
    }

    async fn release(&self, unit: &UnitName) {
        let Some(refs) = &self.refs else {
            return;
        };
        let attempt = || async {
            let _turn = self.bus.turn().await;
            refs.release(unit).await
        };
        if let Err(error) = self.bus.repeat(attempt).await.result {
            // The unit has no reference if the bus was restarted, or if the unit did not start.
            tracing::debug!(%unit, %error, "can't release {unit}: {error}");
        }
    }

    async fn make_room_for_references(&self, units: usize) {
        if let Some(refs) = &self.refs {
            refs.make_room(units).await;
        }
    }

    async fn forget_earlier_references(&self) {
        if let Some(refs) = &self.refs {
            refs.forget_earlier().await;
        }
    }
}
