//! A container is a systemd unit: tests of what `systemctl` and `journalctl` show of it, and of what `systemctl` does
//! to it.

use std::fs;
use std::thread;

use crate::common::container::Container;
use crate::common::leaks::{self, Traces};
use crate::common::node::Node;
use crate::common::spec::Spec;
use crate::common::stdio::{Fifos, Scratch};
use crate::common::systemd::{self, DropIn};
use crate::common::task::{Io, SIGTERM};
use crate::common::{daemon, process, wait};
use crate::log_modes;

/// Ends with 143 on SIGTERM, also as PID 1 of a pid namespace.
const ENDS_ON_TERM: &str = "trap 'exit 143' TERM; echo ready; sleep 100000 & wait";

/// A container that has set its trap.
fn ready<'n>(node: &'n Node, name: &str, spec: Spec) -> Container<'n> {
    let fifos = Fifos::new(name);
    let (mut stdout, _stderr) = (fifos.stdout(), fifos.stderr());
    let container = node.container(name, spec).started(&fifos.output());
    stdout.until(|bytes| bytes == b"ready\n");
    container
}

#[test]
fn the_main_process_of_the_unit_is_the_init_process_and_a_child_of_pid_1() {
    needs!(OurShim);
    let node = Node::shared();
    let container = node.container("main", Spec::sleeping()).started(&Io::default());
    let unit = systemd::unit_of(&container);
    let pid = container.pid();
    assert!(systemd::is_active(&unit));
    assert_eq!(systemd::main_pid(&unit), pid);
    assert_eq!(process::status(pid, "PPid").as_deref(), Some("1"));
}

#[test]
fn no_helper_process_stays_with_a_container() {
    needs!(OurShim);
    let node = Node::exclusive();
    let container = node.container("alone", Spec::sleeping()).started(&Io::default());
    let cgroup = systemd::cgroup(&systemd::unit_of(&container)).expect("a running unit has a cgroup");
    assert_eq!(systemd::processes_below(&cgroup), [container.pid()]);
    assert_eq!(
        systemd::processes_below(&cgroup.join(&container.id)),
        [container.pid()],
        "in a cgroup of its own"
    );
    wait::until_true("one daemon and no helper", || {
        process::named("containerd-shim") == [systemd::main_pid(systemd::DAEMON_SERVICE)]
    });
}

#[test]
fn a_systemd_cgroups_path_names_slice_and_scope() {
    needs!(OurShim);
    let node = Node::shared();
    let spec = Spec::sleeping().cgroups_path("e2e-pod.slice:cri-containerd:abc");
    let container = node.container("scope", spec).started(&Io::default());
    let unit = systemd::unit_of(&container);
    assert_eq!(systemd::property(&unit, "Slice"), "e2e-pod.slice");
    let cgroup = systemd::cgroup(&unit).expect("a running unit has a cgroup");
    assert_eq!(systemd::processes_below(&cgroup.join("cri-containerd-abc.scope")), [container.pid()]);
}

#[test]
fn status_shows_the_containers_processes() {
    needs!(OurShim);
    let node = Node::shared();
    let container = node.container("status", Spec::sleeping()).started(&Io::default());
    let unit = systemd::unit_of(&container);
    // Start returns before the container's init has become the program.
    wait::until_true("the program runs", || process::named("sleep").contains(&container.pid()));
    let status = process::succeed("systemctl", &["status", "--full", "--no-pager", "--lines=0", &unit]);
    for part in ["Active: active", "CGroup:", "sleep 100000", &container.id, &container.pid().to_string()] {
        assert!(status.contains(part), "{part:?} is not in:\n{status}");
    }
    assert!(systemd::property(&unit, "Description").contains(&container.id));
}

#[test]
fn systemctl_stop_ends_the_task() {
    needs!(OurShim);
    let node = Node::shared();
    let events = node.subscribe();
    let container = ready(&node, "stop", Spec::sh(ENDS_ON_TERM));
    process::succeed("systemctl", &["stop", &systemd::unit_of(&container)]);
    assert_eq!(container.exit_status(), 143);
    assert_eq!(events.exit_of(&container).exit_status, 143);
    container.delete().expect("delete");
}

#[test]
fn systemctl_stop_ends_a_created_task() {
    needs!(OurShim);
    let node = Node::shared();
    let container = node.container("stop-created", Spec::sleeping()).created(&Io::default());
    process::succeed("systemctl", &["stop", &systemd::unit_of(&container)]);
    let status = container.exit_status();
    // The process that waits for Start is the OCI runtime's init. That of runc, a Go program, exits with 2.
    assert!([2, 137, 143].contains(&status), "{status}");
    container.start().expect_err("start a stopped task");
    container.delete().expect("delete");
}

