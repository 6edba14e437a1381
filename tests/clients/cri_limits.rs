//! Limits of containers and of pods over CRI, statistics, and the end by the OOM killer.

use std::fs;

use crate::common::node::unique;
use crate::common::{process, systemd, wait};
use crate::cri::{Container, Cri, Pod, unit_of};
use crate::cri_messages::*;

const MEBIBYTE: i64 = 1 << 20;

fn limited(
    cri: &Cri,
    pod: &Pod,
    name: &str,
    command: &[&str],
    resources: LinuxContainerResources,
) -> Container {
    let container = cri.create(pod, name, command, |config| {
        config.linux.as_mut().expect("a Linux container").resources = Some(resources);
    });
    cri.start(&container);
    container
}

/// A file of the cgroup that the container's processes are in.
fn cgroup_file(cri: &Cri, container: &Container, name: &str) -> String {
    let line =
        fs::read_to_string(format!("/proc/{}/cgroup", cri.pid(container))).expect("the cgroup of a process");
    let path = line.trim().strip_prefix("0::").unwrap_or_else(|| panic!("not cgroup v2: {line}")).to_string();
    let path = format!("/sys/fs/cgroup{path}/{name}");
    fs::read_to_string(&path).unwrap_or_else(|error| panic!("{path}: {error}")).trim().to_string()
}

#[test]
fn containers_have_limits_in_a_pod_with_limits() {
    needs!(Controllers);
    let cri = Cri::new();
    let slice = format!("kubepods-pod{}.slice", unique("limits").replace('-', "_"));
    // A kubelet makes the slice of a pod and sets the pod's limits there.
    process::succeed("systemctl", &["set-property", "--runtime", &slice, "MemoryMax=128M", "TasksMax=200"]);
    process::succeed("systemctl", &["start", &slice]);
    let pod = cri.pod_with("limits", |config| {
        config.linux.as_mut().expect("a Linux pod").cgroup_parent = format!("/kubepods.slice/{slice}");
    });
    let resources = LinuxContainerResources {
        memory_limit_in_bytes: 64 * MEBIBYTE,
        cpu_period: 100_000,
        cpu_quota: 50_000,
        cpu_shares: 512,
        ..Default::default()
    };
    let container = limited(&cri, &pod, "limits", &["sleep", "100000"], resources.clone());
    let now = |name| cgroup_file(&cri, &container, name);
    assert_eq!(["memory.max", "cpu.max"].map(now), ["67108864", "50000 100000"]);
    if cri.is_ours() {
        for unit in [container.unit(), unit_of(&pod.id)] {
            assert_eq!(systemd::property(&unit, "Slice"), slice);
        }
        let of = |name| systemd::property(&container.unit(), name);
        assert_eq!(["MemoryMax", "CPUQuotaPerSecUSec"].map(of), ["67108864", "500ms"]);
    }
    let pod_cgroup = systemd::cgroup(&slice).expect("a pod's slice has a cgroup");
    let processes = systemd::processes_below(&pod_cgroup);
    for pid in [cri.pid(&container), cri.pause_pid(&pod)] {
        assert!(processes.contains(&pid), "{pid} is not in {processes:?}");
    }
    // The kubelet resizes containers in place.
    let more =
        LinuxContainerResources { memory_limit_in_bytes: 96 * MEBIBYTE, cpu_quota: 25_000, ..resources };
    cri.call(UpdateContainerResourcesRequest { container_id: container.id.clone(), linux: Some(more) });
    assert_eq!(["memory.max", "cpu.max"].map(now), ["100663296", "25000 100000"]);
    cri.remove(&pod);
    process::succeed("systemctl", &["stop", &slice]);
    process::succeed("systemctl", &["revert", &slice]);
}

#[test]
fn stats_are_there_from_the_start_to_the_end() {
    needs!(Controllers);
    let cri = Cri::new();
    let pod = cri.pod("stats");
    let container = cri.run(&pod, "stats", &["sh", "-c", "while :; do :; done"]);
    let stats = || {
        let request = ContainerStatsRequest { container_id: container.id.clone() };
        let stats = cri.call(request).stats.expect("statistics");
        let cpu = stats.cpu.and_then(|cpu| cpu.usage_core_nano_seconds).map_or(0, |value| value.value);
        let memory = stats.memory.and_then(|memory| memory.working_set_bytes).map_or(0, |value| value.value);
        (cpu, memory)
    };
    let (cpu, memory) =
        wait::until("there are statistics", || Some(stats()).filter(|(cpu, memory)| *cpu > 0 && *memory > 0));
    assert!(memory < 64 << 20, "{memory}");
    wait::until_true("the processor time grows", || stats().0 > cpu);
}

#[test]
fn a_container_that_the_oom_killer_ended_is_reported_as_such() {
    needs!(Controllers);
    let cri = Cri::new();
    let pod = cri.pod("oom");
    let resources = LinuxContainerResources { memory_limit_in_bytes: 16 * MEBIBYTE, ..Default::default() };
    let command = ["sh", "-c", "exec dd if=/dev/zero of=/dev/null bs=64M count=2"];
    let greedy = limited(&cri, &pod, "greedy", &command, resources);
    let ended = cri.ended(&greedy);
    assert_eq!((ended.exit_code, ended.reason.as_str()), (137, "OOMKilled"), "{ended:?}");
}
