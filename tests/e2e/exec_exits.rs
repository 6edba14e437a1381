//! Exit codes of many short execs: each is right, and nothing stays. And what happens to execs whose init process dies.

use std::thread;

use containerd_client::tonic::Code;
use containerd_client::types::v1::Status;

use crate::common::container::Container;
use crate::common::events::Event;
use crate::common::node::{Node, OUR_RUNTIME, number};
use crate::common::spec::Spec;
use crate::common::systemd;
use crate::common::task::{Io, SIGKILL};
use crate::common::{process, wait};

/// Commands that end before systemd and the daemon notice that they run, and their exit statuses.
const SHORT: [(&[&str], u32); 5] = [
    (&["/bin/true"], 0),
    (&["/bin/sh", "-c", "exit 9"], 9),
    (&["/bin/sh", "-c", "kill -KILL $$"], 137),
    (&["/bin/sh", "-c", "kill -TERM $$"], 143),
    (&["/bin/sh", "-c", "kill -SEGV $$"], 139),
];

/// How many execs in a row, of all kinds together.
fn execs() -> usize {
    number("E2E_EXECS", 1000, 100)
}

/// Runs one of [`SHORT`] or a command that is not there, and asserts that the right exit is reported.
fn run_short(container: &Container, round: usize) {
    let Some((args, status)) = SHORT.get(round % (SHORT.len() + 1)) else {
        let exec = container.exec(Spec::new(&["/no/such/command"])).added(&Io::default());
        exec.start().expect_err("no such command");
        assert_eq!(exec.delete().expect("delete what did not start").exit_status, 0);
        return;
    };
    let exec = container.exec(Spec::new(args)).started(&Io::default());
    assert_eq!(exec.exit_status(), *status, "{args:?}, round {round}");
    assert_eq!(exec.delete().expect("delete").exit_status, *status, "{args:?}, round {round}");
}

fn assert_no_exec_unit_is_left() {
    wait::until_true("no unit of an exec is left", || systemd::list_units("containerd-*:*").is_empty());
}

#[test]
fn many_execs_in_a_row_report_their_own_exit_codes() {
    let node = Node::exclusive();
    let container = node.container("row", Spec::sleeping()).started(&Io::default());
    let before = systemd::Cursor::now();
    (0..execs()).for_each(|round| run_short(&container, round));
    assert_no_exec_unit_is_left();
    assert_eq!(container.phase(), Status::Running);
    if node.runtime == OUR_RUNTIME {
        assert_journal_is_quiet(&before, execs());
    }
}

/// PID 1 and all processes of our own say at most one line per exec: probes must not fill the journal.
fn assert_journal_is_quiet(before: &systemd::Cursor, execs: usize) {
    let entries = before.entries_since(&["_PID=1", "+", "_COMM=containerd-shim"]);
    let lines: Vec<String> = entries.iter().map(|entry| entry["MESSAGE"].to_string()).collect();
    let last = &lines[lines.len().saturating_sub(20)..];
    assert!(lines.len() <= execs, "{} lines for {execs} execs, the last ones:\n{last:#?}", lines.len());
}

/// The threads of a process do not end at the same moment. Here, the OCI runtime itself ends, as the program can't be run.
#[test]
fn execs_whose_threads_end_one_after_the_other_report_their_exits() {
    let node = Node::shared();
    let container = node.container("threads", Spec::sleeping()).started(&Io::default());
    let run = |_| {
        let exec = container.exec(Spec::new(&["/proc/self/exe"])).started(&Io::default());
        let status = exec.exit_status();
        exec.delete().expect("delete");
        status
    };
    let mut found: Vec<u32> = (0..execs() / 10).map(run).collect();
    found.dedup();
    assert!(found.len() == 1 && found[0] != 0, "{found:?}");
    container.end();
}

#[test]
fn twenty_execs_at_once_report_their_own_exit_codes() {
    let node = Node::exclusive();
    let container = node.container("at-once", Spec::sleeping()).started(&Io::default());
    for _round in 0..5 {
        thread::scope(|scope| {
            for number in 0..20 {
                let container = &container;
                scope.spawn(move || run_short(container, number));
            }
        });
    }
    assert_no_exec_unit_is_left();
}

