//! The cost of many idle containers on a node, under this runtime alone: first with one container, then with many.

use std::time::{Duration, Instant};

use super::common::container::{Container, Io};
use super::common::daemon;
use super::common::node::{Node, OUR_RUNTIME};
use super::common::process;
use super::common::spec::Spec;
use super::common::wait;
use super::container::Init;
use super::cpu;
use super::exec::Exec;
use super::latency::total;
use super::output::Output;
use super::report::Spread;

/// Containers and execs of one measurement, one after the other.
const IN_A_ROW: u32 = 60;
/// Kills of the daemon.
const RESTARTS: usize = 9;
/// How long idle containers are watched, and how long their statistics are requested once a second.
const SPAN: Duration = Duration::from_secs(20);
/// At most this many containers are asked for their statistics.
const POLLED: usize = 500;

const PROGRAMS: [&str; 3] = ["PID 1", "D-Bus", "the daemon"];

/// Prints a column for one container, and a column for that container and `containers` others.
pub fn run(node: &Node, containers: usize) {
    let kept = node.container("scale", Spec::sleeping()).runtime(OUR_RUNTIME).started(&Io::default());
    let before = measure(node, &[&kept]);
    eprintln!("scale: starting {containers} containers…");
    let many: Vec<Container> = (0..containers)
        .map(|_| node.container("scale", Spec::sleeping()).runtime(OUR_RUNTIME).started(&Io::default()))
        .collect();
    let after = measure(node, &many.iter().take(POLLED).collect::<Vec<_>>());
    println!("{:<58} {:>22} {:>22}", "with this number of containers", 1, containers + 1);
    for ((name, before), (_, after)) in before.iter().zip(&after) {
        println!("{name:<58} {before:>22} {after:>22}");
    }
}

/// The rows of a column. The statistics of `polled` are requested.
fn measure(node: &Node, polled: &[&Container]) -> Vec<(String, String)> {
    let mut rows = Vec::new();
    eprintln!("scale: {IN_A_ROW} containers and execs…");
    let lives: Vec<Duration> =
        (0..IN_A_ROW).map(|_| total(Init::new(node, OUR_RUNTIME, &["/bin/true"], None))).collect();
    rows.push(("total per container, ms".to_string(), Spread::of_times(&lives).text()));
    let used = used();
    let begin = Instant::now();
    let execs: Vec<Duration> = (0..IN_A_ROW)
        .map(|_| total(Exec::new(node, polled[0], &["/bin/true"], Output::new(false))))
        .collect();
    let seconds = begin.elapsed().as_secs_f64();
    rows.push((
        "total per exec, ms".to_string(),
        format!("{}, {:.0}/s", Spread::of_times(&execs).text(), f64::from(IN_A_ROW) / seconds),
    ));
    let per_exec = |name: &str, time: Duration| (format!("CPU of {name} per exec, ms"), ms(time / IN_A_ROW));
    rows.extend(since(used).map(|(name, time)| per_exec(name, time)));

    eprintln!("scale: {} s of idle containers, and of statistics…", SPAN.as_secs());
    let used = self::used();
    wait::elapse(SPAN);
    let share =
        |time: Duration, span: Duration| format!("{:.2} %", 100.0 * time.as_secs_f64() / span.as_secs_f64());
    rows.extend(since(used).map(|(name, time)| (format!("{name}, idle, of a core"), share(time, SPAN))));
    let used = self::used();
    let begin = Instant::now();
    while begin.elapsed() < SPAN {
        let round = Instant::now();
        for container in polled {
            assert!(container.metrics().is_some(), "{}", container.id);
        }
        wait::elapse(Duration::from_secs(1).saturating_sub(round.elapsed()));
    }
    let span = begin.elapsed();
    let polls = format!("statistics of {} containers each second", polled.len());
    let row = |(name, time)| (format!("{name}, {polls}, of a core"), share(time, span));
    rows.extend(since(used).filter(|(name, _)| *name == PROGRAMS[2]).map(row));

    eprintln!("scale: {RESTARTS} kills of the daemon…");
    let restarts: Vec<Duration> = (0..RESTARTS)
        .map(|_| {
            let pid = daemon::kill_now();
            let begin = Instant::now();
            polled[0].state().expect("the state of a running container");
            let elapsed = begin.elapsed();
            daemon::wait_for_another(pid);
            elapsed
        })
        .collect();
    rows.push((
        "from a kill of the daemon to its next answer, ms".to_string(),
        Spread::of_times(&restarts).text(),
    ));
    let pss = process::pss_kib(pids()[2]).unwrap_or_default();
    rows.push(("memory (Pss) of the daemon after that, KiB".to_string(), pss.to_string()));
    rows
}

/// The CPU time of each of [`PROGRAMS`] so far.
fn used() -> [Duration; 3] {
    pids().map(|pid| cpu::of_processes(&[pid]))
}

/// The CPU time since then. The daemon must be the same.
fn since(used: [Duration; 3]) -> impl Iterator<Item = (&'static str, Duration)> {
    let now = self::used();
    (0..3).map(move |index| (PROGRAMS[index], now[index] - used[index]))
}

fn pids() -> [u32; 3] {
    let bus = ["dbus-daemon", "dbus-broker"].into_iter().flat_map(process::named).next();
    [1, bus.expect("a message bus"), daemon::pid().expect("a daemon")]
}

fn ms(time: Duration) -> String {
    format!("{:.1}", time.as_secs_f64() * 1000.0)
}
