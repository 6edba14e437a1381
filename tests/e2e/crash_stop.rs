//! A daemon that was stopped, or that hangs, is started again, and nothing is lost.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use containerd_client::types::v1::Status;
use nix::sys::signal::Signal;

use crate::attached::Client;
use crate::common::container::Container;
use crate::common::node::Node;
use crate::common::shim;
use crate::common::spec::Spec;
use crate::common::systemd::{self, DAEMON_SERVICE, DAEMON_SOCKET};
use crate::common::task::{Io, SIGKILL};
use crate::common::{daemon, process, wait};

/// Stops the daemon. When this returns, none of its processes run, and the unit that starts the daemon again is active.
fn stop() {
    let pid = wait::until("there is a daemon", daemon::pid);
    daemon::systemctl("stop");
    wait::until_true("there is no daemon", || daemon::processes().is_empty());
    let said = systemd::messages(&[&format!("_PID={pid}"), "PRIORITY=4"]);
    assert!(!said.iter().any(|message| message.contains("wake unit")), "{said:?}");
}

fn sleeping(node: &Node) -> Container<'_> {
    node.container("stop", Spec::sleeping()).started(&Io::default())
}

#[test]
fn a_call_brings_a_stopped_daemon_back() {
    needs!(OurShim, PreservedStore);
    let node = Node::exclusive();
    let container = sleeping(&node);
    let exec = container.exec(Spec::sleeping()).started(&Io::default());
    let (pids, waits) = ((container.pid(), exec.pid()), [container.waiting(), exec.waiting()]);
    stop();
    assert!(process::runs(pids.0) && process::runs(pids.1), "containers run on");
    assert_eq!((container.pid(), exec.pid()), pids);
    assert_eq!(container.phase(), Status::Running);
    stop();
    exec.kill(SIGKILL).expect("kill an exec");
    stop();
    container.kill(SIGKILL).expect("kill");
    for waiting in waits {
        assert_eq!(waiting.exit().expect("a Wait from before").status, 137);
    }
    container.delete().expect("delete");
}

#[test]
fn a_call_brings_back_a_daemon_whose_slice_was_stopped() {
    needs!(OurShim, PreservedStore);
    let node = Node::exclusive();
    let container = sleeping(&node);
    let (pid, waiting) = (container.pid(), container.waiting());
    process::succeed("systemctl", &["stop", "containerd_shim.slice"]);
    wait::until_true("there is no daemon", || daemon::processes().is_empty());
    assert_eq!((container.pid(), container.phase()), (pid, Status::Running));
    container.kill(SIGKILL).expect("kill");
    assert_eq!(waiting.exit().expect("a Wait from before").status, 137);
}

#[test]
fn a_new_container_brings_a_stopped_daemon_back() {
    needs!(OurShim, PreservedStore);
    let node = Node::exclusive();
    let container = sleeping(&node);
    let waiting = container.waiting();
    stop();
    let new = node.container("new", Spec::sh("exit 14")).started(&Io::default());
    assert_eq!(new.exit_status(), 14);
    assert_eq!(container.phase(), Status::Running);
    container.kill(SIGKILL).expect("kill");
    assert_eq!(waiting.exit().expect("a Wait from before").status, 137);
}

#[test]
fn an_exit_while_the_daemon_is_stopped_is_known_to_the_next() {
    needs!(OurShim, PreservedStore);
    let node = Node::exclusive();
    let container = sleeping(&node);
    let (pid, waiting) = (container.pid(), container.waiting());
    stop();
    daemon::signal(pid, Signal::SIGKILL);
    wait::until_true("its process is gone", || !process::exists(pid));
    assert_eq!(container.exit_status(), 137);
    assert_eq!(waiting.exit().expect("a Wait from before").status, 137);
    assert_eq!(container.delete().expect("delete").exit_status, 137);
}

#[test]
fn daemon_and_socket_may_be_stopped_and_started_again() {
    needs!(OurShim, PreservedStore);
    let node = Node::exclusive();
    let container = sleeping(&node);
    let (pid, waiting) = (container.pid(), container.waiting());
    process::succeed("systemctl", &["stop", DAEMON_SOCKET, DAEMON_SERVICE]);
    wait::until_true("there is no daemon", || daemon::pid().is_none());
    // This calls `start`, as containerd does for the next container. If the units are not installed, nothing else
    // starts the daemon.
    shim::socket();
    assert_eq!((container.pid(), container.phase()), (pid, Status::Running));
    container.kill(SIGKILL).expect("kill");
    assert_eq!(waiting.exit().expect("a Wait from before").status, 137);
}

