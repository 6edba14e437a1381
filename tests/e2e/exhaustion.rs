//! A full or read-only disk: exits are reported at once, and are recorded as soon as that is possible. No room for
//! threads: calls succeed or are refused, and succeed again once there is room.

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};

use containerd_client::tonic::Code;
use containerd_client::types::v1::Status;

use crate::common::container::Container;
use crate::common::exec::Exec;
use crate::common::leaks::{self, STATE_DIRECTORY, Traces, task_directory};
use crate::common::node::Node;
use crate::common::spec::Spec;
use crate::common::stdio::{Fifos, Gate, Scratch};
use crate::common::task::{Io, SIGKILL};
use crate::common::{cgroup, daemon, needs, process, shim, wait};

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

    /// Fills the file system.
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
        // The daemon writes each new record to a file of this name first.
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
    let directory = task_directory(&container.id);
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
    // The next daemon reads both exits from the units.
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

/// A limit of the tasks (threads) of the daemon that runs now, until this is dropped.
struct TaskLimit {
    cgroup: PathBuf,
    /// The hierarchy of cgroup v1 that has the controller here, mounted for this test, and the daemon.
    hierarchy: Option<(PathBuf, u32)>,
}

impl TaskLimit {
    /// `None` if there is no such controller.
    fn of(daemon: u32) -> Option<TaskLimit> {
        let unified = cgroup::of(daemon);
        if unified.join("pids.max").exists() {
            return Some(TaskLimit { cgroup: unified, hierarchy: None });
        }
        let hierarchy = PathBuf::from("/run/e2e-pids");
        fs::create_dir_all(&hierarchy).expect("make a mountpoint");
        let mounted =
            process::run("mount", &["-t", "cgroup", "-o", "pids", "none", &hierarchy.to_string_lossy()]);
        if mounted.code != Some(0) {
            let _ = fs::remove_dir(&hierarchy);
            return None;
        }
        let cgroup = hierarchy.join("e2e-daemon");
        fs::create_dir_all(&cgroup).expect("make a cgroup");
        fs::write(cgroup.join("cgroup.procs"), daemon.to_string()).expect("move the daemon");
        Some(TaskLimit { cgroup, hierarchy: Some((hierarchy, daemon)) })
    }

    /// The daemon can start no thread and no process in its cgroup. It keeps those that it has.
    fn take_room(&self) {
        fs::write(self.cgroup.join("pids.max"), "1").expect("lower the limit");
    }

    fn give_room(&self) {
        fs::write(self.cgroup.join("pids.max"), "max").expect("raise the limit");
    }

    fn tasks(&self) -> usize {
        cgroup::read(&self.cgroup, "pids.current").parse().expect("a number of tasks")
    }
}

impl Drop for TaskLimit {
    fn drop(&mut self) {
        self.give_room();
        if let Some((hierarchy, daemon)) = &self.hierarchy {
            // The daemon has ended, if the test has failed.
            let _ = fs::write(hierarchy.join("cgroup.procs"), daemon.to_string());
            let _ = fs::remove_dir(&self.cgroup);
            process::run("umount", &[&hierarchy.to_string_lossy()]);
            let _ = fs::remove_dir(hierarchy);
        }
    }
}

/// The most tasks of the daemon when it has nothing to do: the main thread, two workers, two threads for blocking work,
/// which are used in turn, the one that keeps descriptors, five for streams, and two that close them.
const IDLE_TASKS: usize = 13;

