//! Checkpoint and restore, with criu, in the lane `vm`. Each dump takes seconds there.

use std::fs;
use std::path::Path;
use std::process::Command;

use containerd_client::tonic::Code;
use containerd_client::types::v1::Status;

use crate::common::checkpoint::{COUNTING, Criu, last, options, take};
use crate::common::node::{Node, number};
use crate::common::shim::{self, Shim, WithFaults};
use crate::common::spec::Spec;
use crate::common::stdio::{Fifos, Scratch};
use crate::common::task::{Io, SIGKILL, SIGTERM, assert_refused};
use crate::common::{cgroup, daemon, process, systemd, wait};
use crate::crash_points::REQUEST;
use crate::log_modes;

/// True for the points of a checkpoint or of a restore.
pub fn is_point(point: &str) -> bool {
    ["checkpoint.", "create-checkpoint.", "restore."].iter().any(|call| point.starts_with(call))
}

#[test]
fn a_task_continues_after_its_checkpoint_and_is_restored_twice() {
    needs!(OurShim, Criu);
    let node = Node::exclusive();
    let (events, copies) = (node.subscribe(), node.subscribe());
    let fifos = Fifos::new("checkpoint");
    let (mut stdout, _stderr) = (fifos.stdout(), fifos.stderr());
    let original = node.container("original", Spec::sh(COUNTING)).started(&fifos.io());
    stdout.until(|bytes| bytes.ends_with(b"3\n"));
    original.pause().expect("pause");
    let images = original.checkpoint(options(|_| {})).expect("checkpoint");
    assert_eq!(original.phase(), Status::Paused, "as it was");
    let unit = systemd::unit_of(&original);
    assert_eq!(systemd::property(&unit, "FreezerState"), "frozen");
    original.resume().expect("resume");
    let before = last(&stdout.until(|bytes| bytes.ends_with(b"\n")));
    assert!(last(&stdout.until(|bytes| bytes.len() > 20)) > before, "the original continues");

    for name in ["first", "second"] {
        let fifos = Fifos::new("restored");
        let (mut stdout, _stderr) = (fifos.stdout(), fifos.stderr());
        let copy = node.container(name, Spec::sh(COUNTING)).make();
        assert_eq!(copy.create_from(&images, &fifos.io()).expect("create"), 0);
        assert_eq!((copy.phase(), copy.pid()), (Status::Created, 0));
        assert_refused(copy.exec(Spec::sh("true")).add(&Io::default()).map(drop));
        let pid = copy.start().expect("restore");
        let seen = last(&stdout.until(|bytes| bytes.ends_with(b"\n")));
        assert!((3..60).contains(&seen), "it continues where the original was: {seen}");
        assert_eq!((copy.phase(), copy.pid()), (Status::Running, pid));
        let unit = systemd::unit_of(&copy);
        assert_eq!(systemd::main_pid(&unit), pid);
        assert!(cgroup::of(pid).starts_with(systemd::cgroup(&unit).expect("the unit has a cgroup")));
        assert!(copy.pids().expect("pids").contains(&pid) && copy.metrics().is_some());
        let exec = copy.exec(Spec::sh("exit 5")).add(&Io::default()).expect("exec");
        exec.start().expect("start an exec");
        assert_eq!(exec.exit_status(), 5);
        copy.kill(SIGTERM).expect("kill");
        assert_eq!(copy.exit_status(), 7, "its trap is restored, too");
        copy.delete().expect("delete");
        let events = copies.names_up_to(&copy, "delete");
        assert_eq!(events, ["create", "start", "exec-added", "exec-started", "exec-exit", "exit", "delete"]);
    }
    assert_eq!(
        original.phase(),
        Status::Running,
        "the original has nothing to do with the ends of its copies"
    );
    original.kill(SIGKILL).expect("kill");
    assert_eq!(events.names_up_to(&original, "exit"), ["create", "start", "paused", "resumed", "exit"]);
}

