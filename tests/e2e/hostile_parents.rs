//! The process of an exec is a child of systemd. What it makes of that costs its own container only.

use std::fs;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use nix::libc;

use crate::common::bystander::Bystander;
use crate::common::node::Node;
use crate::common::spec::Spec;
use crate::common::stdio::Scratch;
use crate::common::task::Io;
use crate::common::{cgroup, process, wait};

/// systemd does nothing until this is dropped: a flood that keeps it from answering on any machine.
struct Silent(PathBuf);

impl Silent {
    fn new() -> Silent {
        let freeze = cgroup::of(1).join("cgroup.freeze");
        fs::write(&freeze, "1").expect("freeze systemd");
        Silent(freeze)
    }
}

impl Drop for Silent {
    fn drop(&mut self) {
        fs::write(&self.0, "0").expect("thaw systemd");
    }
}

/// A program that starts siblings that end at once, this number ten times a second, once /place/begin is there.
fn flood(siblings: u32) -> String {
    let (clone, flags, exit) = (libc::SYS_clone, libc::CLONE_PARENT | libc::SIGCHLD, libc::SYS_exit_group);
    format!(
        r#"select(undef, undef, undef, 0.01) until -e "/place/begin";
        for (1..600) {{
            for (1..{siblings}) {{ syscall({clone}, {flags}, 0, 0, 0, 0) == 0 and syscall({exit}, 0) }}
            select(undef, undef, undef, 0.1);
        }}"#
    )
}

/// Floods systemd with this number of children ten times a second until the process is killed. `silence` makes systemd silent
/// meanwhile, until the function that it gets says that the process has ended.
fn with_flood(siblings: u32, silence: impl FnOnce(&dyn Fn() -> bool)) {
    let node = Node::exclusive();
    let bystander = Bystander::new(&node);
    let place = Scratch::new("floods");
    let spec = Spec::sleeping().bind(place.as_str(), "/place", &["ro"]);
    let spec = ["/usr", "/lib", "/lib64"].iter().fold(spec, |spec, path| spec.bind(path, path, &["ro"]));
    let container = node.container("floods", spec).started(&Io::default());
    let exec = container.exec(Spec::new(&["/usr/bin/perl", "-e", &flood(siblings)])).started(&Io::default());
    // That of init waits until systemd has reaped the siblings, which are in its namespace.
    let flooding = exec.pid();
    let has_ended = || process::status(flooding, "State").is_none_or(|state| state.starts_with('Z'));
    fs::write(place.join("begin"), "").expect("begin the flood");
    silence(&has_ended);
    assert_eq!(container.exit_status(), 137);
    assert_eq!(exec.exit_status(), 137);
    exec.delete().expect("delete the exec");
    container.delete().expect("delete");
    drop((exec, container));
    bystander.assert_all_untouched("a flood of children");
}

#[test]
fn a_process_that_floods_systemd_with_children_costs_nothing_but_its_container() {
    needs!(OurShim);
    with_flood(60, |has_ended| {
        let _silent = Silent::new();
        wait::until_true("the process is killed", has_ended);
    });
}

/// systemd answers each question of the daemon in time, and everybody waits for systemd most of the time.
#[test]
fn a_flood_with_pauses_is_ended_too() {
    needs!(OurShim);
    with_flood(300, |has_ended| {
        let begun = Instant::now();
        while !has_ended() {
            assert!(begun.elapsed() < Duration::from_secs(100), "the process floods systemd still");
            let silent = Silent::new();
            wait::elapse(Duration::from_millis(2500));
            drop(silent);
            wait::elapse(Duration::from_millis(300));
        }
    });
}
