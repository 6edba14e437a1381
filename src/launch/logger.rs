//! In a logger's unit: becomes the program of a `binary://` URI, with three pipes as descriptors 3, 4 and 5.
//!
//! When the logger ends, systemd runs `launch` again, as long as there is output to read.

use std::ffi::OsStr;
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::process::{Command, Stdio};

use nix::errno::Errno;
use nix::fcntl::{SpliceFFlags, tee};
use nix::poll::PollFlags;

use crate::id::ExecId;
use crate::oci::namespaces;
use crate::stdio::fifo;
use crate::stdio::pipe::found;
use crate::sys;

use super::contract::LOGGER_ERROR;
use super::error::{Error, system};
use super::pipes;
use super::process::Process;

/// Returns only if it fails.
pub(super) fn run(process: &Process<'_>) -> Result<(), Error> {
    namespaces::enter_or_stay(&process.task.containerd);
    let not_found = || Error::System { action: "find the logger", source: io::ErrorKind::NotFound.into() };
    let logger = process.wiring.logger.as_ref().ok_or_else(not_found)?;
    let key = &process.task.key;
    let arguments = std::iter::once(logger.program.as_os_str()).chain(logger.args.iter().map(OsStr::new));
    let environment = [
        format!("CONTAINER_ID={}", process.exec.map_or(key.id.as_str(), ExecId::as_str)),
        format!("CONTAINER_NAMESPACE={}", key.namespace),
    ];
    let mut command = Command::new(&logger.program);
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    // As under runc.v2. A logger works without its bundle, too.
    if process.task.request.bundle.is_dir() {
        command.current_dir(&process.task.request.bundle);
    }
    sys::place_from_three(open_pipes(process)?).map_err(system("place the pipes"))?;
    let source = sys::exec::exec(&mut command, arguments, environment.iter().map(OsStr::new));
    // The end of this process closes the pipe of the logger, which a logger may also do when it is ready.
    let _ = std::fs::write(process.dir.join(LOGGER_ERROR), source.to_string());
    Err(Error::System { action: "run the logger", source })
}

fn open_pipes(process: &Process<'_>) -> Result<Vec<OwnedFd>, Error> {
    let stdout = fifo::open_blocking_reader(&process.dir.join(pipes::LOG_STDOUT))?;
    let stderr = fifo::open_blocking_reader(&process.dir.join(pipes::LOG_STDERR))?;
    if has_ended(&stdout)? && has_ended(&stderr)? {
        return Err(Error::NothingToLog);
    }
    // Opened for both: when the logger is started again, the daemon does not have the other end open.
    let ready = fifo::open_both(&process.dir.join(pipes::READY))?;
    Ok(vec![stdout.into(), stderr.into(), ready.into()])
}

/// True if a pipe is empty and has no writer. Does not read from the pipe.
fn has_ended(pipe: &File) -> Result<bool, Error> {
    let (_reader, writer) = nix::unistd::pipe().map_err(system("make a pipe"))?;
    match tee(pipe, &writer, 1, SpliceFFlags::SPLICE_F_NONBLOCK) {
        // The pipe may have buffers without bytes, which the logger skips.
        Ok(0) => found(pipe, PollFlags::POLLIN)
            .map(|has_buffers| !has_buffers)
            .map_err(|source| Error::System { action: "inspect a pipe", source }),
        Ok(_) => Ok(false),
        Err(Errno::EAGAIN) => Ok(false),
        Err(errno) => Err(system("inspect a pipe")(errno)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};

    #[test]
    fn a_pipe_has_ended_when_it_is_empty_and_nobody_writes() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("pipe");
        fifo::make(&path).unwrap();
        let mut reader = fifo::open_blocking_reader(&path).unwrap();
        assert!(has_ended(&reader).unwrap());
        let mut writer = fifo::open_both(&path).unwrap();
        assert!(!has_ended(&reader).unwrap());
        writer.write_all(b"text").unwrap();
        drop(writer);
        assert!(!has_ended(&reader).unwrap());
        let mut text = String::new();
        reader.read_to_string(&mut text).unwrap();
        assert_eq!(text, "text");
        assert!(has_ended(&reader).unwrap());
    }
}