#[test]
fn a_checkpoint_that_fails_names_the_log_of_criu_and_the_task_continues() {
    needs!(OurShim, Criu);
    let node = Node::exclusive();
    let shim = Shim::connect(&node);
    let scratch = Scratch::new("images");
    let fifos = Fifos::new("traced");
    let (mut stdout, _stderr) = (fifos.stdout(), fifos.stderr());
    let container = node.container("traced", Spec::sh(COUNTING)).started(&fifos.io());
    stdout.until(|bytes| bytes.ends_with(b"3\n"));
    let pid = container.pid().to_string();
    // criu can't trace a process that is already traced.
    let mut tracer =
        Command::new("strace").args(["-qq", "-o", "/dev/null", "-p", &pid]).spawn().expect("start strace");
    let is_traced = || process::status(container.pid(), "TracerPid").is_some_and(|tracer| tracer != "0");
    wait::until_true("the tracer", is_traced);
    let (_, reason) = take(&shim, &container, &scratch.text("bad"), |_| {}).expect_err("it is traced");
    tracer.kill().expect("kill strace");
    tracer.wait().expect("wait for strace");
    let log = reason.rsplit(' ').next().expect("a path").to_string();
    assert!(log.ends_with("/criu-dump.log") && reason.contains("criu"), "{reason}");
    assert!(fs::read_to_string(&log).expect("the log is there").contains("Error"), "{reason}");
    let before = last(&stdout.until(|bytes| bytes.ends_with(b"\n")));
    assert!(last(&stdout.until(|bytes| bytes.len() > 20)) > before, "the task continues");
    let state = format!("/run/containerd-shim-systemd-v1/default/{}", container.id);
    assert!(!Path::new(&state).join("criu-dump").exists(), "criu's work directory is removed");

    take(&shim, &container, &scratch.text("good"), |options| options.file_locks = true).expect("checkpoint");
    assert!(scratch.join("good/inventory.img").exists());
    let (code, reason) = take(&shim, &container, "images", |_| {}).expect_err("a relative path");
    assert_eq!(code, ttrpc::Code::INVALID_ARGUMENT, "{reason}");
}

#[test]
fn without_a_usable_criu_nothing_is_changed() {
    needs!(OurShim, Criu);
    let node = Node::exclusive();
    let shim = Shim::connect(&node);
    let scratch = Scratch::new("images");
    let fifos = Fifos::new("none");
    let _streams = (fifos.stdout(), fifos.stderr());
    let container = node.container("none", Spec::sleeping()).started(&fifos.io());
    let cases = [
        (None, ttrpc::Code::UNIMPLEMENTED, "not installed"),
        (Some("#!/bin/sh\necho Version: 3.9\n"), ttrpc::Code::FAILED_PRECONDITION, "3.9 is too old"),
        (
            Some("#!/bin/sh\n[ $1 = check ] || { echo Version: 4.1; exit; }\necho no soft-dirty; exit 1\n"),
            ttrpc::Code::FAILED_PRECONDITION,
            "no soft-dirty",
        ),
    ];
    for (script, expected, text) in cases {
        let _criu = Criu::replaced(script);
        let (code, reason) = take(&shim, &container, &scratch.text("images"), |_| {}).expect_err("no criu");
        assert_eq!(code, expected, "{reason}");
        assert!(reason.contains(text), "{reason}");
        assert!(!scratch.join("images").exists());
        assert_eq!(container.phase(), Status::Running);
    }
}

#[test]
fn a_task_without_streams_of_its_client_can_be_checkpointed_unless_its_stdout_is_a_socket() {
    needs!(OurShim, Criu);
    let node = Node::exclusive();
    let shim = Shim::connect(&node);
    let scratch = Scratch::new("images");
    let images = scratch.text("images");
    let silent = |mode: &str| {
        let container = node.container("silent", Spec::sleeping()).options(log_modes::log(mode));
        container.started(&Io::default())
    };
    let (code, reason) = take(&shim, &silent("client"), &images, |_| {}).expect_err("a socket");
    assert_eq!(code, ttrpc::Code::FAILED_PRECONDITION, "{reason}");
    assert!(reason.contains("Log ="), "{reason}");
    take(&shim, &silent("auto"), &images, |_| {}).expect("checkpoint");
    assert!(scratch.join("images").exists());
}

