//! Waiting for a named condition, with a limit. For what sends no event that a test could await.

use std::time::{Duration, Instant};

/// Long enough for an emulated guest under load; a test that gets here has failed anyway.
pub const LIMIT: Duration = Duration::from_secs(30);

const PAUSE: Duration = Duration::from_millis(10);

/// Probes until there is an answer. Panics with the name of the condition when [`LIMIT`] has passed.
pub fn until<T>(what: &str, probe: impl FnMut() -> Option<T>) -> T {
    within(LIMIT, probe).unwrap_or_else(|| panic!("waited {LIMIT:?} in vain: {what}"))
}

/// Probes until the condition holds.
pub fn until_true(what: &str, mut probe: impl FnMut() -> bool) {
    until(what, || probe().then_some(()));
}

/// Probes until there is an answer or the limit has passed, for a caller who has more to say then.
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

/// Lets time pass where the span itself is what is measured. Whoever waits for something uses the other
/// functions.
#[allow(clippy::disallowed_methods)] // the one place where a test sleeps
pub fn elapse(span: Duration) {
    std::thread::sleep(span);
}
