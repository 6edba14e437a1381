//! Limits: those of the client are in the container's cgroup, as under containerd-shim-runc-v2, and on the unit.
//! Those that an administrator sets on the unit are also in the container's cgroup.

use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use crate::common::container::Container;
use crate::common::daemon::Down;
use crate::common::node::{Node, STOCK_RUNTIME, number, unique};
use crate::common::spec::Spec;
use crate::common::stdio::Fifos;
use crate::common::systemd::{self, DropIn};
use crate::common::task::{Io, SIGKILL};
use crate::common::{cgroup, process};

const MIB: u64 = 1 << 20;

/// The resources of one container, of every kind that all test machines have.
fn resources() -> Value {
    json!({
        "memory": {"limit": 64 * MIB, "reservation": 32 * MIB, "swap": 96 * MIB},
        "cpu": {"shares": 512, "quota": 33_333, "period": 100_000, "cpus": "0", "mems": "0"},
        "pids": {"limit": 77},
        "unified": {"memory.high": (48 * MIB).to_string()},
    })
}

fn container_cgroup(container: &Container) -> PathBuf {
    cgroup::of(container.pid())
}

/// The properties of the unit that have been set, as `systemctl show` prints them.
fn shown(container: &Container, names: &[&str]) -> Vec<String> {
    let unit = systemd::unit_of(container);
    names.iter().map(|name| systemd::property(&unit, name)).collect()
}

fn set_property(container: &Container, assignment: &str) {
    process::succeed("systemctl", &["set-property", "--runtime", &systemd::unit_of(container), assignment]);
}

/// The unit's cgroup.
fn outer(cgroup: &Path) -> PathBuf {
    cgroup.parent().expect("below its unit").to_owned()
}

#[test]
fn status_shows_memory_and_tasks() {
    needs!(OurShim, Controllers);
    let node = Node::shared();
    let container = node.container("usage", Spec::sleeping()).started(&Io::default());
    let unit = systemd::unit_of(&container);
    let status = process::succeed("systemctl", &["status", "--full", "--no-pager", "--lines=0", &unit]);
    assert!(status.contains("Memory:") && status.contains("Tasks: 1"), "{status}");
}

#[test]
fn every_file_of_the_cgroup_is_as_under_the_stock_shim() {
    needs!(OurShim, Controllers);
    let node = Node::shared();
    for resources in [json!({}), json!({"cpu": {"shares": 1024}}), resources(), json!({"cpu": {"idle": 1}})] {
        let spec = Spec::sleeping().resources(resources.clone());
        let ours = node.container("ours", spec.clone()).started(&Io::default());
        let stock = node.container("stock", spec).runtime(STOCK_RUNTIME).started(&Io::default());
        let (ours, stock) = (container_cgroup(&ours), container_cgroup(&stock));
        assert_eq!(cgroup::settings(&ours), cgroup::settings(&stock), "{resources}");
    }
}

#[test]
fn an_update_does_what_it_does_under_the_stock_shim() {
    needs!(OurShim, Controllers);
    let node = Node::shared();
    let spec = Spec::sleeping().resources(resources());
    let ours = node.container("ours", spec.clone()).created(&Io::default());
    let stock = node.container("stock", spec).runtime(STOCK_RUNTIME).created(&Io::default());
    let same = |resources: Value| {
        ours.update(&resources).expect("update ours");
        stock.update(&resources).expect("update the stock shim's");
        let (ours, stock) = (container_cgroup(&ours), container_cgroup(&stock));
        assert_eq!(cgroup::settings(&ours), cgroup::settings(&stock), "{resources}");
    };
    same(json!({"memory": {"limit": 128 * MIB, "swap": 128 * MIB}}));
    for container in [&ours, &stock] {
        container.start().expect("start");
    }
    same(json!({"cpu": {"shares": 2048, "quota": -1}, "pids": {"limit": -1}}));
    same(json!({"cpu": {"cpus": "0-1"}}));
    for container in [&ours, &stock] {
        container.pause().expect("pause");
    }
    same(json!({"memory": {"limit": 48 * MIB, "swap": -1}}));
    for container in [&ours, &stock] {
        container.resume().expect("resume");
    }
    let ours = container_cgroup(&ours);
    assert_eq!(
        cgroup::read(&outer(&ours), "memory.max"),
        (48 * MIB).to_string(),
        "also the unit, after a pause"
    );
}

