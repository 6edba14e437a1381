//! Pods whose sandbox is the shim's (`sandboxer = "shim"` of containerd 2): no image, the files that containers share, and
//! the pod as one object of systemd.

use prost::Message;

use crate::common::events::Events;
use crate::common::{daemon, process, sandbox, systemd, wait};
use crate::cri::{Cri, RUNNING, has_shim_sandboxes, unit_of};
use crate::cri_messages::*;

/// The processor time in a cgroup's metrics.
#[derive(Clone, PartialEq, Message)]
struct Metrics {
    #[prost(message, optional, tag = "2")]
    cpu: Option<CpuStat>,
}

#[derive(Clone, PartialEq, Message)]
struct CpuStat {
    #[prost(uint64, tag = "1")]
    usage_usec: u64,
}

#[test]
fn a_pod_needs_no_pause_image() {
    if !has_shim_sandboxes() {
        return;
    }
    let cri = Cri::new();
    let pod = cri.pod("bare");
    let pause = cri.pause_pid(&pod);
    assert_eq!(process::status(pause, "Name").as_deref(), Some("sandbox"));
    let resident = process::status(pause, "VmRSS").expect("a resident size");
    let kib: u64 = resident.trim_end_matches(" kB").parse().expect("a number");
    assert!(kib <= 300, "{resident}");
    let images = process::succeed("ctr", &["--namespace", "k8s.io", "image", "list", "--quiet"]);
    assert!(!images.contains("pause"), "{images}");
}

#[test]
fn containers_share_the_files_of_their_pod() {
    if !has_shim_sandboxes() {
        return;
    }
    let cri = Cri::new();
    let pod = cri.pod_with("files", |config| {
        config.hostname = "pod-host".to_string();
        config.dns_config = Some(DnsConfig {
            servers: vec!["192.0.2.1".to_string()],
            searches: vec!["pod.test".to_string()],
            options: vec!["ndots:3".to_string()],
        });
    });
    let (one, other) = (cri.sleeping(&pod, "one"), cri.sleeping(&pod, "other"));
    assert_eq!(cri.ask(&one, &["hostname"]), "pod-host");
    assert_eq!(cri.ask(&one, &["cat", "/etc/hostname"]), "pod-host");
    assert_eq!(
        cri.ask(&one, &["cat", "/etc/resolv.conf"]),
        "search pod.test\nnameserver 192.0.2.1\noptions ndots:3"
    );
    assert_eq!(
        cri.ask(&other, &["cat", "/etc/hosts"]),
        std::fs::read_to_string("/etc/hosts").unwrap_or_default().trim_end()
    );
    cri.ask(&one, &["sh", "-c", "echo shared >/dev/shm/file"]);
    assert_eq!(cri.ask(&other, &["cat", "/dev/shm/file"]), "shared");
    assert_eq!(cri.ask(&one, &["cat", "/proc/sys/net/ipv4/ip_unprivileged_port_start"]), "0");
}

#[test]
fn the_first_process_reaps_orphans_of_the_containers() {
    if !has_shim_sandboxes() {
        return;
    }
    let cri = Cri::new();
    let pod = cri.pod_with("reaped", |config| {
        let context = config.linux.as_mut().and_then(|linux| linux.security_context.as_mut());
        context.expect("a security context").namespace_options = Some(NamespaceOption::default());
    });
    let container = cri.sleeping(&pod, "reaped");
    // A shell that ends before its child leaves the child to the first process of the pid namespace.
    let orphan = "sleep 0.2 & echo $!";
    let pids: Vec<String> = (0..5).map(|_| cri.ask(&container, &["sh", "-c", orphan])).collect();
    wait::until_true("the orphans are reaped", || {
        let left = cri.ask(&container, &["ls", "/proc"]);
        !left.lines().any(|entry| pids.iter().any(|pid| pid == entry))
    });
    assert_eq!(cri.status(&container).state, RUNNING);
}

