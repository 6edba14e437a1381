//! systemd's manager, as the daemon uses it: units are started, changed, queried and stopped.

mod change;
mod details;
mod obstacle;
mod oom;
mod query;
mod references;
mod slices;
mod start;
mod stop;

use std::sync::Arc;

use tokio::sync::{OnceCell, RwLock, watch};
use zbus::Connection;

use super::annotation::Types;
use super::backlog::Backlog;
use super::bus::Bus;
use super::error::{Error, unreachable};
use super::job::Jobs;
use super::observations::Observations;
use super::properties::SystemdVersion;
use super::refs::Refs;

/// The verbs of jobs, for errors.
const START: &str = "start";
const STOP: &str = "stop";

const ALREADY_SUBSCRIBED: &str = "org.freedesktop.systemd1.AlreadySubscribed";

/// systemd's manager, over the system bus.
#[derive(Default)]
pub struct Manager {
    pub(super) bus: Bus,
    pub(super) jobs: Jobs,
    /// What systemd has reported, and what was not handled yet.
    pub observations: Arc<Observations>,
    pub(super) backlog: Backlog,
    /// How often the daemon has begun to receive signals: once for each connection.
    listening: watch::Sender<u64>,
    refs: Option<Arc<Refs>>,
    /// Held for writing while a slice is being stopped, for reading while a unit is started.
    slices: RwLock<()>,
    /// The types of a service's properties, once they are asked for.
    types: OnceCell<Arc<Types>>,
}

impl Manager {
    /// A manager whose references to units outlive the process.
    pub fn with_refs(refs: Arc<Refs>) -> Self {
        Self { refs: Some(refs), ..Self::default() }
    }

    /// Makes systemd read all its units again.
    pub(super) async fn reload(&self) -> zbus::Result<()> {
        self.bus.call(|manager| async move { manager.reload().await }).await
    }

    /// A manager with a connection, for programs that call systemd and receive no signals. In the daemon, [`super::watch`] opens
    /// the connection.
    ///
    /// # Errors
    /// [`Error::Unreachable`]
    pub async fn connected() -> Result<Self, Error> {
        let manager = Self::default();
        // The manager keeps a copy of the connection.
        manager.connect().await.map(drop)?;
        Ok(manager)
    }

    /// Makes systemd read all its units again.
    ///
    /// # Errors
    /// [`Error::Unreachable`], or systemd's refusal.
    pub async fn connect_and_reload() -> Result<(), Error> {
        let manager = Self::connected().await?;
        manager.reload().await.map_err(unreachable)
    }

    /// Opens a connection to the bus for calls; [`super::watch`] receives signals over it too.
    ///
    /// # Errors
    /// [`Error::Unreachable`]
    pub async fn connect(&self) -> Result<Connection, Error> {
        self.bus.connect().await
    }

    /// The connection has ended: later calls wait for the next one, and the ends of jobs can't be received.
    pub(super) async fn disconnected(&self) {
        self.bus.disconnected();
        self.backlog.dropped();
        self.jobs.lose_all();
        if let Some(refs) = &self.refs {
            refs.disconnected().await;
        }
    }

    /// Signals are received from now on; earlier ones may have been missed. Every task that waits for a job queries
    /// its unit.
    pub(super) fn listens(&self) {
        self.jobs.lose_all();
        self.listening.send_modify(|times| *times += 1);
    }

    pub(super) async fn subscribe(&self) -> Result<(), Error> {
        let subscribed = async { self.bus.manager().await?.subscribe().await };
        match subscribed.await {
            Ok(()) => Ok(()),
            Err(zbus::Error::MethodError(name, ..)) if name.as_str() == ALREADY_SUBSCRIBED => Ok(()),
            Err(error) => Err(unreachable(error)),
        }
    }

    /// Subscribes again to a systemd that has executed itself again (`daemon-reexec`). systemd restores its subscribers
    /// some time after it has got its name on the bus (262), and sends signals to nobody until then. Its reply to this
    /// call shows that it sends them now.
    ///
    /// # Errors
    /// [`Error::Unreachable`]
    pub(super) async fn subscribe_again(&self) -> Result<(), Error> {
        match self.bus.call(|manager| async move { manager.subscribe().await }).await {
            Err(zbus::Error::MethodError(name, ..)) if name.as_str() == ALREADY_SUBSCRIBED => {}
            subscribed => subscribed.map_err(unreachable)?,
        }
        self.listens();
        Ok(())
    }

    /// What systemd calls its version, supported or not.
    ///
    /// # Errors
    /// It can't be reached.
    pub async fn version(&self) -> Result<String, Error> {
        let found = async { self.bus.manager().await?.version().await };
        found.await.map_err(unreachable)
    }

    /// The version of a systemd that this program supports.
    ///
    /// # Errors
    /// [`Error::TooOld`], or it can't be reached.
    pub async fn supported_version(&self) -> Result<SystemdVersion, Error> {
        let found = self.version().await?;
        SystemdVersion::parse(&found).filter(|systemd| systemd.supported()).ok_or(Error::TooOld { found })
    }

    /// Resolves when all references are lost, but not the connection to the bus.
    pub(super) async fn references_lost(&self) {
        match &self.refs {
            Some(refs) => refs.lost().await,
            None => std::future::pending().await,
        }
    }
}
