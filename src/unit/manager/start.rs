//! Starting units, and waiting for their jobs.

use std::path::Path;
use std::pin::pin;
use std::time::Duration;

use async_trait::async_trait;
use tokio::time::{sleep, timeout};
use zbus::{OwnedObjectPath, Variant};

use crate::id::UnitName;
use crate::unit::annotation::Additions;
use crate::unit::bus::{CALL_LIMIT, manager_over};
use crate::unit::error::{DESTRUCTIVE, Error, NO_SUCH_UNIT, UNIT_MASKED, call_error, unreachable};
use crate::unit::exec_flags;
use crate::unit::job::{JobWaiter, StartJob};
use crate::unit::properties::Properties;
use crate::unit::refs::Refs;
use crate::unit::search_path::{Directories, TRANSIENT};
use crate::unit::systemd::Starts;
use crate::unit::{policy, service_d};

use super::{Manager, START, STOP};

/// How often the daemon looks whether a job that it waits for still exists. dbus-daemon drops the signal of its end without notice
/// if the daemon's queue is too long, and any user of the machine can make it long.
const JOB_INTERVAL: Duration = Duration::from_secs(30);

/// How long the signal of the end of a job may take to be read after systemd has answered that the job does not exist any more.
/// systemd has sent the signal before the answer.
const SIGNAL_LIMIT: Duration = Duration::from_secs(5);

