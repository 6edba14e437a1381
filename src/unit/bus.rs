//! The connection to the system bus, and calls to systemd over it.
//!
//! The connection can end (dbus restarted) and come back; calls made in the meantime wait for it. systemd itself leaves the
//! bus for a moment when it executes itself again (`daemon-reexec`); calls that it does not answer are repeated.

use std::io;
use std::num::NonZeroUsize;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::{Semaphore, SemaphorePermit, watch};
use tokio::time::{Instant, sleep, timeout, timeout_at};
use zbus::{Connection, OwnedObjectPath, Variant};

use crate::fault::{self, Failure};

use super::error::{Error, LIMITS_EXCEEDED, unreachable};
use super::socket;

/// How long a call waits for a connection, and how long for its reply.
pub(super) const CALL_LIMIT: Duration = Duration::from_secs(25);

/// How long a call waits for a connection once there was none for [`CALL_LIMIT`]. A Create that fails for that reason makes
/// several calls to remove what it has left.
const OUTAGE_LIMIT: Duration = Duration::from_secs(2);

/// How many calls may wait for their replies. dbus-daemon refuses the 129th of a connection
/// (max_replies_per_connection).
const MAX_CALLS: usize = 100;

/// How long a call waits after the bus has refused it because too many calls wait for their replies.
const REFUSED_PAUSE: Duration = Duration::from_millis(50);

/// Signals waiting to be read. systemd sends at most 100 units' worth at once.
const MAX_QUEUED: NonZeroUsize = NonZeroUsize::new(1024).unwrap();

/// How long the signal that systemd has lost its name may take to arrive.
const SIGNAL_LIMIT: Duration = Duration::from_millis(50);

/// The interface of every unit's object.
pub(super) const UNIT_INTERFACE: &str = "org.freedesktop.systemd1.Unit";
/// The interface of a service's object.
pub const SERVICE_INTERFACE: &str = "org.freedesktop.systemd1.Service";

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
    #[zbus(property)]
    fn system_state(&self) -> zbus::Result<String>;
}

/// A unit in a list: name, description, load, active and sub state, which unit it follows, its object, and id, type and
/// object of its job.
pub(super) type Listed =
    (String, String, String, String, String, String, OwnedObjectPath, u32, String, OwnedObjectPath);

/// systemd's manager object, as called over `connection`.
pub(super) async fn manager_over(connection: &Connection) -> zbus::Result<SystemdManagerProxy<'static>> {
    SystemdManagerProxy::builder(connection).cache_properties(zbus::proxy::CacheProperties::No).build().await
}

/// The daemon's connection to the system bus.
pub(super) struct Bus {
    connection: watch::Sender<Option<Connection>>,
    /// When the last connection ended.
    lost: Mutex<Instant>,
    /// systemd has its name on the bus.
    owned: watch::Sender<bool>,
    /// Lets calls through, up to [`MAX_CALLS`] at a time; the others queue. It is never closed.
    calls: Semaphore,
}

impl Default for Bus {
    fn default() -> Self {
        Self {
            connection: watch::Sender::new(None),
            lost: Mutex::new(Instant::now()),
            owned: watch::Sender::new(true),
            calls: Semaphore::new(MAX_CALLS),
        }
    }
}

/// Checks that somebody accepts connections to the bus, without waiting for anything.
///
/// # Errors
/// [`Error::Unreachable`]
pub fn check() -> Result<(), Error> {
    socket::check().map_err(unreachable)
}

/// How a call was answered.
pub(super) struct Reply<T> {
    pub(super) result: zbus::Result<T>,
    /// An earlier try was not answered: systemd may have carried it out.
    pub(super) is_repeated: bool,
}

impl Bus {
    /// Opens a connection for calls; [`super::watch`] receives signals over it too.
    ///
    /// # Errors
    /// [`Error::Unreachable`]
    pub(super) async fn connect(&self) -> Result<Connection, Error> {
        let client = socket::client(socket::connect().await.map_err(unreachable)?);
        let builder = client.method_timeout(CALL_LIMIT).max_queued(MAX_QUEUED);
        let connection = builder.build().await.map_err(unreachable)?;
        self.connection.send_replace(Some(connection.clone()));
        Ok(connection)
    }

    /// Makes calls over this connection.
    #[cfg(test)]
    pub(super) fn connected(&self, connection: Connection) {
        self.connection.send_replace(Some(connection));
    }

    /// Records that the connection has ended: later calls wait for the next connection.
    pub(super) fn disconnected(&self) {
        // Called again after each failed attempt to connect.
        if self.connection.send_replace(None).is_some() {
            *self.lost.lock().unwrap_or_else(PoisonError::into_inner) = Instant::now();
        }
    }

    /// Records whether systemd owns its name on the bus.
    pub(super) fn ownership_changed(&self, owned: bool) {
        self.owned.send_replace(owned);
    }

