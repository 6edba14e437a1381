//! Connections: bytes, and nothing of tasks.

pub mod listener;
pub mod sockets;
