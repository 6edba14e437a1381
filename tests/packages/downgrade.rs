//! Downgrades: to a version that reads the records, and to one that does not.

use crate::common::leaks::STATE_DIRECTORY;
use crate::common::node::{NAMESPACE, Node};
use crate::common::spec::Spec;
use crate::common::systemd::{self, DAEMON_SERVICE};
use crate::common::task::{Io, SIGKILL};
use crate::package::{LOWER, NEW, PREVIOUS, Package, is_at_work, version_of};

#[test]
fn a_downgrade_to_a_version_that_reads_the_records_keeps_containers() {
    let package = Package::installed(NEW);
    let node = Node::exclusive();
    let container = node.container("down", Spec::sleeping()).started(&Io::default());
    let (pid, waiting) = (container.pid(), container.waiting());
    package.install(LOWER);
    assert_eq!(package.version().0, version_of(LOWER));
    assert_eq!(container.pid(), pid);
    container.kill(SIGKILL).expect("kill");
    assert_eq!(waiting.exit().expect("a Wait that began before the downgrade").status, 137);
    container.delete().expect("delete");
}

#[test]
fn a_downgrade_to_a_version_that_can_not_read_a_record_is_refused() {
    let package = Package::installed(NEW);
    let node = Node::exclusive();
    let container = node.container("newer", Spec::sleeping()).started(&Io::default());
    let (pid, daemon) = (container.pid(), systemd::main_pid(DAEMON_SERVICE));

    let refused = package.try_install(PREVIOUS);
    assert_eq!(refused.code, Some(100), "{refused:?}");
    let text = format!("{}{}", refused.text(), refused.stderr);
    let record = format!("{STATE_DIRECTORY}/{NAMESPACE}/{}/record.json", container.id);
    for words in
        [&format!("can't read {record} (version 2, it reads up to 1)"), "delete these containers first"]
    {
        assert!(text.contains(words), "{words:?} is not in {text}");
    }
    // Nothing has changed.
    assert_eq!(package.version(), (version_of(NEW), "installed".to_string()));
    assert!(is_at_work());
    assert_eq!(systemd::main_pid(DAEMON_SERVICE), daemon);
    assert_eq!(container.pid(), pid);

    container.kill(SIGKILL).expect("kill");
    assert_eq!(container.exit_status(), 137);
    container.delete().expect("delete");
    package.install(PREVIOUS);
    let container = node.container("older", Spec::sh("exit 7")).started(&Io::default());
    assert_eq!(container.exit_status(), 7);
}