#[test]
fn limits_are_shown_as_properties_of_the_unit() {
    needs!(OurShim, Controllers);
    let node = Node::shared();
    let container = node.container("shown", Spec::sleeping().resources(resources())).created(&Io::default());
    let cgroup = container_cgroup(&container);
    let names = [
        "MemoryMax",
        "MemoryLow",
        "MemorySwapMax",
        "MemoryHigh",
        "TasksMax",
        "CPUQuotaPerSecUSec",
        "AllowedCPUs",
    ];
    let wanted = [64 * MIB, 32 * MIB, 32 * MIB, 48 * MIB, 77].map(|number| number.to_string());
    let shown = shown(&container, &names);
    assert_eq!(shown[..5], wanted);
    // Whole percents: systemd keeps no others over a reload.
    assert_eq!(shown[5..], ["340ms", "0"]);
    assert_eq!(
        (cgroup::read(&cgroup, "cpu.max"), cgroup::read(&outer(&cgroup), "cpu.max")),
        ("33333 100000".to_owned(), "34000 100000".to_owned())
    );
    assert_eq!(
        systemd::property(&systemd::unit_of(&container), "CPUWeight"),
        cgroup::read(&cgroup, "cpu.weight"),
        "as the OCI runtime has computed it"
    );
    for file in ["memory.max", "memory.high", "memory.low", "memory.swap.max", "cpu.weight", "pids.max"] {
        assert_eq!(cgroup::read(&outer(&cgroup), file), cgroup::read(&cgroup, file), "{file}");
    }
    container.update(&json!({"memory": {"limit": 80 * MIB}, "pids": {"limit": 5}})).expect("update");
    assert_eq!(cgroup::read(&cgroup, "memory.max"), (80 * MIB).to_string());
    let unit = systemd::unit_of(&container);
    assert_eq!(systemd::property(&unit, "MemoryMax"), (80 * MIB).to_string());
    assert_eq!(systemd::property(&unit, "TasksMax"), "5");
    assert_eq!(systemd::property(&unit, "MemoryHigh"), (48 * MIB).to_string(), "what was not named stays");
}

#[test]
fn a_reload_of_systemd_changes_no_limit() {
    needs!(OurShim, Controllers);
    let node = Node::exclusive();
    let quota = |quota: u64, period: u64| json!({"cpu": {"quota": quota, "period": period}});
    for limits in [resources(), quota(1500, 100_000), quota(12_500, 100_000), quota(5000, 1_000_000)] {
        let container = node.container("reload", Spec::sleeping().resources(limits)).started(&Io::default());
        let cgroup = container_cgroup(&container);
        let settings = || [&cgroup, &outer(&cgroup)].map(|cgroup| cgroup::settings(cgroup));
        let before = settings();
        process::succeed("systemctl", &["daemon-reload"]);
        // The daemon handles changes of limits in their order.
        set_property(&container, "MemoryMax=77M");
        cgroup::wait_for(&cgroup, "memory.max", &(77 * MIB).to_string());
        let memory = &before[0]["memory.max"];
        set_property(&container, &format!("MemoryMax={}", memory.replace("max", "infinity")));
        cgroup::wait_for(&cgroup, "memory.max", memory);
        assert_eq!(settings(), before);
    }
}

