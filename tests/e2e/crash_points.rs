//! The daemon is killed at every fault point of its test build, in the middle of every call. Each call is answered as
//! if nothing had happened, and later calls work.

use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;

use containerd_client::types::v1::Status;
use serde_json::json;

use crate::checkpoint;
use crate::common::audit::Audit;
use crate::common::container::Container;
use crate::common::events::Event;
use crate::common::leaks::{self, Traces};
use crate::common::node::{NAMESPACE, Node, number};
use crate::common::shim::{self, WithFaults};
use crate::common::spec::Spec;
use crate::common::stdio::{Fifos, Gate, Reader};
use crate::common::task::{Io, SIGTERM};
use crate::common::{daemon, wait};
use crate::runtime_options::{Noting, runc_options};

/// The file that names the point at which the daemon has to end. The daemon removes the file before it ends.
pub const REQUEST: &str = "/run/containerd-shim-systemd-v1.fault";

/// A moment in the life of a container, just before one call or one end.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Moment {
    Create,
    Start,
    Exec,
    ExecStart,
    ExecExit,
    ExecDelete,
    Recover,
    Pause,
    Resume,
    Update,
    Kill,
    Delete,
}

/// The moments at which the daemon may pass a point, by the beginning of the point's name. One of them has to pass it.
pub fn moments(point: &str) -> &'static [Moment] {
    match point.split('.').next().unwrap_or_default() {
        "create" => &[Moment::Create],
        "stream" | "console" => &[Moment::Create, Moment::ExecStart],
        "start" => &[Moment::Start],
        "exec" => &[Moment::Exec],
        "exec-start" => &[Moment::ExecStart],
        "exec-delete" => &[Moment::ExecDelete],
        "exit" => &[Moment::ExecExit, Moment::Kill],
        "recover" => &[Moment::Recover],
        "pause" => &[Moment::Pause],
        "resume" => &[Moment::Resume],
        "update" => &[Moment::Update],
        "kill" => &[Moment::Kill],
        "delete" => &[Moment::Delete],
        "publish" => &[Moment::Create, Moment::Kill, Moment::Delete],
        "record" => &[Moment::Create, Moment::Start, Moment::ExecStart, Moment::ExecExit, Moment::Delete],
        // Every call passes these points, but only the first call of a container makes a connection.
        "connection" => &[Moment::Create, Moment::Start, Moment::ExecStart, Moment::Delete],
        // The test fails and names the point: this list does not say yet which call passes the point.
        _ => &[],
    }
}

/// True for a point that the daemon passes in the life of every container. The points of a checkpoint are in `checkpoint`, and
/// those of a call that fails below.
pub fn is_of_every_life(point: &str) -> bool {
    !checkpoint::is_point(point) && !point.starts_with("failed-")
}

/// The kind of stdio that the processes have.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Streams {
    Fifos,
    None,
    Terminal,
}

/// The client's ends of a process's streams.
pub struct Client {
    fifos: Fifos,
    stdout: Reader,
    _stderr: Reader,
}

impl Client {
    pub fn of(streams: Streams) -> Option<Client> {
        let fifos = Fifos::new("point");
        let (stdout, stderr) = (fifos.stdout(), fifos.stderr());
        (streams != Streams::None).then_some(Client { fifos, stdout, _stderr: stderr })
    }

    /// Waits for one line of output.
    pub fn expect(&mut self, line: &str) {
        let seen = self.stdout.until(|bytes| bytes.ends_with(b"\n"));
        assert_eq!(String::from_utf8_lossy(&seen).trim_end(), line);
    }
}

impl Streams {
    pub fn io(self, client: &Option<Client>) -> Io {
        match (self, client) {
            (Streams::Terminal, Some(client)) => client.fifos.terminal(),
            (_, Some(client)) => client.fifos.io(),
            (_, None) => Io::default(),
        }
    }

    pub fn spec(self, script: &str) -> Spec {
        let spec = Spec::sh(script);
        if self == Streams::Terminal { spec.terminal() } else { spec }
    }
}

/// The request that the daemon ends at a point.
struct Armed<'p> {
    point: &'p str,
    at: Moment,
}

impl Armed<'_> {
    fn at(&self, moment: Moment) {
        if self.at == moment {
            fs::write(REQUEST, self.point).expect("ask for a fault");
        }
    }

    fn was_hit(&self) -> bool {
        !Path::new(REQUEST).exists()
    }
}

