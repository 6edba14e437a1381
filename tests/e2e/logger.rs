//! `binary://` loggers: programs of the user that read stdout from fd 3 and stderr from fd 4, and report their
//! readiness on fd 5.

use std::fs;
use std::os::unix::fs::PermissionsExt;

use nix::sys::signal::Signal;

use crate::common::node::Node;
use crate::common::spec::Spec;
use crate::common::stdio::{Gate, Scratch};
use crate::common::task::Io;
use crate::common::{daemon, systemd, wait};

/// A logger that writes its input to files in its own directory.
pub struct Logger {
    pub scratch: Scratch,
}

impl Logger {
    /// With the command `ready`, the logger reports that it is ready.
    pub fn new(ready: &str) -> Logger {
        let scratch = Scratch::new("logger");
        let directory = scratch.as_str();
        let script = format!(
            "#!/bin/sh\n\
             cd {directory}\n\
             echo \"$@\" > args; env > env; ls /proc/self/fd > fds\n\
             trap '' TERM\n\
             {ready}\n\
             cat <&3 > out & cat <&4 > err &\n\
             wait; echo ended > end\n"
        );
        let path = scratch.join("logger.sh");
        fs::write(&path, script).expect("write the logger");
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).expect("make the logger executable");
        Logger { scratch }
    }

    pub fn io(&self, scheme: &str, query: &str) -> Io {
        let uri = format!("{scheme}://{}{query}", self.scratch.text("logger.sh"));
        Io { stdout: uri.clone(), stderr: uri, ..Io::default() }
    }

    /// Waits until the logger has seen the end of both streams.
    pub fn ended(&self) {
        wait::until_true("the logger sees EOF", || self.scratch.read("end") == "ended\n");
    }
}

#[test]
fn a_binary_logger_gets_both_streams_its_arguments_and_its_environment() {
    let node = Node::shared();
    let logger = Logger::new("exec 5>&-");
    let io = logger.io("binary", "?key=value&flag=");
    let script = "echo out; echo err >&2; seq 1 20000";
    let container = node.container("logger", Spec::sh(script)).started(&io);
    assert_eq!(container.exit_status(), 0);
    container.delete().expect("delete");
    logger.ended();

    let out = logger.scratch.read("out");
    assert!(out.starts_with("out\n1\n2\n") && out.ends_with("\n20000\n"), "{} bytes", out.len());
    assert_eq!(out.lines().count(), 20_001);
    assert_eq!(logger.scratch.read("err"), "err\n");
    let args = logger.scratch.read("args");
    let args: Vec<&str> = args.trim_end_matches('\n').split(' ').collect();
    assert!(args.windows(2).any(|pair| pair == ["key", "value"]) && args.contains(&"flag"), "{args:?}");
    let env = logger.scratch.read("env");
    for expected in
        [format!("CONTAINER_ID={}", container.id), format!("CONTAINER_NAMESPACE={}", container.namespace)]
    {
        assert!(env.lines().any(|line| line == expected), "{expected} in {env}");
    }
}

#[test]
fn a_logger_is_ready_after_a_byte_or_a_closed_pipe() {
    let node = Node::shared();
    let logger = Logger::new("printf x >&5; exec 5>&-");
    let container = node.container("logger", Spec::sh("echo hello")).started(&logger.io("binary", ""));
    assert_eq!(container.exit_status(), 0);
    container.delete().expect("delete");
    logger.ended();
    assert_eq!(logger.scratch.read("out"), "hello\n");
}

#[test]
fn a_missing_logger_program_fails_the_create() {
    let node = Node::shared();
    let uri = "binary:///no/such/logger".to_string();
    let container = node.container("no-logger", Spec::sleeping()).make();
    let io = Io { stdout: uri.clone(), stderr: uri, ..Io::default() };
    let refusal = container.create(&io).expect_err("no logger");
    assert!(refusal.message().contains("/no/such/logger"), "{refusal}");
}

