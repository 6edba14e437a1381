//! Waits for a named condition, with a limit. For changes that send no event.

use std::time::{Duration, Instant};

/// Long enough for an emulated guest under load. A test that reaches this limit has failed.
pub const LIMIT: Duration = Duration::from_secs(30);

const PAUSE: Duration = Duration::from_millis(10);

/// Probes until there is an answer. Panics with the name of the condition when [`LIMIT`] has passed.
pub fn until<T>(what: &str, probe: impl FnMut() -> Option<T>) -> T {
    within(LIMIT, probe).unwrap_or_else(|| panic!("this did not happen within {LIMIT:?}: {what}"))
}

/// Probes until the condition holds.
pub fn until_true(what: &str, mut probe: impl FnMut() -> bool) {
    until(what, || probe().then_some(()));
}

/// Probes until there is an answer. `None` after the time limit: the caller reports the failure.
pub fn within<T>(limit: Duration, mut probe: impl FnMut() -> Option<T>) -> Option<T> {
    let deadline = Instant::now() + limit;
    loop {
        if let Some(answer) = probe() {
            return Some(answer);
        }
        if Instant::now() >= deadline {
            return None;
        }
        elapse(PAUSE);
    }
}

/// Sleeps, for a test that measures time itself. Use the other functions to wait for a condition.
#[allow(clippy::disallowed_methods)] // the one place where a test sleeps
pub fn elapse(span: Duration) {
    std::thread::sleep(span);
}
