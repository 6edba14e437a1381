//! The records of deleted tasks whose last events containerd has not accepted yet.

use std::fs;
use std::io;
use std::path::PathBuf;

use crate::effects;
use crate::path_error::io_error;
use crate::task::Task;

use super::files::{entries, make_dir};
use super::record::{OWED_NEW, read_task, write_owed};
use super::{Error, Store};

/// The directory of the records of deleted tasks. No namespace begins with a dot.
const OWED: &str = ".owed";

impl Store {
    /// Keeps the record of a deleted task until its last events are accepted.
    ///
    /// # Errors
    /// [`Error::Io`]
    pub fn retain_owed(&self, task: &Task) -> Result<OwedFile, Error> {
        let dir = self.root.join(OWED);
        make_dir(&dir).map_err(io_error("create", &dir))?;
        // The id may be reused before the events are accepted. The time makes the name unique.
        let seq = task.outbox.first().map_or(0, |owed| owed.at_usec);
        let name = format!("{}:{}:{seq}", task.key.namespace, task.key.word());
        write_owed(&dir, &name, task)?;
        Ok(OwedFile { dir, name })
    }

    /// Reads the deleted tasks whose events are not accepted yet.
    ///
    /// # Errors
    /// The directory can't be read. Each record has its own result.
    pub fn load_owed(&self) -> Result<Vec<OwedTask>, Error> {
        let dir = self.root.join(OWED);
        let mut tasks = Vec::new();
        for name in entries(&dir)?.into_iter().filter(|name| !name.ends_with(OWED_NEW)) {
            if let Some(found) = read_task(&dir.join(&name)).transpose() {
                tasks.push((OwedFile { dir: dir.clone(), name }, found.map(|found| found.task)));
            }
        }
        Ok(tasks)
    }

    /// Removes the files that an earlier daemon was writing when it ended.
    pub(super) fn remove_unfinished_owed(&self) -> Result<(), Error> {
        let dir = self.root.join(OWED);
        for name in entries(&dir)?.into_iter().filter(|name| name.ends_with(OWED_NEW)) {
            let path = dir.join(name);
            fs::remove_file(&path).map_err(io_error("remove", &path))?;
        }
        Ok(())
    }
}

/// A deleted task whose events are not accepted yet, or why its file can't be read.
pub type OwedTask = (OwedFile, Result<Task, Error>);

/// The file with a deleted task's last events.
#[derive(Clone, Debug)]
pub struct OwedFile {
    dir: PathBuf,
    name: String,
}

impl OwedFile {
    /// Writes the events that are not accepted yet. Removes the file if there are none.
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
