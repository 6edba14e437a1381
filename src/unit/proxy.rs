//! Calls to systemd: the connection, and units that are started.
//!
//! The connection can go away (dbus restarted) and come back; calls made in between wait for it.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{OnceCell, Semaphore, watch};
use zbus::{Connection, OwnedObjectPath, Variant};

use crate::id::UnitName;

use super::annotation::{Additions, Types};
use super::error::{Error, call_error, is_gone, is_over_limit, start_error, unreachable};
use super::job::{JobWaiter, Jobs, StartJob};
use super::properties::{Properties, Systemd};
use super::refs::Refs;

/// How often a unit is looked at whose job may have ended unheard.
const RECHECK: Duration = Duration::from_secs(1);

/// How long a call waits for a connection, and how long for its answer.
pub(super) const CALL_LIMIT: Duration = Duration::from_secs(25);

#[zbus::proxy(
    interface = "org.freedesktop.systemd1.Manager",
    default_service = "org.freedesktop.systemd1",
    default_path = "/org/freedesktop/systemd1"
)]
pub(super) trait SystemdManager {
    fn subscribe(&self) -> zbus::Result<()>;
    fn start_transient_unit(
        &self,
        name: &str,
        mode: &str,
        properties: &[(&str, Variant<'_>)],
        aux: &[(&str, &[(&str, Variant<'_>)])],
    ) -> zbus::Result<OwnedObjectPath>;
    fn start_unit(&self, name: &str, mode: &str) -> zbus::Result<OwnedObjectPath>;
    fn stop_unit(&self, name: &str, mode: &str) -> zbus::Result<OwnedObjectPath>;
    fn kill_unit(&self, name: &str, whom: &str, signal: i32) -> zbus::Result<()>;
    fn reset_failed_unit(&self, name: &str) -> zbus::Result<()>;
    fn ref_unit(&self, name: &str) -> zbus::Result<()>;
    fn unref_unit(&self, name: &str) -> zbus::Result<()>;
    fn cancel_job(&self, id: u32) -> zbus::Result<()>;
    fn list_units_by_patterns(&self, states: &[&str], patterns: &[&str]) -> zbus::Result<Vec<Listed>>;
    fn reload(&self) -> zbus::Result<()>;
    fn freeze_unit(&self, name: &str) -> zbus::Result<()>;
    fn thaw_unit(&self, name: &str) -> zbus::Result<()>;
    fn set_unit_properties(
        &self,
        name: &str,
        runtime: bool,
        properties: &[(&str, Variant<'_>)],
    ) -> zbus::Result<()>;
    #[zbus(property)]
    fn version(&self) -> zbus::Result<String>;
}

/// A unit in a list: name, description, load, active and sub state, which unit it follows, its object, and id,
/// type and object of its job.
pub(super) type Listed =
    (String, String, String, String, String, String, OwnedObjectPath, u32, String, OwnedObjectPath);

/// systemd's manager, over the system bus.
pub struct Manager {
    connection: watch::Sender<Option<Connection>>,
    /// systemd has its name on the bus: it has not for a moment when it executes itself anew.
    owned: watch::Sender<bool>,
    pub(super) jobs: Jobs,
    /// How often signals have begun to be listened to.
    listening: watch::Sender<u64>,
    refs: Option<Arc<Refs>>,
    /// Lets calls through, up to [`MAX_CALLS`] at a time; the others queue. It is never closed.
    pub(super) calls: Semaphore,
    /// Held for writing while a slice is being stopped, for reading while a unit is started.
    pub(super) slices: tokio::sync::RwLock<()>,
    /// The types of a service's properties, once they are asked for.
    pub(super) types: OnceCell<Arc<Types>>,
}

impl Default for Manager {
    fn default() -> Self {
        Self {
            connection: watch::Sender::new(None),
            owned: watch::Sender::new(true),
            jobs: Jobs::default(),
            listening: watch::Sender::default(),
            refs: None,
            calls: Semaphore::new(MAX_CALLS),
            slices: tokio::sync::RwLock::default(),
            types: OnceCell::new(),
        }
    }
}

/// Makes a call that does not mind being made twice, until systemd is there to answer it.
macro_rules! persist {
    ($manager:ident, $proxy:ident, $call:expr) => {{
        let mut tries = $manager.tries();
        loop {
            let $proxy = $manager.proxy().await?;
            let result = {
                let _call = $manager.calls.acquire().await;
                $call.await
            };
            if !tries.again(&result).await {
                break result;
            }
        }
    }};
}

pub(super) use persist;

/// Calls that systemd may leave unanswered: when it executes itself anew it is gone from the bus for a
/// moment, which then answers `NoReply`, or that nobody has the name.
pub(super) struct Tries {
    owned: watch::Receiver<bool>,
    limit: tokio::time::Instant,
    /// The call has been made before: it may have been done.
    repeated: bool,
}

impl Tries {
    /// True if the call was not answered and is to be made again; then systemd is back.
    pub(super) async fn again<T>(&mut self, result: &zbus::Result<T>) -> bool {
        if result.as_ref().is_err_and(is_over_limit) && tokio::time::Instant::now() < self.limit {
            // The bus has not passed it on.
            tokio::time::sleep(REFUSED_PAUSE).await;
            return true;
        }
        let gone = matches!(result, Err(error) if is_gone(error));
        if !gone || tokio::time::Instant::now() >= self.limit {
            return false;
        }
        self.repeated = true;
        // The news that it is gone may still be under way, or may have been there before the call.
        let _ = tokio::time::timeout(NEWS_LIMIT, self.owned.changed()).await;
        let _ = tokio::time::timeout_at(self.limit, self.owned.wait_for(|owned| *owned)).await;
        true
    }
}

/// systemd's manager, as called over that connection.
pub(super) async fn manager_of(connection: &Connection) -> zbus::Result<SystemdManagerProxy<'static>> {
    SystemdManagerProxy::builder(connection).cache_properties(zbus::proxy::CacheProperties::No).build().await
}

impl Manager {
    /// One whose references to units outlive the process.
    pub fn with_refs(refs: Arc<Refs>) -> Self {
        Self { refs: Some(refs), ..Self::default() }
    }

    pub(super) fn tries(&self) -> Tries {
        let limit = tokio::time::Instant::now() + CALL_LIMIT;
        Tries { owned: self.owned.subscribe(), limit, repeated: false }
    }

    /// Opens a connection to the bus for calls; [`super::watch`] uses it for signals too.
    ///
    /// # Errors
    /// [`Error::Unreachable`]
    pub async fn connect(&self) -> Result<Connection, Error> {
        let connection = zbus::connection::Builder::system()
            .method_timeout(CALL_LIMIT)
            .max_queued(MAX_QUEUED)
            .build()
            .await
            .map_err(unreachable)?;
        self.connection.send_replace(Some(connection.clone()));
        Ok(connection)
    }

    /// The connection is gone: later calls wait for the next one, and jobs under way are lost.
    pub(super) async fn disconnected(&self) {
        self.connection.send_replace(None);
        self.jobs.lose_all();
        if let Some(refs) = &self.refs {
            refs.disconnected().await;
        }
    }

    /// Signals are listened to from now on.
    pub(super) fn listens(&self) {
        self.listening.send_modify(|times| *times += 1);
    }

    async fn connected(&self) -> Result<Connection, Error> {
        let mut receiver = self.connection.subscribe();
        let waiting = async {
            loop {
                if let Some(connection) = receiver.borrow_and_update().clone() {
                    return connection;
                }
                if receiver.changed().await.is_err() {
                    std::future::pending::<()>().await;
                }
            }
        };
        tokio::time::timeout(CALL_LIMIT, waiting)
            .await
            .map_err(|_| Error::Unreachable { reason: "no connection".to_owned() })
    }

    pub(super) async fn proxy(&self) -> Result<SystemdManagerProxy<'static>, Error> {
        manager_of(&self.connected().await?).await.map_err(unreachable)
    }

    /// systemd has got its name on the bus, or has lost it.
    pub(super) fn ownership_changed(&self, owned: bool) {
        self.owned.send_replace(owned);
    }

    /// What systemd can do.
    ///
    /// # Errors
    /// [`Error::TooOld`], or it can't be reached.
    pub async fn systemd(&self) -> Result<Systemd, Error> {
        let found = self.proxy().await?.version().await.map_err(unreachable)?;
        Systemd::parse(&found).filter(|systemd| systemd.supported()).ok_or(Error::TooOld { found })
    }

    pub(super) async fn subscribe(&self) -> Result<(), Error> {
        match self.proxy().await?.subscribe().await {
            Ok(()) => Ok(()),
            Err(zbus::Error::MethodError(name, ..)) if name.as_str() == ALREADY_SUBSCRIBED => Ok(()),
            Err(error) => Err(unreachable(error)),
        }
    }

    /// Starts a transient unit and waits until its job has ended.
    ///
    /// # Errors
    /// [`Error::Exists`], a refusal, or [`Error::Job`] when the unit did not come up.
    pub async fn start_transient(&self, unit: &UnitName, properties: &Properties) -> Result<(), Error> {
        self.start_transient_with(unit, properties, None).await
    }

    /// Asks for a transient unit to be started.
    ///
    /// # Errors
    /// [`Error::Exists`], or a refusal.
    pub async fn begin_transient(&self, unit: &UnitName, properties: &Properties) -> Result<StartJob, Error> {
        self.begin(unit, properties, &[]).await
    }

    /// As [`Self::begin_transient`], with more properties, which come last, and with a reference to the unit:
    /// it stays loaded, and tells how its process ended, until [`Self::release`].
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
        if self.refs.is_some() {
            list.push(("AddRef", true.into()));
        }
        self.begin_over(self.refs.as_deref(), unit, &list, &[]).await
    }

    /// Lets go of a unit: it is unloaded when it is stopped.
    pub async fn release(&self, unit: &UnitName) {
        let Some(refs) = &self.refs else {
            return;
        };
        let mut tries = self.tries();
        loop {
            let released = refs.release(unit).await;
            if tries.again(&released).await {
                continue;
            }
            if let Err(error) = released {
                // There is none if the bus was restarted, or the unit never came up.
                tracing::debug!(%unit, %error, "no reference to {unit}: {error}");
            }
            return;
        }
    }

    /// Refers to a unit that an earlier daemon has started, or that was referred to over a bus that is
    /// gone.
    pub async fn refer_to(&self, unit: &UnitName) {
        if let Some(refs) = &self.refs {
            let _call = self.calls.acquire().await;
            refs.refer_to(unit).await;
        }
    }

    /// Nothing needs the references of earlier daemons any more.
    pub fn forget_earlier_references(&self) {
        if let Some(refs) = &self.refs {
            refs.forget_earlier();
        }
    }

    /// Resolves when a unit that an earlier daemon has asked for is up.
    ///
    /// # Errors
    /// [`Error::Job`] when it did not come up.
    pub async fn up(&self, unit: &UnitName) -> Result<(), Error> {
        self.settled(START, unit).await
    }

    /// Starts a transient unit that another transient unit goes with.
    ///
    /// # Errors
    /// As [`Self::start_transient`].
    pub async fn start_transient_with(
        &self,
        unit: &UnitName,
        properties: &Properties,
        aux: Option<(&str, &Properties)>,
    ) -> Result<(), Error> {
        let aux: Vec<_> = aux.iter().map(|(name, list)| (*name, list.0.as_slice())).collect();
        let begun = self.begin(unit, properties, &aux).await?;
        self.done(begun).await
    }

    /// Resolves when a unit that was asked for is up, by the rule of its type.
    ///
    /// # Errors
    /// [`Error::Job`] when it did not come up.
    pub async fn done(&self, job: StartJob) -> Result<(), Error> {
        self.ended(START, job.waiter, job.job).await
    }

    pub(super) async fn ended(
        &self,
        verb: &'static str,
        waiter: JobWaiter,
        job: Option<OwnedObjectPath>,
    ) -> Result<(), Error> {
        let unit = waiter.unit().clone();
        match waiter.ended(verb, job).await {
            Err(Error::Lost { .. }) => self.settled(verb, &unit).await,
            ended => ended,
        }
    }

    /// The end of a job that could not be heard: the unit shows it.
    async fn settled(&self, verb: &'static str, unit: &UnitName) -> Result<(), Error> {
        let mut listening = self.listening.subscribe();
        loop {
            let waiter = self.jobs.wait_for(unit);
            listening.mark_unchanged();
            let state = self.unit_state(unit).await?;
            match (verb, state.as_ref().map(|state| state.active.as_str())) {
                // Its job may wait for another unit's.
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
                // Whatever its result, and whichever job it was: the unit is looked at again.
                _ = waiter.ended(verb, None) => {}
                // What has ended before could not be heard.
                _ = listening.changed() => {}
                // systemd 262 that executes itself may send the signal before it has its subscribers back: nothing
                // announces that.
                () = tokio::time::sleep(RECHECK) => {}
            }
        }
    }

    async fn begin(
        &self,
        unit: &UnitName,
        properties: &Properties,
        aux: &[(&str, &[(&str, Variant<'_>)])],
    ) -> Result<StartJob, Error> {
        self.begin_over(None, unit, &properties.0, aux).await
    }

    /// `refs`: whose connection is to have the reference to the unit, at each try: on another one nobody would ever give it
    /// back.
    async fn begin_over(
        &self,
        refs: Option<&Refs>,
        unit: &UnitName,
        properties: &[(&str, Variant<'_>)],
        aux: &[(&str, &[(&str, Variant<'_>)])],
    ) -> Result<StartJob, Error> {
        let waiter = self.jobs.wait_for(unit);
        let mut tries = self.tries();
        let started = loop {
            let proxy = match refs {
                Some(refs) => refs.proxy_for(unit).await?,
                None => self.proxy().await?,
            };
            let result = {
                // systemd refuses a unit whose slice is being stopped.
                let _slices = self.slices.read().await;
                let _call = self.calls.acquire().await;
                proxy.start_transient_unit(unit.as_str(), "fail", properties, aux).await
            };
            if !tries.again(&result).await {
                break result;
            }
        };
        let job = match started.map_err(|error| start_error(unit, error)) {
            Ok(job) => Some(job),
            // The first try was done: what it began is this unit's only job.
            Err(Error::Exists { .. }) if tries.repeated => None,
            Err(error) => return Err(error),
        };
        Ok(StartJob { waiter, job })
    }

    /// Starts an installed unit and waits until its job has ended.
    ///
    /// # Errors
    /// [`Error::NotLoaded`] if it is not installed; a refusal; [`Error::Job`].
    pub async fn start(&self, unit: &UnitName) -> Result<(), Error> {
        let waiter = self.jobs.wait_for(unit);
        let job = persist!(self, proxy, proxy.start_unit(unit.as_str(), "replace"));
        self.ended(START, waiter, Some(job.map_err(|error| call_error(START, unit, error))?)).await
    }
}

pub(super) const START: &str = "start";
pub(super) const STOP: &str = "stop";

const ALREADY_SUBSCRIBED: &str = "org.freedesktop.systemd1.AlreadySubscribed";

/// How many calls may wait for their answers. dbus-daemon refuses the 129th of a connection
/// (max_replies_per_connection).
const MAX_CALLS: usize = 100;

/// How long a call waits that the bus has refused because too many wait for their answers.
const REFUSED_PAUSE: Duration = Duration::from_millis(50);

/// Signals waiting to be read. systemd sends at most 100 units' worth at once.
const MAX_QUEUED: std::num::NonZeroUsize = std::num::NonZeroUsize::new(1024).unwrap();

/// How long the news that systemd has lost its name may take to get here.
const NEWS_LIMIT: Duration = Duration::from_millis(50);
