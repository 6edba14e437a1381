//! How much of a container's output the daemon copies to the journal: as much as journald takes from a
//! service (journald.conf(5), `RateLimitIntervalSec=`, `RateLimitBurst=`).

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

/// journald's defaults.
const INTERVAL: Duration = Duration::from_secs(30);
const BURST: u32 = 10_000;

/// Output that did not reach a sink.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Missing {
    /// Lines, or pieces of long lines.
    pub lines: u64,
    /// Bytes, without ends of lines.
    pub bytes: u64,
}

impl Missing {
    /// Nothing is missing.
    pub fn is_nothing(self) -> bool {
        self == Self::default()
    }

    /// One more line is missing.
    pub fn add(&mut self, bytes: usize) {
        self.lines = self.lines.saturating_add(1);
        self.bytes = self.bytes.saturating_add(bytes as u64);
    }
}

/// Whether a line may go to the journal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Admission {
    /// It may. Lines before it were dropped, which is to be said first.
    Passes(Missing),
    /// It is over the limit, and counted as dropped.
    Dropped,
}

/// The limit of one unit: its container and all execs of that share it.
#[derive(Debug)]
pub struct RateLimit {
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    interval: Duration,
    burst: u32,
    began: Option<Instant>,
    passed: u32,
    dropped: Missing,
}

impl Default for RateLimit {
    fn default() -> Self {
        let state =
            State { interval: INTERVAL, burst: BURST, began: None, passed: 0, dropped: Missing::default() };
        Self { state: Mutex::new(state) }
    }
}

impl RateLimit {
    /// Sets the limit to that of a unit, as systemd reports it: where one of both is not set (0), journald's
    /// default stands.
    pub fn set(&self, interval_usec: u64, burst: u32) {
        let mut state = self.state();
        state.interval = if interval_usec == 0 { INTERVAL } else { Duration::from_micros(interval_usec) };
        state.burst = if burst == 0 { BURST } else { burst };
    }

    /// A line of this length is about to be copied.
    pub fn admit(&self, bytes: usize) -> Admission {
        let mut state = self.state();
        let now = Instant::now();
        if state.began.is_none_or(|began| now.duration_since(began) >= state.interval) {
            state.began = Some(now);
            state.passed = 0;
        }
        if state.passed >= state.burst {
            state.dropped.add(bytes);
            return Admission::Dropped;
        }
        state.passed += 1;
        Admission::Passes(std::mem::take(&mut state.dropped))
    }

    /// What was dropped and has not been said yet.
    pub fn take_dropped(&self) -> Missing {
        std::mem::take(&mut self.state().dropped)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FREE: Admission = Admission::Passes(Missing { lines: 0, bytes: 0 });

    #[tokio::test(start_paused = true)]
    async fn a_burst_passes_and_what_is_beyond_is_counted_and_said_once() {
        let limit = RateLimit::default();
        limit.set(1_000_000, 2);
        assert_eq!(
            [limit.admit(1), limit.admit(1), limit.admit(5), limit.admit(7)],
            [FREE, FREE, Admission::Dropped, Admission::Dropped]
        );
        tokio::time::advance(Duration::from_secs(1)).await;
        assert_eq!(limit.admit(1), Admission::Passes(Missing { lines: 2, bytes: 12 }));
        assert_eq!(limit.admit(1), FREE);
        assert_eq!(limit.admit(3), Admission::Dropped);
        assert_eq!(limit.take_dropped(), Missing { lines: 1, bytes: 3 });
        assert!(limit.take_dropped().is_nothing());
    }

    #[tokio::test]
    async fn what_systemd_does_not_set_is_journalds_default() {
        let limit = RateLimit::default();
        limit.set(0, 0);
        assert!((0..BURST).all(|_| limit.admit(1) == FREE));
        assert_eq!(limit.admit(1), Admission::Dropped);
    }
}