#[test]
fn exits_are_noticed_during_reloads_and_reexecutions_of_systemd() {
    needs!(OurShim);
    let node = Node::exclusive();
    for (verb, status) in [("daemon-reload", 21), ("daemon-reexec", 22)] {
        let container = ready(
            &node,
            verb,
            Spec::sh(&format!("trap 'exit {status}' TERM; echo ready; sleep 100000 & wait")),
        );
        thread::scope(|scope| {
            scope.spawn(|| process::succeed("systemctl", &[verb]));
            container.kill(SIGTERM).expect("kill");
        });
        assert_eq!(container.exit_status(), status, "{verb}");
        container.delete().expect("delete");
    }
}

#[test]
fn containers_run_during_reloads_and_reexecutions_of_systemd_and_leave_nothing() {
    needs!(OurShim);
    let node = Node::exclusive();
    // The daemon creates what it keeps for the first container.
    node.container("first", Spec::sh("exit 0")).started(&Io::default()).wait().expect("wait");
    for verb in ["daemon-reload", "daemon-reexec"] {
        // A reference to a unit over a wrong connection would keep the unit loaded after its Delete.
        let before = Traces::take();
        thread::scope(|scope| {
            scope.spawn(|| (0..3).for_each(|_| drop(process::succeed("systemctl", &[verb]))));
            for status in 0..10 {
                let container =
                    node.container("reload", Spec::sh(&format!("exit {status}"))).started(&Io::default());
                assert_eq!(container.exit_status(), status, "{verb}");
                container.delete().expect("delete");
            }
        });
        leaks::assert_none(verb, &before);
    }
}

#[test]
fn systemctl_kill_ends_the_task() {
    needs!(OurShim);
    let node = Node::shared();
    let events = node.subscribe();
    let container = node.container("kill", Spec::sleeping()).started(&Io::default());
    process::succeed("systemctl", &["kill", "--signal=KILL", &systemd::unit_of(&container)]);
    assert_eq!(container.exit_status(), 137);
    assert_eq!(events.exit_of(&container).exit_status, 137);
}

#[test]
fn an_exit_code_stays_readable_in_systemd_until_delete() {
    needs!(OurShim);
    let node = Node::shared();
    let container = node.container("code", Spec::sh("exit 77")).started(&Io::default());
    let unit = systemd::unit_of(&container);
    assert_eq!(container.exit_status(), 77);
    assert_eq!(systemd::property(&unit, "ExecMainStatus"), "77");
    container.delete().expect("delete");
    wait::until_true("the unit is gone", || systemd::list_units(&unit).is_empty());
}

#[test]
fn systemctl_restart_is_a_stop() {
    needs!(OurShim);
    let node = Node::shared();
    let scratch = Scratch::new("restart");
    let script = format!("echo run >> /scratch/runs; {ENDS_ON_TERM}");
    let container = ready(&node, "restart", Spec::sh(&script).bind(scratch.as_str(), "/scratch", &["rw"]));
    // The job fails, because a container can't be started a second time.
    process::run("systemctl", &["restart", &systemd::unit_of(&container)]);
    assert_eq!(container.exit_status(), 143);
    assert_eq!(scratch.read("runs"), "run\n");
    container.delete().expect("delete");
    assert_eq!(scratch.read("runs"), "run\n");
}

#[test]
fn somebody_who_starts_an_ended_unit_does_not_change_its_exit_code() {
    needs!(OurShim);
    let node = Node::exclusive();
    for verb in ["start", "restart"] {
        let container = ready(&node, verb, Spec::sh(&ENDS_ON_TERM.replace("143", "6")));
        let unit = systemd::unit_of(&container);
        let down = daemon::Down::begin();
        process::succeed("systemctl", &["kill", "--signal=TERM", &unit]);
        wait::until_true("systemd has the exit", || systemd::property(&unit, "ExecMainStatus") == "6");
        let begun = process::run("systemctl", &[verb, &unit]);
        assert_ne!(begun.code, Some(0), "{verb}");
        down.end();
        assert_eq!(container.exit_status(), 6, "{verb}");
        container.delete().expect("delete");
    }
}

