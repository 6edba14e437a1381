//! Tests of the whole daemon on a simulated node: a fake systemd, a fake OCI runtime, a fake containerd that gets the events, a
//! store in a temporary directory and a paused clock. They are above all other modules, as `cli` is.

mod calls;
mod containerd;
mod crashes;
mod execs;
mod given_up;
pub(crate) mod harness;
mod loggers;
mod others;
mod outages;
mod panics;
mod replays;
mod runtime;
mod sandboxes;
mod scenarios;
mod slices;
mod supervision;
mod terminals;
