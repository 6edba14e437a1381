//! References to units that outlive the daemon.
//!
//! systemd unloads a stopped unit together with the exit code of its process, unless a client of the bus holds a reference
//! to the unit. A reference lasts until its connection is closed. The connection with the references is therefore in the
//! descriptor store: a unit that is stopped while the daemon is down keeps its exit code.
//!
//! Only replies are sent to this connection, so it collects no messages while no daemon reads. Anything else that
//! arrives is not read.
//!
//! For each reference, systemd has a match rule on the bus, and dbus-daemon allows a connection 512 match rules
//! (`max_match_rules_per_connection`), also that of systemd. If dbus-daemon refuses one, systemd closes its connection, and nobody
//! can reach systemd over the bus any more (seen with 252.39), or systemd loses the reference (257.13 and 262). So the number of
//! references is limited, also while all recoveries ask for one at the same time, and while an earlier daemon's are still there.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::io;
use std::net::Shutdown;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use tokio::io::AsyncReadExt;
use tokio::net::UnixStream;
use tokio::sync::{Mutex, Notify};
use tokio::time::timeout;
use zbus::Connection;

use crate::id::UnitName;

use super::bus::{CALL_LIMIT, SystemdManagerProxy, is_gone, manager_over};
use super::error::NO_SUCH_UNIT;
use super::fd_store::FdStore;
use super::socket;

const NOT_REFERENCED: &str = "org.freedesktop.systemd1.NotReferenced";
/// The prefix of the connections' names in the descriptor store. A number follows.
const PREFIX: &str = "r";
/// How many connections of earlier daemons are kept. A daemon that crashes again and again leaves one each time, and
/// the bus allows 256 per user.
const MAX_EARLIER: usize = 4;

/// How many match rules dbus-daemon allows systemd if its configuration says nothing (config-parser.c).
const MATCH_RULES: u64 = 512;

/// How long the bus may take to close a connection that this side has closed.
const CLOSE_LIMIT: Duration = Duration::from_secs(5);

/// The match rules of systemd that are for other things than references of ours.
const OTHER_RULES: u64 = 112;

/// How many units may have a reference with the bus's configuration.
pub fn limit(match_rules: Option<u64>) -> usize {
    usize::try_from(match_rules.unwrap_or(MATCH_RULES).saturating_sub(OTHER_RULES)).unwrap_or(usize::MAX)
}

/// The connection that holds the references.
pub struct Refs {
    store: Arc<FdStore>,
    open: Mutex<Option<Open>>,
    next: AtomicU64,
    /// How many references there may be.
    limit: usize,
    /// True once the log says that there are too many units.
    is_full: AtomicBool,
    /// The connection has ended, and all references with it, which nobody has noticed yet.
    lost: Notify,
    /// The connections of earlier daemons, with their own references.
    earlier: std::sync::Mutex<Vec<(String, OwnedFd)>>,
    /// How many match rules systemd may have for the references of earlier daemons. They count towards the limit.
    earlier_rules: AtomicUsize,
}

struct Open {
    connection: Connection,
    /// The connection's name in the descriptor store.
    name: String,
    /// The units for which systemd was asked for a reference.
    units: HashMap<UnitName, Reference>,
}

impl Open {
    /// The reference to a unit, a new one if the unit has none; `None` if there are too many. Calls at the same time can't exceed
    /// the limit, because the check and the addition are one step.
    fn reference(&mut self, unit: &UnitName, limit: usize) -> Option<&mut Reference> {
        let has_room = self.units.len() < limit;
        match self.units.entry(unit.clone()) {
            Entry::Occupied(known) => Some(known.into_mut()),
            Entry::Vacant(new) => has_room.then(|| new.insert(Reference::default())),
        }
    }
}

/// The reference to a unit.
#[derive(Clone, Copy, Default)]
struct Reference {
    /// systemd has it.
    is_certain: bool,
    /// How many there may be, as systemd counts references: a call without an answer may have added one. A release removes
    /// all of them.
    most: u32,
}

impl Refs {
    /// Takes the connections of earlier daemons out of `kept`, which holds what the descriptor store had.
    /// `limit`: how many references there may be ([`limit`]).
    pub fn new(store: Arc<FdStore>, kept: &mut Vec<(String, OwnedFd)>, limit: usize) -> Self {
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
        let (is_full, lost) = (AtomicBool::default(), Notify::new());
        let earlier_rules = AtomicUsize::default();
        Self { store, open: Mutex::default(), next, limit, is_full, lost, earlier, earlier_rules }
    }

