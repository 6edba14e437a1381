//! The events of a task: each comes once, in order and with the right fields.

use crate::common::container::Container;
use crate::common::events::{Event, Events};
use crate::common::node::{Node, OUR_RUNTIME};
use crate::common::spec::Spec;
use crate::common::stdio::Gate;
use crate::common::task::{Io, SIGKILL};

/// The last event to wait for. The stock shim may end before it has published a delete (seen on 2.1.9).
fn last(node: &Node) -> &'static str {
    if node.runtime == OUR_RUNTIME { "delete" } else { "exit" }
}

/// The names of the events up to the last one.
fn up_to_last(node: &Node, names: &[&str]) -> Vec<String> {
    let end = names.iter().position(|name| *name == last(node)).expect("the last event is among the names");
    names[..=end].iter().map(|name| name.to_string()).collect()
}

/// The names of the container's events up to the last.
fn names(node: &Node, events: &Events, container: &Container) -> Vec<String> {
    events.up_to(container, last(node)).iter().map(|event| event.name().to_string()).collect()
}

#[test]
fn events_come_once_and_in_order() {
    let node = Node::shared();
    let events = node.subscribe();
    // `true` may be dead before Start has returned: its exit still comes after its start.
    let gate = Gate::new();
    let gated = gate.bind(Spec::sh(&format!("{}; exit 6", Gate::WAIT)));
    for (spec, is_gated) in [(Spec::new(&["/bin/true"]), false), (gated, true)] {
        let container = node.container("events", spec).started(&Io::default());
        if is_gated {
            gate.open();
        }
        container.wait().expect("wait");
        container.delete().expect("delete");
        assert_eq!(
            names(&node, &events, &container),
            up_to_last(&node, &["create", "start", "exit", "delete"])
        );
    }
}

#[test]
fn events_carry_what_clients_read() {
    let node = Node::shared();
    let events = node.subscribe();
    let container = node.container("fields", Spec::sh("exit 6")).make();
    let pid = container.create(&Io::default()).expect("create");
    container.start().expect("start");
    let exit = container.wait().expect("wait");
    container.delete().expect("delete");

    for event in events.up_to(&container, last(&node)) {
        match event {
            Event::Create(create) => {
                assert_eq!(create.pid, pid);
                assert!(
                    create.bundle.ends_with(&format!("/{}/{}", container.namespace, container.id)),
                    "{create:?}"
                );
                assert_eq!(create.rootfs, container.mounts);
            }
            Event::Start(start) => assert_eq!(start.pid, pid),
            Event::Exit(told) => {
                assert_eq!((told.id.as_str(), told.pid, told.exit_status), (container.id.as_str(), pid, 6));
                assert_eq!(told.exited_at, exit.at);
            }
            Event::Delete(delete) => {
                assert_eq!((delete.pid, delete.exit_status, delete.exited_at), (pid, 6, exit.at));
            }
            other => panic!("an event of another kind: {other:?}"),
        }
    }
}

#[test]
fn a_kill_is_published_as_an_exit() {
    let node = Node::shared();
    let events = node.subscribe();
    let container = node.container("killed", Spec::sleeping()).started(&Io::default());
    container.kill(SIGKILL).expect("kill");
    let exit = events.exit_of(&container);
    assert_eq!((exit.exit_status, exit.id), (137, container.id.clone()));
}

#[test]
fn a_created_task_that_is_killed_has_no_start_event() {
    let node = Node::shared();
    let events = node.subscribe();
    let container = node.container("unstarted", Spec::sleeping()).created(&Io::default());
    container.kill(SIGKILL).expect("kill");
    container.wait().expect("wait");
    container.delete().expect("delete");
    assert_eq!(names(&node, &events, &container), up_to_last(&node, &["create", "exit", "delete"]));
}

#[test]
fn events_of_an_exec_come_once_in_order_and_before_the_exit_of_init() {
    let node = Node::shared();
    let events = node.subscribe();
    let gate = Gate::new();
    let container = node.container("exec-events", gate.bind(Spec::sleeping())).started(&Io::default());
    let gated = Spec::sh(&format!("{}; exit 6", Gate::WAIT));
    // `true` may be dead before Start has returned, as above.
    let specs = [(Spec::new(&["/bin/true"]), false), (gated, true), (Spec::sh("kill -TERM $$"), false)];
    for (spec, is_gated) in specs {
        let exec = container.exec(spec).started(&Io::default());
        if is_gated {
            gate.open();
        }
        exec.wait().expect("wait");
        exec.delete().expect("delete");
    }
    container.kill(SIGKILL).expect("kill");
    container.wait().expect("wait");
    container.delete().expect("delete");
    let one = ["exec-added", "exec-started", "exec-exit"];
    let all = [&["create", "start"][..], &one, &one, &one, &["exit", "delete"]].concat();
    assert_eq!(names(&node, &events, &container), up_to_last(&node, &all));
}

#[test]
fn events_of_an_exec_carry_what_clients_read() {
    let node = Node::shared();
    let events = node.subscribe();
    let container = node.container("exec-fields", Spec::sleeping()).started(&Io::default());
    let exec = container.exec(Spec::sh("exit 6")).added(&Io::default());
    let pid = exec.start().expect("start");
    let exit = exec.wait().expect("wait");
    for event in events.up_to(&container, "exec-exit") {
        match event {
            Event::ExecAdded(added) => assert_eq!(added.exec_id, exec.id),
            Event::ExecStarted(started) => assert_eq!((started.exec_id, started.pid), (exec.id.clone(), pid)),
            Event::Exit(told) => {
                assert_eq!((told.id, told.pid, told.exit_status), (exec.id.clone(), pid, 6));
                assert_eq!(told.exited_at, exit.at);
            }
            _ => {}
        }
    }
}

#[test]
fn an_exec_that_does_not_start_has_no_exit() {
    let node = Node::shared();
    let events = node.subscribe();
    let container = node.container("exec-unstarted", Spec::sleeping()).started(&Io::default());
    let unstarted = container.exec(Spec::sleeping()).added(&Io::default());
    unstarted.delete().expect("delete");
    let failed = container.exec(Spec::new(&["/no/such/command"])).added(&Io::default());
    failed.start().expect_err("no such command");
    failed.delete().expect("delete");
    container.kill(SIGKILL).expect("kill");
    container.wait().expect("wait");
    container.delete().expect("delete");
    let all = ["create", "start", "exec-added", "exec-added", "exit", "delete"];
    assert_eq!(names(&node, &events, &container), up_to_last(&node, &all));
}
