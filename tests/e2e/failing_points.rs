//! The step after each fault point fails, in every way in which a step can fail: the call succeeds or gets a clear error,
//! the same call made again succeeds, the daemon continues, and nothing is left over.
//!
//! One life of a container has many failures, one in each of its calls.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;

use containerd_client::tonic::{Code, Status};
use serde_json::json;

use crate::common::container::Container;
use crate::common::leaks::{self, Traces};
use crate::common::node::Node;
use crate::common::shim::{self, WithFaults};
use crate::common::spec::Spec;
use crate::common::stdio::Gate;
use crate::common::task::{Exit, Io, SIGTERM, Waiting};
use crate::common::{daemon, needs, process, wait};

use super::crash_points::{Client, Moment, REQUEST, Streams, is_of_every_life};

/// The failure that is due, once the daemon has passed its point.
const DUE: &str = "/run/containerd-shim-systemd-v1.fault.due";

/// The daemon can't open any descriptor until the test ends the failure.
const NO_DESCRIPTOR: &str = "no-descriptor";

/// Asks for all of [`FAILURES`] in one run (`E2E_FAILURE=all`).
const ALL: &str = "all";

/// The failures (`src/fault.rs`). [`NO_DESCRIPTOR`] is left to a run of its own (`E2E_FAILURE=no-descriptor`): its
/// lives wait for the daemon's second tries, of which each takes 10 s.
const FAILURES: [&str; 7] =
    ["no-space", "io", "limits-exceeded", "timed-out", "reply-lost", "denied", "runtime-killed"];

/// The calls during which the daemon always passes the point.
fn moments(point: &str) -> &'static [Moment] {
    match point {
        "connection.accepted" | "connection.kept" | "publish.noted" => &[Moment::Create],
        "connection.request-noted" => &[Moment::Start],
        "connection.request-taken" => &[Moment::Update],
        "connection.response-noted" => &[Moment::Pause],
        "connection.response-unsent" => &[Moment::Resume],
        "connection.response-sent" => &[Moment::Exec],
        "publish.taken" => &[Moment::Kill],
        // Delete removes the record. Whether an accepted event is written before depends on how fast containerd is.
        "record.written" | "record.replaced" => {
            &[Moment::Create, Moment::Start, Moment::ExecStart, Moment::ExecExit]
        }
        point => super::crash_points::moments(point),
    }
}

/// The streams without which no call passes the point.
fn needed_streams(point: &str) -> Option<Streams> {
    match point.split('.').next() {
        Some("stream") => Some(Streams::Fifos),
        Some("console") => Some(Streams::Terminal),
        _ => None,
    }
}

/// What fails in one life.
struct Failing {
    failure: &'static str,
    streams: Streams,
    /// The point after which a step fails, for each call.
    points: BTreeMap<Moment, String>,
}

impl Failing {
    /// Asks for the failure during this call.
    fn ask(&self, moment: Moment) {
        if let Some(point) = self.points.get(&moment) {
            fs::write(REQUEST, format!("fail {} {point}", self.failure)).expect("ask for a failure");
        }
    }

    /// Waits until the daemon has passed the point, and ends the failure. Returns true if there was one.
    fn end(&self, moment: Moment) -> bool {
        let Some(point) = self.points.get(&moment) else { return false };
        wait::until_true(&format!("{moment:?} passes {point}"), || !Path::new(REQUEST).exists());
        if self.failure == NO_DESCRIPTOR {
            give_descriptors();
        }
        // The file is still there if no step of this kind has followed.
        fs::remove_file(DUE).is_err()
    }

    /// Makes a call. If the call fails, it has to succeed the second time.
    fn during<T>(&self, moment: Moment, call: impl Fn() -> Result<T, Status>) -> T {
        self.ask(moment);
        let first = call();
        let has_failed = self.end(moment);
        let first = match first {
            Ok(done) => return done,
            Err(error) => error,
        };
        println!("  {moment:?}: {first}");
        // The daemon tries again when the bus refuses a call because of its limits.
        assert!(has_failed && self.failure != "limits-exceeded", "{moment:?} failed for no reason: {first}");
        assert!(first.message().len() > 20, "{moment:?} failed without a reason: {first}");
        call().unwrap_or_else(|error| panic!("{moment:?} failed with {first}, and again with {error}"))
    }

