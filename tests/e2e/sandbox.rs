//! The Sandbox API, through containerd's sandbox service.

use prost_types::Any;

use crate::common::leaks::{self, Traces};
use crate::common::node::{Node, unique};
use crate::common::pod::{
    Int64Value, LOCALHOST, LinuxContainerResources, LinuxPodSandboxConfig, LinuxSandboxSecurityContext,
    NamespaceOption, OF_NODE, SecurityProfile, pod,
};
use crate::common::sandbox::{NOT_READY, READY, Sandbox};
use crate::common::stdio::Scratch;
use crate::common::{daemon, process, systemd, wait};

/// The largest memory of the first process of a sandbox, in KiB.
const MAX_RESIDENT: u64 = 300;

#[test]
fn a_sandbox_needs_no_image_and_leaves_nothing() {
    needs!(OurShim, Sandboxes);
    let node = Node::exclusive();
    // The first sandbox makes objects that stay, such as the mountpoint.
    drop(Sandbox::run(&node, "warm-up"));
    let before = Traces::take();
    let sandbox = Sandbox::create(&node, "whole");
    assert_eq!(sandbox.status().state, NOT_READY);
    let pid = sandbox.start();
    let status = sandbox.status();
    assert_eq!((status.state.as_str(), status.pid), (READY, pid));
    assert!(status.created_at.is_some_and(|time| time.seconds > 0), "{:?}", status.created_at);
    assert_eq!(systemd::main_pid(&sandbox.unit()), pid);
    assert_eq!(sandbox.info()["unit"], format!("{:?}", sandbox.unit()));
    let waiter = sandbox.wait();
    sandbox.stop();
    assert_eq!(sandbox.waited(waiter), 0);
    let status = sandbox.status();
    assert_eq!(status.state, NOT_READY);
    assert!(status.exited_at.is_some_and(|time| time.seconds > 0), "{:?}", status.exited_at);
    // A sandbox that has ended is stopped already.
    sandbox.stop();
    sandbox.shut_down();
    drop(sandbox);
    leaks::assert_none("a sandbox", &before);
}

/// The number of seccomp filters of a process. In a guest that is a container, every process has some.
fn filters(pid: u32) -> u32 {
    let filters = process::status(pid, "Seccomp_filters").expect("a number of filters");
    filters.parse().expect("a number")
}

#[test]
fn the_first_process_is_small_and_confined() {
    needs!(OurShim, Sandboxes);
    let node = Node::shared();
    let (_sandbox, pid) = Sandbox::run(&node, "small");
    let resident = process::status(pid, "VmRSS").expect("a resident size");
    let kib: u64 = resident.trim_end_matches(" kB").parse().expect("a number");
    assert!(kib <= MAX_RESIDENT, "{resident}");
    wait::until_true("it has confined itself", || filters(pid) == filters(1) + 1);
    assert_eq!(process::status(pid, "NoNewPrivs").as_deref(), Some("1"));
    assert_eq!(process::status(pid, "CapEff").as_deref(), Some("0000000000000000"));
    for kind in ["net", "ipc", "uts", "pid", "mnt"] {
        assert_ne!(process::namespace(pid, kind), process::namespace(1, kind), "{kind}");
    }
}

#[test]
fn sigterm_and_sigint_end_it_with_0_and_other_signals_do_not() {
    use nix::sys::signal::Signal::{SIGHUP, SIGINT, SIGTERM, SIGUSR1};
    needs!(OurShim, Sandboxes);
    let node = Node::shared();
    for last in [SIGTERM, SIGINT] {
        let (sandbox, pid) = Sandbox::run(&node, "signal");
        let waiter = sandbox.wait();
        // Signals that arrive before the process blocks them are lost, as for every first process.
        wait::until_true("it takes signals", || filters(pid) > filters(1));
        for ignored in [SIGHUP, SIGUSR1] {
            daemon::signal(pid, ignored);
        }
        daemon::signal(pid, last);
        assert_eq!(sandbox.waited(waiter), 0, "{last}");
    }
}

#[test]
fn a_sandbox_survives_the_daemon_at_every_step() {
    needs!(OurShim, Sandboxes);
    let node = Node::exclusive();
    let sandbox = Sandbox::create(&node, "survivor");
    daemon::killed();
    let pid = sandbox.start();
    let waiter = sandbox.wait();
    daemon::killed();
    assert_eq!((sandbox.status().state.as_str(), sandbox.status().pid), (READY, pid));
    // The sandbox ends while there is no daemon.
    let killed = daemon::kill_now();
    daemon::signal(pid, nix::sys::signal::Signal::SIGTERM);
    daemon::wait_for_another(killed);
    assert_eq!(sandbox.waited(waiter), 0);
    daemon::killed();
    assert_eq!(sandbox.status().state, NOT_READY);
    sandbox.shut_down();
    wait::until_true("its unit is gone", || !systemd::is_active(&sandbox.unit()));
}