#[test]
fn a_daemon_that_may_start_no_thread_refuses_calls_and_works_again_when_it_may() {
    needs!(OurShim);
    let node = Node::exclusive();
    // The daemon has opened the files that it opens for its first container and exec.
    node.container("first", Spec::sleeping()).started(&Io::default()).exec_sh("true").end();
    let before = Traces::take();
    let daemon = wait::until("the daemon serves", daemon::serving);
    let Some(limit) = TaskLimit::of(daemon) else {
        return needs::skip(needs::name_of(|| ()), "no pids controller here");
    };
    let (gate, scratch) = (Gate::new(), Scratch::new("tasks"));
    let log = Io { stdout: format!("file://{}", scratch.text("log")), ..Io::default() };
    let script = format!("echo first; {}; echo second; sleep 100000", Gate::WAIT);
    let logging = node.container("logging", gate.bind(Spec::sh(&script))).started(&log);
    let container = node.container("tasks", Spec::sleeping()).started(&Io::default());
    let killed = node.container("killed", Spec::sleeping()).started(&Io::default());
    let exec = container.exec(Spec::sleeping()).started(&Io::default());
    let refused_exec = container.exec(Spec::sleeping()).added(&Io::default());
    wait::until_true("there is output", || scratch.read("log") == "first\n");
    wait::until_true("idle threads have ended", || limit.tasks() <= IDLE_TASKS);

    limit.take_room();
    let waiting = (killed.waiting(), exec.waiting());
    killed.kill(SIGKILL).expect("kill an init process");
    exec.kill(SIGKILL).expect("kill an exec");
    assert_eq!(waiting.0.exit().expect("wait").status, 137);
    assert_eq!(waiting.1.exit().expect("wait for an exec").status, 137);
    gate.open();
    let refused = node.container("refused", Spec::sleeping()).make();
    for _ in 0..5 {
        let added = container.exec(Spec::sleeping()).add(&Io::default()).map(drop);
        for refusal in [refused.create(&Io::default()).map(drop), refused_exec.start().map(drop), added] {
            let refusal = refusal.expect_err("a call that needs a thread");
            assert!(refusal.message().contains("no thread can be made"), "{refusal}");
        }
        container.pause().expect("pause");
        container.resume().expect("resume");
        assert!(container.pids().expect("pids").contains(&container.pid()));
    }
    exec.delete().expect("delete an exec");
    let deleted = killed.delete();
    if let Err(refusal) = &deleted {
        // In cgroup v1, the commands of the OCI runtime count as tasks of the daemon.
        assert!(limit.hierarchy.is_some(), "{refusal}");
        assert!(refusal.message().contains("Resource temporarily unavailable"), "{refusal}");
    }
    assert_eq!(scratch.read("log"), "first\n", "there is no thread that writes");

    limit.give_room();
    assert_eq!(daemon::serving(), Some(daemon), "the daemon lives");
    wait::until_true("no output is lost", || scratch.read("log") == "first\nsecond\n");
    if deleted.is_err() {
        killed.delete().expect("delete again");
    }
    refused.create(&Io::default()).expect("create again");
    refused.delete().expect("delete");
    refused_exec.start().expect("start again");
    refused_exec.end();
    drop(refused_exec);
    container.end();
    logging.end();
    drop((limit, gate, scratch, logging, container, killed, refused));
    leaks::assert_none("a daemon that could start no thread", &before);
}

/// The tasks of a daemon that has just started and may have no threads for streams: the main thread, two workers, a thread for
/// blocking work, the one that keeps descriptors, and its guard.
const FIRST_TASKS: usize = 6;

#[test]
fn a_daemon_that_may_start_no_thread_while_it_recovers_loses_no_output() {
    needs!(OurShim);
    let node = Node::exclusive();
    let (gate, fifos) = (Gate::new(), Fifos::new("few"));
    let container = node.container("few", gate.bind(Spec::sleeping())).started(&Io::default());
    let daemon = wait::until("the daemon serves", daemon::serving);
    let Some(limit) = TaskLimit::of(daemon) else {
        return needs::skip(needs::name_of(|| ()), "no pids controller here");
    };
    let (mut stdout, _stderr) = (fifos.stdout(), fifos.stderr());
    // The daemon copies the output of an exec.
    let script = format!("echo first; {}; echo second", Gate::WAIT);
    let exec = container.exec(gate.bind(Spec::sh(&script))).started(&fifos.output());
    assert_eq!(stdout.until(|bytes| bytes.ends_with(b"\n")), b"first\n");
    let command = match &limit.hierarchy {
        None => format!("[Service]\nTasksMax={FIRST_TASKS}\n"),
        Some(_) => {
            fs::write(limit.cgroup.join("pids.max"), FIRST_TASKS.to_string()).expect("set a limit");
            let enter =
                format!("echo 0 >{}/cgroup.procs; exec {} serve", limit.cgroup.display(), shim::BINARY);
            format!("[Service]\nExecStart=\nExecStart=+/bin/sh -c \"{enter}\"\n")
        }
    };
    let drop_in = daemon::DropIn::new(&command);
    let limited = wait::until("the next daemon serves", daemon::serving);
    assert_ne!(limited, daemon);
    gate.open();
    assert_eq!(stdout.until(|bytes| bytes.ends_with(b"\n")), b"second\n");
    assert_eq!(exec.exit_status(), 0);
    exec.delete().expect("delete");
    limit.give_room();
    drop(drop_in);
    wait::until("a daemon without a limit serves", daemon::serving);
    assert_eq!(container.exec_sh("exit 6").exit_status(), 6);
    container.end();
}

