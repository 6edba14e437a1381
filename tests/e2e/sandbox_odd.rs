//! Unusual uses of the Sandbox API: calls in the wrong order, twice and at the same time, and hostile configurations
//! of pods. The tests call the shim directly, because containerd refuses some of this before it asks the shim.

use std::fs;
use std::thread;
use std::time::{Duration, Instant};

use containerd_shim_protos::sandbox_api::{
    CreateSandboxRequest, PingRequest, PlatformRequest, SandboxMetricsRequest, SandboxStatusRequest,
    ShutdownSandboxRequest, StartSandboxRequest, StopSandboxRequest, WaitSandboxRequest,
};
use prost_types::Any;
use ttrpc::Code;

use crate::common::leaks::{self, Traces};
use crate::common::node::{NAMESPACE, Node, unique};
use crate::common::pod::{
    DnsConfig, LinuxPodSandboxConfig, LinuxSandboxSecurityContext, PodSandboxConfig, PodSandboxMetadata, pod,
};
use crate::common::shim::{Bundle, Refusal, Shim, over_ttrpc};
use crate::common::spec::Spec;
use crate::common::task::{Io, SIGKILL};
use crate::common::{daemon, process, systemd, wait};

/// The name of a sandbox, and direct calls for it.
pub struct Direct<'s, 'n> {
    shim: &'s Shim<'n>,
    pub id: String,
    bundle: Bundle,
}

impl<'s, 'n> Direct<'s, 'n> {
    pub fn new(shim: &'s Shim<'n>, name: &str) -> Self {
        let bundle = Bundle::new("sandbox");
        bundle.remove_config();
        Self { shim, id: unique(name), bundle }
    }

    pub fn create(&self) -> Result<(), Refusal> {
        self.create_with(None, "")
    }

    pub fn create_with(&self, options: Option<Any>, network: &str) -> Result<(), Refusal> {
        let request = CreateSandboxRequest {
            sandbox_id: self.id.clone(),
            bundle_path: self.bundle.path().to_string(),
            netns_path: network.to_string(),
            options: options.map(over_ttrpc).into(),
            ..Default::default()
        };
        let created =
            self.shim.call_sandbox(async |client, context| client.create_sandbox(context, &request).await);
        created.map(drop)
    }

    pub fn start(&self) -> Result<u32, Refusal> {
        let request = StartSandboxRequest { sandbox_id: self.id.clone(), ..Default::default() };
        let started =
            self.shim.call_sandbox(async |client, context| client.start_sandbox(context, &request).await);
        started.map(|started| started.pid)
    }

    fn stop(&self, seconds: u32) -> Result<(), Refusal> {
        let request =
            StopSandboxRequest { sandbox_id: self.id.clone(), timeout_secs: seconds, ..Default::default() };
        let stopped =
            self.shim.call_sandbox(async |client, context| client.stop_sandbox(context, &request).await);
        stopped.map(drop)
    }

    fn wait(&self) -> Result<u32, Refusal> {
        let request = WaitSandboxRequest { sandbox_id: self.id.clone(), ..Default::default() };
        let waited =
            self.shim.call_sandbox(async |client, context| client.wait_sandbox(context, &request).await);
        waited.map(|waited| waited.exit_status)
    }

    pub fn state(&self) -> Result<String, Refusal> {
        let request = SandboxStatusRequest { sandbox_id: self.id.clone(), ..Default::default() };
        let status =
            self.shim.call_sandbox(async |client, context| client.sandbox_status(context, &request).await);
        status.map(|status| status.state)
    }

    fn ping(&self) -> Result<(), Refusal> {
        let request = PingRequest { sandbox_id: self.id.clone(), ..Default::default() };
        self.shim.call_sandbox(async |client, context| client.ping_sandbox(context, &request).await).map(drop)
    }

    fn platform(&self) -> Result<(), Refusal> {
        let request = PlatformRequest { sandbox_id: self.id.clone(), ..Default::default() };
        self.shim.call_sandbox(async |client, context| client.platform(context, &request).await).map(drop)
    }

    fn metrics(&self) -> Result<(), Refusal> {
        let request = SandboxMetricsRequest { sandbox_id: self.id.clone(), ..Default::default() };
        self.shim
            .call_sandbox(async |client, context| client.sandbox_metrics(context, &request).await)
            .map(drop)
    }

