//! The memory of a runtime while containers run: the Pss of every process of its shim. The processes of the containers are the
//! same under every runtime and do not count.

use std::fs;
use std::path::Path;

use super::common::container::{Container, Io};
use super::common::node::Node;
use super::common::process;
use super::common::spec::Spec;
use super::common::wait;

/// The memory of a runtime for a number of running containers.
#[derive(Clone, Debug)]
pub struct Kept {
    pub containers: usize,
    pub processes: usize,
    pub pss_kib: u64,
}

/// Measures each runtime alone, with each number of containers.
pub fn measure(node: &Node, runtimes: &[String; 2], numbers: &[usize]) -> [Vec<Kept>; 2] {
    [0, 1].map(|index| {
        let runtime = runtimes[index].as_str();
        numbers.iter().map(|&containers| with(node, runtime, containers)).collect()
    })
}

fn with(node: &Node, runtime: &str, containers: usize) -> Kept {
    // Shims of an earlier part end after their last container.
    wait::until_true("no containers are left from before", || stock_shims_are_gone(runtime));
    let running: Vec<Container> = (0..containers)
        .map(|_| node.container("memory", Spec::sleeping()).runtime(runtime).started(&Io::default()))
        .collect();
    let shims = shims(runtime);
    let pss_kib = shims.iter().filter_map(|pid| process::pss_kib(*pid)).sum();
    drop(running);
    Kept { containers, processes: shims.len(), pss_kib }
}

/// Waits until no shim of a container runs. A daemon for all containers may run.
fn stock_shims_are_gone(runtime: &str) -> bool {
    shims(runtime).len() <= 1
}

/// The processes that run the shim's binary: `io.containerd.NAME.vN` is `containerd-shim-NAME-vN`.
pub fn shims(runtime: &str) -> Vec<u32> {
    let mut parts = runtime.rsplit('.');
    let (version, name) = (parts.next().unwrap_or_default(), parts.next().unwrap_or_default());
    let binary = format!("containerd-shim-{name}-{version}");
    let runs_it = |pid: &u32| {
        let exe = fs::read_link(format!("/proc/{pid}/exe")).unwrap_or_default();
        exe.file_name() == Some(Path::new(&binary).as_os_str())
    };
    process::named("containerd-shim").into_iter().filter(runs_it).collect()
}
