//! The binary that containerd runs: `start` in the protocol of each containerd, `delete`, and the output for a person.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use containerd_shim_protos::api::DeleteResponse;
use containerd_shim_protos::bootstrap_api::{BootstrapParams, BootstrapResult};
use containerd_shim_protos::protobuf::Message;
use containerd_shim_protos::types::introspection::RuntimeInfo;
use serde_json::Value;

use crate::common::leaks::STATE_DIRECTORY;
use crate::common::node::{CONTAINERD_SOCKET, NAMESPACE, Node, unique};
use crate::common::shim::{self, BINARY, Bundle};
use crate::common::spec::Spec;
use crate::common::stdio::Scratch;
use crate::common::task::{Io, SIGKILL};
use crate::common::{process, systemd, wait};

/// The environment that containerd 1.7 to 2.2 adds.
const SINCE_1_7: [(&str, &str); 3] =
    [("GRPC_ADDRESS", CONTAINERD_SOCKET), ("NAMESPACE", NAMESPACE), ("MAX_SHIM_VERSION", "2")];

/// Asserts that a process listens at the address.
fn assert_answers(address: &str) {
    let path =
        address.strip_prefix("unix://").unwrap_or_else(|| panic!("not an address to dial: {address:?}"));
    UnixStream::connect(path).unwrap_or_else(|error| panic!("dial {address}: {error}"));
}

#[test]
fn containerd_1_6_gets_a_bare_address() {
    needs!(OurShim);
    let _node = Node::shared();
    let bundle = Bundle::new("start");
    let outcome = shim::start(&bundle, &unique("start"), &[], &[]);
    assert_eq!((outcome.code, outcome.stderr.as_str()), (Some(0), ""));
    let address = outcome.text();
    assert_answers(address.trim());
    // containerd 1.x finds the shim again by this file, and 1.6 does not trim it.
    assert_eq!(bundle.read("address"), address.trim());
}

#[test]
fn containerd_1_7_gets_json() {
    needs!(OurShim);
    let _node = Node::shared();
    let options = crate::runtime_options::runc_options(|options| options.binary_name = "runc".to_string());
    let options = prost::Message::encode_to_vec(&options);
    for stdin in [Vec::new(), options] {
        let bundle = Bundle::new("start");
        let outcome = shim::start(&bundle, &unique("start"), &SINCE_1_7, &stdin);
        assert_eq!((outcome.code, outcome.stderr.as_str()), (Some(0), ""));
        let answer: Value = serde_json::from_slice(&outcome.stdout).expect("an answer in JSON");
        assert_eq!((&answer["version"], &answer["protocol"]), (&Value::from(2), &Value::from("ttrpc")));
        let address = answer["address"].as_str().expect("an address");
        assert_answers(address);
        assert_eq!(bundle.read("address"), address);
    }
}

#[test]
fn containerd_2_3_gets_a_bootstrap_result() {
    needs!(OurShim);
    let _node = Node::shared();
    let id = unique("start");
    let outcome = shim::start(&Bundle::new("start"), &id, &SINCE_1_7, &params(&id, NAMESPACE));
    assert_eq!((outcome.code, outcome.stderr.as_str()), (Some(0), ""));
    let answer = BootstrapResult::parse_from_bytes(&outcome.stdout).expect("a BootstrapResult");
    assert!([2, 3].contains(&answer.version), "{answer}");
    assert_eq!(answer.protocol, "ttrpc");
    assert_answers(&answer.address);
}

#[test]
fn options_that_look_like_bootstrap_params_are_read_as_options() {
    needs!(OurShim);
    let _node = Node::shared();
    let id = unique("start");
    for stdin in [params("another", NAMESPACE), params(&id, "another"), vec![0xff; 40]] {
        let outcome = shim::start(&Bundle::new("start"), &id, &SINCE_1_7, &stdin);
        assert_eq!((outcome.code, outcome.stderr.as_str()), (Some(0), ""));
        serde_json::from_slice::<Value>(&outcome.stdout).expect("the answer for 1.7");
    }
}