/// A quota of the unit would stop the burst: each cgroup saves up time of its own.
#[test]
fn the_unit_of_a_container_that_may_use_cpu_time_in_a_burst_has_no_quota() {
    needs!(OurShim, Controllers);
    let node = Node::shared();
    let burst = |burst: &str| json!({"unified": {"cpu.max": "20000 100000", "cpu.max.burst": burst}});
    let container =
        node.container("burst", Spec::sleeping().resources(burst("10000"))).created(&Io::default());
    let cgroup = container_cgroup(&container);
    let quotas = || (cgroup::read(&cgroup, "cpu.max"), cgroup::read(&outer(&cgroup), "cpu.max"));
    let (limited, unlimited) = ("20000 100000".to_string(), "max 100000".to_string());
    assert_eq!(quotas(), (limited.clone(), unlimited.clone()));
    assert_eq!(cgroup::read(&cgroup, "cpu.max.burst"), "10000");
    container.update(&burst("0")).expect("update");
    assert_eq!(quotas(), (limited.clone(), limited.clone()));
    container.update(&burst("5000")).expect("update");
    assert_eq!(quotas(), (limited, unlimited));
}

#[test]
fn set_property_reaches_the_container_up_and_down() {
    needs!(OurShim, Controllers);
    let node = Node::shared();
    let container =
        node.container("property", Spec::sleeping().resources(resources())).started(&Io::default());
    let cgroup = container_cgroup(&container);
    for (assignment, file, text) in [
        ("MemoryMax=200M", "memory.max", (200 * MIB).to_string()),
        ("MemoryMax=40M", "memory.max", (40 * MIB).to_string()),
        ("MemoryMax=infinity", "memory.max", "max".to_string()),
        ("MemoryHigh=30M", "memory.high", (30 * MIB).to_string()),
        ("MemorySwapMax=0", "memory.swap.max", "0".to_string()),
        ("CPUQuota=150%", "cpu.max", "150000 100000".to_string()),
        ("CPUQuota=", "cpu.max", "max 100000".to_string()),
        ("CPUWeight=300", "cpu.weight", "300".to_string()),
        ("TasksMax=12", "pids.max", "12".to_string()),
        ("TasksMax=infinity", "pids.max", "max".to_string()),
        ("AllowedCPUs=1", "cpuset.cpus", "1".to_string()),
        ("AllowedCPUs=0-1", "cpuset.cpus", "0-1".to_string()),
    ] {
        set_property(&container, assignment);
        cgroup::wait_for(&cgroup, file, &text);
    }
}

#[test]
fn a_property_is_visible_inside_the_container() {
    needs!(OurShim, Controllers);
    let node = Node::shared();
    let container = node.container("inside", Spec::sleeping().resources(resources())).started(&Io::default());
    let cgroup = container_cgroup(&container);
    set_property(&container, "MemoryMax=72M");
    cgroup::wait_for(&cgroup, "memory.max", &(72 * MIB).to_string());
    let fifos = Fifos::new("inside");
    let (mut stdout, _stderr) = (fifos.stdout(), fifos.stderr());
    // Without a cgroup namespace of its own the container sees the whole tree.
    let path = cgroup.strip_prefix("/sys/fs/cgroup").expect("in the tree").display().to_string();
    let script = format!("cat '/sys/fs/cgroup/{path}/memory.max'");
    let exec = container.exec(Spec::sh(&script)).started(&fifos.output());
    assert_eq!(exec.exit_status(), 0);
    assert_eq!(stdout.text().trim(), (72 * MIB).to_string());
}

#[test]
fn an_update_leaves_other_limits_that_an_administrator_has_set() {
    needs!(OurShim, Controllers);
    let node = Node::shared();
    let container = node.container("beside", Spec::sleeping().resources(resources())).started(&Io::default());
    let cgroup = container_cgroup(&container);
    set_property(&container, "MemoryMax=200M");
    set_property(&container, "TasksMax=99");
    cgroup::wait_for(&cgroup, "memory.max", &(200 * MIB).to_string());
    cgroup::wait_for(&cgroup, "pids.max", "99");
    container.update(&json!({"cpu": {"shares": 4096}})).expect("update");
    assert_eq!(cgroup::read(&cgroup, "memory.max"), (200 * MIB).to_string());
    assert_eq!(cgroup::read(&cgroup, "pids.max"), "99");
    assert_eq!(shown(&container, &["MemoryMax", "TasksMax"]), [(200 * MIB).to_string(), "99".to_string()]);
    assert_eq!(
        systemd::property(&systemd::unit_of(&container), "CPUWeight"),
        cgroup::read(&cgroup, "cpu.weight")
    );
}

