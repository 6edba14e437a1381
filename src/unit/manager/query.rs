//! Queries about units that are loaded.

use std::collections::{HashMap, HashSet};
use std::time::Duration;

use async_trait::async_trait;
use tokio::time::timeout;
use zbus::{OwnedObjectPath, OwnedVariant};

use crate::id::UnitName;
use crate::unit::bus::{SERVICE_INTERFACE, SystemdManagerProxy, UNIT_INTERFACE};
use crate::unit::error::{Error, call_error, unreachable};
use crate::unit::main_process::{Command, MainProcess};
use crate::unit::name;
use crate::unit::search_path;
use crate::unit::systemd::{Queries, Starting, is_under_way};

use super::Manager;

const JOB_INTERFACE: &str = "org.freedesktop.systemd1.Job";
/// How long [`Queries::unhandled_ends`] waits until the signals that have arrived are read.
const BACKLOG_LIMIT: Duration = Duration::from_secs(2);
const UNKNOWN_PROPERTY: &str = "org.freedesktop.DBus.Error.UnknownProperty";

#[zbus::proxy(interface = "org.freedesktop.DBus.Properties", default_service = "org.freedesktop.systemd1")]
trait UnitProperties {
    fn get_all(&self, interface: &str) -> zbus::Result<HashMap<String, OwnedVariant>>;
    fn get(&self, interface: &str, name: &str) -> zbus::Result<OwnedVariant>;
}

/// The state of a loaded unit, read in one call.
pub(super) struct UnitState {
    /// `active`, `failed`, …
    pub(super) active: String,
    /// `running`, `auto-restart`, …
    sub: String,
    /// The unit's job, if it has one.
    pub(super) job: Option<(u32, OwnedObjectPath)>,
}

#[async_trait]
impl Queries for Manager {
    async fn running_units(&self) -> Result<HashSet<UnitName>, Error> {
        // In one call: reading each unit takes milliseconds.
        let pattern = format!("{}*.service", name::PREFIX);
        let listed = self.bus.call(|manager| {
            let pattern = pattern.as_str();
            async move { manager.list_units_by_patterns(&[], &[pattern]).await }
        });
        let listed = listed.await.map_err(unreachable)?;
        // A running container is in the state `running`, a running exec (Type=oneshot) in `start`.
        let living =
            listed.into_iter().filter(|(_, _, _, _, sub, ..)| matches!(sub.as_str(), "running" | "start"));
        Ok(living.filter_map(|(unit, ..)| UnitName::new(unit).ok()).collect())
    }

    async fn active_state(&self, unit: &UnitName) -> Result<Option<String>, Error> {
        Ok(self.unit_state(unit).await?.map(|UnitState { active, job, .. }| match job {
            Some(_) if active == "inactive" => "activating".to_owned(),
            _ => active,
        }))
    }

    async fn is_taken(&self, unit: &UnitName) -> Result<bool, Error> {
        Ok(search_path::has_transient_file(unit)
            && self.active_state(unit).await?.is_some_and(|state| is_under_way(&state)))
    }

    async fn has_command(&self, unit: &UnitName, arguments: &[String]) -> Result<bool, Error> {
        // systemd answers for a unit that is not loaded as well: it has no command.
        let commands = self.commands(unit).await?;
        Ok(commands.iter().any(|(_, command, ..)| command.get(1..) == Some(arguments)))
    }

    async fn starting(&self, unit: &UnitName) -> Result<Starting, Error> {
        Ok(match self.active_state(unit).await?.as_deref() {
            None => Starting::NotBegun,
            Some("activating") => Starting::UnderWay,
            Some(_) => Starting::Over,
        })
    }

    async fn has_timed_out(&self, unit: &UnitName) -> bool {
        let result = self.property::<String>(unit, SERVICE_INTERFACE, "Result").await;
        matches!(result, Ok(Some(result)) if result == "timeout")
    }

    async fn main_process(&self, unit: &UnitName) -> Result<Option<MainProcess>, Error> {
        let all = self.get_all(unit, SERVICE_INTERFACE).await?;
        let main = MainProcess::default().updated(|name| all.get(name).map(|value| &**value));
        // A unit that is not loaded looks like one that has not run.
        let is_loaded = main.last_pid.is_some() || self.active_state(unit).await?.is_some();
        Ok(is_loaded.then_some(main))
    }

    async fn ended_process(&self, unit: &UnitName) -> Result<Option<MainProcess>, Error> {
        // All properties of a service cost systemd, the bus and the daemon some ten times as much as this one.
        match &self.commands(unit).await?[..] {
            [command] if let Some(ended) = MainProcess::ended_command(command) => Ok(Some(ended)),
            _ => self.main_process(unit).await,
        }
    }

    async fn unhandled_ends(&self, unit: &UnitName) -> Vec<MainProcess> {
        if timeout(BACKLOG_LIMIT, self.backlog.read()).await.is_err() {
            tracing::warn!(%unit, "signals arrive faster than the daemon reads them, so a report about the end of {unit} may be missed");
        }
        self.observations.unhandled_ends(unit)
    }
}

impl Manager {
    /// True if the machine shuts down.
    ///
    /// # Errors
    /// systemd can't be reached.
    pub async fn is_shutting_down(&self) -> Result<bool, Error> {
        let state = self.bus.call(|manager| async move { manager.system_state().await }).await;
        Ok(state.map_err(unreachable)? == "stopping")
    }

