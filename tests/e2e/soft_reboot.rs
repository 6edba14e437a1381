//! Containers during and after `systemctl soft-reboot`, which ends all processes and keeps the kernel and `/run`: the
//! daemon's records outlive the units. Each test has two halves, between which `tests/testbed/run-e2e` ends all
//! processes of the guest. It does so once with transient units of the daemon, and once with installed units.

use std::fs;

use containerd_client::types::v1::Status;

use crate::common::node::Node;
use crate::common::spec::Spec;
use crate::common::systemd::{self, DAEMON_SERVICE, DAEMON_SOCKET};
use crate::common::task::{Io, Process};
use crate::common::{leaks, process, shim, wait};

/// A container that handles SIGTERM, one that has ended before, and one that was never started.
const IDS: [&str; 3] = ["soft-reboot-runs", "soft-reboot-ended", "soft-reboot-created"];
/// How the first two ended. The OCI runtime decides how a process that it has not started yet ends on SIGTERM.
const EXIT_STATUSES: [Option<u32>; 3] = [Some(7), Some(3), None];

const UNITS: [(&str, &str); 2] = [
    (DAEMON_SOCKET, include_str!("../../units/containerd-shim-systemd-v1.socket")),
    (DAEMON_SERVICE, include_str!("../../units/containerd-shim-systemd-v1.service")),
];

/// The file of an installed unit.
fn installed(unit: &str) -> String {
    format!("/etc/systemd/system/{unit}")
}

fn units_are_installed() -> bool {
    std::env::var("E2E_SOFT_REBOOT").is_ok_and(|units| units == "installed")
}

#[test]
fn before_the_soft_reboot_containers_are_left() {
    needs!(OurShim, SoftReboot);
    let node = Node::exclusive();
    if units_are_installed() {
        shim::stop_daemon();
        for (unit, text) in UNITS {
            fs::write(installed(unit), text.replace("@BINDIR@", "/usr/local/bin")).expect("write the unit");
        }
        process::succeed("systemctl", &["daemon-reload"]);
        process::succeed("systemctl", &["enable", "--now", DAEMON_SOCKET]);
    }
    let [runs, ended, created] = IDS;
    let runs = node
        .container("soft-reboot", Spec::sh("trap 'exit 7' TERM; echo up; while :; do usleep 10000; done"))
        .id(runs)
        .started(&Io::default());
    wait::until_true("the container handles SIGTERM", || {
        systemd::messages(&[&format!("CONTAINER_ID={}", runs.id)]).contains(&"up".to_string())
    });
    let exec = runs.exec(Spec::sleeping()).started(&Io::default());
    let ended = node.container("soft-reboot", Spec::sh("exit 3")).id(ended).started(&Io::default());
    assert_eq!(ended.exit_status(), 3);
    let created = node.container("soft-reboot", Spec::sleeping()).id(created).created(&Io::default());
    // This test must not end the containers.
    std::mem::forget((runs, exec, ended, created));
}

/// With installed units, containerd finds its tasks again, with their exit codes. After a soft reboot, systemd has no transient
/// units, so containerd reaches no shim when it starts, and gives up its tasks. Every other shim has ended as well.
#[test]
fn after_the_soft_reboot_exits_are_known_or_nothing_is_left() {
    needs!(OurShim, SoftReboot);
    let node = Node::exclusive();
    let tasks = process::succeed("ctr", &["tasks", "ls"]);
    for (id, exit_status) in IDS.into_iter().zip(EXIT_STATUSES) {
        let task = Process::init(&node, id);
        if units_are_installed() {
            assert_eq!(task.phase(), Status::Stopped, "{id}");
            let known = task.delete().expect("delete").exit_status;
            assert_eq!(known, exit_status.unwrap_or(known), "{id}");
            assert_ne!(known, 0, "{id}");
        } else {
            assert!(!tasks.contains(id), "{tasks}");
        }
        process::succeed("ctr", &["containers", "rm", id]);
    }
    leaks::assert_none_named("soft-reboot");
    for id in IDS {
        let container = node.container("soft-reboot", Spec::sh("exit 6")).id(id).started(&Io::default());
        assert_eq!(container.exit_status(), 6, "{id} is free for a new task");
    }
    leaks::assert_none_named("soft-reboot");
    if units_are_installed() {
        process::succeed("systemctl", &["disable", "--now", DAEMON_SOCKET]);
        shim::stop_daemon();
        UNITS.iter().for_each(|(unit, _)| fs::remove_file(installed(unit)).expect("remove the unit"));
        process::succeed("systemctl", &["daemon-reload"]);
    }
}