    fn earlier(&self) -> std::sync::MutexGuard<'_, Vec<(String, OwnedFd)>> {
        self.earlier.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// Removes the references of earlier daemons if there is not enough room for theirs and for as many new ones.
    pub(super) async fn make_room(&self, units: usize) {
        let rules = units.saturating_mul(self.earlier().len());
        if rules.saturating_add(units) > self.limit {
            self.forget_earlier().await;
        } else {
            self.earlier_rules.store(rules, Ordering::Relaxed);
        }
    }

    /// systemd's manager object for a call that starts a unit with a reference to it; `None` if there are too many references.
    pub(super) async fn manager_for(
        &self,
        unit: &UnitName,
    ) -> zbus::Result<Option<SystemdManagerProxy<'static>>> {
        let new = Reference { is_certain: true, most: 1 };
        match self.with_reference(unit, |known| *known = new).await? {
            Some((connection, ..)) => manager_over(&connection).await.map(Some),
            None => Ok(None),
        }
    }

    /// Changes the reference to a unit, which is a new one if the unit has none. Returns the connection that has the references,
    /// its name in the descriptor store, and the result of the change. `None` if there are too many references.
    async fn with_reference<T>(
        &self,
        unit: &UnitName,
        change: impl Fn(&mut Reference) -> T,
    ) -> zbus::Result<Option<(Connection, String, T)>> {
        loop {
            let limit = self.limit.saturating_sub(self.earlier_rules.load(Ordering::Relaxed));
            let changed = self.with_open(|open| {
                let name = open.name.clone();
                open.reference(unit, limit).map(|known| (name, change(known)))
            });
            match changed.await? {
                (connection, Some((name, changed))) => return Ok(Some((connection, name, changed))),
                (_, None) if self.earlier().is_empty() => {
                    self.warn_of_limit();
                    return Ok(None);
                }
                (_, None) => self.forget_earlier().await,
            }
        }
    }

    /// The first refusal of a reference is logged.
    fn warn_of_limit(&self) {
        if !self.is_full.swap(true, Ordering::Relaxed) {
            tracing::warn!(
                "more than {} containers: the exit codes of further ones are lost if somebody stops their units while the daemon is down. A larger max_match_rules_per_connection in the configuration of dbus allows more",
                self.limit
            );
        }
    }

    /// The start of a unit was repeated, and the unit existed already. Its reference was lost if the first call was made over
    /// a connection that has ended.
    pub(super) async fn doubt(&self, unit: &UnitName) {
        if let Some(known) = self.open.lock().await.as_mut().and_then(|open| open.units.get_mut(unit)) {
            known.is_certain = false;
        }
    }

    /// Changes the open connection, which is opened if there is none. Returns it with the result of the change.
    async fn with_open<T>(&self, change: impl FnOnce(&mut Open) -> T) -> zbus::Result<(Connection, T)> {
        let mut open = self.open.lock().await;
        let found = match open.take() {
            Some(ended) if ended.connection.is_closed() => {
                tracing::warn!(
                    "the connection that references units has ended, so the daemon references the units again"
                );
                self.store.forget(&ended.name);
                self.lost.notify_one();
                None
            }
            found => found,
        };
        let mut found = match found {
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
        if let Err(error) = self.store.keep_async(&name, &[stream.as_fd()]).await {
            tracing::warn!(%error, "can't store the connection that references units, so a unit that is stopped while the daemon is down may lose its exit code: {error}");
        }
        match socket::client(stream).method_timeout(CALL_LIMIT).build().await {
            Ok(connection) => Ok(Open { connection, name, units: HashMap::new() }),
            Err(error) => {
                self.store.forget(&name);
                Err(error)
            }
        }
    }

    /// Resolves after the connection has ended alone: every unit needs a reference again.
    pub(super) async fn lost(&self) {
        self.lost.notified().await;
    }

    /// The bus has ended, and all references with it.
    pub(super) async fn disconnected(&self) {
        if let Some(open) = self.open.lock().await.take() {
            self.store.forget(&open.name);
        }
    }

    /// Adds a reference to a unit that has none. A unit that is not loaded has no exit code to keep. The caller tries again
    /// if systemd did not answer.
    pub(super) async fn reference(&self, unit: &UnitName) -> zbus::Result<()> {
        let asked = self.with_reference(unit, |known| {
            known.most += u32::from(!known.is_certain);
            known.is_certain
        });
        let (connection, name) = match asked.await? {
            None | Some((_, _, true)) => return Ok(()),
            Some((connection, name, false)) => (connection, name),
        };
        let referred = manager_over(&connection).await?.ref_unit(unit.as_str()).await;
        if referred.as_ref().is_err_and(is_gone) {
            return referred;
        }
        // The connection, and the reference with it, may have ended meanwhile.
        if let Some(open) = self.open.lock().await.as_mut().filter(|open| open.name == name)
            && let Some(known) = open.units.get_mut(unit)
        {
            known.is_certain = referred.is_ok();
            known.most -= u32::from(referred.is_err());
            if known.most == 0 {
                open.units.remove(unit);
            }
        }
        match referred {
            Err(zbus::Error::MethodError(name, ..)) if name.as_str() == NO_SUCH_UNIT => Ok(()),
            referred => referred,
        }
    }

    /// Closes the connections of earlier daemons, which ends their references. Returns when the bus has closed them: systemd learns of
    /// the end of a connection before it gets a later request, so it never has both the old match rules and those of later
    /// references.
    pub(super) async fn forget_earlier(&self) {
        let earlier = std::mem::take(&mut *self.earlier());
        for (name, connection) in earlier {
            self.store.forget(&name);
            match timeout(CLOSE_LIMIT, closed(connection)).await {
                Ok(Ok(())) => (),
                Ok(Err(error)) => {
                    tracing::warn!(%error, "can't close a connection with references of an earlier daemon: {error}");
                }
                Err(_) => {
                    tracing::warn!(
                        "the bus did not close a connection with references of an earlier daemon in {CLOSE_LIMIT:?}"
                    );
                }
            }
        }
        self.earlier_rules.store(0, Ordering::Relaxed);
    }

    /// Releases a unit: removes the reference to it. systemd unloads the unit once it is stopped. The caller tries again if
    /// systemd did not answer.
    pub(super) async fn release(&self, unit: &UnitName) -> zbus::Result<()> {
        let (connection, known) = self.with_open(|open| open.units.remove(unit)).await?;
        let proxy = manager_over(&connection).await?;
        let Reference { is_certain, mut most } = known.unwrap_or_default();
        let mut was_there = false;
        while most > 0 {
            match proxy.unref_unit(unit.as_str()).await {
                Ok(()) => (was_there, most) = (true, most - 1),
                Err(error) if is_not_referenced(&error) => break,
                Err(error) => {
                    self.may_have(unit, Reference { is_certain, most }).await;
                    return Err(error);
                }
            }
        }
        if was_there {
            return Ok(());
        }
        // The reference was lost with the bus, or when systemd executed itself again. Since then systemd has not checked
        // whether the unit can be unloaded. It does so when a reference is removed: a new one is added and removed. The
        // unit may not exist any more.
        let again = Reference { is_certain: true, most: 1 };
        match proxy.ref_unit(unit.as_str()).await {
            Err(error) if is_gone(&error) => {
                self.may_have(unit, again).await;
                return Err(error);
            }
            Err(_) => return Ok(()),
            Ok(()) => (),
        }
        let released = proxy.unref_unit(unit.as_str()).await;
        if released.is_err() {
            self.may_have(unit, again).await;
        }
        released
    }

    /// systemd may still have references to a unit whose release has failed: the next release removes them.
    async fn may_have(&self, unit: &UnitName, reference: Reference) {
        if let Some(open) = self.open.lock().await.as_mut() {
            open.units.insert(unit.clone(), reference);
        }
    }
}

