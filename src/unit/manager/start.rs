//! Starting units, and waiting for their jobs.

use std::path::Path;

use zbus::{OwnedObjectPath, Variant};

use crate::id::UnitName;
use crate::unit::annotation::Additions;
use crate::unit::bus::{CALL_LIMIT, manager_over};
use crate::unit::error::{DESTRUCTIVE, Error, NO_SUCH_UNIT, UNIT_MASKED, call_error, unreachable};
use crate::unit::exec_flags;
use crate::unit::job::{JobWaiter, StartJob};
use crate::unit::properties::Properties;
use crate::unit::refs::Refs;
use crate::unit::search_path::Directories;
use crate::unit::{policy, service_d};

use super::{Manager, START, STOP, TRANSIENT_DIR};

impl Manager {
    /// Starts a transient unit and waits until its job has ended.
    ///
    /// # Errors
    /// [`Error::Exists`], a refusal, or [`Error::Job`] when the unit did not start.
    pub async fn start_transient(&self, unit: &UnitName, properties: &Properties) -> Result<(), Error> {
        self.start_transient_with(unit, properties, None).await
    }

    /// Starts a transient unit, and creates another one that belongs to it (`aux`).
    ///
    /// # Errors
    /// As [`Self::start_transient`].
    pub async fn start_transient_with(
        &self,
        unit: &UnitName,
        properties: &Properties,
        aux: Option<(&UnitName, &Properties)>,
    ) -> Result<(), Error> {
        let aux: Vec<_> = aux.iter().map(|(name, list)| (name.as_str(), list.0.as_slice())).collect();
        let begun = self.begin(None, unit, &properties.0, &aux).await?;
        self.wait_for_start(begun).await
    }

    /// Asks for a transient unit to be started, and does not wait for it.
    ///
    /// # Errors
    /// [`Error::Exists`], or a refusal.
    pub async fn begin_transient(&self, unit: &UnitName, properties: &Properties) -> Result<StartJob, Error> {
        self.begin(None, unit, &properties.0, &[]).await
    }

    /// As [`Self::begin_transient`], for properties that have a descriptor. The daemon's connections carry no descriptors, so
    /// this call has a connection of its own.
    ///
    /// # Errors
    /// [`Error::Unreachable`], [`Error::Exists`], or a refusal.
    pub async fn begin_with_descriptor(&self, unit: &UnitName, properties: &Properties) -> Result<(), Error> {
        shield([unit.to_string()].into(), |_, _| None).await;
        let builder = zbus::connection::Builder::system().method_timeout(CALL_LIMIT);
        let connection = builder.build().await.map_err(unreachable)?;
        let manager = manager_over(&connection).await.map_err(unreachable)?;
        let begun = manager.start_transient_unit(unit.as_str(), "fail", &properties.0, &[]).await;
        begun.map(drop).map_err(|error| start_error(unit, error))
    }

    /// As [`Self::begin_transient`], with more properties, which come last, and with a reference to the unit: systemd
    /// keeps the unit loaded, with the exit of its process, until [`Self::release`].
    ///
    /// # Errors
    /// As [`Self::begin_transient`].
    pub async fn begin_referenced(
        &self,
        unit: &UnitName,
        properties: &Properties,
        additions: &Additions,
    ) -> Result<StartJob, Error> {
        let mut list = properties.with(additions);
        let refs = match self.refs.as_deref() {
            Some(refs) if refs.has_room().await => Some(refs),
            _ => None,
        };
        if refs.is_some() {
            list.push(("AddRef", true.into()));
        }
        self.begin(refs, unit, &list, &[]).await
    }

