//! The tasks that copy a process's output.

use std::time::Duration;

use tokio::time::Instant;

use crate::id::TaskKey;
use crate::stdio::pump::Stop;
use crate::stdio::threads::{self, Ended};

/// How long a call waits for the end of output that another process holds open, after the end of its process. Output that is
/// in a FIFO by then is delivered. As containerd-shim-runc-v2 of containerd 1.7: a probe that leaves a process behind waits
/// for this time.
const HELD_LIMIT: Duration = Duration::from_secs(2);
/// How long a call waits for a client that does not read, or for another process that continues to write. As
/// containerd-shim-runc-v2 of containerd 2.
const DRAIN_LIMIT: Duration = Duration::from_secs(10);
/// How long a daemon at least tries to deliver output for which earlier daemons have used up the time.
const LAST_TRY: Duration = Duration::from_millis(200);

/// How long a call waits for pumps that were told to stop.
const STOP_LIMIT: Duration = Duration::from_secs(2);

/// The tasks that copy a process's output.
#[derive(Debug, Default)]
pub struct Pumps {
    running: Vec<Ended>,
    /// Ends these tasks, and no others.
    stop: Stop,
}

impl Pumps {
    /// Resolves when the pumps have to end.
    pub(super) fn stop(&self) -> Stop {
        self.stop.clone()
    }

    /// True if there are no pumps, or if a call already waits for them.
    pub fn is_empty(&self) -> bool {
        self.running.is_empty()
    }

    /// Adds work that copies output of a container. It has to end when [`Self::stop`] resolves.
    pub(super) fn spawn(&mut self, task: &TaskKey, copy: impl Future<Output = ()> + Send + 'static) {
        self.running.push(threads::spawn(task, copy));
    }

    /// Removes the running pumps, to wait for them.
    pub(super) fn take(&mut self) -> Self {
        Self { running: std::mem::take(&mut self.running), stop: self.stop() }
    }

    /// Ends all pumps of the session, also those that were taken from it.
    pub(super) fn cancel(&self) {
        self.stop.now.cancel();
    }

    /// Waits until everything that the process wrote has arrived, for a short time. True if it has.
    pub async fn wait(&mut self, limit: Duration) -> bool {
        self.wait_until(Instant::now() + limit).await
    }

    async fn wait_until(&mut self, limit: Instant) -> bool {
        while let Some(pump) = self.running.last_mut() {
            // A pump that has failed has ended.
            if tokio::time::timeout_at(limit, pump).await.is_err() {
                return false;
            }
            self.running.pop();
        }
        true
    }

    /// Waits until everything that the process wrote has arrived. Returns false if something that outlives the process
    /// still held its output, or if the client did not read it in time; the output is cut off then. Calls to earlier
    /// daemons have waited for `waited` already.
    pub async fn drain(mut self, waited: Duration) -> bool {
        let begun = Instant::now();
        if self.wait_until(begun + HELD_LIMIT.saturating_sub(waited)).await {
            return true;
        }
        self.stop.when_empty.cancel();
        if !self.wait_until(begun + DRAIN_LIMIT.saturating_sub(waited).max(LAST_TRY)).await {
            self.stop_now().await;
        }
        false
    }

    /// Stops copying at once. What has not been copied is lost.
    pub async fn stop_now(self) {
        self.stop.now.cancel();
        let limit = Instant::now() + STOP_LIMIT;
        for pump in self.running {
            // It ends at once now, unless a process of the container keeps it in a system call (`stdio::threads`). That it was
            // cut short is known.
            let _ = tokio::time::timeout_at(limit, pump).await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::id::{Namespace, TaskId};

    fn task() -> TaskKey {
        TaskKey::usual(Namespace::new("pumps").unwrap(), TaskId::new("web").unwrap())
    }

    async fn is_stopped(pumps: &mut Pumps) -> bool {
        let (stop, (said, heard)) = (pumps.stop(), tokio::sync::oneshot::channel());
        pumps.spawn(&task(), async move {
            // Nobody listens once the test has failed.
            let _ = said.send(stop.now.is_cancelled());
        });
        pumps.take().drain(Duration::ZERO).await;
        heard.await.unwrap()
    }

    #[tokio::test]
    async fn a_session_that_was_cut_off_stops_no_later_one() {
        let mut first = Pumps::default();
        let stopped = first.stop().now;
        first.spawn(&task(), async move { stopped.cancelled().await });
        first.take().stop_now().await;
        assert!(is_stopped(&mut first).await, "the same attempt stays cut off");
        let mut second = Pumps::default();
        assert!(!is_stopped(&mut second).await, "another attempt is not");
    }

    /// How long the pumps of a process are waited for if another process holds its output open, with or without writing.
    async fn waits(is_written: bool, waited: Duration) -> Duration {
        let (mut pumps, begun) = (Pumps::default(), Instant::now());
        let stop = pumps.stop();
        pumps.spawn(&task(), async move {
            tokio::select! {
                () = stop.when_empty.cancelled(), if !is_written => {}
                () = stop.now.cancelled() => {}
            }
        });
        assert!(!pumps.take().drain(waited).await);
        begun.elapsed()
    }

    #[tokio::test(start_paused = true)]
    async fn output_that_stays_open_is_cut_off_in_the_end() {
        assert_eq!(waits(true, Duration::ZERO).await.as_secs(), DRAIN_LIMIT.as_secs());
        let mut pumps = Pumps::default();
        pumps.spawn(&task(), async {});
        assert!(pumps.take().drain(Duration::ZERO).await);
    }

    #[tokio::test(start_paused = true)]
    async fn output_that_nobody_writes_is_waited_for_only_briefly() {
        assert_eq!(waits(false, Duration::ZERO).await.as_secs(), HELD_LIMIT.as_secs());
    }

    #[tokio::test(start_paused = true)]
    async fn the_next_daemon_waits_only_for_the_rest_of_the_time() {
        let second = Duration::from_secs(1);
        assert_eq!(waits(false, second).await.as_secs(), 1);
        assert_eq!(waits(true, 4 * second).await.as_secs(), 6);
        assert!(waits(true, 60 * second).await < second);
    }
}
