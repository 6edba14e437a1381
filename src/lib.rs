//! `containerd-shim-systemd-v1`: a containerd runtime in which every container is a systemd unit.
//!
//! One daemon per node serves containerd's Task API. Every container is a transient service with the
//! OCI runtime run by systemd inside of it; systemd is the parent, the supervisor and the keeper of
//! exit codes, and the daemon only translates.
//!
//! Where things are: what an RPC does in `ops/`, why a call was refused in `task::phase`, what systemd
//! gets is in `unit::properties`, how an exit is noticed in `unit::watch`, what survives a restart in
//! `store` and `recovery`, which code containerd sees in `api::status`.

// A panic would end the daemon of a whole node, and containerd reads all that `start` prints.
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::print_stdout, clippy::print_stderr)]
// All that other modules can see has a doc comment; rustc's own `missing_docs` sees only what the library exports.
#![warn(clippy::missing_docs_in_private_items)]

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
