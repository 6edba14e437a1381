//! systemd's signals, turned into observations.
//!
//! A fixed set of match rules, however many containers there are. Signals repeat, merge and get lost: whoever
//! takes [`Observations`] must not mind one twice, and must look at every unit itself when some may have been
//! missed. Units are never taken for ended because they vanish (`UnitRemoved` is sent for every living unit at a
//! daemon-reload). Which messages are believed is decided in `signals`.

use std::sync::Arc;
use std::time::Duration;

use futures_util::StreamExt;
use zbus::names::{BusName, OwnedUniqueName};
use zbus::{MatchRule, MessageStream};

use super::bus::SERVICE_INTERFACE;
use super::error::{self, Error};
use super::manager::Manager;
use super::observations::Observations;
use super::signals::{self, BUS, MANAGER_INTERFACE, PROPERTIES_INTERFACE, SYSTEMD, Signal};

/// Connects, and keeps connecting when the bus goes away.
///
/// Resolves `first` once the first connection listens: what happens from then on is observed.
pub async fn run(
    manager: Arc<Manager>,
    observations: Arc<Observations>,
    first: tokio::sync::oneshot::Sender<()>,
) {
    let mut first = Some(first);
    let mut pause = FIRST_PAUSE;
    let mut told = false;
    loop {
        match listen(&manager).await {
            Ok((stream, systemd)) => {
                pause = FIRST_PAUSE;
                told = false;
                manager.listens();
                match first.take() {
                    // Whoever waits starts with a look at every unit anyway.
                    Some(first) => drop(first.send(())),
                    None => {
                        tracing::warn!("connected to D-Bus again");
                        observations.missed();
                    }
                }
                forward(stream, systemd, &manager, &observations).await;
                manager.disconnected().await;
                tracing::warn!("lost the connection to D-Bus");
            }
            Err(error) => {
                manager.disconnected().await;
                if !told {
                    tracing::warn!(%error, "can't receive systemd's signals, trying again: {error}");
                    told = true;
                }
                // Nothing announces that the bus is back: its socket has to be tried.
                tokio::time::sleep(pause).await;
                pause = (pause * 2).min(LONGEST_PAUSE);
            }
        }
    }
}

const FIRST_PAUSE: Duration = Duration::from_millis(10);
const LONGEST_PAUSE: Duration = Duration::from_secs(1);

/// systemd's signals, and its unique name as it was when they began to arrive. A later change of the name is
/// among them.
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
        // It executes itself anew, and is about to have its name again.
        Err(zbus::fdo::Error::NameHasNoOwner(_)) => None,
        Err(error) => return Err(error::unreachable(error.into())),
    };
    manager.subscribe().await?;
    Ok((stream, systemd))
}

fn rules() -> Result<Vec<MatchRule<'static>>, zbus::Error> {
    let signal = || MatchRule::builder().msg_type(zbus::message::Type::Signal);
    let manager = |member| signal().sender(SYSTEMD).interface(MANAGER_INTERFACE).member(member);
    Ok(vec![
        // Carries MainPID and ExecMain…, with values; half the traffic of listening to Unit as well.
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

async fn forward(
    mut stream: MessageStream,
    mut systemd: Option<OwnedUniqueName>,
    manager: &Manager,
    observations: &Observations,
) {
    while let Some(Ok(message)) = stream.next().await {
        match signals::read(&message, systemd.as_ref()) {
            Some(Signal::Service { unit, main }) => observations.told(unit, main),
            Some(Signal::Job { unit, job, result }) => manager.jobs.ended(&unit, &job, &result),
            Some(Signal::Reloaded) => observations.missed(),
            Some(Signal::Owner(owner)) => {
                manager.bus.ownership_changed(owner.is_some());
                systemd = owner;
                observations.missed();
            }
            None => {}
        }
    }
}
