//! The CPU time of an operation, such as an exec: in the long-running processes of the runtime, and in the whole machine. The
//! latter includes short-lived processes, containerd, systemd and this client.

use std::fs;
use std::time::Duration;

use nix::time::{clock_getcpuclockid, clock_gettime};
use nix::unistd::Pid;

use super::common::container::Container;
use super::common::node::Node;
use super::exec::Exec;
use super::latency::{in_turn, total};
use super::memory;
use super::output::Output;

/// Execs in a row, so that work that a runtime does after its response to Delete is counted as well.
const IN_A_ROW: u32 = 10;

/// For each row, the CPU time per operation.
#[derive(Debug, Default)]
pub struct Cpu {
    pub shim: Vec<Duration>,
    pub machine: Vec<Duration>,
}

/// Measures rows of execs under each runtime alternately, in one container of each runtime.
pub fn measure(node: &Node, runtimes: &[String; 2], containers: [&Container; 2], rows: usize) -> [Cpu; 2] {
    let mut cpu = [Cpu::default(), Cpu::default()];
    in_turn(rows, |_, index| {
        let shims = memory::shims(&runtimes[index]);
        let (shim, machine) = (of_processes(&shims), of_machine());
        for _ in 0..IN_A_ROW {
            total(Exec::new(node, containers[index], &["/bin/true"], Output::new(false)));
        }
        cpu[index].shim.push((of_processes(&shims) - shim) / IN_A_ROW);
        cpu[index].machine.push((of_machine() - machine) / IN_A_ROW);
    });
    cpu
}

/// The CPU time of the running processes, without that of their children.
pub fn of_processes(pids: &[u32]) -> Duration {
    pids.iter().map(|pid| of_process(*pid).unwrap_or_else(|error| panic!("CPU of {pid}: {error}"))).sum()
}

fn of_process(pid: u32) -> nix::Result<Duration> {
    let pid = Pid::from_raw(pid.try_into().map_err(|_| nix::errno::Errno::ESRCH)?);
    Ok(clock_gettime(clock_getcpuclockid(pid)?)?.into())
}

/// The CPU time of all processes in this machine, or in this guest if it has a cgroup namespace.
pub fn of_machine() -> Duration {
    let path = "/sys/fs/cgroup/cpu.stat";
    let stat = fs::read_to_string(path).unwrap_or_else(|error| panic!("{path}: {error}"));
    usage(&stat).unwrap_or_else(|| panic!("no usage_usec in {path}: {stat}"))
}

/// The CPU time in the text of a `cpu.stat`.
pub fn usage(stat: &str) -> Option<Duration> {
    let usage = stat.lines().find_map(|line| line.strip_prefix("usage_usec ")?.parse().ok());
    usage.map(Duration::from_micros)
}
