//! Finds out whether criu can be used, before anything is changed.

use std::fs::File;
use std::io::{Read, Seek};
use std::process::{Command, Stdio};
use std::time::Duration;

use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::prctl::set_child_subreaper;

use crate::oci::criu::{Problem, check_version};
use crate::oci::options;
use crate::sys::bounded::{self, CommandEnd};

use super::contract::CRIU_PROBLEM;
use super::error::{Error, system};
use super::process::Process;

/// How long one of the two commands may take. `criu check` tries out many features of the kernel.
const LIMIT: Duration = Duration::from_secs(30);

/// How much of the output is read, in bytes.
const MAX_OUTPUT: u64 = 64 << 10;

/// Writes the problem to a file for the daemon, if there is one.
pub(super) fn run(process: &Process<'_>) -> Result<(), Error> {
    let path = process.dir.join(CRIU_PROBLEM);
    let found = check(&process.task.runtime.path);
    if let Err(Error::Criu(problem)) = &found {
        let text = serde_json::to_vec(problem).unwrap_or_default();
        std::fs::write(&path, text).map_err(|source| Error::Checkpoint { action: "write", path, source })?;
    }
    found
}

fn check(path: &str) -> Result<(), Error> {
    set_child_subreaper(true).map_err(system("become a subreaper"))?;
    let missing = || Problem::Missing { path: path.to_owned() };
    let criu = options::find("criu", path).ok_or_else(missing)?;
    let (version, _) = output(Command::new(&criu).arg("--version"), path)?;
    check_version(&version)?;
    let (said, is_good) = output(Command::new(&criu).arg("check"), path)?;
    if is_good {
        return Ok(());
    }
    let reason: Vec<_> = said.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
    Err(Problem::Unusable { reason: reason.join("; ").chars().take(400).collect() }.into())
}

/// What a command prints, and whether it succeeds.
fn output(command: &mut Command, path: &str) -> Result<(String, bool), Error> {
    let memory = memfd_create(c"criu", MFdFlags::MFD_CLOEXEC).map_err(system("make a file in memory"))?;
    let mut memory = File::from(memory);
    let duplicate =
        || memory.try_clone().map_err(|source| Error::System { action: "duplicate a file", source });
    command.env("PATH", path).stdin(Stdio::null()).stdout(duplicate()?).stderr(duplicate()?);
    let unusable = |reason: String| Problem::Unusable { reason };
    let ended = bounded::run(command, LIMIT).map_err(|error| unusable(format!("can't run it: {error}")))?;
    let is_good = match ended {
        CommandEnd::Exited(status) => status.success(),
        CommandEnd::TimedOut => {
            return Err(unusable(format!("it did not end within {} s", LIMIT.as_secs())).into());
        }
        CommandEnd::Terminated => return Err(Error::Terminated),
    };
    let mut text = Vec::new();
    let read = memory.rewind().and_then(|()| memory.take(MAX_OUTPUT).read_to_end(&mut text));
    read.map_err(|source| Error::System { action: "read what criu prints", source })?;
    Ok((String::from_utf8_lossy(&text).into_owned(), is_good))
}
