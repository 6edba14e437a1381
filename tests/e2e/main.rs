//! End to end: the guest's real containerd, systemd and runc, driven as clients drive them.
//!
//! Runs as root in the testbed. `E2E_RUNTIME` names the runtime under test; with `io.containerd.runc.v2` the
//! tests that hold for every shim check themselves (those about ours alone are skipped).

#[path = "../common/mod.rs"]
mod common;

/// Ends a test early when this run can't serve what it needs.
macro_rules! needs {
    ($($need:ident),+) => {
        $(if let Some(reason) = crate::common::node::Need::$need.missing() {
            crate::skip(crate::name_of(|| ()), &reason);
            return;
        })+
    };
}

/// Past libtest's capture, so that a run shows what it has not checked.
fn skip(test: &str, reason: &str) {
    use std::io::Write;
    // One write, so that no other thread's line gets into it.
    let line = format!("SKIP {test}: {reason}\n");
    let _ = std::io::stderr().write_all(line.as_bytes());
}

/// The path of the function that a closure was written in.
fn name_of<T>(_closure: T) -> &'static str {
    let name = std::any::type_name::<T>().trim_end_matches("::{{closure}}");
    name.split_once("::").map_or(name, |(_, path)| path)
}

mod annotations;
mod attached;
mod attributes;
mod bad_exec;
mod bad_input;
mod bus;
mod containerds;
mod contract;
mod crash;
mod crash_cgroup;
mod crash_connections;
mod crash_events;
mod crash_exits;
mod crash_points;
mod crash_records;
mod crash_stop;
mod crash_streams;
mod ctr;
mod ctr_terminals;
mod events;
mod exec;
mod exec_exits;
mod exec_streams;
mod exec_units;
mod exhaustion;
mod freezer;
mod hangs;
mod ids;
mod json;
mod leaks;
mod lifecycle;
mod limits;
mod limits_input;
mod log_modes;
mod logger;
mod notify;
mod oom;
mod options;
mod placement;
mod poison;
mod reboot;
mod restart;
mod rootfs;
mod stats;
mod stdin;
mod stdio;
mod surroundings;
mod terminals;
mod units;
