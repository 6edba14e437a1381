//! `docker run --memory …`, `docker update`, `docker stats`, and the end by the OOM killer.

use std::fs;

use serde_json::Value;

use crate::common::{process, systemd};
use crate::docker::Docker;

/// A file of the cgroup that the container's processes are in.
fn cgroup_file(docker: &Docker, container: &str, name: &str) -> String {
    let line = fs::read_to_string(format!("/proc/{}/cgroup", docker.pid(container)))
        .expect("the cgroup of a process");
    let path = line.trim().strip_prefix("0::").unwrap_or_else(|| panic!("not cgroup v2: {line}")).to_string();
    let path = format!("/sys/fs/cgroup{path}/{name}");
    fs::read_to_string(&path).unwrap_or_else(|error| panic!("{path}: {error}")).trim().to_string()
}

#[test]
fn limits_are_set_and_updated() {
    needs!(Controllers);
    let docker = Docker::new();
    let options = ["--memory", "64m", "--memory-swap", "64m", "--cpus", "0.5", "--pids-limit", "100"];
    let container = docker.sleeping(&options);
    let now = |name| cgroup_file(&docker, &container, name);
    assert_eq!(["memory.max", "pids.max", "cpu.max"].map(now), ["67108864", "100", "50000 100000"]);
    docker.ok(&[
        "update",
        "--memory",
        "96m",
        "--memory-swap",
        "96m",
        "--cpus",
        "0.25",
        "--pids-limit",
        "50",
        "--cpu-shares",
        "512",
        &container,
    ]);
    assert_eq!(["memory.max", "pids.max", "cpu.max"].map(now), ["100663296", "50", "25000 100000"]);
    assert_eq!(
        docker.inspect(&container, "{{.HostConfig.Memory}} {{.HostConfig.CpuShares}}"),
        "100663296 512"
    );
    if docker.is_ours() {
        let unit = docker.unit(&container);
        let of = |name| systemd::property(&unit, name);
        assert_eq!(["MemoryMax", "TasksMax", "CPUQuotaPerSecUSec"].map(of), ["100663296", "50", "250ms"]);
        process::succeed("systemctl", &["daemon-reload"]);
    }
    assert_eq!(["memory.max", "pids.max", "cpu.max"].map(now), ["100663296", "50", "25000 100000"]);
    docker.ok(&["update", "--pids-limit", "-1", &container]);
    assert_eq!(now("pids.max"), "max");
    let without = docker.sleeping(&[]);
    assert_eq!(["memory.max", "pids.max"].map(|name| cgroup_file(&docker, &without, name)), ["max", "max"]);
}

#[test]
fn stats_show_what_a_container_uses() {
    needs!(Controllers);
    let docker = Docker::new();
    let container = docker.background(&["--init", "--memory", "64m"], &["sh", "-c", "while :; do :; done"]);
    let stats = docker.api("GET", &format!("/containers/{container}/stats?stream=0"), None).json();
    let number =
        |path: &str| stats.pointer(path).and_then(Value::as_u64).unwrap_or_else(|| panic!("{path}: {stats}"));
    assert_eq!(number("/memory_stats/limit"), 64 << 20);
    assert!((1..64 << 20).contains(&number("/memory_stats/usage")), "{stats}");
    assert!(
        number("/cpu_stats/cpu_usage/total_usage") > number("/precpu_stats/cpu_usage/total_usage"),
        "{stats}"
    );
    assert_eq!(number("/pids_stats/current"), 2);
    let line = docker.ok(&["stats", "--no-stream", "--format", "{{.PIDs}} {{.MemUsage}}", &container]);
    assert!(line.starts_with("2 ") && line.ends_with("/ 64MiB"), "{line}");
    docker.ok(&["pause", &container]);
    let paused = docker.api("GET", &format!("/containers/{container}/stats?stream=0"), None).json();
    assert_eq!(paused["pids_stats"]["current"], 2, "{paused}");
    docker.ok(&["unpause", &container]);
}

#[test]
fn a_container_that_the_oom_killer_ended_is_reported_as_such() {
    needs!(Controllers);
    let docker = Docker::new();
    let options = ["--memory", "16m", "--memory-swap", "16m"];
    let greedy =
        docker.background(&options, &["sh", "-c", "exec dd if=/dev/zero of=/dev/null bs=64M count=2"]);
    assert_eq!(docker.ok(&["wait", &greedy]), "137");
    docker.until(&greedy, "{{.State.OOMKilled}} {{.State.ExitCode}}", "true 137");
    let innocent = docker.background(&options, &["sh", "-c", "kill -KILL $$; exit 3"]);
    docker.ok(&["wait", &innocent]);
    assert_eq!(docker.inspect(&innocent, "{{.State.OOMKilled}}"), "false");
}