    /// `refs`: has the connection that gets the reference to the unit, at each attempt. Nobody would ever remove a
    /// reference that another connection got.
    async fn begin(
        &self,
        refs: Option<&Refs>,
        unit: &UnitName,
        properties: &[(&str, Variant<'_>)],
        aux: &[(&str, &[(&str, Variant<'_>)])],
    ) -> Result<StartJob, Error> {
        let waiter = self.jobs.wait_for(unit);
        let units = aux.iter().map(|(name, _)| *name).chain([unit.as_str()]).map(str::to_owned).collect();
        if let Some(setting) = shield(units, policy::conflict).await {
            return Err(Error::Setting { unit: unit.to_string(), setting });
        }
        let attempt = || async {
            let manager = match refs {
                Some(refs) => refs.manager_for(unit).await?,
                None => self.bus.manager().await?,
            };
            // systemd refuses a unit whose slice is being stopped.
            let _slices = self.slices.read().await;
            let _turn = self.bus.turn().await;
            manager.start_transient_unit(unit.as_str(), "fail", properties, aux).await
        };
        let reply = self.bus.repeat(attempt).await;
        let all = aux.iter().copied().chain([(unit.as_str(), properties)]);
        let flagged = all.filter(|(_, list)| list.iter().any(|(name, _)| *name == exec_flags::WITH_FLAGS));
        correct_files(flagged.map(|(name, _)| name.to_owned()).collect()).await;
        match reply.result.map_err(|error| start_error(unit, error)) {
            Ok(job) => Ok(StartJob { waiter, job: Some(job) }),
            // An earlier try was carried out: its job is the unit's only one.
            Err(Error::Exists { .. }) if reply.is_repeated => {
                if let Some(refs) = refs {
                    refs.doubt(unit).await;
                }
                Ok(StartJob { waiter, job: None })
            }
            Err(Error::Dependency { unit: name, reason }) => {
                let message = reason.clone();
                let cause = of_files(unit, move |unit| policy::naming_a_unit_of(unit, &message)).await;
                let reason =
                    cause.map_or(reason.clone(), |cause| format!("{reason} It is needed because of {cause}"));
                Err(Error::Dependency { unit: name, reason })
            }
            Err(error) => Err(error),
        }
    }

    /// Starts an installed unit and waits until its job has ended.
    ///
    /// # Errors
    /// [`Error::NotLoaded`] if it is not installed; a refusal; [`Error::Job`].
    pub async fn start(&self, unit: &UnitName) -> Result<(), Error> {
        let waiter = self.jobs.wait_for(unit);
        let job =
            self.bus.call(|manager| async move { manager.start_unit(unit.as_str(), "replace").await }).await;
        self.ended(START, waiter, Some(job.map_err(|error| call_error(START, unit, error))?)).await
    }

    /// Waits until the job has ended, by the rule of the unit's type.
    ///
    /// # Errors
    /// [`Error::Job`] when the unit did not start.
    pub async fn wait_for_start(&self, job: StartJob) -> Result<(), Error> {
        self.ended(START, job.waiter, job.job).await
    }

    /// Waits until a unit has started whose start an earlier daemon requested.
    ///
    /// # Errors
    /// [`Error::Job`] when it did not start.
    pub async fn wait_until_started(&self, unit: &UnitName) -> Result<(), Error> {
        self.wait_for_state(START, unit).await
    }

    pub(super) async fn ended(
        &self,
        verb: &'static str,
        waiter: JobWaiter,
        job: Option<OwnedObjectPath>,
    ) -> Result<(), Error> {
        let unit = waiter.unit().clone();
        match waiter.ended(verb, job).await {
            Err(Error::Lost { .. }) => self.wait_for_state(verb, &unit).await,
            ended => ended,
        }
    }

    /// Waits for a job whose `JobRemoved` signal may have been missed, by watching the unit's state.
    async fn wait_for_state(&self, verb: &'static str, unit: &UnitName) -> Result<(), Error> {
        let mut listening = self.listening.subscribe();
        loop {
            let waiter = self.jobs.wait_for(unit);
            listening.mark_unchanged();
            let state = self.unit_state(unit).await?;
            match (verb, state.as_ref().map(|state| state.active.as_str())) {
                // The unit's job may wait for the job of another unit.
                _ if state.as_ref().is_some_and(|state| state.job.is_some()) => {}
                (START, Some("active" | "reloading")) | (STOP, None | Some("inactive" | "failed")) => {
                    return Ok(());
                }
                (_, Some("activating" | "deactivating")) | (STOP, _) => {}
                (_, state) => {
                    let result = state.unwrap_or("not loaded").to_owned();
                    return Err(Error::Job { verb, unit: unit.to_string(), result });
                }
            }
            tokio::select! {
                // Which job ended, and with which result, does not matter: the unit is queried again.
                _ = waiter.ended(verb, None) => {}
                // A job that ended before could not be observed.
                _ = listening.changed() => {}
            }
        }
    }
}

/// What the drop-ins of a unit say.
pub(super) async fn of_files(
    unit: &UnitName,
    look: impl FnOnce(&str) -> Option<String> + Send + 'static,
) -> Option<String> {
    let unit = unit.clone();
    // The await fails only while the daemon ends.
    tokio::task::spawn_blocking(move || look(unit.as_str())).await.ok()?
}

/// Protects units from drop-ins for all services, and then returns what the drop-ins of the last unit say. A unit that can't be
/// protected is started nevertheless: most such drop-ins are harmless.
async fn shield(
    units: Vec<String>,
    look: impl FnOnce(&Directories, &str) -> Option<String> + Send + 'static,
) -> Option<String> {
    let shield = move || {
        let search_path = Directories::open_all();
        for unit in &units {
            if let Err(error) = service_d::shield_in(&search_path, unit) {
                tracing::warn!(%unit, %error, "can't protect {unit} from drop-ins for all services: {error}");
            }
        }
        look(&search_path, units.last()?)
    };
    // The await fails only while the daemon ends.
    tokio::task::spawn_blocking(shield).await.ok()?
}

/// Corrects the files of transient units whose commands have flags.
async fn correct_files(units: Vec<String>) {
    if units.is_empty() {
        return;
    }
    let correct = move || {
        for unit in units {
            if let Err(error) = exec_flags::correct_file(Path::new(TRANSIENT_DIR), &unit) {
                tracing::warn!(%unit, %error, "can't correct the file of {unit}, so systemd may not read it when it reloads: {error}");
            }
        }
    };
    // The await fails only while the daemon ends.
    let _ = tokio::task::spawn_blocking(correct).await;
}

/// Why a unit was not started. An error about another unit is about one that this unit needs.
fn start_error(unit: &UnitName, error: zbus::Error) -> Error {
    match error {
        zbus::Error::MethodError(name, Some(reason), _)
            if [NO_SUCH_UNIT, UNIT_MASKED, DESTRUCTIVE].contains(&name.as_str()) =>
        {
            Error::Dependency { unit: unit.to_string(), reason }
        }
        error => call_error(START, unit, error),
    }
}
