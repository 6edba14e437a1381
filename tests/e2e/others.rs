//! Units and containers that others have made, with the names of ours: nothing that a task of ours does touches them.

use std::fs;

use crate::common::container::Container;
use crate::common::node::Node;
use crate::common::spec::Spec;
use crate::common::task::Io;
use crate::common::{daemon, leaks, process, systemd};

/// A unit that somebody else has started.
struct Foreign {
    unit: String,
    pid: u32,
}

impl Foreign {
    fn start(unit: String) -> Foreign {
        process::succeed("systemd-run", &["--quiet", "--unit", &unit, "sleep", "100000"]);
        Foreign { pid: systemd::main_pid(&unit), unit }
    }

    fn assert_runs(&self) {
        assert!(process::runs(self.pid), "{} was stopped", self.unit);
        assert_eq!(systemd::main_pid(&self.unit), self.pid, "{}", self.unit);
    }
}

impl Drop for Foreign {
    fn drop(&mut self) {
        process::run("systemctl", &["stop", &self.unit]);
    }
}

fn unit_of_exec(container: &Container, exec: &str) -> String {
    systemd::unit_of(container).replace(".service", &format!(":{exec}.service"))
}

#[test]
fn a_container_and_its_execs_do_not_touch_units_with_their_names() {
    needs!(OurShim);
    let node = Node::shared();
    let container = node.container("foreign", Spec::sleeping()).make();
    let foreign = Foreign::start(systemd::unit_of(&container));
    container.create(&Io::default()).expect("create");
    container.start().expect("start");
    assert_ne!(container.pid(), foreign.pid);

    let of_exec = Foreign::start(unit_of_exec(&container, "taken"));
    let exec = container.exec(Spec::sh("exit 4")).id("taken").started(&Io::default());
    assert_eq!(exec.exit_status(), 4);
    exec.delete().expect("delete the exec");
    of_exec.assert_runs();

    container.end();
    foreign.assert_runs();
}

#[test]
fn a_start_of_an_exec_that_is_refused_does_not_touch_the_unit_that_has_its_name() {
    needs!(OurShim);
    let node = Node::shared();
    let container = node.container("foreign-exec", Spec::sleeping()).started(&Io::default());
    let exec = container.exec(Spec::sh("exit 4")).id("late").added(&Io::default());
    // The name belongs to the unit that is found or refused under it.
    let foreign = Foreign::start(unit_of_exec(&container, "late"));
    let error = exec.start().expect_err("the name is taken");
    assert!(error.message().contains("already exists"), "{error}");
    foreign.assert_runs();
    exec.delete().expect("delete the exec");
    foreign.assert_runs();
    container.end();
}

#[test]
fn a_container_without_a_record_is_not_touched_by_its_successor() {
    needs!(OurShim);
    let node = Node::exclusive();
    let container = node.container("lost", Spec::sleeping()).started(&Io::default());
    let (unit, pid) = (systemd::unit_of(&container), container.pid());
    fs::remove_dir_all(leaks::task_directory(&container.id)).expect("remove the record");
    daemon::killed();
    // The daemon does not know the task, so containerd forgets it.
    let _ = container.delete();
    let error = container.create(&Io::default()).expect_err("the container of the lost record runs");
    assert!(error.message().contains(&format!("systemctl stop {unit}")), "{error}");
    assert!(process::runs(pid));
    process::succeed("systemctl", &["stop", &unit]);
    container.create(&Io::default()).expect("create");
    container.start().expect("start");
    container.end();
    let root = format!("/run/containerd/runc/{}", container.namespace);
    process::succeed("runc", &["--root", &root, "delete", &container.id]);
}
