//! Files beside a task's record, of a verb that is under way.

use std::fs;
use std::io;
use std::path::PathBuf;

use serde::de::DeserializeOwned;

use crate::id::TaskKey;
use crate::path_error::io_error;

use super::files::{self, replace};
use super::{Error, Store};

impl Store {
    /// Writes such a file, in one step.
    ///
    /// # Errors
    /// [`Error::Io`]
    pub fn write_aside(&self, key: &TaskKey, name: &str, content: &[u8]) -> Result<PathBuf, Error> {
        let path = self.dir(key).join(name);
        replace(&path, &path.with_extension("new"), content)?;
        Ok(path)
    }

    /// What is in such a file, of JSON; nothing if there is none.
    ///
    /// # Errors
    /// It can't be read.
    pub fn read_aside<T: DeserializeOwned>(&self, key: &TaskKey, name: &str) -> Result<Option<T>, Error> {
        let path = self.dir(key).join(name);
        let Some(text) = files::read(&path)? else {
            return Ok(None);
        };
        serde_json::from_slice(&text).map(Some).map_err(|source| Error::Malformed { path, source })
    }

    /// Removes such files, where they are.
    ///
    /// # Errors
    /// [`Error::Io`]
    pub fn remove_aside(&self, key: &TaskKey, names: &[&str]) -> Result<(), Error> {
        names.iter().map(|name| self.dir(key).join(name)).try_for_each(|path| match fs::remove_file(&path) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
            removed => Ok(removed.map_err(io_error("remove", &path))?),
        })
    }
}
