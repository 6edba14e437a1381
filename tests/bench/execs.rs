//! The life of an exec of `true`: alone, after a pause, and many at once in one container or in many.

use std::time::Duration;

use super::arguments::Arguments;
use super::common::container::{Container, Io};
use super::common::node::Node;
use super::common::spec::Spec;
use super::cpu;
use super::exec::Exec;
use super::latency::{self, Rounds};
use super::output::Output;
use super::report::{PER_PROCESS, Part, Target};

/// A pause after which a move between cgroups is as slow for the kernel as the first one. Probes come with such pauses.
const QUIET: Duration = Duration::from_millis(300);
const QUIET_ROUNDS: usize = 20;

const CPU_ROWS: usize = 8;

const ALONE: Target = Target::AtMost(1.15);
const AT_ONCE: Target = Target::AtMost(1.2);

pub fn measure<'n>(node: &'n Node, arguments: &Arguments, terminal: bool) -> Vec<Part> {
    let Arguments { runtimes, execs: serial, parallel, .. } = arguments;
    let rounds = serial.div_ceil(*parallel).max(10);
    let name = if terminal { "execs with a terminal" } else { "execs" };
    eprintln!("{name}, {serial} of each one after the other, {parallel} at once in {rounds} rounds…");

    let living = |runtime: &str| -> Vec<Container> {
        let container = || node.container("execs", Spec::sleeping()).runtime(runtime).started(&Io::default());
        (0..*parallel).map(|_| container()).collect()
    };
    let containers = [living(&runtimes[0]), living(&runtimes[1])];
    let exec = |container| Exec::new(node, container, &["/bin/true"], Output::new(terminal));
    let one = |index: usize| vec![exec(&containers[index][0])];
    let in_one = |index: usize| (0..*parallel).map(|_| exec(&containers[index][0])).collect();
    let in_many = |index: usize| containers[index].iter().map(exec).collect();

    let mut parts = Vec::new();
    let mut part = |how: &str, rounds, target, prepare: &dyn Fn(usize) -> Vec<Exec<'n>>| {
        let times = latency::measure(rounds, prepare);
        parts.push(Part::of_times(&format!("{name}, {how}"), "exec", &times, Some(target)));
    };
    part("one after the other", Rounds::new(*serial), ALONE, &one);
    if !terminal {
        let rounds = Rounds { count: QUIET_ROUNDS, quiet: QUIET };
        part(&format!("each after {QUIET:?} of quiet"), rounds, ALONE, &one);
    }
    let how = format!("{parallel} at once in one container, {PER_PROCESS}");
    part(&how, Rounds::new(rounds), AT_ONCE, &in_one);
    let how = format!("{parallel} at once in {parallel} containers, {PER_PROCESS}");
    part(&how, Rounds::new(rounds), AT_ONCE, &in_many);
    if !terminal {
        let first = [&containers[0][0], &containers[1][0]];
        parts.push(Part::of_cpu(&cpu::measure(node, runtimes, first, CPU_ROWS)));
    }
    parts
}
