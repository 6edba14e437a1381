//! Attributes that a container inherits from containerd under containerd-shim-runc-v2: resource limits and processors. In a
//! unit, a container would inherit the attributes of systemd. So `start` records those of containerd, and `launch` sets them.

use nix::errno::Errno;
use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::unistd::Pid;

use crate::task::request::Containerd;

use super::error::{Error, system};

const RESOURCES: [Resource; 15] = [
    Resource::RLIMIT_CPU,
    Resource::RLIMIT_FSIZE,
    Resource::RLIMIT_DATA,
    Resource::RLIMIT_STACK,
    Resource::RLIMIT_CORE,
    Resource::RLIMIT_RSS,
    Resource::RLIMIT_NPROC,
    Resource::RLIMIT_NOFILE,
    Resource::RLIMIT_MEMLOCK,
    Resource::RLIMIT_AS,
    Resource::RLIMIT_LOCKS,
    Resource::RLIMIT_SIGPENDING,
    Resource::RLIMIT_MSGQUEUE,
    Resource::RLIMIT_NICE,
    Resource::RLIMIT_RTPRIO,
];

/// The resource limits of this process: number, soft limit, hard limit.
pub fn limits() -> Vec<(u32, u64, u64)> {
    let limit = |resource| getrlimit(resource).ok().map(|(soft, hard)| (resource as u32, soft, hard));
    RESOURCES.into_iter().filter_map(limit).collect()
}

/// The numbers of the processors that this process may use. Empty if they can't be read.
pub fn processors() -> Vec<usize> {
    let Ok(set) = sched_getaffinity(Pid::from_raw(0)) else {
        return Vec::new();
    };
    (0..CpuSet::count()).filter(|cpu| set.is_set(*cpu).unwrap_or(false)).collect()
}

/// Sets the limits and the processors of a containerd for this process.
pub(super) fn set(containerd: &Containerd) -> Result<(), Error> {
    let wanted = &containerd.processors;
    if !wanted.is_empty() && processors() != *wanted {
        use_processors(wanted)?;
    }
    containerd.rlimits.iter().try_for_each(|(resource, soft, hard)| set_limit(*resource, *soft, *hard))
}

fn set_limit(resource: u32, soft: u64, hard: u64) -> Result<(), Error> {
    // A limit with an unknown number was recorded by another version.
    let Some(known) = RESOURCES.iter().find(|known| **known as u32 == resource) else {
        return Ok(());
    };
    let up_to = |most: u64| setrlimit(*known, soft.min(most), hard.min(most));
    let mut set = up_to(u64::MAX);
    if set == Err(Errno::EPERM) && *known == Resource::RLIMIT_NOFILE {
        // `fs.nr_open` was lowered below containerd's limit, so that limit can't be set any more (kernel/sys.c,
        // do_prlimit).
        let most = std::fs::read_to_string("/proc/sys/fs/nr_open").ok();
        set = up_to(most.and_then(|text| text.trim().parse().ok()).unwrap_or(hard));
    }
    if set == Err(Errno::EPERM) {
        // If systemd runs in a container without CAP_SYS_RESOURCE, it can set a lower limit for the unit than containerd
        // has, and no process in that container can raise the limit.
        set = getrlimit(*known).and_then(|(_, own)| up_to(own));
    }
    set.map_err(system("set a resource limit"))
}

/// Sets the processors, without those that do not exist any more. If none is left, nothing is changed.
fn use_processors(wanted: &[usize]) -> Result<(), Error> {
    let mut set = CpuSet::new();
    for cpu in wanted {
        set.set(*cpu).map_err(system("choose a processor"))?;
    }
    match sched_setaffinity(Pid::from_raw(0), &set) {
        // No processor of the set exists.
        Err(Errno::EINVAL) => Ok(()),
        bound => bound.map_err(system("set the CPU affinity")),
    }
}
