//! Disturbances of our daemon while a test runs. No client may notice them.

use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use crate::common::daemon::{self, Killer};
use crate::common::node::Need;
use crate::common::wait;

/// A pause between kills of the whole cgroup.
const PAUSE: Duration = Duration::from_millis(900);

/// The disturbance of this run, until it is dropped. There is none with another runtime than ours.
pub enum Disturbance {
    None,
    Kills(Killer),
}

impl Disturbance {
    /// Begins the disturbance that `CLIENTS_DISTURB` names. The daemon runs already.
    pub fn begin() -> Disturbance {
        let wanted = std::env::var("CLIENTS_DISTURB").unwrap_or_default();
        if wanted.is_empty() || Need::OurShim.missing().is_some() {
            return Disturbance::None;
        }
        // The test has warmed it up.
        wait::until("the daemon serves", daemon::serving);
        match wanted.as_str() {
            // This kills the daemon several times a second.
            "kill" => Disturbance::Kills(Killer::begin(daemon::kill_now, Duration::ZERO)),
            // This kills all processes in the daemon's cgroup, about once a second.
            "kill-cgroup" => Disturbance::Kills(Killer::begin(daemon::kill_cgroup_now, PAUSE)),
            other => panic!("CLIENTS_DISTURB is {other:?}, not kill or kill-cgroup"),
        }
    }

    /// Ends the disturbance, and waits until the daemon serves.
    pub fn end(&mut self) {
        if let Disturbance::Kills(killer) = self {
            killer.end();
        }
    }
}

/// The daemon that has run a container of a client, by its pid. The first container of each daemon makes objects that
/// stay, such as a connection to the bus.
pub struct Warm(AtomicU32);

const NOBODY: u32 = u32::MAX;

impl Warm {
    pub const fn new() -> Warm {
        Warm(AtomicU32::new(NOBODY))
    }

    /// The client has restarted: its first container makes objects that stay, too.
    pub fn forget(&self) {
        self.0.store(NOBODY, Ordering::Relaxed);
    }

    /// Lets the client run a container, unless this daemon has run one already.
    pub fn up(&self, run: impl FnOnce()) {
        let daemon = || daemon::serving().unwrap_or_default();
        if self.0.load(Ordering::Relaxed) != daemon() {
            run();
            self.0.store(daemon(), Ordering::Relaxed);
        }
    }
}
