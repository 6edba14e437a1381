//! Removal and purge.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::net::UnixStream;
use std::path::Path;

use crate::common::daemon;
use crate::common::leaks::{STATE_DIRECTORY, Traces};
use crate::common::node::{NAMESPACE, Node};
use crate::common::process;
use crate::common::spec::Spec;
use crate::common::systemd;
use crate::common::task::{Io, SIGKILL};
use crate::package::{NAME, NEW, Package, is_at_work, version_of};

#[test]
fn a_removal_is_refused_while_a_container_runs_and_the_container_continues() {
    let package = Package::installed(NEW);
    let node = Node::exclusive();
    let container = node.container("kept", Spec::sleeping()).started(&Io::default());
    let (pid, waiting) = (container.pid(), container.waiting());
    for refused in [package.remove(), package.purge()] {
        assert_eq!(refused.code, Some(100), "{refused:?}");
        let text = format!("{}{}", refused.text(), refused.stderr);
        for words in
            ["not removed: these containers use it", container.id.as_str(), "delete them with the client"]
        {
            assert!(text.contains(words), "{words:?} is not in {text}");
        }
        assert_eq!(package.version(), (version_of(NEW), "installed".to_string()));
    }
    assert!(is_at_work());
    assert_eq!(container.pid(), pid);
    // The daemon still starts containers.
    let another = node.container("another", Spec::sh("exit 3")).started(&Io::default());
    assert_eq!(another.exit_status(), 3);
    another.delete().expect("delete");
    container.kill(SIGKILL).expect("kill");
    assert_eq!(waiting.exit().expect("wait").status, 137);
    // A container that has ended, and that its client has not deleted, counts as well.
    assert_eq!(package.remove().code, Some(100));
    container.delete().expect("delete");
    assert_eq!(package.remove().code, Some(0));
}

#[test]
fn a_container_that_no_client_can_delete_is_removed_as_the_refusal_says() {
    let package = Package::installed(NEW);
    let node = Node::exclusive();
    let container = node.container("orphan", Spec::sleeping()).started(&Io::default());
    let pid = container.pid();
    let refused = package.remove();
    let text = format!("{}{}", refused.text(), refused.stderr);
    assert!(text.contains("-namespace NAMESPACE -id ID -bundle BUNDLE delete"), "{text}");
    let page = process::succeed(NAME, &["inspect", &container.id]);
    let bundle = page.lines().find_map(|line| line.trim().strip_prefix("Bundle: ")).expect("a bundle");
    process::succeed(NAME, &["-namespace", NAMESPACE, "-id", &container.id, "-bundle", bundle, "delete"]);
    assert!(!process::runs(pid));
    assert_eq!(process::succeed(NAME, &["ps", "--in-use", "--quiet"]), "");
    // The containerd of this test is not gone, and has a task that the shim does not have any more.
    let _ = container.delete();
    assert_eq!(package.remove().code, Some(0));
}

#[test]
fn a_removal_is_refused_if_the_program_can_not_say_what_is_in_use() {
    let package = Package::installed(NEW);
    let node = Node::exclusive();
    let container = node.container("hidden", Spec::sleeping()).started(&Io::default());
    let broken = Broken::new();
    let refused = package.remove();
    assert_eq!(refused.code, Some(100), "{refused:?}");
    let text = format!("{}{}", refused.text(), refused.stderr);
    let record = format!("{STATE_DIRECTORY}/{NAMESPACE}/{}/record.json", container.id);
    assert!(text.contains(&record), "{text}");
    drop(broken);
    container.end();
    assert_eq!(package.remove().code, Some(0));
}

/// While this exists, the installed program only fails.
struct Broken;

impl Broken {
    const PROGRAM: &'static str = "/usr/bin/containerd-shim-systemd-v1";

    fn new() -> Broken {
        process::succeed("mount", &["--bind", "/bin/false", Broken::PROGRAM]);
        Broken
    }
}

impl Drop for Broken {
    fn drop(&mut self) {
        process::run("umount", &[Broken::PROGRAM]);
    }
}

#[test]
fn a_purge_leaves_nothing() {
    let before = (files(), units(), Traces::take());
    let package = Package::installed(NEW);
    let node = Node::exclusive();
    for name in ["one", "two"] {
        let container = node.container(name, Spec::sh("exit 3")).namespace("purged").started(&Io::default());
        assert_eq!(container.exit_status(), 3);
        container.delete().expect("delete");
    }
    let purged = package.purge();
    assert_eq!(purged.code, Some(0), "{purged:?}");
    assert!(!purged.stderr.contains("Failed"), "{}", purged.stderr);
    assert_eq!(package.version(), (String::new(), String::new()));
    assert_eq!(files().difference(&before.0).collect::<Vec<_>>(), Vec::<&String>::new());
    assert_eq!(units().difference(&before.1).collect::<Vec<_>>(), Vec::<&String>::new());
    // containerd and runc keep a directory for each namespace.
    let leaks = Traces::take().since(&before.2).into_iter().filter(|leak| !leak.ends_with("/purged"));
    assert_eq!(leaks.collect::<Vec<_>>(), Vec::<String>::new());
    assert_eq!(daemon::processes(), Vec::<u32>::new());
}