#[test]
fn a_restore_that_fails_can_be_tried_again() {
    needs!(OurShim, Criu);
    let node = Node::exclusive();
    let scratch = Scratch::new("images");
    let fifos = Fifos::new("again");
    let (mut stdout, _stderr) = (fifos.stdout(), fifos.stderr());
    let original = node.container("again", Spec::sh(COUNTING)).started(&fifos.io());
    stdout.until(|bytes| bytes.ends_with(b"3\n"));
    let images = original.checkpoint(options(|_| {})).expect("checkpoint");
    drop((original, scratch));

    let fifos = Fifos::new("restored");
    let (mut stdout, _stderr) = (fifos.stdout(), fifos.stderr());
    let copy = node.container("again", Spec::sh(COUNTING)).make();
    copy.create_from(&images, &fifos.io()).expect("create");
    let error = {
        let _criu = Criu::replaced(None);
        copy.start().expect_err("no criu")
    };
    assert_eq!(error.code(), Code::Unimplemented, "{error}");
    assert_eq!((copy.phase(), copy.pid()), (Status::Created, 0));
    // The daemon may be restarted while the container waits.
    daemon::wait_for_another(daemon::kill_now());
    assert_eq!((copy.phase(), copy.pid()), (Status::Created, 0));
    copy.start().expect("restore");
    assert!(last(&stdout.until(|bytes| bytes.ends_with(b"\n"))) >= 3);
    copy.kill(SIGTERM).expect("kill");
    assert_eq!(copy.exit_status(), 7);
}

#[test]
fn the_daemon_may_end_in_the_middle_of_a_checkpoint_and_of_a_restore() {
    needs!(OurShim, Criu, Faults);
    let node = Node::exclusive();
    let _build = WithFaults::install();
    let points: Vec<_> = shim::points().into_iter().filter(|point| is_point(point)).collect();
    assert!(points.len() > 5, "{points:?}");
    // Each takes half a minute where it is emulated.
    let step = number("E2E_POINTS_STEP", 1, 4);
    for point in points.iter().step_by(step) {
        println!("{point}");
        let pid = wait::until("the daemon serves", daemon::serving);
        let fifos = Fifos::new("point");
        let (mut stdout, _stderr) = (fifos.stdout(), fifos.stderr());
        let original = node.container("point", Spec::sh(COUNTING)).started(&fifos.io());
        stdout.until(|bytes| bytes.ends_with(b"3\n"));
        original.pause().expect("pause");
        fs::write(REQUEST, point).expect("ask for a fault");
        let images = original.checkpoint(options(|_| {})).expect("checkpoint");
        assert_eq!(original.phase(), Status::Paused);
        original.resume().expect("resume");
        let copied = Fifos::new("copy");
        let (mut copied_stdout, _copied_stderr) = (copied.stdout(), copied.stderr());
        let copy = node.container("point-copy", Spec::sh(COUNTING)).make();
        copy.create_from(&images, &copied.io()).expect("create");
        copy.start().expect("restore");
        assert!(!Path::new(REQUEST).exists(), "a call passes {point}");
        daemon::wait_for_another(pid);
        assert!(last(&copied_stdout.until(|bytes| bytes.ends_with(b"\n"))) >= 3);
        assert_eq!(systemd::main_pid(&systemd::unit_of(&copy)), copy.pid());
        for container in [&copy, &original] {
            container.kill(SIGTERM).expect("kill");
            assert_eq!(container.exit_status(), 7);
        }
    }
    // A leftover frozen task would still have its criu.
    assert!(process::named("criu").is_empty());
}
