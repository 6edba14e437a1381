//! Queries about units that are loaded.

use std::collections::{HashMap, HashSet};

use zbus::{OwnedObjectPath, OwnedVariant};

use crate::id::UnitName;
use crate::unit::bus::{SERVICE_INTERFACE, SystemdManagerProxy, UNIT_INTERFACE};
use crate::unit::error::{Error, call_error, unreachable};
use crate::unit::main_process::MainProcess;
use crate::unit::name;

use super::Manager;

const JOB_INTERFACE: &str = "org.freedesktop.systemd1.Job";
const UNKNOWN_PROPERTY: &str = "org.freedesktop.DBus.Error.UnknownProperty";

#[zbus::proxy(interface = "org.freedesktop.DBus.Properties", default_service = "org.freedesktop.systemd1")]
trait UnitProperties {
    fn get_all(&self, interface: &str) -> zbus::Result<HashMap<String, OwnedVariant>>;
    fn get(&self, interface: &str, name: &str) -> zbus::Result<OwnedVariant>;
}

/// Where a oneshot service is in being started.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Starting {
    /// There is no such unit.
    NotBegun,
    /// It is about to run, or runs.
    UnderWay,
    /// It has run.
    Over,
}

/// What a loaded unit is at, read at once.
pub(super) struct UnitState {
    /// `active`, `failed`, …
    pub(super) active: String,
    /// Its job, if it has one.
    pub(super) job: Option<(u32, OwnedObjectPath)>,
}

impl Manager {
    /// The units of containers and execs whose main processes live, told at once: reading them one by one
    /// takes milliseconds each.
    ///
    /// # Errors
    /// systemd can't be asked.
    pub async fn living(&self) -> Result<HashSet<UnitName>, Error> {
        let pattern = format!("{}*.service", name::PREFIX);
        let listed = self.bus.call(|manager| {
            let pattern = pattern.as_str();
            async move { manager.list_units_by_patterns(&[], &[pattern]).await }
        });
        let listed = listed.await.map_err(unreachable)?;
        // A container's is `running`, an exec's, of Type=oneshot, is in `start` for as long as it lives.
        let living =
            listed.into_iter().filter(|(_, _, _, _, sub, ..)| matches!(sub.as_str(), "running" | "start"));
        Ok(living.filter_map(|(unit, ..)| UnitName::new(unit).ok()).collect())
    }

    /// The slices of namespaces that are active, and the one that they are in.
    ///
    /// # Errors
    /// systemd can't be asked.
    pub async fn active_slices(&self) -> Result<Vec<UnitName>, Error> {
        let (outer, inner) =
            (format!("{}.slice", name::PREFIX.trim_end_matches('-')), format!("{}*.slice", name::PREFIX));
        let patterns = [outer.as_str(), inner.as_str()];
        let listed = self
            .bus
            .call(|manager| async move { manager.list_units_by_patterns(&["active"], &patterns).await });
        let listed = listed.await.map_err(unreachable)?;
        Ok(listed.into_iter().filter_map(|(unit, ..)| UnitName::new(unit).ok()).collect())
    }

    /// The type of the job that a unit has: `start`, `stop`, `restart`, …
    ///
    /// # Errors
    /// systemd can't be asked.
    pub async fn job_type(&self, unit: &UnitName) -> Result<Option<String>, Error> {
        let Some((_, path)) = self.unit_state(unit).await?.and_then(|state| state.job) else {
            return Ok(None);
        };
        Ok(text(&self.get_all_at(unit, path.as_str(), JOB_INTERFACE).await?, "JobType"))
    }

    /// The state of a unit: `active`, `failed`, …; nothing if it is not loaded.
    ///
    /// # Errors
    /// systemd can't be asked.
    pub async fn active_state(&self, unit: &UnitName) -> Result<Option<String>, Error> {
        Ok(self.unit_state(unit).await?.map(|state| state.active))
    }