fn is_not_referenced(error: &zbus::Error) -> bool {
    matches!(error, zbus::Error::MethodError(name, ..) if name.as_str() == NOT_REFERENCED)
}

/// Closes a connection to the bus, whoever else has its descriptor, and waits until the bus has closed it. What the bus has sent
/// is dropped.
async fn closed(connection: OwnedFd) -> io::Result<()> {
    let connection = std::os::unix::net::UnixStream::from(connection);
    connection.set_nonblocking(true)?;
    connection.shutdown(Shutdown::Write)?;
    let mut connection = UnixStream::from_std(connection)?;
    let mut rest = [0; 4096];
    while connection.read(&mut rest).await? > 0 {}
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::unit::error::LIMITS_EXCEEDED;
    use crate::unit::fake_bus::{DENIED, FakeBus, NO_REPLY};
    use crate::unit::manager::Manager;
    use crate::unit::systemd::References;
    use futures_util::future::join_all;
    use std::os::unix::net::UnixStream;

    /// A manager with references whose connection goes to a bus with these errors.
    async fn manager<const N: usize>(
        errors: [(&'static str, &'static str); N],
    ) -> (Arc<FakeBus>, Manager, Arc<Refs>) {
        let (bus, connection) = FakeBus::start(errors).await;
        let refs = Refs::new(Arc::new(FdStore::adopt(Vec::new()).unwrap().0), &mut Vec::new(), LIMIT);
        *refs.open.lock().await = Some(Open { connection, name: "r0".to_owned(), units: HashMap::new() });
        let refs = Arc::new(refs);
        (bus, Manager::with_refs(refs.clone()), refs)
    }

    const LIMIT: usize = 2;

    fn web() -> UnitName {
        UnitName::new("containerd-default-web.service").unwrap()
    }

    #[tokio::test]
    async fn a_call_for_a_reference_is_repeated_until_systemd_answers_and_one_release_is_enough() {
        let (bus, manager, _) = manager([("RefUnit", NO_REPLY)]).await;
        for _ in 0..2 {
            manager.reference(&web()).await.unwrap();
            assert_eq!(bus.calls("RefUnit"), 2);
        }
        manager.release(&web()).await;
        // The call without an answer may have added a reference as well.
        assert_eq!(bus.calls("UnrefUnit"), 2);
    }

    #[tokio::test]
    async fn a_connection_that_has_ended_is_not_used_again() {
        let (_bus, _manager, refs) = manager([]).await;
        refs.reference(&web()).await.unwrap();
        let connection = refs.open.lock().await.as_ref().unwrap().connection.clone();
        connection.close().await.unwrap();
        // There is no bus to connect to.
        let _ = refs.reference(&web()).await;
        assert!(refs.open.lock().await.as_ref().is_none_or(|open| !open.units.contains_key(&web())));
        refs.lost().await;
    }

    #[tokio::test]
    async fn there_may_be_fewer_references_than_calls() {
        let lost = [("RefUnit", NO_REPLY), ("UnrefUnit", NO_REPLY), ("UnrefUnit", NOT_REFERENCED)];
        let (bus, manager, _) = manager(lost).await;
        manager.reference(&web()).await.unwrap();
        manager.release(&web()).await;
        // Without an answer, not referenced, and once more for the reference that makes systemd check the unit.
        assert_eq!((bus.calls("RefUnit"), bus.calls("UnrefUnit")), (3, 3));
    }

    #[tokio::test]
    async fn a_unit_whose_reference_systemd_refuses_has_none() {
        let (bus, manager, _) = manager([("RefUnit", DENIED), ("RefUnit", NO_SUCH_UNIT)]).await;
        manager.reference(&web()).await.unwrap_err();
        // The unit was unloaded, and is loaded again.
        manager.reference(&web()).await.unwrap();
        manager.reference(&web()).await.unwrap();
        assert_eq!(bus.calls("RefUnit"), 3);
        manager.release(&web()).await;
        assert_eq!(bus.calls("UnrefUnit"), 1);
    }

    #[tokio::test]
    async fn a_unit_whose_start_was_repeated_is_referenced_again() {
        let (bus, manager, refs) = manager([]).await;
        refs.manager_for(&web()).await.unwrap();
        manager.reference(&web()).await.unwrap();
        assert_eq!(bus.calls("RefUnit"), 0, "the start has added one");
        refs.doubt(&web()).await;
        manager.reference(&web()).await.unwrap();
        assert_eq!(bus.calls("RefUnit"), 1);
    }

    #[tokio::test]
    async fn there_are_never_more_references_than_the_bus_allows() {
        let (bus, manager, refs) = manager([]).await;
        let units =
            ["a", "b", "c"].map(|id| UnitName::new(format!("containerd-default-{id}.service")).unwrap());
        for unit in &units {
            manager.reference(unit).await.unwrap();
        }
        assert_eq!(bus.calls("RefUnit"), 2);
        assert!(refs.manager_for(&units[2]).await.unwrap().is_none());
        manager.release(&units[0]).await;
        manager.reference(&units[2]).await.unwrap();
        assert_eq!(bus.calls("RefUnit"), 3);
    }

    #[tokio::test]
    async fn a_release_that_the_bus_refuses_loses_no_reference() {
        let (bus, manager, refs) = manager([("UnrefUnit", LIMITS_EXCEEDED), ("UnrefUnit", DENIED)]).await;
        refs.manager_for(&web()).await.unwrap();
        // Repeated at once, and refused for good.
        manager.release(&web()).await;
        assert_eq!(bus.calls("UnrefUnit"), 2);
        manager.release(&web()).await;
        assert_eq!((bus.calls("RefUnit"), bus.calls("UnrefUnit")), (0, 3), "the reference was still known");
    }

    #[tokio::test]
    async fn the_references_of_earlier_daemons_count_until_others_need_their_room() {
        let (bus, connection) = FakeBus::start([]).await;
        let mut kept = vec![("r0".to_owned(), OwnedFd::from(UnixStream::pair().unwrap().0))];
        let refs = Refs::new(Arc::new(FdStore::adopt(Vec::new()).unwrap().0), &mut kept, LIMIT);
        *refs.open.lock().await = Some(Open { connection, name: "r1".to_owned(), units: HashMap::new() });
        refs.make_room(1).await;
        assert_eq!(refs.earlier.lock().unwrap().len(), 1);
        for (id, earlier) in [("a", 1), ("b", 0)] {
            let unit = UnitName::new(format!("containerd-default-{id}.service")).unwrap();
            refs.reference(&unit).await.unwrap();
            assert_eq!(refs.earlier.lock().unwrap().len(), earlier, "{id}");
        }
        assert_eq!(bus.calls("RefUnit"), 2);
    }

    #[tokio::test]
    async fn references_at_the_same_time_do_not_exceed_the_limit() {
        let (bus, manager, refs) = manager([]).await;
        let units =
            (0..20).map(|number| UnitName::new(format!("containerd-default-{number}.service")).unwrap());
        let units: Vec<_> = units.collect();
        // All of them wait for the connection, as they do while it is being opened.
        let opening = refs.open.lock().await;
        let mut all = std::pin::pin!(join_all(units.iter().map(|unit| manager.reference(unit))));
        assert!(timeout(Duration::ZERO, &mut all).await.is_err());
        drop(opening);
        assert!(all.await.iter().all(Result::is_ok));
        assert_eq!(bus.calls("RefUnit"), LIMIT);
    }

    #[tokio::test]
    async fn references_of_earlier_daemons_go_first_if_there_is_no_room_for_all() {
        let store = Arc::new(FdStore::adopt(Vec::new()).unwrap().0);
        let (ours, bus) = UnixStream::pair().unwrap();
        let mut kept = vec![("r1".to_owned(), OwnedFd::from(ours))];
        let refs = Refs::new(store, &mut kept, 512);
        refs.make_room(256).await;
        assert_eq!(refs.earlier.lock().unwrap().len(), 1);
        let mut made = std::pin::pin!(refs.make_room(257));
        assert!(timeout(Duration::ZERO, &mut made).await.is_err(), "the bus has not closed the connection");
        drop(bus);
        made.await;
        assert_eq!(refs.earlier.lock().unwrap().len(), 0);
    }

    #[test]
    fn the_limit_is_that_of_the_bus_without_what_others_need() {
        assert_eq!([None, Some(64), Some(65_536)].map(limit), [400, 0, 65_424]);
    }

    #[test]
    fn daemons_that_end_soon_do_not_use_up_the_connections_of_root() {
        let store = Arc::new(FdStore::adopt(Vec::new()).unwrap().0);
        let kept = |name: &str| (name.to_owned(), OwnedFd::from(UnixStream::pair().unwrap().0));
        let mut all: Vec<_> = (1..=250).rev().map(|number| kept(&format!("r{number}"))).collect();
        all.push(kept("c7"));
        let refs = Refs::new(store, &mut all, LIMIT);
        let names: Vec<String> = refs.earlier.lock().unwrap().iter().map(|(name, _)| name.clone()).collect();
        assert_eq!(names, ["r1", "r248", "r249", "r250"]);
        assert_eq!(refs.next.load(Ordering::Relaxed), 251);
        assert_eq!(all.len(), 1, "a descriptor that is no connection to the bus stays");
    }
}
