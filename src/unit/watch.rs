//! systemd's signals, turned into observations.
//!
//! A fixed set of match rules, however many containers there are. Signals repeat, merge and get
//! lost: whoever receives an [`Observation`] must not mind one twice, and after [`Observation::Resync`]
//! must look at every unit itself. Units are never taken for ended because they vanish
//! (`UnitRemoved` is sent for every living unit at a daemon-reload).

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use futures_util::StreamExt;
use tokio::sync::mpsc;
use zbus::{MatchRule, Message, MessageStream, OwnedObjectPath, Variant};

use crate::id::UnitName;

use super::error::{self, Error};
use super::main_process::MainProcess;
use super::name;
use super::proxy::Manager;
use super::reading::SERVICE_INTERFACE;

/// What was noticed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Observation {
    /// A service's main process, as it is now.
    Service {
        /// The unit.
        unit: UnitName,
        /// Its main process.
        main: MainProcess,
    },
    /// Signals may have been missed: look at every unit.
    Resync,
}

/// Connects, and keeps connecting when the bus goes away, until the receiver is gone.
///
/// Resolves `first` once the first connection listens: what happens from then on is observed.
pub async fn run(
    manager: Arc<Manager>,
    observations: mpsc::UnboundedSender<Observation>,
    first: tokio::sync::oneshot::Sender<()>,
) {
    let mut first = Some(first);
    let mut pause = FIRST_PAUSE;
    let mut told = false;
    while !observations.is_closed() {
        match listen(&manager).await {
            Ok(stream) => {
                pause = FIRST_PAUSE;
                told = false;
                manager.listens();
                match first.take() {
                    // Whoever waits starts with a look at every unit anyway.
                    Some(first) => drop(first.send(())),
                    None => {
                        tracing::warn!("connected to D-Bus again");
                        drop(observations.send(Observation::Resync));
                    }
                }
                forward(stream, &manager, &observations).await;
                manager.disconnected().await;
                tracing::warn!("the connection to D-Bus is lost");
            }
            Err(error) => {
                manager.disconnected().await;
                if !told {
                    tracing::warn!(%error, "can't listen to systemd, trying again: {error}");
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

async fn listen(manager: &Manager) -> Result<MessageStream, Error> {
    let connection = manager.connect().await?;
    let stream = MessageStream::from(&connection);
    let bus = zbus::fdo::DBusProxy::new(&connection).await.map_err(error::unreachable)?;
    for rule in rules().map_err(error::unreachable)? {
        bus.add_match_rule(rule).await.map_err(|error| error::unreachable(error.into()))?;
    }
    manager.subscribe().await?;
    Ok(stream)
}

fn rules() -> Result<Vec<MatchRule<'static>>, zbus::Error> {
    const SYSTEMD: &str = "org.freedesktop.systemd1";
    const BUS: &str = "org.freedesktop.DBus";
    let signal = || MatchRule::builder().msg_type(zbus::message::Type::Signal);
    let manager =
        |member| signal().sender(SYSTEMD).interface("org.freedesktop.systemd1.Manager").member(member);
    Ok(vec![
        // Carries MainPID and ExecMain…, with values; half the traffic of listening to Unit as well.
        signal()
            .sender(SYSTEMD)
            .interface("org.freedesktop.DBus.Properties")
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
    manager: &Manager,
    observations: &mpsc::UnboundedSender<Observation>,
) {
    while let Some(Ok(message)) = stream.next().await {
        let header = message.header();
        if header.message_type() != zbus::message::Type::Signal {
            continue;
        }
        let seen = match header.member().map(|member| member.as_str()) {
            Some("PropertiesChanged") => service_changed(&message),
            Some("JobRemoved") => {
                job_removed(&message, manager);
                None
            }
            Some("Reloading") => {
                // true when it begins, false when it is over.
                message
                    .body()
                    .deserialize::<bool>()
                    .is_ok_and(|begins| !begins)
                    .then_some(Observation::Resync)
            }
            Some("NameOwnerChanged") => {
                let owner =
                    message.body().deserialize::<(&str, &str, &str)>().map(|(_, _, new)| !new.is_empty());
                manager.ownership_changed(owner.unwrap_or(true));
                Some(Observation::Resync)
            }
            Some(_) | None => None,
        };
        if let Some(seen) = seen
            && observations.send(seen).is_err()
        {
            return;
        }
    }
}

fn service_changed(message: &Message) -> Option<Observation> {
    let header = message.header();
    let path = header.path()?.as_str();
    let unit = name::from_object_path(path).filter(|unit| unit.as_str().starts_with(name::PREFIX))?;
    let body = message.body();
    let (_, values, _): (&str, HashMap<&str, Variant<'_>>, Vec<&str>) = body.deserialize().ok()?;
    let main = MainProcess::default().updated(|name| values.get(name));
    Some(Observation::Service { unit, main })
}

fn job_removed(message: &Message, manager: &Manager) {
    let body = message.body();
    let Ok((_, job, unit, result)) = body.deserialize::<(u32, OwnedObjectPath, &str, &str)>() else {
        return;
    };
    if let Ok(unit) = UnitName::new(unit) {
        manager.jobs.ended(&unit, &job, result);
    }
}
