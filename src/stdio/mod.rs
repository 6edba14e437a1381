//! Standard streams: what a client's strings mean, FIFOs, and copying where it can't be avoided.

pub mod fifo;
pub mod pump;
pub mod uri;
