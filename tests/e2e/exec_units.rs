//! Each exec has a unit: tests of what systemd shows of the unit, and of what systemctl does to it.

use std::fs;
use std::thread;

use nix::sys::signal::Signal;

use crate::attached;
use crate::common::container::Container;
use crate::common::node::Node;
use crate::common::spec::Spec;
use crate::common::systemd::{self, unit_of_exec};
use crate::common::task::{Io, SIGKILL, SIGTERM};
use crate::common::{daemon, process, wait};

/// The daemon's slice, not the container's: the cost of an exec itself is not charged to the pod.
const SLICE: &str = "containerd_shim.slice";

/// Ends with 9 on SIGTERM, after it has printed that it is ready. A process that stays behind does not keep the
/// output open.
const TRAPPED: &str = "trap 'exit 9' TERM; echo ready; sleep 100000 >/dev/null 2>&1 & wait";

fn sleeping(node: &Node) -> Container<'_> {
    node.container("units", Spec::sleeping()).started(&Io::default())
}

fn assert_gone(unit: &str) {
    wait::until_true("the unit of an exec is gone", || systemd::list_units(unit).is_empty());
}

#[test]
fn the_main_process_of_an_execs_unit_is_the_exec() {
    needs!(OurShim);
    let node = Node::shared();
    let container = sleeping(&node);
    let unit_of_container = systemd::unit_of(&container);
    for spec in [Spec::sleeping(), Spec::sleeping().terminal()] {
        let (exec, _client) = attached::exec(&container, spec);
        let (unit, pid) = (unit_of_exec(&container, &exec), exec.pid());
        assert_eq!(systemd::property(&unit, "ActiveState"), "activating", "{unit}");
        assert_eq!(systemd::main_pid(&unit), pid);
        // `launch` ends once systemd has the process, and the answer to Start may come before.
        wait::until_true("the exec is a child of PID 1", || {
            process::status(pid, "PPid").as_deref() == Some("1")
        });
        assert_eq!(systemd::property(&unit, "Slice"), SLICE);

        let its_own = systemd::cgroup(&unit).map(|cgroup| systemd::processes_below(&cgroup));
        assert_eq!(its_own.unwrap_or_default(), [0; 0], "nothing is in the cgroup of the exec's unit");
        let containers = systemd::cgroup(&unit_of_container).expect("a running unit has a cgroup");
        let inside = systemd::processes_below(&containers.join(&container.id));
        assert!(inside.contains(&pid), "the exec is in the container's cgroup");

        exec.kill(SIGKILL).expect("kill");
        exec.wait().expect("wait");
        exec.delete().expect("delete");
        assert_gone(&unit);
    }
}

#[test]
fn no_helper_process_stays_with_an_exec() {
    needs!(OurShim);
    let node = Node::exclusive();
    let container = sleeping(&node);
    let _execs = [Spec::sleeping(), Spec::sleeping().terminal()].map(|spec| attached::exec(&container, spec));
    wait::until_true("one daemon and no helper", || {
        process::named("containerd-shim") == [systemd::main_pid(systemd::DAEMON_SERVICE)]
    });
    assert_eq!(process::named("runc"), [0; 0]);
    assert_eq!(container.pids().expect("pids").len(), 3);
}

#[test]
fn the_description_of_an_execs_unit_names_program_and_container() {
    needs!(OurShim);
    let node = Node::shared();
    let spec = Spec::sleeping().annotation("nerdctl/name", "webshop");
    let container = node.container("described", spec).started(&Io::default());
    let exec = container.exec(Spec::sleeping()).started(&Io::default());
    let description = systemd::property(&unit_of_exec(&container, &exec), "Description");
    for part in [&exec.id, "webshop"] {
        assert!(description.contains(part), "{part:?} is not in {description:?}");
    }
}

