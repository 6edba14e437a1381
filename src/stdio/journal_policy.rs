//! What holds for the output that the daemon copies to the journal: the rate limit that journald has for a service
//! (journald.conf(5), `RateLimitIntervalSec=`, `RateLimitBurst=`), and the fields of the unit (systemd.exec(5), `LogExtraFields=`).

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
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

/// The rate limit and the fields of a unit, which its container and all execs share.
#[derive(Debug)]
pub struct JournalPolicy {
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    interval: Duration,
    burst: u32,
    began: Option<Instant>,
    passed: u32,
    dropped: Missing,
    fields: Arc<[u8]>,
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

impl Default for JournalPolicy {
    fn default() -> Self {
        let (began, passed, dropped, fields) = (None, 0, Missing::default(), Arc::default());
        Self { state: Mutex::new(State { interval: INTERVAL, burst: BURST, began, passed, dropped, fields }) }
    }
}

impl JournalPolicy {
    /// Sets the limit of a unit, as systemd reports it. If one of the two values is not set (0), journald's default is used.
    pub fn set(&self, interval_usec: u64, burst: u32) {
        let mut state = self.state();
        state.interval = if interval_usec == 0 { INTERVAL } else { Duration::from_micros(interval_usec) };
        state.burst = if burst == 0 { BURST } else { burst };
    }

    /// Sets the fields of each line, in addition to those of its stream. `fields`: encoded for journald.
    pub fn set_fields(&self, fields: Vec<u8>) {
        self.state().fields = fields.into();
    }

    /// The additional fields of each line, encoded for journald.
    pub fn fields(&self) -> Arc<[u8]> {
        self.state().fields.clone()
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
        let policy = JournalPolicy::default();
        policy.set(1_000_000, 2);
        assert_eq!(
            [policy.admit(1), policy.admit(1), policy.admit(5), policy.admit(7)],
            [FREE, FREE, Admission::Dropped, Admission::Dropped]
        );
        tokio::time::advance(Duration::from_secs(1)).await;
        assert_eq!(policy.admit(1), Admission::Passes(Missing { lines: 2, bytes: 12 }));
        assert_eq!(policy.admit(1), FREE);
        assert_eq!(policy.admit(3), Admission::Dropped);
        assert_eq!(policy.take_dropped(), Missing { lines: 1, bytes: 3 });
        assert!(policy.take_dropped().is_nothing());
    }

    #[tokio::test]
    async fn limits_that_systemd_does_not_set_are_those_of_journald() {
        let policy = JournalPolicy::default();
        policy.set(0, 0);
        assert!((0..BURST).all(|_| policy.admit(1) == FREE));
        assert_eq!(policy.admit(1), Admission::Dropped);
    }
}