/// The property that gives the sender of a call a reference to the unit.
const ADD_REF: (&str, Variant<'static>) = ("AddRef", Variant::Bool(true));

#[async_trait]
impl Starts for Manager {
    async fn start_transient(&self, unit: &UnitName, properties: &Properties) -> Result<(), Error> {
        self.start_transient_with(unit, properties, None).await
    }

    async fn begin_transient(&self, unit: &UnitName, properties: &Properties) -> Result<StartJob, Error> {
        self.begin(None, unit, &properties.0, &[]).await
    }

    async fn begin_referenced(
        &self,
        unit: &UnitName,
        properties: &Properties,
        additions: &Additions,
    ) -> Result<StartJob, Error> {
        let mut list = properties.with(additions);
        let refs = self.refs.as_deref();
        if refs.is_some() {
            list.push(ADD_REF);
        }
        self.begin(refs, unit, &list, &[]).await
    }

    async fn wait_for_start_job(&self, job: StartJob) -> Result<(), Error> {
        self.wait_for_job(START, job.waiter, job.job).await
    }

    async fn wait_for_earlier_start_job(&self, unit: &UnitName) -> Result<(), Error> {
        self.wait_for_missed_job(START, unit).await
    }
}

impl Manager {
    /// Starts a transient unit, and creates another one that belongs to it (`aux`).
    ///
    /// # Errors
    /// As [`Starts::start_transient`].
    pub async fn start_transient_with(
        &self,
        unit: &UnitName,
        properties: &Properties,
        aux: Option<(&UnitName, &Properties)>,
    ) -> Result<(), Error> {
        let aux: Vec<_> = aux.iter().map(|(name, list)| (name.as_str(), list.0.as_slice())).collect();
        let begun = self.begin(None, unit, &properties.0, &aux).await?;
        self.wait_for_start_job(begun).await
    }

    /// As [`Starts::begin_transient`], for properties that have a descriptor. The daemon's connections carry no descriptors, so
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

    /// `refs`: has the connection that gets the reference to the unit, at each attempt. Nobody would ever remove a
    /// reference that another connection got. The last property is [`ADD_REF`] then, and is left out if there is no room
    /// for a reference.
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
            let referencing = match refs {
                Some(refs) => refs.manager_for(unit).await?,
                None => None,
            };
            let (manager, properties) = match (referencing, properties) {
                (Some(manager), properties) => (manager, properties),
                (None, [unreferenced @ .., (name, _)]) if *name == ADD_REF.0 => {
                    (self.bus.manager().await?, unreferenced)
                }
                (None, properties) => (self.bus.manager().await?, properties),
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
        self.wait_for_job(START, waiter, Some(job.map_err(|error| call_error(START, unit, error))?)).await
    }

    /// Asks for an installed unit to be started, and does not wait for it.
    ///
    /// # Errors
    /// [`Error::NotLoaded`] if it is not installed; a refusal.
    pub async fn start_without_waiting(&self, unit: &UnitName) -> Result<(), Error> {
        let job =
            self.bus.call(|manager| async move { manager.start_unit(unit.as_str(), "replace").await }).await;
        job.map(drop).map_err(|error| call_error(START, unit, error))
    }

    /// Waits until a job has ended, or any job of the unit if `job` is `None`. Notices the end also if its signal is lost.
    pub(super) async fn wait_for_job(
        &self,
        verb: &'static str,
        waiter: JobWaiter,
        job: Option<OwnedObjectPath>,
    ) -> Result<(), Error> {
        let unit = waiter.unit().clone();
        let mut ended = pin!(waiter.ended(verb, job.clone()));
        let mut limit = JOB_INTERVAL;
        loop {
            match timeout(limit, &mut ended).await {
                Ok(Err(Error::Lost { .. })) => break,
                Ok(ended) => return ended,
                Err(_) if limit == SIGNAL_LIMIT => {
                    tracing::debug!(%unit, "a job of {unit} has ended without a signal from systemd");
                    break;
                }
                Err(_) => {
                    let is_under_way = self.has_job(&unit, job.as_ref()).await;
                    limit = if is_under_way { JOB_INTERVAL } else { SIGNAL_LIMIT };
                }
            }
        }
        self.wait_for_missed_job(verb, &unit).await
    }

    /// False if a unit does not have this job any more, or if it has none and `job` is `None`. True if systemd can't be reached.
    async fn has_job(&self, unit: &UnitName, job: Option<&OwnedObjectPath>) -> bool {
        let state = match self.unit_state(unit).await {
            Ok(state) => state,
            Err(error) => {
                tracing::debug!(%unit, %error, "can't look whether {unit} still has its job: {error}");
                return true;
            }
        };
        let current = state.and_then(|state| state.job);
        current.is_some_and(|(_, current)| job.is_none_or(|job| *job == current))
    }

    /// Waits for a job whose `JobRemoved` signal may have been missed, by watching the unit's state.
    async fn wait_for_missed_job(&self, verb: &'static str, unit: &UnitName) -> Result<(), Error> {
        let mut listening = self.listening.subscribe();
        let mut is_overdue = false;
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
                (_, Some("activating" | "deactivating")) => {}
                (STOP, _) if !is_overdue => {}
                (_, state) => {
                    let result = state.unwrap_or("not loaded").to_owned();
                    return Err(Error::Job { verb, unit: unit.to_string(), result });
                }
            }
            is_overdue = tokio::select! {
                // Which job ended, and with which result, does not matter: the unit is queried again.
                _ = waiter.ended(verb, None) => false,
                // A job that ended before could not be observed.
                _ = listening.changed() => false,
                // The signal may be lost.
                () = sleep(JOB_INTERVAL) => true,
            };
        }
    }
}

