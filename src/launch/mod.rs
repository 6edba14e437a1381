//! `launch`: the subcommand that a unit runs to start its process, and the daemon's side of it.
//!
//! | Side | Modules |
//! |---|---|
//! | both | [`contract`] (arguments, environment, file names, outcome), [`pipes`], [`report`], [`cgroup`] |
//! | the daemon | [`command`] |
//! | the unit | `process`, `container`, `restore`, [`sandbox`], `exec`, `logger`, `streams`, `inherited`, `core_scheduling`, `handoff` |
//! | a command of the daemon | `commands`, `probe`, `checkpoint` |
//!
//! In the unit, `launch` has one thread and no async runtime. It reads the record that the daemon has written, makes the
//! preparations for the OCI runtime or a logger, and becomes that program.

pub mod cgroup;
mod checkpoint;
pub mod command;
mod commands;
mod container;
pub mod contract;
pub mod core_scheduling;
mod error;
mod exec;
#[cfg(test)]
pub mod fake;
mod handoff;
pub mod inherited;
mod logger;
pub mod pipes;
mod probe;
mod process;
pub mod report;
mod restore;
pub mod sandbox;
mod streams;

use crate::config;
use crate::id::ProcessKey;
use crate::store::Store;

use contract::{Kind, UnitKind};
pub use error::Error;
use process::Process;

/// Runs the command `launch`: starts a process in its unit. For a container or a logger it returns only if it fails, or with
/// [`Error::NothingToLog`].
///
/// # Errors
/// The process was not started. The daemon finds the reason in the process's directory, too.
pub fn run(kind: Kind, key: &ProcessKey) -> Result<(), Error> {
    let store = Store::new(config::STATE_DIR);
    let Some(task) = store.load_with(&key.task, key.exec.as_ref())? else {
        return Err(match kind {
            // The task was deleted while systemd was about to start its logger again.
            Kind::Unit(UnitKind::Logger) => Error::NothingToLog,
            Kind::Unit(UnitKind::Container | UnitKind::Exec) | Kind::Command(_) => {
                Error::NoRecord { key: key.clone() }
            }
        });
    };
    let process = Process::of(&store, &task, key.exec.as_ref());
    let process = process.ok_or_else(|| Error::NoExec { key: key.clone() })?;
    match kind {
        Kind::Unit(UnitKind::Container) => container::run(&process),
        Kind::Unit(UnitKind::Exec) => exec::run(&process),
        Kind::Unit(UnitKind::Logger) => logger::run(&process),
        Kind::Command(command) => commands::run(command, &process),
    }
}
