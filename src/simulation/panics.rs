//! Finds panics in futures that nobody awaits. In the daemon, each panic is a crash.

use std::cell::RefCell;
use std::panic;
use std::sync::Once;

thread_local! {
    /// The panics of this thread.
    static SEEN: RefCell<Vec<String>> = const { RefCell::new(Vec::new()) };
}

/// Watches for panics in this thread, which runs the futures of a daemon. The end of a daemon is none
/// ([`disk`](crate::effects::disk)).
pub(super) struct Panics;

impl Panics {
    pub(super) fn watch() -> Self {
        static HOOK: Once = Once::new();
        HOOK.call_once(|| {
            let usual = panic::take_hook();
            panic::set_hook(Box::new(move |found| {
                SEEN.with_borrow_mut(|seen| seen.push(found.to_string()));
                usual(found);
            }));
        });
        SEEN.take();
        Self
    }

    /// Panics if there was a panic.
    pub(super) fn assert_none(self) {
        let seen = SEEN.take();
        assert!(seen.is_empty(), "the daemon would have crashed: {}", seen.join("; "));
    }
}
