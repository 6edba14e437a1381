//! Ids and namespaces of every shape that containerd allows.

use crate::common::node::{Node, unique};
use crate::common::spec::Spec;
use crate::common::systemd;
use crate::common::task::{Io, SIGKILL};

const SECOND_NAMESPACE: &str = "e2e-two";

/// 64 hex digits, as Docker, Kubernetes and nerdctl have them. Their first 12 are a test's own.
fn digest(beginning: u16) -> String {
    let process = u64::from(std::process::id());
    let rest: u64 =
        unique("").bytes().fold(process, |sum, byte| sum.wrapping_mul(31).wrapping_add(byte.into()));
    format!("{beginning:04x}000000000000{process:016x}{rest:016x}{:016x}", rest.rotate_left(17))
}

#[test]
fn the_same_id_lives_in_two_namespaces_at_once() {
    let node = Node::shared();
    let id = unique("same");
    let first = node.container("", Spec::sleeping()).id(&id).started(&Io::default());
    let second =
        node.container("", Spec::sleeping()).namespace(SECOND_NAMESPACE).id(&id).started(&Io::default());
    assert_ne!(first.pid(), second.pid());
    first.kill(SIGKILL).expect("kill the first");
    assert_eq!(first.exit_status(), 137);
    assert_eq!(second.pids().expect("pids of the second"), [second.pid()]);
}

#[test]
fn ids_of_every_shape_work() {
    let node = Node::shared();
    let long = format!("{}-{}", unique("long"), "x".repeat(76))[..76].to_string();
    for id in [unique("a.b_c-d"), unique("1"), unique("UPPER.Case"), long, digest(0xabc)] {
        let container = node.container("", Spec::sh("exit 8")).id(&id).started(&Io::default());
        assert_eq!(container.exit_status(), 8, "{id}");
        container.delete().unwrap_or_else(|error| panic!("delete {id}: {error}"));
    }
}

#[test]
fn a_unit_is_named_by_namespace_and_id() {
    needs!(OurShim);
    let node = Node::shared();
    for namespace in ["default", SECOND_NAMESPACE] {
        for id in [unique("a.b_c-d"), digest(0xfeed)] {
            let container =
                node.container("", Spec::sleeping()).namespace(namespace).id(&id).started(&Io::default());
            let unit = systemd::unit_of(&container);
            assert_eq!(systemd::main_pid(&unit), container.pid(), "{unit}");
            assert_eq!(systemd::property(&unit, "Slice"), systemd::slice_of(namespace), "{unit}");
        }
    }
}

#[test]
fn ids_with_the_same_first_digits_get_different_units() {
    needs!(OurShim);
    let node = Node::shared();
    let [first, second] =
        [(); 2].map(|()| node.container("", Spec::sleeping()).id(&digest(0xdead)).started(&Io::default()));
    assert_eq!(first.id[..12], second.id[..12]);
    first.kill(SIGKILL).expect("kill the first");
    assert_eq!(first.exit_status(), 137);
    first.delete().expect("delete the first");
    assert_eq!(second.pids().expect("pids of the second"), [second.pid()]);
}
