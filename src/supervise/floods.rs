//! Ends containers whose processes keep systemd from answering anybody.
//!
//! systemd is the parent of the processes of execs, and of all orphans of a container without a PID namespace of its own. Such a
//! process can start siblings (clone(2), `CLONE_PARENT`), which are children of systemd as well. systemd deals with the
//! ends of its children before it answers calls. So processes that start siblings, each of which ends at once, can keep systemd
//! from answering for as long as they like, and a limit of pids does not help: few of them exist at the same time.
//!
//! No setting of systemd or the kernel prevents that. So if systemd is silent, the daemon looks at systemd's new children for a
//! moment. A silent systemd starts no process. If hundreds of new children belong to one container, its processes are killed.

use std::collections::HashSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::pin::pin;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::time::{sleep, timeout};

use crate::cgroup;
use crate::services::{Tasks, blocking};
use crate::unit::manager::Manager;

/// How often the daemon asks systemd for an answer.
const INTERVAL: Duration = Duration::from_secs(5);

/// How long systemd may take to answer.
const ANSWER_LIMIT: Duration = Duration::from_secs(3);

/// How long the daemon looks at systemd's children.
const LOOK: Duration = Duration::from_secs(1);

/// The number of new children in that time from which on a container counts as the reason. What was measured is some thousands.
const FLOOD: usize = 200;

/// The largest number of new children that the daemon looks at.
const MOST: usize = 4096;

/// The file with the pids of systemd's children.
const CHILDREN: &str = "/proc/1/task/1/children";

/// Background task: ends such containers. Never returns.
pub async fn end(tasks: Arc<Tasks>, manager: Arc<Manager>) {
    loop {
        sleep(INTERVAL).await;
        // One call at a time: the bus keeps calls that are not answered, and has a limit for them.
        // An error is an answer of the bus, and there is nothing to wait for.
        let mut answered = pin!(manager.version());
        while timeout(ANSWER_LIMIT, &mut answered).await.is_err() {
            end_floods(&tasks).await;
        }
    }
}

async fn end_floods(tasks: &Tasks) {
    let Ok(children) = blocking(|| new_children(Path::new(CHILDREN), LOOK)).await else {
        return;
    };
    for entry in tasks.registry.all() {
        let Some(cgroup) = entry.task().cgroup().map(Path::to_owned) else {
            continue;
        };
        let number = children.iter().filter(|child| child.starts_with(&cgroup)).count();
        if number < FLOOD {
            continue;
        }
        let key = &entry.key;
        tracing::error!(task = %key, number, "task {key}: its processes are killed: at least {number} of them became children of systemd within {} s, and systemd answered nobody", LOOK.as_secs());
        if !matches!(blocking(move || cgroup::kill(&cgroup)).await, Ok(Ok(()))) {
            tracing::error!(task = %key, "task {key}: its processes can't be killed");
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
