//! Chaos: clients work through the guest's real containerd, while the daemon and the services that it needs are killed,
//! stopped and restarted. Every call must get a response, every exit must be published, every byte must arrive.
//!
//! Runs as root in the testbed; `--help` prints the arguments. The last line has the format of libtest, for the
//! summary.

#[path = "../common/mod.rs"]
mod common;

mod arguments;
mod auditor;
mod client;
mod containerd;
mod disturber;
mod execs;
mod inits;
mod ledger;
mod pods;
mod streams;
mod tally;
mod work;

use std::process::ExitCode;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant, SystemTime};

use arguments::Arguments;
use common::bulk::Bulk;
use common::disturb::Disturbance;
use common::leaks::Traces;
use common::node::{Need, Node, OUR_RUNTIME, number};
use common::random::Random;
use common::sandbox::Sandbox;
use common::spec::Spec;
use common::systemd::DAEMON_SERVICE;
use common::task::Io;
use common::{daemon, process, wait};
use containerd::Containerd;
use ledger::Ledger;
use tally::{Fault, Tally};
use work::Kind;

/// How often a line of progress is printed.
const PROGRESS: Duration = Duration::from_secs(10);

/// Time for work that is under way when the disturbances have ended.
const END_LIMIT: Duration = Duration::from_secs(180);

/// The daemon's watchdog limit during the run: shorter than usual, to save time.
const WATCHDOG: &str = "[Service]\nWatchdogSec=4\n";

/// How much of the journal is shown after a fault.
const JOURNAL: &str = "--lines=150";

/// Shared by all threads.
pub struct Shared {
    tally: Tally,
    containerd: Containerd,
    ledger: Ledger,
    bulk: Arc<Bulk>,
    /// What each worker is doing.
    doing: Vec<Mutex<String>>,
}

impl Shared {
    fn doing(&self, worker: usize, what: &str) {
        *self.doing[worker].lock().unwrap_or_else(PoisonError::into_inner) = what.to_string();
    }
}

fn main() -> ExitCode {
    let mut arguments = match arguments::parse(std::env::args().skip(1)) {
        Ok(arguments) => arguments,
        Err(code) => return code,
    };
    if common::node::runtime_under_test() != OUR_RUNTIME {
        arguments.disturbances.retain(|disturbance| !disturbance.is_ours());
    }
    if Need::Sandboxes.missing().or_else(|| Need::OurShim.missing()).is_some() {
        arguments.kinds.retain(|kind| *kind != Kind::Pod);
    }
    let begin = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    println!("\nrunning 1 test\nseed {}, {arguments:?}", arguments.seed);
    let faults = run(&arguments);
    if faults > 0 {
        println!("seed {}; the descriptor store and the connections:", arguments.seed);
        println!("{}", process::run("systemd-analyze", &["fdstore", DAEMON_SERVICE]).text());
        println!("{}", process::run("ss", &["-xapn", "-O"]).text());
        println!("the end of the daemon's journal:");
        let since = format!("--since=@{}", begin.as_secs());
        let journal = process::run("journalctl", &["--no-pager", JOURNAL, &since, "--unit", DAEMON_SERVICE]);
        println!("{}", journal.text());
    }
    let (word, passed, failed) = if faults == 0 { ("ok", 1, 0) } else { ("FAILED", 0, 1) };
    println!("test chaos ... {word}\n\ntest result: {word}. {passed} passed; {failed} failed; 0 ignored");
    ExitCode::from(failed)
}

fn run(arguments: &Arguments) -> u64 {
    let node = Node::shared();
    run_one(&node);
    let has_hangs = arguments.disturbances.contains(&Disturbance::Hang);
    let watchdog = has_hangs.then(|| daemon::DropIn::new(WATCHDOG));
    run_one(&node);
    if arguments.kinds.contains(&Kind::Pod) {
        // The daemon keeps a socket for the sandboxes of a containerd.
        drop(Sandbox::run(&node, "first"));
    }
    let before = Traces::take();

    let shared = Arc::new(Shared {
        tally: Tally::new(),
        containerd: Containerd::default(),
        ledger: Ledger::default(),
        bulk: Arc::new(Bulk::new(number("CHAOS_BYTES", 4 << 20, 1 << 20))),
        doing: (0..arguments.workers).map(|_| Mutex::default()).collect(),
    });
    let mut random = Random::new(arguments.seed);
    let auditor = auditor::start(&shared);
    let (disturb, undisturbed) = mpsc::channel();
    let disturber = disturber::start(&shared, arguments, random.fork(), undisturbed);
    let (work, no_work) = mpsc::channel();
    let no_work = Arc::new(Mutex::new(no_work));
    let workers: Vec<JoinHandle<()>> = (0..arguments.workers)
        .map(|number| work::start(&shared, number, &arguments.kinds, random.fork(), &no_work))
        .collect();

    watch(&shared.tally, arguments.duration);
    drop(work);
    // The workers finish the lives that they have begun.
    let is_over = join(workers, &shared.tally);
    drop(disturb);
    disturber.join().unwrap_or_else(|_| shared.tally.fault(Fault::Other, "the disturber panicked"));
    for what in shared.tally.missing(!arguments.disturbances.is_empty()) {
        shared.tally.fault(Fault::Other, what);
    }
    if !is_over {
        for (number, doing) in shared.doing.iter().enumerate() {
            let doing = doing.lock().unwrap_or_else(PoisonError::into_inner);
            shared.tally.fault(Fault::Other, &format!("worker {number} does not end: {doing}"));
        }
    }
    auditor.end();
    for leak in arguments.compares_leaks.then(|| leaks(&before)).into_iter().flatten() {
        shared.tally.fault(Fault::Leak, &leak);
    }
    print!("{}", shared.tally.table());
    drop(watchdog);
    shared.tally.faults()
}

/// Sets a value that is set once.
fn run_one(node: &Node) {
    let container = node.container("first", Spec::sh("exit 5")).started(&Io::default());
    assert_eq!(container.exit_status(), 5);
    container.delete().expect("delete");
}

/// Prints progress until the time is over.
fn watch(tally: &Tally, duration: Duration) {
    let end = Instant::now() + duration;
    let (_never, nothing) = mpsc::channel::<()>();
    loop {
        let left = end.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return;
        }
        pause(&nothing, left.min(PROGRESS));
        println!("{}", tally.progress());
    }
}

/// Waits for a span, or until the other side of the channel is dropped; returns false then.
fn pause(end: &mpsc::Receiver<()>, time: Duration) -> bool {
    matches!(end.recv_timeout(time), Err(RecvTimeoutError::Timeout))
}

/// Waits for all workers; returns false if one does not end.
fn join(workers: Vec<JoinHandle<()>>, tally: &Tally) -> bool {
    let over = wait::within(END_LIMIT, || workers.iter().all(JoinHandle::is_finished).then_some(()));
    for worker in workers {
        if worker.is_finished() {
            worker.join().unwrap_or_else(|_| tally.fault(Fault::Other, "a worker panicked"));
        }
    }
    over.is_some()
}

fn leaks(before: &Traces) -> Vec<String> {
    let mut leaks = Vec::new();
    // The list is empty when all have ended.
    let _ = wait::within(wait::LIMIT, || {
        leaks = Traces::take().since(before);
        leaks.is_empty().then_some(())
    });
    leaks
}

/// A thread with a name for messages.
fn thread<T: Send + 'static>(name: &str, body: impl FnOnce() -> T + Send + 'static) -> JoinHandle<T> {
    thread::Builder::new().name(name.to_string()).spawn(body).expect("start a thread")
}
