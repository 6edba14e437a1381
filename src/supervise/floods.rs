//! Ends containers whose processes keep systemd from answering anybody.
//!
//! systemd is the parent of the processes of execs, and of all orphans of a container without a PID namespace of its own. Such a
//! process can start siblings (clone(2), `CLONE_PARENT`), which are children of systemd as well. systemd deals with the
//! ends of its children before it answers calls. So processes that start siblings, each of which ends at once, can keep systemd
//! from answering for as long as they like, and a limit of pids does not help: few of them exist at the same time.
//!
//! No setting of systemd or the kernel prevents that. So if systemd is silent, the daemon looks at systemd's new children for a
//! moment. A silent systemd starts no process. If hundreds of new children belong to one container, its processes are killed.

use std::collections::{HashSet, VecDeque};
use std::fs;
use std::path::{Path, PathBuf};
use std::pin::pin;
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use tokio::time::{sleep, timeout};

use crate::cgroup;
use crate::services::{Tasks, blocking};
use crate::unit::manager::Manager;

/// How often the daemon asks systemd for an answer.
const INTERVAL: Duration = Duration::from_secs(5);

/// systemd is not busy if it has used less CPU time than this since the last look, and knows the end of each of its children.
/// During a flood, systemd uses all the CPU time that it gets. If it gets none, it does not know that children have ended.
const IDLE: Duration = Duration::from_millis(100);

/// How long systemd may take to answer.
const ANSWER_LIMIT: Duration = Duration::from_secs(3);

/// An answer that takes longer than this is slow. A flood with pauses lets systemd answer in the pauses.
const SLOW: Duration = Duration::from_millis(500);
/// The number of slow answers among the [`LAST_ANSWERS`] from which on systemd counts as slow.
const SLOW_ANSWERS: usize = 3;
const LAST_ANSWERS: usize = 6;

/// How long the daemon looks at systemd's children.
const LOOK: Duration = Duration::from_secs(1);

/// The number of new children in that time from which on a container counts as the reason. What was measured is some thousands.
const FLOOD: usize = 200;

/// The same number if systemd is slow, and not silent. A slow systemd may start processes: an exec costs it some 4 ms, so that many
/// new children are not those of execs.
const FLOOD_WITH_PAUSES: usize = 1000;

/// The largest number of new children that the daemon looks at.
const MOST: usize = 4096;

/// The file with the pids of systemd's children.
const CHILDREN: &str = "/proc/1/task/1/children";

/// The files of systemd's only thread in /proc. The kernel waits for nothing when it shows these two.
const CPU_TIME: &str = "/proc/1/schedstat";
const STATUS: &str = "/proc/1/status";

/// Background task: ends such containers. Never returns.
pub async fn end(tasks: Arc<Tasks>, manager: Arc<Manager>) {
    let mut before = cpu_time(Path::new(CPU_TIME));
    let mut answers = Answers::default();
    loop {
        sleep(INTERVAL).await;
        // On an idle node, nobody wakes systemd and the bus.
        let now = cpu_time(Path::new(CPU_TIME));
        let used = now.zip(before).map(|(now, before)| now.saturating_sub(before));
        before = now;
        if used.is_some_and(|used| used < IDLE)
            && !has_unknown_ends(&fs::read_to_string(STATUS).unwrap_or_default())
        {
            continue;
        }
        // One call at a time: the bus keeps calls that are not answered, and has a limit for them.
        // An error is an answer of the bus, and there is nothing to wait for.
        let begun = Instant::now();
        let mut answered = pin!(manager.version());
        while timeout(ANSWER_LIMIT, &mut answered).await.is_err() {
            end_floods(&tasks, FLOOD, "answered nobody").await;
        }
        if answers.note(begun.elapsed()) {
            end_floods(&tasks, FLOOD_WITH_PAUSES, "answered slowly").await;
        }
    }
}

/// Whether the last answers of systemd were slow.
#[derive(Debug, Default)]
struct Answers(VecDeque<bool>);

impl Answers {
    /// Notes how long an answer took. True if too many of the last answers were slow: they are forgotten then.
    fn note(&mut self, took: Duration) -> bool {
        self.0.push_back(took > SLOW);
        if self.0.len() > LAST_ANSWERS {
            self.0.pop_front();
        }
        let is_slow = self.0.iter().filter(|is_slow| **is_slow).count() >= SLOW_ANSWERS;
        if is_slow {
            self.0.clear();
        }
        is_slow
    }
}

/// The CPU time of a thread: the first number of its schedstat, in nanoseconds (Documentation/scheduler/sched-stats.rst). `None` for
/// a kernel that does not count it.
fn cpu_time(schedstat: &Path) -> Option<Duration> {
    let text = fs::read_to_string(schedstat).ok()?;
    text.split_whitespace().next()?.parse().ok().map(Duration::from_nanos)
}

