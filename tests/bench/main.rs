//! Two runtimes side by side, through the guest's real containerd and in strict alternation: what a container
//! costs in time, what it leaves in memory, and what a call of our binary costs.
//!
//! `cargo bench --bench side_by_side -- --help` tells the arguments. Runs as root in the testbed.

#[path = "../common/mod.rs"]
mod common;

mod arguments;
mod latency;
mod memory;
mod report;
mod start;

use std::process::ExitCode;

use arguments::{Arguments, Parsed};
use common::node::Node;
use report::Report;

fn main() -> ExitCode {
    let arguments = match arguments::parse(std::env::args().skip(1)) {
        Parsed::Run(arguments) => arguments,
        Parsed::Help => {
            println!("{}", arguments::USAGE);
            return ExitCode::SUCCESS;
        }
        Parsed::Wrong(what) => {
            eprintln!("side_by_side: {what}\n{}", arguments::USAGE);
            return ExitCode::from(2);
        }
    };
    let report = measure(&arguments);
    print!("{}", report.table());
    match arguments.json.as_deref().map(|path| std::fs::write(path, report.json())) {
        Some(Err(error)) => {
            eprintln!("side_by_side: write the JSON: {error}");
            ExitCode::FAILURE
        }
        _ => ExitCode::SUCCESS,
    }
}

fn measure(arguments: &Arguments) -> Report {
    let node = Node::exclusive();
    let runtimes = &arguments.runtimes;
    eprintln!("one after the other, {} of each…", arguments.iterations);
    let serial = latency::measure(&node, runtimes, arguments.iterations, 1);
    eprintln!("{} at once, {} rounds of each…", arguments.parallel, arguments.rounds());
    let parallel = latency::measure(&node, runtimes, arguments.rounds(), arguments.parallel);
    eprintln!("memory with {:?} containers…", arguments.containers);
    let memory = memory::measure(&node, runtimes, &arguments.containers);
    let start = arguments.measures_ours().then(|| {
        eprintln!("the binary's start, {} times…", start::CALLS);
        start::measure()
    });
    Report::new(arguments, serial, parallel, memory, start)
}
