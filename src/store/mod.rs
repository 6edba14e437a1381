//! The record of each task on disk.
//!
//! `<state>/<namespace>/<id>/record.json` (`<id>+<owner>` for another containerd than the usual one), written before the effect that it announces and replaced
//! by rename, so that a reader finds the old or the new one and nothing between. A deleted task
//! whose last events are still owed to containerd has its record moved to `<state>/.owed/`.
//!
//! All paths are on a tmpfs (`/run`): these calls touch memory only and are short enough to be made
//! on the async runtime.

pub mod answers;
mod aside;
pub mod files;
mod owed;
mod record;

use std::fs;
use std::io;
use std::path::PathBuf;

use crate::id::{ExecId, Namespace, ProcessKey, TaskKey};
use crate::path_error::{PathError, io_error};
use crate::suspect::{Crashes, LIMIT, Suspect};
use crate::task::Task;

use files::{entries, make_dir, remove_dir, replace};
pub use owed::Owing;
pub use record::{Cause, Found};
use record::{RECORD, RECORD_NEW, VERSION};

/// Holds the records that have crashed the daemon.
const CRASHED: &str = ".crashed";

/// Holds the notify sockets of containers.
const NOTIFY: &str = ".notify";

/// Holds console sockets.
const CONSOLES: &str = ".consoles";

/// The directories of a task's execs, in that of the task.
const EXECS: &str = "execs";

/// The environment of a task's OCI runtime, in the form of /proc/PID/environ.
const ENVIRONMENT: &str = "environment";

/// What can go wrong with records.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Reading or writing failed.
    #[error(transparent)]
    Io(#[from] PathError),
    /// Recovering the record has crashed the daemon more than once.
    #[error(
        "record {path} crashed the daemon {LIMIT} times and was moved to {to}; the daemon no longer manages its container, which may still run"
    )]
    SetAside {
        /// The record.
        path: PathBuf,
        /// Where it is now.
        to: PathBuf,
    },
    /// The file is no record.
    #[error("record {path} can't be parsed: {source}; the file is left unchanged")]
    Malformed {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        #[source]
        source: serde_json::Error,
    },
    /// The file belongs to a newer version of this program.
    #[error(
        "record {path} has version {found}, this program reads up to {VERSION}; the file is left unchanged"
    )]
    Newer {
        /// The file.
        path: PathBuf,
        /// Its version.
        found: u32,
    },
    /// The file is too large to be a record.
    #[error("record {path} is larger than {limit} bytes; the file is left unchanged")]
    TooLarge {
        /// The file.
        path: PathBuf,
        /// In bytes.
        limit: usize,
    },
}

/// The directory of all records.
#[derive(Clone, Debug)]
pub struct Store {
    root: PathBuf,
}

impl Store {
    /// A store below `root`, which is made when the first record is.
    pub fn new(root: impl Into<PathBuf>) -> Self {
        Self { root: root.into() }
    }

    /// The directory of a task: its record and the small files that go with it.
    pub fn dir(&self, key: &TaskKey) -> PathBuf {
        self.root.join(key.namespace.as_str()).join(key.word())
    }

    /// The directory of an exec, in that of its task.
    pub fn exec_dir(&self, key: &TaskKey, exec: &ExecId) -> PathBuf {
        self.dir(key).join(EXECS).join(exec.as_str())
    }

    /// The directory of a process.
    pub fn process_dir(&self, key: &ProcessKey) -> PathBuf {
        match &key.exec {
            None => self.dir(&key.task),
            Some(exec) => self.exec_dir(&key.task, exec),
        }
    }

    /// Makes an exec's directory, empty.
    ///
    /// # Errors
    /// [`Error::Io`]
    pub fn create_exec_dir(&self, key: &TaskKey, exec: &ExecId) -> Result<PathBuf, Error> {
        self.remove_exec_dir(key, exec)?;
        let dir = self.exec_dir(key, exec);
        make_dir(&dir).map_err(io_error("create", &dir))?;
        Ok(dir)
    }

    /// Empties an exec's directory but for its record and one more file.
    ///
    /// # Errors
    /// [`Error::Io`]
    pub fn clear_exec_dir(&self, key: &TaskKey, exec: &ExecId, kept: Option<&str>) -> Result<(), Error> {
        let dir = self.exec_dir(key, exec);
        let is_kept = |name: &str| name == RECORD || name == RECORD_NEW || Some(name) == kept;
        for name in entries(&dir)?.into_iter().filter(|name| !is_kept(name)) {
            let path = dir.join(name);
            match fs::remove_file(&path) {
                Err(e) if e.kind() == io::ErrorKind::NotFound => {}
                removed => removed.map_err(io_error("remove", &path))?,
            }
        }
        Ok(())
    }

    /// Removes an exec's directory; it is no error if there is none.
    ///
    /// # Errors
    /// [`Error::Io`]
    pub fn remove_exec_dir(&self, key: &TaskKey, exec: &ExecId) -> Result<(), Error> {
        remove_dir(&self.exec_dir(key, exec)).map(drop)
    }

