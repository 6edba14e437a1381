//! Processes that end while no daemon runs: the next daemon reports their exits unchanged.

use std::time::{Duration, SystemTime};

use containerd_client::types::v1::Status;
use nix::sys::signal::Signal;
use prost_types::Timestamp;

use crate::attached::{self, Client};
use crate::common::container::Container;
use crate::common::events::Event;
use crate::common::exec::Exec;
use crate::common::node::Node;
use crate::common::shim;
use crate::common::spec::Spec;
use crate::common::systemd::{self, DAEMON_SERVICE, DAEMON_SOCKET};
use crate::common::task::{Io, Process, Waiting};
use crate::common::{daemon, process, wait};

/// Exits with 5 on a signal, and otherwise with 0.
const FIVE: &str = "trap 'exit 5' TERM; echo ready; sleep 100000 >/dev/null 2>&1 & wait";
const ZERO: &str = "trap 'exit 0' TERM; echo ready; sleep 100000 >/dev/null 2>&1 & wait";
/// Has the default action for signals. PID 1 of a pid namespace would ignore SIGTERM.
const NONE: &str = "echo ready; exec sleep 100000";

/// The way in which the process ends.
#[derive(Clone, Copy, Debug)]
enum By {
    Signal(Signal),
    /// `systemctl stop`. Afterwards systemd does not know how the process ended.
    Stop,
}

const ENDS: [(&str, By, u32); 8] = [
    (ZERO, By::Signal(Signal::SIGTERM), 0),
    (FIVE, By::Signal(Signal::SIGTERM), 5),
    (NONE, By::Signal(Signal::SIGTERM), 143),
    (NONE, By::Signal(Signal::SIGKILL), 137),
    (NONE, By::Signal(Signal::SIGSEGV), 139),
    (ZERO, By::Stop, 0),
    (FIVE, By::Stop, 5),
    (NONE, By::Stop, 143),
];

/// A process that the test ends in one of these ways.
struct Doomed<'n> {
    what: String,
    container: Container<'n>,
    exec: Option<Exec<'n>>,
    by: By,
    status: u32,
    pid: u32,
    waiting: Waiting<'n>,
    _client: Client,
    /// The process has ended between these times.
    span: Option<(SystemTime, SystemTime)>,
}

impl<'n> Doomed<'n> {
    fn new(node: &'n Node, is_exec: bool, (script, by, status): (&str, By, u32)) -> Doomed<'n> {
        let what = format!("{} {script:?} by {by:?}", if is_exec { "exec" } else { "init" });
        let spec = Spec::sh(script).in_host_namespace("pid");
        let container = |spec: Spec, io: &Io| node.container("doomed", spec).started(io);
        let (container, exec, mut client) = if is_exec {
            let container = container(spec.sleeping_instead(), &Io::default());
            let (exec, client) = attached::exec(&container, spec);
            (container, Some(exec), client)
        } else {
            let (container, client) = Client::attached(spec, container);
            (container, None, client)
        };
        client.until("ready\n");
        let process: &Process = exec.as_deref().unwrap_or(&container);
        let (pid, waiting) = (process.pid(), process.waiting());
        Doomed { what, container, exec, by, status, pid, waiting, _client: client, span: None }
    }

    fn process(&self) -> &Process<'n> {
        self.exec.as_deref().unwrap_or(&self.container)
    }

    fn unit(&self) -> String {
        match &self.exec {
            Some(exec) => systemd::unit_of_exec(&self.container, exec),
            None => systemd::unit_of(&self.container),
        }
    }

    /// Ends the process, and waits until systemd knows its exit.
    fn end(&mut self) {
        let before = SystemTime::now();
        match self.by {
            By::Signal(signal) => daemon::signal(self.pid, signal),
            By::Stop => drop(process::succeed("systemctl", &["stop", &self.unit()])),
        }
        let unit = self.unit();
        wait::until_true("systemd has seen the end", || systemd::main_pid(&unit) == 0);
        self.span = Some((before, SystemTime::now()));
    }

