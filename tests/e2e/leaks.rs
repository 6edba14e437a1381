//! Nothing is left after Delete or after a failure, and the daemon does not grow.

use std::fs;

use containerd_client::types::Mount;

use crate::attached;
use crate::common::container::Container;
use crate::common::leaks::{self, Traces, task_directory};
use crate::common::node::{Node, OUR_RUNTIME, unique};
use crate::common::spec::Spec;
use crate::common::stdio::Fifos;
use crate::common::systemd::{self, DropIn};
use crate::common::task::{Io, SIGKILL};
use crate::common::{daemon, process, wait};
use crate::runtime_options::{Noting, runc_options};

/// Enough to fill every cache and buffer that is filled once.
const WARM_UP: u32 = 20;
const MAX_GROWTH_KIB: u64 = 1024;

/// A failing operation, after which nothing may be left.
type Step = fn(&Node);

/// The life of an exec, up to its delete.
type ExecStep = fn(&Container);

/// How often a container is created, started, ended and deleted.
fn cycles() -> u32 {
    std::env::var("E2E_CYCLES").ok().and_then(|cycles| cycles.parse().ok()).unwrap_or(200)
}

/// How often operations are repeated that have several variants.
fn repeats() -> u32 {
    (cycles() / 20).max(3)
}

/// The daemon's memory before a test. `None` with the stock shim, which has no daemon.
struct Memory(Option<u64>);

impl Memory {
    fn of_daemon(node: &Node) -> Memory {
        Memory((node.runtime == OUR_RUNTIME).then(Self::pss_kib))
    }

    fn assert_bounded(&self) {
        if let Memory(Some(before)) = self {
            let after = Self::pss_kib();
            assert!(after < before + MAX_GROWTH_KIB, "the daemon grew from {before} to {after} KiB");
        }
    }

    fn pss_kib() -> u64 {
        process::pss_kib(systemd::main_pid(systemd::DAEMON_SERVICE)).expect("the Pss of the daemon")
    }
}

fn run_rest(node: &Node) {
    let container = node.container("cycle", Spec::new(&["/bin/true"])).started(&Io::default());
    assert_eq!(container.exit_status(), 0);
    container.delete().expect("delete");
}

#[test]
fn a_live_container_leaves_traces() {
    // This checks the search itself: it has to find the traces of a container that runs.
    let node = Node::exclusive();
    run_rest(&node);
    let before = Traces::take();
    let _container = node.container("live", Spec::sleeping()).started(&Io::default());
    let traces = Traces::take().since(&before);
    let ours = if node.runtime == OUR_RUNTIME {
        &["unit", "state file", "log-extra-fields file"][..]
    } else {
        &["mount"]
    };
    for kind in [&["cgroup", "runc state", "bundle"], ours].concat() {
        assert!(traces.iter().any(|trace| trace.starts_with(kind)), "no {kind} in {traces:#?}");
    }
}

#[test]
fn many_containers_leave_nothing() {
    let node = Node::exclusive();
    (0..WARM_UP).for_each(|_| run_rest(&node));
    let before = Traces::take();
    let memory = Memory::of_daemon(&node);
    (0..cycles()).for_each(|_| run_rest(&node));
    leaks::assert_none("containers that ran to their end", &before);
    memory.assert_bounded();
}

#[test]
fn a_failure_in_any_step_leaves_nothing() {
    let node = Node::exclusive();
    let steps: [(&str, Step); 9] = [
        ("a runtime that is not there", runtime_missing),
        ("a rootfs that can't be mounted", rootfs_broken),
        ("a command that is not there", command_missing),
        ("a stdout that is a directory", stdout_broken),
        ("a runtime that fails at create", create_failing),
        ("a runtime that fails at start", start_failing),
        ("a client that is gone", client_gone),
        ("a runtime that fails at exec", exec_failing),
        ("execs that nobody deleted", execs_undeleted),
    ];
    run_rest(&node);
    for (what, step) in steps {
        step(&node);
        let before = Traces::take();
        (0..repeats()).for_each(|_| step(&node));
        leaks::assert_none(what, &before);
    }
}