    pub fn shut_down(&self) -> Result<(), Refusal> {
        let request = ShutdownSandboxRequest { sandbox_id: self.id.clone(), ..Default::default() };
        self.shim
            .call_sandbox(async |client, context| client.shutdown_sandbox(context, &request).await)
            .map(drop)
    }

    pub fn unit(&self) -> String {
        format!("containerd-{NAMESPACE}-{}.service", self.id)
    }
}

impl Drop for Direct<'_, '_> {
    fn drop(&mut self) {
        // Most tests have removed the sandbox already.
        let _ = self.shut_down();
    }
}

fn code<T: std::fmt::Debug>(answer: Result<T, Refusal>) -> Code {
    answer.expect_err("a refusal").0
}

#[test]
fn calls_in_the_wrong_order_are_refused_and_change_nothing() {
    needs!(OurShim);
    let node = Node::exclusive();
    let shim = Shim::connect(&node);
    drop(Direct::new(&shim, "warm").create());
    let before = Traces::take();
    let sandbox = Direct::new(&shim, "order");
    // Nothing is created yet.
    assert_eq!(code(sandbox.start()), Code::NOT_FOUND);
    assert_eq!(code(sandbox.stop(1)), Code::NOT_FOUND);
    assert_eq!(code(sandbox.wait()), Code::NOT_FOUND);
    assert_eq!(code(sandbox.state()), Code::NOT_FOUND);
    assert_eq!(code(sandbox.ping()), Code::NOT_FOUND);
    assert_eq!(code(sandbox.platform()), Code::NOT_FOUND);
    assert_eq!(code(sandbox.metrics()), Code::NOT_FOUND);
    sandbox.shut_down().expect("there is nothing to shut down");

    sandbox.create().expect("create");
    let (twice, reason) = sandbox.create().expect_err("it exists");
    assert_eq!(twice, Code::ALREADY_EXISTS, "{reason}");
    let (other, reason) = sandbox.create_with(pod(|_| {}), "").expect_err("it exists, as another one");
    assert_eq!(other, Code::ALREADY_EXISTS, "{reason}");
    sandbox.start().expect("the first one is as it was");
    assert_eq!(code(sandbox.start()), Code::FAILED_PRECONDITION);
    sandbox.shut_down().expect("it runs, and is removed");
    sandbox.shut_down().expect("once more");
    assert_eq!(code(sandbox.start()), Code::NOT_FOUND);

    // A sandbox that was never started.
    sandbox.create().expect("create");
    sandbox.stop(1).expect("stop");
    assert_eq!(sandbox.state().expect("status"), "SANDBOX_NOTREADY");
    sandbox.wait().expect("it has ended");
    sandbox.start().expect_err("it has ended");
    sandbox.shut_down().expect("shut down");
    drop(sandbox);
    leaks::assert_none("calls in the wrong order", &before);
}

#[test]
fn a_stop_with_any_time_limit_ends_the_sandbox_and_every_wait() {
    needs!(OurShim);
    let node = Node::exclusive();
    for seconds in [0, 1, u32::MAX] {
        let shim = Shim::connect(&node);
        let sandbox = Direct::new(&shim, "stop");
        sandbox.create().expect("create");
        sandbox.start().expect("start");
        let began = Instant::now();
        thread::scope(|scope| {
            let others: Vec<_> = (0..4).map(|_| Shim::connect(&node)).collect();
            let waiters: Vec<_> = others
                .into_iter()
                .map(|other| {
                    let (id, bundle) = (sandbox.id.clone(), Bundle::new("other"));
                    scope.spawn(move || {
                        let waiter = std::mem::ManuallyDrop::new(Direct { shim: &other, id, bundle });
                        waiter.wait()
                    })
                })
                .collect();
            daemon::killed();
            let stops: Vec<_> = (0..2).map(|_| scope.spawn(|| sandbox.stop(seconds))).collect();
            daemon::killed();
            for stop in stops {
                stop.join().expect("the call").expect("stop");
            }
            for waiter in waiters {
                assert_eq!(waiter.join().expect("the call"), Ok(0), "{seconds}");
            }
        });
        assert!(began.elapsed() < Duration::from_secs(60), "{seconds}");
    }
}