#[test]
fn a_failed_update_changes_nothing() {
    needs!(OurShim, Controllers);
    let node = Node::shared();
    let container = node.container("failed", Spec::sleeping().resources(resources())).started(&Io::default());
    let cgroup = container_cgroup(&container);
    let before = cgroup::settings(&cgroup);
    for wrong in [
        json!({"pids": {"limit": 9}, "cpu": {"cpus": "4096"}}),
        json!({"memory": {"limit": 128 * MIB}, "cpu": {"shares": 100, "cpus": "no"}}),
        json!([1]),
        json!({"memory": {"limit": "much"}}),
    ] {
        container.update(&wrong).expect_err("a wrong update");
        assert_eq!(cgroup::settings(&cgroup), before, "{wrong}");
    }
    assert_eq!(shown(&container, &["TasksMax", "MemoryMax"]), ["77".to_string(), (64 * MIB).to_string()]);
    container.kill(SIGKILL).expect("kill");
    assert_eq!(container.exit_status(), 137);
    container.update(&json!({"pids": {"limit": 9}})).expect_err("an update of one that has ended");
}

#[test]
fn a_property_set_while_the_daemon_is_down_reaches_the_container() {
    needs!(OurShim, Controllers);
    let node = Node::exclusive();
    let container = node.container("down", Spec::sleeping().resources(resources())).started(&Io::default());
    let cgroup = container_cgroup(&container);
    let down = Down::begin();
    set_property(&container, "MemoryMax=200M");
    down.end();
    cgroup::wait_for(&cgroup, "memory.max", &(200 * MIB).to_string());
    assert_eq!(cgroup::read(&cgroup, "pids.max"), "77");
}

#[test]
fn a_drop_in_limits_what_the_client_does_not() {
    needs!(OurShim, Controllers);
    let node = Node::exclusive();
    let namespace = unique("drop-in");
    let _drop_in = DropIn::for_namespace(&namespace, "[Service]\nMemoryMax=90M\nTasksMax=55\n");
    let spec = Spec::sleeping().resources(json!({"pids": {"limit": 44}}));
    let container = node.container("policy", spec).namespace(&namespace).started(&Io::default());
    let cgroup = container_cgroup(&container);
    assert_eq!(cgroup::read(&cgroup, "memory.max"), (90 * MIB).to_string());
    assert_eq!(cgroup::read(&cgroup, "pids.max"), "44");
    assert_eq!(
        cgroup::read(&outer(&cgroup), "pids.max"),
        "55",
        "the limit of the drop-in also holds for processes beside the container"
    );
}

#[test]
fn an_update_does_not_change_what_a_drop_in_has_set() {
    needs!(OurShim, Controllers);
    let node = Node::exclusive();
    let namespace = unique("drop-in");
    // systemd reads its own file with the limits of an Update, 50-…, before this drop-in.
    let _drop_in = DropIn::for_namespace(&namespace, "[Service]\nMemoryMax=90M\nTasksMax=55\n");
    let spec = Spec::sleeping().resources(json!({"pids": {"limit": 44}, "memory": {"limit": 20 * MIB}}));
    let container = node.container("policy", spec).namespace(&namespace).started(&Io::default());
    let cgroup = container_cgroup(&container);
    let limits = |file: &str| [&cgroup, &outer(&cgroup)].map(|cgroup| cgroup::read(cgroup, file));
    for (memory, pids) in [(200, 60), (30, 40)] {
        container
            .update(&json!({"memory": {"limit": memory * MIB}, "pids": {"limit": pids}}))
            .expect("update");
        let wanted = || {
            assert_eq!(limits("memory.max"), [(memory * MIB).to_string(), (90 * MIB).to_string()]);
            assert_eq!(limits("pids.max"), [pids.to_string(), "55".to_owned()]);
        };
        wanted();
        process::succeed("systemctl", &["daemon-reload"]);
        set_property(&container, &format!("CPUWeight={}", memory + pids));
        cgroup::wait_for(&cgroup, "cpu.weight", &(memory + pids).to_string());
        wanted();
    }
}