#[test]
fn many_execs_of_each_kind_leave_nothing() {
    let node = Node::exclusive();
    let container = node.container("execs", Spec::sleeping()).started(&Io::default());
    let kinds: [(&str, ExecStep); 5] = [
        ("execs that ran to their end", exec_plain),
        ("execs with a terminal", exec_terminal),
        ("execs of a command that is not there", exec_missing),
        ("execs that were never started", exec_unstarted),
        ("execs whose client was gone", exec_client_gone),
    ];
    for _ in 0..WARM_UP {
        kinds.iter().for_each(|(_, step)| step(&container));
    }
    let memory = Memory::of_daemon(&node);
    for (what, step) in kinds {
        let before = Traces::take();
        (0..cycles()).for_each(|_| step(&container));
        leaks::assert_none(what, &before);
    }
    memory.assert_bounded();
    assert_eq!(container.pids().expect("pids"), [container.pid()], "no process is left");
}

#[test]
fn a_unit_that_cant_start_leaves_nothing() {
    needs!(OurShim);
    let node = Node::exclusive();
    let namespace = "e2e-no-start";
    let fails = || {
        let container = node.container("no-unit", Spec::sleeping()).namespace(namespace).make();
        container.create(&Io::default()).expect_err("a unit whose start fails");
    };
    let _drop_in = DropIn::for_namespace(namespace, "[Service]\nExecStartPre=/bin/false\n");
    fails();
    let before = Traces::take();
    (0..repeats()).for_each(|_| fails());
    leaks::assert_none("units that can't start", &before);
}

#[test]
fn units_that_fail_while_they_are_stopped_leave_nothing() {
    needs!(OurShim);
    let node = Node::exclusive();
    let namespace = unique("e2e-stop-fails");
    let live = || {
        let container =
            node.container("stopped", Spec::sleeping()).namespace(&namespace).started(&Io::default());
        let exec = container.exec_sh("exit 4");
        assert_eq!(exec.exit_status(), 4);
        exec.delete().expect("delete an exec");
        let undeleted = container.exec_sh("exit 5");
        assert_eq!(undeleted.exit_status(), 5);
        container.kill(SIGKILL).expect("kill");
        assert_eq!(container.exit_status(), 137);
        container.delete().expect("delete");
        drop(undeleted);
    };
    let _drop_in = DropIn::for_namespace(&namespace, "[Service]\nExecStopPost=/bin/false\n");
    live();
    let before = Traces::take();
    (0..repeats()).for_each(|_| live());
    leaks::assert_none("units that fail while they are stopped", &before);
}

#[test]
fn containers_that_run_side_by_side_leave_nothing() {
    let node = Node::exclusive();
    run_rest(&node);
    let before = Traces::take();
    {
        let running: Vec<_> =
            (0..20).map(|_| node.container("many", Spec::sleeping()).started(&Io::default())).collect();
        running.iter().for_each(|container| container.kill(SIGKILL).expect("kill"));
        for container in running {
            assert_eq!(container.exit_status(), 137);
            container.delete().expect("delete");
        }
    }
    leaks::assert_none("twenty containers at once", &before);
}

fn runtime_missing(node: &Node) {
    let options = runc_options(|options| options.binary_name = "/no/such/runc".to_string());
    let container = node.container("no-runc", Spec::sleeping()).options(options).make();
    container.create(&Io::default()).expect_err("no runc");
}