#[test]
fn a_sandbox_survives_a_restart_of_containerd() {
    needs!(OurShim, Sandboxes);
    let node = Node::exclusive();
    let (sandbox, pid) = Sandbox::run(&node, "reloaded");
    node.restart_containerd();
    assert_eq!((sandbox.status().state.as_str(), sandbox.status().pid), (READY, pid));
    let waiter = sandbox.wait();
    sandbox.stop();
    assert_eq!(sandbox.waited(waiter), 0);
}

#[test]
fn a_stop_of_the_unit_is_the_end_of_the_sandbox() {
    needs!(OurShim, Sandboxes);
    let node = Node::shared();
    let (sandbox, _) = Sandbox::run(&node, "stopped");
    let waiter = sandbox.wait();
    process::succeed("systemctl", &["stop", &sandbox.unit()]);
    assert_eq!(sandbox.waited(waiter), 0);
    assert_eq!(sandbox.status().state, NOT_READY);
}

#[test]
fn a_sandbox_has_metrics() {
    needs!(OurShim, Sandboxes);
    let node = Node::shared();
    let (sandbox, _) = Sandbox::run(&node, "measured");
    let metrics = sandbox.metrics();
    assert_eq!(metrics.id, sandbox.id);
    let data = metrics.data.expect("data");
    assert!(data.type_url.ends_with("io.containerd.cgroups.v2.Metrics"), "{}", data.type_url);
}

#[test]
fn the_runtimes_options_hold_for_sandboxes() {
    needs!(OurShim, Sandboxes);
    let node = Node::shared();
    let options =
        crate::runtime_options::runc_options(|options| options.binary_name = "no-such-runtime".to_string());
    let refused = Sandbox::create_with(&node, "options", None, Some(options)).err().expect("a refusal");
    assert!(refused.message().contains("no-such-runtime"), "{refused:?}");
}

#[test]
fn options_that_are_no_pod_are_refused() {
    needs!(OurShim, Sandboxes);
    let node = Node::shared();
    let options = Any { type_url: "example.com/x.Pod".to_string(), value: Vec::new() };
    let refused = Sandbox::create_with(&node, "refused", Some(options), None).err().expect("a refusal");
    assert!(refused.message().contains("x.Pod"), "{refused:?}");
}

#[test]
fn a_pod_has_its_name_its_parameters_and_its_user() {
    needs!(OurShim, Sandboxes);
    let node = Node::shared();
    let options = pod(|pod| {
        pod.hostname = "web-host".to_string();
        pod.linux = Some(LinuxPodSandboxConfig {
            security_context: Some(LinuxSandboxSecurityContext {
                run_as_user: Some(Int64Value { value: 65535 }),
                ..Default::default()
            }),
            sysctls: [("kernel.shm_rmid_forced".to_string(), "1".to_string())].into(),
            ..Default::default()
        });
    });
    let sandbox = Sandbox::create_with(&node, "pod", options, None).expect("create a pod");
    let pid = sandbox.start();
    let description = systemd::property(&sandbox.unit(), "Description");
    assert!(description.contains("shop/web-1 (sandbox)"), "{description}");
    let inside = |command: &[&str]| {
        let target = pid.to_string();
        let mut args = vec!["--target", &target, "--uts", "--ipc", "--net"];
        args.extend(command);
        process::succeed("nsenter", &args).trim().to_string()
    };
    assert_eq!(inside(&["hostname"]), "web-host");
    assert_eq!(inside(&["cat", "/proc/sys/kernel/shm_rmid_forced"]), "1");
    assert_eq!(inside(&["cat", "/proc/sys/net/ipv4/ip_unprivileged_port_start"]), "0");
    assert!(process::status(pid, "Uid").is_some_and(|ids| ids.starts_with("65535")));
}

