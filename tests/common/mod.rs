//! Code that the end-to-end tests, the tests of clients, the chaos and the benchmark share: a client of the guest's
//! containerd, a builder for OCI specs, FIFOs, queries to systemd, and a count of everything that could leak.
//!
//! All of it is synchronous, so that `Drop` can clean up and a test reads from top to bottom.

#![allow(dead_code, unused_macros)] // each of them uses a part

pub mod apparmor;
pub mod audit;
pub mod bpf;
pub mod bulk;
pub mod bystander;
pub mod cgroup;
pub mod checkpoint;
pub mod command_line;
pub mod container;
pub mod counts;
pub mod daemon;
pub mod disturb;
pub mod events;
pub mod exec;
pub mod image;
pub mod leaks;
pub mod lease;
#[macro_use]
pub mod needs;
pub mod node;
pub mod options;
pub mod plots;
pub mod pod;
pub mod process;
pub mod pty;
pub mod random;
pub mod sandbox;
pub mod shim;
pub mod spec;
pub mod stdio;
pub mod systemd;
pub mod task;
pub mod wait;
