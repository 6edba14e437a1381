//! What the daemon tells systemd about itself: ready, stopping, alive.

use std::time::Duration;

use libsystemd::daemon::{self, NotifyState};

/// Tells systemd that calls are served from now on. No effect outside of systemd.
pub fn ready(status: &str) {
    tell(&[NotifyState::Ready, NotifyState::Status(status.to_owned())]);
}

/// Tells systemd that the daemon is about to end.
pub fn stopping() {
    tell(&[NotifyState::Stopping]);
}

/// Tells systemd for as long as it is polled that the async runtime still runs: twice within the
/// time after which the watchdog would end the daemon. Resolves never.
pub async fn keep_alive() {
    let Some(limit) = daemon::watchdog_enabled(false) else {
        return std::future::pending().await;
    };
    let mut ticks = tokio::time::interval((limit / 2).max(Duration::from_millis(100)));
    loop {
        ticks.tick().await;
        tell(&[NotifyState::Watchdog]);
    }
}

fn tell(state: &[NotifyState]) {
    // A datagram to a local socket: it does not block. Failing to send it is for systemd to notice.
    if let Err(error) = daemon::notify(false, state) {
        tracing::warn!(%error, "can't notify systemd: {error}");
    }
}
