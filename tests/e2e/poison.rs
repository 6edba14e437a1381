//! A request or record that crashes the daemon, or hangs in it, is tried twice, but not a third time. The request
//! gets an error, the record is moved aside, and everything else continues.

use std::fs;
use std::path::PathBuf;

use nix::sys::signal::Signal;

use crate::common::leaks::{STATE_DIRECTORY, task_directory};
use crate::common::node::{NAMESPACE, Node};
use crate::common::shim::WithFaults;
use crate::common::spec::Spec;
use crate::common::systemd::{Cursor, DAEMON_SERVICE};
use crate::common::task::{Io, SIGKILL, SIGTERM};
use crate::common::{daemon, wait};

/// Lets the daemon crash or hang at a point, each time, until this is dropped.
struct Fault;

impl Fault {
    const REQUEST: &str = "/run/containerd-shim-systemd-v1.fault";

    /// `kind`: `crash`, `exhaust` (all memory) or `hang`.
    fn at(kind: &str, point: &str) -> Fault {
        fs::write(Self::REQUEST, format!("{kind} {point}")).expect("ask for a fault");
        Fault
    }
}

impl Drop for Fault {
    fn drop(&mut self) {
        // If the removal fails, the next test fails.
        let _ = fs::remove_file(Self::REQUEST);
    }
}

/// The log lines of the daemon since that time.
fn logged(since: &Cursor) -> Vec<String> {
    let entries = since.entries_since(&[&format!("_SYSTEMD_UNIT={DAEMON_SERVICE}")]);
    entries.iter().filter_map(|entry| entry["MESSAGE"].as_str().map(str::to_string)).collect()
}

#[test]
fn a_request_that_crashes_the_daemon_twice_gets_an_error_and_nothing_else_does() {
    needs!(OurShim, Faults);
    let node = Node::exclusive();
    let _build = WithFaults::install();
    let script = "trap 'exit 17' TERM; sleep 100000 & wait";
    let container = node.container("poison", Spec::sh(script)).started(&Io::default());
    let (pid, waiting) = (container.pid(), container.waiting());
    let (before, restarts) = (Cursor::now(), daemon::restarts());
    for (kind, round) in [("crash", 1), ("exhaust", 2)] {
        let crashing = Fault::at(kind, "kill.sent");
        // The signal does nothing, because only the call matters here.
        let error = container.kill(nix::libc::SIGWINCH as u32).expect_err("a call that crashes the daemon");
        drop(crashing);
        assert!(error.message().contains("Kill of task"), "{error:?}");
        assert!(error.message().contains(&container.id), "{error:?}");
        wait::until("the daemon serves", daemon::serving);
        // The second call is a different one, and gets two tries of its own.
        assert_eq!(daemon::restarts() - restarts, 2 * round);
    }
    // An older containerd does not send the namespace.
    let named = |line: &&String| line.contains("Kill of task") && line.contains(&container.id);
    wait::until_true("both are named in the log", || {
        logged(&before).iter().filter(named).filter(|line| line.contains("2 times")).count() == 2
    });

    assert_eq!(container.pid(), pid);
    container.kill(SIGTERM).expect("kill");
    assert_eq!(waiting.exit().expect("a wait that was under way").status, 17);
    container.delete().expect("delete");
}

