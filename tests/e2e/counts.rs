//! What the machine does for an exec and for a container, in numbers that do not depend on how busy it is. A change that
//! makes systemd, the bus or the kernel work more fails here. `docs/benchmarks.md` says what each message is for.
//!
//! Each number is the least of several: signals are repeated now and then, and each repetition is read. A change that
//! always causes more work raises the least number, too.

use std::hash::{BuildHasher, RandomState};
use std::sync::LazyLock;

use crate::common::container::Container;
use crate::common::counts::{Counts, Sender, Watch};
use crate::common::daemon;
use crate::common::leaks::STATE_DIRECTORY;
use crate::common::node::Node;
use crate::common::spec::Spec;
use crate::common::task::{Io, SIGKILL};

/// A name that no other guest has.
static NAME: LazyLock<String> = LazyLock::new(|| format!("counts{:x}", RandomState::new().hash_one(0) >> 40));

const WARM_UP: usize = 2;
const COUNTED: usize = 7;

/// A limit for a count: the name, the largest number, and the function that counts.
type Limit = (&'static str, usize, fn(&Counts) -> usize);

fn calls(counts: &Counts) -> usize {
    counts.sent(Sender::Daemon, "call")
}

fn signals(counts: &Counts) -> usize {
    counts.sent(Sender::Systemd, "signal")
}

fn executors(counts: &Counts) -> usize {
    counts.executions("systemd-executor")
}

fn own_programs(counts: &Counts) -> usize {
    counts.executions("containerd-shim-systemd-v1")
}

fn records(counts: &Counts) -> usize {
    counts.written_below(STATE_DIRECTORY)
}

fn files_of_systemd(counts: &Counts) -> usize {
    counts.written_below("/run/systemd")
}

fn moves(counts: &Counts) -> usize {
    counts.moves.len()
}

/// Before it had an executor (255), systemd moved each process once more.
fn more_moves() -> usize {
    usize::from(daemon::systemd_version() < 255)
}

/// Counts the cost of `operation`, and compares the least number of all rounds with each limit.
fn assert_cost(node: &Node, operation: impl Fn(), limits: &[Limit]) {
    let mut watch = Watch::new(node, &NAME);
    let rounds: Vec<Counts> = (0..WARM_UP + COUNTED)
        .map(|_| {
            watch.begin(node);
            operation();
            watch.end(node)
        })
        .skip(WARM_UP)
        .collect();
    let mut exceeded = Vec::new();
    for (what, most, count) in limits {
        let mut numbers: Vec<usize> = rounds.iter().map(count).collect();
        numbers.sort_unstable();
        let least = numbers[0];
        println!("{what}: {least} of at most {most} ({numbers:?})");
        if least > *most {
            exceeded.push(format!("{what}: {least}, more than {most}"));
        }
    }
    let example = &rounds[COUNTED / 2];
    println!("messages: {:#?}", example.by_kind());
    println!(
        "executed: {:?}\nwritten: {:#?}\nmoves: {:#?}",
        example.executed, example.written, example.moves
    );
    assert_eq!(exceeded, [""; 0]);
    // This checks the watch itself: if it counted nothing, no limit would be exceeded.
    assert!(calls(example) > 0 && own_programs(example) > 0 && records(example) > 0 && moves(example) > 0);
}

/// The limits for one exec, however it ends.
fn exec_limits() -> [Limit; 7] {
    [
        ("calls of the daemon", 6, calls),
        ("signals of systemd", 32, signals),
        ("executors", 1, executors),
        ("own programs", 1, own_programs),
        ("files of the daemon", 15, records),
        ("files of systemd", 1, files_of_systemd),
        ("moves between cgroups", 2 + more_moves(), moves),
    ]
}

fn sleeping(node: &Node) -> Container<'_> {
    node.container(&NAME, Spec::sleeping()).started(&Io::default())
}

#[test]
fn an_exec_that_ends_by_itself_costs_few_messages_programs_files_and_moves() {
    needs!(OurShim);
    let node = Node::exclusive();
    let container = sleeping(&node);
    let probe = || {
        let exec = container.exec(Spec::new(&["/bin/true"])).started(&Io::default());
        assert_eq!(exec.exit_status(), 0);
        exec.delete().expect("delete");
    };
    assert_cost(&node, probe, &exec_limits());
}

#[test]
fn an_exec_that_is_killed_costs_few_messages_programs_files_and_moves() {
    needs!(OurShim);
    let node = Node::exclusive();
    let container = sleeping(&node);
    let killed = || {
        let exec = container.exec(Spec::sleeping()).started(&Io::default());
        exec.kill(SIGKILL).expect("kill");
        assert_eq!(exec.exit_status(), 137);
        exec.delete().expect("delete");
    };
    assert_cost(&node, killed, &exec_limits());
}

#[test]
fn a_container_costs_few_messages_programs_files_and_moves() {
    needs!(OurShim);
    let node = Node::exclusive();
    // Its slice exists already.
    let _other = sleeping(&node);
    let life = || {
        let container = node.container(&NAME, Spec::new(&["/bin/true"])).started(&Io::default());
        assert_eq!(container.exit_status(), 0);
        container.delete().expect("delete");
    };
    assert_cost(
        &node,
        life,
        &[
            ("calls of the daemon", 5, calls),
            ("signals of systemd", 36, signals),
            ("executors", 1, executors),
            ("own programs", 3, own_programs),
            ("files of the daemon", 20, records),
            ("files of systemd", 3, files_of_systemd),
            ("moves between cgroups", 3 + more_moves(), moves),
        ],
    );
}
