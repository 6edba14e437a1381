//! The cost of connections and requests that outlive the daemon. Measures the same daemon alternately with this mechanism and
//! without it.

use std::time::{Duration, Instant};

use containerd_shim_protos::api::StateRequest;

use super::common::container::Io;
use super::common::daemon::{self, DropIn};
use super::common::node::{Node, OUR_RUNTIME};
use super::common::shim::{Shim, WithFaults};
use super::common::spec::Spec;
use super::container::Init;
use super::cpu::{self, Cpu};
use super::latency::{in_turn, total};

/// The two sides: the usual daemon, and a daemon without the mechanism.
pub const SIDES: [&str; 2] = ["nothing is forgotten", "switched off"];
/// The least number of rounds of each side.
const LEAST_ROUNDS: usize = 4;
/// Containers in a round, one after the other.
pub const CONTAINERS: usize = 25;
/// Calls in a round, over one connection.
pub const CALLS: u32 = 500;
/// This many containers and calls come first and do not count, because the daemon has just started.
const WARM_UP: usize = 3;

/// The drop-in of a daemon without the mechanism.
const FORGETFUL: &str = "[Service]\nEnvironment=CONTAINERD_SHIM_SYSTEMD_FORGETFUL=1\n";

/// The samples of one side.
#[derive(Debug, Default)]
pub struct Costs {
    /// Each container's total.
    pub totals: Vec<Duration>,
    /// For each round, by container.
    pub container_cpu: Cpu,
    /// Each call of State.
    pub calls: Vec<Duration>,
    /// For each round, by call.
    pub call_cpu: Vec<Duration>,
}

/// The number of rounds for a number of containers of each side.
pub fn rounds(containers: usize) -> usize {
    containers.div_ceil(CONTAINERS).max(LEAST_ROUNDS)
}

/// Measures both sides. Needs a test build of the daemon: only a test build can switch the mechanism off.
pub fn measure(node: &Node, rounds: usize) -> [Costs; 2] {
    let _build = WithFaults::install();
    let mut costs = [Costs::default(), Costs::default()];
    in_turn(rounds, |_, index| {
        // No container may run here, because it would be lost.
        let _forgetful = if index == 1 {
            Some(DropIn::new(FORGETFUL))
        } else {
            daemon::systemctl("restart");
            None
        };
        costs[index].add_containers(node);
        costs[index].add_calls(node);
    });
    costs
}

impl Costs {
    fn add_containers(&mut self, node: &Node) {
        for _ in 0..WARM_UP {
            container(node);
        }
        let count = u32::try_from(CONTAINERS).expect("a small number of containers");
        let daemon = [daemon::pid().expect("there is a daemon")];
        let (own, machine) = (cpu::of_processes(&daemon), cpu::of_machine());
        self.totals.extend((0..CONTAINERS).map(|_| container(node)));
        self.container_cpu.shim.push((cpu::of_processes(&daemon) - own) / count);
        self.container_cpu.machine.push((cpu::of_machine() - machine) / count);
    }

    fn add_calls(&mut self, node: &Node) {
        let container = node.container("journal", Spec::sleeping()).runtime(OUR_RUNTIME);
        let container = container.started(&Io::default());
        let shim = Shim::connect(node);
        let call = || {
            let request = StateRequest { id: container.id.clone(), ..Default::default() };
            let begin = Instant::now();
            let state = shim.call(async |client, context| client.state(context, &request).await);
            let elapsed = begin.elapsed();
            assert_eq!(state.expect("state").id, container.id);
            elapsed
        };
        for _ in 0..WARM_UP {
            call();
        }
        let daemon = [daemon::pid().expect("there is a daemon")];
        let own = cpu::of_processes(&daemon);
        self.calls.extend((0..CALLS).map(|_| call()));
        self.call_cpu.push((cpu::of_processes(&daemon) - own) / CALLS);
    }
}

/// The time from Create to Delete.
fn container(node: &Node) -> Duration {
    total(Init::new(node, OUR_RUNTIME, &["/bin/true"], None))
}
