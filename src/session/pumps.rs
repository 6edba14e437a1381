//! The tasks that copy a process's output.

use std::time::Duration;

use tokio::task::JoinHandle;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

/// How long output may stay open after the end of its process. As containerd-shim-runc-v2.
const DRAIN_LIMIT: Duration = Duration::from_secs(10);

/// The tasks that copy a process's output.
#[derive(Debug, Default)]
pub struct Pumps {
    running: Vec<JoinHandle<()>>,
    /// Ends these tasks, and no others.
    stop: CancellationToken,
}

impl Pumps {
    /// Resolves when the pumps have to end.
    pub(super) fn stop(&self) -> CancellationToken {
        self.stop.clone()
    }

    /// True if there are no pumps, or if a call already waits for them.
    pub(super) fn is_empty(&self) -> bool {
        self.running.is_empty()
    }

    /// Adds a task that copies output. It has to end when [`Self::stop`] resolves.
    pub(super) fn spawn(&mut self, copy: impl Future<Output = ()> + Send + 'static) {
        self.running.push(tokio::spawn(copy));
    }

    /// Removes the running pumps, to wait for them.
    pub(super) fn take(&mut self) -> Self {
        Self { running: std::mem::take(&mut self.running), stop: self.stop() }
    }

    /// Ends all pumps of the session, also those that were taken from it.
    pub(super) fn cancel(&self) {
        self.stop.cancel();
    }

    /// Waits until everything that the process wrote has arrived. Returns false if something that
    /// outlives the process still held its output after [`DRAIN_LIMIT`]; its output is cut off then.
    pub async fn drain(self) -> bool {
        let limit = Instant::now() + DRAIN_LIMIT;
        let mut complete = true;
        for mut pump in self.running {
            if tokio::time::timeout_at(limit, &mut pump).await.is_err() {
                complete = false;
                self.stop.cancel();
                // It ends at once now; that it was cut short is known.
                let _ = pump.await;
            }
        }
        complete
    }

    /// Stops copying at once. What has not been copied is lost.
    pub async fn stop_now(self) {
        self.stop.cancel();
        for pump in self.running {
            // As in `drain`.
            let _ = pump.await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn is_stopped(pumps: &mut Pumps) -> bool {
        let (stop, (said, heard)) = (pumps.stop(), tokio::sync::oneshot::channel());
        pumps.spawn(async move {
            // Nobody listens once the test has failed.
            let _ = said.send(stop.is_cancelled());
        });
        pumps.take().drain().await;
        heard.await.unwrap()
    }

    #[tokio::test]
    async fn a_session_that_was_cut_off_stops_no_later_one() {
        let mut first = Pumps::default();
        let stopped = first.stop();
        first.spawn(async move { stopped.cancelled().await });
        first.take().stop_now().await;
        assert!(is_stopped(&mut first).await, "the same attempt stays cut off");
        let mut second = Pumps::default();
        assert!(!is_stopped(&mut second).await, "another attempt is not");
    }

    #[tokio::test(start_paused = true)]
    async fn output_that_stays_open_is_cut_off_in_the_end() {
        let mut pumps = Pumps::default();
        let stop = pumps.stop();
        pumps.spawn(async move { stop.cancelled().await });
        assert!(!pumps.take().drain().await);
        pumps.spawn(async {});
        assert!(pumps.take().drain().await);
    }
}