fn params(id: &str, namespace: &str) -> Vec<u8> {
    let params = BootstrapParams {
        instance_id: id.to_string(),
        namespace: namespace.to_string(),
        containerd_version: "v2.3.0".to_string(),
        containerd_ttrpc_address: format!("{CONTAINERD_SOCKET}.ttrpc"),
        containerd_grpc_address: CONTAINERD_SOCKET.to_string(),
        containerd_binary: "/usr/bin/containerd".to_string(),
        ..Default::default()
    };
    params.write_to_bytes().expect("encode BootstrapParams")
}

#[test]
fn twenty_starts_at_once_bring_up_one_daemon() {
    needs!(OurShim);
    let _node = Node::exclusive();
    shim::stop_daemon();
    let starts: Vec<_> = (0..20)
        .map(|_| thread::spawn(|| shim::start(&Bundle::new("race"), &unique("race"), &SINCE_1_7, &[])))
        .collect();
    for start in starts {
        let outcome = start.join().expect("a start does not panic");
        assert_eq!((outcome.code, outcome.stderr.as_str()), (Some(0), ""));
        let answer: Value = serde_json::from_slice(&outcome.stdout).expect("an answer in JSON");
        assert_answers(answer["address"].as_str().expect("an address"));
    }
    wait::until_true("one daemon", || {
        process::named("containerd-shim") == [systemd::main_pid(systemd::DAEMON_SERVICE)]
    });
}

#[test]
fn a_container_runs_where_no_daemon_has_run_yet() {
    needs!(OurShim);
    let node = Node::exclusive();
    shim::stop_daemon();
    assert_eq!(node.container("first", Spec::sh("exit 15")).started(&Io::default()).exit_status(), 15);
}

#[test]
fn a_container_runs_where_the_daemon_was_stopped_and_units_refer_to_it() {
    needs!(OurShim);
    let node = Node::exclusive();
    shim::socket();
    let (name, after) = (format!("{}.service", unique("refers")), systemd::DAEMON_SERVICE);
    let run = ["--quiet", "--unit", &name, "--property", &format!("After={after}"), "sleep", "infinity"];
    assert_eq!(process::run("systemd-run", &run).code, Some(0));
    shim::stop_daemon();
    assert_eq!(node.container("again", Spec::sh("exit 16")).started(&Io::default()).exit_status(), 16);
    assert_eq!(process::run("systemctl", &["stop", &name]).code, Some(0));
}

#[test]
fn delete_of_an_unknown_task_succeeds() {
    needs!(OurShim);
    let _node = Node::shared();
    let outcome = shim::delete(&Bundle::new("delete"), &unique("unknown"));
    assert_eq!(outcome.code, Some(0), "{}", outcome.stderr);
    let answer = DeleteResponse::parse_from_bytes(&outcome.stdout).expect("a DeleteResponse");
    assert_eq!(answer.exit_status, 137);
    assert!(answer.exited_at.seconds > 1_700_000_000, "{answer}");
}

#[test]
fn delete_works_without_a_daemon() {
    needs!(OurShim);
    let _node = Node::exclusive();
    shim::stop_daemon();
    let outcome = shim::delete(&Bundle::new("delete"), &unique("unknown"));
    assert_eq!(outcome.code, Some(0), "{}", outcome.stderr);
    DeleteResponse::parse_from_bytes(&outcome.stdout).expect("a DeleteResponse");
}

/// containerd kills `delete` after this time.
const DELETE_LIMIT: Duration = Duration::from_secs(5);

