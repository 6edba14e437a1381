//! The CPU time of a container and of an exec, by process, and the work of the machine for them: messages on the bus,
//! programs, files, moves between cgroups, context switches. For comparison, the least that each shim has to spend: a
//! unit that runs `true`, and the OCI runtime alone.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::time::Duration;

use zbus::{Connection, Variant};

use super::arguments::Arguments;
use super::common::container::{Container, Io};
use super::common::counts::{Counts, Sender, Watch};
use super::common::node::{Node, unique};
use super::common::process;
use super::common::spec::Spec;
use super::common::wait;
use super::container::Init;
use super::cpu;
use super::exec::Exec;
use super::latency::{in_turn, total};
use super::memory;
use super::output::Output;
use super::report::{Line, Part, Target};
use super::start;

/// Operations in a row, so that work that a runtime does after its response to Delete is counted as well.
const IN_A_ROW: u32 = 10;
const ROWS: usize = 8;
/// Operations of each runtime whose messages and files are counted.
const COUNTED: usize = 9;
/// A unit that runs `true` has ended after this time.
const UNIT_TIME: Duration = Duration::from_millis(100);

const WHOLE: &str = "all processes";
const REST: &str = "programs that end, the container, this client";
const SWITCHES: &str = "context switches of lasting processes";
/// Long-running processes other than PID 1, by the name that the kernel shows.
const LASTING: [(&str, &[&str]); 3] = [
    ("D-Bus", &["dbus-daemon", "dbus-broker"]),
    ("journald", &["systemd-journal"]),
    ("containerd", &["containerd"]),
];
const PID_1: &str = "PID 1";
const SHIM: &str = "the shim, or its daemon";

pub fn measure(node: &Node, arguments: &Arguments) -> Vec<Part> {
    let runtimes = &arguments.runtimes;
    let containers = runtimes
        .each_ref()
        .map(|runtime| node.container("map", Spec::sleeping()).runtime(runtime).started(&Io::default()));
    let exec = |index: usize| {
        total(Exec::new(node, &containers[index], &["/bin/true"], Output::new(false)));
    };
    let container = |index: usize| {
        total(Init::new(node, &runtimes[index], &["/bin/true"], Some(Output::new(false))));
    };
    let mut parts = of_operation(node, runtimes, "an exec", Target::AtMost(1.2), &exec);
    parts.extend(of_operation(node, runtimes, "a container", Target::AtMost(0.75), &container));
    parts.push(Part::new(
        "the least that any shim pays, CPU",
        vec![unit_alone(node), runtime_alone(&containers[0])],
    ));
    parts
}