#[test]
fn a_drop_in_of_the_namespace_applies_to_its_containers() {
    needs!(OurShim);
    let node = Node::exclusive();
    let namespace = "e2e-policy";
    let policy = "[Service]\nTimeoutStopSec=1s\nEnvironment=E2E=1\nLogExtraFields=E2E_POLICY=yes\n";
    let _drop_in = DropIn::for_namespace(namespace, policy);
    // The daemon copies the output, or the unit has a socket of the journal.
    for mode in ["auto", "client"] {
        let logged = node.container("policy", Spec::sh("echo under policy"));
        let logged = logged.namespace(namespace).options(log_modes::log(mode)).started(&Io::default());
        let id = format!("CONTAINER_ID={}", logged.id);
        wait::until_true("a line with the fields of both", || {
            systemd::messages(&[&id, "E2E_POLICY=yes"]).contains(&"under policy".to_string())
        });
    }
    let container = node.container("policy", Spec::sleeping()).namespace(namespace).started(&Io::default());
    let unit = systemd::unit_of(&container);
    assert_eq!(systemd::property(&unit, "TimeoutStopUSec"), "1s");
    let environment = systemd::property(&unit, "Environment");
    assert!(environment.split(' ').any(|variable| variable == "E2E=1"), "{environment}");
    // PID 1 of a pid namespace ignores SIGTERM, so this ends after the limit of the policy.
    process::succeed("systemctl", &["stop", &unit]);
    assert_eq!(container.exit_status(), 137);
}

#[test]
fn without_client_stdio_the_output_is_in_the_journal() {
    needs!(OurShim);
    let node = Node::shared();
    let script = "echo one; echo two >&2; i=0; while [ $i -lt 100 ]; do echo line $i; i=$((i+1)); done";
    let container = node.container("journal", Spec::sh(script)).started(&Io::default());
    assert_eq!(container.exit_status(), 0);
    let by_unit = format!("--unit={}", systemd::unit_of(&container));
    let by_id = format!("CONTAINER_ID={}", container.id);
    for by in [by_unit, by_id] {
        let messages = wait::until("the last line", || {
            let messages = systemd::messages(&[&by]);
            messages.contains(&"line 99".to_string()).then_some(messages)
        });
        let lines = messages.iter().filter(|message| message.starts_with("line ")).count();
        assert_eq!(lines, 100, "{by}");
        for line in ["one", "two"] {
            assert!(messages.contains(&line.to_string()), "{line} by {by}");
        }
    }
}

#[test]
fn journal_entries_name_their_container() {
    needs!(OurShim);
    let node = Node::shared();
    let container = node.container("fields", Spec::sh("echo hello")).started(&Io::default());
    container.wait().expect("wait");
    let by_id = format!("CONTAINER_ID={}", container.id);
    let entry = wait::until("the line", || {
        systemd::journal(&[&by_id]).into_iter().find(|entry| entry["MESSAGE"] == "hello")
    });
    assert_eq!(entry["CONTAINER_NAMESPACE"], container.namespace.as_str());
    assert!(entry["CONTAINER_NAME"].is_string(), "{entry}");
    let shown =
        process::succeed("journalctl", &["--no-pager", "--output=cat", "-u", &systemd::unit_of(&container)]);
    assert!(shown.lines().any(|line| line == "hello"), "{shown}");
}

#[test]
fn a_unit_file_or_a_mask_of_the_same_name_is_left_alone() {
    needs!(OurShim);
    let node = Node::shared();
    for is_masked in [false, true] {
        let container = node.container("named", Spec::sh("exit 6")).make();
        let path = format!("/etc/systemd/system/{}", systemd::unit_of(&container));
        let _removed = UnitFile::new(&path, is_masked);
        container.create(&Io::default()).expect("create");
        container.start().expect("start");
        assert_eq!(container.exit_status(), 6);
        container.delete().expect("delete");
        assert!(fs::symlink_metadata(&path).is_ok());
    }
}

/// A file of an administrator.
struct UnitFile<'p>(&'p str);

impl UnitFile<'_> {
    fn new(path: &str, is_masked: bool) -> UnitFile<'_> {
        if is_masked {
            std::os::unix::fs::symlink("/dev/null", path).expect("mask the unit");
        } else {
            fs::write(path, "[Service]\nExecStart=/bin/true\n").expect("write the unit");
        }
        process::succeed("systemctl", &["daemon-reload"]);
        UnitFile(path)
    }
}

impl Drop for UnitFile<'_> {
    fn drop(&mut self) {
        let _ = fs::remove_file(self.0);
        process::run("systemctl", &["daemon-reload"]);
    }
}