#[test]
fn a_stop_of_the_pods_slice_ends_its_containers_before_its_sandbox() {
    if !has_shim_sandboxes() {
        return;
    }
    let cri = Cri::new();
    let pod = cri.pod("sliced");
    let slow = "trap 'usleep 1500000; exit 21' TERM; echo ready; while :; do usleep 20000; done";
    let container = cri.run(&pod, "sliced", &["sh", "-c", slow]);
    container.until_logged("ready");
    let (unit, sandbox) = (container.unit(), unit_of(&pod.id));
    let slice = systemd::property(&unit, "Slice");
    assert_eq!(slice, systemd::property(&sandbox, "Slice"));
    let description = systemd::property(&slice, "Description");
    assert!(description.starts_with("Pod tests/sliced"), "{description}");
    let description = systemd::property(&sandbox, "Description");
    assert!(description.starts_with("tests/sliced") && description.contains("(sandbox)"), "{description}");
    let (pause, init) = (cri.pause_pid(&pod), cri.pid(&container));
    process::succeed("systemctl", &["stop", "--no-block", &slice]);
    wait::until_true("the sandbox has ended", || {
        let is_over = !process::runs(pause);
        assert!(!is_over || !process::runs(init), "the sandbox has ended before the container");
        is_over
    });
    assert_eq!(cri.ended(&container).exit_code, 21);
    wait::until_true("the pod is not ready", || !cri.is_ready(&pod));
}

/// Waits until an event of this name has arrived for each of these tasks of the namespace.
fn await_events(events: &Events, name: &str, tasks: &[&str]) {
    let mut missing = tasks.to_vec();
    while !missing.is_empty() {
        let event = events.next("k8s.io", wait::LIMIT).expect("containerd is up");
        let event = event.unwrap_or_else(|| panic!("no {name} event of {missing:?}"));
        if event.name() == name {
            missing.retain(|task| event.container() != Some(*task));
        }
    }
}

#[test]
fn a_freeze_of_the_pods_slice_pauses_the_whole_pod() {
    if !has_shim_sandboxes() {
        return;
    }
    let cri = Cri::new();
    let pod = cri.pod("frozen");
    let (one, other) = (cri.sleeping(&pod, "one"), cri.sleeping(&pod, "other"));
    let slice = systemd::property(&one.unit(), "Slice");
    let tasks = [pod.id.as_str(), one.id.as_str(), other.id.as_str()];
    let events = cri.node.subscribe();
    process::succeed("systemctl", &["freeze", &slice]);
    await_events(&events, "paused", &tasks);
    // Frozen processes have not ended.
    assert!(cri.is_ready(&pod));
    assert_eq!(cri.status(&one).state, RUNNING);
    daemon::killed();
    process::succeed("systemctl", &["thaw", &slice]);
    await_events(&events, "resumed", &tasks);
    assert_eq!(cri.ask(&one, &["echo", "thawed"]), "thawed");
}

#[test]
fn a_limit_on_the_pods_slice_holds_for_the_whole_pod() {
    if !has_shim_sandboxes() {
        return;
    }
    needs!(Controllers);
    let cri = Cri::new();
    let pod = cri.pod("limited");
    let other = cri.sleeping(&pod, "other");
    let slice = systemd::property(&other.unit(), "Slice");
    process::succeed("systemctl", &["set-property", "--runtime", &slice, "MemoryMax=32M"]);
    let greedy = cri.run(&pod, "greedy", &["sh", "-c", "exec dd if=/dev/zero of=/dev/null bs=64M count=2"]);
    let ended = cri.ended(&greedy);
    assert_eq!((ended.exit_code, ended.reason.as_str()), (137, "OOMKilled"), "{ended:?}");
    assert_eq!(cri.status(&other).state, RUNNING);
    process::succeed("systemctl", &["revert", &slice]);
}

#[test]
fn the_metrics_of_a_pod_count_its_containers() {
    if !has_shim_sandboxes() {
        return;
    }
    let cri = Cri::new();
    let pod = cri.pod("measured");
    let container = cri.sleeping(&pod, "busy");
    let used = || {
        let metrics = sandbox::metrics_of(&cri.node, "k8s.io", &pod.id);
        let data = metrics.data.expect("data");
        Metrics::decode(data.value.as_slice()).expect("metrics").cpu.map_or(0, |cpu| cpu.usage_usec)
    };
    let before = used();
    // A second of processor time, however busy the machine is: the limit ends the shell.
    let count = "ulimit -t 1; while :; do :; done";
    let ran = cri.exec_sync(&container, &["sh", "-c", count]);
    assert_ne!(ran.exit_code, 0);
    wait::until_true("the pod has used what its container has used", || used() >= before + 500_000);
}

#[test]
fn a_pod_ends_with_its_sandbox() {
    if !has_shim_sandboxes() {
        return;
    }
    let cri = Cri::new();
    let pod = cri.pod("ended");
    assert!(cri.is_ready(&pod));
    process::succeed("systemctl", &["stop", &unit_of(&pod.id)]);
    wait::until_true("the pod is not ready", || !cri.is_ready(&pod));
}
