//! Calls to systemd, and its errors by name.
//!
//! The connection can go away (dbus restarted) and come back; calls made in between wait for it.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::{mpsc, watch};
use zbus::{Connection, OwnedObjectPath, OwnedVariant, Variant};

use crate::id::UnitName;

use super::name;
use super::properties::{Properties, Systemd};

/// How long a call waits for a connection, and how long for its answer.
const CALL_LIMIT: Duration = Duration::from_secs(25);

/// What can go wrong with a unit.
#[derive(Clone, Debug, thiserror::Error)]
pub enum Error {
    /// systemd can't be reached.
    #[error("systemd can't be reached over D-Bus: {reason}; check that dbus runs")]
    Unreachable {
        /// What the bus said.
        reason: String,
    },
    /// The unit is not loaded.
    #[error("unit {unit} is not loaded")]
    NotLoaded {
        /// The unit.
        unit: String,
    },
    /// A unit of that name is loaded already.
    #[error("unit {unit} exists already")]
    Exists {
        /// The unit.
        unit: String,
    },
    /// systemd refused the call.
    #[error("systemd refused to {verb} {unit}: {reason} ({name})")]
    Refused {
        /// What was asked.
        verb: &'static str,
        /// Of which unit.
        unit: String,
        /// The D-Bus error's name.
        name: String,
        /// systemd's words.
        reason: String,
    },
    /// The job did not end well.
    #[error("systemd's job to {verb} {unit} ended with result {result:?}; see systemctl status {unit}")]
    Job {
        /// What was asked.
        verb: &'static str,
        /// Of which unit.
        unit: String,
        /// JobRemoved's result.
        result: String,
    },
    /// The connection was lost while a job was under way: it may have ended in any way.
    #[error("the connection to D-Bus was lost during systemd's job to {verb} {unit}")]
    Lost {
        /// What was asked.
        verb: &'static str,
        /// Of which unit.
        unit: String,
    },
    /// systemd is older than supported, or says no version.
    #[error("systemd {found} is too old: version {} or newer is needed", crate::config::OLDEST_SYSTEMD)]
    TooOld {
        /// What it calls itself.
        found: String,
    },
}

#[zbus::proxy(
    interface = "org.freedesktop.systemd1.Manager",
    default_service = "org.freedesktop.systemd1",
    default_path = "/org/freedesktop/systemd1"
)]
trait SystemdManager {
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
    #[zbus(property)]
    fn version(&self) -> zbus::Result<String>;
}

#[zbus::proxy(interface = "org.freedesktop.DBus.Properties", default_service = "org.freedesktop.systemd1")]
trait UnitProperties {
    fn get_all(&self, interface: &str) -> zbus::Result<HashMap<String, OwnedVariant>>;
    fn get(&self, interface: &str, name: &str) -> zbus::Result<OwnedVariant>;
}

/// The main process of a service, as systemd sees it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MainProcess {
    /// The running one, 0 if none.
    pub pid: u32,
    /// The last one.
    pub last_pid: u32,
    /// How the last one ended, if it has.
    pub ended: Option<Ended>,
}

/// How a main process ended, in systemd's terms.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ended {
    /// `si_code` of `SIGCHLD`: 1 exited, 2 killed, 3 dumped core.
    pub code: i32,
    /// The exit code, or the signal.
    pub status: i32,
    /// When, in microseconds since 1970.
    pub at_usec: u64,
}

impl Ended {
    /// Killed by SIGKILL.
    pub fn killed(at_usec: u64) -> Self {
        const CLD_KILLED: i32 = 2;
        Self { code: CLD_KILLED, status: nix::libc::SIGKILL, at_usec }
    }

    /// The exit status as containerd wants it: 0 to 255, or 128 + the signal.
    pub fn exit_status(self) -> u32 {
        let status = u32::try_from(self.status).unwrap_or(255);
        if self.signal().is_none() { status } else { 128 + status }
    }

    /// systemd takes it for a success: a unit with RemainAfterExit stays active (exit-status.c,
    /// 252 to 262).
    pub fn is_clean(self) -> bool {
        const CLEAN: [i32; 4] =
            [nix::libc::SIGHUP, nix::libc::SIGINT, nix::libc::SIGTERM, nix::libc::SIGPIPE];
        match self.signal() {
            None => self.status == 0,
            Some(signal) => CLEAN.contains(&signal),
        }
    }