/// Whether a child of a process has ended, and the process has not read the signal that says so: SIGCHLD is in the set of signals
/// that wait for the whole process (proc_pid_status(5), `ShdPnd`). systemd reads the signal before it reaps the child.
fn has_unknown_ends(status: &str) -> bool {
    let pending = status.lines().find_map(|line| line.strip_prefix("ShdPnd:"));
    let pending = pending.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok());
    pending.is_some_and(|mask| mask & (1 << (Signal::SIGCHLD as i32 - 1)) != 0)
}

/// Kills the containers of which at least `flood` processes become children of systemd. `answered`: what systemd did meanwhile.
async fn end_floods(tasks: &Tasks, flood: usize, answered: &str) {
    let Ok(children) = blocking(|| new_children(Path::new(CHILDREN), LOOK)).await else {
        return;
    };
    for entry in tasks.registry.all() {
        let Some(cgroup) = entry.task().cgroup().map(Path::to_owned) else {
            continue;
        };
        let number = children.iter().filter(|child| child.starts_with(&cgroup)).count();
        if number < flood {
            continue;
        }
        let key = &entry.key;
        tracing::error!(task = %key, number, "task {key}: its processes are killed: at least {number} of them became children of systemd within {} s, and systemd {answered}", LOOK.as_secs());
        if let Err(error) = cgroup::kill(&cgroup).await {
            tracing::error!(task = %key, %error, "task {key}: can't kill its processes: {error}");
        }
    }
}

/// The cgroups of the processes that become systemd's children during some time. Those that are reaped before the daemon has
/// looked at them are not found.
#[expect(clippy::disallowed_methods, reason = "no event reports new children of another process")]
fn new_children(list: &Path, time: Duration) -> Vec<PathBuf> {
    let begun = Instant::now();
    let (mut seen, mut found) = (HashSet::new(), Vec::new());
    let mut is_first = true;
    while begun.elapsed() < time && found.len() < MOST {
        let pids = fs::read_to_string(list).unwrap_or_default();
        for pid in pids.split_whitespace().filter_map(|pid| pid.parse::<u32>().ok()) {
            if seen.insert(pid) && !is_first {
                found.extend(cgroup::of_process(pid));
            }
        }
        is_first = false;
        std::thread::sleep(Duration::from_millis(1));
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;

    #[test]
    fn the_cpu_time_of_a_thread_grows_while_it_runs() {
        let own = || cpu_time(Path::new("/proc/thread-self/schedstat")).unwrap();
        let (before, begun) = (own(), Instant::now());
        while own() < before + IDLE {
            assert!(begun.elapsed() < Duration::from_secs(60));
        }
        assert_eq!(cpu_time(Path::new("/proc/self/no-such-file")), None);
    }

    #[test]
    fn systemd_is_slow_after_some_slow_answers_of_the_last_ones() {
        let mut answers = Answers::default();
        let mut note = |slow: bool| answers.note(if slow { 2 * SLOW } else { SLOW / 2 });
        let noted: Vec<bool> = [true, true, false, false, false, false, true, true, true, true]
            .into_iter()
            .map(&mut note)
            .collect();
        assert_eq!(noted, [false, false, false, false, false, false, false, false, true, false]);
    }

    #[test]
    fn an_end_is_unknown_while_its_signal_waits_for_the_process() {
        let status =
            |pending: &str| format!("Name:\tsystemd\nSigPnd:\t0000000000010000\nShdPnd:\t{pending}\n");
        assert!(has_unknown_ends(&status("0000000000010000")));
        assert!(has_unknown_ends(&status("ffffffffffffffff")));
        for other in ["0000000000000000", "fffffffffffeffff", "", "x"] {
            assert!(!has_unknown_ends(&status(other)), "{other}");
        }
        assert!(!has_unknown_ends(""));
        assert!(fs::read_to_string(STATUS).unwrap().contains("\nShdPnd:\t"));
    }

    #[test]
    fn only_children_that_come_while_the_daemon_looks_are_found() {
        let own = cgroup::of_self().unwrap();
        let list = PathBuf::from(format!("/proc/self/task/{}/children", nix::unistd::gettid()));
        let mut earlier = Command::new("sleep").arg("1000").spawn().unwrap();
        let none = new_children(&list, Duration::from_millis(50));
        earlier.kill().unwrap();
        earlier.wait().unwrap();
        assert_eq!(none, Vec::<PathBuf>::new());
        let looking = std::thread::spawn(move || new_children(&list, Duration::from_secs(1)));
        while !looking.is_finished() {
            Command::new("true").spawn().unwrap().wait().unwrap();
        }
        let found = looking.join().unwrap();
        assert!(found.len() > 1 && found.iter().all(|cgroup| *cgroup == own), "{found:?}");
    }
}