/// What the drop-ins of a unit say.
pub(super) async fn of_files<T: Send + 'static>(
    unit: &UnitName,
    look: impl FnOnce(&str) -> Option<T> + Send + 'static,
) -> Option<T> {
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
            if let Err(error) = exec_flags::correct_file(Path::new(TRANSIENT), &unit) {
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

#[cfg(test)]
mod tests {
    use std::collections::HashMap;
    use std::sync::Arc;

    use super::*;
    use crate::unit::fake_bus::FakeBus;

    /// Longer than the daemon takes to notice the end of a job without its signal.
    const A_WHILE: Duration = Duration::from_secs(600);

    fn job() -> OwnedObjectPath {
        OwnedObjectPath::try_from("/org/freedesktop/systemd1/job/3").unwrap()
    }

    fn web() -> UnitName {
        UnitName::new("containerd-default-web.service").unwrap()
    }

    /// A manager, and a systemd that answers with these states of the unit, and in the end with the last one only. The job exists
    /// in states with `true`.
    async fn manager(states: &[(&'static str, bool)]) -> (Arc<FakeBus>, Manager) {
        let (bus, connection) = FakeBus::start([]).await;
        for (active, has_job) in states {
            let none = OwnedObjectPath::try_from("/").unwrap();
            let job = if *has_job { (3_u32, job()) } else { (0, none) };
            let properties: HashMap<_, Variant<'_>> =
                [("LoadState", "loaded".into()), ("ActiveState", (*active).into()), ("Job", job.into())]
                    .into();
            bus.answer("GetAll", &properties);
        }
        let manager = Manager::default();
        manager.bus.connected(connection);
        (bus, manager)
    }

    /// How the wait for a job ends that has begun, and whose signal never comes.
    async fn ended(manager: &Manager, verb: &'static str) -> Result<(), Error> {
        let waiter = manager.jobs.wait_for(&web());
        let ended = timeout(A_WHILE, manager.wait_for_job(verb, waiter, Some(job()))).await;
        ended.expect("the end of the job is noticed")
    }

    #[tokio::test(start_paused = true)]
    async fn a_restart_whose_job_does_not_exist_any_more_is_lost() {
        for (active, sub, has_job, is_lost) in [
            ("activating", "auto-restart-queued", false, true),
            ("activating", "auto-restart-queued", true, false),
            ("activating", "auto-restart", false, false),
            ("activating", "start", false, false),
            ("active", "running", false, false),
        ] {
            let (bus, connection) = FakeBus::start([]).await;
            let job = if has_job { (3_u32, job()) } else { (0, OwnedObjectPath::try_from("/").unwrap()) };
            let properties: HashMap<_, Variant<'_>> =
                [("ActiveState", active.into()), ("SubState", sub.into()), ("Job", job.into())].into();
            bus.answer("GetAll", &properties);
            let manager = Manager::default();
            manager.bus.connected(connection);
            assert_eq!(manager.has_lost_restart(&web()).await.unwrap(), is_lost, "{sub} {has_job}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_job_whose_signal_is_lost_ends_nevertheless() {
        for (verb, last) in [(START, "active"), (STOP, "inactive")] {
            let (bus, manager) = manager(&[("activating", true), ("activating", true), (last, false)]).await;
            ended(&manager, verb).await.unwrap();
            assert!(bus.calls("GetAll") > 3, "the job was waited for while it existed");
        }
        // The signals of both jobs are lost: of the one that was waited for, and of the one that follows.
        let (_bus, manager) = manager(&[("inactive", false), ("activating", true), ("active", false)]).await;
        ended(&manager, START).await.unwrap();
    }

    #[tokio::test(start_paused = true)]
    async fn a_lost_job_that_did_not_stop_its_unit_has_failed() {
        let (_bus, manager) = manager(&[("active", false)]).await;
        let error = ended(&manager, STOP).await.unwrap_err();
        assert!(matches!(&error, Error::Job { result, .. } if result == "active"), "{error}");
    }

    #[tokio::test(start_paused = true)]
    async fn a_signal_that_is_read_after_the_look_counts() {
        let (bus, manager) = manager(&[("active", false)]).await;
        let signal = async {
            while bus.calls("GetAll") == 0 {
                sleep(Duration::from_millis(10)).await;
            }
            manager.jobs.ended(&web(), &job(), "timeout");
        };
        let (error, ()) = tokio::join!(ended(&manager, START), signal);
        assert!(matches!(error, Err(Error::Job { result, .. }) if result == "timeout"));
    }
}