#[test]
fn sixty_four_execs_at_once_in_one_container() {
    let node = Node::exclusive();
    let container = node.container("parallel", Spec::sleeping()).started(&Io::default());
    thread::scope(|scope| {
        for status in 1..=64 {
            let container = &container;
            scope.spawn(move || {
                let exec = container.exec_sh(&format!("exit {status}"));
                assert_eq!(exec.exit_status(), status);
                exec.delete().expect("delete");
            });
        }
    });
    assert_no_exec_unit_is_left();
}

#[test]
fn execs_in_fifty_containers_at_once() {
    let node = Node::exclusive();
    let count = number("E2E_CONTAINERS", 50, 10);
    let containers: Vec<_> =
        (0..count).map(|_| node.container("fifty", Spec::sleeping()).started(&Io::default())).collect();
    thread::scope(|scope| {
        for (container, status) in containers.iter().zip(1..) {
            scope.spawn(move || {
                let exec = container.exec_sh(&format!("exit {status}"));
                assert_eq!(exec.exit_status(), status);
                exec.delete().expect("delete");
            });
        }
    });
    assert_no_exec_unit_is_left();
    containers.iter().for_each(|container| container.kill(SIGKILL).expect("kill"));
}

#[test]
fn execs_end_before_their_init() {
    let node = Node::shared();
    let specs = [("a pid namespace", Spec::sleeping()), ("none", Spec::sleeping().in_host_namespace("pid"))];
    for (kind, spec) in specs {
        let events = node.subscribe();
        let container = node.container("init-dies", spec).started(&Io::default());
        let execs = [(); 3].map(|()| container.exec(Spec::sleeping()).started(&Io::default()));
        let unstarted = container.exec(Spec::sleeping()).added(&Io::default());
        let pids = execs.each_ref().map(|exec| exec.pid());
        let waits = execs.each_ref().map(|exec| exec.waiting());
        let init = container.waiting();
        container.kill(SIGKILL).expect("kill init");

        let told = init.exit().expect("wait for init");
        assert_eq!(told.status, 137, "{kind}");
        let state = container.state().expect("state");
        assert_eq!((state.status(), state.exit_status, state.exited_at), (Status::Stopped, 137, told.at));
        for waiting in waits {
            assert_eq!(waiting.exit().expect("wait for an exec").status, 137, "{kind}");
        }
        let seen = events.up_to(&container, "exit");
        let mut ended: Vec<&str> = seen.iter().filter_map(exec_that_ended).collect();
        ended.sort_unstable();
        let mut ids = execs.each_ref().map(|exec| exec.id.as_str());
        ids.sort_unstable();
        assert_eq!(ended, ids, "each exec's exit comes once and before that of init, {kind}");

        assert!(!pids.iter().any(|pid| process::runs(*pid)), "{kind}");
        for exec in &execs {
            assert_eq!((exec.phase(), exec.exit_status()), (Status::Stopped, 137), "{kind}");
        }
        assert_eq!(execs[0].delete().expect("delete one exec").exit_status, 137, "{kind}");
        // Delete of the task removes the other execs, and the one that was never started.
        container.delete().expect("delete");
        for exec in execs.iter().chain([&unstarted]) {
            assert_eq!(exec.state().expect_err("after delete").code(), Code::NotFound, "{kind}");
        }
        assert_eq!(systemd::list_units(&systemd::exec_units_of(&container)), [""; 0], "{kind}");
    }
}

fn exec_that_ended(event: &Event) -> Option<&str> {
    match event {
        Event::Exit(exit) if exit.id != exit.container_id => Some(&exit.id),
        _ => None,
    }
}

#[test]
fn state_and_wait_agree_on_init_while_its_execs_are_being_killed() {
    let node = Node::shared();
    // As long as Wait on init blocks, State says that it runs; both change together.
    let container = node.container("held", Spec::sleeping().in_host_namespace("pid")).started(&Io::default());
    let _execs = [(); 10].map(|()| container.exec(Spec::sleeping()).started(&Io::default()));
    let init = container.waiting();
    container.kill(SIGKILL).expect("kill init");
    wait::until_true("State says that init has stopped", || container.phase() == Status::Stopped);
    assert_eq!(container.wait().expect("wait").status, 137);
    assert_eq!(init.exit().expect("an early wait").status, 137);
}
