//! Ends containers whose processes keep systemd from answering anybody.
//!
//! systemd is the parent of the processes of execs, and of all orphans of a container without a PID namespace of its own. Such a
//! process can start siblings (clone(2), `CLONE_PARENT`), which are children of systemd as well. systemd deals with the
//! ends of its children before it answers calls. So a process that starts siblings, each of which ends at once, keeps systemd
//! from answering for as long as it likes, and a limit of pids does not help: few of them exist at the same time.
//!
//! No setting of systemd or the kernel prevents that. So if systemd is busy and silent, the daemon looks at systemd's new
//! children for a moment. If hundreds of them belong to one container, all its processes are killed.

use std::collections::HashSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::time::{sleep, timeout};

use crate::cgroup;
use crate::services::{Tasks, blocking};
use crate::sys::tree;
use crate::unit::manager::Manager;

/// How often the daemon looks how busy systemd is: one read of a file.
const INTERVAL: Duration = Duration::from_secs(5);

/// systemd is busy if it has used a processor for this part of the time, in percent. A cheap filter: most of the time, the
/// daemon need not ask systemd for an answer.
const BUSY: u64 = 20;

/// The unit of the times in /proc/PID/stat: `USER_HZ`, which is 100 on all architectures that systemd supports.
const TICKS_PER_SECOND: u64 = 100;

/// How long systemd may take to answer.
const ANSWER_LIMIT: Duration = Duration::from_secs(3);

/// How long the daemon looks at systemd's children.
const LOOK: Duration = Duration::from_secs(1);

/// The number of new children in that time from which on a container counts as the reason. What is measured is some thousands.
const FLOOD: usize = 200;

/// The largest number of new children that the daemon looks at.
const MOST: usize = 4096;

/// The file with the pids of systemd's children.
const CHILDREN: &str = "/proc/1/task/1/children";

/// systemd's pid.
const SYSTEMD: u32 = 1;

/// Background task: ends such containers. Never returns.
pub async fn end(tasks: Arc<Tasks>, manager: Arc<Manager>) {
    let mut before = tree::used(SYSTEMD);
    loop {
        sleep(INTERVAL).await;
        let now = tree::used(SYSTEMD);
        let is_busy = is_busy(before, now);
        before = now;
        // An error is an answer, too: of the bus.
        if is_busy && timeout(ANSWER_LIMIT, manager.version()).await.is_err() {
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
        tracing::error!(task = %key, number, "task {key}: its processes are killed: at least {number} new children of systemd in {} s were its, and systemd answered nobody", LOOK.as_secs());
        let reason = match blocking(move || cgroup::kill(&cgroup)).await {
            Ok(Ok(())) => continue,
            Ok(Err(error)) => error.to_string(),
            Err(error) => error.to_string(),
        };
        tracing::error!(task = %key, "task {key}: its processes can't be killed: {reason}");
    }
}

fn is_busy(before: Option<u64>, now: Option<u64>) -> bool {
    let limit = INTERVAL.as_secs() * TICKS_PER_SECOND * BUSY / 100;
    before.zip(now).is_some_and(|(before, now)| now.saturating_sub(before) >= limit)
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
    fn a_process_that_can_not_be_read_is_not_busy() {
        assert!(is_busy(Some(7), Some(107)));
        assert!(!is_busy(Some(7), Some(106)));
        assert!(!is_busy(None, Some(1000)) && !is_busy(Some(1000), None) && !is_busy(Some(1000), Some(7)));
    }

    #[test]
    fn only_children_that_come_while_the_daemon_looks_are_found() {
        let own = cgroup::of_self().unwrap();
        let list = PathBuf::from(format!("/proc/self/task/{}/children", nix::unistd::gettid()));
        let run = |times| {
            for _ in 0..times {
                Command::new("true").spawn().unwrap().wait().unwrap();
            }
        };
        let looking = std::thread::spawn(move || new_children(&list, Duration::from_secs(1)));
        while !looking.is_finished() {
            run(1);
        }
        let found = looking.join().unwrap();
        assert!(found.len() > 1 && found.iter().all(|cgroup| *cgroup == own), "{found:?}");
    }
}
