//! What a client requests in a Create, after checking: plain data, as the record stores it.

use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::config;

/// A Create request.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Create {
    /// The bundle directory; absolute.
    pub bundle: PathBuf,
    /// What to mount on the bundle's rootfs, parents first; empty if the client has mounted it.
    pub rootfs: Vec<Mount>,
    /// The directory with the images of a checkpoint, from which Start restores the container.
    pub checkpoint: Option<PathBuf>,
    /// What the shim provides for the task, if the task is a sandbox whose first process is the shim's own.
    pub sandbox: Option<Sandbox>,
    /// Whether the client has a lease for the socket over which it called. `None` for a task of an earlier version.
    pub has_lease: Option<bool>,
}

/// What the shim provides for the sandbox of a pod, besides a rootfs that exists in the sandbox only.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Sandbox {
    /// Where containerd's CRI plugin expects the files of the pod. `None` if the sandbox is not CRI's.
    pub places: Option<Places>,
}

/// The directories in which containerd's CRI plugin looks for the files that all containers of a pod get.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Places {
    /// For `hostname`, `hosts` and `resolv.conf`.
    pub files: PathBuf,
    /// For `shm`, the mountpoint of the pod's /dev/shm.
    pub mounts: PathBuf,
}

/// A mount, as containerd describes it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mount {
    /// File system type.
    pub kind: String,
    /// Device, directory or name.
    pub source: String,
    /// Where, below the rootfs; mostly empty.
    pub target: String,
    /// Mount options, flags and data mixed.
    pub options: Vec<String>,
}

/// Stdio as the client names it: a path, a URI, or nothing.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stdio {
    /// Standard input.
    pub stdin: String,
    /// Standard output.
    pub stdout: String,
    /// Standard error.
    pub stderr: String,
    /// The process gets a terminal.
    pub terminal: bool,
}

/// Where the output of processes goes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Log {
    /// It goes to the client if the client named streams, and to the journal. The client never waits for the journal. The
    /// output of an exec goes to the journal only if its client named no streams.
    #[default]
    Auto,
    /// It goes to the client if the client named streams, else to the journal.
    Client,
    /// It goes to the journal, whatever the client named.
    Journal,
    /// It goes to the client and to the journal. The client waits for the journal for a limited time.
    Tee,
    /// It goes to the client if the client named streams, else nowhere.
    None,
}

/// The OCI runtime and its options.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Runtime {
    /// The binary; absolute.
    pub binary: PathBuf,
    /// Its state directory for this namespace (`--root`).
    pub root: PathBuf,
    /// `--no-pivot`
    pub no_pivot: bool,
    /// `--no-new-keyring`
    pub no_new_keyring: bool,
    /// Owner of the pipe ends that the container gets (user, group).
    pub io_owner: (u32, u32),
    /// `PATH` for it and its hooks.
    pub path: String,
    /// The file with the environment for it and its hooks: that of the task's containerd, as in
    /// /proc/PID/environ. Empty for a task that an earlier version made.
    #[serde(default)]
    pub environment: PathBuf,
    /// The cgroup in which it creates containers and execs, below the root of the hierarchy; one in the
    /// daemon's slice if the client names none.
    #[serde(default)]
    pub cgroup: Option<PathBuf>,
    /// criu's work directory for a restore; empty if the client names none.
    #[serde(default, skip_serializing_if = "is_empty")]
    pub criu_work: PathBuf,
    /// Where the output of its processes goes.
    pub log: Log,
    /// How long one of its commands may take, in seconds; 0 for the default.
    #[serde(default)]
    pub limit_sec: u32,
}

fn is_empty(path: &Path) -> bool {
    path.as_os_str().is_empty()
}

impl Runtime {
    /// How long a command may take, other than `create`.
    pub fn limit(&self) -> Duration {
        self.limit_or(config::RUNTIME_LIMIT)
    }

    /// How long `create` may take, with the mounts before it.
    pub fn create_limit(&self) -> Duration {
        self.limit_or(config::CREATE_LIMIT)
    }

    fn limit_or(&self, default: Duration) -> Duration {
        if self.limit_sec == 0 { default } else { Duration::from_secs(self.limit_sec.into()) }
    }
}

/// Who requests a property of a container's unit.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PropertySource {
    /// The client, with an annotation that contains the property's name.
    Annotation,
    /// The client, with the annotation for the image's stop signal.
    StopSignal,
    /// The administrator, in the runtime's options.
    Options,
}

/// A requested property of a container's unit.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Property {
    /// Who requests it.
    #[serde(rename = "asker")]
    pub source: PropertySource,
    /// Its name, as requested.
    pub name: String,
    /// Its value, in GVariant text.
    pub value: String,
}

/// Devices that a container may use.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceAllow {
    /// In systemd's notation: `/dev/char/1:3`, `char-136`, `block-*`.
    pub device: String,
    /// Letters of `rwm`.
    pub access: String,
}

/// The containerd that a task belongs to, as `start` found it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Containerd {
    /// Where events go: a path of a Unix socket.
    pub ttrpc_address: String,
    /// The address of its gRPC API, for programs that start a client.
    pub grpc_address: String,
    pub path: String,
    /// Its resource limits (`RLIMIT_…` number, soft, hard), which containers inherit under containerd-shim-runc-v2:
    /// systemd's defaults must not take their place.
    pub rlimits: Vec<(u32, u64, u64)>,
    /// The processors that it may use, which containers inherit under containerd-shim-runc-v2: those of PID 1
    /// (`CPUAffinity=`) must not take their place. Empty for a task of an earlier version.
    #[serde(default)]
    pub processors: Vec<usize>,
    /// How the kernel schedules it, which containers inherit under containerd-shim-runc-v2. Empty for a task of an earlier
    /// version.
    #[serde(default, skip_serializing_if = "Scheduling::is_empty")]
    pub scheduling: Scheduling,
    /// Whether it wants core scheduling for its tasks (`SCHED_CORE`).
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub core_scheduling: bool,
    /// Its environment, `NAME=value` each. Empty once Create has moved it to [`Runtime::environment`].
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub environment: Vec<String>,
    /// Its mount and network namespaces, if they are not those of PID 1.
    #[serde(default)]
    pub namespaces: Option<Namespaces>,
}

/// How the kernel schedules a process. Each value is `None` if it could not be read.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Scheduling {
    pub nice: Option<i32>,
    /// The policy (`SCHED_…`), and the real-time priority.
    pub policy: Option<(i32, i32)>,
    /// As in ioprio_get(2).
    pub io_priority: Option<i32>,
    /// The policy for memory (`MPOL_…`, with flags), and the set of NUMA nodes.
    pub memory: Option<(i32, Vec<u64>)>,
}

impl Scheduling {
    fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

/// Namespaces of a containerd, by the inode numbers of their files in /proc.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Namespaces {
    /// The process id of containerd when it called `start`.
    pub containerd: i32,
    /// The mount namespace.
    pub mount: u64,
    /// The network namespace.
    pub network: u64,
}
