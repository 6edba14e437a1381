//! A task from Create to Delete: phases, exit statuses, refusals.

use std::time::{SystemTime, UNIX_EPOCH};

use containerd_client::tonic::Code;
use containerd_client::types::v1::Status;

use crate::common::node::Node;
use crate::common::spec::Spec;
use crate::common::stdio::Gate;
use crate::common::task::{Io, SIGKILL, SIGTERM, YEAR_ONE, assert_refused};
use crate::common::{process, wait};

/// Runs a container to its end; returns the exit status.
fn run(node: &Node, spec: Spec) -> u32 {
    node.container("run", spec).started(&Io::default()).exit_status()
}

#[test]
fn every_exit_code_arrives_as_it_is() {
    let node = Node::shared();
    for code in [0, 1, 2, 42, 126, 127, 128, 255] {
        assert_eq!(run(&node, Spec::sh(&format!("exit {code}"))), code);
    }
}

#[test]
fn a_fatal_signal_arrives_as_128_and_its_number() {
    let node = Node::shared();
    // PID 1 of a pid namespace is immune to all signals but SIGKILL, so these run without one.
    for (name, number) in [("HUP", 1), ("ABRT", 6), ("KILL", 9), ("SEGV", 11), ("TERM", 15)] {
        let spec = Spec::sh(&format!("kill -{name} $$")).in_host_namespace("pid");
        assert_eq!(run(&node, spec), 128 + number, "SIG{name}");
    }
}

#[test]
fn a_core_dump_is_a_fatal_signal() {
    let node = Node::shared();
    let spec = Spec::sh("ulimit -c unlimited; kill -SEGV $$").in_host_namespace("pid");
    assert_eq!(run(&node, spec), 139);
}

#[test]
fn kill_ends_a_running_task() {
    let node = Node::shared();
    for (signal, spec) in [(SIGKILL, Spec::sleeping()), (SIGTERM, Spec::sleeping().in_host_namespace("pid"))]
    {
        let container = node.container("kill", spec).started(&Io::default());
        container.kill(signal).expect("kill a running task");
        assert_eq!(container.exit_status(), 128 + signal);
    }
}

#[test]
fn kill_delivers_a_signal_that_the_process_handles() {
    let node = Node::shared();
    let ready = crate::common::stdio::Fifos::new("trap");
    let mut stdout = ready.stdout();
    let _stderr = ready.stderr();
    let script = "trap 'exit 9' USR1; echo ready; sleep 100000 & wait";
    let container = node.container("trap", Spec::sh(script)).started(&ready.output());
    stdout.until(|bytes| bytes == b"ready\n");
    container.kill(10).expect("send SIGUSR1");
    assert_eq!(container.exit_status(), 9);
}

#[test]
fn kill_all_reaches_every_process() {
    let node = Node::shared();
    let spec = Spec::sh("sleep 100000 & sleep 100000 & wait").in_host_namespace("pid");
    let container = node.container("kill-all", spec).started(&Io::default());
    let pids = wait::until("three processes", || container.pids().ok().filter(|pids| pids.len() == 3));
    container.kill_all(SIGKILL).expect("kill all");
    assert_eq!(container.exit_status(), 137);
    wait::until_true("all processes are gone", || !pids.iter().any(|pid| process::exists(*pid)));
}

#[test]
fn children_die_with_their_init_in_the_hosts_pid_namespace() {
    let node = Node::shared();
    let gate = Gate::new();
    let spec = Spec::sh(&format!("sleep 100000 & sleep 100000 & {}; exit 3", Gate::WAIT));
    let spec = gate.bind(spec).in_host_namespace("pid");
    let container = node.container("orphans", spec).started(&Io::default());
    let pids = wait::until("init and its children", || container.pids().ok().filter(|pids| pids.len() == 3));
    gate.open();
    assert_eq!(container.exit_status(), 3);
    wait::until_true("the children are gone", || !pids.iter().any(|pid| process::exists(*pid)));
}

