//! The costs of a pod with two containers, with a sandbox of the shim and with runc.v2 and its pause container, in
//! strict alternation on one containerd. `make bench-pods` runs it.

use std::fs;
use std::time::{Duration, Instant};

use crate::common::{needs, process};
use crate::cri::{Cri, HANDLER, STOCK_HANDLER, has_shim_sandboxes};

const SLICE: &str = "costs.slice";

/// The costs of one pod.
#[derive(Clone, Copy, Default)]
struct Cost {
    up: Duration,
    down: Duration,
    /// Pss of the shim and of the pod's first process, in KiB.
    memory: u64,
}

fn measure(cri: &Cri, handler: &str, shim: &str) -> Cost {
    let begin = Instant::now();
    let pod = cri.pod_by(handler, "cost", |config| {
        // The path has the form that kubelet uses: runc asks systemd for a scope in a slice, and needs the name of
        // the slice.
        config.linux.as_mut().expect("a Linux pod").cgroup_parent = format!("/{SLICE}");
    });
    for name in ["one", "two"] {
        cri.run(&pod, name, &["sleep", "100000"]);
    }
    let up = begin.elapsed();
    let runs_shim =
        |pid: &u32| fs::read_link(format!("/proc/{pid}/exe")).is_ok_and(|exe| exe.ends_with(shim));
    let shims = process::named("containerd-shim").into_iter().filter(runs_shim);
    let memory = shims.chain([cri.pause_pid(&pod)]).filter_map(process::pss_kib).sum();
    let begin = Instant::now();
    cri.remove(&pod);
    Cost { up, down: begin.elapsed(), memory }
}

/// The median, and the 10th and the 90th percentile.
fn spread(mut values: Vec<f64>) -> [f64; 3] {
    values.sort_by(f64::total_cmp);
    [5, 1, 9].map(|tenth| values[(values.len() - 1) * tenth / 10])
}

#[test]
fn a_pod_costs_no_more_than_with_a_pause_container() {
    let rounds = std::env::var("CLIENTS_COST").ok().and_then(|rounds| rounds.parse::<usize>().ok());
    let Some(rounds) = rounds.filter(|rounds| *rounds > 0) else {
        needs::skip("cri_cost", "make bench-pods measures costs");
        return;
    };
    if !has_shim_sandboxes() {
        return;
    }
    let cri = Cri::new();
    cri.load_pause_image();
    let kinds = [(HANDLER, "containerd-shim-systemd-v1"), (STOCK_HANDLER, "containerd-shim-runc-v2")];
    let mut costs = [Vec::new(), Vec::new()];
    for round in 0..=rounds {
        for (all, (handler, shim)) in costs.iter_mut().zip(kinds) {
            let cost = measure(&cri, handler, shim);
            // The first round makes objects that stay.
            if round > 0 {
                all.push(cost);
            }
        }
    }
    process::succeed("systemctl", &["stop", SLICE]);
    let line = |name: &str, of: fn(&Cost) -> f64| {
        let [ours, stock] = [0, 1].map(|kind| spread(costs[kind].iter().map(of).collect()));
        let show = |[median, low, high]: [f64; 3]| format!("{median:.0} ({low:.0}–{high:.0})");
        println!("| {name} | {} | {} | {:.2} |", show(ours), show(stock), ours[0] / stock[0]);
        ours[0] / stock[0]
    };
    println!("\n{rounds} pods of each kind\n\n| | systemd.v1 | runc.v2 | ratio |\n|---|---|---|---|");
    line("pod and two containers up, ms", |cost| cost.up.as_secs_f64() * 1000.0);
    line("pod stopped and removed, ms", |cost| cost.down.as_secs_f64() * 1000.0);
    let time = line("total, ms", |cost| (cost.up + cost.down).as_secs_f64() * 1000.0);
    let memory = line("memory (Pss) of shim and sandbox, KiB", |cost| cost.memory as f64);
    assert!(memory < 1.0 && time < 1.0, "a pod costs more than with a pause container");
}
