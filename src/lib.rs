//! `containerd-shim-systemd-v1`: a containerd runtime in which every container is a systemd unit.
//!
//! One daemon per node serves containerd's Task API. Every container is a transient service, in which systemd runs the OCI
//! runtime. systemd is the parent and the supervisor of the container, and keeps its exit code. The daemon only translates
//! between containerd and systemd.
//!
//! `ops/` has a file for each RPC, `task::phase` decides which calls a phase allows, `unit::properties` has the properties of
//! units, `unit::watch` receives systemd's signals, `store` and `recovery` let tasks survive a restart, and `api::status`
//! chooses the error codes that containerd sees.

// A panic would end the daemon of a whole node, and containerd reads all that `start` prints.
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::print_stdout, clippy::print_stderr)]

mod api;
mod cgroup;
pub mod cli;
mod config;
mod doctor;
mod effects;
mod fault;
mod files;
#[cfg(any(test, fuzzing))]
#[allow(clippy::panic, clippy::print_stderr)] // a broken rule, and the input that a test is at
pub mod fuzzing;
mod guard;
mod id;
mod launch;
#[cfg(test)]
mod layers;
#[cfg(test)]
mod makefile;
mod manual;
mod oci;
mod ops;
mod path_error;
mod probe;
mod recovery;
mod services;
mod session;
#[cfg(test)]
mod simulation;
mod stdio;
mod store;
mod supervise;
mod suspect;
#[allow(unsafe_code)]
mod sys;
mod task;
mod telemetry;
mod text;
mod transport;
mod unit;
mod view;