impl Drop for Armed<'_> {
    fn drop(&mut self) {
        // The file does not exist any more if the daemon has reached the point.
        let _ = fs::remove_file(REQUEST);
    }
}

#[test]
fn the_daemon_may_end_at_every_point() {
    needs!(OurShim, Faults);
    let node = Node::exclusive();
    let _build = WithFaults::install();
    let points = shim::points();
    assert!(points.len() > 20, "{points:?}");
    let points: Vec<_> = points.into_iter().filter(|point| is_of_every_life(point)).collect();
    for streams in [Streams::Fifos, Streams::None, Streams::Terminal] {
        live(&node, &Armed { point: "none", at: Moment::Create }, streams);
    }
    // All points on a fast machine, and some of them on an emulated machine.
    let step = number("E2E_POINTS_STEP", 1, 5);
    let mut failures = Vec::new();
    // A developer can select some points.
    let prefix = std::env::var("E2E_POINTS").unwrap_or_default();
    for point in points.iter().filter(|point| point.starts_with(&prefix)).step_by(step) {
        let kinds = match point.split('.').next() {
            Some("create" | "exec-start") => &[Streams::Fifos, Streams::None, Streams::Terminal][..],
            Some("stream") => &[Streams::Fifos, Streams::Terminal],
            Some("console") => &[Streams::Terminal],
            _ => &[Streams::Fifos],
        };
        let mut hits = 0;
        for (kind, moment) in kinds.iter().flat_map(|kind| moments(point).iter().map(move |at| (*kind, *at)))
        {
            // A failure must not hide other failures: the points are in different parts of the code.
            match catch_unwind(AssertUnwindSafe(|| end_at(&node, point, moment, kind))) {
                Ok(hit) => hits += u32::from(hit),
                Err(_) => failures.push(format!("{point} at {moment:?} with {kind:?}")),
            }
        }
        if hits == 0 {
            failures.push(format!("no call has passed {point}"));
        }
    }
    assert!(failures.is_empty(), "{failures:#?}");
}

/// Runs the life of a container, with a kill of the daemon at the point. Returns true if the daemon reached the point.
fn end_at(node: &Node, point: &str, moment: Moment, streams: Streams) -> bool {
    // This line explains a failure whose message does not name the point.
    println!("{point} at {moment:?} with {streams:?}");
    // A daemon keeps some objects that it makes for its first container. They are not leaks of the container below.
    drop(node.container("warm", Spec::sleeping()).started(&Io::default()));
    let pid = wait::until("the daemon serves", daemon::serving);
    let armed = Armed { point, at: moment };
    let before = Traces::take();
    live(node, &armed, streams);
    let hit = armed.was_hit();
    if hit {
        daemon::wait_for_another(pid);
    }
    leaks::assert_none(&format!("an end at {point}, {moment:?}"), &before);
    hit
}

/// One container with one exec, from create to delete, with every call on the way.
fn live(node: &Node, armed: &Armed, streams: Streams) {
    let events = node.subscribe();
    let script = "trap 'exit 17' TERM; echo init; sleep 100000 & wait";
    let gate = Gate::new();
    let container = node.container("point", gate.bind(streams.spec(script))).make();
    let mut client = Client::of(streams);
    armed.at(Moment::Create);
    let pid = container.create(&streams.io(&client)).expect("create");
    assert_eq!(container.pid(), pid);
    let waiting = container.waiting();
    armed.at(Moment::Start);
    container.start().expect("start");
    assert_eq!(container.pid(), pid);
    match &mut client {
        Some(client) => client.expect("init"),
        // The script has set its trap when its child exists.
        None => wait::until_true("a child", || container.pids().is_ok_and(|pids| pids.len() == 2)),
    }

    let status = live_exec(&container, armed, streams, &gate);

    armed.at(Moment::Recover);
    if armed.at == Moment::Recover {
        daemon::kill_now();
    }
    assert_eq!(container.pid(), pid);
    armed.at(Moment::Pause);
    container.pause().expect("pause");
    assert_eq!(container.phase(), Status::Paused);
    armed.at(Moment::Resume);
    container.resume().expect("resume");
    assert_eq!(container.phase(), Status::Running);
    armed.at(Moment::Update);
    container.update(&json!({})).expect("update");
    armed.at(Moment::Kill);
    container.kill(SIGTERM).expect("kill");
    assert_eq!(waiting.exit().expect("wait").status, 17);
    assert_eq!(container.state().expect("state").exit_status, 17);
    armed.at(Moment::Delete);
    assert_eq!(container.delete().expect("delete").exit_status, 17);
    if let Some(client) = &mut client {
        assert_eq!(client.stdout.text(), "", "no output comes twice");
    }

    let mut audit = Audit::default();
    while !audit.is_deleted(&container.id) {
        let event = events.next(NAMESPACE, wait::LIMIT).expect("containerd is there");
        audit.add(event.unwrap_or_else(|| panic!("only these events: {:?}", audit.of(&container.id))));
    }
    assert_eq!(audit.faults(&container.id), [""; 0]);
    let names: Vec<&str> = audit.of(&container.id).iter().map(Event::name).collect();
    let all =
        ["create", "start", "exec-added", "exec-started", "exec-exit", "paused", "resumed", "exit", "delete"];
    assert_eq!(names, all);
    let exits = audit.of(&container.id).iter().filter_map(|event| match event {
        Event::Exit(exit) => Some(exit.exit_status),
        _ => None,
    });
    assert_eq!(exits.collect::<Vec<u32>>(), [status, 17]);
}