#[test]
fn long_exec_ids_are_cut_like_those_of_containers() {
    needs!(OurShim);
    let node = Node::shared();
    let container = sleeping(&node);
    let alike = ["a", "b"].map(|end| format!("{}{end}", "0123456789abcde".repeat(5))[12..].to_string());
    assert_eq!((alike[0].len(), &alike[0][..12]), (64, &alike[1][..12]));
    let execs = alike.map(|id| container.exec(Spec::sleeping()).id(&id).started(&Io::default()));
    let first = unit_of_exec(&container, &execs[0]);
    assert!(first.len() < 64 + container.id.len(), "{first}");
    assert_eq!(systemd::main_pid(&first), execs[0].pid(), "{first}");
    assert_eq!(systemd::list_units(&systemd::exec_units_of(&container)).len(), 2, "a unit for each");
    execs[0].kill(SIGKILL).expect("kill");
    assert_eq!(execs[0].exit_status(), 137);
    assert!(process::runs(execs[1].pid()), "the other one lives on");
}

#[test]
fn an_exec_that_does_not_run_has_no_unit() {
    needs!(OurShim);
    let node = Node::shared();
    let container = sleeping(&node);
    let unstarted = container.exec(Spec::sleeping()).added(&Io::default());
    assert_eq!(systemd::list_units(&unit_of_exec(&container, &unstarted)), [""; 0]);
    let failed = container.exec(Spec::new(&["/no/such/command"])).added(&Io::default());
    failed.start().expect_err("no such command");
    assert_gone(&unit_of_exec(&container, &failed));
}

#[test]
fn systemctl_kill_ends_an_exec() {
    needs!(OurShim);
    let node = Node::shared();
    let container = sleeping(&node);
    let (exec, mut client) = attached::exec(&container, Spec::sh(TRAPPED));
    client.until("ready\n");
    process::succeed("systemctl", &["kill", "--signal=TERM", &unit_of_exec(&container, &exec)]);
    assert_eq!(exec.exit_status(), 9);
    let exec = container.exec(Spec::sleeping()).started(&Io::default());
    process::succeed("systemctl", &["kill", "--signal=KILL", &unit_of_exec(&container, &exec)]);
    assert_eq!(exec.exit_status(), 137);
    assert!(process::runs(container.pid()));
}

#[test]
fn systemctl_stop_ends_an_exec() {
    needs!(OurShim);
    let node = Node::shared();
    let events = node.subscribe();
    let container = sleeping(&node);
    let exec = container.exec(Spec::sleeping()).started(&Io::default());
    let unit = unit_of_exec(&container, &exec);
    process::succeed("systemctl", &["stop", &unit]);
    let status = exec.exit_status();
    assert!([137, 143].contains(&status), "{status}");
    events.up_to(&container, "exec-exit");
    exec.delete().expect("delete");
    assert_gone(&unit);
    assert!(process::runs(container.pid()));
}

/// systemd refuses the second start, so `launch` has no exit code that could be taken for the exec's.
#[test]
fn systemctl_restart_ends_an_exec_as_a_stop_does() {
    needs!(OurShim);
    let node = Node::shared();
    let container = sleeping(&node);
    let exec = container.exec(Spec::sleeping()).started(&Io::default());
    let restart = process::run("systemctl", &["restart", &unit_of_exec(&container, &exec)]);
    assert_ne!(restart.code, Some(0), "an exec can't be started a second time");
    let status = exec.exit_status();
    assert!([137, 143].contains(&status), "{status}");
    exec.delete().expect("delete");
    assert!(process::runs(container.pid()));
}

