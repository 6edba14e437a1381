//! Observations of systemd that were not handled yet.
//!
//! Their number is bounded, however fast signals arrive: one for each unit, and one for all signals that may have been
//! missed.

use std::collections::{HashMap, VecDeque};
use std::sync::{Mutex, MutexGuard, PoisonError};

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

    /// Waits for the next unit whose main process has changed, and returns what systemd reported. Only one caller may wait
    /// at a time.
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
        let main = services.reported.remove(&unit)?;
        Some((unit, main))
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
        let observations = Observations::default();
        for round in 0..10_000 {
            observations
                .reported(unit("a.service"), MainProcess { last_pid: Some(round), ..MainProcess::default() });
            observations.reported(unit("b.service"), ended(round));
        }
        assert_eq!(observations.services().order.len(), 2);
        assert_eq!(observations.next().await.1.last_pid, Some(9999));
        assert_eq!(observations.next().await, (unit("b.service"), ended(9999)));
        assert_eq!(observations.take(), None);
    }

    #[tokio::test]
    async fn an_exit_is_not_replaced_by_later_reports() {
        let observations = Observations::default();
        observations.reported(unit("a.service"), ended(7));
        observations.reported(unit("a.service"), MainProcess::default());
        assert_eq!(observations.next().await, (unit("a.service"), ended(7)));
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