/// While this exists, systemd does not listen for the daemon, and a new daemon gets no socket.
struct WithoutSocket(PathBuf);

impl WithoutSocket {
    fn new() -> WithoutSocket {
        // Of all directories for unit files, the only one that hides the file of a transient unit.
        let directory = Path::new("/run/systemd/system.control");
        fs::create_dir_all(directory).expect("make a directory for unit files");
        let mask = directory.join(DAEMON_SOCKET);
        symlink("/dev/null", &mask).expect("mask the socket");
        let without = WithoutSocket(mask);
        process::succeed("systemctl", &["daemon-reload"]);
        process::succeed("systemctl", &["stop", DAEMON_SOCKET]);
        without
    }
}

impl Drop for WithoutSocket {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.0);
        process::run("systemctl", &["daemon-reload"]);
        // systemd refuses to start a socket whose service is active.
        process::run("systemctl", &["stop", DAEMON_SOCKET, DAEMON_SERVICE]);
        // If this fails, the next test fails.
        shim::start(&shim::Bundle::new("socket"), "socket", &[], &[]);
    }
}

#[test]
fn a_daemon_without_its_socket_serves_the_connections_of_earlier_daemons() {
    needs!(OurShim, PreservedStore);
    let node = Node::exclusive();
    let container = sleeping(&node);
    let (pid, waiting) = (container.pid(), container.waiting());
    let without = WithoutSocket::new();
    daemon::killed();
    assert_ne!(systemd::property(DAEMON_SOCKET, "ActiveState"), "active");
    assert_eq!((container.pid(), container.phase()), (pid, Status::Running));
    assert_eq!(container.exec_sh("exit 5").exit_status(), 5);
    drop(without);
    assert_eq!((container.pid(), container.phase()), (pid, Status::Running));
    container.kill(SIGKILL).expect("kill");
    assert_eq!(waiting.exit().expect("a Wait from before").status, 137);
}

/// systemd starts no unit that it has to stop after a unit which it is stopping.
#[test]
fn a_daemon_that_is_killed_while_systemd_stops_a_container_is_started_at_once() {
    needs!(OurShim);
    let node = Node::exclusive();
    let stubborn = Spec::sh("trap '' TERM; echo ready; while :; do sleep 1; done");
    let stubborn = stubborn.annotation("org.systemd.property.TimeoutStopUSec", "uint64 300000000");
    let (stubborn, mut client) =
        Client::attached(stubborn, |spec, io| node.container("stubborn", spec).started(io));
    client.until("ready\n");
    let other = sleeping(&node);
    let unit = systemd::unit_of(&stubborn);
    process::succeed("systemctl", &["stop", "--no-block", &unit]);
    wait::until_true("systemd stops it", || systemd::property(&unit, "SubState") == "stop-sigterm");
    daemon::killed();
    assert_eq!(other.exec(Spec::sh("exit 3")).started(&Io::default()).exit_status(), 3);
    assert_eq!(systemd::property(&unit, "SubState"), "stop-sigterm");
    stubborn.kill(SIGKILL).expect("kill");
    assert_eq!(stubborn.exit_status(), 137);
}

#[test]
fn the_watchdog_finds_a_daemon_that_hangs() {
    needs!(OurShim);
    let node = Node::exclusive();
    let _watchdog = daemon::DropIn::new("[Service]\nWatchdogSec=4\n");
    let container = sleeping(&node);
    let waiting = container.waiting();
    let (pid, restarts) = (wait::until("the daemon serves", daemon::serving), daemon::restarts());
    daemon::signal(pid, Signal::SIGSTOP);
    let begin = Instant::now();
    thread::scope(|scope| {
        scope.spawn(|| assert_eq!(container.exec_sh("exit 9").exit_status(), 9));
        scope.spawn(|| {
            let new = node.container("new", Spec::sh("exit 8")).started(&Io::default());
            assert_eq!(new.exit_status(), 8);
        });
    });
    container.kill(SIGKILL).expect("kill");
    assert_eq!(waiting.exit().expect("a Wait from before").status, 137);
    assert!(begin.elapsed() < Duration::from_secs(25), "it took {:?}", begin.elapsed());
    daemon::wait_for_another(pid);
    assert_eq!(daemon::restarts(), restarts + 1);
    assert_eq!(systemd::property(DAEMON_SERVICE, "Result"), "success", "the next one is well");
    assert_eq!(container.delete().expect("delete").exit_status, 137);
}
