//! What a client hears of a task: each event once, in order, with the right fields.

use crate::common::container::{Container, Io, SIGKILL};
use crate::common::events::{Event, Events};
use crate::common::node::{Node, OUR_RUNTIME};
use crate::common::spec::Spec;

/// The last event to wait for. The stock shim may end before it has published a delete (seen on 2.1.9).
fn last(node: &Node) -> &'static str {
    if node.runtime == OUR_RUNTIME { "delete" } else { "exit" }
}

/// Those of the names that come up to the last event.
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
    for spec in [Spec::new(&["/bin/true"]), Spec::sh("sleep 0.2; exit 6")] {
        let container = node.container("events", spec).started(&Io::default());
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
            Event::Other(topic) => panic!("an event of no task: {topic}"),
        }
    }
}

#[test]
fn a_kill_is_told_as_an_exit() {
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
