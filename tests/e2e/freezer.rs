//! Pause and Resume by clients and by administrators: each sees what the other did.

use std::time::Duration;

use containerd_client::types::v1::Status;

use crate::common::container::Container;
use crate::common::daemon::{self, Down};
use crate::common::node::Node;
use crate::common::spec::Spec;
use crate::common::task::{Io, SIGKILL, SIGTERM, assert_refused};
use crate::common::{cgroup, process, systemd, wait};

fn phase_becomes(container: &Container, phase: Status) {
    wait::until_true(&format!("{phase:?}"), || container.phase() == phase);
}

#[test]
fn a_paused_task_does_nothing_until_it_is_resumed() {
    let node = Node::shared();
    let events = node.subscribe();
    let container = node.container("pause", Spec::sh("while :; do :; done")).started(&Io::default());
    let cgroup = cgroup::of(container.pid());
    container.pause().expect("pause");
    assert_eq!(container.phase(), Status::Paused);
    assert!(cgroup::is_frozen(&cgroup));
    let used = || std::fs::read_to_string(cgroup.join("cpu.stat")).expect("cpu.stat");
    let before = used();
    wait::elapse(Duration::from_millis(300));
    assert_eq!(used(), before, "it uses no CPU");
    container.resume().expect("resume");
    assert_eq!(container.phase(), Status::Running);
    assert!(!cgroup::is_frozen(&cgroup));
    container.kill(SIGKILL).expect("kill");
    assert_eq!(events.names_up_to(&container, "exit"), ["create", "start", "paused", "resumed", "exit"]);
}

#[test]
fn systemd_shows_a_paused_task_as_frozen() {
    needs!(OurShim);
    let node = Node::shared();
    let container = node.container("frozen", Spec::sleeping()).started(&Io::default());
    let unit = systemd::unit_of(&container);
    container.pause().expect("pause");
    assert_eq!(systemd::property(&unit, "FreezerState"), "frozen");
    container.resume().expect("resume");
    assert_eq!(systemd::property(&unit, "FreezerState"), "running");
}

#[test]
fn a_unit_that_an_administrator_freezes_is_a_paused_task() {
    needs!(OurShim);
    let node = Node::shared();
    let events = node.subscribe();
    let container = node.container("admin", Spec::sleeping()).started(&Io::default());
    let unit = systemd::unit_of(&container);
    process::succeed("systemctl", &["freeze", &unit]);
    assert_eq!(events.names_up_to(&container, "paused"), ["create", "start", "paused"]);
    assert_eq!(container.phase(), Status::Paused);
    process::succeed("systemctl", &["thaw", &unit]);
    assert_eq!(events.names_up_to(&container, "resumed"), ["resumed"]);
    assert_eq!(container.phase(), Status::Running);
    // Resume of what an administrator has frozen works as well.
    process::succeed("systemctl", &["freeze", &unit]);
    phase_becomes(&container, Status::Paused);
    container.resume().expect("resume");
    assert_eq!(systemd::property(&unit, "FreezerState"), "running");
}

#[test]
fn a_paused_task_refuses_start_exec_and_delete() {
    let node = Node::shared();
    let container = node.container("refuse", Spec::sleeping()).created(&Io::default());
    assert_refused(container.pause());
    assert_refused(container.resume());
    container.start().expect("start");
    assert_refused(container.resume());
    let added = container.exec(Spec::sh("exit 3")).added(&Io::default());
    container.pause().expect("pause");
    assert_refused(container.pause());
    assert_refused(container.start());
    assert_refused(container.exec(Spec::sh("exit 3")).add(&Io::default()).map(drop));
    assert_refused(added.start());
    assert_refused(container.delete());
    container.resume().expect("resume");
    added.start().expect("an exec that was refused starts afterwards");
    assert_eq!(added.exit_status(), 3);
    container.kill(SIGKILL).expect("kill");
    assert_eq!(container.exit_status(), 137);
    assert_refused(container.pause());
    assert_refused(container.resume());
}

#[test]
fn an_exec_is_paused_with_its_task() {
    let node = Node::shared();
    let container = node.container("exec", Spec::sleeping()).started(&Io::default());
    let exec = container.exec(Spec::sleeping()).started(&Io::default());
    container.pause().expect("pause");
    assert_eq!(exec.phase(), Status::Paused);
    container.resume().expect("resume");
    assert_eq!(exec.phase(), Status::Running);
}