    fn check(self) {
        let what = self.what.clone();
        let told = self.process().wait().unwrap_or_else(|error| panic!("wait, {what}: {error}"));
        assert_eq!(told.status, self.status, "{what}");
        let (from, to) = self.span.expect("it has ended");
        let at = time(told.at.as_ref().unwrap_or_else(|| panic!("no time, {what}")));
        assert!(from <= at && at <= to, "{what}: {at:?} is not between {from:?} and {to:?}");
        let state = self.process().state().expect("state");
        assert_eq!(
            (state.status(), state.exit_status, state.exited_at),
            (Status::Stopped, told.status, told.at)
        );
        assert_eq!(self.process().delete().expect("delete").exit_status, told.status, "{what}");
        let early = self.waiting.exit().unwrap_or_else(|error| panic!("the early Wait, {what}: {error}"));
        assert_eq!(early, told, "the early Wait, {what}");
    }
}

fn time(stamp: &Timestamp) -> SystemTime {
    let seconds = u64::try_from(stamp.seconds).expect("a time after 1970");
    let nanos = u32::try_from(stamp.nanos).expect("a part of a second");
    SystemTime::UNIX_EPOCH + Duration::new(seconds, nanos)
}

/// Ends processes of each kind in each way while no daemon runs.
fn check(while_away: impl FnOnce(&mut dyn FnMut())) {
    let node = Node::exclusive();
    let events = node.subscribe();
    let mut doomed: Vec<Doomed> = [false, true]
        .into_iter()
        .flat_map(|is_exec| ENDS.map(|end| (is_exec, end)))
        // systemd kills an exec that it stops, and does not wait for it, because the exec is not its child. So the exit code is
        // unknown, with or without a daemon.
        .filter(|(is_exec, (_, by, _))| !(*is_exec && matches!(by, By::Stop)))
        .map(|(is_exec, end)| Doomed::new(&node, is_exec, end))
        .collect();
    while_away(&mut || doomed.iter_mut().for_each(Doomed::end));
    let expected: Vec<(String, String, u32)> = doomed
        .iter()
        .map(|one| {
            let id = one.exec.as_ref().map_or(&one.container.id, |exec| &exec.id);
            (one.container.id.clone(), id.clone(), one.status)
        })
        .collect();
    doomed.into_iter().for_each(Doomed::check);

    let mut told: Vec<(String, String, u32)> = Vec::new();
    wait::until_true("each exit is published", || {
        while let Some(event) = events.next("default", Duration::ZERO).expect("containerd is there") {
            if let Event::Exit(exit) = event {
                told.push((exit.container_id, exit.id, exit.exit_status));
            }
        }
        expected.iter().all(|exit| told.contains(exit))
    });
    for (container, id, status) in &expected {
        let all: Vec<u32> =
            told.iter().filter(|exit| (&exit.0, &exit.1) == (container, id)).map(|exit| exit.2).collect();
        assert!(all.iter().all(|told| told == status), "{id} ended with {status}, reported was {all:?}");
    }
}

#[test]
fn exits_that_a_daemon_missed_are_known_to_the_next() {
    needs!(OurShim);
    check(|end_all| {
        let down = daemon::Down::begin();
        end_all();
        down.end();
    });
}

#[test]
fn exits_while_there_is_no_daemon_are_known_to_the_next() {
    needs!(OurShim, PreservedStore);
    check(|end_all| {
        process::succeed("systemctl", &["stop", DAEMON_SOCKET, DAEMON_SERVICE]);
        end_all();
        // This calls `start`, as containerd does for the next container. If the units are not installed, nothing else
        // starts the daemon.
        shim::socket();
    });
}

#[test]
fn an_exit_that_two_daemons_missed_is_known_to_the_third() {
    needs!(OurShim);
    let node = Node::exclusive();
    let mut doomed = Doomed::new(&node, false, ENDS[1]);
    let down = daemon::Down::begin();
    doomed.end();
    down.end();
    (0..3).for_each(|_| daemon::killed());
    doomed.check();
}

#[test]
fn a_container_that_was_stopped_without_a_daemon_can_be_deleted_by_the_next() {
    needs!(OurShim);
    let node = Node::exclusive();
    let mut doomed = Doomed::new(&node, false, ENDS[6]);
    let down = daemon::Down::begin();
    doomed.end();
    drop(down);
    // The first call comes before any client has waited.
    assert_eq!(doomed.container.delete().expect("delete").exit_status, 5);
    wait::until_true("its unit is gone", || {
        systemd::list_units(&systemd::unit_of(&doomed.container)).is_empty()
    });
    let _ = shim::socket();
}
