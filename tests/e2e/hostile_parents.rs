//! The process of an exec is a child of systemd. What it makes of that costs its own container only.

use std::fs;
use std::time::Duration;

use nix::libc;

use crate::common::bystander::Bystander;
use crate::common::node::Node;
use crate::common::spec::Spec;
use crate::common::stdio::Scratch;
use crate::common::task::Io;

/// How long the flood lasts if nobody ends it.
const LONGEST: Duration = Duration::from_secs(60);

/// The largest number of tasks in the machine: then the flood waits for systemd.
const MOST_TASKS: usize = 1500;

/// A program that starts siblings that end at once, once /place/begin is there. Two processes do so, as systemd may be faster
/// than one.
fn flood() -> String {
    let (clone, flags, exit) = (libc::SYS_clone, libc::CLONE_PARENT | libc::SIGCHLD, libc::SYS_exit_group);
    let (span, most) = (LONGEST.as_secs(), MOST_TASKS);
    format!(
        r#"select(undef, undef, undef, 0.01) until -e "/place/begin";
        sub sibling {{ syscall({clone}, {flags}, 0, 0, 0, 0) }}
        sub tasks {{ open(my $load, "<", "/proc/loadavg"); readline($load) =~ m,/(\d+), and return $1 }}
        my $end = time + {span};
        sibling();
        while (time < $end) {{
            for (1..50) {{ sibling() == 0 and syscall({exit}, 0) }}
            while (tasks() > {most} and time < $end) {{}}
        }}"#
    )
}

#[test]
fn a_process_that_floods_systemd_with_children_costs_nothing_but_its_container() {
    needs!(OurShim);
    let node = Node::exclusive();
    let bystander = Bystander::new(&node);
    let place = Scratch::new("floods");
    let spec = Spec::sleeping().bind(place.as_str(), "/place", &["ro"]);
    let spec = ["/usr", "/lib", "/lib64"].iter().fold(spec, |spec, path| spec.bind(path, path, &["ro"]));
    let container = node.container("floods", spec).started(&Io::default());
    let exec = container.exec(Spec::new(&["/usr/bin/perl", "-e", &flood()])).started(&Io::default());
    fs::write(place.join("begin"), "").expect("begin the flood");
    // Nothing else than the daemon ends it.
    assert_eq!(container.exit_status(), 137);
    assert_eq!(exec.exit_status(), 137);
    exec.delete().expect("delete the exec");
    container.delete().expect("delete");
    drop((exec, container));
    bystander.assert_all_untouched("a flood of children");
}
