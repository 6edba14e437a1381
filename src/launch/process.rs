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
        copy_or_binary(sealed_runtime().as_ref(), &self.task.runtime.binary, run)
    }
}

/// Runs the copy, and the binary only if the copy can't be executed: any other error would happen again, after the
/// same wait.
fn copy_or_binary<T>(
    copy: Option<&File>,
    binary: &Path,
    run: impl Fn(&Path) -> Result<T, Error>,
) -> Result<T, Error> {
    match copy.map(|copy| run(&sealed::path_of(copy))) {
        None | Some(Err(Error::Exec { .. })) => run(binary),
        Some(ran) => ran,
    }
}

/// The daemon's copy of the OCI runtime, if it has one.
fn sealed_runtime() -> Option<File> {
    std::env::var(SEALED_RUNTIME).ok()?.parse::<SealedRef>().ok()?.open()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::Cell;

    fn cant_execute(program: &Path) -> Error {
        let source = io::ErrorKind::NotFound.into();
        Error::Exec { verb: "create", binary: program.to_owned(), source }
    }

    fn nobody_reads(_: &Path) -> Error {
        Error::System { action: "open stdout", source: io::ErrorKind::TimedOut.into() }
    }

    #[test]
    fn only_a_copy_that_can_not_be_executed_is_replaced_by_the_binary() {
        let (copy, binary) = (File::open("/dev/null").unwrap(), Path::new("/usr/sbin/runc"));
        let run = |copy, failure: Option<fn(&Path) -> Error>| {
            let runs = Cell::new(0);
            let ran = copy_or_binary(copy, binary, |program| {
                runs.set(runs.get() + 1);
                match failure.filter(|_| program != binary) {
                    Some(failure) => Err(failure(program)),
                    None => Ok(program == binary),
                }
            });
            (ran.ok(), runs.get())
        };
        assert_eq!(run(None, None), (Some(true), 1));
        assert_eq!(run(Some(&copy), None), (Some(false), 1));
        assert_eq!(run(Some(&copy), Some(cant_execute)), (Some(true), 2));
        assert_eq!(run(Some(&copy), Some(nobody_reads)), (None, 1), "the client is waited for once");
    }
}
