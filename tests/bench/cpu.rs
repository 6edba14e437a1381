//! What something costs in CPU, an exec first of all: of the runtime's own lasting processes, and of everything in the machine,
//! which has the short-lived ones, containerd, systemd and this client in it, too.

use std::fs;
use std::time::Duration;

use nix::time::{clock_getcpuclockid, clock_gettime};
use nix::unistd::Pid;

use super::common::container::Container;
use super::common::node::Node;
use super::exec::Exec;
use super::latency::{Process, in_turn, live};
use super::memory;
use super::output::Output;

/// Execs in a row: what a runtime does after the answer to Delete is to be counted as its own.
const IN_A_ROW: u32 = 10;

/// For each row, the CPU time by exec, or by whatever was done in a row.
#[derive(Debug, Default)]
pub struct Cpu {
    pub shim: Vec<Duration>,
    pub machine: Vec<Duration>,
}

/// Measures as many rows of execs under each runtime in alternation, in a container of each.
pub fn measure(node: &Node, runtimes: &[String; 2], containers: [&Container; 2], rows: usize) -> [Cpu; 2] {
    let mut cpu = [Cpu::default(), Cpu::default()];
    in_turn(rows, |_, index| {
        let shims = memory::shims(&runtimes[index]);
        let (shim, machine) = (of_processes(&shims), of_machine());
        for _ in 0..IN_A_ROW {
            let exec = Exec::new(node, containers[index], &["/bin/true"], Output::new(false));
            live(&exec);
            exec.deleted();
        }
        cpu[index].shim.push((of_processes(&shims) - shim) / IN_A_ROW);
        cpu[index].machine.push((of_machine() - machine) / IN_A_ROW);
    });
    cpu
}

/// Those that live; what their children use is not theirs.
pub fn of_processes(pids: &[u32]) -> Duration {
    pids.iter().map(|pid| of_process(*pid).unwrap_or_else(|error| panic!("CPU of {pid}: {error}"))).sum()
}

fn of_process(pid: u32) -> nix::Result<Duration> {
    let pid = Pid::from_raw(pid.try_into().map_err(|_| nix::errno::Errno::ESRCH)?);
    Ok(clock_gettime(clock_getcpuclockid(pid)?)?.into())
}

/// All that runs in this machine, or in this guest where it has a cgroup namespace.
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