#[test]
fn a_missing_command_fails_with_the_runtimes_own_message() {
    let node = Node::shared();
    let container = node.container("no-command", Spec::new(&["/no/such/command"])).make();
    let refusal =
        container.create(&Io::default()).and_then(|_| container.start()).expect_err("no such command");
    let text = refusal.message();
    assert!(
        text.contains("no such file or directory") || text.contains("executable file not found"),
        "{text}"
    );
}

#[test]
fn an_id_is_free_again_after_a_failed_create() {
    let node = Node::shared();
    let mut container = node.container("again", Spec::sh("exit 5")).make();
    let good = container.mounts.clone();
    for mount in &mut container.mounts {
        mount.options = vec![
            "lowerdir=/no/such/layer".to_string(),
            "upperdir=/no".to_string(),
            "workdir=/no".to_string(),
        ];
    }
    container.create(&Io::default()).expect_err("a rootfs that can't be mounted");
    container.mounts = good;
    container.create(&Io::default()).expect("create after a failed create");
    container.start().expect("start");
    assert_eq!(container.exit_status(), 5);
}

#[test]
fn a_second_start_is_refused() {
    let node = Node::shared();
    let container = node.container("start", Spec::sleeping()).started(&Io::default());
    assert_refused(container.start());
    assert_eq!(container.phase(), Status::Running);
    container.kill(SIGKILL).expect("kill");
    container.wait().expect("wait");
    assert_refused(container.start());
}

#[test]
fn delete_of_a_running_task_is_refused() {
    let node = Node::shared();
    let container = node.container("delete", Spec::sleeping()).started(&Io::default());
    assert_refused(container.delete());
    assert_eq!(container.phase(), Status::Running);
}

#[test]
fn kill_after_the_exit_is_not_found() {
    let node = Node::shared();
    let container = node.container("late-kill", Spec::sh("exit 0")).started(&Io::default());
    container.wait().expect("wait");
    assert_eq!(container.kill(SIGKILL).expect_err("kill a stopped task").code(), Code::NotFound);
}

#[test]
fn wait_after_the_exit_returns_at_once_and_the_same() {
    let node = Node::shared();
    let container = node.container("late-wait", Spec::sh("exit 7")).created(&Io::default());
    let early = container.waiting();
    container.start().expect("start");
    let early = early.exit().expect("a wait from before the start");
    assert_eq!(early.status, 7);
    assert_eq!(container.wait().expect("a late wait"), early);
    assert_eq!(container.wait().expect("one more"), early);
    let deleted = container.delete().expect("delete");
    assert_eq!((deleted.exit_status, deleted.exited_at), (7, early.at));
}

#[test]
fn a_created_task_waits_to_be_started() {
    let node = Node::shared();
    let container = node.container("created", Spec::sleeping()).created(&Io::default());
    let waiting = container.waiting();
    assert_eq!(container.phase(), Status::Created);
    assert!(!waiting.is_over());
    container.kill(SIGKILL).expect("kill a created task");
    assert_eq!(waiting.exit().expect("wait").status, 137);
    container.delete().expect("delete");
}

#[test]
fn a_created_task_can_be_deleted() {
    let node = Node::shared();
    let container = node.container("created", Spec::sleeping()).created(&Io::default());
    let pid = container.pid();
    container.delete().expect("delete a created task");
    wait::until_true("its process is gone", || !process::exists(pid));
    assert_eq!(container.state().expect_err("state after delete").code(), Code::NotFound);
}

#[test]
fn a_deleted_task_is_not_found_and_can_be_created_again() {
    let node = Node::shared();
    let container = node.container("anew", Spec::sh("exit 4")).started(&Io::default());
    assert_eq!(container.exit_status(), 4);
    container.delete().expect("delete");
    assert_eq!(container.delete().expect_err("delete again").code(), Code::NotFound);
    container.create(&Io::default()).expect("create again");
    container.start().expect("start again");
    assert_eq!(container.exit_status(), 4);
}

