//! Standard streams: the client's URIs, FIFOs, terminals, and pumps for streams that have to be copied.

pub mod aside;
pub mod console;
pub mod fifo;
pub mod journal;
pub mod journal_policy;
pub mod log_file;
pub mod pipe;
pub mod pump;
pub mod terminal;
pub mod terminal_pump;
pub mod threads;
pub mod uri;
