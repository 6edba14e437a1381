//! Files in a task's directory that a call needs while it runs.

use std::fs;
use std::io;
use std::path::PathBuf;

use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::id::TaskKey;
use crate::path_error::io_error;

use super::files::{self, replace};
use super::{Error, Store};

impl Store {
    /// Writes a file in the task's directory, in one step.
    ///
    /// # Errors
    /// [`Error::Io`]
    pub fn write_scratch(&self, key: &TaskKey, name: &str, content: &[u8]) -> Result<PathBuf, Error> {
        let path = self.dir(key).join(name);
        replace(&path, &path.with_extension("new"), content)?;
        Ok(path)
    }

    /// As [`Self::write_scratch`], for a note in JSON, which [`Self::read_scratch`] reads.
    ///
    /// # Errors
    /// [`Error::Io`], [`Error::NotJson`]
    pub fn write_note(&self, key: &TaskKey, name: &str, note: &impl Serialize) -> Result<(), Error> {
        let not_json = |source| Error::NotJson { path: self.dir(key).join(name), source };
        let text = serde_json::to_vec(note).map_err(not_json)?;
        self.write_scratch(key, name, &text).map(drop)
    }

    /// Reads a JSON file in the task's directory. `None` if it does not exist.
    ///
    /// # Errors
    /// The file can't be read or parsed.
    pub fn read_scratch<T: DeserializeOwned>(&self, key: &TaskKey, name: &str) -> Result<Option<T>, Error> {
        let path = self.dir(key).join(name);
        let Some(text) = files::read(&path)? else {
            return Ok(None);
        };
        serde_json::from_slice(&text).map(Some).map_err(|source| Error::Malformed { path, source })
    }

    /// Removes files in the task's directory. It is no error if one does not exist.
    ///
    /// # Errors
    /// [`Error::Io`]
    pub fn remove_scratch(&self, key: &TaskKey, names: &[&str]) -> Result<(), Error> {
        names.iter().map(|name| self.dir(key).join(name)).try_for_each(|path| match fs::remove_file(&path) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
            removed => Ok(removed.map_err(io_error("remove", &path))?),
        })
    }
}