    /// The type of a unit's job: `start`, `stop`, `restart`, …, or `None` if it has no job.
    ///
    /// # Errors
    /// systemd can't be reached.
    pub async fn job_type(&self, unit: &UnitName) -> Result<Option<String>, Error> {
        let Some((_, path)) = self.unit_state(unit).await?.and_then(|state| state.job) else {
            return Ok(None);
        };
        self.job_type_at(unit, &path).await
    }

    /// The type of a job of a unit, or `None` if it has ended.
    pub(super) async fn job_type_at(
        &self,
        unit: &UnitName,
        path: &OwnedObjectPath,
    ) -> Result<Option<String>, Error> {
        Ok(text(&self.get_all_at(unit, path.as_str(), JOB_INTERFACE).await?, "JobType"))
    }

    /// The commands of a service's `ExecStart=`.
    async fn commands(&self, unit: &UnitName) -> Result<Vec<Command>, Error> {
        let commands = self.property::<OwnedVariant>(unit, SERVICE_INTERFACE, "ExecStart").await?;
        Ok(commands.and_then(|value| Vec::<Command>::try_from(value).ok()).unwrap_or_default())
    }

    pub(super) async fn unit_state(&self, unit: &UnitName) -> Result<Option<UnitState>, Error> {
        let all = self.get_all(unit, UNIT_INTERFACE).await?;
        // systemd answers for a unit that is not loaded as well: it loads an empty one for the call.
        if text(&all, "LoadState").as_deref() == Some("not-found") {
            return Ok(None);
        }
        let job = all.get("Job").and_then(|job| <(u32, OwnedObjectPath)>::try_from(job.clone()).ok());
        let job = job.filter(|(id, _)| *id != 0);
        let sub = text(&all, "SubState").unwrap_or_default();
        Ok(text(&all, "ActiveState").map(|active| UnitState { active, sub, job }))
    }

    /// True if systemd was about to restart a service, and has given up the job for it: the service was frozen then. No
    /// connection to its socket starts it, because it counts as starting.
    ///
    /// # Errors
    /// systemd can't be reached.
    pub async fn has_lost_restart(&self, unit: &UnitName) -> Result<bool, Error> {
        let state = self.unit_state(unit).await?;
        Ok(state.is_some_and(|state| state.job.is_none() && state.sub == "auto-restart-queued"))
    }

    /// The state of a *lost* unit: systemd has it in some state (`active`, `failed`, …), but no settings of it, because somebody has
    /// removed its file and systemd has read all units again. systemd can't restart a lost unit, and takes no transient unit of
    /// that name. `None` for all other units.
    ///
    /// # Errors
    /// systemd can't be reached.
    pub async fn lost_state(&self, unit: &UnitName) -> Result<Option<String>, Error> {
        let all = self.get_all(unit, UNIT_INTERFACE).await?;
        let active = text(&all, "ActiveState");
        Ok(match text(&all, "LoadState").as_deref() {
            // systemd loads an empty unit for the call.
            Some("not-found") => active.filter(|active| active != "inactive"),
            // Somebody has asked for a transient unit of that name meanwhile.
            Some("stub" | "error") => active,
            _ => None,
        })
    }

    /// A property of a unit, or `None` if this systemd has no property of that name and type.
    ///
    /// # Errors
    /// systemd can't be reached.
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

pub(super) fn text(values: &HashMap<String, OwnedVariant>, name: &str) -> Option<String> {
    values.get(name).and_then(|value| String::try_from(&**value).ok())
}

#[cfg(test)]
mod tests {
    use zbus::Variant;

    use super::*;
    use crate::unit::fake_bus::FakeBus;

    /// A manager, and a systemd whose services have these commands.
    async fn manager(commands: &[&[&str]]) -> (std::sync::Arc<FakeBus>, Manager) {
        let (bus, connection) = FakeBus::start([]).await;
        let command = |words: &&[&str]| -> Command {
            let words: Vec<String> = words.iter().map(|word| (*word).to_owned()).collect();
            (words[0].clone(), words, false, 0, 0, 0, 0, 0, 0, 0)
        };
        bus.answer("Get", &Variant::from(commands.iter().map(command).collect::<Vec<_>>()));
        let manager = Manager::default();
        manager.bus.connected(connection);
        (bus, manager)
    }

    #[tokio::test]
    async fn a_service_has_a_command_whatever_its_program_is() {
        let web = UnitName::new("containerd-default-web.service").unwrap();
        let arguments = ["launch", "container", "default", "web"].map(str::to_owned);
        for (commands, expected) in [
            (&[&["/old/shim", "launch", "container", "default", "web"][..]][..], true),
            (&[&["/bin/true"], &["/shim", "launch", "container", "default", "web"]], true),
            (&[&["/shim", "launch", "container", "default", "web+0123456789abcdef"]], false),
            (&[&["/shim", "launch", "exec", "default", "web", "e"]], false),
            (&[&["sleep", "1000"]], false),
            (&[], false),
        ] {
            let (_bus, manager) = manager(commands).await;
            assert_eq!(manager.has_command(&web, &arguments).await.unwrap(), expected, "{commands:?}");
        }
    }

    #[tokio::test]
    async fn systemd_is_not_asked_about_a_name_without_a_file() {
        let (bus, manager) = manager(&[]).await;
        assert!(!manager.is_taken(&UnitName::new("no-such-unit.service").unwrap()).await.unwrap());
        assert_eq!(bus.calls("GetAll") + bus.calls("Get"), 0);
    }
}
