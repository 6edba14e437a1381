//! In a container's unit: declares the streams of the container to criu, and becomes the OCI runtime's `restore`.

use std::convert::Infallible;
use std::fs;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};

use crate::oci::criu::{self, CONFIG_VARIABLE, Notes};

use super::contract::{CRIU_CONFIG, CRIU_OVERRIDES, PID_FILE, restore_work};
use super::error::Error;
use super::process::Process;
use super::streams::Streams;

/// Writes the configuration of criu that overrides the options of the OCI runtime. Returns its path.
pub(super) fn write_overrides(process: &Process<'_>) -> Result<PathBuf, Error> {
    let name = process.task.runtime.binary.file_name().unwrap_or_default();
    let usual = if name == "crun" { "/etc/criu/crun.conf" } else { "/etc/criu/runc.conf" };
    let path = process.dir.join(CRIU_OVERRIDES);
    match fs::write(&path, criu::overriding_config(Path::new(usual))) {
        Ok(()) => Ok(path),
        Err(source) => Err(Error::Checkpoint { action: "write", path, source }),
    }
}

/// Returns only if it fails.
pub(super) fn run(process: &Process<'_>, images: &Path) -> Result<Infallible, Error> {
    let failed = |action, path: PathBuf| move |source| Error::Checkpoint { action, path, source };
    criu::images::check(images)?;
    let notes = Notes::read(images).map_err(failed("read the notes of the shim in", images.to_owned()))?;
    let config = process.dir.join(CRIU_CONFIG);
    fs::write(&config, notes.restore_config()).map_err(failed("write", config.clone()))?;
    let (runtime, bundle) = (&process.task.runtime, &process.task.request.bundle);
    let work = restore_work(runtime, &process.dir);
    criu::make_dir(&work).map_err(failed("make", work.clone()))?;
    let arguments = notes.request.restore_arguments(images, &work);
    let streams = Streams::open(process)?;
    let _input = streams.input_writer()?;
    process.with_runtime(|program| {
        let pid_file = process.dir.join(PID_FILE);
        let console = process.console.as_deref();
        let mut command = process.cli().restore(program, bundle, &pid_file, console, &arguments)?;
        streams.equip(&mut command)?;
        command.env(CONFIG_VARIABLE, &config);
        Err(Error::Exec { verb: "restore", binary: program.to_owned(), source: command.exec() })
    })
}
