//! The record of each task on disk.
//!
//! A record is in `<state>/<namespace>/<id>/record.json` (`<id>+<owner>` for a containerd other than the usual one). It is
//! written before the effect that it announces, and replaced in one step, so a reader finds the old or the new record. The
//! record of a deleted task whose last events containerd has not accepted is moved to `<state>/.owed/`.
//!
//! All paths are on a tmpfs (`/run`). Calls only use memory, and are short enough for the async runtime.

pub mod delete_replies;
pub mod failures;
pub mod files;
mod look;
mod owed;
mod record;
mod scratch;

use std::fs;
use std::io;
use std::path::PathBuf;

use crate::id::{ExecId, Namespace, ProcessKey, TaskKey};
use crate::path_error::{PathError, io_error};
use crate::suspect::{Crashes, LIMIT, Suspect};
use crate::task::Task;

use files::{entries, make_dir, remove_dir, replace};
pub use owed::{OwedFile, OwedTask};
pub use record::{Cause, Found};
use record::{RECORD, RECORD_NEW, VERSION};

/// The directory of records that crashed the daemon.
const CRASHED: &str = ".crashed";

/// The directory of the containers' notify sockets.
const NOTIFY: &str = ".notify";

/// The directory of console sockets.
const CONSOLES: &str = ".consoles";

/// The directory in a task's directory that contains the directories of its execs.
const EXECS: &str = "execs";

/// The environment of a task's OCI runtime, in the form of /proc/PID/environ.
const ENVIRONMENT: &str = "environment";

/// What can go wrong with records.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Reading or writing failed.
    #[error(transparent)]
    Io(#[from] PathError),
    /// The recovery of the record crashed the daemon more than once.
    #[error(
        "record {path} crashed or blocked the daemon {LIMIT} times and was moved to {to}; the daemon no longer manages its container, which may still run"
    )]
    SetAside {
        /// The record.
        path: PathBuf,
        /// Its new path.
        to: PathBuf,
    },
    /// The file is not a record.
    #[error("record {path} can't be parsed: {source}; the file is left unchanged")]
    Malformed {
        /// The file.
        path: PathBuf,
        #[source]
        source: serde_json::Error,
    },
    /// Something can't be written to a file, because JSON has no form for it.
    #[error("{path} can't be written: {source}")]
    NotJson {
        /// The file.
        path: PathBuf,
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
        /// The limit in bytes.
        limit: usize,
    },
}

/// The directory of all records.
#[derive(Clone, Debug)]
pub struct Store {
    root: PathBuf,
}

/// The directory of a namespace, and the keys of its tasks' directories.
type TasksOfNamespace = (PathBuf, Result<Vec<TaskKey>, Error>);

impl Store {
    /// A store below `root`, which is created with the first record.
    pub fn new(root: impl Into<PathBuf>) -> Self {
        Self { root: root.into() }
    }

    /// The directory of a task: its record and the small files that go with it.
    pub fn dir(&self, key: &TaskKey) -> PathBuf {
        self.root.join(key.namespace.as_str()).join(key.word())
    }

    /// The directory of an exec, in the directory of its task.
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

    /// Creates the empty directory of an exec. Removes what an earlier Exec left in the directory: [`Self::check_exec`] comes first.
    ///
    /// # Errors
    /// [`Error::Io`]
    pub fn create_exec_dir(&self, key: &TaskKey, exec: &ExecId) -> Result<PathBuf, Error> {
        self.remove_exec_dir(key, exec)?;
        let dir = self.exec_dir(key, exec);
        make_dir(&dir).map_err(io_error("create", &dir))?;
        Ok(dir)
    }

    /// Empties an exec's directory, except for its record and the file `kept`.
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

    /// The console socket of a process. Its path is short, as a socket address has at most 108 bytes (unix(7)).
    pub fn console(&self, name: &str) -> PathBuf {
        self.root.join(CONSOLES).join(name)
    }

    /// The notify socket of a container. Its path is short, as that of [`Self::console`].
    pub fn notify_socket(&self, name: &str) -> PathBuf {
        self.root.join(NOTIFY).join(name)
    }

    /// Creates a new task's directory, with its first record and the environment of its OCI runtime. Removes what an
    /// earlier Create left in the directory.
    ///
    /// # Errors
    /// The directory has a record that can't be read: its container may run, and the record is left unchanged. Or [`Error::Io`]:
    /// the directory is removed then.
    pub fn create(&self, task: &Task, environment: &[u8]) -> Result<(), Error> {
        self.load(&task.key)?;
        self.remove(&task.key)?;
        let dir = self.dir(&task.key);
        make_dir(&dir).map_err(io_error("create", &dir))?;
        let file = self.environment(&task.key);
        let written = replace(&file, &file.with_extension("new"), environment);
        written.and_then(|()| self.save_whole(task, Cause::Decision)).inspect_err(|_| {
            // The first error is the one to report.
            let _ = self.remove(&task.key);
        })
    }

    /// The file with the environment of a task's OCI runtime.
    pub fn environment(&self, key: &TaskKey) -> PathBuf {
        self.dir(key).join(ENVIRONMENT)
    }

