//! The rate limit for the output that the daemon copies to the journal: the limit that journald has for a service
//! (journald.conf(5), `RateLimitIntervalSec=`, `RateLimitBurst=`).

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

/// journald's defaults.
const INTERVAL: Duration = Duration::from_secs(30);
const BURST: u32 = 10_000;
/// Each further KiB of a line counts as another line, as journald's work grows with both.
const LINE: usize = 1 << 10;

/// The amount of output that did not reach a sink.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Missing {
    /// Lines, or pieces of long lines.
    pub lines: u64,
    /// Bytes, without line ends.
    pub bytes: u64,
}

impl Missing {
    /// True if nothing is missing.
    pub fn is_nothing(self) -> bool {
        self == Self::default()
    }

    /// Counts a missing line.
    pub fn add(&mut self, bytes: usize) {
        self.lines = self.lines.saturating_add(1);
        self.bytes = self.bytes.saturating_add(bytes as u64);
    }
}

/// Whether a line may go to the journal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Admission {
    /// The line may be written. Before it, the lines that were dropped must be reported.
    Passes(Missing),
    /// The line exceeds the limit, and is counted as dropped.
    Dropped,
}

/// The limit of a unit, which its container and all execs share.
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

impl State {
    fn is_exhausted(&mut self) -> bool {
        let now = Instant::now();
        if self.began.is_none_or(|began| now.duration_since(began) >= self.interval) {
            self.began = Some(now);
            self.passed = 0;
        }
        self.passed >= self.burst
    }
}

impl Default for RateLimit {
    fn default() -> Self {
        let state =
            State { interval: INTERVAL, burst: BURST, began: None, passed: 0, dropped: Missing::default() };
        Self { state: Mutex::new(state) }
    }
}

impl RateLimit {
    /// Sets the limit of a unit, as systemd reports it. If one of the two values is not set (0), journald's default is used.
    pub fn set(&self, interval_usec: u64, burst: u32) {
        let mut state = self.state();
        state.interval = if interval_usec == 0 { INTERVAL } else { Duration::from_micros(interval_usec) };
        state.burst = if burst == 0 { BURST } else { burst };
    }

    /// Decides whether a line of this length may be written. A long line counts as several ([`LINE`]).
    pub fn admit(&self, bytes: usize) -> Admission {
        let mut state = self.state();
        if state.is_exhausted() {
            state.dropped.add(bytes);
            return Admission::Dropped;
        }
        let lines = u32::try_from(1 + bytes / LINE).unwrap_or(u32::MAX);
        state.passed = state.passed.saturating_add(lines);
        Admission::Passes(std::mem::take(&mut state.dropped))
    }

    /// True if lines are dropped at the moment.
    pub fn is_exhausted(&self) -> bool {
        self.state().is_exhausted()
    }

    /// Counts bytes as dropped whose number of lines is unknown.
    pub fn drop_bytes(&self, bytes: usize) {
        let dropped = &mut self.state().dropped;
        dropped.bytes = dropped.bytes.saturating_add(bytes as u64);
    }

    /// The dropped output that was not reported yet.
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
    async fn a_burst_passes_and_dropped_lines_are_counted_and_reported_once() {
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
    async fn limits_that_systemd_does_not_set_are_those_of_journald() {
        let limit = RateLimit::default();
        limit.set(0, 0);
        assert!((0..BURST).all(|_| limit.admit(1) == FREE));
        assert_eq!(limit.admit(1), Admission::Dropped);
    }
}
