//! No room for records, or none that can be written: what has happened is told at once, and is in the record
//! as soon as that is possible.

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};

use containerd_client::types::v1::Status;

use crate::common::container::Container;
use crate::common::exec::Exec;
use crate::common::leaks::STATE_DIRECTORY;
use crate::common::node::{NAMESPACE, Node};
use crate::common::spec::Spec;
use crate::common::task::{Io, SIGKILL};
use crate::common::{daemon, process, shim, wait};

/// A small file system for the records, unmounted on drop. The daemon is stopped for the change.
struct Small;

impl Small {
    fn mount() -> Small {
        shim::stop_daemon();
        fs::create_dir_all(STATE_DIRECTORY).expect("make the directory of the records");
        let args = ["-t", "tmpfs", "-o", "size=2m,mode=700", "none", STATE_DIRECTORY];
        process::succeed("mount", &args);
        Small
    }

    fn filling() -> PathBuf {
        Path::new(STATE_DIRECTORY).join(".fill")
    }

    /// Takes all the room that is left.
    fn fill(&self) {
        let mut file = File::create(Small::filling()).expect("make a file beside the records");
        while file.write_all(&[0; 512]).is_ok() {}
    }

    fn empty(&self) {
        fs::remove_file(Small::filling()).expect("remove the file that takes the room");
    }
}

impl Drop for Small {
    fn drop(&mut self) {
        shim::stop_daemon();
        process::succeed("umount", &[STATE_DIRECTORY]);
    }
}

/// A container whose record can't be replaced, until this is dropped.
struct Unwritable(PathBuf);

impl Unwritable {
    fn of(directory: &Path) -> Unwritable {
        let new = directory.join("record.json.new");
        // What is written goes to a file of this name first.
        let _ = fs::remove_file(&new);
        fs::create_dir(&new).expect("put something in the way of a record");
        Unwritable(new)
    }
}

impl Drop for Unwritable {
    fn drop(&mut self) {
        let _ = fs::remove_dir(&self.0);
    }
}

/// The directories with the records of a container and of its only exec.
fn directories(container: &Container, exec: &Exec) -> [PathBuf; 2] {
    let directory = Path::new(STATE_DIRECTORY).join(NAMESPACE).join(&container.id);
    [directory.clone(), directory.join("execs").join(&exec.exec)]
}

/// The records of a container and of its only exec.
fn record(container: &Container, exec: &Exec) -> String {
    directories(container, exec)
        .map(|directory| fs::read_to_string(directory.join("record.json")).expect("read a record"))
        .concat()
}

#[test]
fn exits_are_reported_while_the_disk_is_full_and_survive_the_daemon() {
    needs!(OurShim);
    let node = Node::exclusive();
    let small = Small::mount();
    let container = node.container("full", Spec::sleeping()).started(&Io::default());
    let other = node.container("full-exec", Spec::sleeping()).started(&Io::default());
    let exec = other.exec(Spec::sleeping()).started(&Io::default());
    small.fill();
    container.kill(SIGKILL).expect("kill the init process");
    exec.kill(SIGKILL).expect("kill the exec");
    assert_eq!(container.exit_status(), 137);
    assert_eq!(exec.exit_status(), 137);
    assert!(node.container("none", Spec::sleeping()).make().create(&Io::default()).is_err());
    daemon::killed();
    assert_eq!(container.exit_status(), 137);
    assert_eq!(exec.exit_status(), 137);
    // Deleting takes no room.
    exec.delete().expect("delete the exec");
    container.delete().expect("delete the task");
    small.empty();
    assert_eq!(other.exec_sh("exit 6").exit_status(), 6);
    other.end();
}

#[test]
fn an_exit_that_cant_be_recorded_is_reported_at_once_and_recorded_later() {
    needs!(OurShim);
    let node = Node::exclusive();
    let container = node.container("unwritable", Spec::sleeping()).started(&Io::default());
    let exec = container.exec(Spec::sleeping()).started(&Io::default());
    let hindrance = directories(&container, &exec).map(|directory| Unwritable::of(&directory));
    exec.kill(SIGKILL).expect("kill the exec");
    assert_eq!(exec.exit_status(), 137);
    container.pause().expect("pause what can't be recorded as paused");
    assert_eq!(container.phase(), Status::Paused);
    container.resume().expect("resume it");
    container.kill(SIGKILL).expect("kill the init process");
    assert_eq!(container.exit_status(), 137);
    assert!(!record(&container, &exec).contains(r#""name":"stopped""#), "the record can't have been written");
    // The next daemon finds both ends at their units.
    daemon::killed();
    assert_eq!(container.exit_status(), 137);
    assert_eq!(exec.exit_status(), 137);
    assert_eq!(container.phase(), Status::Stopped);
    drop(hindrance);
    wait::until_true("the record is written", || {
        record(&container, &exec).matches(r#""name":"stopped""#).count() == 2
    });
    exec.delete().expect("delete the exec");
    container.delete().expect("delete the task");
}
