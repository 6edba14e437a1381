//! Attributes that a container inherits from containerd under containerd-shim-runc-v2: resource limits, processors, and how the
//! kernel schedules it. In a unit, a container would inherit the attributes of systemd. So `start` records those of containerd,
//! and `launch` sets them.

use nix::errno::Errno;
use nix::libc;
use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::unistd::Pid;
use rustix::process::{getpriority_process, setpriority_process};

use crate::sys::scheduling;
use crate::task::request::{Containerd, Scheduling};
use crate::telemetry;

use super::error::{Error, system};

const RESOURCES: [Resource; 16] = [
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
    Resource::RLIMIT_RTTIME,
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

/// How the kernel schedules this process.
pub fn scheduling() -> Scheduling {
    Scheduling { memory: scheduling::memory_policy().ok(), ..scheduling_of(None) }
}

/// How the kernel schedules a process; `None` is this one. Without the memory policy.
fn scheduling_of(process: Option<rustix::process::Pid>) -> Scheduling {
    Scheduling {
        nice: getpriority_process(process).ok(),
        policy: scheduling::policy(process).ok(),
        io_priority: scheduling::io_priority(process).ok(),
        memory: None,
    }
}

/// Sets the attributes of a containerd for this process.
pub(super) fn set(containerd: &Containerd) -> Result<(), Error> {
    let bound_to = &containerd.processors;
    if !bound_to.is_empty() && processors() != *bound_to {
        use_processors(bound_to)?;
    }
    containerd.rlimits.iter().try_for_each(|(resource, soft, hard)| set_limit(*resource, *soft, *hard))?;
    let of_systemd = Scheduling {
        memory: Some((libc::MPOL_DEFAULT, Vec::new())),
        ..scheduling_of(Some(rustix::process::Pid::INIT))
    };
    schedule(&wanted(&containerd.scheduling, &scheduling(), &of_systemd));
    Ok(())
}

/// What this process has to set to be scheduled as containerd is. Where its unit has a value of its own, from a drop-in or
/// an option of the administrator, this value holds: it differs from what PID 1 has.
fn wanted(containerd: &Scheduling, own: &Scheduling, of_systemd: &Scheduling) -> Scheduling {
    fn one<T: PartialEq + Clone>(
        containerd: &Option<T>,
        own: &Option<T>,
        of_systemd: &Option<T>,
    ) -> Option<T> {
        containerd.clone().filter(|_| containerd != own && own == of_systemd)
    }
    Scheduling {
        nice: one(&containerd.nice, &own.nice, &of_systemd.nice),
        policy: one(&containerd.policy, &own.policy, &of_systemd.policy),
        io_priority: one(&containerd.io_priority, &own.io_priority, &of_systemd.io_priority),
        memory: one(&containerd.memory, &own.memory, &of_systemd.memory),
    }
}

/// Sets what is given. A container that the kernel schedules in another way is better than none, so an error is only printed.
fn schedule(wanted: &Scheduling) {
    let say = |what: &str, set: Result<(), Errno>| {
        if let Err(errno) = set {
            telemetry::say(&format!("can't set the {what} of containerd: {}", errno.desc()));
        }
    };
    if let Some(policy) = wanted.policy {
        say("scheduling policy", scheduling::set_policy(policy));
    }
    if let Some(nice) = wanted.nice {
        let set = setpriority_process(None, nice);
        say("nice value", set.map_err(|error| Errno::from_raw(error.raw_os_error())));
    }
    // Without a priority for I/O, the kernel derives one from the two values above.
    if let Some(priority) = wanted.io_priority.filter(|wanted| scheduling::io_priority(None) != Ok(*wanted)) {
        say("I/O priority", scheduling::set_io_priority(priority));
    }
    if let Some(memory) = &wanted.memory {
        say("memory policy", scheduling::set_memory_policy(memory));
    }
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

#[cfg(test)]
mod tests {
    use super::*;

    fn scheduled(nice: i32, policy: i32, io_priority: i32) -> Scheduling {
        let (nice, policy, io_priority) = (Some(nice), Some((policy, 0)), Some(io_priority));
        Scheduling { nice, policy, io_priority, memory: Some((libc::MPOL_DEFAULT, Vec::new())) }
    }

    #[test]
    fn a_process_is_scheduled_as_containerd_is_unless_its_unit_says_otherwise() {
        let usual = scheduled(0, libc::SCHED_OTHER, 0);
        let containerd =
            Scheduling { memory: Some((libc::MPOL_BIND, vec![1])), ..scheduled(5, libc::SCHED_BATCH, 7) };
        assert_eq!(wanted(&containerd, &usual, &usual), containerd);
        assert_eq!(wanted(&usual, &usual, &usual), Scheduling::default(), "nothing to do");
        // A record of an earlier version.
        assert_eq!(wanted(&Scheduling::default(), &usual, &usual), Scheduling::default());
        let own =
            Scheduling { memory: Some((libc::MPOL_BIND, vec![2])), ..scheduled(9, libc::SCHED_IDLE, 3) };
        assert_eq!(wanted(&containerd, &own, &usual), Scheduling::default(), "the unit sets everything");
        let own = Scheduling { nice: Some(9), ..usual.clone() };
        let rest = Scheduling { nice: None, ..containerd.clone() };
        assert_eq!(wanted(&containerd, &own, &usual), rest, "the unit sets the nice value");
        // PID 1 itself is scheduled in a special way, and its unit inherits this.
        let odd = scheduled(3, libc::SCHED_BATCH, 1);
        let back = Scheduling { memory: None, ..usual.clone() };
        assert_eq!(wanted(&usual, &odd, &odd), back);
    }

    #[test]
    fn what_start_records_is_what_launch_sets() {
        let (sender, receiver) = std::sync::mpsc::channel();
        // These are attributes of a thread.
        let thread = std::thread::spawn(move || {
            let nice = getpriority_process(None).unwrap().max(11);
            let wanted = Scheduling { memory: None, ..scheduled(nice, libc::SCHED_BATCH, 2 << 13 | 7) };
            schedule(&wanted);
            sender.send((wanted, Scheduling { memory: None, ..scheduling() })).unwrap();
        });
        thread.join().unwrap();
        let (wanted, recorded) = receiver.recv().unwrap();
        assert_eq!(recorded, wanted);
        let containerd = Containerd { scheduling: recorded, core_scheduling: true, ..Containerd::default() };
        let text = serde_json::to_string(&containerd).unwrap();
        assert_eq!(serde_json::from_str::<Containerd>(&text).unwrap(), containerd);
    }

    #[test]
    fn all_limits_that_the_kernel_has_are_recorded() {
        let kernel = std::fs::read_to_string("/proc/self/limits").unwrap().lines().count() - 1;
        assert_eq!(limits().len(), kernel);
    }
}