#[test]
fn delete_removes_tasks_without_a_daemon_within_containerds_limit() {
    // Without it, containerd sees its connections end, and runs `delete` itself.
    needs!(OurShim, PreservedStore);
    let node = Node::exclusive();
    let runs = node.container("runs", Spec::sleeping()).started(&Io::default());
    let exec = runs.exec(Spec::sleeping()).started(&Io::default());
    let ended = node.container("ended", Spec::sh("exit 3")).started(&Io::default());
    assert_eq!(ended.exit_status(), 3);
    let created = node.container("created", Spec::sleeping()).created(&Io::default());
    let pids = [runs.pid(), exec.pid(), created.pid()];
    shim::stop_daemon();
    for (container, exit_status) in [(&runs, 137), (&ended, 3), (&created, 137)] {
        let asked = Instant::now();
        let outcome = shim::delete_by(&Bundle::new("delete"), &container.bundle(), &container.id);
        assert_eq!(outcome.code, Some(0), "{}", outcome.stderr);
        assert!(asked.elapsed() < DELETE_LIMIT, "{:?}", asked.elapsed());
        let answer = DeleteResponse::parse_from_bytes(&outcome.stdout).expect("a DeleteResponse");
        assert_eq!(answer.exit_status, exit_status, "{answer}");
        let record = format!("{STATE_DIRECTORY}/{NAMESPACE}/{}", container.id);
        assert!(!fs::exists(&record).expect("look for the record"), "{record}");
    }
    wait::until_true("the processes are gone", || !pids.iter().any(|pid| process::exists(*pid)));
    // The next daemon gives back the references to the units.
    assert_eq!(node.container("next", Spec::sh("exit 4")).started(&Io::default()).exit_status(), 4);
    for container in [&runs, &ended, &created] {
        let unit = systemd::unit_of(container);
        wait::until_true("its unit is gone", || systemd::list_units(&unit).is_empty());
        // containerd finds no task.
        let _ = container.delete();
    }
}

#[test]
fn delete_leaves_no_failed_unit_of_a_process_that_takes_long_to_end() {
    needs!(OurShim, PreservedStore);
    let node = Node::exclusive();
    // The kernel frees the memory of a process before the process ends.
    let large = node.container("large", Spec::sh("exec tail -c 300000000 /dev/zero")).started(&Io::default());
    wait::until_true("it has much memory", || process::pss_kib(large.pid()).is_some_and(|pss| pss > 150_000));
    shim::stop_daemon();
    let outcome = shim::delete_by(&Bundle::new("delete"), &large.bundle(), &large.id);
    assert_eq!(outcome.code, Some(0), "{}", outcome.stderr);
    assert_eq!(node.container("next", Spec::sh("exit 4")).started(&Io::default()).exit_status(), 4);
    let unit = systemd::unit_of(&large);
    wait::until_true("its unit is gone", || systemd::list_units(&unit).is_empty());
    // containerd finds no task.
    let _ = large.delete();
}

#[test]
fn delete_cleans_up_a_task_that_is_alive() {
    needs!(OurShim);
    let node = Node::shared();
    let container = node.container("abandoned", Spec::sleeping()).started(&Io::default());
    let (pid, unit) = (container.pid(), systemd::unit_of(&container));
    let (bundle, elsewhere) = (container.bundle(), Bundle::new("delete"));
    for _twice in 0..2 {
        let outcome = shim::delete_by(&elsewhere, &bundle, &container.id);
        assert_eq!(outcome.code, Some(0), "{}", outcome.stderr);
        DeleteResponse::parse_from_bytes(&outcome.stdout).expect("a DeleteResponse");
        wait::until_true("its process is gone", || !process::exists(pid));
        wait::until_true("its unit is gone", || systemd::list_units(&unit).is_empty());
    }
    // containerd may have the exit already, or find no task. Both are correct.
    let _ = container.kill(SIGKILL);
}

