//! How long a container takes from Create to Delete, call by call.
//!
//! Metadata and snapshot are made before the clock starts: they cost the same under every runtime.

use std::sync::Barrier;
use std::thread;
use std::time::{Duration, Instant};

use super::common::container::{Container, Io};
use super::common::node::Node;
use super::common::spec::Spec;

/// Rounds that fill caches and are not counted.
const WARM_UP: usize = 3;

/// One container's times, or all of a runtime's.
#[derive(Clone, Debug, Default)]
pub struct Times<T> {
    pub create: T,
    pub start: T,
    /// From the answer to Start to the answer to Wait, for a container that runs `true`.
    pub wait: T,
    pub delete: T,
    /// All four; of containers at once, the time of the round divided by their number.
    pub total: T,
}

/// Measures both runtimes in alternation, `at_once` containers in each round.
pub fn measure(
    node: &Node,
    runtimes: &[String; 2],
    rounds: usize,
    at_once: usize,
) -> [Times<Vec<Duration>>; 2] {
    let mut times = [Times::default(), Times::default()];
    for round in 0..WARM_UP + rounds {
        // Who goes first changes from round to round, so that neither profits from the other's wake.
        let order = if round % 2 == 0 { [0, 1] } else { [1, 0] };
        for index in order {
            let measured = run(node, &runtimes[index], at_once);
            if round >= WARM_UP {
                times[index].add(measured, at_once);
            }
        }
    }
    times
}

impl Times<Vec<Duration>> {
    fn add(&mut self, (containers, elapsed): (Vec<Times<Duration>>, Duration), at_once: usize) {
        for container in containers {
            self.create.push(container.create);
            self.start.push(container.start);
            self.wait.push(container.wait);
            self.delete.push(container.delete);
        }
        self.total.push(elapsed / u32::try_from(at_once).expect("a small number of containers"));
    }
}

/// One round of one runtime: the times of each container, and of the whole round.
fn run(node: &Node, runtime: &str, at_once: usize) -> (Vec<Times<Duration>>, Duration) {
    let containers: Vec<Container> = (0..at_once)
        .map(|_| node.container("bench", Spec::new(&["/bin/true"])).runtime(runtime).make())
        .collect();
    let ready = Barrier::new(at_once + 1);
    thread::scope(|scope| {
        let threads: Vec<_> = containers
            .iter()
            .map(|container| {
                scope.spawn(|| {
                    ready.wait();
                    life(container)
                })
            })
            .collect();
        ready.wait();
        let begin = Instant::now();
        let times = threads.into_iter().map(|thread| thread.join().expect("a life without panic")).collect();
        (times, begin.elapsed())
    })
}

fn life(container: &Container) -> Times<Duration> {
    let mut laps = Laps(Instant::now());
    container.create(&Io::default()).expect("create");
    let create = laps.next();
    // As clients do: the wait is there before the process can end.
    let waiting = container.waiting();
    container.start().expect("start");
    let start = laps.next();
    let exit = waiting.exit().expect("wait");
    let wait = laps.next();
    container.delete().expect("delete");
    let delete = laps.next();
    assert_eq!(exit.status, 0, "true succeeds");
    Times { create, start, wait, delete, total: create + start + wait + delete }
}

struct Laps(Instant);

impl Laps {
    fn next(&mut self) -> Duration {
        let now = Instant::now();
        now.duration_since(std::mem::replace(&mut self.0, now))
    }
}