    /// The signal that ended it, if one did.
    pub fn signal(self) -> Option<i32> {
        const CLD_EXITED: i32 = 1;
        (self.code != CLD_EXITED).then_some(self.status)
    }
}

/// A job's end, sent to whoever waits for a job of that unit.
pub(super) type JobEnd = (OwnedObjectPath, String);
type JobWaiters = Mutex<HashMap<UnitName, Vec<mpsc::UnboundedSender<JobEnd>>>>;

/// systemd's manager, over the system bus.
pub struct Manager {
    connection: watch::Sender<Option<Connection>>,
    jobs: JobWaiters,
}

impl Default for Manager {
    fn default() -> Self {
        Self { connection: watch::Sender::new(None), jobs: Mutex::default() }
    }
}

impl Manager {
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
    pub(super) fn disconnected(&self) {
        self.connection.send_replace(None);
        self.jobs.lock().unwrap_or_else(PoisonError::into_inner).clear();
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

    async fn proxy(&self) -> Result<SystemdManagerProxy<'static>, Error> {
        let connection = self.connected().await?;
        SystemdManagerProxy::builder(&connection)
            .cache_properties(zbus::proxy::CacheProperties::No)
            .build()
            .await
            .map_err(unreachable)
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
        self.begin(unit, properties, &aux).await?.done().await
    }