#[test]
fn sigkill_ends_a_paused_task_and_it_can_be_deleted() {
    let node = Node::shared();
    let events = node.subscribe();
    let container = node.container("kill", Spec::sleeping()).started(&Io::default());
    container.pause().expect("pause");
    container.kill(SIGKILL).expect("kill");
    assert_eq!(container.exit_status(), 137);
    assert_eq!(events.names_up_to(&container, "exit"), ["create", "start", "paused", "exit"]);
    assert_eq!(container.phase(), Status::Stopped);
    assert_eq!(container.delete().expect("delete").exit_status, 137);
    if node.runtime == crate::common::node::OUR_RUNTIME {
        let unit = systemd::unit_of(&container);
        assert!(systemd::list_units(&unit).is_empty(), "its unit is gone");
    }
}

#[test]
fn another_signal_waits_for_the_resume() {
    let node = Node::shared();
    let script = "trap 'exit 5' TERM; sleep 100000 & wait";
    let container = node.container("term", Spec::sh(script)).started(&Io::default());
    // The script has set its trap when its child exists.
    wait::until_true("a child", || container.pids().is_ok_and(|pids| pids.len() == 2));
    container.pause().expect("pause");
    container.kill(SIGTERM).expect("kill");
    assert_eq!(container.phase(), Status::Paused);
    container.resume().expect("resume");
    assert_eq!(container.exit_status(), 5);
}

#[test]
fn systemctl_stop_of_a_frozen_unit_does_what_systemd_does_for_any_unit() {
    needs!(OurShim);
    let node = Node::shared();
    let container = node.container("stop", Spec::sleeping()).started(&Io::default());
    let unit = systemd::unit_of(&container);
    process::succeed("systemctl", &["freeze", &unit]);
    phase_becomes(&container, Status::Paused);
    let stop = process::run("timeout", &["20", "systemctl", "stop", &unit]);
    if daemon::systemd_version() < 256 {
        assert!(stop.code == Some(0), "{stop:?}");
    } else {
        // systemd leaves a frozen unit as it is.
        assert_eq!(container.phase(), Status::Paused);
        process::succeed("systemctl", &["thaw", &unit]);
        phase_becomes(&container, Status::Running);
        process::succeed("systemctl", &["stop", &unit]);
    }
    assert_eq!(container.exit_status(), 137, "sleep is PID 1 of its namespace and ignores SIGTERM");
    container.delete().expect("delete");
}

#[test]
fn a_task_that_is_frozen_before_it_starts_is_started_when_it_is_thawed() {
    needs!(OurShim);
    let node = Node::shared();
    let container = node.container("early", Spec::sleeping()).created(&Io::default());
    let unit = systemd::unit_of(&container);
    process::succeed("systemctl", &["freeze", &unit]);
    assert_eq!(container.phase(), Status::Created);
    assert_refused(container.start());
    process::succeed("systemctl", &["thaw", &unit]);
    container.start().expect("start");
    assert_eq!(container.phase(), Status::Running);
}

#[test]
fn a_container_in_a_foreign_cgroup_is_paused_too() {
    needs!(OurShim);
    let node = Node::shared();
    let spec = Spec::sleeping().cgroups_path("/e2e-foreign/freezer");
    let container = node.container("foreign", spec).started(&Io::default());
    let cgroup = cgroup::of(container.pid());
    assert!(cgroup.ends_with("e2e-foreign/freezer"), "{}", cgroup.display());
    container.pause().expect("pause");
    assert!(cgroup::is_frozen(&cgroup));
    assert_eq!(container.phase(), Status::Paused);
    container.resume().expect("resume");
    assert!(!cgroup::is_frozen(&cgroup));
    container.pause().expect("pause");
    container.kill(SIGKILL).expect("kill");
    assert_eq!(container.exit_status(), 137);
    container.delete().expect("delete");
    // The client has to remove the parent.
    let _ = std::fs::remove_dir("/sys/fs/cgroup/e2e-foreign");
}

#[test]
fn a_freeze_while_the_daemon_is_down_is_published_after_its_restart() {
    needs!(OurShim);
    let node = Node::exclusive();
    let events = node.subscribe();
    let container = node.container("down", Spec::sleeping()).started(&Io::default());
    let unit = systemd::unit_of(&container);
    container.pause().expect("pause");
    daemon::killed();
    assert_eq!(container.phase(), Status::Paused);
    let down = Down::begin();
    process::succeed("systemctl", &["thaw", &unit]);
    down.end();
    phase_becomes(&container, Status::Running);
    let down = Down::begin();
    process::succeed("systemctl", &["freeze", &unit]);
    down.end();
    phase_becomes(&container, Status::Paused);
    container.resume().expect("resume");
    container.kill(SIGKILL).expect("kill");
    let seen = events.names_up_to(&container, "exit");
    assert_eq!(seen, ["create", "start", "paused", "resumed", "paused", "resumed", "exit"]);
}