#[test]
fn state_reports_each_phase() {
    let node = Node::shared();
    let container = node.container("state", Spec::sleeping()).make();
    let pid = container.create(&Io::default()).expect("create");
    assert!(pid > 0, "a created task has a process");

    let created = container.state().expect("state");
    assert_eq!((created.status(), created.pid), (Status::Created, pid));
    assert_eq!(created.exited_at.map(|at| at.seconds), Some(YEAR_ONE));

    assert_eq!(container.start().expect("start"), pid);
    let running = container.state().expect("state");
    assert_eq!((running.status(), running.pid, running.exit_status), (Status::Running, pid, 0));
    assert_eq!(running.exited_at.map(|at| at.seconds), Some(YEAR_ONE));

    container.kill(SIGKILL).expect("kill");
    let exit = container.wait().expect("wait");
    let stopped = container.state().expect("state");
    assert_eq!((stopped.status(), stopped.pid, stopped.exit_status), (Status::Stopped, pid, 137));
    assert_eq!(stopped.exited_at, exit.at);
    let now = SystemTime::now().duration_since(UNIX_EPOCH).expect("a clock after 1970").as_secs() as i64;
    let age = now - exit.at.expect("an exit has a time").seconds;
    assert!((0..120).contains(&age), "exited {age} s ago");
}

#[test]
fn state_returns_the_stdio_of_create() {
    let node = Node::shared();
    let fifos = crate::common::stdio::Fifos::new("state-io");
    let (_stdout, _stderr) = (fifos.stdout(), fifos.stderr());
    let container = node.container("state-io", Spec::sleeping()).created(&fifos.io());
    let state = container.state().expect("state");
    let io = fifos.io();
    assert_eq!((state.stdin, state.stdout, state.stderr), (io.stdin, io.stdout, io.stderr));
    assert!(!state.terminal);
}

#[test]
fn pids_lists_the_container_and_nothing_else() {
    let node = Node::shared();
    let container = node.container("pids", Spec::sleeping()).created(&Io::default());
    assert_eq!(container.pids().expect("pids of a created task"), [container.pid()]);

    let container =
        node.container("pids", Spec::sh("sleep 100000 & sleep 100000 & wait")).started(&Io::default());
    let pids = wait::until("init and two children", || container.pids().ok().filter(|pids| pids.len() == 3));
    assert!(pids.contains(&container.pid()));
}

#[test]
fn the_pid_of_create_has_the_containers_network_namespace() {
    let node = Node::shared();
    // `ctr run --cni` and others set the network up between Create and Start, through this pid.
    let container = node.container("netns", Spec::sleeping()).make();
    let pid = container.create(&Io::default()).expect("create");
    assert_ne!(process::namespace(pid, "net"), process::namespace(std::process::id(), "net"));
}

#[test]
fn a_second_create_of_a_live_id_already_exists() {
    let node = Node::shared();
    let container = node.container("twice", Spec::sleeping()).started(&Io::default());
    let pid = container.pid();
    assert_eq!(container.create(&Io::default()).expect_err("create again").code(), Code::AlreadyExists);
    assert_eq!((container.phase(), container.pid()), (Status::Running, pid));
}

#[test]
fn unknown_ids_are_not_found() {
    let node = Node::shared();
    let container = node.container("unknown", Spec::sleeping()).make();
    let refusals = [
        ("state", container.state().map(drop)),
        ("start", container.start().map(drop)),
        ("kill", container.kill(SIGKILL)),
        ("pids", container.pids().map(drop)),
        ("wait", container.wait().map(drop)),
        ("delete", container.delete().map(drop)),
    ];
    for (call, refusal) in refusals {
        assert_eq!(refusal.expect_err(call).code(), Code::NotFound, "{call}");
    }
}