    pub(super) async fn unit_state(&self, unit: &UnitName) -> Result<Option<UnitState>, Error> {
        let all = self.get_all(unit, UNIT_INTERFACE).await?;
        // Asking for a unit that is not loaded loads an empty one and answers for that.
        if text(&all, "LoadState").as_deref() == Some("not-found") {
            return Ok(None);
        }
        let job = all.get("Job").and_then(|job| <(u32, OwnedObjectPath)>::try_from(job.clone()).ok());
        let job = job.filter(|(id, _)| *id != 0);
        Ok(text(&all, "ActiveState").map(|active| UnitState { active, job }))
    }

    /// Where a unit is in being started.
    ///
    /// # Errors
    /// systemd can't be asked.
    pub async fn starting(&self, unit: &UnitName) -> Result<Starting, Error> {
        let Some(UnitState { active, job }) = self.unit_state(unit).await? else {
            return Ok(Starting::NotBegun);
        };
        Ok(match active.as_str() {
            "activating" => Starting::UnderWay,
            // Its job waits for its turn.
            "inactive" if job.is_some() => Starting::UnderWay,
            _ => Starting::Over,
        })
    }

    /// A service did not come up, as it took longer than `TimeoutStartSec=`. False if systemd can't be asked.
    pub async fn has_timed_out(&self, unit: &UnitName) -> bool {
        let result = self.property::<String>(unit, SERVICE_INTERFACE, "Result").await;
        matches!(result, Ok(Some(result)) if result == "timeout")
    }

    /// The main process of a loaded service; nothing if it is not loaded.
    ///
    /// # Errors
    /// systemd can't be asked.
    pub async fn main_process(&self, unit: &UnitName) -> Result<Option<MainProcess>, Error> {
        let all = self.get_all(unit, SERVICE_INTERFACE).await?;
        let main = MainProcess::default().updated(|name| all.get(name).map(|value| &**value));
        // A unit that is not loaded has no process, and looks as if it had not run.
        let is_loaded = main.last_pid != 0 || self.active_state(unit).await?.is_some();
        Ok(is_loaded.then_some(main))
    }

    /// One property of a unit; nothing if this systemd has none of that name and type.
    ///
    /// # Errors
    /// systemd can't be asked.
    pub(super) async fn property<T: TryFrom<OwnedVariant>>(
        &self,
        unit: &UnitName,
        interface: &str,
        name: &str,
    ) -> Result<Option<T>, Error> {
        let path = name::object_path(unit.as_str());
        let value = self.bus.call(|manager| {
            let path = path.as_str();
            async move { properties_at(&manager, path).await?.get(interface, name).await }
        });
        match value.await {
            Ok(value) => Ok(T::try_from(value).ok()),
            Err(zbus::Error::FDO(error)) if matches!(*error, zbus::fdo::Error::UnknownProperty(_)) => {
                Ok(None)
            }
            Err(zbus::Error::MethodError(name, ..)) if name.as_str() == UNKNOWN_PROPERTY => Ok(None),
            Err(error) => Err(call_error("read", unit, error)),
        }
    }

    pub(super) async fn get_all(
        &self,
        unit: &UnitName,
        interface: &str,
    ) -> Result<HashMap<String, OwnedVariant>, Error> {
        self.get_all_at(unit, &name::object_path(unit.as_str()), interface).await
    }

    async fn get_all_at(
        &self,
        unit: &UnitName,
        path: &str,
        interface: &str,
    ) -> Result<HashMap<String, OwnedVariant>, Error> {
        let all = self
            .bus
            .call(|manager| async move { properties_at(&manager, path).await?.get_all(interface).await });
        all.await.map_err(|error| call_error("read", unit, error))
    }
}

async fn properties_at<'p>(
    manager: &SystemdManagerProxy<'_>,
    path: &'p str,
) -> zbus::Result<UnitPropertiesProxy<'p>> {
    UnitPropertiesProxy::builder(manager.inner().connection())
        .cache_properties(zbus::proxy::CacheProperties::No)
        .path(path)
        .build()
        .await
}

fn text(values: &HashMap<String, OwnedVariant>, name: &str) -> Option<String> {
    values.get(name).and_then(|value| String::try_from(&**value).ok())
}