    /// True if the task has a directory.
    ///
    /// # Errors
    /// The caller may not look there.
    pub fn knows(&self, key: &TaskKey) -> Result<bool, Error> {
        let dir = self.dir(key);
        dir.try_exists().map_err(|error| io_error("look for", &dir)(error).into())
    }

    /// The keys of the directories of tasks with the same namespace and id that have another owner.
    ///
    /// # Errors
    /// The directory of the namespace can't be listed.
    pub fn namesakes(&self, key: &TaskKey) -> Result<Vec<TaskKey>, Error> {
        let words = entries(&self.root.join(key.namespace.as_str()))?;
        let keys = words.iter().filter_map(|word| TaskKey::from_word(key.namespace.clone(), word).ok());
        Ok(keys.filter(|found| found.id == key.id && found.owner != key.owner).collect())
    }

    /// Reads every record.
    ///
    /// # Errors
    /// The directory of all records can't be read. Each record has its own result.
    pub fn load_all(&self, crashes: &Crashes) -> Result<Vec<Result<Found, Error>>, Error> {
        let mut tasks = Vec::new();
        for (_, keys) in self.namespaces()? {
            let keys = match keys {
                Ok(keys) => keys,
                Err(error) => {
                    tasks.push(Err(error));
                    continue;
                }
            };
            for key in keys {
                let suspect = Suspect::record(&key);
                if crashes.is_given_up(suspect) {
                    // If an administrator moves the record back, it is tried again.
                    crashes.forget(suspect);
                    tasks.extend(self.set_aside(&key).map(Err));
                } else {
                    tasks.extend(suspect.run(|| self.load(&key)).transpose());
                }
            }
        }
        Ok(tasks)
    }

    /// The directory of each namespace, and the keys of its tasks' directories.
    ///
    /// # Errors
    /// The directory of all records can't be read. Each namespace has its own result.
    fn namespaces(&self) -> Result<Vec<TasksOfNamespace>, Error> {
        let namespaces = entries(&self.root)?.into_iter().filter_map(|name| Namespace::new(&name).ok());
        let keys = |namespace: Namespace| {
            let dir = self.root.join(namespace.as_str());
            let key = |word: String| TaskKey::from_word(namespace.clone(), &word).ok();
            let keys = entries(&dir).map(|words| words.into_iter().filter_map(key).collect());
            (dir, keys)
        };
        Ok(namespaces.map(keys).collect())
    }

    /// Moves the record of a task to a directory that recovery does not read, where an administrator can inspect it.
    /// Returns the error that reports this, or `None` if there is no record.
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

    /// Checks whether a task's record can be used, if there is one.
    ///
    /// # Errors
    /// The record can't be read, or was moved aside: the processes of the task may run.
    pub fn check(&self, key: &TaskKey) -> Result<(), Error> {
        self.load(key)?;
        let to = self.aside(key);
        if to.exists() && self.knows(key)? {
            return Err(Error::SetAside { path: self.dir(key).join(RECORD), to });
        }
        Ok(())
    }

    /// The path to which [`Self::set_aside`] moves the record of a task.
    fn aside(&self, key: &TaskKey) -> PathBuf {
        self.root.join(CRASHED).join(format!("{}:{}.json", key.namespace, key.word()))
    }

    /// Whether the record of a task was moved aside that still has its directory: its processes may run.
    ///
    /// # Errors
    /// A directory can't be listed.
    pub fn has_set_aside(&self) -> Result<bool, Error> {
        if self.set_aside_records()?.is_empty() {
            return Ok(false);
        }
        let all = self.namespaces()?.into_iter().filter_map(|(_, keys)| keys.ok());
        Ok(all.flatten().any(|key| self.aside(&key).exists()))
    }

    /// Removes the directories of tasks without a record, of namespaces without tasks, and the unfinished records of deleted
    /// tasks: an earlier daemon ended while it created or removed them. Part of recovery: no task is created meanwhile.
    ///
    /// # Errors
    /// The directory of all records can't be read. A directory that can't be removed is only logged.
    pub fn remove_leftovers(&self) -> Result<(), Error> {
        let is_missing = |path: PathBuf| {
            fs::symlink_metadata(path).is_err_and(|error| error.kind() == io::ErrorKind::NotFound)
        };
        for (dir, keys) in self.namespaces()? {
            // Whoever loads the records reports a directory that can't be read.
            for key in keys.unwrap_or_default() {
                // If an administrator moves a record back, its task needs the rest of the directory.
                if is_missing(self.dir(&key).join(RECORD))
                    && is_missing(self.aside(&key))
                    && let Err(error) = self.remove(&key)
                {
                    tracing::warn!(task = %key, %error, "can't remove the directory of task {key}, which has no record: {error}");
                }
            }
            // Fails if the namespace has tasks.
            let _ = fs::remove_dir(dir);
        }
        self.remove_unfinished_owed()
    }

    /// Removes a task's directory; it is no error if there is none.
    ///
    /// # Errors
    /// [`Error::Io`]
    pub fn remove(&self, key: &TaskKey) -> Result<(), Error> {
        if remove_dir(&self.dir(key))? {
            // Fails if the namespace has other tasks.
            let _ = fs::remove_dir(self.root.join(key.namespace.as_str()));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
