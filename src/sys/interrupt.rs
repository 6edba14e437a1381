//! Ends a wait of another thread.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::OnceLock;

use nix::sys::eventfd::{EfdFlags, EventFd};
use tokio_util::sync::CancellationToken;

/// Set once, by whoever no longer needs the result of a wait. A thread that waits in poll(2) and a future can both see it.
#[derive(Debug, Default)]
pub struct Interrupt {
    token: CancellationToken,
    /// Made by the first thread that waits: most waits need none.
    event: OnceLock<EventFd>,
}

impl Interrupt {
    /// Ends all waits.
    pub fn set(&self) {
        // Before the event: a thread that makes the event afterwards looks at the token.
        self.token.cancel();
        if let Some(event) = self.event.get() {
            // Can't fail: the counter is far from its limit.
            let _ = event.write(1);
        }
    }

    /// True once it is set.
    pub fn is_set(&self) -> bool {
        self.token.is_cancelled()
    }

    /// Resolves once it is set.
    pub async fn until_set(&self) {
        self.token.cancelled().await;
    }

    /// Becomes readable once it is set, for a thread that looks at [`Self::is_set`] first, and then waits.
    ///
    /// # Errors
    /// There is no descriptor for it.
    pub fn event(&self) -> io::Result<BorrowedFd<'_>> {
        if let Some(event) = self.event.get() {
            return Ok(event.as_fd());
        }
        let made = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?;
        let event = self.event.get_or_init(|| made);
        if self.is_set() {
            let _ = event.write(1);
        }
        Ok(event.as_fd())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;
    use std::time::Duration;

    use nix::poll::{PollFd, PollFlags};

    use crate::sys::poll;

    fn is_readable(interrupt: &Interrupt, limit: Duration) -> bool {
        poll(&mut [PollFd::new(interrupt.event().unwrap(), PollFlags::POLLIN)], limit).unwrap()
    }

    #[test]
    fn a_thread_that_waits_and_one_that_waits_later_are_interrupted() {
        let interrupt = Arc::new(Interrupt::default());
        assert!(!is_readable(&interrupt, Duration::ZERO) && !interrupt.is_set());
        let waits = interrupt.clone();
        let thread = std::thread::spawn(move || is_readable(&waits, Duration::from_secs(30)));
        interrupt.set();
        assert!(thread.join().unwrap() && interrupt.is_set());
        let before = Interrupt::default();
        before.set();
        assert!(is_readable(&before, Duration::ZERO));
    }
}
