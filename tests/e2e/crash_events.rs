//! Events while the daemon is killed: they come in order, and each comes once.

use std::thread;
use std::time::Duration;

use containerd_client::tonic::Code;

use crate::common::audit::Audit;
use crate::common::events::Event;
use crate::common::node::{NAMESPACE, Node};
use crate::common::spec::Spec;
use crate::common::systemd;
use crate::common::task::{Io, SIGKILL};
use crate::common::{daemon, disturb, wait};

/// The names of the events of a container with one exec.
const ALL: [&str; 7] = ["create", "start", "exec-added", "exec-started", "exec-exit", "exit", "delete"];

/// One container with an exec; returns its id.
fn live(node: &Node, status: u32) -> String {
    let container = node.container("told", Spec::sleeping()).started(&Io::default());
    let exec = container.exec_sh(&format!("exit {status}"));
    assert_eq!(exec.exit_status(), status);
    exec.delete().expect("delete an exec");
    container.kill(SIGKILL).expect("kill");
    assert_eq!(container.exit_status(), 137);
    container.delete().expect("delete");
    container.id.clone()
}

#[test]
fn events_are_complete_and_in_order_over_many_restarts_of_the_daemon() {
    needs!(OurShim);
    let node = Node::exclusive();
    let events = node.subscribe();
    let ids = daemon::killed_during(|kills| {
        thread::scope(|scope| {
            let lives: Vec<_> = (0..3)
                .map(|lane| {
                    let node = &node;
                    scope.spawn(move || {
                        kills
                            .turns(4, 10)
                            .map(|turn| live(node, lane * 50 + turn % 50))
                            .collect::<Vec<String>>()
                    })
                })
                .collect();
            lives.into_iter().flat_map(|lives| lives.join().expect("a life")).collect::<Vec<String>>()
        })
    });
    let mut audit = Audit::default();
    let all = wait::within(wait::LIMIT, || {
        while let Some(event) = events.next(NAMESPACE, Duration::ZERO).expect("containerd is there") {
            audit.add(event);
        }
        ids.iter().all(|id| audit.is_deleted(id)).then_some(())
    });
    for id in &ids {
        assert_eq!(audit.faults(id), [""; 0]);
        assert_eq!(audit.of(id).iter().map(Event::name).collect::<Vec<_>>(), ALL, "{id}");
    }
    assert!(all.is_some());
    assert!(audit.containers().all(|id| ids.contains(id)), "an event of no container");
    assert_eq!(audit.repeats, 0, "events that came twice, of {} containers", ids.len());
}

#[test]
fn events_of_a_daemon_that_died_while_containerd_was_down_are_not_lost() {
    needs!(OurShim);
    let node = Node::exclusive();
    let container = node.container("owed", Spec::sleeping()).started(&Io::default());
    let pid = container.pid();
    crate::common::process::succeed("systemctl", &["stop", "containerd.service"]);
    daemon::signal(pid, nix::sys::signal::Signal::SIGKILL);
    let unit = systemd::unit_of(&container);
    wait::until_true("systemd has seen the end", || systemd::main_pid(&unit) == 0);
    (0..3).for_each(|_| daemon::killed());
    disturb::start_containerd();
    node.wait_for_containerd();
    // containerd gets its state from the shim. A client that subscribes now receives the rest.
    let events = node.subscribe();
    assert_eq!(container.exit_status(), 137);
    assert_eq!(container.delete().expect("delete").exit_status, 137);
    let mut audit = Audit::default();
    wait::until_true("the delete is published", || {
        while let Some(event) = events.next(NAMESPACE, Duration::ZERO).expect("containerd is there") {
            audit.add(event);
        }
        audit.is_deleted(&container.id)
    });
    assert_eq!(audit.faults(&container.id), [""; 0]);
    assert_eq!(container.state().expect_err("after delete").code(), Code::NotFound);
}
