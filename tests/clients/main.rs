//! Real clients: Docker's daemon through its command line and its API, and containerd's CRI plugin as a kubelet uses it.
//!
//! Runs as root in the testbed. `E2E_RUNTIME` names the runtime under test, as for the end-to-end tests; with
//! `io.containerd.runc.v2` every test is a check of itself. `CLIENTS_DISTURB` names a disturbance of our daemon
//! during the tests (`disturbed.rs`).

#[macro_use]
#[path = "../common/mod.rs"]
mod common;

mod channels;
mod cri;
mod cri_checkpoint;
mod cri_cost;
mod cri_exec;
mod cri_hostile;
mod cri_killed;
mod cri_limits;
mod cri_messages;
mod cri_pods;
mod cri_sandbox;
mod disturbed;
mod docker;
mod docker_api;
mod docker_attach;
mod docker_daemon;
mod docker_exec;
mod docker_killed;
mod docker_lifecycle;
mod docker_limits;
mod docker_run;
mod http;