#[test]
fn delete_removes_nothing_for_a_wrong_bundle_or_an_unprivileged_user() {
    needs!(OurShim);
    let node = Node::shared();
    let container = node.container("wanted", Spec::sleeping()).started(&Io::default());
    let wrong = Bundle::new("delete");
    let outcome = shim::delete(&wrong, &container.id);
    assert_ne!(outcome.code, Some(0), "{outcome:?}");
    for path in [&container.bundle(), wrong.path()] {
        assert!(outcome.stderr.contains(path), "{path}: {}", outcome.stderr);
    }
    let bundle = container.bundle();
    let delete = [BINARY, "-namespace", NAMESPACE, "-id", &container.id, "-bundle", &bundle, "delete"];
    let outcome = process::as_nobody(&delete);
    assert_ne!(outcome.code, Some(0), "{outcome:?}");
    assert!(outcome.stderr.contains("Permission denied"), "{}", outcome.stderr);
    assert_eq!(container.exec_sh("exit 5").exit_status(), 5);
    container.end();
}

#[test]
fn the_binary_prints_usage_version_and_features() {
    needs!(OurShim);
    let _node = Node::shared();
    let usage = shim::with_stdin(&mut Command::new(BINARY), &[]);
    assert_ne!(usage.code, Some(0));
    assert!(usage.stderr.contains("start") && usage.stderr.contains("delete"), "{}", usage.stderr);
    assert!(usage.stdout.is_empty(), "usage after an error goes to stderr");

    let version = process::run(BINARY, &["-v"]);
    assert_eq!((version.code, version.stderr.as_str()), (Some(0), ""));
    assert!(version.text().contains(env!("CARGO_PKG_VERSION")), "{}", version.text());

    let info = shim::with_stdin(Command::new(BINARY).arg("-info"), &[]);
    assert_eq!((info.code, info.stderr.as_str()), (Some(0), ""));
    assert!(
        info.stdout.windows(24).any(|part| part == b"io.containerd.systemd.v1"),
        "RuntimeInfo has the name"
    );

    let unknown = shim::with_stdin(Command::new(BINARY).arg("frobnicate"), &[]);
    assert_ne!(unknown.code, Some(0));
    assert!(unknown.stderr.contains("frobnicate"), "{}", unknown.stderr);
}

#[test]
fn the_features_of_a_runtime_that_hangs_or_prints_for_ever_are_left_out() {
    needs!(OurShim);
    let _node = Node::shared();
    let scratch = Scratch::new("features");
    let child = scratch.join("child");
    let hangs = format!("setsid sleep 1000 & echo $! >{}; sleep 1000", child.display());
    for script in [hangs.as_str(), "exec cat /dev/zero", "exit 3"] {
        let runtime = scratch.join("runc");
        fs::write(&runtime, format!("#!/bin/sh\nPATH=/usr/bin:/bin\n{script}\n")).expect("write the runtime");
        fs::set_permissions(&runtime, fs::Permissions::from_mode(0o755)).expect("make it a program");
        let asked = Instant::now();
        let info = shim::with_stdin(Command::new(BINARY).arg("-info").env("PATH", scratch.as_str()), &[]);
        assert!(asked.elapsed() < Duration::from_secs(20), "{script}: {:?}", asked.elapsed());
        assert_eq!(info.code, Some(0), "{script}: {}", info.stderr);
        assert!(info.stderr.contains("features"), "{script}: {}", info.stderr);
        let info = RuntimeInfo::parse_from_bytes(&info.stdout).expect("RuntimeInfo");
        assert_eq!(info.name, "io.containerd.systemd.v1");
        assert!(info.features.is_none(), "{script}: {info:?}");
    }
    let left = fs::read_to_string(&child).expect("the number of the process that the runtime left");
    assert!(!process::runs(left.trim().parse().expect("a number")), "process {left} is still there");
}

#[test]
fn start_without_an_id_says_what_is_missing() {
    needs!(OurShim);
    let _node = Node::shared();
    let outcome = shim::with_stdin(Command::new(BINARY).args(["-namespace", NAMESPACE, "start"]), &[]);
    assert_ne!(outcome.code, Some(0));
    assert!(outcome.stderr.contains("-id") || outcome.text().contains("-id"), "{outcome:?}");
}
