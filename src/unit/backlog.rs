//! The signals that have arrived and that the daemon has not read yet.
//!
//! systemd sends what it reports about a unit before it answers a call about the unit, and both arrive in this order. But the
//! answer goes to the caller at once, and the signals wait in a queue for [`super::watch`]. A caller that needs both waits here.

use std::future::{Future, poll_fn};
use std::pin::pin;
use std::task::Poll;

use tokio::sync::watch;

/// Lets callers wait until the signals that have arrived are read.
#[derive(Debug)]
pub(super) struct Backlog {
    /// How often somebody has asked to be told.
    asked: watch::Sender<u64>,
    /// Up to which of them the answer was given.
    reached: watch::Sender<u64>,
}

impl Default for Backlog {
    fn default() -> Self {
        Self { asked: watch::Sender::new(0), reached: watch::Sender::new(0) }
    }
}

impl Backlog {
    /// Waits until every signal that arrived before this call is in the observations, or is lost with the connection.
    pub(super) async fn read(&self) {
        let mut turn = 0;
        self.asked.send_modify(|asked| {
            *asked += 1;
            turn = *asked;
        });
        // The sender lives as long as the receiver.
        let _ = self.reached.subscribe().wait_for(|reached| *reached >= turn).await;
    }

    /// Waits for the next signal, and tells the callers of [`Self::read`] whenever no signal waits. `next` resolves at once if a
    /// signal waits.
    pub(super) async fn next<T>(&self, next: impl Future<Output = T>) -> T {
        let mut next = pin!(next);
        loop {
            // Read before the queue is looked at: a signal that arrives after the look may have arrived before a later call of
            // `read`.
            let asked = *self.asked.borrow();
            let look = poll_fn(|context| Poll::Ready(next.as_mut().poll(context)));
            if let Poll::Ready(next) = look.await {
                return next;
            }
            self.reached(asked);
            tokio::select! {
                biased;
                next = next.as_mut() => return next,
                () = self.asked_after(asked) => {}
            }
        }
    }

    /// Resolves once somebody waits in [`Self::read`] whose turn is a later one.
    async fn asked_after(&self, turn: u64) {
        // The sender lives as long as the receiver.
        let _ = self.asked.subscribe().wait_for(|asked| *asked > turn).await;
    }

    fn reached(&self, turn: u64) {
        self.reached.send_if_modified(|reached| std::mem::replace(reached, turn) != turn);
    }

    /// The connection has ended: no signal of it will be read.
    pub(super) fn dropped(&self) {
        let asked = *self.asked.borrow();
        self.reached(asked);
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;
    use std::future::pending;
    use std::pin::Pin;
    use std::task::{Context, Waker};

    use futures_util::poll;

    use super::*;

    fn is_ready(future: Pin<&mut impl Future>) -> bool {
        future.poll(&mut Context::from_waker(Waker::noop())).is_ready()
    }

    #[tokio::test]
    async fn a_caller_waits_until_the_signals_before_its_call_are_read() {
        let backlog = Backlog::default();
        let mut first = pin!(backlog.read());
        assert!(!is_ready(first.as_mut()));
        assert_eq!(backlog.next(async { "signal" }).await, "signal");
        assert!(!is_ready(first.as_mut()), "another signal may wait");
        let mut next = pin!(backlog.next(pending::<()>()));
        assert!(!is_ready(next.as_mut()));
        first.await;
        let mut second = pin!(backlog.read());
        assert!(!is_ready(second.as_mut()), "signals may have arrived in the meantime");
        assert!(!is_ready(next.as_mut()));
        second.await;
    }

    #[tokio::test]
    async fn a_signal_that_arrives_during_a_look_is_read_before_a_later_caller_continues() {
        // Looks at the queue whose result is that the queue is empty, and then a signal and a caller come.
        for crowded in 1..=4 {
            let backlog = Backlog::default();
            let mut caller = pin!(backlog.read());
            let (looks, queue) = (Cell::new(0), Cell::new(None));
            {
                let caller = Cell::new(Some(caller.as_mut()));
                let look = poll_fn(|_| {
                    if let Some(signal) = queue.take() {
                        return Poll::Ready(signal);
                    }
                    looks.set(looks.get() + 1);
                    if looks.get() == crowded {
                        queue.set(Some("signal"));
                        caller.take().map(is_ready);
                    }
                    Poll::Pending
                });
                let mut next = pin!(backlog.next(look));
                let found = loop {
                    match poll!(next.as_mut()) {
                        Poll::Ready(found) => break found,
                        Poll::Pending => assert!(looks.get() <= crowded, "nobody looks again"),
                    }
                };
                assert_eq!(found, "signal");
            }
            assert!(!is_ready(caller.as_mut()), "look {crowded}: the signal is not in the observations yet");
            let mut next = pin!(backlog.next(pending::<()>()));
            assert!(!is_ready(next.as_mut()));
            caller.await;
        }
    }

    #[tokio::test]
    async fn nobody_waits_for_the_signals_of_a_connection_that_has_ended() {
        let backlog = Backlog::default();
        let mut waits = pin!(backlog.read());
        assert!(!is_ready(waits.as_mut()));
        backlog.dropped();
        waits.await;
    }
}