/// The exec, which waits at the gate; returns its exit status.
fn live_exec(container: &Container, armed: &Armed, streams: Streams, gate: &Gate) -> u32 {
    let greeting = if streams == Streams::None { "true" } else { "echo exec" };
    let mut client = Client::of(streams);
    let exec = container.exec(streams.spec(&format!("{greeting}; {}; exit 9", Gate::WAIT)));
    armed.at(Moment::Exec);
    let exec = exec.add(&streams.io(&client)).expect("add an exec");
    let waiting = exec.waiting();
    armed.at(Moment::ExecStart);
    let pid = exec.start().expect("start an exec");
    if let Some(client) = &mut client {
        client.expect("exec");
        assert_eq!(exec.pid(), pid);
    }
    armed.at(Moment::ExecExit);
    gate.open();
    assert_eq!(waiting.exit().expect("wait for an exec").status, 9);
    assert_eq!(exec.state().expect("state of an exec").exit_status, 9);
    armed.at(Moment::ExecDelete);
    assert_eq!(exec.delete().expect("delete an exec").exit_status, 9);
    9
}

/// The daemon ends after it has rolled back a call that failed, and before it answers: the client gets the same error as from a
/// daemon that lives, and the OCI runtime runs once.
#[test]
fn a_call_that_failed_before_the_daemon_ended_is_not_made_again() {
    needs!(OurShim, Faults);
    let node = Node::exclusive();
    let _build = WithFaults::install();
    let fails = |command: &str| {
        let script = "echo '{\"level\":\"error\",\"msg\":\"as the test wants\"}' >>\"$4\"; exit 1";
        Noting::new("runc", &format!("case \" $* \" in *' {command} '*) {script};; esac"))
    };
    let with = |runtime: &Noting| {
        let path = runtime.path();
        let options = runc_options(|options| options.binary_name = path);
        node.container("fails", Spec::sleeping()).options(options)
    };
    let end_at = |point: &str| fs::write(REQUEST, point).expect("ask for a fault");
    let hit = |pid: u32| {
        assert!(!Path::new(REQUEST).exists(), "the call passes the point");
        daemon::wait_for_another(pid);
    };

    let runtime = fails("create");
    let create = || with(&runtime).make().create(&Io::default()).expect_err("a create that fails");
    let expected = create();
    let before = Traces::take();
    let pid = wait::until("the daemon serves", daemon::serving);
    end_at("failed-create.rolled-back");
    let error = create();
    hit(pid);
    assert_eq!((error.code(), error.message()), (expected.code(), expected.message()));
    assert!(error.message().contains("as the test wants"), "{error}");
    assert_eq!(runtime.calls_of("create"), 2);
    leaks::assert_none("a create that failed before the daemon ended", &before);

    for command in ["start", "exec"] {
        let runtime = fails(command);
        let container = with(&runtime).created(&Io::default());
        let start = || {
            if command == "start" {
                return container.start().expect_err("a start that fails");
            }
            let exec = container.exec(Spec::sleeping()).added(&Io::default());
            let error = exec.start().expect_err("an exec that fails");
            exec.delete().expect("delete an exec");
            error
        };
        if command == "exec" {
            container.start().expect("start");
        }
        let expected = start();
        let pid = wait::until("the daemon serves", daemon::serving);
        end_at("failed-start.rolled-back");
        let error = start();
        hit(pid);
        assert_eq!((error.code(), error.message()), (expected.code(), expected.message()), "{command}");
        assert_eq!(runtime.calls_of(command), 2, "{command}");
    }
}
