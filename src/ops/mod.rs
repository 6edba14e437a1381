//! The calls of the Task API: one RPC, one file.

mod additions;
mod checkpoint;
mod clean_up;
mod close_io;
mod connect;
mod create;
mod delete;
mod exec;
mod failed;
mod kill;
mod new_task;
mod others;
mod pause;
mod pids;
mod request_unit;
mod resize_pty;
mod restore;
mod resume;
mod sandbox;
mod shim;
mod start;
mod start_exec;
mod state;
mod stats;
mod update;
mod wait;

pub use create::CreateTask;
pub use exec::AddExec;
pub use sandbox::{CreateSandbox, SandboxState};
pub use shim::{Parts, Shim};
pub use state::{State, Status};