#[test]
fn hostile_configurations_of_pods_leave_nothing() {
    needs!(OurShim);
    let node = Node::exclusive();
    let shim = Shim::connect(&node);
    drop(Direct::new(&shim, "warm").create_with(pod(|_| {}), ""));
    let kept = fs::read_to_string("/proc/sys/kernel/panic").expect("a parameter of the node");
    let before = Traces::take();
    let linux = |linux: LinuxPodSandboxConfig| pod(|pod| pod.linux = Some(linux));
    let sysctl = |name: &str, value: &str| {
        linux(LinuxPodSandboxConfig {
            sysctls: [(name.to_string(), value.to_string())].into(),
            ..Default::default()
        })
    };
    let parent = |parent: &str| {
        linux(LinuxPodSandboxConfig { cgroup_parent: parent.to_string(), ..Default::default() })
    };
    let metadata = |text: &str| {
        let text = text.to_string();
        pod(|pod: &mut PodSandboxConfig| {
            pod.metadata = Some(PodSandboxMetadata {
                name: text.clone(),
                uid: text.clone(),
                namespace: text,
                ..Default::default()
            })
        })
    };
    let security = |uid| {
        let run_as_user = Some(crate::common::pod::Int64Value { value: uid });
        linux(LinuxPodSandboxConfig {
            security_context: Some(LinuxSandboxSecurityContext { run_as_user, ..Default::default() }),
            ..Default::default()
        })
    };
    let odd = [
        ("no such network", pod(|_| {}), "/run/netns/no-such-network", true),
        ("a network that is a directory", pod(|_| {}), "/run", true),
        ("a network that is another namespace", pod(|_| {}), "/proc/1/ns/uts", true),
        ("a relative network", pod(|_| {}), "proc/1/ns/net", true),
        ("a parameter of the node", sysctl("kernel.panic", "77"), "", true),
        ("a parameter outside of the directory", sysctl("net/../kernel/panic", "77"), "", true),
        ("a parameter that is no number", sysctl("net.ipv4.ip_unprivileged_port_start", "x\ny"), "", true),
        ("a parent outside of the hierarchy", parent("/../../../x.slice"), "", false),
        ("a parent with control characters", parent("/a\nb\u{7f}.slice"), "", true),
        ("a parent that is no slice of systemd", parent("/a--b.slice"), "", true),
        ("a user below 0", security(-1), "", true),
        ("a user above all", security(i64::from(u32::MAX) + 1), "", true),
        ("names with control characters", metadata("a\n[Service]\nUser=x\u{1b}[2J\u{202e}\0b"), "", false),
        ("names of a megabyte", metadata(&"x".repeat(1 << 20)), "", false),
        (
            "a host name with control characters",
            pod(|pod| pod.hostname = "a\nb\u{1b}[2J".to_string()),
            "",
            false,
        ),
        ("a host name that is too long", pod(|pod| pod.hostname = "h".repeat(65)), "", true),
        (
            "name servers with more lines",
            pod(|pod| {
                pod.dns_config = Some(DnsConfig {
                    servers: vec!["1.1.1.1\noptions debug".to_string()],
                    ..Default::default()
                });
            }),
            "",
            false,
        ),
        (
            "garbage of the right type",
            Some(Any { type_url: "runtime.v1.PodSandboxConfig".to_string(), value: vec![0xff; 3 << 20] }),
            "",
            true,
        ),
        ("a type of a megabyte", Some(Any { type_url: "t".repeat(1 << 20), value: Vec::new() }), "", true),
    ];
    for (what, options, network, is_refused) in odd {
        let sandbox = Direct::new(&shim, "odd");
        match sandbox.create_with(options, network) {
            Ok(()) => {
                assert!(!is_refused, "{what} is accepted");
                let pid = sandbox.start().unwrap_or_else(|error| panic!("{what}: {error:?}"));
                let shown = systemd::property(&sandbox.unit(), "Description");
                assert!(!shown.contains(char::is_control) && shown.len() < 1000, "{what}: {shown:?}");
                assert_eq!(systemd::main_pid(&sandbox.unit()), pid, "{what}");
            }
            Err((code, reason)) => {
                println!("{what}: {code:?}: {}", reason.chars().take(300).collect::<String>());
                assert!(is_refused, "{what}: {code:?}: {reason}");
                assert!(!reason.contains(|c: char| c.is_control()), "{what}: {reason:?}");
                assert!(reason.contains(network), "{what}: {reason}");
                assert!(reason.len() <= 9 << 10, "{what}: {} bytes", reason.len());
                assert_eq!(self::code(sandbox.state()), Code::NOT_FOUND, "{what}");
            }
        }
    }
    for id in ["", ".", "..", "../x", "a/../b", "a\nb", "a b", "é", &"i".repeat(300)] {
        let mut sandbox = Direct::new(&shim, "id");
        sandbox.id = id.to_string();
        let (code, reason) = sandbox.create().expect_err(id);
        assert_eq!(code, Code::INVALID_ARGUMENT, "{id:?}: {reason}");
    }
    assert_eq!(fs::read_to_string("/proc/sys/kernel/panic").expect("the parameter"), kept);
    leaks::assert_none("hostile pods", &before);
}