#[test]
fn a_pod_has_the_seccomp_profile_that_it_names() {
    needs!(OurShim, Sandboxes);
    let node = Node::shared();
    let scratch = Scratch::new("profile");
    let profile = r#"{"defaultAction": "SCMP_ACT_ALLOW",
        "syscalls": [{"names": ["swapon"], "action": "SCMP_ACT_ERRNO"}]}"#;
    std::fs::write(scratch.join("profile.json"), profile).expect("write a profile");
    // The number of filters: the process always has its own, and may have that of the profile.
    for (path, more) in [(None, 1), (Some(scratch.text("profile.json")), 2)] {
        let seccomp = path.map(|path| SecurityProfile { profile_type: LOCALHOST, localhost_ref: path });
        let security_context = Some(LinuxSandboxSecurityContext { seccomp, ..Default::default() });
        let options =
            pod(|pod| pod.linux = Some(LinuxPodSandboxConfig { security_context, ..Default::default() }));
        let sandbox = Sandbox::create_with(&node, "seccomp", options, None).expect("create a pod");
        let pid = sandbox.start();
        wait::until_true("it has its filters", || filters(pid) == filters(1) + more);
        assert_eq!(process::status(pid, "Seccomp").as_deref(), Some("2"));
    }
    std::fs::write(scratch.join("profile.json"), "{").expect("write no profile");
    let seccomp =
        Some(SecurityProfile { profile_type: LOCALHOST, localhost_ref: scratch.text("profile.json") });
    let security_context = Some(LinuxSandboxSecurityContext { seccomp, ..Default::default() });
    let options =
        pod(|pod| pod.linux = Some(LinuxPodSandboxConfig { security_context, ..Default::default() }));
    let refused = Sandbox::create_with(&node, "seccomp", options, None).err().expect("a refusal");
    assert!(refused.message().contains("profile.json"), "{refused:?}");
}

#[test]
fn a_pod_in_host_namespaces_has_the_namespaces_of_the_node() {
    needs!(OurShim, Sandboxes);
    let node = Node::shared();
    let options = pod(|pod| {
        pod.hostname = "ignored".to_string();
        let namespaces =
            NamespaceOption { network: OF_NODE, pid: OF_NODE, ipc: OF_NODE, ..Default::default() };
        pod.linux = Some(LinuxPodSandboxConfig {
            security_context: Some(LinuxSandboxSecurityContext {
                namespace_options: Some(namespaces),
                ..Default::default()
            }),
            ..Default::default()
        });
    });
    let sandbox = Sandbox::create_with(&node, "of-node", options, None).expect("create a pod");
    let pid = sandbox.start();
    for kind in ["net", "pid", "ipc", "uts"] {
        assert_eq!(process::namespace(pid, kind), process::namespace(1, kind), "{kind}");
    }
    let waiter = sandbox.wait();
    sandbox.stop();
    assert_eq!(sandbox.waited(waiter), 0);
}

#[test]
fn a_pod_is_in_the_slice_that_its_client_names() {
    needs!(OurShim, Sandboxes);
    let node = Node::shared();
    let slice = format!("{}.slice", unique("pods").replace('-', "_"));
    let options = pod(|pod| {
        pod.linux = Some(LinuxPodSandboxConfig { cgroup_parent: format!("/{slice}"), ..Default::default() });
    });
    let sandbox = Sandbox::create_with(&node, "parent", options, None).expect("create a pod");
    let pid = sandbox.start();
    assert_eq!(systemd::property(&sandbox.unit(), "Slice"), slice);
    let cgroup = std::fs::read_to_string(format!("/proc/{pid}/cgroup")).expect("read its cgroup");
    assert!(cgroup.trim().ends_with(&format!("cri-containerd-{}.scope", sandbox.id)), "{cgroup}");
}

#[test]
fn the_sum_of_the_resources_of_a_pods_containers_is_no_limit() {
    needs!(OurShim, Sandboxes);
    let node = Node::shared();
    let slice = format!("{}.slice", unique("sums").replace('-', "_"));
    let resources = LinuxContainerResources {
        cpu_period: 100_000,
        cpu_quota: 50_000,
        cpu_shares: 2,
        memory_limit_in_bytes: 8 << 20,
        ..Default::default()
    };
    let linux = LinuxPodSandboxConfig {
        cgroup_parent: format!("/{slice}"),
        resources: Some(resources),
        ..Default::default()
    };
    let sandbox =
        Sandbox::create_with(&node, "sums", pod(|pod| pod.linux = Some(linux)), None).expect("create a pod");
    sandbox.start();
    for unit in [&slice, &sandbox.unit()] {
        assert_eq!(systemd::property(unit, "MemoryMax"), "infinity", "{unit}");
        assert_eq!(systemd::property(unit, "CPUQuotaPerSecUSec"), "infinity", "{unit}");
    }
    let spec =
        process::succeed("find", &["/run/containerd", "-path", &format!("*/{}/config.json", sandbox.id)]);
    let spec = std::fs::read_to_string(spec.trim()).expect("read the spec");
    assert!(spec.contains(r#""io.kubernetes.cri.sandbox-memory":"8388608""#), "{spec}");
}
