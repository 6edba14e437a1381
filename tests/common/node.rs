//! The machine under test: its containerd, the runtime to test and the lane it runs in.

use std::future::Future;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::time::Duration;

use containerd_client::services::v1::containers_client::ContainersClient;
use containerd_client::services::v1::snapshots::snapshots_client::SnapshotsClient;
use containerd_client::services::v1::tasks_client::TasksClient;
use containerd_client::services::v1::version_client::VersionClient;
use containerd_client::tonic::transport::Channel;
use containerd_client::tonic::{Request, Response, Status};
use tokio::runtime::Runtime;

use super::{daemon, shim, wait};

pub const CONTAINERD_SOCKET: &str = "/run/containerd/containerd.sock";
pub const OUR_RUNTIME: &str = "io.containerd.systemd.v1";
pub const STOCK_RUNTIME: &str = "io.containerd.runc.v2";
/// The namespace of all tests that need no other one. The testbed has imported the image into it.
pub const NAMESPACE: &str = "default";

/// How long containerd may take for one call.
const CALL_LIMIT: Duration = Duration::from_secs(60);

/// Tests share the machine, except tests that restart a service or count what is left.
static MACHINE: RwLock<()> = RwLock::new(());

enum Claim {
    Shared { _guard: RwLockReadGuard<'static, ()> },
    Exclusive { _guard: RwLockWriteGuard<'static, ()> },
}

/// A connection to the machine's containerd. Held for the length of a test.
pub struct Node {
    /// Name of the containerd runtime under test.
    pub runtime: String,
    rt: Runtime,
    channel: Channel,
    _claim: Claim,
}

impl Node {
    /// For a test that may run in parallel with others.
    pub fn shared() -> Node {
        let _guard = MACHINE.read().unwrap_or_else(PoisonError::into_inner);
        Node::connect(Claim::Shared { _guard })
    }

    /// For a test that restarts services or counts what is left: no other test runs at the same time.
    pub fn exclusive() -> Node {
        let _guard = MACHINE.write().unwrap_or_else(PoisonError::into_inner);
        Node::connect(Claim::Exclusive { _guard })
    }

    fn connect(claim: Claim) -> Node {
        let rt = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .expect("start a tokio runtime");
        let channel = rt
            .block_on(containerd_client::connect(CONTAINERD_SOCKET))
            .unwrap_or_else(|error| panic!("no containerd at {CONTAINERD_SOCKET}: {error}"));
        Node { runtime: runtime_under_test(), rt, channel, _claim: claim }
    }

    pub fn channel(&self) -> Channel {
        self.channel.clone()
    }

    pub fn tasks(&self) -> TasksClient<Channel> {
        TasksClient::new(self.channel())
    }

    pub fn containers(&self) -> ContainersClient<Channel> {
        ContainersClient::new(self.channel())
    }

    pub fn snapshots(&self) -> SnapshotsClient<Channel> {
        SnapshotsClient::new(self.channel())
    }

    /// Runs a future to its end on the node's tokio runtime.
    pub fn block_on<F: Future>(&self, future: F) -> F::Output {
        self.rt.block_on(future)
    }

    pub fn spawn<F>(&self, future: F) -> tokio::task::JoinHandle<F::Output>
    where
        F: Future + Send + 'static,
        F::Output: Send + 'static,
    {
        self.rt.spawn(future)
    }

    /// Waits for containerd's response to one call, with a limit.
    pub fn call<T>(&self, answer: impl Future<Output = Result<Response<T>, Status>>) -> Result<T, Status> {
        self.block_on(async {
            match tokio::time::timeout(CALL_LIMIT, answer).await {
                Ok(answer) => answer.map(Response::into_inner),
                Err(_) => {
                    Err(Status::deadline_exceeded(format!("containerd gave no answer in {CALL_LIMIT:?}")))
                }
            }
        })
    }

    /// Restarts containerd, even if tests have restarted it often in the last ten seconds.
    pub fn restart_containerd(&self) {
        super::process::succeed("systemctl", &["reset-failed", "containerd.service"]);
        super::process::succeed("systemctl", &["restart", "containerd.service"]);
        self.wait_for_containerd();
    }

    /// Waits until containerd answers again after a restart.
    pub fn wait_for_containerd(&self) {
        wait::until_true("containerd answers", || {
            self.call(VersionClient::new(self.channel()).version(())).is_ok()
        });
    }
}

/// A request in a containerd namespace.
pub fn request<T>(namespace: &str, message: T) -> Request<T> {
    let mut request = Request::new(message);
    let value = namespace.parse().unwrap_or_else(|_| panic!("namespace {namespace:?} as a header"));
    request.metadata_mut().insert("containerd-namespace", value);
    request
}

/// An id that no other test uses, in this run or in another one.
pub fn unique(name: &str) -> String {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    format!("{name}-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed))
}

pub fn runtime_under_test() -> String {
    std::env::var("E2E_RUNTIME").unwrap_or_else(|_| OUR_RUNTIME.to_string())
}

/// A number of repetitions: from the environment, else a number that suits the lane. An emulated machine is some
/// 20 times slower.
pub fn number(variable: &str, natively: usize, emulated: usize) -> usize {
    let lane = std::env::var("E2E_LANE");
    let default = if lane.is_ok_and(|lane| lane == "vm") { emulated } else { natively };
    std::env::var(variable).ok().and_then(|number| number.parse().ok()).unwrap_or(default)
}

/// Something that a test needs and not every run has.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Need {
    /// A kernel in which AppArmor is enabled.
    AppArmor,
    /// Our shim: the test checks something that other shims do not do.
    OurShim,
    /// cgroup v2 controllers.
    Controllers,
    /// A second OCI runtime, crun.
    Crun,
    /// criu, in a guest with its own kernel: in a container, criu lacks permissions.
    Criu,
    /// iptables, with which criu holds back the connections of a container with a network of its own.
    Iptables,
    /// A script that reboots the guest when the test has ended.
    Reboot,
    /// A script that ends all processes of the guest when the test has ended (`systemctl soft-reboot`).
    SoftReboot,
    /// A test build of our shim, with fault points.
    Faults,
    /// A systemd that keeps the descriptors of a stopped service.
    PreservedStore,
    /// A systemd from which a service can take away that it believes the main process.
    NotifyAccessOverride,
    /// A containerd whose clients can have sandboxes: 1.7 creates them, and then fails to publish the event.
    Sandboxes,
    /// Chromium.
    Browser,
}

impl Need {
    /// Why this run does not have it; `None` if it has.
    pub fn missing(self) -> Option<String> {
        match self {
            Need::AppArmor => {
                let enabled = std::fs::read_to_string("/sys/module/apparmor/parameters/enabled");
                let can_load = std::path::Path::new("/sys/kernel/security/apparmor/.load").exists();
                let is_enabled = enabled.is_ok_and(|enabled| enabled.trim() == "Y") && can_load;
                (!is_enabled).then(|| "AppArmor is not enabled in this kernel".to_string())
            }
            Need::OurShim => {
                let runtime = runtime_under_test();
                (runtime != OUR_RUNTIME).then(|| format!("is about {OUR_RUNTIME}, this run tests {runtime}"))
            }
            Need::Controllers => {
                let have = std::fs::read_to_string("/sys/fs/cgroup/cgroup.controllers").unwrap_or_default();
                let all =
                    ["cpu", "memory", "pids"].iter().all(|name| have.split_whitespace().any(|c| c == *name));
                (!all).then(|| format!("no cgroup v2 controllers here ({:?})", have.trim()))
            }
            Need::Crun => {
                (!std::path::Path::new("/usr/bin/crun").exists()).then(|| "no crun here".to_string())
            }
            Need::Criu => {
                let is_vm = std::env::var("E2E_LANE").is_ok_and(|lane| lane == "vm");
                let is_there = std::path::Path::new("/usr/sbin/criu").exists();
                match (is_vm, is_there) {
                    (false, _) => Some("criu needs the lane vm".to_string()),
                    (true, false) => Some("no criu here".to_string()),
                    (true, true) => None,
                }
            }
            Need::Iptables => (!std::path::Path::new("/usr/sbin/iptables-restore").exists())
                .then(|| "no iptables here".to_string()),
            Need::Reboot => std::env::var_os("E2E_REBOOT")
                .is_none()
                .then(|| "nobody reboots this guest in between".to_string()),
            Need::SoftReboot => std::env::var_os("E2E_SOFT_REBOOT")
                .is_none()
                .then(|| "nobody ends the processes of this guest in between".to_string()),
            Need::Browser => (!std::path::Path::new("/usr/bin/chromium").exists())
                .then(|| "no Chromium here (run-page has it)".to_string()),
            Need::Faults => shim::points().is_empty().then(|| "no build with faults here".to_string()),
            Need::Sandboxes => {
                let outcome = super::process::run("containerd", &["--version"]);
                let version = outcome.text();
                (version.contains(" 1.6.") || version.contains(" 1.7."))
                    .then(|| format!("{} has no sandboxes for clients", version.trim()))
            }
            Need::NotifyAccessOverride => {
                let version = daemon::systemd_version();
                (version < 254).then(|| format!("systemd {version} has no NOTIFYACCESS="))
            }
            Need::PreservedStore => {
                let version = daemon::systemd_version();
                (version < 254)
                    .then(|| format!("systemd {version} drops the descriptors of a service that is stopped"))
            }
        }
    }
}
