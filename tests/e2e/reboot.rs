//! Containers during and after a reboot. Each test has two halves, and the guest reboots in between.
//! `tests/testbed/run-e2e` runs them apart, in the lane that can reboot.

use std::fs;

use containerd_client::types::v1::Status;

use crate::common::checkpoint::{self, COUNTING};
use crate::common::image;
use crate::common::node::{NAMESPACE, Node, OUR_RUNTIME};
use crate::common::spec::Spec;
use crate::common::stdio::Scratch;
use crate::common::systemd;
use crate::common::task::{Io, Process, SIGTERM};
use crate::common::{process, wait};

/// This directory survives the reboot.
const NOTES: &str = "/var/lib/containerd-shim-e2e-reboot";
const IDS: [&str; 3] = ["reboot-1", "reboot-2", "reboot-3"];

#[test]
fn before_the_reboot_containers_are_left_running() {
    needs!(OurShim, Reboot);
    let node = Node::exclusive();
    fs::create_dir_all(NOTES).expect("a directory for notes");
    for id in IDS {
        // Its shutdown takes some time, and writes a file at the end.
        let script = format!(
            "trap 'sleep 2; echo done >/notes/{id}; sync; exit 0' TERM; echo up >/notes/{id}; sleep 100000 & wait; wait"
        );
        let spec = Spec::sh(&script).bind(NOTES, "/notes", &["rw"]);
        let container = node.container("reboot", spec).id(id).started(&Io::default());
        wait::until_true("it is up", || {
            fs::read_to_string(format!("{NOTES}/{id}")).is_ok_and(|text| text == "up\n")
        });
        // This test must not end the container.
        std::mem::forget(container);
    }
    process::succeed("journalctl", &["--flush"]);
}

#[test]
fn after_the_reboot_containers_were_stopped_cleanly_and_left_nothing() {
    needs!(OurShim, Reboot);
    let node = Node::exclusive();
    for id in IDS {
        assert_eq!(
            fs::read_to_string(format!("{NOTES}/{id}")).expect("a note"),
            "done\n",
            "{id} had time for its shutdown"
        );
    }
    let last = process::succeed("journalctl", &["--boot=-1", "--no-pager", "--output=short-monotonic"]);
    let at = |text: &str| {
        let lines: Vec<&str> = last.lines().collect();
        let at = lines.iter().rposition(|line| line.contains(text));
        at.unwrap_or_else(|| panic!("no {text:?} in {last}"))
    };
    let stopped = IDS.map(|id| at(&format!("Stopped containerd-{NAMESPACE}-{id}.service")));
    for later in [
        "Stopping containerd.service",
        "Stopping containerd-shim-systemd-v1.service",
        "Stopping dbus.service",
    ] {
        let later_at = at(later);
        assert!(stopped.iter().all(|stopped| *stopped < later_at), "{later} comes after the containers' end");
    }
    assert!(systemd::list_units("containerd-default-reboot*").is_empty());
    for id in IDS {
        // Their metadata has outlived the reboot, as with every shim; the id is free for a new task.
        process::succeed("ctr", &["containers", "rm", id]);
        let container = node.container("reboot", Spec::sh("exit 6")).id(id).started(&Io::default());
        assert_eq!(container.exit_status(), 6);
    }
    fs::remove_dir_all(NOTES).expect("remove the notes");
}

/// A service that is a client of containerd, as Docker is: at shutdown, it waits for its container to end, and deletes it.
const CLIENT: &str = "containerd-shim-e2e-client.service";

/// The exit code of the client. The file survives the reboot.
const CLIENT_NOTE: &str = "/var/lib/containerd-shim-e2e-client";

#[test]
fn before_the_reboot_a_service_runs_a_container() {
    needs!(OurShim, Reboot);
    let _node = Node::exclusive();
    // systemd stops the container at the same time, and the daemon once the container has ended.
    let waits = "ExecStop=/bin/sh -c 'while kill -0 $MAINPID; do sleep 0.05; done'";
    let notes = format!("ExecStopPost=/bin/sh -c 'echo $EXIT_STATUS >{CLIENT_NOTE}; sync'");
    let script = "trap 'exit 9' TERM; while :; do usleep 10000; done";
    let unit = format!("--unit={CLIENT}");
    let service = [&unit, "--property=After=containerd.service", "--property", waits, "--property", &notes];
    let run = ["ctr", "run", "--rm", "--null-io", "--cpu-shares", "0", "--runtime", OUR_RUNTIME];
    let container = [image::IMAGE, "reboot-client", "sh", "-c", script];
    process::succeed("systemd-run", &[&service[..], &run, &container].concat());
    // The script has set its trap when it has a child. Before that, `runc init` gets SIGTERM.
    wait::until_true("the script has a child", || {
        process::run("ctr", &["task", "ps", "reboot-client"]).text().lines().skip(1).count() > 1
    });
}

#[test]
fn after_the_reboot_the_service_knows_how_its_container_ended() {
    needs!(OurShim, Reboot);
    let _node = Node::exclusive();
    let note = fs::read_to_string(CLIENT_NOTE).expect("a note of the service");
    fs::remove_file(CLIENT_NOTE).expect("remove the note");
    assert_eq!(note, "9\n", "the exit code of the container is the one of the client");
    let containers = process::succeed("ctr", &["containers", "ls", "--quiet"]);
    assert!(!containers.contains("reboot-client"), "the client has removed its container");
}

/// A checkpoint that survives the reboot as an image of containerd.
const CHECKPOINT: &str = "docker.io/testbed/reboot-checkpoint:latest";

#[test]
fn before_the_reboot_a_checkpoint_is_taken() {
    needs!(OurShim, Reboot, Criu);
    let node = Node::exclusive();
    let scratch = Scratch::new("reboot");
    let uri = format!("file://{}", scratch.text("out"));
    let io = Io { stdout: uri.clone(), stderr: uri, ..Io::default() };
    let container = node.container("reboot-checkpoint", Spec::sh(COUNTING)).started(&io);
    wait::until_true("it counts", || scratch.read("out").contains("\n3\n"));
    let checkpoint = ["containers", "checkpoint", "--task", "--image", "--rw", &container.id, CHECKPOINT];
    process::succeed("ctr", &checkpoint);
    process::succeed("sync", &[]);
}

#[test]
fn after_the_reboot_the_checkpoint_is_restored() {
    needs!(OurShim, Reboot, Criu);
    let node = Node::exclusive();
    let id = "reboot-restored";
    // ctr returns when the task runs. Its output then goes to the journal.
    process::succeed("ctr", &["containers", "restore", "--live", "--rw", id, CHECKPOINT]);
    let task = Process::init(&node, id);
    assert_eq!(task.phase(), Status::Running);
    assert_eq!(systemd::main_pid(&format!("containerd-{NAMESPACE}-{id}.service")), task.pid());
    let of_task = format!("CONTAINER_ID={id}");
    let first = wait::until("it counts", || {
        let messages = systemd::messages(&[&of_task]);
        messages.iter().find_map(|line| line.trim_start_matches('e').parse::<u32>().ok())
    });
    assert!(first >= 3, "it continues the count: {first}");
    task.kill(SIGTERM).expect("kill");
    assert_eq!(task.exit_status(), 7);
    task.delete().expect("delete");
    process::succeed("ctr", &["containers", "rm", id]);
    process::succeed("ctr", &["images", "rm", CHECKPOINT]);
    checkpoint::remove_unpacked();
}
