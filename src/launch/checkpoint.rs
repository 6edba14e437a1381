//! Declares the streams of the container to criu, and becomes the OCI runtime's `checkpoint`.

use std::convert::Infallible;
use std::fs;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;

use crate::cgroup;
use crate::config;
use crate::oci::criu::{self, CONFIG_VARIABLE, Checkpoint, Notes};
use crate::store::Store;
use crate::task::wiring::{Input, Output};

use super::contract::{CHECKPOINT, CRIU_CONFIG, CheckpointNote, dump_work};
use super::error::Error;
use super::pipes;
use super::process::Process;

/// Returns only if it fails.
pub(super) fn run(process: &Process<'_>) -> Result<Infallible, Error> {
    let request = request(process)?;
    let notes = Notes { streams: streams(process)?, request: request.clone() };
    let failed = |action, path: PathBuf| move |source| Error::Checkpoint { action, path, source };
    notes.write(&request.image).map_err(failed("write to", request.image.clone()))?;
    let config = process.dir.join(CRIU_CONFIG);
    fs::write(&config, notes.dump_config()).map_err(failed("write", config.clone()))?;
    let work = dump_work(&request, &process.dir);
    criu::make_dir(&work).map_err(failed("make", work.clone()))?;
    let mut command = process.cli().checkpoint(&request.arguments(&work))?;
    command.env(CONFIG_VARIABLE, config);
    let binary = process.task.runtime.binary.clone();
    Err(Error::Exec { verb: "checkpoint", binary, source: command.exec() })
}

fn request(process: &Process<'_>) -> Result<Checkpoint, Error> {
    let store = Store::new(config::STATE_DIR);
    let note: Option<CheckpointNote> = store.read_scratch(&process.task.key, CHECKPOINT)?;
    note.map(|note| note.request).ok_or(Error::NoRequest)
}

/// The streams of the container that are FIFOs: number, and criu's name.
fn streams(process: &Process<'_>) -> Result<Vec<(u8, String)>, Error> {
    let wiring = process.wiring;
    if wiring.terminal {
        return Ok(Vec::new());
    }
    let own = |name: Option<&str>| name.map(|name| process.dir.join(name));
    let output = |output: &Output, own: Option<PathBuf>| match output {
        Output::Fifo(path) => Some(path.clone()),
        Output::Copied(_) | Output::Logger => own,
        Output::Null | Output::Journal => None,
    };
    let input = match &wiring.stdin {
        Input::Fifo(path) => Some(path.clone()),
        // A container that was restored has a FIFO without a writer in the place of /dev/null.
        Input::Null | Input::File(_) => {
            process.task.request.checkpoint.as_ref().and_then(|_| own(Some(pipes::NO_INPUT)))
        }
    };
    let paths = [
        input,
        output(&wiring.stdout, own(wiring.stdout_pipe())),
        output(&wiring.stderr, own(wiring.stderr_pipe())),
    ];
    let pids = processes(process)?;
    let mut streams: Vec<(u8, String)> = Vec::new();
    for (number, path) in (0_u8..).zip(paths) {
        // A client that has ended may have removed its FIFO.
        let Some(found) = path.map(|path| criu::open_file(&path, &pids)) else { continue };
        if let Ok(Some(name)) = found
            && streams.iter().all(|(_, known)| *known != name)
        {
            streams.push((number, name));
        }
    }
    Ok(streams)
}

/// The processes of the container, init first.
fn processes(process: &Process<'_>) -> Result<Vec<u32>, Error> {
    let mut pids: Vec<u32> = process.task.init.phase.container().map(|init| init.pid).into_iter().collect();
    if let Some(cgroup) = process.task.cgroup() {
        pids.extend(cgroup::processes(cgroup)?);
    }
    Ok(pids)
}