    async fn begin(
        &self,
        unit: &UnitName,
        properties: &Properties,
        aux: &[(&str, &[(&str, Variant<'_>)])],
    ) -> Result<StartJob, Error> {
        let proxy = self.proxy().await?;
        let waiter = self.wait_for_job(unit);
        let job = proxy
            .start_transient_unit(unit.as_str(), "fail", &properties.0, aux)
            .await
            .map_err(|error| call_error(START, unit, error))?;
        Ok(StartJob { waiter, job })
    }

    /// Starts an installed unit and waits until its job has ended.
    ///
    /// # Errors
    /// [`Error::NotLoaded`] if it is not installed; a refusal; [`Error::Job`].
    pub async fn start(&self, unit: &UnitName) -> Result<(), Error> {
        let verb = "start";
        let proxy = self.proxy().await?;
        let waiter = self.wait_for_job(unit);
        let job = proxy.start_unit(unit.as_str(), "replace").await.map_err(|e| call_error(verb, unit, e))?;
        waiter.ended(verb, job).await
    }

    /// Stops a unit and waits until it is down. A unit that is not loaded is down.
    ///
    /// # Errors
    /// A refusal, or [`Error::Job`].
    pub async fn stop(&self, unit: &UnitName) -> Result<(), Error> {
        let verb = "stop";
        let proxy = self.proxy().await?;
        let waiter = self.wait_for_job(unit);
        let job = match proxy.stop_unit(unit.as_str(), "replace").await.map_err(|e| call_error(verb, unit, e))
        {
            Ok(job) => job,
            Err(Error::NotLoaded { .. }) => return Ok(()),
            Err(error) => return Err(error),
        };
        waiter.ended(verb, job).await
    }

    /// Asks for a unit to be stopped, and does not wait for it.
    ///
    /// # Errors
    /// A refusal.
    pub async fn stop_without_waiting(&self, unit: &UnitName) -> Result<(), Error> {
        match self.proxy().await?.stop_unit(unit.as_str(), "replace").await {
            Ok(_) => Ok(()),
            Err(error) => match call_error("stop", unit, error) {
                Error::NotLoaded { .. } => Ok(()),
                error => Err(error),
            },
        }
    }

    /// Forgets that a unit has failed. A unit that is not loaded needs no such thing.
    ///
    /// # Errors
    /// A refusal.
    pub async fn reset_failed(&self, unit: &UnitName) -> Result<(), Error> {
        match self.proxy().await?.reset_failed_unit(unit.as_str()).await {
            Ok(()) => Ok(()),
            Err(error) => match call_error("reset", unit, error) {
                Error::NotLoaded { .. } => Ok(()),
                error => Err(error),
            },
        }
    }

    /// Sends a signal to every process of a unit. A unit that is not loaded has none.
    ///
    /// # Errors
    /// A refusal.
    pub async fn kill_all(&self, unit: &UnitName, signal: i32) -> Result<(), Error> {
        match self.proxy().await?.kill_unit(unit.as_str(), "all", signal).await {
            Ok(()) => Ok(()),
            Err(error) => match call_error("kill", unit, error) {
                Error::NotLoaded { .. } => Ok(()),
                error => Err(error),
            },
        }
    }

    /// The state of a unit: `active`, `failed`, …; nothing if it is not loaded.
    ///
    /// # Errors
    /// systemd can't be asked.
    pub async fn active_state(&self, unit: &UnitName) -> Result<Option<String>, Error> {
        let all = self.get_all(unit, UNIT_INTERFACE).await?;
        // Asking for a unit that is not loaded loads an empty one and answers for that.
        if text(&all, "LoadState").as_deref() == Some("not-found") {
            return Ok(None);
        }
        Ok(text(&all, "ActiveState"))
    }

    /// The main process of a loaded service; nothing if it is not loaded.
    ///
    /// # Errors
    /// systemd can't be asked.
    pub async fn main_process(&self, unit: &UnitName) -> Result<Option<MainProcess>, Error> {
        // A unit that is not loaded looks as if it had ended with 0: ask for that first.
        if self.active_state(unit).await?.is_none() {
            return Ok(None);
        }
        let all = self.get_all(unit, SERVICE_INTERFACE).await?;
        Ok(Some(MainProcess::default().updated(|name| all.get(name).map(|value| &**value))))
    }

    async fn get_all(
        &self,
        unit: &UnitName,
        interface: &str,
    ) -> Result<HashMap<String, OwnedVariant>, Error> {
        let connection = self.connected().await?;
        let proxy = UnitPropertiesProxy::builder(&connection)
            .cache_properties(zbus::proxy::CacheProperties::No)
            .path(name::object_path(unit.as_str()))
            .build()
            .await
            .map_err(unreachable)?;
        proxy.get_all(interface).await.map_err(|error| call_error("read", unit, error))
    }

    /// Listens for the ends of a unit's jobs; made before the call, or the end may come first.
    fn wait_for_job(&self, unit: &UnitName) -> JobWaiter {
        let (sender, receiver) = mpsc::unbounded_channel();
        let mut jobs = self.jobs.lock().unwrap_or_else(PoisonError::into_inner);
        jobs.entry(unit.clone()).or_default().push(sender);
        JobWaiter { unit: unit.clone(), receiver }
    }

    pub(super) fn job_ended(&self, unit: &UnitName, job: &OwnedObjectPath, result: &str) {
        let mut jobs = self.jobs.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(waiters) = jobs.get_mut(unit) {
            waiters.retain(|waiter| waiter.send((job.clone(), result.to_owned())).is_ok());
            waiters.retain(|waiter| !waiter.is_closed());
            if waiters.is_empty() {
                jobs.remove(unit);
            }
        }
    }

    /// Forgets those that no longer wait: their call failed before there was a job.
    pub(super) fn sweep_waiters(&self) {
        let mut jobs = self.jobs.lock().unwrap_or_else(PoisonError::into_inner);
        jobs.retain(|_, waiters| {
            waiters.retain(|waiter| !waiter.is_closed());
            !waiters.is_empty()
        });
    }
}

const START: &str = "start";

/// A unit that is being started.
pub struct StartJob {
    waiter: JobWaiter,
    job: OwnedObjectPath,
}

impl StartJob {
    /// Resolves when the unit is up, by the rule of its type.
    ///
    /// # Errors
    /// [`Error::Job`] when it did not come up.
    pub async fn done(self) -> Result<(), Error> {
        self.waiter.ended(START, self.job).await
    }
}

struct JobWaiter {
    unit: UnitName,
    receiver: mpsc::UnboundedReceiver<JobEnd>,
}

impl JobWaiter {
    async fn ended(mut self, verb: &'static str, job: OwnedObjectPath) -> Result<(), Error> {
        let unit = self.unit.to_string();
        while let Some((ended, result)) = self.receiver.recv().await {
            if ended == job {
                return match result.as_str() {
                    "done" => Ok(()),
                    _ => Err(Error::Job { verb, unit, result }),
                };
            }
        }
        Err(Error::Lost { verb, unit })
    }
}

impl MainProcess {
    /// Takes over the values that a signal or a reply carries.
    pub(super) fn updated<'v>(mut self, value: impl Fn(&str) -> Option<&'v Variant<'v>>) -> Self {
        let u32_of = |name| value(name).and_then(|v| u32::try_from(v).ok());
        let i32_of = |name| value(name).and_then(|v| i32::try_from(v).ok());
        self.pid = u32_of("MainPID").unwrap_or(self.pid);
        self.last_pid = u32_of("ExecMainPID").unwrap_or(self.last_pid);
        if let (Some(code), Some(status)) = (i32_of("ExecMainCode"), i32_of("ExecMainStatus")) {
            let at_usec = value("ExecMainExitTimestamp").and_then(|v| u64::try_from(v).ok()).unwrap_or(0);
            self.ended = (code != 0).then_some(Ended { code, status, at_usec });
        }
        self
    }
}

pub(super) const SERVICE_INTERFACE: &str = "org.freedesktop.systemd1.Service";
const UNIT_INTERFACE: &str = "org.freedesktop.systemd1.Unit";
const ALREADY_SUBSCRIBED: &str = "org.freedesktop.systemd1.AlreadySubscribed";
const NO_SUCH_UNIT: &str = "org.freedesktop.systemd1.NoSuchUnit";
const UNIT_EXISTS: &str = "org.freedesktop.systemd1.UnitExists";

/// Signals waiting to be read. systemd sends at most 100 units' worth at once.
const MAX_QUEUED: std::num::NonZeroUsize = std::num::NonZeroUsize::new(1024).unwrap();

fn text(values: &HashMap<String, OwnedVariant>, name: &str) -> Option<String> {
    values.get(name).and_then(|value| String::try_from(&**value).ok())
}

pub(super) fn unreachable(error: zbus::Error) -> Error {
    Error::Unreachable { reason: error.to_string() }
}

/// Errors are told apart by name, never by text.
fn call_error(verb: &'static str, unit: &UnitName, error: zbus::Error) -> Error {
    let unit = unit.to_string();
    match error {
        zbus::Error::MethodError(name, reason, _) => match name.as_str() {
            NO_SUCH_UNIT => Error::NotLoaded { unit },
            UNIT_EXISTS => Error::Exists { unit },
            other => {
                Error::Refused { verb, unit, name: other.to_owned(), reason: reason.unwrap_or_default() }
            }
        },
        zbus::Error::FDO(error) => match *error {
            zbus::fdo::Error::InvalidArgs(reason) => {
                Error::Refused { verb, unit, name: "InvalidArgs".to_owned(), reason }
            }
            zbus::fdo::Error::PropertyReadOnly(reason) => {
                Error::Refused { verb, unit, name: "PropertyReadOnly".to_owned(), reason }
            }
            other => Error::Unreachable { reason: other.to_string() },
        },
        other => unreachable(other),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exits_are_told_in_containerds_numbers() {
        let ended = |code, status| Ended { code, status, at_usec: 0 }.exit_status();
        assert_eq!(ended(1, 0), 0);
        assert_eq!(ended(1, 255), 255);
        assert_eq!(ended(2, 9), 137);
        assert_eq!(ended(3, 11), 139);
    }

    #[test]
    fn a_main_process_has_ended_only_if_systemd_says_how() {
        let values = |code: i32| {
            HashMap::from([
                ("MainPID", Variant::from(0_u32)),
                ("ExecMainCode", Variant::from(code)),
                ("ExecMainStatus", Variant::from(3_i32)),
                ("ExecMainExitTimestamp", Variant::from(77_u64)),
            ])
        };
        let not_yet = values(0);
        assert_eq!(MainProcess::default().updated(|n| not_yet.get(n)).ended, None);
        let ended = values(1);
        let process = MainProcess::default().updated(|n| ended.get(n));
        assert_eq!(process.ended, Some(Ended { code: 1, status: 3, at_usec: 77 }));
    }
}
