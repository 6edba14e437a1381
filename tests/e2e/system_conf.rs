//! The administrator's defaults for all units (`system.conf`, systemd-system.conf(5)): they are made for services, and a
//! container gets what its spec says, as under containerd-shim-runc-v2.

use std::fs;

use crate::attributes::{differences, inherited};
use crate::common::node::{Node, STOCK_RUNTIME, runtime_under_test};
use crate::common::process;
use crate::common::shim::{socket, stop_daemon};
use crate::common::spec::Spec;
use crate::common::systemd;
use crate::common::task::Io;

/// Settings of systemd's manager, removed on drop.
struct Defaults;

impl Defaults {
    const DIRECTORY: &str = "/run/systemd/system.conf.d";

    fn set(text: &str) -> Defaults {
        fs::create_dir_all(Self::DIRECTORY).expect("make the directory of systemd's settings");
        fs::write(format!("{}/e2e.conf", Self::DIRECTORY), format!("[Manager]\n{text}"))
            .expect("write settings of systemd");
        // In a VM, this test runs in a unit, which gets the new limit of tasks at once.
        if let Some(unit) = own_unit() {
            process::succeed("systemctl", &["set-property", "--runtime", &unit, "TasksMax=infinity"]);
        }
        process::succeed("systemctl", &["daemon-reload"]);
        // The next daemon starts with the defaults, too.
        stop_daemon();
        Defaults
    }
}

impl Drop for Defaults {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(Self::DIRECTORY);
        let _ = process::run("systemctl", &["daemon-reload"]);
        let _ = process::run("systemctl", &["restart", "containerd-shim-systemd-v1.service"]);
    }
}

/// The unit in which this process runs. In nspawn, a process that enters the guest runs in none.
fn own_unit() -> Option<String> {
    let cgroup = fs::read_to_string("/proc/self/cgroup").expect("own cgroup");
    let unit = cgroup.trim().rsplit('/').next().unwrap_or_default();
    (unit.ends_with(".service") || unit.ends_with(".scope")).then(|| unit.to_owned())
}

/// Limits for all services, with which no container could run.
const LIMITS: &str = "DefaultLimitNOFILE=64\nDefaultLimitNPROC=3\nDefaultLimitAS=100M\nDefaultLimitDATA=50M\n\
    DefaultLimitSTACK=1M\nDefaultLimitFSIZE=64K\nDefaultLimitCORE=0\nDefaultLimitCPU=60\nDefaultLimitMEMLOCK=4K\n\
    DefaultLimitSIGPENDING=20\nDefaultLimitMSGQUEUE=4096\n";

/// Other defaults, each smaller than any container or the daemon could use.
const DEFAULTS: &str = "DefaultTasksMax=6\nDefaultOOMScoreAdjust=500\nDefaultOOMPolicy=kill\nDefaultTimeoutStartSec=1s\n\
    DefaultTimeoutStopSec=1s\nDefaultTimeoutAbortSec=1s\nDefaultRestartSec=1h\nDefaultStartLimitIntervalSec=1h\n\
    DefaultStartLimitBurst=1\nDefaultCPUAccounting=no\nDefaultMemoryAccounting=no\nDefaultTasksAccounting=no\n\
    DefaultIOAccounting=no\nDefaultEnvironment=E2E_DEFAULT=yes PATH=/no/such\nTimerSlackNSec=1s\n\
    DefaultTimerAccuracySec=1h\nDefaultStandardOutput=null\nDefaultStandardError=null\nDefaultMemoryPressureWatch=off\n";

/// True if this process may raise limits. In nspawn it may not, and neither may a unit's process: `launch` can't give a container
/// the limits of containerd there.
fn may_raise_limits() -> bool {
    const CAP_SYS_RESOURCE: u32 = 24;
    let own = process::status(std::process::id(), "CapEff").expect("own capabilities");
    u64::from_str_radix(&own, 16).expect("a set of capabilities") >> CAP_SYS_RESOURCE & 1 == 1
}

#[test]
fn defaults_for_all_units_change_no_container() {
    needs!(OurShim);
    let node = Node::exclusive();
    let limits = if may_raise_limits() { LIMITS } else { "" };
    let _defaults = Defaults::set(&format!("{DEFAULTS}{limits}"));
    let ours = inherited(&node, &runtime_under_test(), false);
    let stock = inherited(&node, STOCK_RUNTIME, false);
    for (kind, ours, stock) in [("init", &ours[0], &stock[0]), ("exec", &ours[1], &stock[1])] {
        assert!(ours.len() > 40, "{kind}: only {} fields", ours.len());
        assert_eq!(ours.get("oom_score_adj ").map(String::as_str), Some("0"), "{kind}");
        let found = differences(ours, stock);
        assert!(found.is_empty(), "{kind}:\n{}", found.join("\n"));
    }
    let container = node.container("defaults", Spec::sleeping()).started(&Io::default());
    let unit = systemd::unit_of(&container);
    for (name, value) in [("TasksMax", "infinity"), ("OOMPolicy", "continue"), ("CPUAccounting", "yes")] {
        assert_eq!(systemd::property(&unit, name), value, "{name}");
    }
    // Many processes, and for longer than a start may take.
    let exec = container.exec_sh("for i in 1 2 3 4 5 6 7 8 9; do sleep 1.2 & done; wait; exit 7");
    assert_eq!(exec.exit_status(), 7);
    // Each daemon starts as often as it has to.
    (0..3).for_each(|_| crate::common::daemon::killed());
    container.kill(9).expect("kill");
    assert_eq!(container.exit_status(), 137);
    container.delete().expect("delete");
}

/// systemd's own limit is five starts of a unit within ten seconds.
#[test]
fn the_daemon_can_be_stopped_and_started_more_often_than_other_units() {
    needs!(OurShim);
    let node = Node::exclusive();
    let often = || {
        for _ in 0..8 {
            stop_daemon();
            socket();
        }
    };
    often();
    let _defaults = Defaults::set("DefaultStartLimitIntervalSec=1h\nDefaultStartLimitBurst=1\n");
    often();
    node.container("often", Spec::sleeping()).started(&Io::default()).end();
}
