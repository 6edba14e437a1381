//! What was noticed and not dealt with yet (pure, but for the waiting).
//!
//! Bounded, however fast signals come: one entry for each unit, and one for all that may have been missed.

use std::collections::{HashMap, VecDeque};
use std::sync::{Mutex, MutexGuard, PoisonError};

use tokio::sync::Notify;

use crate::id::UnitName;

use super::main_process::MainProcess;

/// Units whose main process is no longer what it was, and whether signals may have been missed.
#[derive(Debug, Default)]
pub struct Observations {
    services: Mutex<Services>,
    noticed: Notify,
    /// Keeps one permit, however often it is notified.
    missed: Notify,
}

#[derive(Debug, Default)]
struct Services {
    order: VecDeque<UnitName>,
    told: HashMap<UnitName, MainProcess>,
}

impl Observations {
    fn services(&self) -> MutexGuard<'_, Services> {
        self.services.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// systemd has told of a change of a unit's main process.
    pub(super) fn told(&self, unit: UnitName, main: MainProcess) {
        let mut services = self.services();
        let earlier = services.told.get(&unit).copied();
        // A unit that is started again has an end to tell of all the same.
        if main.ended.is_none() && earlier.is_some_and(|earlier| earlier.ended.is_some()) {
            return;
        }
        if earlier.is_none() {
            services.order.push_back(unit.clone());
        }
        services.told.insert(unit, main);
        drop(services);
        self.noticed.notify_one();
    }

    /// Signals may have been missed.
    pub(super) fn missed(&self) {
        self.missed.notify_one();
    }

    /// The next unit whose main process may be another one or none, and what systemd has told of it. One at a time may
    /// wait here.
    pub async fn next(&self) -> (UnitName, MainProcess) {
        loop {
            if let Some(next) = self.take() {
                return next;
            }
            self.noticed.notified().await;
        }
    }

    fn take(&self) -> Option<(UnitName, MainProcess)> {
        let mut services = self.services();
        let unit = services.order.pop_front()?;
        let main = services.told.remove(&unit)?;
        Some((unit, main))
    }

    /// Resolves when every unit has to be looked at, once for all the reasons that there were since the last time.
    pub async fn receive_missed(&self) {
        self.missed.notified().await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::unit::main_process::Ended;

    fn unit(name: &str) -> UnitName {
        UnitName::new(name).unwrap()
    }

    fn ended(pid: u32) -> MainProcess {
        MainProcess { pid: 0, last_pid: pid, ended: Some(Ended { code: 1, status: 3, at_usec: 5 }) }
    }

    #[tokio::test]
    async fn what_is_told_of_a_unit_many_times_is_one_entry() {
        let observations = Observations::default();
        for round in 0..10_000 {
            observations.told(unit("a.service"), MainProcess { last_pid: round, ..MainProcess::default() });
            observations.told(unit("b.service"), ended(round));
        }
        assert_eq!(observations.services().order.len(), 2);
        assert_eq!(observations.next().await.1.last_pid, 9999);
        assert_eq!(observations.next().await, (unit("b.service"), ended(9999)));
        assert_eq!(observations.take(), None);
    }

    #[tokio::test]
    async fn an_end_is_not_lost_to_what_comes_after_it() {
        let observations = Observations::default();
        observations.told(unit("a.service"), ended(7));
        observations.told(unit("a.service"), MainProcess::default());
        assert_eq!(observations.next().await, (unit("a.service"), ended(7)));
    }

    #[tokio::test]
    async fn many_reasons_to_look_at_all_units_are_one_look() {
        let observations = Observations::default();
        for _ in 0..10_000 {
            observations.missed();
        }
        observations.receive_missed().await;
        let again = tokio::time::timeout(std::time::Duration::ZERO, observations.receive_missed());
        assert!(again.await.is_err());
    }
}