#[test]
fn a_logger_program_that_cannot_be_executed_fails_the_create() {
    let node = Node::shared();
    for (name, text, mode) in [
        ("mode", "#!/bin/sh\n", 0o644),
        ("format", "\0", 0o755),
        ("interpreter", "#!/no/such/shell\n", 0o755),
    ] {
        let logger = Logger::new("exec 5>&-");
        let path = logger.scratch.join("logger.sh");
        fs::write(&path, text).expect("write the program");
        fs::set_permissions(&path, fs::Permissions::from_mode(mode)).expect("set its mode");
        let container = node.container(&format!("logger-{name}"), Spec::sleeping()).make();
        let refusal = container.create(&logger.io("binary", "")).expect_err(name);
        let reasons = ["ermission denied", "xec format error", "o such file or directory"];
        assert!(reasons.iter().any(|reason| refusal.message().contains(reason)), "{name}: {refusal}");
    }
}

#[test]
fn a_binary_v2_logger_is_ready_only_after_a_byte() {
    needs!(OurShim); // the stock shim knows binary-v2 from containerd 2.3 on
    let node = Node::shared();
    let ready = Logger::new("printf x >&5; exec 5>&-");
    let container = node.container("logger", Spec::sh("echo hello")).started(&ready.io("binary-v2", ""));
    assert_eq!(container.exit_status(), 0);

    let silent = Logger::new("exec 5>&-");
    let container = node.container("logger", Spec::sleeping()).make();
    container.create(&silent.io("binary-v2", "")).expect_err("a logger that did not say ready");
}

#[test]
fn a_logger_has_a_unit_of_its_own_and_only_its_descriptors() {
    needs!(OurShim);
    let node = Node::shared();
    let logger = Logger::new("exec 5>&-");
    let container = node.container("logger", Spec::sh("exec sleep 100000")).started(&logger.io("binary", ""));
    let unit = systemd::unit_of(&container).replace(".service", "::log.service");
    assert!(systemd::is_active(&unit), "{unit}");
    assert_eq!(systemd::property(&unit, "InvocationID").len(), 32);
    let cgroup = systemd::cgroup(&systemd::unit_of(&container)).expect("a running unit has a cgroup");
    assert_eq!(
        systemd::processes_below(&cgroup),
        [container.pid()],
        "the logger is not in the container's unit"
    );
    // These are 0 to 5, and the one with which ls reads the list.
    let fds = logger.scratch.read("fds");
    assert_eq!(fds.lines().collect::<Vec<_>>(), ["0", "1", "2", "3", "4", "5", "6"]);
    container.kill(9).expect("kill");
    container.wait().expect("wait");
    container.delete().expect("delete");
    logger.ended();
    wait::until_true("the logger's unit is gone", || systemd::list_units(&unit).is_empty());
}

/// A process that writes one line, waits for its gate, and writes more than a pipe holds.
fn writer() -> String {
    format!("echo one; {}; seq 1 20000; exit 7", Gate::WAIT)
}

/// Kills the logger in a unit after the first line of [`writer`]; everything arrives, once.
fn kill_and_read_on(unit: &str, logger: &Logger, gate: &Gate, exit_status: impl FnOnce() -> u32) {
    wait::until_true("the first line is there", || logger.scratch.read("all") == "one\n");
    kill_logger(unit);
    read_on(logger, gate, exit_status);
}

fn kill_logger(unit: &str) {
    let first: u32 = systemd::property(unit, "MainPID").parse().expect("a pid");
    daemon::signal(first, Signal::SIGKILL);
    wait::until_true("it is gone", || systemd::property(unit, "MainPID") != first.to_string());
}

fn read_on(logger: &Logger, gate: &Gate, exit_status: impl FnOnce() -> u32) {
    gate.open();
    assert_eq!(exit_status(), 7);
    let all = (1..=20_000).fold("one\n".to_string(), |all, number| all + &format!("{number}\n"));
    wait::until_true("every line is there, once", || logger.scratch.read("all") == all);
}

#[test]
fn a_logger_that_is_killed_is_started_again_and_output_waits_for_it() {
    needs!(OurShim);
    let node = Node::shared();
    let (logger, gate) = (Logger::new("exec 5>&-; exec cat <&3 >> all"), Gate::new());
    let container =
        node.container("logger", gate.bind(Spec::sh(&writer()))).started(&logger.io("binary", ""));
    let unit = systemd::unit_of(&container).replace(".service", "::log.service");
    kill_and_read_on(&unit, &logger, &gate, || container.exit_status());
    container.delete().expect("delete");
    wait::until_true("the logger's unit is gone", || systemd::list_units(&unit).is_empty());
}

