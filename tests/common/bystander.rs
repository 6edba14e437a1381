//! What hostile input must not reach: another container, and the daemon with its descriptors, threads and memory.

use super::container::Container;
use super::leaks::{self, Traces};
use super::node::Node;
use super::spec::Spec;
use super::task::Io;
use super::{daemon, process, wait};

/// How much the daemon may grow for good, in KiB. It returns what it has freed every few seconds.
const GROWTH: u64 = 4 << 10;

/// How many threads the daemon may have in addition: those for blocking work end after some seconds without any.
const THREADS: usize = 8;

/// A container that has nothing to do with hostile input, and the state of the daemon before it.
pub struct Bystander<'n> {
    container: Container<'n>,
    pid: u32,
    daemon: u32,
    restarts: u32,
    threads: usize,
    memory: u64,
    traces: Traces,
}

/// The private memory of a process in KiB.
fn memory(pid: u32) -> u64 {
    let text = process::status(pid, "RssAnon").unwrap_or_default();
    text.split_whitespace().next().and_then(|number| number.parse().ok()).unwrap_or(0)
}

impl<'n> Bystander<'n> {
    /// Starts a container. The node must be exclusive.
    pub fn new(node: &'n Node) -> Bystander<'n> {
        let container = node.container("bystander", Spec::sleeping()).started(&Io::default());
        // The daemon has opened what it opens for its first exec.
        container.exec_sh("exit 0").end();
        let daemon = wait::until("the daemon serves", daemon::serving);
        Bystander {
            pid: container.pid(),
            daemon,
            restarts: daemon::restarts(),
            threads: process::threads(daemon).count(),
            memory: memory(daemon),
            traces: Traces::take(),
            container,
        }
    }

    /// Asserts that the daemon has not ended, and that the container works.
    pub fn assert_untouched(&self, what: &str) {
        assert_eq!(daemon::pid(), Some(self.daemon), "{what}: the daemon has ended");
        assert_eq!(self.container.pid(), self.pid, "{what}");
        assert_eq!(self.container.exec_sh("exit 7").exit_status(), 7, "{what}");
    }

    /// Asserts in addition that nothing is left.
    pub fn assert_all_untouched(&self, what: &str) {
        self.assert_untouched(what);
        assert_eq!(daemon::restarts(), self.restarts, "{what}: restarts");
        wait::until_true("threads end", || process::threads(self.daemon).count() <= self.threads + THREADS);
        println!("{what}: the daemon has {} KiB after {} KiB", memory(self.daemon), self.memory);
        wait::until_true(
            &format!("the daemon has {GROWTH} KiB more than {} KiB at most", self.memory),
            || memory(self.daemon) <= self.memory + GROWTH,
        );
        leaks::assert_none(what, &self.traces);
    }
}
