//! systemd's signals, turned into observations.
//!
//! The number of match rules does not depend on the number of containers. Signals can be repeated, merged and lost: the
//! consumer of the [observations](super::observations) must handle repetitions, and must query every unit when signals may
//! have been missed. A unit that disappears does not count as ended: systemd sends `UnitRemoved` for every loaded unit at a
//! daemon-reload. Which messages are believed is decided in `signals`.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use futures_util::StreamExt;
use tokio::task::JoinSet;
use zbus::names::{BusName, OwnedUniqueName};
use zbus::{MatchRule, MessageStream};

use super::bus::SERVICE_INTERFACE;
use super::error::{self, Error};
use super::manager::Manager;
use super::search_path::TRANSIENT;
use super::service_d;
use super::signals::{self, BUS, MANAGER_INTERFACE, PROPERTIES_INTERFACE, SYSTEMD, Signal};

/// Connects to the bus, and connects again whenever the connection ends.
///
/// Resolves `first` once signals arrive over the first connection: nothing is missed from then on.
pub async fn run(manager: Arc<Manager>, first: tokio::sync::oneshot::Sender<()>) {
    let mut first = Some(first);
    let mut pause = FIRST_PAUSE;
    let mut reported = false;
    loop {
        match listen(&manager).await {
            Ok((stream, systemd)) => {
                pause = FIRST_PAUSE;
                reported = false;
                manager.listens();
                match first.take() {
                    // Recovery waits for this, and then queries every unit.
                    Some(first) => drop(first.send(())),
                    None => {
                        tracing::warn!("connected to D-Bus again");
                        manager.observations.missed();
                    }
                }
                forward(stream, systemd, &manager).await;
                manager.disconnected().await;
                tracing::warn!("lost the connection to D-Bus");
            }
            Err(error) => {
                manager.disconnected().await;
                if !reported {
                    tracing::warn!(%error, "can't receive systemd's signals, trying again: {error}");
                    reported = true;
                }
                // No event announces that the bus is back, so it is tried again.
                tokio::time::sleep(pause).await;
                pause = (pause * 2).min(LONGEST_PAUSE);
            }
        }
    }
}

const FIRST_PAUSE: Duration = Duration::from_millis(10);
const LONGEST_PAUSE: Duration = Duration::from_secs(1);

/// Subscribes to systemd's signals. Returns their stream, and systemd's unique name at its beginning. A later change of
/// the name arrives as a signal.
async fn listen(manager: &Manager) -> Result<(MessageStream, Option<OwnedUniqueName>), Error> {
    let connection = manager.connect().await?;
    let stream = MessageStream::from(&connection);
    let bus = zbus::fdo::DBusProxy::new(&connection).await.map_err(error::unreachable)?;
    for rule in rules().map_err(error::unreachable)? {
        bus.add_match_rule(rule).await.map_err(|error| error::unreachable(error.into()))?;
    }
    let name = BusName::try_from(SYSTEMD).map_err(error::unreachable)?;
    let systemd = match bus.get_name_owner(name).await {
        Ok(owner) => Some(owner),
        // systemd executes itself again, and will get its name back.
        Err(zbus::fdo::Error::NameHasNoOwner(_)) => None,
        Err(error) => return Err(error::unreachable(error.into())),
    };
    manager.bus.ownership_changed(systemd.is_some());
    manager.subscribe().await?;
    Ok((stream, systemd))
}

fn rules() -> Result<Vec<MatchRule<'static>>, zbus::Error> {
    let signal = || MatchRule::builder().msg_type(zbus::message::Type::Signal);
    let manager = |member| signal().sender(SYSTEMD).interface(MANAGER_INTERFACE).member(member);
    Ok(vec![
        // Contains MainPID and ExecMain… with their values. The interface Unit would double the traffic.
        signal()
            .sender(SYSTEMD)
            .interface(PROPERTIES_INTERFACE)
            .member("PropertiesChanged")
            .path_namespace("/org/freedesktop/systemd1/unit")
            .add_arg(SERVICE_INTERFACE)
            .build()?,
        manager("JobRemoved").build()?,
        manager("Reloading").build()?,
        signal().sender(BUS).interface(BUS).member("NameOwnerChanged").add_arg(SYSTEMD).build()?,
    ])
}

async fn forward(mut stream: MessageStream, mut systemd: Option<OwnedUniqueName>, manager: &Arc<Manager>) {
    let observations = &manager.observations;
    // Ended by the next change of the owner, and with the connection.
    let mut subscribing = JoinSet::new();
    loop {
        let message = tokio::select! {
            () = manager.references_lost() => {
                observations.missed();
                continue;
            }
            next = manager.backlog.next(stream.next()) => match next {
                Some(Ok(message)) => message,
                Some(Err(_)) | None => return,
            },
        };
        match signals::read(&message, systemd.as_ref()) {
            Some(Signal::Service { unit, main }) => observations.reported(unit, main),
            Some(Signal::Spawned(unit)) => manager.jobs.spawned(&unit),
            Some(Signal::Job { unit, job, result }) => manager.jobs.ended(&unit, &job, &result),
            Some(Signal::Reloading) => shield_loaded(),
            Some(Signal::Reloaded) => observations.missed(),
            Some(Signal::Owner(owner)) => {
                manager.bus.ownership_changed(owner.is_some());
                systemd = owner;
                drop(std::mem::take(&mut subscribing));
                if systemd.is_some() {
                    // In a separate task, so that this loop reads the signals that arrive meanwhile.
                    subscribing.spawn(subscribe_again(manager.clone()));
                }
                observations.missed();
            }
            None => {}
        }
    }
}

/// Protects the units that run from drop-ins for all services which systemd is about to read.
fn shield_loaded() {
    // On another thread, so that the caller reads the signals that arrive meanwhile.
    tokio::task::spawn_blocking(|| {
        if let Err(error) = service_d::shield_loaded(Path::new(TRANSIENT)) {
            tracing::warn!(%error, "can't protect running units from drop-ins for all services: {error}");
        }
    });
}

/// Subscribes to the signals of a systemd that has a new connection to the bus. Units are queried again once systemd
/// sends its signals: until then, ends of jobs and of processes can be missed.
async fn subscribe_again(manager: Arc<Manager>) {
    let mut pause = FIRST_PAUSE;
    while let Err(error) = manager.subscribe_again().await {
        if pause == FIRST_PAUSE {
            tracing::warn!(%error, "can't subscribe to systemd's signals again, trying once more: {error}");
        }
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(LONGEST_PAUSE);
    }
    manager.observations.missed();
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::unit::fake_bus::{DENIED, FakeBus};

    #[tokio::test]
    async fn the_daemon_subscribes_again_until_systemd_accepts_it() {
        let (bus, connection) = FakeBus::start([("Subscribe", DENIED), ("Subscribe", DENIED)]).await;
        let manager = Arc::new(Manager::default());
        manager.bus.connected(connection);
        let observations = manager.observations.clone();
        let waiter = manager.jobs.wait_for(&crate::id::UnitName::new("a.service").unwrap());
        subscribe_again(manager).await;
        tokio::time::timeout(Duration::from_secs(30), observations.receive_missed()).await.unwrap();
        let waited = waiter.ended("start", None).await;
        assert!(matches!(waited, Err(Error::Lost { .. })), "{waited:?}");
        assert_eq!(bus.calls("Subscribe"), 3);
    }
}
