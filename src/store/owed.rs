//! The records of deleted tasks whose last events containerd has not accepted yet.

use std::fs;
use std::io;
use std::path::PathBuf;

use crate::effects;
use crate::path_error::io_error;
use crate::task::Task;

use super::files::{entries, make_dir};
use super::record::{read_task, write_owed};
use super::{Error, Store};

/// Holds what `deleted` tasks still owe; no namespace begins with a dot.
const OWED: &str = ".owed";

impl Store {
    /// Keeps the record of a deleted task until its last events are accepted.
    ///
    /// # Errors
    /// [`Error::Io`]
    pub fn keep_owed(&self, task: &Task) -> Result<Owing, Error> {
        let dir = self.root.join(OWED);
        make_dir(&dir).map_err(io_error("create", &dir))?;
        // The id can be used again before the events are accepted: the time keeps the files apart.
        let seq = task.outbox.first().map_or(0, |owed| owed.at_usec);
        let name = format!("{}:{}:{seq}", task.key.namespace, task.key.word());
        write_owed(&dir, &name, task)?;
        Ok(Owing { dir, name })
    }

    /// The deleted tasks that still owe events.
    ///
    /// # Errors
    /// Only for the directory as a whole.
    pub fn load_owed(&self) -> Result<Vec<OwedTask>, Error> {
        let dir = self.root.join(OWED);
        let mut tasks = Vec::new();
        for name in entries(&dir)?.into_iter().filter(|name| !name.ends_with(".new")) {
            if let Some(found) = read_task(&dir.join(&name)).transpose() {
                tasks.push((Owing { dir: dir.clone(), name }, found.map(|found| found.task)));
            }
        }
        Ok(tasks)
    }
}

/// A deleted task that still owes events, or why its file can't be read.
pub type OwedTask = (Owing, Result<Task, Error>);

/// Where a deleted task's last events are kept.
#[derive(Clone, Debug)]
pub struct Owing {
    dir: PathBuf,
    name: String,
}

impl Owing {
    /// Writes what is still owed; the file goes when nothing is.
    ///
    /// # Errors
    /// [`Error::Io`]
    pub fn update(&self, task: &Task) -> Result<(), Error> {
        if task.outbox.is_empty() {
            return self.discard();
        }
        write_owed(&self.dir, &self.name, task)
    }

    /// Removes the file.
    ///
    /// # Errors
    /// [`Error::Io`]
    pub fn discard(&self) -> Result<(), Error> {
        let path = self.dir.join(&self.name);
        match effects::disk(&path).and_then(|()| fs::remove_file(&path)) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
            removed => Ok(removed.map_err(io_error("remove", &path))?),
        }
    }
}