    /// Where a process gets its terminal: a name that fits into a socket's address, which the path of
    /// the record does not (108 bytes, unix(7)).
    pub fn console(&self, name: &str) -> PathBuf {
        self.root.join(CONSOLES).join(name)
    }

    /// Where a container notifies: a short name, as for [`Self::console`].
    pub fn notify_socket(&self, name: &str) -> PathBuf {
        self.root.join(NOTIFY).join(name)
    }

    /// Makes a new task's directory and writes its first record, and the environment of its OCI runtime.
    ///
    /// What a crashed Create left in the directory is removed first.
    ///
    /// # Errors
    /// [`Error::Io`]; the directory is gone again then.
    pub fn create(&self, task: &Task, environment: &[u8]) -> Result<(), Error> {
        self.remove(&task.key)?;
        let dir = self.dir(&task.key);
        make_dir(&dir).map_err(io_error("create", &dir))?;
        let file = self.environment(&task.key);
        let written = replace(&file, &file.with_extension("new"), environment);
        written.and_then(|()| self.save_whole(task)).inspect_err(|_| {
            // The first error is the one to report.
            let _ = self.remove(&task.key);
        })
    }

    /// The file with the environment of a task's OCI runtime.
    pub fn environment(&self, key: &TaskKey) -> PathBuf {
        self.dir(key).join(ENVIRONMENT)
    }

    /// True if there is anything on disk about the task.
    pub fn knows(&self, key: &TaskKey) -> bool {
        self.dir(key).exists()
    }

    /// Every record. One that can't be read does not hide the others.
    ///
    /// # Errors
    /// Only for the directory of all records; each record has a result of its own.
    pub fn load_all(&self, crashes: &Crashes) -> Result<Vec<Result<Found, Error>>, Error> {
        let mut tasks = Vec::new();
        for namespace in entries(&self.root)? {
            let Ok(namespace) = Namespace::new(&namespace) else {
                continue;
            };
            for word in entries(&self.root.join(namespace.as_str()))? {
                let Ok(key) = TaskKey::from_word(namespace.clone(), &word) else {
                    continue;
                };
                let suspect = Suspect::record(&key);
                if crashes.is_given_up(suspect) {
                    // Whoever moves it back wants it to be tried again.
                    crashes.forget(suspect);
                    tasks.extend(self.set_aside(&key).map(Err));
                } else {
                    tasks.extend(suspect.run(|| self.load(&key)).transpose());
                }
            }
        }
        Ok(tasks)
    }

    /// Moves the record of a task out of the way of recovery, for a person to look at. Returns the error that
    /// names it; nothing if there is no record.
    fn set_aside(&self, key: &TaskKey) -> Option<Error> {
        let dir = self.root.join(CRASHED);
        let path = self.dir(key).join(RECORD);
        let to = self.aside(key);
        match make_dir(&dir).and_then(|()| fs::rename(&path, &to)) {
            Ok(()) => Some(Error::SetAside { path, to }),
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            Err(error) => Some(io_error("move", &path)(error).into()),
        }
    }

    /// Where the record of a task is that was set aside.
    fn aside(&self, key: &TaskKey) -> PathBuf {
        self.root.join(CRASHED).join(format!("{}:{}.json", key.namespace, key.word()))
    }

    /// Removes the directories of tasks without a record, and those of namespaces without tasks: an earlier daemon ended
    /// while it removed or made them. The caller recovers: no task is created meanwhile.
    ///
    /// # Errors
    /// Only for the directory of all records; a directory that can't be removed is logged.
    pub fn remove_remains(&self) -> Result<(), Error> {
        let is_missing = |path: PathBuf| {
            fs::symlink_metadata(path).is_err_and(|error| error.kind() == io::ErrorKind::NotFound)
        };
        for namespace in entries(&self.root)? {
            let Ok(namespace) = Namespace::new(&namespace) else {
                continue;
            };
            let dir = self.root.join(namespace.as_str());
            for word in entries(&dir)? {
                let Ok(key) = TaskKey::from_word(namespace.clone(), &word) else {
                    continue;
                };
                // Whoever moves a record back that was set aside needs the rest of the directory.
                if is_missing(self.dir(&key).join(RECORD))
                    && is_missing(self.aside(&key))
                    && let Err(error) = self.remove(&key)
                {
                    tracing::warn!(task = %key, %error, "what is left of task {key} can't be removed: {error}");
                }
            }
            // It is not empty if it has tasks.
            let _ = fs::remove_dir(dir);
        }
        Ok(())
    }

    /// Removes a task's directory; it is no error if there is none.
    ///
    /// # Errors
    /// [`Error::Io`]
    pub fn remove(&self, key: &TaskKey) -> Result<(), Error> {
        if remove_dir(&self.dir(key))? {
            // The namespace's directory goes with its last task; it is not empty if others are left.
            let _ = fs::remove_dir(self.root.join(key.namespace.as_str()));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
