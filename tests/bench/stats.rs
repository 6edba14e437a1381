//! The time of the statistics of running containers, requested one after the other, as CRI does.

use std::time::{Duration, Instant};

use super::common::container::{Container, Io};
use super::common::node::Node;
use super::common::spec::Spec;
use super::cpu;
use super::latency::in_turn;
use super::memory;

pub const ROUNDS: usize = 40;

/// The mean time of a call in each round.
#[derive(Debug, Default)]
pub struct Stats {
    pub call: Vec<Duration>,
    pub shim: Vec<Duration>,
}

/// Requests the statistics of all containers of each runtime alternately.
pub fn measure(node: &Node, runtimes: &[String; 2], containers: usize) -> [Stats; 2] {
    let running = runtimes.each_ref().map(|runtime| {
        let container = || node.container("stats", Spec::sleeping()).runtime(runtime).started(&Io::default());
        (0..containers).map(|_| container()).collect::<Vec<_>>()
    });
    let ask = |container: &Container| assert!(container.metrics().is_some(), "{}", container.id);
    running.iter().flatten().for_each(ask);

    let calls = u32::try_from(containers).expect("a small number of containers");
    let mut stats = [Stats::default(), Stats::default()];
    in_turn(ROUNDS, |_, index| {
        let shims = memory::shims(&runtimes[index]);
        let (cpu, begin) = (cpu::of_processes(&shims), Instant::now());
        running[index].iter().for_each(ask);
        stats[index].call.push(begin.elapsed() / calls);
        stats[index].shim.push((cpu::of_processes(&shims) - cpu) / calls);
    });
    stats
}
