//! Paths and times that the parts agree on.

use std::time::Duration;

/// Where the records are (tmpfs, gone after a reboot as the containers are).
pub const STATE_DIR: &str = "/run/containerd-shim-systemd-v1";

/// The daemon's socket. Beside the records, not among them: any name in there is a namespace.
pub const SOCKET: &str = "/run/containerd-shim-systemd-v1.sock";

/// Held by the one `start` that brings the daemon's units up.
pub const START_LOCK: &str = "/run/containerd-shim-systemd-v1.lock";

/// What has ended the daemon, see [`crate::suspect`].
pub const CRASHES: &str = "/run/containerd-shim-systemd-v1.crashes";

/// The oldest systemd that is supported.
pub const OLDEST_SYSTEMD: u32 = 252;

/// How long a client may take to open its end of a FIFO. As in containerd-shim-runc-v2.
pub const STDIO_LIMIT: Duration = Duration::from_secs(30);

/// How long a command of the OCI runtime may take before the call fails.
pub const RUNTIME_LIMIT: Duration = Duration::from_secs(120);

/// How long a `systemctl stop` lets a container end by itself.
pub const STOP_LIMIT: Duration = Duration::from_secs(10);

/// How long a logger may take to end after SIGTERM. As in containerd-shim-runc-v2.
pub const LOGGER_STOP_LIMIT: Duration = Duration::from_secs(12);

/// How long a killed process may take to be reported as ended.
pub const KILL_LIMIT: Duration = Duration::from_secs(30);

/// How long bringing up the daemon's units may take.
pub const START_LIMIT: Duration = Duration::from_secs(30);

/// How long `delete` leaves the work to the daemon: containerd kills it after 5 s.
pub const DELETE_LIMIT: Duration = Duration::from_millis(3500);
