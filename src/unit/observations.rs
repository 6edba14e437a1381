//! Observations of systemd that were not handled yet.
//!
//! Their number is bounded, however fast signals arrive: one for each unit, one for all signals that may have been missed, and
//! those which the consumer handles at the moment.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::Notify;

use crate::id::UnitName;

use super::main_process::MainProcess;

/// The units whose main process has changed, and whether signals may have been missed.
#[derive(Debug, Default)]
pub struct Observations {
    services: Mutex<Services>,
    noticed: Notify,
    /// Holds at most one permit, however often it is notified.
    missed: Notify,
}

#[derive(Debug, Default)]
struct Services {
    order: VecDeque<UnitName>,
    reported: HashMap<UnitName, MainProcess>,
    /// The ends that the consumer handles at the moment.
    handled: Vec<(UnitName, MainProcess)>,
}

/// A report of systemd that the main process of a unit has changed. It is handled once this is dropped.
#[derive(Debug)]
pub struct Report {
    /// The unit.
    pub unit: UnitName,
    /// What systemd reported.
    pub main: MainProcess,
    observations: Arc<Observations>,
}

impl Drop for Report {
    fn drop(&mut self) {
        let handled = &mut self.observations.services().handled;
        let own = handled.iter().position(|(unit, main)| *unit == self.unit && *main == self.main);
        own.map(|own| handled.swap_remove(own));
    }
}

impl Observations {
    fn services(&self) -> MutexGuard<'_, Services> {
        self.services.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// systemd reported a change of a unit's main process.
    pub(super) fn reported(&self, unit: UnitName, main: MainProcess) {
        let mut services = self.services();
        let earlier = services.reported.get(&unit).copied();
        // An exit is not overwritten by the next start of the unit.
        if main.ended.is_none() && earlier.is_some_and(|earlier| earlier.ended.is_some()) {
            return;
        }
        if earlier.is_none() {
            services.order.push_back(unit.clone());
        }
        services.reported.insert(unit, main);
        drop(services);
        self.noticed.notify_one();
    }

    /// Signals may have been missed.
    pub(super) fn missed(&self) {
        self.missed.notify_one();
    }

    /// Waits for the next unit whose main process has changed. Only one caller may wait at a time.
    pub async fn next(self: &Arc<Self>) -> Report {
        loop {
            if let Some(next) = self.take() {
                return next;
            }
            self.noticed.notified().await;
        }
    }

    fn take(self: &Arc<Self>) -> Option<Report> {
        let mut services = self.services();
        let unit = services.order.pop_front()?;
        let main = services.reported.remove(&unit)?;
        if main.ended.is_some() {
            services.handled.push((unit.clone(), main));
        }
        Some(Report { unit, main, observations: self.clone() })
    }

    /// The ends of a unit's main processes that systemd has reported, and that were not handled yet.
    pub(super) fn unhandled_ends(&self, unit: &UnitName) -> Vec<MainProcess> {
        let services = self.services();
        let handled = services.handled.iter().filter(|(of, _)| of == unit).map(|(_, main)| *main);
        let waiting = services.reported.get(unit).filter(|main| main.ended.is_some()).copied();
        handled.chain(waiting).collect()
    }

    /// Waits until signals may have been missed. Returns once for everything that was missed since the last call.
    pub async fn receive_missed(&self) {
        self.missed.notified().await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::unit::main_process::WaitStatus;

    fn unit(name: &str) -> UnitName {
        UnitName::new(name).unwrap()
    }

    fn ended(pid: u32) -> MainProcess {
        MainProcess {
            pid: None,
            last_pid: Some(pid),
            ended: Some(WaitStatus { code: 1, status: 3, at_usec: Some(5) }),
        }
    }

    #[tokio::test]
    async fn many_reports_about_a_unit_are_one_entry() {
        let observations = Arc::new(Observations::default());
        for round in 0..10_000 {
            observations
                .reported(unit("a.service"), MainProcess { last_pid: Some(round), ..MainProcess::default() });
            observations.reported(unit("b.service"), ended(round));
        }
        assert_eq!(observations.services().order.len(), 2);
        assert_eq!(observations.next().await.main.last_pid, Some(9999));
        let next = observations.next().await;
        assert_eq!((&next.unit, next.main), (&unit("b.service"), ended(9999)));
        assert!(observations.take().is_none());
    }

    #[tokio::test]
    async fn an_exit_is_not_replaced_by_later_reports() {
        let observations = Arc::new(Observations::default());
        observations.reported(unit("a.service"), ended(7));
        observations.reported(unit("a.service"), MainProcess::default());
        assert_eq!(observations.next().await.main, ended(7));
    }

    #[tokio::test]
    async fn an_end_is_known_until_it_was_handled() {
        let (observations, a) = (Arc::new(Observations::default()), unit("a.service"));
        observations.reported(unit("b.service"), ended(6));
        observations.reported(a.clone(), MainProcess { pid: Some(7), ..MainProcess::default() });
        assert_eq!(observations.unhandled_ends(&a), []);
        observations.reported(a.clone(), ended(7));
        assert_eq!(observations.unhandled_ends(&a), [ended(7)]);
        let others = observations.next().await;
        let first = observations.next().await;
        observations.reported(a.clone(), ended(8));
        assert_eq!(observations.unhandled_ends(&a), [ended(7), ended(8)]);
        drop(others);
        let second = observations.next().await;
        drop(first);
        assert_eq!(observations.unhandled_ends(&a), [ended(8)]);
        drop(second);
        assert_eq!(observations.unhandled_ends(&a), []);
    }

    #[tokio::test]
    async fn many_lost_signals_cause_one_query_of_all_units() {
        let observations = Observations::default();
        for _ in 0..10_000 {
            observations.missed();
        }
        observations.receive_missed().await;
        let again = tokio::time::timeout(std::time::Duration::ZERO, observations.receive_missed());
        assert!(again.await.is_err());
    }
}