#[test]
fn systemctl_stop_of_the_container_ends_its_execs() {
    needs!(OurShim);
    let node = Node::shared();
    for spec in [Spec::sleeping(), Spec::sleeping().in_host_namespace("pid")] {
        let container = node.container("stop", spec).started(&Io::default());
        let exec = container.exec(Spec::sleeping()).started(&Io::default());
        // PID 1 of a pid namespace ignores SIGTERM. This test is not about the time until SIGKILL.
        process::succeed("systemctl", &["kill", "--signal=KILL", &systemd::unit_of(&container)]);
        process::succeed("systemctl", &["stop", &systemd::unit_of(&container)]);
        container.wait().expect("wait for init");
        assert_eq!(exec.exit_status(), 137);
        container.delete().expect("delete");
        assert_gone(&systemd::exec_units_of(&container));
    }
}

#[test]
fn exits_of_execs_are_noticed_during_reloads_and_reexecutions_of_systemd() {
    needs!(OurShim);
    let node = Node::exclusive();
    let container = sleeping(&node);
    for verb in ["daemon-reload", "daemon-reexec"] {
        let (exec, mut client) = attached::exec(&container, Spec::sh(TRAPPED));
        client.until("ready\n");
        thread::scope(|scope| {
            scope.spawn(|| process::succeed("systemctl", &[verb]));
            exec.kill(SIGTERM).expect("kill");
        });
        assert_eq!(exec.exit_status(), 9, "{verb}");
        exec.delete().expect("delete");
    }
}

#[test]
fn execs_start_during_reloads_and_reexecutions_of_systemd() {
    needs!(OurShim);
    let node = Node::exclusive();
    let container = sleeping(&node);
    for verb in ["daemon-reload", "daemon-reexec"] {
        thread::scope(|scope| {
            scope.spawn(|| (0..3).for_each(|_| drop(process::succeed("systemctl", &[verb]))));
            for status in 0..20 {
                let exec = container.exec_sh(&format!("exit {status}"));
                assert_eq!(exec.exit_status(), status, "{verb}");
                exec.delete().expect("delete");
            }
        });
    }
    assert_gone(&systemd::exec_units_of(&container));
}

#[test]
fn nothing_stays_of_an_exec_whose_units_file_somebody_removed() {
    needs!(OurShim);
    let node = Node::exclusive();
    let container = sleeping(&node);
    for status in [0, 9] {
        let (exec, mut client) =
            attached::exec(&container, Spec::sh(&TRAPPED.replace("exit 9", &format!("exit {status}"))));
        client.until("ready\n");
        let unit = unit_of_exec(&container, &exec);
        fs::remove_file(format!("/run/systemd/transient/{unit}")).expect("remove the file of a unit");
        process::succeed("systemctl", &["daemon-reload"]);
        assert_eq!(systemd::property(&unit, "LoadState"), "not-found");
        exec.kill(SIGTERM).expect("kill");
        assert_eq!(exec.exit_status(), status);
        exec.delete().expect("delete");
        assert_gone(&systemd::exec_units_of(&container));
    }
    assert_eq!(container.exec_sh("exit 7").exit_status(), 7);
    container.end();
}

/// The daemon reads the signals of the reload and of the exit at once: its query of the unit must not win against the exit.
#[test]
fn an_exit_during_a_reload_is_reported_though_its_unit_disappears() {
    needs!(OurShim);
    let node = Node::exclusive();
    let container = sleeping(&node);
    for _ in 0..10 {
        let (exec, mut client) = attached::exec(&container, Spec::sh(&TRAPPED.replace("exit 9", "exit 0")));
        client.until("ready\n");
        let unit = unit_of_exec(&container, &exec);
        fs::remove_file(format!("/run/systemd/transient/{unit}")).expect("remove the file of a unit");
        let serving = wait::until("the daemon serves", daemon::serving);
        daemon::signal(serving, Signal::SIGSTOP);
        process::succeed("systemctl", &["daemon-reload"]);
        process::succeed("systemctl", &["kill", "--kill-whom=main", "--signal=TERM", &unit]);
        assert_gone(&unit);
        daemon::signal(serving, Signal::SIGCONT);
        assert_eq!(exec.exit_status(), 0);
        exec.delete().expect("delete");
    }
    container.end();
}