#[test]
fn a_removal_leaves_no_unit_that_would_start_the_program_at_the_next_call() {
    let before = units();
    let package = Package::installed(NEW);
    let node = Node::exclusive();
    // A daemon that is stopped while a client is connected leaves such a unit (systemd 254 and later).
    let connection = UnixStream::connect(SOCKET).expect("connect");
    let container = node.container("last", Spec::sh("exit 3")).namespace("purged").started(&Io::default());
    assert_eq!(container.exit_status(), 3);
    container.delete().expect("delete");
    assert_eq!(package.remove().code, Some(0));
    let units = units();
    // systemd knows the name of a unit for as long as another unit refers to it.
    let left = units.difference(&before).filter(|unit| !unit.contains(" not-found "));
    assert_eq!(left.collect::<Vec<_>>(), Vec::<&String>::new());
    assert_eq!(daemon::processes(), Vec::<u32>::new());
    drop(connection);
}

/// The daemon's socket.
const SOCKET: &str = "/run/containerd-shim-systemd-v1.sock";

/// A drop-in for all services, and the directory for which the shim copies it without `RuntimeMaxSec=`.
const DROP_IN: &str = "/etc/systemd/system/service.d/90-e2e.conf";
const COPIES: &str = "/run/systemd/system/containerd-purged-.service.d";

#[test]
fn a_removal_leaves_no_copy_of_a_drop_in() {
    let package = Package::installed(NEW);
    let node = Node::exclusive();
    let run = |name: &str| {
        let container = node.container(name, Spec::sh("exit 3")).namespace("purged").started(&Io::default());
        assert_eq!(container.exit_status(), 3);
        container.delete().expect("delete");
    };
    let dir = Path::new(DROP_IN).parent().expect("a directory");
    fs::create_dir_all(dir).expect("make the directory");
    let _removed = Removed(dir);
    fs::write(DROP_IN, "[Service]\nRuntimeMaxSec=1h\n").expect("write the drop-in");
    run("one");
    let own = Path::new(COPIES).join("50-own.conf");
    assert!(Path::new(COPIES).join("90-e2e.conf").exists());
    // The files of an administrator stay.
    fs::write(&own, "[Service]\n").expect("write another drop-in");
    assert_eq!(package.remove().code, Some(0));
    let left: Vec<_> = fs::read_dir(COPIES).expect("list").map(|item| item.expect("read").path()).collect();
    assert_eq!(left, [own.as_path()]);
    fs::remove_dir_all(COPIES).expect("remove the directory");
    let ours = |name: &str| name.starts_with("containerd") && name.ends_with(".service.d");
    let dirs = fs::read_dir("/run/systemd/system").expect("list").flatten();
    let names: Vec<_> = dirs.map(|dir| dir.file_name().to_string_lossy().into_owned()).collect();
    assert!(!names.iter().any(|name| ours(name)), "{names:?}");
}

/// A directory that is removed at the end, also of a test that fails.
struct Removed(&'static Path);

impl Drop for Removed {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(self.0);
        process::run("systemctl", &["daemon-reload"]);
    }
}

/// All units of the shim, including slices.
fn units() -> BTreeSet<String> {
    let ours = ["containerd-*", "containerd.slice", "containerd_shim*"];
    ours.into_iter().flat_map(systemd::list_units).collect()
}

/// All files, except those of the package manager, of the clients' containerd, of the journal and of other services.
fn files() -> BTreeSet<String> {
    let list = process::run(
        "find",
        &[
            "/etc",
            "/usr",
            "/opt",
            "/run",
            "/var",
            "/tmp",
            "/root",
            "-xdev",
            "(",
            "-path",
            "/var/lib/dpkg",
            "-o",
            "-path",
            "/var/cache",
            "-o",
            "-path",
            "/var/log",
            "-o",
            "-path",
            "/var/lib/apt",
            "-o",
            "-path",
            "/var/lib/containerd",
            "-o",
            "-path",
            "/run/log",
            "-o",
            "-path",
            "/run/containerd",
            "-o",
            "-path",
            "/run/systemd",
            ")",
            "-prune",
            "-o",
            "-print",
        ],
    );
    list.text().lines().map(str::to_string).collect()
}
