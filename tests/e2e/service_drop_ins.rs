//! Drop-ins for all services of the machine (`service.d`), which are not made for containers.

use std::fs;
use std::path::Path;

use crate::common::node::{Node, unique};
use crate::common::process;
use crate::common::shim::stop_daemon;
use crate::common::spec::Spec;
use crate::common::stdio::Scratch;
use crate::common::systemd::{self, Cursor, DropIn};
use crate::common::task::Io;

/// A drop-in for every service of the machine.
struct ForAllServices;

impl ForAllServices {
    const DIRECTORY: &str = "/run/systemd/system/service.d";

    fn new(text: &str) -> ForAllServices {
        fs::create_dir_all(Self::DIRECTORY).expect("make the directory of drop-ins");
        fs::write(Path::new(Self::DIRECTORY).join("e2e.conf"), text).expect("write a drop-in");
        process::succeed("systemctl", &["daemon-reload"]);
        ForAllServices
    }
}

impl Drop for ForAllServices {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(Self::DIRECTORY);
        let _ = process::run("systemctl", &["daemon-reload"]);
        let _ = process::run("systemctl", &["restart", "containerd-shim-systemd-v1.service"]);
    }
}

#[test]
fn a_drop_in_that_restarts_all_services_restarts_no_container() {
    let node = Node::exclusive();
    // systemd accepts no other value for services of Type=oneshot, which execs are.
    let _drop_in = ForAllServices::new("[Service]\nRestart=on-failure\nRestartSec=10ms\n");
    let since = Cursor::now();
    let runs = Scratch::new("runs");
    let spec = |end: &str| {
        Spec::sh(&format!("echo run >>/runs/{end}; exit {end}")).bind(runs.as_str(), "/runs", &["rw"])
    };
    let failing = node.container("failing", spec("3")).started(&Io::default());
    assert_eq!(failing.exit_status(), 3);
    let clean = node.container("clean", spec("0")).started(&Io::default());
    assert_eq!(clean.exit_status(), 0);
    let killed = node.container("killed", Spec::sleeping()).started(&Io::default());
    let exec = killed.exec_sh("exit 5");
    assert_eq!(exec.exit_status(), 5);
    killed.kill(9).expect("kill");
    assert_eq!(killed.exit_status(), 137);
    for container in [&failing, &clean, &killed] {
        let unit = systemd::unit_of(container);
        let entries = since.entries_since(&[&format!("UNIT={unit}")]);
        let restarts =
            entries.iter().filter(|entry| entry["MESSAGE"].to_string().contains("Scheduled restart"));
        assert_eq!(restarts.count(), 0, "{unit}");
        container.delete().expect("delete");
    }
    assert_eq!((runs.read("3").as_str(), runs.read("0").as_str()), ("run\n", "run\n"));
}

#[test]
fn a_drop_in_that_protects_the_system_from_all_services_breaks_nothing() {
    needs!(OurShim);
    let node = Node::exclusive();
    let text =
        "[Service]\nProtectSystem=strict\nProtectHome=yes\nPrivateTmp=yes\nProtectKernelTunables=yes\n";
    let _drop_in = ForAllServices::new(text);
    process::succeed("systemctl", &["restart", "containerd-shim-systemd-v1.service"]);
    let shared = Scratch::new("shared");
    let spec = Spec::sh("echo here >/shared/file; sleep 100000").bind(shared.as_str(), "/shared", &["rw"]);
    let container = node.container("protected", spec).started(&Io::default());
    let exec = container.exec_sh("cat /shared/file; exit 4");
    assert_eq!(exec.exit_status(), 4);
    assert_eq!(shared.read("file"), "here\n");
    container.kill(9).expect("kill");
    assert_eq!(container.exit_status(), 137);
    container.delete().expect("delete");
}

#[test]
fn drop_ins_that_restrict_all_services_bind_neither_the_daemon_nor_containers() {
    needs!(OurShim);
    let node = Node::exclusive();
    let text = "[Service]\nUser=nobody\nNoNewPrivileges=yes\nPrivateDevices=yes\nPrivateUsers=yes\n\
        RestrictNamespaces=yes\nRestrictSUIDSGID=yes\nProtectSystem=full\nCapabilityBoundingSet=CAP_NET_ADMIN\n\
        SystemCallFilter=@system-service\nLimitNOFILE=100\nNotifyAccess=none\n";
    let _drop_in = ForAllServices::new(text);
    process::succeed("systemctl", &["restart", "containerd-shim-systemd-v1.service"]);
    let spec = Spec::sleeping().with_new_privileges();
    let container = node.container("restricted", spec).started(&Io::default());
    assert_eq!(no_new_privileges(container.pid()), "0");
    assert_eq!(container.exec_sh("exit 7").exit_status(), 7);
    // systemd reads the unit again.
    process::succeed("systemctl", &["daemon-reload"]);
    assert_eq!(systemd::property(&systemd::unit_of(&container), "LoadState"), "loaded");
    container.end();
}

/// Settings that make sense for some service, but with which no container could run.
const HARMFUL: [&str; 12] = [
    "[Service]\nPrivatePIDs=yes\n",
    "[Service]\nExitType=cgroup\n",
    "[Service]\nType=simple\n",
    "[Service]\nPAMName=login\n",
    "[Service]\nUnsetEnvironment=NOTIFY_SOCKET\n",
    "[Service]\nCollectMode=inactive-or-failed\nExecStartPre=false\nExecCondition=false\n",
    "[Unit]\nConditionPathExists=/no/such/file\n",
    "[Unit]\nJobRunningTimeoutSec=1\n",
    "[Unit]\nRefuseManualStart=yes\n",
    "[Unit]\nRefuseManualStop=yes\n",
    "[Unit]\nStopWhenUnneeded=yes\n",
    "[Unit]\nRequires=no-such.service\nRequisite=no-such.service\nConflicts=no-such.service\n\
        [Service]\nNUMAPolicy=bind\nNUMAMask=0-1023\nDynamicUser=yes\nTemporaryFileSystem=/run\nLimitAS=1M\n",
];

