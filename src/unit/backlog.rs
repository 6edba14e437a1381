//! The signals that have arrived and that the daemon has not read yet.
//!
//! systemd sends what it reports about a unit before it answers a call about the unit, and both arrive in this order. But the
//! answer goes to the caller at once, and the signals wait in a queue for [`super::watch`]. A caller that needs both waits here.

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

    /// Resolves if somebody waits in [`Self::read`], with what [`Self::reached`] needs.
    pub(super) async fn asked(&self) -> u64 {
        let (reached, mut asked) = (*self.reached.borrow(), self.asked.subscribe());
        let next = asked.wait_for(|asked| *asked > reached).await.ok().map(|asked| *asked);
        match next {
            Some(asked) => asked,
            None => std::future::pending().await,
        }
    }

    /// Every signal is read that arrived before [`Self::asked`] resolved.
    pub(super) fn reached(&self, asked: u64) {
        self.reached.send_replace(asked);
    }

    /// The connection has ended: no signal of it will be read.
    pub(super) fn dropped(&self) {
        let asked = *self.asked.borrow();
        self.reached(asked);
    }
}

#[cfg(test)]
mod tests {
    use std::future::Future;
    use std::pin::pin;
    use std::task::{Context, Waker};

    use super::*;

    fn is_ready(future: std::pin::Pin<&mut impl Future>) -> bool {
        future.poll(&mut Context::from_waker(Waker::noop())).is_ready()
    }

    #[tokio::test]
    async fn a_caller_waits_until_the_signals_before_its_call_are_read() {
        let backlog = Backlog::default();
        assert!(!is_ready(pin!(backlog.asked())), "nobody asks");
        let mut first = pin!(backlog.read());
        assert!(!is_ready(first.as_mut()));
        let asked = backlog.asked().await;
        let mut second = pin!(backlog.read());
        assert!(!is_ready(second.as_mut()));
        backlog.reached(asked);
        first.await;
        assert!(!is_ready(second.as_mut()), "signals may have arrived in the meantime");
        backlog.reached(backlog.asked().await);
        second.await;
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