#[test]
fn a_request_that_hangs_in_the_daemon_twice_gets_an_error_and_nothing_else_does() {
    needs!(OurShim, Faults);
    let node = Node::exclusive();
    let _build = WithFaults::install();
    let _watchdog = daemon::DropIn::new("[Service]\nWatchdogSec=4\n");
    wait::until("the daemon serves", daemon::serving);
    let containers: Vec<_> = ["one", "two", "three", "four"]
        .map(|name| node.container(name, Spec::sleeping()).started(&Io::default()))
        .into_iter()
        .collect();
    let pids: Vec<_> = containers.iter().map(|container| container.pid()).collect();
    // One request leaves a thread to the daemon, which ends itself. Four leave none, and systemd's watchdog ends the daemon.
    for count in [1, containers.len()] {
        let restarts = daemon::restarts();
        let hang = Fault::at("hang", "kill.sent");
        std::thread::scope(|scope| {
            for container in &containers[..count] {
                scope.spawn(|| {
                    let error = container.kill(nix::libc::SIGWINCH as u32).expect_err("a call that hangs");
                    assert!(error.message().contains("crashed or blocked"), "{error:?}");
                    assert!(error.message().contains(&container.id), "{error:?}");
                });
            }
        });
        drop(hang);
        wait::until("the daemon serves", daemon::serving);
        let restarted = (daemon::restarts() - restarts) as usize;
        // Two threads serve calls, so at least one more request is tried with each end of the daemon.
        assert!((2..=2 * count).contains(&restarted), "{count} requests: {restarted} restarts");
    }
    for (container, pid) in containers.iter().zip(pids) {
        assert_eq!(container.pid(), pid);
        container.kill(SIGKILL).expect("kill");
        assert_eq!(container.exit_status(), 137);
        container.delete().expect("delete");
    }
}

#[test]
fn a_daemon_that_was_stopped_for_long_blames_no_request() {
    needs!(OurShim);
    let node = Node::exclusive();
    let _watchdog = daemon::DropIn::new("[Service]\nWatchdogSec=2\nTimeoutAbortSec=1\n");
    wait::until("the daemon serves", daemon::serving);
    let container = node.container("stopped", Spec::sleeping()).started(&Io::default());
    let waiting = container.waiting();
    let before = Cursor::now();
    let restarts = daemon::restarts();
    daemon::signal(daemon::pid().expect("a daemon"), Signal::SIGSTOP);
    wait::until("the watchdog has ended the daemon", || (daemon::restarts() > restarts).then_some(()));
    wait::until("the daemon serves", daemon::serving);
    assert!(!logged(&before).iter().any(|line| line.contains("crashed or blocked")), "{:?}", logged(&before));
    container.kill(SIGKILL).expect("kill");
    assert_eq!(waiting.exit().expect("a wait that was under way").status, 137);
    container.delete().expect("delete");
}

#[test]
fn a_request_is_not_given_up_because_the_daemon_is_killed_during_it() {
    needs!(OurShim);
    let node = Node::exclusive();
    let container = node.container("killed", Spec::sleeping()).started(&Io::default());
    let waiting = container.waiting();
    for _ in 0..6 {
        daemon::killed();
    }
    container.kill(SIGKILL).expect("kill");
    assert_eq!(waiting.exit().expect("a wait that was under way").status, 137);
    container.delete().expect("delete");
}

#[test]
fn a_record_that_crashes_the_daemon_twice_is_moved_aside_and_can_be_moved_back() {
    needs!(OurShim, Faults);
    let node = Node::exclusive();
    let _build = WithFaults::install();
    let container = node.container("record", Spec::sleeping()).started(&Io::default());
    let pid = container.pid();
    let id = &container.id;
    let place = task_directory(id).join("record.json");
    let aside = PathBuf::from(STATE_DIRECTORY).join(format!(".crashed/{NAMESPACE}:{id}.json"));
    let before = Cursor::now();
    let crashing = Fault::at("crash", "recover.task-begun");
    daemon::kill_now();
    wait::until("the daemon serves", daemon::serving);
    drop(crashing);
    assert!(aside.exists() && !place.exists(), "{}", aside.display());
    let named = |line: &String| line.contains(&*aside.to_string_lossy());
    wait::until_true("it is named in the log", || logged(&before).iter().any(named));
    let other = node.container("other", Spec::sh("exit 7")).started(&Io::default());
    assert_eq!(other.exit_status(), 7);

    fs::rename(&aside, &place).expect("move the record back");
    daemon::killed();
    assert_eq!(container.pid(), pid);
    container.kill(SIGKILL).expect("kill");
    assert_eq!(container.exit_status(), 137);
    container.delete().expect("delete");
    fs::remove_dir(aside.parent().expect("a directory")).expect("it is empty");
}
