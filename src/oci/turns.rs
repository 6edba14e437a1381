//! Limits how many bytes of specs and options are parsed at the same moment.
//!
//! A spec of many short texts needs some ten times its size in memory while it is parsed, and hundreds of threads may do that
//! at once ([`crate::services`]).

use std::collections::VecDeque;
use std::sync::{Condvar, Mutex, PoisonError};
use std::time::Duration;

use crate::config;

/// How many bytes are parsed at the same moment.
const MOST: u64 = 32 << 20;
/// A text of at most this size is parsed at once: usual calls do not wait for unusual ones.
const SMALL: u64 = 64 << 10;

static TURNS: Turns = Turns::new(MOST);

/// Other threads have parsed large texts for all of the time limit.
#[derive(Debug, thiserror::Error)]
#[error(
    "the specs and options of other calls are being read, and need all the memory for that: try again later"
)]
pub struct Busy;

/// Waits until this many bytes may be parsed, and returns the permission to do so. Blocks the thread. A thread that has a turn
/// must not wait for another one.
///
/// # Errors
/// The thread has waited for too long.
pub(super) fn turn(bytes: u64) -> Result<Turn<'static>, Busy> {
    if bytes <= SMALL {
        return Ok(Turn { turns: &TURNS, bytes: 0 });
    }
    TURNS.take(bytes, config::STDIO_LIMIT).ok_or(Busy)
}

/// How many threads wait for their turn.
#[cfg(test)]
pub(super) fn waiting() -> usize {
    TURNS.state.lock().unwrap_or_else(PoisonError::into_inner).waiting.len()
}

/// Which threads have turns, and which ones wait for theirs.
#[derive(Debug)]
struct Turns {
    state: Mutex<State>,
    changed: Condvar,
    most: u64,
}

#[derive(Debug)]
struct State {
    used: u64,
    /// The numbers of the waiting threads, in the order in which they came.
    waiting: VecDeque<u64>,
    next: u64,
}

/// The permission to parse a text and to keep what it says, until it is dropped.
#[derive(Debug)]
pub(super) struct Turn<'t> {
    turns: &'t Turns,
    bytes: u64,
}

impl Turns {
    const fn new(most: u64) -> Self {
        let state = State { used: 0, waiting: VecDeque::new(), next: 0 };
        Self { state: Mutex::new(state), changed: Condvar::new(), most }
    }

    /// `None` if the limit passes. A text that is larger than all turns together is parsed alone.
    fn take(&self, bytes: u64, limit: Duration) -> Option<Turn<'_>> {
        let bytes = bytes.min(self.most);
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let number = state.next;
        state.next += 1;
        state.waiting.push_back(number);
        let is_due =
            |state: &State| state.waiting.front() == Some(&number) && state.used + bytes <= self.most;
        let waited = self.changed.wait_timeout_while(state, limit, |state| !is_due(state));
        let (mut state, _) = waited.unwrap_or_else(PoisonError::into_inner);
        let is_due = is_due(&state);
        state.waiting.retain(|other| *other != number);
        if is_due {
            state.used += bytes;
        }
        drop(state);
        self.changed.notify_all();
        is_due.then(|| Turn { turns: self, bytes })
    }
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        self.turns.state.lock().unwrap_or_else(PoisonError::into_inner).used -= self.bytes;
        self.turns.changed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU64, Ordering};

    use super::*;

    const LONG: Duration = Duration::from_secs(600);

    #[test]
    fn no_more_bytes_than_the_limit_are_parsed_at_the_same_moment() {
        let turns = Turns::new(100);
        let (now, most) = (AtomicU64::new(0), AtomicU64::new(0));
        std::thread::scope(|scope| {
            for bytes in (0..40).map(|number| number * 7 % 60 + 20) {
                let (turns, now, most) = (&turns, &now, &most);
                scope.spawn(move || {
                    let _turn = turns.take(bytes, LONG).unwrap();
                    most.fetch_max(now.fetch_add(bytes, Ordering::SeqCst) + bytes, Ordering::SeqCst);
                    std::thread::yield_now();
                    now.fetch_sub(bytes, Ordering::SeqCst);
                });
            }
        });
        assert!((20..=100).contains(&most.into_inner()));
        assert_eq!(turns.state.lock().unwrap().used, 0);
    }

    #[test]
    fn a_text_that_is_too_large_is_parsed_alone_and_others_wait_for_it() {
        let turns = Turns::new(100);
        let large = turns.take(1000, LONG).unwrap();
        assert!(turns.take(1, Duration::ZERO).is_none());
        std::thread::scope(|scope| {
            let small = scope.spawn(|| turns.take(1, LONG).is_some());
            drop(large);
            assert!(small.join().unwrap());
        });
    }

    #[test]
    fn who_gives_up_holds_up_nobody_and_who_waits_is_not_overtaken() {
        let turns = Turns::new(100);
        let first = turns.take(60, LONG).unwrap();
        std::thread::scope(|scope| {
            let second = scope.spawn(|| turns.take(60, LONG).is_some());
            while turns.state.lock().unwrap().waiting.is_empty() {
                std::thread::yield_now();
            }
            assert!(turns.take(40, Duration::ZERO).is_none(), "the second one came earlier");
            drop(first);
            assert!(second.join().unwrap());
        });
        assert!(turns.take(40, Duration::ZERO).is_some());
    }
}
