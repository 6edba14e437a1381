//! Standard streams: what a client's strings mean, FIFOs, terminals, and copying where it can't be
//! avoided.

pub mod aside;
pub mod console;
pub mod fifo;
pub mod journal;
pub mod log_file;
pub mod pipe;
pub mod pump;
pub mod rate;
pub mod terminal;
pub mod uri;
