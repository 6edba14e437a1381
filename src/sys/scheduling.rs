//! How the kernel schedules a process, and where it takes the memory of the process from: what nix and rustix do not have.

use nix::errno::Errno;
use nix::libc::{self, c_int, c_long};
use rustix::process::Pid;

/// `IOPRIO_WHO_PROCESS`
const ONE_PROCESS: c_int = 1;

/// The number of NUMA nodes for which there is room in a [`MemoryPolicy`]. The kernel can be built for 1,024 at most (`NODES_SHIFT`).
const MAX_NODES: usize = 1024;

const WORDS: usize = MAX_NODES / 64;

/// A memory policy: `MPOL_…` with its flags, and the set of nodes.
pub type MemoryPolicy = (i32, Vec<u64>);

/// The scheduling policy (`SCHED_…`) and the real-time priority of a process; `None` is this thread.
///
/// Not by sched_getscheduler(3), which some C libraries do not have.
///
/// # Errors
/// `ESRCH`: there is no such process.
pub fn policy(process: Option<Pid>) -> Result<(i32, i32), Errno> {
    let pid = Pid::as_raw(process);
    let mut priority: c_int = 0;
    // SAFETY: the kernel writes one int, the only field of `struct sched_param`.
    let (policy, read) = unsafe {
        let policy = libc::syscall(libc::SYS_sched_getscheduler, pid);
        (policy, libc::syscall(libc::SYS_sched_getparam, pid, &raw mut priority))
    };
    let policy = number(policy)?;
    Errno::result(read)?;
    Ok((policy, priority))
}

/// Sets the scheduling policy and the real-time priority of this thread. The nice value stays.
///
/// # Errors
/// `EPERM`: this process may not have it.
pub fn set_policy((policy, priority): (i32, i32)) -> Result<(), Errno> {
    // SAFETY: the kernel reads one int, the only field of `struct sched_param`.
    Errno::result(unsafe { libc::syscall(libc::SYS_sched_setscheduler, 0, policy, &raw const priority) })
        .map(drop)
}

/// The I/O priority of a process (ioprio_get(2)); `None` is this thread.
///
/// # Errors
/// `ESRCH`: there is no such process.
pub fn io_priority(process: Option<Pid>) -> Result<i32, Errno> {
    // SAFETY: the call has numbers as arguments only.
    number(unsafe { libc::syscall(libc::SYS_ioprio_get, ONE_PROCESS, Pid::as_raw(process)) })
}

/// Sets the I/O priority of this thread.
///
/// # Errors
/// `EPERM`: this process may not have it.
pub fn set_io_priority(priority: i32) -> Result<(), Errno> {
    // SAFETY: the call has numbers as arguments only.
    Errno::result(unsafe { libc::syscall(libc::SYS_ioprio_set, ONE_PROCESS, 0, priority) }).map(drop)
}

/// The memory policy of this thread (get_mempolicy(2)). The kernel does not tell that of another process.
///
/// # Errors
/// `ENOSYS`: the kernel has no memory policies.
pub fn memory_policy() -> Result<MemoryPolicy, Errno> {
    let (mut mode, mut nodes): (c_int, _) = (0, [0_u64; WORDS]);
    let address = std::ptr::null::<u8>();
    // SAFETY: the kernel writes one int and the set of nodes, which has room for `MAX_NODES` bits.
    let read = unsafe {
        libc::syscall(libc::SYS_get_mempolicy, &raw mut mode, nodes.as_mut_ptr(), MAX_NODES, address, 0)
    };
    Errno::result(read)?;
    let used = nodes.iter().rposition(|word| *word != 0).map_or(0, |last| last + 1);
    Ok((mode, nodes[..used].to_vec()))
}

/// Sets the memory policy of this thread.
///
/// # Errors
/// `EINVAL`: this machine has none of the nodes.
pub fn set_memory_policy((mode, nodes): &MemoryPolicy) -> Result<(), Errno> {
    // The kernel reads one bit less than the number says (mm/mempolicy.c, `get_nodes`).
    let bits = nodes.len() * 64 + 1;
    // SAFETY: the kernel reads as many bits as the vector has.
    Errno::result(unsafe { libc::syscall(libc::SYS_set_mempolicy, *mode, nodes.as_ptr(), bits) }).map(drop)
}

fn number(result: c_long) -> Result<i32, Errno> {
    i32::try_from(Errno::result(result)?).map_err(|_| Errno::EOVERFLOW)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Runs a test in a thread of its own, which all of this is for.
    fn apart(test: impl FnOnce() + Send + 'static) {
        std::thread::spawn(test).join().unwrap();
    }

    #[test]
    fn a_thread_gets_a_policy_and_an_io_priority() {
        apart(|| {
            let batch = (libc::SCHED_BATCH, 0);
            set_policy(batch).unwrap();
            // The class "best effort" (2), level 7.
            set_io_priority(2 << 13 | 7).unwrap();
            assert_eq!((policy(None), io_priority(None)), (Ok(batch), Ok(2 << 13 | 7)));
            assert_eq!(set_policy((libc::SCHED_BATCH, 7)), Err(Errno::EINVAL));
        });
        assert_eq!(policy(Some(Pid::INIT)).map(|(_, priority)| priority), Ok(0));
        assert!(io_priority(Some(Pid::INIT)).is_ok());
        assert_eq!(policy(Pid::from_raw(i32::MAX)), Err(Errno::ESRCH));
    }

    #[test]
    fn a_thread_gets_a_memory_policy() {
        apart(|| {
            let Ok(usual) = memory_policy() else { return };
            assert_eq!(usual, (libc::MPOL_DEFAULT, Vec::new()));
            // Node 0 exists on every machine.
            let bound = (libc::MPOL_BIND, vec![1]);
            match set_memory_policy(&bound) {
                // A container may not set it.
                Err(Errno::EPERM) => return,
                set => set.unwrap(),
            }
            assert_eq!(memory_policy(), Ok(bound));
            set_memory_policy(&usual).unwrap();
            assert_eq!(memory_policy(), Ok(usual));
        });
    }
}
