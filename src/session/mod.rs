//! The live side of one process: what the daemon holds open and runs for one attempt to start it.
//!
//! A session is built when the process has its ends of the streams, and dropped whole: another attempt
//! gets another session, and nothing of the earlier one.

use std::fs::File;
use std::sync::Arc;
use std::time::Duration;

use tokio::task::JoinHandle;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::stdio::terminal::Terminal;

/// How long output may stay open after the end of its process. As containerd-shim-runc-v2.
const DRAIN_LIMIT: Duration = Duration::from_secs(10);

/// What the daemon attaches to one attempt to start a process.
#[derive(Debug, Default)]
pub struct Session {
    /// The writing end of the client's stdin FIFO: without it the process would see EOF whenever a
    /// client goes away.
    stdin: Option<File>,
    terminal: Option<Arc<Terminal>>,
    pumps: Pumps,
}

/// The tasks that copy a process's output.
#[derive(Debug, Default)]
pub struct Pumps {
    running: Vec<JoinHandle<()>>,
    /// Ends these tasks, and no others.
    stop: CancellationToken,
}

impl Session {
    /// A session that copies nothing yet.
    pub fn new(stdin: Option<File>, terminal: Option<Arc<Terminal>>) -> Self {
        Self { stdin, terminal, pumps: Pumps::default() }
    }

    /// The terminal, if the process has one that is still in use.
    pub fn terminal(&self) -> Option<&Arc<Terminal>> {
        self.terminal.as_ref()
    }

    /// Removes the terminal: it hangs up once the pumps have let go of it as well.
    pub fn take_terminal(&mut self) -> Option<Arc<Terminal>> {
        self.terminal.take()
    }

    /// Removes the writing end of stdin.
    pub fn take_stdin(&mut self) -> Option<File> {
        self.stdin.take()
    }

    /// The daemon holds the writing end of stdin.
    pub fn has_stdin(&self) -> bool {
        self.stdin.is_some()
    }

    /// Nothing is being copied, or somebody waits for the pumps already.
    pub fn is_silent(&self) -> bool {
        self.pumps.running.is_empty()
    }

    /// Resolves when the session ends.
    pub fn stop(&self) -> CancellationToken {
        self.pumps.stop.clone()
    }

    /// Adds a task that copies output. It has to end when [`Self::stop`] resolves.
    pub fn pump(&mut self, copy: impl Future<Output = ()> + Send + 'static) {
        self.pumps.running.push(tokio::spawn(copy));
    }

    /// Removes the pumps, to wait for them.
    pub fn take_pumps(&mut self) -> Pumps {
        Pumps { running: std::mem::take(&mut self.pumps.running), stop: self.stop() }
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        self.pumps.stop.cancel();
    }
}

impl Pumps {
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

    /// Stops copying, whatever is left.
    pub async fn cut_off(self) {
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

    async fn outcome(session: &mut Session) -> bool {
        let (stop, (said, heard)) = (session.stop(), tokio::sync::oneshot::channel());
        session.pump(async move {
            // Nobody listens once the test has failed.
            let _ = said.send(stop.is_cancelled());
        });
        session.take_pumps().drain().await;
        heard.await.unwrap()
    }

    #[tokio::test]
    async fn a_session_that_was_cut_off_stops_no_later_one() {
        let mut first = Session::default();
        let stopped = first.stop();
        first.pump(async move { stopped.cancelled().await });
        first.take_pumps().cut_off().await;
        assert!(outcome(&mut first).await, "the same attempt stays cut off");
        let mut second = Session::default();
        assert!(!outcome(&mut second).await, "another attempt is not");
    }

    #[tokio::test]
    async fn what_is_dropped_ends() {
        let session = Session::default();
        let stop = session.stop();
        drop(session);
        assert!(stop.is_cancelled());
    }

    #[tokio::test(start_paused = true)]
    async fn output_that_stays_open_is_cut_off_in_the_end() {
        let mut session = Session::default();
        let stop = session.stop();
        session.pump(async move { stop.cancelled().await });
        assert!(!session.take_pumps().drain().await);
        session.pump(async {});
        assert!(session.take_pumps().drain().await);
    }
}