fn of_operation(
    node: &Node,
    runtimes: &[String; 2],
    name: &str,
    target: Target,
    operation: &dyn Fn(usize),
) -> Vec<Part> {
    eprintln!("the map of {name}, {ROWS} rows of {IN_A_ROW}…");
    (0..2).for_each(operation);
    let mut rows: [BTreeMap<&'static str, Vec<f64>>; 2] = Default::default();
    in_turn(ROWS, |_, index| {
        let shims = memory::shims(&runtimes[index]);
        let before = lasting(&shims);
        for _ in 0..IN_A_ROW {
            operation(index);
        }
        for (name, after) in lasting(&shims) {
            let used = (after - before.get(name).copied().unwrap_or_default()) / f64::from(IN_A_ROW);
            rows[index].entry(name).or_default().push(used);
        }
    });
    let mut counts: [Vec<Counts>; 2] = Default::default();
    let mut watch = Watch::new(node, &format!("-{}-", std::process::id()));
    in_turn(COUNTED, |_, index| {
        watch.begin(node);
        operation(index);
        counts[index].push(watch.end(node));
    });
    let [ours, other] = &rows;
    let line =
        |name: &str, unit: &str| Line::of_numbers(&format!("{name}{unit}"), [&ours[name], &other[name]]);
    let names = [PID_1].into_iter().chain(LASTING.iter().map(|(name, _)| *name)).chain([SHIM, REST]);
    let mut cpu: Vec<Line> = names.map(|name| line(name, ", ms")).collect();
    cpu.push(line(WHOLE, ", ms").target(Some(target)));
    vec![
        Part::new(&format!("CPU of {name}, by process"), cpu),
        Part::new(&format!("counts of {name}"), counted(&counts, line(SWITCHES, ""))),
        Part::new(&format!("messages of {name}, by sender and kind"), messages(&counts)),
    ]
}

/// The CPU time of each long-running process in milliseconds and its context switches, and the sums for everything else.
fn lasting(shims: &[u32]) -> BTreeMap<&'static str, f64> {
    let ms = |time: Duration| time.as_secs_f64() * 1000.0;
    let whole = ms(cpu::of_machine());
    let mut pids: Vec<(&'static str, Vec<u32>)> = LASTING
        .iter()
        .map(|(name, programs)| {
            (*name, programs.iter().flat_map(|program| process::named(program)).collect())
        })
        .collect();
    pids.extend([(PID_1, vec![1]), (SHIM, shims.to_vec())]);
    let mut used: BTreeMap<_, _> =
        pids.iter().map(|(name, pids)| (*name, ms(cpu::of_processes(pids)))).collect();
    used.insert(REST, whole - used.values().sum::<f64>());
    used.insert(WHOLE, whole);
    used.insert(SWITCHES, pids.iter().flat_map(|(_, pids)| pids).map(|pid| switches(*pid)).sum());
    used
}

/// The context switches of the living threads of a process.
fn switches(pid: u32) -> f64 {
    let threads = fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
    let statuses = threads.filter_map(|thread| fs::read_to_string(thread.path().join("status")).ok());
    let number = |status: &str| -> f64 {
        let lines = status.lines().filter(|line| line.contains("voluntary_ctxt_switches:"));
        lines.filter_map(|line| line.rsplit('\t').next()?.parse::<f64>().ok()).sum()
    };
    statuses.map(|status| number(&status)).sum()
}

fn counted(counts: &[Vec<Counts>; 2], switches: Line) -> Vec<Line> {
    let line = |name: &str, number: &dyn Fn(&Counts) -> usize| {
        let numbers =
            counts.each_ref().map(|all| all.iter().map(|one| number(one) as f64).collect::<Vec<_>>());
        Line::of_numbers(name, numbers.each_ref())
    };
    vec![
        line("messages on the bus", &|one| one.messages.len()),
        line("their bytes", &|one| one.messages.iter().map(|sent| sent.bytes).sum()),
        line("programs executed", &|one| one.executed.len()),
        line("of these, systemd's executor", &|one| one.executions("systemd-executor")),
        line("of these, the shim's binary", &|one| {
            one.executed.iter().filter(|name| name.starts_with("containerd-shim")).count()
        }),
        line("of these, runc", &|one| one.executed.iter().filter(|name| name.contains("runc")).count()),
        line("processes and threads created", &|one| usize::try_from(one.tasks).unwrap_or_default()),
        line("files below /run written", &|one| one.written.len()),
        line("of these, the daemon's", &|one| one.written_below("/run/containerd-shim-systemd-v1")),
        line("of these, systemd's", &|one| one.written_below("/run/systemd")),
        line("writes to cgroup.procs", &|one| one.moves.len()),
        switches,
    ]
}

fn messages(counts: &[Vec<Counts>; 2]) -> Vec<Line> {
    let kinds: BTreeSet<(Sender, String)> =
        counts.iter().flatten().flat_map(|one| one.by_kind().into_keys()).collect();
    let of_kind = |kind: &(Sender, String)| {
        let number = |one: &Counts| one.by_kind().get(kind).map_or(0.0, |(number, _)| *number as f64);
        let numbers = counts.each_ref().map(|all| all.iter().map(number).collect::<Vec<_>>());
        Line::of_numbers(&format!("{:?}: {}", kind.0, kind.1), numbers.each_ref())
    };
    kinds.iter().map(of_kind).collect()
}

/// A unit that runs `true`: PID 1 and systemd's executor, with as few messages on the bus as possible.
fn unit_alone(node: &Node) -> Line {
    let slice = format!("{}.slice", unique("bench").replace('-', "_"));
    let bus = node.block_on(Connection::system()).expect("connect to the bus");
    let run = || {
        let unit = format!("{}.service", unique("bench"));
        let command = vec![("/bin/true", vec!["/bin/true"], true)];
        let properties: Vec<(&str, Variant<'_>)> = vec![
            ("Slice", slice.as_str().into()),
            ("Type", "oneshot".into()),
            ("DefaultDependencies", false.into()),
            ("StandardOutput", "null".into()),
            ("StandardError", "null".into()),
            ("ExecStart", command.into()),
        ];
        let nothing: Vec<(&str, Vec<(&str, Variant<'_>)>)> = Vec::new();
        let (name, path) = ("org.freedesktop.systemd1", "/org/freedesktop/systemd1");
        let manager = Some("org.freedesktop.systemd1.Manager");
        let body = (unit.as_str(), "fail", properties, nothing);
        let started = bus.call_method(Some(name), path, manager, "StartTransientUnit", &body);
        node.block_on(started).expect("start a unit");
        // This does not wait for an event, because the subscription would be measured, too.
        wait::elapse(UNIT_TIME);
    };
    run();
    let of_slice = || {
        let path = format!("/sys/fs/cgroup/{slice}/cpu.stat");
        cpu::usage(&fs::read_to_string(path).unwrap_or_default()).unwrap_or_default()
    };
    let mut all = Vec::new();
    for _ in 0..ROWS {
        let (executor, systemd) = (of_slice(), cpu::of_processes(&[1]));
        (0..IN_A_ROW).for_each(|_| run());
        all.push((of_slice() + cpu::of_processes(&[1])).saturating_sub(executor + systemd) / IN_A_ROW);
    }
    Line::of_one("a unit that runs true: executor, PID 1, ms", &all)
}

/// `runc exec` without any shim, with all its children.
fn runtime_alone(container: &Container) -> Line {
    let root = format!("/run/containerd/runc/{}", container.namespace);
    let run = || process::succeed("runc", &["--root", &root, "exec", &container.id, "/bin/true"]);
    run();
    let mut all = Vec::new();
    for _ in 0..ROWS {
        let before = start::children_cpu();
        for _ in 0..IN_A_ROW {
            run();
        }
        all.push((start::children_cpu() - before) / IN_A_ROW);
    }
    Line::of_one("runc exec of true alone, ms", &all)
}