#[test]
fn drop_ins_with_which_no_container_could_run_break_nothing() {
    needs!(OurShim);
    let node = Node::exclusive();
    for text in HARMFUL {
        let drop_in = ForAllServices::new(text);
        stop_daemon();
        let container = node.container("harmed", Spec::sleeping()).started(&Io::default());
        // Only a limit on the time of a start needs an exec that takes longer.
        let script = if text.contains("TimeoutSec=1") { "sleep 1.5; exit 5" } else { "exit 5" };
        assert_eq!(container.exec_sh(script).exit_status(), 5, "{text}");
        container.kill(9).unwrap_or_else(|error| panic!("{text}: kill: {error}"));
        assert_eq!(container.exit_status(), 137, "{text}");
        container.delete().unwrap_or_else(|error| panic!("{text}: delete: {error}"));
        drop(drop_in);
    }
}

#[test]
fn a_drop_in_with_a_time_limit_for_all_services_ends_no_container() {
    needs!(OurShim);
    let node = Node::exclusive();
    let before = node.container("before", Spec::sleeping()).started(&Io::default());
    let drop_in = ForAllServices::new("[Service]\nRuntimeMaxSec=3333\nTimeoutStopSec=77\n");
    let after = node.container("after", Spec::sleeping()).started(&Io::default());
    // systemd has read the drop-in for both containers.
    process::succeed("systemctl", &["daemon-reload"]);
    for container in [&before, &after] {
        let unit = systemd::unit_of(container);
        assert_eq!(systemd::property(&unit, "RuntimeMaxUSec"), "infinity");
        assert_eq!(systemd::property(&unit, "TimeoutStopUSec"), "1min 17s");
    }
    drop(drop_in);
    assert_eq!(systemd::property(&systemd::unit_of(&before), "TimeoutStopUSec"), "10s");
    before.end();
    after.end();
}

#[test]
fn a_drop_in_with_a_time_limit_for_starts_ends_no_exec() {
    needs!(OurShim);
    let node = Node::exclusive();
    let _drop_in = ForAllServices::new("[Service]\nTimeoutStartSec=2\n");
    let container = node.container("patient", Spec::sleeping()).started(&Io::default());
    let exec = container.exec_sh("sleep 4; exit 7");
    assert_eq!(exec.exit_status(), 7);
    container.end();
}

#[test]
fn a_drop_in_for_a_namespace_overrides_a_drop_in_for_all_services() {
    needs!(OurShim);
    let node = Node::exclusive();
    let namespace = unique("policy");
    let _all = ForAllServices::new("[Service]\nRestart=on-failure\nUser=nobody\nTimeoutStopSec=77\n");
    let text = "[Service]\nNoNewPrivileges=yes\n";
    let _policy = DropIn::for_namespace(&namespace, text);
    let spec = Spec::sleeping().with_new_privileges();
    let container = node.container("policy", spec).namespace(&namespace).started(&Io::default());
    assert_eq!(no_new_privileges(container.pid()), "1");
    assert_eq!(systemd::property(&systemd::unit_of(&container), "TimeoutStopUSec"), "1min 17s");
    container.end();
}

/// The flag of a process that no program may give it more privileges.
fn no_new_privileges(pid: u32) -> String {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).expect("read the status of a process");
    let flag = status.lines().find_map(|line| line.strip_prefix("NoNewPrivs:"));
    flag.expect("a line with the flag").trim().to_string()
}

/// In nspawn, where root has no CAP_SYS_RESOURCE, the limits of containerd can't be applied.
#[test]
fn a_drop_in_with_limits_for_all_services_refuses_no_container() {
    let node = Node::exclusive();
    let _drop_in = ForAllServices::new("[Service]\nLimitNOFILE=1024:2048\nLimitNPROC=500:600\nLimitCORE=0\n");
    let container = node.container("limited", Spec::sleeping()).started(&Io::default());
    assert_eq!(container.exec_sh("exit 7").exit_status(), 7);
    container.end();
}

/// The directory that an administrator would try first for all containers.
#[test]
fn a_drop_in_for_all_units_whose_names_begin_with_containerd_does_not_break_the_daemon() {
    needs!(OurShim);
    let node = Node::exclusive();
    let text = "[Service]\nNoNewPrivileges=yes\nProtectSystem=strict\nPrivateTmp=yes\nTasksMax=500\nLimitNOFILE=512\n\
        TimeoutStopSec=20\nOOMPolicy=continue\nNice=5\n";
    let policy = DropIn::for_all(text);
    let restart = || {
        process::succeed("systemctl", &["daemon-reload"]);
        process::succeed("systemctl", &["restart", "containerd-shim-systemd-v1.service"]);
    };
    restart();
    let container = node.container("policy", Spec::sleeping()).started(&Io::default());
    assert_eq!(systemd::property(&systemd::unit_of(&container), "TimeoutStopUSec"), "20s");
    assert_eq!(container.exec_sh("exit 7").exit_status(), 7);
    container.end();
    drop(policy);
    restart();
}