#[test]
fn a_container_of_a_dead_sandbox_is_refused_with_an_error_that_names_it() {
    needs!(OurShim);
    let node = Node::exclusive();
    let shim = Shim::connect(&node);
    let sandbox = Direct::new(&shim, "dead");
    sandbox.create().expect("create");
    let pid = sandbox.start().expect("start");
    sandbox.stop(5).expect("stop");
    wait::until_true("it is gone", || !process::exists(pid));
    let network = format!("/proc/{pid}/ns/net");
    let spec = Spec::sh("true").in_namespace_of("network", &network);
    let container = node.container("orphan", spec).make();
    let error = container.create(&Io::default()).expect_err("its network is gone");
    assert!(error.message().contains(&network), "{error}");
}

#[test]
fn an_administrator_may_freeze_stop_and_limit_the_slice_of_a_pod() {
    needs!(OurShim);
    let node = Node::exclusive();
    let shim = Shim::connect(&node);
    let slice = format!("{}.slice", unique("trap").replace('-', "_"));
    let options = || {
        pod(|pod| {
            pod.linux =
                Some(LinuxPodSandboxConfig { cgroup_parent: format!("/{slice}"), ..Default::default() })
        })
    };
    let sandbox = Direct::new(&shim, "trap");
    sandbox.create_with(options(), "").expect("create");
    sandbox.start().expect("start");
    // While the slice is frozen, other tasks are not delayed. An old systemd starts the unit, which waits for the thaw.
    process::succeed("systemctl", &["freeze", &slice]);
    let path = |name: &str| format!("{slice}:cri-containerd:{}", unique(name));
    let inside = node
        .container(
            "inside",
            Spec::sh("trap 'exit 7' TERM; sleep 1000 & while :; do wait; done").cgroups_path(&path("inside")),
        )
        .make();
    let refuses = daemon::systemd_version() >= 257;
    thread::scope(|scope| {
        if refuses {
            let error = inside.create(&Io::default()).expect_err("the slice is frozen");
            assert_eq!(error.code(), containerd_client::tonic::Code::FailedPrecondition, "{error}");
            assert!(error.message().contains(&slice) && error.message().contains("frozen"), "{error}");
        }
        let created = scope.spawn(|| if refuses { Ok(0) } else { inside.create(&Io::default()) });
        let outside = node.container("outside", Spec::sh("exit 4")).started(&Io::default());
        assert_eq!(outside.exit_status(), 4);
        process::succeed("systemctl", &["thaw", &slice]);
        created.join().expect("the call").expect("create, after the thaw");
        if refuses {
            inside.create(&Io::default()).expect("create, after the thaw");
        }
    });
    inside.start().expect("start");
    // The script has set its trap when its child exists. Before that, `runc init` gets SIGTERM.
    wait::until_true("a child", || inside.pids().is_ok_and(|pids| pids.len() == 2));
    // The slice is stopped while a Create in it is under way.
    let late = node.container("late", Spec::sleeping().cgroups_path(&path("late"))).make();
    thread::scope(|scope| {
        let created = scope.spawn(|| late.create(&Io::default()));
        process::succeed("systemctl", &["stop", &slice]);
        // Either systemd has stopped the new container with the others, or the container started after that and runs.
        let created = created.join().expect("the call");
        match created {
            Err(error) => {
                assert_eq!(error.code(), containerd_client::tonic::Code::FailedPrecondition, "{error}");
                assert!(error.message().contains("stop"), "{error}");
            }
            Ok(_) => {
                // The container may have ended by now.
                let _ = late.kill(SIGKILL);
                late.exit_status();
            }
        }
    });
    assert_eq!(inside.exit_status(), 7);
    assert_eq!(sandbox.wait().expect("the sandbox has ended with its slice"), 0);
    // The pod can be created again in the slice.
    let again = Direct::new(&shim, "again");
    again.create_with(options(), "").expect("create");
    again.start().expect("start");
}
