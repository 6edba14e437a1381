//! Paths and time limits that several modules use.

use std::time::Duration;

/// The name of this program.
pub const NAME: &str = env!("CARGO_PKG_NAME");

/// The directory of the records. It is on a tmpfs: a reboot ends the containers and removes the records.
pub const STATE_DIR: &str = "/run/containerd-shim-systemd-v1";

/// The daemon's socket. It is not in the directory of the records, where every name is that of a namespace.
pub const SOCKET: &str = "/run/containerd-shim-systemd-v1.sock";

/// The lock of the `start` that starts the daemon's units. Others wait for it.
pub const START_LOCK: &str = "/run/containerd-shim-systemd-v1.lock";

/// The file with the requests and records that have ended the daemon, see [`crate::suspect`].
pub const CRASHES: &str = "/run/containerd-shim-systemd-v1.crashes";

/// The symlink with which the daemon says that it serves calls.
pub const SERVING: &str = "/run/containerd-shim-systemd-v1.serving";

/// The path of a sandbox's rootfs while the OCI runtime creates the sandbox: a mountpoint in the mount namespace of the
/// sandbox's unit, empty everywhere else.
pub const SANDBOX_ROOT: &str = "/run/containerd-shim-systemd-v1.sandbox";

/// The cgroup in which OCI runtimes work. It is beside that of the daemon.
pub const RUNTIME_CGROUP: &str = "containerd-shim-runtime";

/// The cgroup in [`RUNTIME_CGROUP`] with the cgroups of the OCI runtime's commands that the daemon runs.
pub const COMMANDS_CGROUP: &str = "commands";

/// How long a sandbox may take to end at SIGTERM, if its client names no time.
pub const SANDBOX_STOP_LIMIT: Duration = Duration::from_secs(2);

/// The oldest systemd that is supported.
pub const OLDEST_SYSTEMD: u32 = 252;

/// How long a client may take to open its end of a FIFO. containerd-shim-runc-v2 has the same limit.
pub const STDIO_LIMIT: Duration = Duration::from_secs(30);

/// How long a command of the OCI runtime other than `create` may take. After this time it is killed, and the call fails.
pub const RUNTIME_LIMIT: Duration = Duration::from_secs(120);

/// How long `create` may take, with the mounts before it: hooks and slow file systems may need minutes.
pub const CREATE_LIMIT: Duration = Duration::from_secs(600);

/// How long systemd may take to read a notification of `launch`: it may be reloading.
pub const BARRIER_LIMIT: Duration = Duration::from_secs(60);

/// How long a command of the OCI runtime may continue after the container's init process has ended.
pub const AFTER_INIT_LIMIT: Duration = Duration::from_secs(5);

/// How long a `systemctl stop` lets a container end by itself.
pub const STOP_LIMIT: Duration = Duration::from_secs(10);

/// How long a logger may take to end after SIGTERM. containerd-shim-runc-v2 has the same limit.
pub const LOGGER_STOP_LIMIT: Duration = Duration::from_secs(12);

/// The pause before a logger that has ended is started again.
pub const LOGGER_PAUSE: Duration = Duration::from_secs(1);

/// The exit code of `launch` for a logger that has nothing to read any more. systemd does not restart the unit after
/// this code.
pub const NOTHING_TO_LOG: u8 = 122;

/// How long work on files that a client has named may take. They may be on a disk that does not answer.
pub const FILES_LIMIT: Duration = Duration::from_secs(60);

/// How long work on the files of an OCI runtime may take: its state and its program. They may be on such a disk, too. Clients that
/// wait for a Delete give up after a minute.
pub const RUNTIME_FILES_LIMIT: Duration = Duration::from_secs(30);

/// How long a killed process may take to be reported as ended.
pub const KILL_LIMIT: Duration = Duration::from_secs(30);

/// How long the start of the daemon's units may take.
pub const START_LIMIT: Duration = Duration::from_secs(30);

/// How long `start` waits for a daemon that does not serve. The recovery of 1,000 tasks takes less than a second.
pub const SERVING_LIMIT: Duration = Duration::from_secs(30);

/// How long `start` waits before it looks whether systemd has lost the settings of the daemon's units, and how long this look may
/// take. A daemon that is restarted serves before. The clients' connections of a daemon that has ended stay open for 30 s.
pub const LOST_LIMIT: Duration = Duration::from_secs(1);

/// How long `start` waits before it looks for a reason, and fails if there is one. A daemon that hangs because of a record is given
/// longer: it serves after two tries of 5 s.
pub const REASON_LIMIT: Duration = Duration::from_secs(10);

/// How long `start` waits for a bus that does not run. A restart of dbus takes less than a second.
pub const BUS_LIMIT: Duration = Duration::from_secs(10);

/// How long `delete` leaves the work to the daemon, and how long a Delete waits for a Create that it ends: containerd waits 5 s
/// for either.
pub const DELETE_LIMIT: Duration = Duration::from_millis(3500);