    /// As [`Self::during`], for a call that may have had its effect although it failed.
    fn gone(&self, moment: Moment, call: impl Fn() -> Result<(), Status>) {
        self.during(moment, || match call() {
            Err(error) if error.code() == Code::NotFound => Ok(()),
            done => done,
        });
    }

    /// Waits for the exit of a process. The daemon may have got the call when it had no descriptor, and could not see which
    /// containerd made it: then the call is made again.
    fn exit<'n>(&self, waiting: Waiting<'n>, again: impl Fn() -> Waiting<'n>) -> Exit {
        let exit = match waiting.exit() {
            Err(error) if self.failure == NO_DESCRIPTOR && error.code() == Code::Unavailable => {
                again().exit()
            }
            exit => exit,
        };
        exit.unwrap_or_else(|error| panic!("wait for an exit: {error}"))
    }
}

/// Raises the daemon's soft limit of descriptors to its hard limit.
fn give_descriptors() {
    let pid = wait::until("there is a daemon", daemon::pid).to_string();
    let limits = fs::read_to_string(format!("/proc/{pid}/limits")).expect("read the daemon's limits");
    let line = limits.lines().find(|line| line.starts_with("Max open files")).expect("a limit of files");
    let hard = line.split_whitespace().nth(4).expect("a hard limit");
    process::succeed("prlimit", &["--pid", &pid, &format!("--nofile={hard}:{hard}")]);
}

impl Drop for Failing {
    fn drop(&mut self) {
        // These files exist only if the life has ended too early.
        let _ = fs::remove_file(REQUEST);
        let _ = fs::remove_file(DUE);
    }
}

/// Lives that together have this failure after every point.
fn lives(failure: &'static str, points: &[String]) -> Vec<Failing> {
    const STREAMS: [Streams; 3] = [Streams::Fifos, Streams::None, Streams::Terminal];
    let mut lives: Vec<Failing> = Vec::new();
    // A connection waits for a descriptor, which the test would give to the daemon only after the call.
    let is_possible = |point: &&String| {
        failure != NO_DESCRIPTOR || !["connection.accepted", "connection.kept"].contains(&point.as_str())
    };
    for point in points.iter().filter(is_possible) {
        for moment in moments(point) {
            let needed = needed_streams(point);
            let streams = needed.unwrap_or(STREAMS[lives.len() % STREAMS.len()]);
            let fits = |life: &&mut Failing| needed.is_none_or(|needed| needed == life.streams);
            let free = lives.iter_mut().filter(fits).find(|life| !life.points.contains_key(moment));
            match free {
                Some(life) => drop(life.points.insert(*moment, point.clone())),
                None => {
                    lives.push(Failing { failure, streams, points: [(*moment, point.clone())].into() });
                }
            }
        }
    }
    lives
}

#[test]
fn every_step_may_fail() {
    needs!(OurShim, Faults);
    let only = std::env::var("E2E_FAILURE").unwrap_or_default();
    if only.is_empty() {
        return needs::skip(needs::name_of(|| ()), "takes minutes: E2E_FAILURE says which failure, or all");
    }
    let known = [ALL, NO_DESCRIPTOR].contains(&only.as_str()) || FAILURES.contains(&only.as_str());
    assert!(known, "E2E_FAILURE is {only:?}, not {ALL}, {NO_DESCRIPTOR} or one of {FAILURES:?}");
    let node = Node::exclusive();
    let _build = WithFaults::install();
    let neighbour = node.container("neighbour", Spec::sleeping()).started(&Io::default());
    let neighbour_pid = neighbour.pid();
    let points: Vec<_> = shim::points().into_iter().filter(|point| is_of_every_life(point)).collect();
    let without: BTreeSet<_> = points.iter().filter(|point| moments(point).is_empty()).collect();
    assert!(without.is_empty(), "nobody says when the daemon passes {without:?}");
    // The objects that a daemon makes for its first container, and keeps, are no leaks.
    live(&node, &Failing { failure: "none", streams: Streams::Terminal, points: BTreeMap::new() });
    let all = FAILURES.into_iter().filter(|_| only == ALL);
    let chosen = FAILURES.into_iter().chain([NO_DESCRIPTOR]).filter(|failure| *failure == only);
    let mut failures = Vec::new();
    for failure in all.chain(chosen) {
        for failing in lives(failure, &points) {
            let name = format!("{failure} with {:?} after {:?}", failing.streams, failing.points);
            println!("{name}");
            wait::until("the daemon serves", daemon::serving);
            let before = Traces::take();
            // One failure hides no other.
            let lived = catch_unwind(AssertUnwindSafe(|| live(&node, &failing)));
            drop(failing);
            if lived.is_err() || catch_unwind(|| leaks::assert_none(&name, &before)).is_err() {
                failures.push(name.clone());
            }
            assert_eq!(neighbour.pid(), neighbour_pid, "{name}: another container continues");
        }
    }
    assert!(failures.is_empty(), "{failures:#?}");
}

