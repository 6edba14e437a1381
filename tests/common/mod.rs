//! What the end-to-end tests, the chaos and the benchmark share: a client of the guest's containerd, a builder for
//! OCI specs, FIFOs, systemd's view, and a count of everything that could leak.
//!
//! Nothing here knows what a test wants to prove. All of it is synchronous, so that clean-up can be done
//! in `Drop` and a test reads from top to bottom.

#![allow(dead_code)] // each of them uses a part of it

pub mod audit;
pub mod bulk;
pub mod cgroup;
pub mod command_line;
pub mod container;
pub mod daemon;
pub mod disturb;
pub mod events;
pub mod exec;
pub mod image;
pub mod leaks;
pub mod node;
pub mod process;
pub mod pty;
pub mod random;
pub mod shim;
pub mod spec;
pub mod stdio;
pub mod systemd;
pub mod task;
pub mod wait;
