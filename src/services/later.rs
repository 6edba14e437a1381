//! Work that recovery puts off until the streams of all processes are open again: no call needs this work.

use std::pin::Pin;
use std::sync::{Mutex, MutexGuard, PoisonError};

use futures_util::{StreamExt, stream};

/// How many pieces of the work run at the same time. The rest of the machine is for calls, which have waited.
const AT_ONCE: usize = 2;

type Work = Pin<Box<dyn Future<Output = ()> + Send>>;

/// Lets work wait for the end of recovery.
pub(crate) struct Later(Mutex<Option<Vec<Work>>>);

impl Later {
    /// For a daemon that has not recovered its tasks yet.
    pub(crate) fn new() -> Self {
        Self(Mutex::new(Some(Vec::new())))
    }

    /// Recovery has ended: the work begins.
    pub(crate) fn begin(&self) {
        let waiting = self.waiting().take().unwrap_or_default();
        tokio::spawn(stream::iter(waiting).for_each_concurrent(AT_ONCE, |work| work));
    }

    /// Spawns work once recovery has ended. Until then it costs no more than its memory.
    pub(crate) fn spawn(&self, work: impl Future<Output = ()> + Send + 'static) {
        match &mut *self.waiting() {
            Some(waiting) => waiting.push(Box::pin(work)),
            None => drop(tokio::spawn(work)),
        }
    }

    fn waiting(&self) -> MutexGuard<'_, Option<Vec<Work>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};

    use tokio::sync::Semaphore;

    #[tokio::test]
    async fn work_waits_for_the_end_of_recovery_and_then_for_its_turn() {
        let (later, running) = (Later::new(), Arc::new(AtomicUsize::new(0)));
        let gate = Arc::new(Semaphore::new(0));
        let add = || {
            let (running, gate) = (running.clone(), gate.clone());
            later.spawn(async move {
                running.fetch_add(1, Ordering::SeqCst);
                gate.acquire().await.unwrap().forget();
            });
        };
        (0..5).for_each(|_| add());
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
        add();
        assert_eq!(settle().await, AT_ONCE + 2, "what comes later waits for no turn");
        gate.add_permits(5);
        assert_eq!(settle().await, 6);
    }
}
