//! `ctr run` with the runtime's name, as people use it.

use crate::common::image::IMAGE;
use crate::common::node::{NAMESPACE, Need, Node, unique};
use crate::common::process::{self, Outcome};
use crate::common::task::SIGKILL;
use crate::common::wait;

/// `ctr run` with these flags before the image, and the container's id and command after it.
fn run(node: &Node, flags: &[&str], id: &str, command: &[&str]) -> Outcome {
    // ctr requests CPU shares by default, and runc can't set them without the controller.
    let shares = if Need::Controllers.missing().is_some() { &["--cpu-shares", "0"][..] } else { &[] };
    let head = ["--namespace", NAMESPACE, "run", "--runtime", &node.runtime];
    process::run("ctr", &[&head, shares, flags, &[IMAGE, id], command].concat())
}

/// A container that `ctr` made, removed on drop.
pub struct Made(pub String);

impl Drop for Made {
    fn drop(&mut self) {
        // After a test that has passed, there is nothing to remove.
        for verb in [
            &["task", "kill", "--signal", "KILL"][..],
            &["task", "delete", "--force"],
            &["container", "delete"],
        ] {
            process::run("ctr", &[&["--namespace", NAMESPACE], verb, &[self.0.as_str()]].concat());
        }
    }
}

#[test]
fn ctr_run_prints_the_output_and_exits_with_the_exit_code() {
    let node = Node::shared();
    let made = Made(unique("ctr"));
    let outcome = run(&node, &["--rm"], &made.0, &["sh", "-c", "echo hello; echo trouble >&2; exit 7"]);
    assert_eq!((outcome.code, outcome.text().as_str()), (Some(7), "hello\n"), "{outcome:?}");
    assert!(outcome.stderr.contains("trouble"), "{outcome:?}");
}

#[test]
fn ctr_run_detached_is_listed_killed_and_deleted() {
    let node = Node::shared();
    let made = Made(unique("ctr"));
    let outcome = run(&node, &["--detach", "--null-io"], &made.0, &["sleep", "100000"]);
    assert_eq!(outcome.code, Some(0), "{outcome:?}");
    let ctr = |args: &[&str]| process::succeed("ctr", &[&["--namespace", NAMESPACE, "task"], args].concat());
    let listed = |state: &str| {
        let list = ctr(&["list"]);
        list.lines().any(|line| line.starts_with(&made.0) && line.ends_with(state))
    };
    assert!(listed("RUNNING"), "{}", ctr(&["list"]));
    ctr(&["kill", "--signal", &SIGKILL.to_string(), &made.0]);
    wait::until_true("ctr lists the task as stopped", || listed("STOPPED"));
    let deleted = process::run("ctr", &["--namespace", NAMESPACE, "task", "delete", &made.0]);
    assert!(
        deleted.code == Some(0) && deleted.stderr.contains("137"),
        "ctr prints the exit code: {deleted:?}"
    );
}