    /// systemd's manager object, once there is a connection.
    ///
    /// # Errors
    /// There is none for [`CALL_LIMIT`].
    pub(super) async fn manager(&self) -> zbus::Result<SystemdManagerProxy<'static>> {
        let mut receiver = self.connection.subscribe();
        let lost = *self.lost.lock().unwrap_or_else(PoisonError::into_inner);
        let limit = (lost + CALL_LIMIT).max(Instant::now() + OUTAGE_LIMIT);
        let found = {
            let connected = timeout_at(limit, receiver.wait_for(Option::is_some)).await;
            connected.ok().and_then(|found| found.ok()?.clone())
        };
        let none = || io::Error::new(io::ErrorKind::TimedOut, "no connection");
        manager_over(&found.ok_or_else(|| zbus::Error::InputOutput(Arc::new(none())))?).await
    }

    /// Waits until one more call may be made. The call counts until what this returns is dropped.
    pub(super) async fn turn(&self) -> Option<SemaphorePermit<'_>> {
        // The semaphore is never closed, so there always is a permit.
        self.calls.acquire().await.ok()
    }

    /// Makes a call that may be made twice, until systemd answers it or [`CALL_LIMIT`] is over.
    pub(super) async fn call<T, C>(&self, call: impl Fn(SystemdManagerProxy<'static>) -> C) -> zbus::Result<T>
    where
        C: Future<Output = zbus::Result<T>>,
    {
        let attempt = || async {
            let manager = self.manager().await?;
            let _turn = self.turn().await;
            call(manager).await
        };
        self.repeat(attempt).await.result
    }

    /// Repeats an attempt for as long as systemd does not answer it, up to [`CALL_LIMIT`].
    pub(super) async fn repeat<T, A>(&self, attempt: impl Fn() -> A) -> Reply<T>
    where
        A: Future<Output = zbus::Result<T>>,
    {
        let (mut owned, limit) = (self.owned.subscribe(), Instant::now() + CALL_LIMIT);
        let mut is_repeated = false;
        if let Some(failure) = fault::due(&[Failure::TimedOut, Failure::ReplyLost, Failure::Denied]) {
            if failure == Failure::ReplyLost {
                drop(attempt().await);
            }
            return Reply { result: Err(asked_for(failure)), is_repeated: failure != Failure::Denied };
        }
        loop {
            let result = match fault::due(&[Failure::LimitsExceeded]) {
                None => attempt().await,
                Some(failure) => Err(asked_for(failure)),
            };
            if Instant::now() >= limit {
                return Reply { result, is_repeated };
            }
            match &result {
                // The bus has not passed it on.
                Err(error) if is_over_limit(error) => sleep(REFUSED_PAUSE).await,
                Err(error) if is_gone(error) => {
                    is_repeated = true;
                    // The signal that systemd has lost its name may arrive after the failed reply, or have arrived
                    // before the call.
                    let _ = timeout(SIGNAL_LIMIT, owned.changed()).await;
                    let _ = timeout_at(limit, owned.wait_for(|owned| *owned)).await;
                }
                Ok(_) | Err(_) => return Reply { result, is_repeated },
            }
        }
    }
}

/// The error of a call that a test lets fail, as the bus reports it.
fn asked_for(failure: Failure) -> zbus::Error {
    let name = match failure {
        Failure::LimitsExceeded => LIMITS_EXCEEDED,
        Failure::Denied => "org.freedesktop.DBus.Error.AccessDenied",
        _ => return zbus::Error::InputOutput(Arc::new(io::ErrorKind::TimedOut.into())),
    };
    answered_with(name)
}

/// The error of a call that the bus answers with an error of this name.
fn answered_with(name: &str) -> zbus::Error {
    let error = || {
        let call = zbus::Message::method_call("/", "Asked").build(&())?;
        zbus::Message::error(&call.header(), name).build(&"a test has asked for this error")
    };
    error().map_or_else(|error| error, zbus::Error::from)
}

/// True if the bus has refused to pass a call on, because too many wait for their replies.
fn is_over_limit(error: &zbus::Error) -> bool {
    match error {
        zbus::Error::MethodError(name, ..) => name.as_str() == LIMITS_EXCEEDED,
        zbus::Error::FDO(error) => matches!(**error, zbus::fdo::Error::LimitsExceeded(_)),
        _ => false,
    }
}

/// True if nobody has answered a call because nobody was there: when systemd executes itself again, the bus answers
/// `NoReply`, or that nobody has the name. dbus-daemon asks systemd to start the owner of a name that nobody has, and answers
/// `TimedOut` if the owner does not come: systemd itself, which was not there.
pub(super) fn is_gone(error: &zbus::Error) -> bool {
    const GONE: [&str; 4] = [
        "org.freedesktop.DBus.Error.TimedOut",
        "org.freedesktop.DBus.Error.NoReply",
        "org.freedesktop.DBus.Error.ServiceUnknown",
        "org.freedesktop.DBus.Error.NameHasNoOwner",
    ];
    match error {
        zbus::Error::MethodError(name, ..) => GONE.contains(&name.as_str()),
        // The bus does not run.
        zbus::Error::InputOutput(_) => true,
        zbus::Error::FDO(error) => matches!(
            **error,
            zbus::fdo::Error::NoReply(_)
                | zbus::fdo::Error::TimedOut(_)
                | zbus::fdo::Error::ServiceUnknown(_)
                | zbus::fdo::Error::NameHasNoOwner(_)
        ),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_that_nobody_was_there_are_told_from_answers_of_systemd() {
        for name in ["NoReply", "TimedOut", "ServiceUnknown", "NameHasNoOwner"] {
            assert!(is_gone(&answered_with(&format!("org.freedesktop.DBus.Error.{name}"))), "{name}");
        }
        for name in ["org.freedesktop.DBus.Error.AccessDenied", "org.freedesktop.systemd1.NoSuchUnit"] {
            assert!(!is_gone(&answered_with(name)), "{name}");
        }
    }
}
