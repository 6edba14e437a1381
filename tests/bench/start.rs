//! The cost of one call of our binary's `start` while the daemon runs. containerd calls it for every container.

use std::time::{Duration, Instant};

use nix::sys::resource::{UsageWho, getrusage};
use nix::sys::time::TimeVal;

use super::common::shim::{self, Bundle};

pub const CALLS: usize = 50;

#[derive(Debug, Default)]
pub struct Cost {
    /// User and system time of the process.
    pub cpu: Vec<Duration>,
    pub elapsed: Vec<Duration>,
}

pub fn measure() -> Cost {
    shim::socket(); // the daemon is up
    let bundle = Bundle::new("start");
    let mut cost = Cost::default();
    for _ in 0..CALLS {
        let (cpu, begin) = (children_cpu(), Instant::now());
        let outcome = shim::start(&bundle, "bench", &[("MAX_SHIM_VERSION", "2")], &[]);
        cost.elapsed.push(begin.elapsed());
        cost.cpu.push(children_cpu() - cpu);
        assert_eq!(outcome.code, Some(0), "start: {}", outcome.stderr);
    }
    cost
}

/// The CPU time of all reaped children. Only this thread starts any.
pub fn children_cpu() -> Duration {
    let usage = getrusage(UsageWho::RUSAGE_CHILDREN).expect("getrusage of children");
    duration(usage.user_time()) + duration(usage.system_time())
}

fn duration(time: TimeVal) -> Duration {
    let (seconds, microseconds) = (time.tv_sec(), time.tv_usec());
    Duration::from_micros(
        u64::try_from(seconds * 1_000_000 + microseconds).expect("time used is not negative"),
    )
}
