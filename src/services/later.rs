//! Work that recovery puts off: calls wait until the tasks are recovered, and no call needs this work.

use std::sync::Arc;

use tokio::sync::Semaphore;
use tokio::task::JoinHandle;

/// How many pieces of the work run at the same time. The rest of the machine is for calls, which have waited.
const AT_ONCE: usize = 2;

/// Lets work wait for the end of recovery.
#[derive(Debug)]
pub(crate) struct Later(Semaphore);

impl Later {
    /// For a daemon that has not recovered its tasks yet.
    pub(crate) fn new() -> Self {
        Self(Semaphore::const_new(0))
    }

    /// Recovery has ended: the work begins.
    pub(crate) fn begin(&self) {
        self.0.add_permits(AT_ONCE);
    }

    /// Spawns work that runs in its turn, after recovery.
    pub(crate) fn spawn(self: &Arc<Self>, work: impl Future<Output = ()> + Send + 'static) -> JoinHandle<()> {
        let later = self.clone();
        tokio::spawn(async move {
            // The semaphore is never closed.
            let _turn = later.0.acquire().await;
            work.await;
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicUsize, Ordering};

    #[tokio::test]
    async fn work_waits_for_the_end_of_recovery_and_then_for_its_turn() {
        let (later, running) = (Arc::new(Later::new()), Arc::new(AtomicUsize::new(0)));
        let gate = Arc::new(Semaphore::new(0));
        let pieces: Vec<_> = (0..5)
            .map(|_| {
                let (running, gate) = (running.clone(), gate.clone());
                later.spawn(async move {
                    running.fetch_add(1, Ordering::SeqCst);
                    gate.acquire().await.unwrap().forget();
                })
            })
            .collect();
        let settle = async || {
            for _ in 0..20 {
                tokio::task::yield_now().await;
            }
            running.load(Ordering::SeqCst)
        };
        assert_eq!(settle().await, 0);
        later.begin();
        assert_eq!(settle().await, AT_ONCE);
        gate.add_permits(1);
        assert_eq!(settle().await, AT_ONCE + 1);
        gate.add_permits(5);
        for piece in pieces {
            piece.await.unwrap();
        }
    }
}
