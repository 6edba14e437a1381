//! The daemon, or a service that it needs, ends and starts again: tasks are unchanged, and calls are answered.

use containerd_client::types::v1::Status;

use crate::common::disturb::{self, Disturbance};
use crate::common::leaks::{self, Traces};
use crate::common::node::Node;
use crate::common::process;
use crate::common::spec::Spec;
use crate::common::task::{Io, SIGKILL, SIGTERM, Waiting};
use crate::common::{daemon, systemd};

/// How often each disturbance happens to the same tasks.
const TIMES: usize = 3;

#[test]
fn tasks_survive_a_kill_of_the_daemon() {
    needs!(OurShim);
    check(|node| Disturbance::Kill.pass(node), true);
}

#[test]
fn tasks_survive_a_kill_of_the_daemons_whole_cgroup() {
    needs!(OurShim);
    check(|node| Disturbance::WholeCgroup.pass(node), true);
}

#[test]
fn tasks_survive_a_restart_of_the_daemon() {
    needs!(OurShim);
    check(|node| Disturbance::Restart.pass(node), true);
}

#[test]
fn tasks_survive_a_reexecution_of_systemd() {
    needs!(OurShim);
    check(|node| Disturbance::Reexec.pass(node), true);
}

#[test]
fn tasks_survive_a_reload_of_systemd() {
    needs!(OurShim);
    check(|node| Disturbance::Reload.pass(node), true);
}

#[test]
fn tasks_survive_a_restart_of_the_bus() {
    needs!(OurShim);
    check(|node| Disturbance::Bus.pass(node), true);
}

#[test]
fn tasks_survive_a_kill_of_the_daemon_and_of_containerd_at_once() {
    needs!(OurShim);
    check(
        |node| {
            let daemon = daemon::kill_now();
            disturb::kill_containerd();
            disturb::start_containerd();
            node.wait_for_containerd();
            daemon::wait_for_another(daemon);
        },
        false,
    );
}

#[test]
fn tasks_survive_a_kill_of_the_daemon_while_containerd_is_down() {
    needs!(OurShim);
    check(
        |node| {
            process::succeed("systemctl", &["stop", "containerd.service"]);
            daemon::killed();
            disturb::start_containerd();
            node.wait_for_containerd();
        },
        false,
    );
}

#[test]
fn tasks_survive_a_kill_of_the_daemon_while_the_bus_is_down() {
    needs!(OurShim);
    check(
        |_| {
            disturb::stop_bus();
            let daemon = daemon::kill_now();
            disturb::start_bus();
            daemon::wait_for_another(daemon);
        },
        true,
    );
}

/// Asserts that tasks and execs in each phase survive a disturbance, with calls under way. `waits_go_on` is false if
/// containerd, through which the client calls, ends too.
fn check(happen: impl Fn(&Node), waits_go_on: bool) {
    let node = Node::exclusive();
    run_one(&node);
    let before = Traces::take();
    {
        let running = node.container("running", Spec::sleeping()).started(&Io::default());
        let exec = running.exec(Spec::sleeping()).started(&Io::default());
        let added = running.exec(Spec::sh("exit 24")).added(&Io::default());
        let ended = running.exec_sh("exit 25");
        let created = node.container("created", Spec::sh("exit 17")).created(&Io::default());
        let stopped = node.container("stopped", Spec::sh("exit 23")).started(&Io::default());
        let exits = (stopped.wait().expect("wait"), ended.wait().expect("wait for an exec"));
        let waits = [running.waiting(), exec.waiting(), created.waiting()];
        let pids = (running.pid(), exec.pid(), created.pid());

        for _ in 0..TIMES {
            happen(&node);
            assert_eq!((running.pid(), exec.pid(), created.pid()), pids);
            let phases = [running.phase(), exec.phase(), created.phase(), stopped.phase(), ended.phase()];
            let expected =
                [Status::Running, Status::Running, Status::Created, Status::Stopped, Status::Stopped];
            assert_eq!(phases, expected);
            assert_eq!(added.phase(), Status::Created);
            assert!(systemd::is_active(&systemd::unit_of(&running)));
            assert_eq!(running.exec_sh("exit 9").exit_status(), 9, "a new exec");
            assert_eq!((stopped.wait().expect("wait"), ended.wait().expect("wait")), exits);
        }

        added.start().expect("start an exec that was added before");
        assert_eq!(added.exit_status(), 24);
        exec.kill(SIGTERM).expect("kill an exec that ran before");
        assert_eq!(exec.exit_status(), 143);
        created.start().expect("start what was created before");
        assert_eq!(created.exit_status(), 17);
        running.kill(SIGKILL).expect("kill what ran before");
        assert_eq!(running.exit_status(), 137);
        if waits_go_on {
            let told = waits.map(|waiting: Waiting| waiting.exit().expect("a Wait from before").status);
            assert_eq!(told, [137, 143, 17]);
        }
        assert_eq!(exec.delete().expect("delete an exec").exit_status, 143);
        for (container, status) in [(&running, 137), (&created, 17), (&stopped, 23)] {
            assert_eq!(container.delete().expect("delete").exit_status, status);
        }
        run_one(&node);
    }
    leaks::assert_none("tasks that have lived through it", &before);
}

fn run_one(node: &Node) {
    let container = node.container("one", Spec::sh("exit 5")).started(&Io::default());
    assert_eq!(container.exit_status(), 5);
    assert_eq!(container.delete().expect("delete").exit_status, 5);
}

#[test]
fn calls_are_answered_while_the_daemon_is_killed_again_and_again() {
    needs!(OurShim);
    let node = Node::exclusive();
    run_one(&node);
    let before = Traces::take();
    daemon::killed_during(|kills| {
        for turn in kills.turns(20, 20) {
            let status = turn % 200;
            let container =
                node.container("amid", Spec::sh(&format!("exit {status}"))).started(&Io::default());
            assert_eq!(container.exit_status(), status);
            assert_eq!(container.delete().expect("delete").exit_status, status);
        }
    });
    leaks::assert_none("containers and many daemons", &before);
}
