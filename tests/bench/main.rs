//! Compares two runtimes through the guest's real containerd, in strict alternation: the time of containers, execs and
//! terminals, the throughput of output, the memory of the runtime, and the time of statistics and of our binary. Also compares
//! two configurations of one daemon: the cost of losing nothing when the daemon ends, and that of the journal's copy of output.
//!
//! `cargo bench --bench side_by_side -- --help` lists the arguments. Runs as root in the testbed.

#[path = "../common/mod.rs"]
mod common;

mod arguments;
mod compare;
mod container;
mod cpu;
mod exec;
mod execs;
mod journal;
mod latency;
mod logs;
mod map;
mod memory;
mod output;
mod report;
mod scale;
mod soak;
mod start;
mod stats;
mod throughput;

use std::process::ExitCode;

use arguments::{Arguments, Subject};
use common::node::{Need, Node};
use common::plots;
use container::Init;
use latency::Rounds;
use output::Output;
use report::{PER_PROCESS, Part, Report, Target};

fn main() -> ExitCode {
    let arguments = match arguments::parse(std::env::args().skip(1)) {
        Ok(arguments) => arguments,
        Err(code) => return code,
    };
    if let Some([containers, execs]) = arguments.soak {
        return soak(containers, execs);
    }
    if let Some(containers) = arguments.scale {
        scale::run(&Node::exclusive(), containers);
        return ExitCode::SUCCESS;
    }
    let report = measure(&arguments);
    let results = report.json();
    print!("{}{}", report.table(), compare::text(&results));
    let Arguments { json, html, svg, .. } = &arguments;
    let files =
        [(json, format!("{results:#}\n")), (html, plots::page(&results)), (svg, plots::picture(&results))];
    for (path, text) in files {
        if let Some(Err(error)) = path.as_ref().map(|path| std::fs::write(path, text)) {
            eprintln!("side_by_side: write a file of results: {error}");
            return ExitCode::FAILURE;
        }
    }
    ExitCode::SUCCESS
}

/// Fails if something has grown.
fn soak(containers: usize, execs: usize) -> ExitCode {
    let grown = soak::run(&Node::exclusive(), containers, execs);
    for line in &grown {
        eprintln!("side_by_side: {line}");
    }
    if grown.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn measure(arguments: &Arguments) -> Report {
    let node = Node::exclusive();
    let mut parts = Vec::new();
    if arguments.wants(Subject::Containers) {
        parts.extend(containers(&node, arguments));
    }
    if arguments.wants(Subject::Execs) {
        parts.extend(execs::measure(&node, arguments, false));
    }
    if arguments.wants(Subject::Cpu) {
        parts.extend(map::measure(&node, arguments));
    }
    if arguments.wants(Subject::Terminals) {
        parts.push(containers_with_terminals(&node, arguments));
        parts.extend(execs::measure(&node, arguments, true));
    }
    if arguments.wants(Subject::Throughput) {
        eprintln!("output of {} MB, {} times each way…", arguments.megabytes, throughput::ROUNDS);
        let rates = throughput::measure(&node, &arguments.runtimes, arguments.megabytes);
        parts.push(Part::of_throughput(&rates));
    }
    if arguments.wants(Subject::Logs) {
        let Arguments { runtimes, iterations, .. } = arguments;
        eprintln!("containers with and without the journal's copy, {iterations} of each…");
        parts.push(Part::of_logs(&logs::measure(&node, &runtimes[0], *iterations)));
    }
    if arguments.wants(Subject::Memory) {
        eprintln!("memory with {:?} containers…", arguments.containers);
        parts.push(Part::of_memory(&memory::measure(&node, &arguments.runtimes, &arguments.containers)));
    }
    if arguments.wants(Subject::Stats) {
        eprintln!("statistics of {} containers, {} times…", arguments.parallel, stats::ROUNDS);
        parts.push(Part::of_stats(&stats::measure(&node, &arguments.runtimes, arguments.parallel)));
    }
    if arguments.wants(Subject::Journal) {
        parts.extend(journal(&node, arguments));
    }
    let start = arguments.wants(Subject::Start).then(|| {
        eprintln!("the binary's start, {} times…", start::CALLS);
        start::measure()
    });
    Report::new(arguments, parts, start)
}

fn containers(node: &Node, arguments: &Arguments) -> [Part; 2] {
    let Arguments { runtimes, iterations, parallel, .. } = arguments;
    let inits = |index: usize, count: usize| -> Vec<Init> {
        (0..count).map(|_| Init::new(node, &runtimes[index], &["/bin/true"], None)).collect()
    };
    eprintln!("containers, {iterations} of each one after the other…");
    let serial = latency::measure(Rounds::new(*iterations), |index| inits(index, 1));
    let rounds = iterations.div_ceil(*parallel).max(10);
    eprintln!("containers, {parallel} at once in {rounds} rounds…");
    let at_once = latency::measure(Rounds::new(rounds), |index| inits(index, *parallel));
    [
        Part::of_times("containers, one after the other", "create", &serial, None),
        Part::of_times(&format!("containers, {parallel} at once, {PER_PROCESS}"), "create", &at_once, None),
    ]
}

fn journal(node: &Node, arguments: &Arguments) -> Option<Part> {
    if let Some(reason) = Need::Faults.missing() {
        eprintln!("the cost of forgetting nothing: skipped, {reason}");
        return None;
    }
    let (rounds, containers, calls) =
        (journal::rounds(arguments.iterations), journal::CONTAINERS, journal::CALLS);
    eprintln!("{containers} containers and {calls} calls, with and without a memory, {rounds} times each…");
    Some(Part::of_journal(&journal::measure(node, rounds)))
}

fn containers_with_terminals(node: &Node, arguments: &Arguments) -> Part {
    let Arguments { runtimes, iterations, .. } = arguments;
    eprintln!("containers with a terminal, {iterations} of each one after the other…");
    let times = latency::measure(Rounds::new(*iterations), |index| {
        vec![Init::new(node, &runtimes[index], &["/bin/true"], Some(Output::new(true)))]
    });
    let heading = "containers with a terminal, one after the other";
    Part::of_times(heading, "create", &times, Some(Target::AtMost(1.05)))
}
