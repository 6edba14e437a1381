//! The slices of containers, and the slice that keeps the order of stops at shutdown.

use async_trait::async_trait;

use crate::id::UnitName;
use crate::unit::error::{Error, call_error, unreachable};
use crate::unit::systemd::Slices;
use crate::unit::{name, properties};

use super::{Manager, START};

/// With this mode, systemd starts the slice that keeps the order at once. In another mode its job would wait for the jobs of the
/// services that the slice is ordered after, and the start of each container for the job of the slice.
const MODE: &str = "ignore-dependencies";

#[async_trait]
impl Slices for Manager {
    async fn active_slices(&self) -> Result<Vec<UnitName>, Error> {
        let (outer, inner) =
            (format!("{}.slice", name::PREFIX.trim_end_matches('-')), format!("{}*.slice", name::PREFIX));
        let patterns = [outer.as_str(), inner.as_str()];
        let listed = self
            .bus
            .call(|manager| async move { manager.list_units_by_patterns(&["active"], &patterns).await });
        let listed = listed.await.map_err(unreachable)?;
        Ok(listed.into_iter().filter_map(|(unit, ..)| UnitName::new(unit).ok()).collect())
    }

    async fn stop_alone_if(
        &self,
        slice: &UnitName,
        is_free: &(dyn Fn() -> bool + Send + Sync),
    ) -> Result<(), Error> {
        let _alone = self.slices.write().await;
        if !is_free() {
            return Ok(());
        }
        self.stop_as(slice, "ignore-dependencies", None).await
    }

    async fn keep_order(&self) -> Result<(), Error> {
        let unit = name::order_slice();
        let (name, properties) = (unit.as_str(), properties::order_slice());
        let list = properties.0.as_slice();
        let begun = self
            .bus
            .call(|manager| async move { manager.start_transient_unit(name, MODE, list, &[]).await })
            .await;
        let begun = match begun.map_err(|error| call_error(START, &unit, error)) {
            // Somebody may have stopped the slice while units named it, so that it stays loaded. For a slice that is active,
            // systemd does nothing.
            Err(Error::Exists { .. }) => {
                let again = self.bus.call(|manager| async move { manager.start_unit(name, MODE).await });
                again.await.map_err(|error| call_error(START, &unit, error))
            }
            begun => begun,
        };
        begun.map(drop)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::unit::fake_bus::{DENIED, FakeBus};

    const EXISTS: &str = "org.freedesktop.systemd1.UnitExists";

    async fn manager<const N: usize>(
        errors: [(&'static str, &'static str); N],
    ) -> (std::sync::Arc<FakeBus>, Manager) {
        let (bus, connection) = FakeBus::start(errors).await;
        let job = zbus::OwnedObjectPath::try_from("/org/freedesktop/systemd1/job/3").unwrap();
        bus.answer("StartTransientUnit", &job);
        bus.answer("StartUnit", &job);
        let manager = Manager::default();
        manager.bus.connected(connection);
        (bus, manager)
    }

    #[tokio::test]
    async fn the_slice_is_made_once_and_started_again_if_it_was_stopped() {
        let (bus, manager) = manager([]).await;
        manager.keep_order().await.unwrap();
        assert_eq!((bus.calls("StartTransientUnit"), bus.calls("StartUnit")), (1, 0));
        let (bus, manager) = self::manager([("StartTransientUnit", EXISTS)]).await;
        manager.keep_order().await.unwrap();
        assert_eq!((bus.calls("StartTransientUnit"), bus.calls("StartUnit")), (1, 1));
    }

    #[tokio::test]
    async fn a_refusal_is_an_error() {
        for errors in
            [[("StartTransientUnit", DENIED); 2], [("StartTransientUnit", EXISTS), ("StartUnit", DENIED)]]
        {
            let (_bus, manager) = manager(errors).await;
            assert!(matches!(
                manager.keep_order().await,
                Err(Error::Refused { .. } | Error::Unreachable { .. })
            ));
        }
    }
}
