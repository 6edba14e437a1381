//! Disturbs the daemon and its surroundings: first each disturbance alone for a while, then all of them mixed.

use std::sync::Arc;
use std::sync::mpsc::Receiver;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::arguments::Arguments;
use super::common::daemon;
use super::common::disturb::Disturbance;
use super::common::node::{Node, OUR_RUNTIME};
use super::common::random::Random;
use super::common::wait;
use super::{Shared, pause, thread};

/// Duration of one disturbance alone.
const SLICE: std::ops::RangeInclusive<Duration> = Duration::from_secs(2)..=Duration::from_secs(30);

/// Disturbs until the other side of the channel is dropped.
pub fn start(
    shared: &Arc<Shared>,
    arguments: &Arguments,
    mut random: Random,
    end: Receiver<()>,
) -> JoinHandle<()> {
    let (shared, all) = (shared.clone(), arguments.disturbances.clone());
    // Half of the time is for single disturbances, half for the mixture.
    let slice = arguments.duration / (2 * all.len().max(1)) as u32;
    let slice = slice.clamp(*SLICE.start(), *SLICE.end());
    thread("disturber", move || {
        let node = Node::shared();
        let mut turns = all.iter();
        while !all.is_empty() {
            let alone = turns.next().copied();
            let until = Instant::now() + slice;
            while Instant::now() < until {
                let next = alone.unwrap_or_else(|| random.pick(&all));
                let next = if alone.is_none() && random.chance(2) { all[0] } else { next };
                if !pause(&end, wait_before(next, &mut random)) {
                    return settle(&node);
                }
                disturb(next, &node, &shared);
            }
        }
    })
}

/// A random pause.
fn wait_before(next: Disturbance, random: &mut Random) -> Duration {
    let (least, more) = match next {
        Disturbance::Kill | Disturbance::WholeCgroup => (20, 600),
        Disturbance::Hang => (500, 3000),
        Disturbance::Restart => (100, 1500),
        Disturbance::Stall | Disturbance::Reexec | Disturbance::Reload => (200, 2000),
        Disturbance::Bus => (500, 3000),
        Disturbance::Containerd => (1000, 5000),
    };
    Duration::from_millis(least + random.below(more))
}

fn disturb(next: Disturbance, node: &Node, shared: &Shared) {
    shared.tally.begin(next.name());
    match next {
        Disturbance::Containerd => shared.containerd.disturb(node),
        _ => {
            if let Err(error) = next.happen() {
                // systemd may refuse a disturbance because of its own limits. The test only checks what happens to
                // the containers.
                return println!("systemd did not {}: {}", next.name(), error.trim());
            }
        }
    }
    shared.tally.disturbed(next.name());
}

/// Waits until everything works again. A daemon that hangs is ended by its watchdog first.
fn settle(node: &Node) {
    node.wait_for_containerd();
    if node.runtime == OUR_RUNTIME {
        wait::until("the daemon serves", || {
            let hangs = daemon::pid().is_some_and(daemon::is_stopped);
            daemon::serving().filter(|_| !hangs)
        });
    }
}
