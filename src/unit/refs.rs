//! References to units that outlive the daemon.
//!
//! systemd unloads a stopped unit together with the exit code of its process, unless a client of the bus holds a reference
//! to the unit. A reference lasts until its connection is closed. The connection with the references is therefore in the
//! descriptor store: a unit that is stopped while the daemon is down keeps its exit code.
//!
//! Only replies are sent to this connection, so it collects no messages while no daemon reads. Anything else that
//! arrives is not read.

use std::collections::HashSet;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use tokio::sync::Mutex;
use zbus::Connection;

use crate::id::UnitName;

use super::bus::{CALL_LIMIT, SystemdManagerProxy, is_gone, manager_over};
use super::fd_store::FdStore;
use super::socket;

const NOT_REFERENCED: &str = "org.freedesktop.systemd1.NotReferenced";
/// The prefix of the connections' names in the descriptor store. A number follows.
const PREFIX: &str = "r";
/// How many connections of earlier daemons are kept. A daemon that crashes again and again leaves one each time, and
/// the bus allows 256 per user.
const MAX_EARLIER: usize = 4;

/// The connection that holds the references.
pub struct Refs {
    store: Arc<FdStore>,
    open: Mutex<Option<Open>>,
    next: AtomicU64,
    /// The connections of earlier daemons, with their own references.
    earlier: std::sync::Mutex<Vec<(String, OwnedFd)>>,
}

struct Open {
    connection: Connection,
    /// The connection's name in the descriptor store.
    name: String,
    /// The referenced units. systemd counts references, and one release must be enough: so each unit has only one.
    units: HashSet<UnitName>,
}

impl Refs {
    /// Takes the connections of earlier daemons out of `kept`, which holds what the descriptor store had.
    pub fn new(store: Arc<FdStore>, kept: &mut Vec<(String, OwnedFd)>) -> Self {
        let number = |name: &str| name.strip_prefix(PREFIX).and_then(|rest| rest.parse::<u64>().ok());
        let mut earlier: Vec<_> = kept.extract_if(.., |(name, _)| number(name).is_some()).collect();
        earlier.sort_by_key(|(name, _)| number(name));
        let next = earlier.iter().filter_map(|(name, _)| number(name)).max().map_or(0, |last| last + 1);
        // The first connection has the references of the last daemon that finished its recovery. The later ones belong
        // to daemons that crashed before that.
        while earlier.len() > MAX_EARLIER {
            let (name, _) = earlier.remove(1);
            store.forget(&name);
        }
        let (next, earlier) = (AtomicU64::new(next), std::sync::Mutex::new(earlier));
        Self { store, open: Mutex::default(), next, earlier }
    }

    /// systemd's manager object for a call that adds a reference to a unit.
    pub(super) async fn manager_for(&self, unit: &UnitName) -> zbus::Result<SystemdManagerProxy<'static>> {
        let (connection, _) = self.with_open(|open| open.units.insert(unit.clone())).await?;
        manager_over(&connection).await
    }

    /// Changes the open connection, which is opened if there is none. Returns it with the result of the change.
    async fn with_open<T>(&self, change: impl FnOnce(&mut Open) -> T) -> zbus::Result<(Connection, T)> {
        let mut open = self.open.lock().await;
        let mut found = match open.take() {
            Some(found) => found,
            None => self.connect().await?,
        };
        let changed = change(&mut found);
        let connection = found.connection.clone();
        *open = Some(found);
        Ok((connection, changed))
    }

    async fn connect(&self) -> zbus::Result<Open> {
        let stream = socket::connect().await?;
        let name = format!("{PREFIX}{}", self.next.fetch_add(1, Ordering::Relaxed));
        if let Err(error) = self.store.keep(&name, &[stream.as_fd()]) {
            tracing::warn!(%error, "can't store the connection that references units, so a unit that is stopped while the daemon is down may lose its exit code: {error}");
        }
        match socket::client(stream).method_timeout(CALL_LIMIT).build().await {
            Ok(connection) => Ok(Open { connection, name, units: HashSet::new() }),
            Err(error) => {
                self.store.forget(&name);
                Err(error)
            }
        }
    }

    /// The bus has ended, and all references with it.
    pub(super) async fn disconnected(&self) {
        if let Some(open) = self.open.lock().await.take() {
            self.store.forget(&open.name);
        }
    }

    /// Adds a reference to a unit that has none. A unit that is not loaded has no exit code to keep.
    pub(super) async fn reference(&self, unit: &UnitName) {
        if self.open.lock().await.as_ref().is_some_and(|open| open.units.contains(unit)) {
            return;
        }
        let referred = async { self.manager_for(unit).await?.ref_unit(unit.as_str()).await };
        if let Err(error) = referred.await {
            // The daemon references all units again once the bus is back.
            tracing::debug!(%unit, %error, "can't reference {unit}: {error}");
        }
    }

    /// Closes the connections of earlier daemons, which ends their references.
    pub(super) fn forget_earlier(&self) {
        let earlier =
            std::mem::take(&mut *self.earlier.lock().unwrap_or_else(std::sync::PoisonError::into_inner));
        for (name, _) in earlier {
            self.store.forget(&name);
        }
    }

    /// Removes the reference to a unit: systemd unloads the unit once it is stopped. The caller tries again if systemd did
    /// not answer.
    pub(super) async fn release(&self, unit: &UnitName) -> zbus::Result<()> {
        let (connection, referred) = self.with_open(|open| open.units.remove(unit)).await?;
        let proxy = manager_over(&connection).await?;
        let released = if referred { proxy.unref_unit(unit.as_str()).await } else { Ok(()) };
        let is_lost =
            matches!(&released, Err(zbus::Error::MethodError(name, ..)) if name.as_str() == NOT_REFERENCED);
        if is_lost || !referred {
            // The reference was lost with the bus, or when systemd executed itself again. Since then systemd has not
            // checked whether the unit can be unloaded. It does so when a reference is removed: a new one is added and
            // removed. The unit may not exist any more.
            return match proxy.ref_unit(unit.as_str()).await {
                Err(error) if is_gone(&error) => Err(error),
                Err(_) => Ok(()),
                Ok(()) => proxy.unref_unit(unit.as_str()).await,
            };
        }
        if released.as_ref().is_err_and(is_gone)
            && let Some(open) = self.open.lock().await.as_mut()
        {
            open.units.insert(unit.clone());
        }
        released
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixStream;

    #[test]
    fn daemons_that_end_soon_do_not_use_up_the_connections_of_root() {
        let store = Arc::new(FdStore::adopt(Vec::new()).unwrap().0);
        let kept = |name: &str| (name.to_owned(), OwnedFd::from(UnixStream::pair().unwrap().0));
        let mut all: Vec<_> = (1..=250).rev().map(|number| kept(&format!("r{number}"))).collect();
        all.push(kept("c7"));
        let refs = Refs::new(store, &mut all);
        let names: Vec<String> = refs.earlier.lock().unwrap().iter().map(|(name, _)| name.clone()).collect();
        assert_eq!(names, ["r1", "r248", "r249", "r250"]);
        assert_eq!(refs.next.load(Ordering::Relaxed), 251);
        assert_eq!(all.len(), 1, "a descriptor that is no connection to the bus stays");
    }
}
