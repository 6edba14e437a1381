//! Containers at a shutdown, and after it: two halves of one test. The guest reboots between them.
//! `tests/testbed/run-e2e` runs them apart, in the lane that can reboot.

use std::fs;

use crate::common::node::{NAMESPACE, Node};
use crate::common::spec::Spec;
use crate::common::systemd;
use crate::common::task::Io;
use crate::common::{process, wait};

/// Outlives the reboot.
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
        // It is not to be ended by this test.
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
            "{id} had its time"
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
