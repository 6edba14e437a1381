//! End-to-end tests. They drive the real containerd, systemd and runc of a guest as clients do.
//!
//! They run as root in the testbed. `E2E_RUNTIME` names the runtime under test. With `io.containerd.runc.v2`, the stock shim
//! has to pass the tests that hold for every shim, which shows that these tests are right; the tests of this shim alone are
//! skipped.

#[macro_use]
#[path = "../common/mod.rs"]
mod common;

mod annotations;
mod attached;
mod attributes;
mod bad_exec;
mod bad_input;
mod browser;
mod bus;
mod checkpoint;
mod checkpoint_hangs;
mod checkpoint_odd;
mod checkpoint_options;
mod checkpoint_streams;
mod containerds;
mod contract;
mod counts;
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
mod descriptors;
mod devices;
mod events;
mod exec;
mod exec_exits;
mod exec_streams;
mod exec_units;
mod exhaustion;
mod failing_points;
mod freezer;
mod hangs;
mod hostile;
mod hostile_bus;
mod hostile_calls;
mod hostile_processes;
mod hostile_specs;
mod hostile_stdio;
mod ids;
mod json;
mod labels;
mod leaks;
mod lifecycle;
mod limits;
mod limits_input;
mod log_modes;
mod logger;
mod newcomer;
mod not_started;
mod notify;
mod oom;
mod options;
mod placement;
mod plots;
mod poison;
mod quotas;
mod reboot;
mod references;
mod restart;
mod rootfs;
mod sandbox;
mod sandbox_client;
mod sandbox_odd;
mod service_drop_ins;
mod sizes;
mod stats;
mod stdin;
mod stdio;
mod stuck;
mod surroundings;
mod system_conf;
mod terminals;
mod units;
