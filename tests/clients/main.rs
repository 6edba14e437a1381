//! Docker: its daemon through its command line and its API.
//!
//! Runs as root in the testbed. `E2E_RUNTIME` names the runtime under test, as for the end-to-end tests; with
//! `io.containerd.runc.v2` every test is a check of itself. `CLIENTS_DISTURB` says what happens to our daemon while the
//! tests run (`disturbed.rs`).

#[macro_use]
#[path = "../common/mod.rs"]
mod common;

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