/// One container with one exec, from create to delete.
fn live(node: &Node, failing: &Failing) {
    let gate = Gate::new();
    let script = "trap 'exit 17' TERM; echo init; sleep 100000 & wait";
    let container = node.container("failing", gate.bind(failing.streams.spec(script))).make();
    let client = RefCell::new(None);
    let before = Traces::take();
    let has_failed = Cell::new(false);
    failing.during(Moment::Create, || {
        if has_failed.get() && failing.failure == NO_DESCRIPTOR {
            // The failed Create could remove nothing, so the next Create does that. By then containerd has given the
            // task up.
            let bundle = container.bundle();
            wait::until_true("containerd has removed the bundle", || !Path::new(&bundle).exists());
        } else if has_failed.get() {
            leaks::assert_none("a create that failed", &before);
        }
        // After a Create that failed, a client sees the end of the output.
        *client.borrow_mut() = Client::of(failing.streams);
        container.create(&failing.streams.io(&client.borrow())).inspect_err(|_| has_failed.set(true))
    });
    failing.during(Moment::Start, || container.start());
    match client.borrow_mut().as_mut() {
        Some(client) => client.expect("init"),
        // The script has set its trap when its child exists.
        None => wait::until_true("a child", || container.pids().is_ok_and(|pids| pids.len() == 2)),
    }
    exec(&container, failing, &gate);
    let daemon = wait::until("the daemon serves", daemon::serving);
    failing.during(Moment::Pause, || container.pause());
    failing.during(Moment::Resume, || container.resume());
    failing.during(Moment::Update, || container.update(&json!({})));
    let waiting = container.waiting();
    failing.gone(Moment::Kill, || container.kill(SIGTERM));
    assert_eq!(failing.exit(waiting, || container.waiting()).status, 17);
    failing.gone(Moment::Delete, || container.delete().map(drop));
    assert_eq!(daemon::serving(), Some(daemon), "the daemon continues");
}

fn exec(container: &Container, failing: &Failing, gate: &Gate) {
    // Without a client the output goes to the journal alone. If nobody copied it, the exec would not end.
    let output = match failing.streams {
        Streams::None => r"head -c 200000 /dev/zero | tr '\0' x",
        Streams::Fifos | Streams::Terminal => "echo exec",
    };
    let script = format!("{}; {output}; exit 9", Gate::WAIT);
    let mut client = Client::of(failing.streams);
    let exec = failing.during(Moment::Exec, || {
        let spec = failing.streams.spec(&script);
        container.exec(spec).id("failing").add(&failing.streams.io(&client))
    });
    let starts = Cell::new(0);
    failing.during(Moment::ExecStart, || {
        starts.set(starts.get() + 1);
        exec.start()
    });
    failing.ask(Moment::Recover);
    let recovers = failing.points.contains_key(&Moment::Recover);
    if recovers {
        daemon::kill_now();
    }
    failing.end(Moment::Recover);
    wait::until("the daemon serves", daemon::serving);
    if recovers && failing.failure == NO_DESCRIPTOR {
        // That daemon could not open all that it needs, so the next one takes over.
        daemon::killed();
    }
    let waiting = exec.waiting();
    failing.ask(Moment::ExecExit);
    gate.open();
    failing.end(Moment::ExecExit);
    assert_eq!(failing.exit(waiting, || exec.waiting()).status, 9);
    // After a failed start the client has seen the end of the output.
    if let (Some(client), 1) = (&mut client, starts.get()) {
        client.expect("exec");
    }
    failing.gone(Moment::ExecDelete, || exec.delete().map(drop));
}
