//! Waiting for a named condition, with a limit. For what sends no event that a test could await.

use std::time::{Duration, Instant};

/// Long enough for an emulated guest under load; a test that gets here has failed anyway.
pub const LIMIT: Duration = Duration::from_secs(30);

const PAUSE: Duration = Duration::from_millis(10);

/// Probes until there is an answer. Panics with the name of the condition when [`LIMIT`] has passed.
pub fn until<T>(what: &str, probe: impl FnMut() -> Option<T>) -> T {
    until_within(LIMIT, what, probe)
}

/// Probes until the condition holds.
pub fn until_true(what: &str, mut probe: impl FnMut() -> bool) {
    until(what, || probe().then_some(()));
}

/// Like [`until`], with a limit of one's own.
pub fn until_within<T>(limit: Duration, what: &str, mut probe: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + limit;
    loop {
        if let Some(answer) = probe() {
            return answer;
        }
        assert!(Instant::now() < deadline, "waited {limit:?} in vain: {what}");
        pause();
    }
}

#[allow(clippy::disallowed_methods)] // the one place where a test sleeps: between two probes
fn pause() {
    std::thread::sleep(PAUSE);
}