#[test]
fn a_logger_and_the_daemon_that_are_killed_together_lose_no_output() {
    needs!(OurShim);
    let node = Node::exclusive();
    for kill in [daemon::kill_now, daemon::kill_cgroup_now] {
        let (logger, gate) = (Logger::new("exec 5>&-; exec cat <&3 >> all"), Gate::new());
        let container =
            node.container("logger", gate.bind(Spec::sh(&writer()))).started(&logger.io("binary", ""));
        let unit = systemd::unit_of(&container).replace(".service", "::log.service");
        wait::until_true("the first line is there", || logger.scratch.read("all") == "one\n");
        std::thread::scope(|scope| {
            scope.spawn(kill);
            kill_logger(&unit);
        });
        read_on(&logger, &gate, || container.exit_status());
        container.delete().expect("delete");
        wait::until_true("the logger's unit is gone", || systemd::list_units(&unit).is_empty());
    }
}

#[test]
fn a_create_completes_although_the_daemon_and_a_logger_that_is_not_ready_are_killed() {
    needs!(OurShim);
    let node = Node::exclusive();
    let gate = Gate::new();
    // The first logger never becomes ready.
    let ready = "echo start >> starts; [ \"$(wc -l <starts)\" != 1 ] || exec sleep 100000; exec 5>&-; exec cat <&3 >> all";
    let logger = Logger::new(ready);
    let container = node.container("logger", gate.bind(Spec::sh(&writer()))).make();
    std::thread::scope(|scope| {
        let created = scope.spawn(|| container.create(&logger.io("binary", "")));
        wait::until_true("the logger runs", || logger.scratch.read("starts") == "start\n");
        let unit = wait::until("the logger has a unit", || {
            let units = systemd::list_units("containerd-*::log.service");
            units.into_iter().find_map(|line| line.split_whitespace().next().map(str::to_string))
        });
        scope.spawn(daemon::kill_now);
        kill_logger(&unit);
        created.join().expect("create does not panic").expect("create");
    });
    container.start().expect("start");
    wait::until_true("the first line is there", || logger.scratch.read("all") == "one\n");
    read_on(&logger, &gate, || container.exit_status());
    container.delete().expect("delete");
}

#[test]
fn the_logger_of_an_exec_is_started_again_as_well() {
    needs!(OurShim);
    let node = Node::shared();
    let (logger, gate) = (Logger::new("exec 5>&-; exec cat <&3 >> all"), Gate::new());
    let container = node.container("logger", gate.bind(Spec::sleeping())).started(&Io::default());
    let exec = container.exec(Spec::sh(&writer())).started(&logger.io("binary", ""));
    let unit = systemd::unit_of_exec(&container, &exec).replace(".service", "::log.service");
    kill_and_read_on(&unit, &logger, &gate, || exec.exit_status());
    exec.delete().expect("delete");
    container.end();
}

#[test]
fn a_logger_whose_process_has_ended_is_not_started_again() {
    needs!(OurShim);
    let node = Node::shared();
    let logger = Logger::new("exec 5>&-; echo start >> starts");
    let container = node.container("logger", Spec::sh("echo hello")).started(&logger.io("binary", ""));
    let unit = systemd::unit_of(&container).replace(".service", "::log.service");
    assert_eq!(container.exit_status(), 0);
    logger.ended();
    wait::until_true("the logger's unit is gone", || systemd::list_units(&unit).is_empty());
    assert_eq!(logger.scratch.read("starts"), "start\n");
    container.delete().expect("delete");
}

#[test]
fn a_container_whose_logger_always_ends_can_be_killed_and_deleted() {
    needs!(OurShim);
    let node = Node::shared();
    let logger = Logger::new("exec 5>&-; echo start >> starts; exit 1");
    let container = node.container("logger", Spec::sh("exec yes")).started(&logger.io("binary", ""));
    let unit = systemd::unit_of(&container).replace(".service", "::log.service");
    wait::until_true("it is started again", || logger.scratch.read("starts").lines().count() > 1);
    container.kill(9).expect("kill");
    assert_eq!(container.exit_status(), 137);
    container.delete().expect("delete");
    wait::until_true("the logger's unit is gone", || systemd::list_units(&unit).is_empty());
}
