//! The end of the daemon: who serves the next call.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use crate::cli::Failure;
use crate::guard;
use crate::transport::listener::Connections;
use crate::unit::manager::Manager;
use crate::unit::systemd::Stops;
use crate::unit::{name, properties};

/// How long the daemon serves while the machine shuts down. systemd kills the daemon 10 s after it has begun to stop it.
const LAST_CALLS_LIMIT: Duration = Duration::from_secs(5);

/// How often the daemon looks whether it still has clients.
const LAST_CALLS_PAUSE: Duration = Duration::from_millis(50);

/// The time limit for the calls to systemd at the end.
const SHUTDOWN_CALL_LIMIT: Duration = Duration::from_secs(5);

/// Starts a unit that starts the daemon at the next call.
pub(super) struct Waking {
    pub(super) manager: Arc<Manager>,
    pub(super) connections: Arc<Connections>,
    /// The path of this program.
    pub(super) program: PathBuf,
}

impl Waking {
    /// True if the daemon is being stopped, and not restarted.
    async fn is_stopped(&self) -> Result<bool, String> {
        let job = self.manager.job_type(&name::daemon_service()).await;
        Ok(job.map_err(|error| error.to_string())?.as_deref() == Some("stop"))
    }

    /// Asks systemd to start the unit, which systemd does once this daemon has ended: the unit is ordered after it.
    async fn leave(&self) {
        let command = [self.program.to_string_lossy().into_owned(), "wake".to_owned()];
        let start = async {
            let wake =
                properties::wake(&command, self.connections.wake_fd()).map_err(|error| error.to_string())?;
            let begun = self.manager.begin_with_descriptor(&name::wake_service(), &wake).await;
            begun.map_err(|error| error.to_string())
        };
        let started = tokio::time::timeout(SHUTDOWN_CALL_LIMIT, start).await;
        if let Err(reason) = started.map_err(|_| "systemd does not answer".to_owned()).flatten() {
            tracing::warn!(
                "can't start the wake unit, so the next call of containerd will not start the daemon: {reason}"
            );
        }
    }

    /// While the machine shuts down, systemd stops the daemon as soon as the containers have ended, and at the same time as
    /// containerd and its clients. Those still have to learn how their containers ended, and to delete them: Docker would
    /// wait for that, and then record an unknown exit code. So the daemon serves until they have closed their connections.
    /// Returns whether the machine shuts down.
    pub(super) async fn serve_last_calls(&self) -> bool {
        let is_shutting_down =
            tokio::time::timeout(SHUTDOWN_CALL_LIMIT, self.manager.is_shutting_down()).await;
        if !matches!(is_shutting_down, Ok(Ok(true))) {
            return false;
        }
        let unused = async {
            while self.connections.count() > 0 {
                tokio::time::sleep(LAST_CALLS_PAUSE).await;
            }
        };
        if tokio::time::timeout(LAST_CALLS_LIMIT, unused).await.is_err() {
            let count = self.connections.count();
            tracing::warn!(
                count,
                "the machine shuts down, and {count} connections of clients are still open"
            );
        }
        true
    }

    /// Prepares the end of the daemon. If the daemon is stopped and `keeps` says that systemd then keeps the descriptor store,
    /// the next call on a kept connection starts the daemon.
    pub(super) async fn prepare(&self, keeps: bool) {
        let is_stopped = tokio::time::timeout(SHUTDOWN_CALL_LIMIT, self.is_stopped()).await;
        match is_stopped.map_err(|_| "systemd does not answer".to_owned()).flatten() {
            Ok(true) => {
                if keeps && self.connections.count() > 0 {
                    self.leave().await;
                }
                guard::end_all().await;
            }
            // The next daemon waits for calls itself, and ends the guard.
            Ok(false) => {}
            Err(error) => {
                tracing::warn!("can't find out whether the daemon is stopped or restarted: {error}");
            }
        }
    }

    /// Stops the unit of an earlier daemon.
    pub(super) async fn dismiss(manager: &Manager) -> Result<(), Failure> {
        manager.stop_without_waiting(&name::wake_service()).await.map_err(Failure::new)
    }
}