fn rootfs_broken(node: &Node) {
    let mut container = node.container("no-rootfs", Spec::sleeping()).make();
    let source = "/no/such/device".to_string();
    container.mounts.push(Mount { r#type: "ext4".to_string(), source, ..Default::default() });
    container.create(&Io::default()).expect_err("a mount that fails");
}

fn command_missing(node: &Node) {
    let container = node.container("no-command", Spec::new(&["/no/such/command"])).make();
    container.create(&Io::default()).and_then(|_| container.start()).expect_err("no command");
}

fn stdout_broken(node: &Node) {
    let container = node.container("no-stdout", Spec::sleeping()).make();
    let io = Io { stdout: "/run".to_string(), stderr: "/run".to_string(), ..Io::default() };
    container.create(&io).expect_err("a directory");
}

fn create_failing(node: &Node) {
    // The Create fails after runc has made its container, so that there is something to clean up.
    let runtime = Noting::new("runc", "case \" $* \" in *' create '*) runc \"$@\"; exit 1;; esac");
    let options = runc_options(|options| options.binary_name = runtime.path());
    let container = node.container("no-create", Spec::sleeping()).options(options).make();
    container.create(&Io::default()).expect_err("a create that fails late");
}

fn start_failing(node: &Node) {
    let runtime = Noting::new("runc", "case \" $* \" in *' start '*) exit 1;; esac");
    let options = runc_options(|options| options.binary_name = runtime.path());
    let container = node.container("no-start", Spec::sleeping()).options(options).created(&Io::default());
    container.start().expect_err("a start that fails");
}

fn client_gone(node: &Node) {
    let fifos = Fifos::new("gone");
    let readers = (fifos.stdout(), fifos.stderr());
    let container = node.container("gone", Spec::sh("seq 1 100000")).created(&fifos.io());
    drop(readers);
    container.start().expect("start");
}

fn exec_failing(node: &Node) {
    let runtime = Noting::new("runc", "case \" $* \" in *' exec '*) exit 1;; esac");
    let options = runc_options(|options| options.binary_name = runtime.path());
    let container = node.container("no-exec", Spec::sleeping()).options(options).started(&Io::default());
    for spec in [Spec::sleeping(), Spec::sleeping().terminal()] {
        let fifos = Fifos::new("no-exec");
        let _readers = (fifos.stdout(), fifos.stderr());
        let exec = container.exec(spec).added(&fifos.io());
        exec.start().expect_err("an exec that fails");
    }
}

fn execs_undeleted(node: &Node) {
    let container = node.container("undeleted", Spec::sleeping()).started(&Io::default());
    let fifos = Fifos::new("undeleted");
    let _readers = (fifos.stdout(), fifos.stderr());
    let unstarted = container.exec(Spec::sleeping()).added(&fifos.io());
    let ended = container.exec(Spec::new(&["/bin/true"])).started(&Io::default());
    ended.wait().expect("wait");
    let running = container.exec(Spec::sleeping().terminal()).started(&fifos.terminal());
    container.kill(SIGKILL).expect("kill");
    container.wait().expect("wait");
    container.delete().expect("delete");
    drop((unstarted, ended, running));
}

fn exec_plain(container: &Container) {
    let exec = container.exec(Spec::new(&["/bin/true"])).started(&Io::default());
    assert_eq!(exec.exit_status(), 0);
    exec.delete().expect("delete");
}

fn exec_terminal(container: &Container) {
    let (exec, mut client) = attached::exec(container, Spec::sh("echo hi").terminal());
    assert_eq!(client.stdout.text(), "hi\r\n");
    assert_eq!(exec.exit_status(), 0);
    exec.delete().expect("delete");
}

fn exec_missing(container: &Container) {
    let exec = container.exec(Spec::new(&["/no/such/command"])).added(&Io::default());
    exec.start().expect_err("no command");
    exec.delete().expect("delete");
}

fn exec_unstarted(container: &Container) {
    let fifos = Fifos::new("unstarted");
    let _readers = (fifos.stdout(), fifos.stderr());
    container.exec(Spec::sleeping()).added(&fifos.io()).delete().expect("delete");
}

fn exec_client_gone(container: &Container) {
    let (exec, client) = attached::exec(container, Spec::sh("read go; echo unread"));
    client.enter("go\n");
    drop(client);
    exec.wait().expect("wait");
    exec.delete().expect("delete");
}

#[test]
fn leftovers_of_a_failed_create_are_removed_later() {
    needs!(OurShim);
    let node = Node::exclusive();
    // The first use of the runtime makes objects that stay until a reboot.
    node.container("warm", Spec::sleeping()).started(&Io::default()).end();
    let before = Traces::take();
    for again in [false, true] {
        let flag = format!("/run/{}", unique("e2e-flag"));
        fs::write(&flag, "").expect("make a flag");
        let script = format!(
            "case \" $* \" in *' create '*) runc \"$@\"; exit 1;; *' delete '*) [ ! -e {flag} ] || exit 1;; esac"
        );
        let runtime = Noting::new("runc", &script);
        let options = runc_options(|options| options.binary_name = runtime.path());
        let container = node.container("stuck", Spec::sleeping()).options(options).make();
        container.create(&Io::default()).expect_err("a create that fails late");
        let record = task_directory(&container.id).join("record.json");
        assert!(record.exists(), "the record stays while something is left");
        fs::remove_file(&flag).expect("let the OCI runtime delete again");
        if again {
            // The create fails again, and this time everything can be removed.
            container.create(&Io::default()).expect_err("a create that fails late");
        } else {
            daemon::killed();
        }
        wait::until_true("the record is gone", || !record.exists());
    }
    leaks::assert_none("a create that could not be rolled back", &before);
}