/// Create, start, exec and delete work as under the stock shim: the resources that the OCI runtime itself uses are
/// charged neither to the container nor to its pod.
#[test]
fn limits_too_small_for_launch_apply_to_the_container_alone() {
    needs!(OurShim, Controllers);
    let node = Node::shared();
    let live = |runtime: &str, spec: &Spec| -> Result<(u32, u32), String> {
        let container = node.container("tiny", spec.clone()).runtime(runtime).make();
        container.create(&Io::default()).map_err(|error| format!("create: {error}"))?;
        container.start().map_err(|error| format!("start: {error}"))?;
        let exec = container.exec(Spec::sh("exit 7")).added(&Io::default());
        let status = exec.start().map(|_| exec.exit_status()).map_err(|error| format!("exec: {error}"))?;
        container.kill(SIGKILL).map_err(|error| format!("kill: {error}"))?;
        let end = container.exit_status();
        container.delete().map_err(|error| format!("delete: {error}"))?;
        Ok((status, end))
    };
    // A quarter of an emulated guest is about a hundredth of the machine. With less, containerd gives up before `runc
    // exec` has ended, under the stock shim too.
    let quota = number("E2E_CPU_QUOTA", 5000, 25_000);
    for resources in [
        json!({"memory": {"limit": 6 * MIB, "swap": 6 * MIB}}),
        json!({"cpu": {"quota": quota, "period": 100_000}}),
    ] {
        let spec = Spec::sleeping().resources(resources.clone());
        let stock = live(STOCK_RUNTIME, &spec);
        // The stock shim's runc copies itself into the container's memory, and may be killed for it.
        let ours = live(&node.runtime, &spec);
        assert_eq!(ours, Ok((7, 137)), "{resources}, under the stock shim {stock:?}");
    }
    // An exec would be one process more than the container may have.
    let one = Spec::sleeping().resources(json!({"pids": {"limit": 1}}));
    let container = node.container("one", one).created(&Io::default());
    container.start().expect("start");
    assert_eq!(container.pids().expect("pids").len(), 1);
}

#[test]
fn a_tiny_pod_has_room_for_its_containers() {
    needs!(OurShim, Controllers);
    let node = Node::shared();
    let slice = format!("{}.slice", unique("tinypod").replace('-', "_"));
    let in_slice = format!("--slice={slice}");
    process::succeed("systemd-run", &["--unit=e2e-tinypod", "--collect", &in_slice, "sleep", "100000"]);
    process::succeed("systemctl", &["set-property", "--runtime", &slice, "MemoryMax=16M", "TasksMax=40"]);
    let path = |name: &str| format!("{slice}:cri-containerd:{name}");
    for round in 0..3 {
        let name = unique("tiny");
        let container =
            node.container(&name, Spec::sleeping().cgroups_path(&path(&name))).started(&Io::default());
        let exec = container.exec(Spec::sh("exit 7")).started(&Io::default());
        assert_eq!(exec.exit_status(), 7, "{round}");
    }
    let killed = cgroup::number(&Path::new("/sys/fs/cgroup").join(&slice), "memory.events", "oom_kill");
    process::run("systemctl", &["stop", "e2e-tinypod.service"]);
    assert_eq!(killed, Some(0), "nothing of it was killed");
}
