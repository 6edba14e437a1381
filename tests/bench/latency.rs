//! The time of each call in the life of a process, from the first call to Delete, under two runtimes alternately.

use std::sync::Barrier;
use std::thread;
use std::time::{Duration, Instant};

use crate::common::wait;

/// Rounds that fill caches and are not counted.
const WARM_UP: usize = 3;

/// An init process or an exec, with the calls of its life that are measured.
pub trait Process: Sync {
    /// Create or Exec.
    fn create(&self);
    /// Calls Wait. The returned value waits for the response and returns the exit status.
    fn waiting(&self) -> impl FnOnce() -> u32;
    fn start(&self);
    fn delete(&self);
    /// Cleans up after the clock has stopped.
    fn deleted(self);
}

/// The parameters of a measurement.
#[derive(Clone, Copy)]
pub struct Rounds {
    pub count: usize,
    /// The pause before each round: the kernel is faster if it has just done the same.
    pub quiet: Duration,
}

impl Rounds {
    pub fn new(count: usize) -> Rounds {
        Rounds { count, quiet: Duration::ZERO }
    }
}

/// The times of all processes of a runtime.
#[derive(Debug, Default)]
pub struct Times {
    pub create: Vec<Duration>,
    pub start: Vec<Duration>,
    /// From the answer to Start to the answer to Wait, for a process that runs `true`.
    pub wait: Vec<Duration>,
    pub delete: Vec<Duration>,
    /// The sum of the four. For processes that run at the same time, the time of the round divided by their number.
    pub total: Vec<Duration>,
}

/// The times of one process.
struct Life {
    create: Duration,
    start: Duration,
    wait: Duration,
    delete: Duration,
}

impl Life {
    fn total(&self) -> Duration {
        self.create + self.start + self.wait + self.delete
    }
}

/// Measures both runtimes alternately. `prepare` makes the processes of one round for the first or the second runtime, as far
/// as that costs the same under each.
pub fn measure<P: Process>(rounds: Rounds, prepare: impl Fn(usize) -> Vec<P>) -> [Times; 2] {
    let mut times = [Times::default(), Times::default()];
    in_turn(WARM_UP + rounds.count, |round, index| {
        let processes = prepare(index);
        // The pause itself is a part of the measurement.
        wait::elapse(rounds.quiet);
        let (lives, elapsed) = run(&processes);
        processes.into_iter().for_each(Process::deleted);
        if round >= WARM_UP {
            times[index].add(lives, elapsed);
        }
    });
    times
}

/// The order of the runtimes changes from round to round, so that neither always profits from the work of the other.
pub fn in_turn(rounds: usize, mut each: impl FnMut(usize, usize)) {
    for round in 0..rounds {
        let order = if round % 2 == 0 { [0, 1] } else { [1, 0] };
        for index in order {
            let _turn = Turn { round, index };
            each(round, index);
        }
    }
}

/// One turn of a runtime. If it fails, this says which runtime it was.
struct Turn {
    round: usize,
    index: usize,
}

impl Drop for Turn {
    fn drop(&mut self) {
        if thread::panicking() {
            let runtime = if self.index == 0 { "first" } else { "second" };
            eprintln!("this was in round {} of the {runtime} runtime", self.round);
        }
    }
}

impl Times {
    fn add(&mut self, lives: Vec<Life>, elapsed: Duration) {
        let at_once = u32::try_from(lives.len()).expect("a small number of processes");
        self.total.push(elapsed / at_once);
        for Life { create, start, wait, delete } in lives {
            self.create.push(create);
            self.start.push(start);
            self.wait.push(wait);
            self.delete.push(delete);
        }
    }
}

/// One round of one runtime, all at once: the times of each process, and of the whole round.
fn run<P: Process>(processes: &[P]) -> (Vec<Life>, Duration) {
    let ready = &Barrier::new(processes.len() + 1);
    thread::scope(|scope| {
        let threads: Vec<_> = processes
            .iter()
            .map(|process| {
                scope.spawn(move || {
                    ready.wait();
                    live(process)
                })
            })
            .collect();
        ready.wait();
        let begin = Instant::now();
        let lives = threads.into_iter().map(|thread| thread.join().expect("a life without panic")).collect();
        (lives, begin.elapsed())
    })
}

/// The time of the whole life of a process that runs alone.
pub fn total(process: impl Process) -> Duration {
    let total = live(&process).total();
    process.deleted();
    total
}

fn live(process: &impl Process) -> Life {
    let mut laps = Laps(Instant::now());
    process.create();
    let create = laps.next();
    // Clients call Wait before the process can end, too.
    let exit_status = process.waiting();
    process.start();
    let start = laps.next();
    let status = exit_status();
    let wait = laps.next();
    process.delete();
    let delete = laps.next();
    assert_eq!(status, 0, "true succeeds");
    Life { create, start, wait, delete }
}

struct Laps(Instant);

impl Laps {
    fn next(&mut self) -> Duration {
        let now = Instant::now();
        now.duration_since(std::mem::replace(&mut self.0, now))
    }
}