/// A daemon for which these system calls fail, as if there were no more of the descriptors that they make.
fn without_descriptors_of(calls: &str) -> daemon::DropIn {
    // The unit's own command has the flag that lifts such a filter.
    daemon::DropIn::new(&format!(
        "[Service]\nSystemCallFilter=~{calls}\nSystemCallErrorNumber=EMFILE\nExecStart=\nExecStart={} serve\n",
        shim::BINARY
    ))
}

#[test]
fn a_daemon_without_an_inotify_instance_serves() {
    needs!(OurShim);
    let node = Node::exclusive();
    let container = node.container("unwatched", Spec::sleeping()).started(&Io::default());
    // As if containers had used up all instances of root.
    let drop_in = without_descriptors_of("inotify_init inotify_init1");
    let daemon = wait::until("the daemon serves", daemon::serving);
    let is_inotify = |entry: &fs::DirEntry| {
        fs::read_link(entry.path()).is_ok_and(|target| target == Path::new("anon_inode:inotify"))
    };
    let open = fs::read_dir(format!("/proc/{daemon}/fd")).expect("read the daemon's descriptors");
    assert_eq!(open.flatten().filter(is_inotify).count(), 0);
    assert_eq!(container.exec_sh("exit 3").exit_status(), 3);
    // The client has not opened its FIFO yet. The daemon watches the FIFO without inotify, too.
    let fifos = Fifos::new("unwatched");
    let io = fifos.output();
    let created = std::thread::scope(|scope| {
        let creating = scope.spawn(|| node.container("late", Spec::sh("echo out; exit 4")).created(&io));
        let (stdout, stderr) = (fifos.stdout(), fifos.stderr());
        (creating.join().expect("create"), stdout, stderr)
    });
    let (late, mut stdout, _stderr) = created;
    late.start().expect("start");
    assert_eq!(late.exit_status(), 4);
    assert_eq!(stdout.until(|bytes| bytes.ends_with(b"\n")), b"out\n");
    late.delete().expect("delete");
    container.pause().expect("pause");
    container.resume().expect("resume");
    assert_eq!(daemon::serving(), Some(daemon));
    drop(drop_in);
    wait::until("the next daemon serves", daemon::serving);
    container.end();
}

#[test]
fn a_signal_that_can_not_be_sent_now_is_not_reported_as_sent() {
    needs!(OurShim);
    let node = Node::exclusive();
    let container = node.container("unsignalled", Spec::sleeping()).started(&Io::default());
    let exec = container.exec(Spec::sleeping()).started(&Io::default());
    let drop_in = without_descriptors_of("pidfd_open");
    wait::until("the daemon serves", daemon::serving);
    for (what, refused) in [("init", container.kill(SIGKILL)), ("exec", exec.kill(SIGKILL))] {
        let refused = refused.expect_err(what);
        // NotFound would tell a client that the process has ended.
        assert_ne!(refused.code(), Code::NotFound, "{what}: {refused}");
        assert!(refused.message().contains("Too many open files"), "{what}: {refused}");
    }
    assert_eq!((container.phase(), exec.phase()), (Status::Running, Status::Running));
    drop(drop_in);
    wait::until("the next daemon serves", daemon::serving);
    exec.kill(SIGKILL).expect("kill the exec");
    assert_eq!(exec.exit_status(), 137);
    container.kill(SIGKILL).expect("kill the init process");
    assert_eq!(container.exit_status(), 137);
}
