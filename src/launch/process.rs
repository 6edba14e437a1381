//! The process of this unit, according to the record.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use crate::fault::{self, Failure};
use crate::id::{ExecId, ProcessKey};
use crate::oci::runtime::Cli;
use crate::oci::sealed::{self, SealedRef};
use crate::store::Store;
use crate::task::Task;
use crate::task::wiring::Wiring;
use crate::unit::name;

use super::contract::{LAUNCHED, SEALED_RUNTIME};
use super::error::Error;

/// The process to launch.
pub(super) struct Process<'a> {
    pub(super) task: &'a Task,
    pub(super) exec: Option<&'a ExecId>,
    /// Its directory.
    pub(super) dir: PathBuf,
    pub(super) wiring: &'a Wiring,
    /// Its console socket, if it gets a terminal.
    pub(super) console: Option<PathBuf>,
}

impl<'a> Process<'a> {
    pub(super) fn of(store: &Store, task: &'a Task, exec: Option<&'a ExecId>) -> Option<Self> {
        let process = task.process(exec)?;
        let (wiring, unit) = (&process.wiring, &process.unit);
        let dir = store.process_dir(&ProcessKey { task: task.key.clone(), exec: exec.cloned() });
        let console = wiring.terminal.then(|| store.console(&name::short_name(unit)));
        Some(Self { task, exec, dir, wiring, console })
    }

    pub(super) fn cli(&self) -> Cli<'_> {
        Cli::of(self.task, &self.dir)
    }

    /// Records that the process is launched.
    ///
    /// # Errors
    /// [`Error::Again`] if it was launched before.
    pub(super) fn mark(&self) -> Result<(), Error> {
        let opened =
            OpenOptions::new().write(true).create_new(true).mode(0o600).open(self.dir.join(LAUNCHED));
        match opened {
            Ok(_) => Ok(()),
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => Err(Error::Again),
            Err(source) => Err(Error::System { action: "mark the record as launched", source }),
        }
    }

    /// Runs the daemon's copy of the OCI runtime, or, if there is none or the kernel refuses to execute it, the binary
    /// itself.
    pub(super) fn with_runtime<T>(&self, run: impl Fn(&Path) -> Result<T, Error>) -> Result<T, Error> {
        if fault::due(&[Failure::RuntimeKilled]).is_some() {
            // The signal ends this process.
            let _ = nix::sys::signal::raise(nix::sys::signal::Signal::SIGKILL);
        }
        if let Some(copy) = sealed_runtime() {
            match run(&sealed::path_of(&copy)) {
                Err(Error::Exec { .. }) => {}
                ran => return ran,
            }
        }
        run(&self.task.runtime.binary)
    }
}

/// The daemon's copy of the OCI runtime, if it has one.
fn sealed_runtime() -> Option<File> {
    std::env::var(SEALED_RUNTIME).ok()?.parse::<SealedRef>().ok()?.open()
}
