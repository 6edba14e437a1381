//! In a logger's unit: becomes the program of a `binary://` URI, with three pipes as descriptors 3, 4 and 5.

use std::fs::OpenOptions;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};

use crate::id::ExecId;
use crate::oci::namespaces;
use crate::stdio::fifo;
use crate::sys;

use super::error::{Error, system};
use super::pipes;
use super::process::Process;

/// Returns only if it fails.
pub(super) fn run(process: &Process<'_>) -> Result<(), Error> {
    namespaces::enter_or_stay(&process.task.containerd);
    let not_found = || Error::System { action: "find the logger", source: io::ErrorKind::NotFound.into() };
    let logger = process.wiring.logger.as_ref().ok_or_else(not_found)?;
    let key = &process.task.key;
    let mut command = Command::new(&logger.program);
    command
        .args(&logger.args)
        .env_clear()
        .env("CONTAINER_ID", process.exec.map_or(key.id.as_str(), ExecId::as_str))
        .env("CONTAINER_NAMESPACE", key.namespace.as_str())
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    sys::place_from_three(open_pipes(process)?).map_err(system("place the pipes"))?;
    Err(Error::System { action: "run the logger", source: command.exec() })
}

fn open_pipes(process: &Process<'_>) -> Result<Vec<OwnedFd>, Error> {
    let stdout = fifo::open_blocking_reader(&process.dir.join(pipes::LOG_STDOUT))?;
    let stderr = fifo::open_blocking_reader(&process.dir.join(pipes::LOG_STDERR))?;
    let ready = OpenOptions::new().write(true).open(process.dir.join(pipes::READY));
    let ready = ready.map_err(|source| Error::System { action: "open the logger's ready pipe", source })?;
    Ok(vec![stdout.into(), stderr.into(), ready.into()])
}
