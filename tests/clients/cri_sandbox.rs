//! Pods whose sandbox is the shim's (`sandboxer = "shim"` of containerd 2): no image, the files that containers share, and
//! the pod as one object of systemd.

use crate::common::{process, systemd, wait};
use crate::cri::{Cri, RUNNING, has_shim_sandboxes, unit_of};
use crate::cri_messages::*;

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
fn the_first_process_reaps_what_containers_leave_to_it() {
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
        let is_over = !process::exists(pause);
        assert!(!is_over || !process::exists(init), "the sandbox has ended before the container");
        is_over
    });
    assert_eq!(cri.ended(&container).exit_code, 21);
    wait::until_true("the pod is not ready", || !cri.is_ready(&pod));
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
