//! Reads all records and changes nothing, for commands that people run beside the daemon.

use std::path::PathBuf;

use super::record::RECORD;
use super::{CRASHED, Error, Found, Store, entries};

/// The path of a record, and what is in it.
pub type Look = (PathBuf, Result<Found, Error>);

impl Store {
    /// The path of every record, and what is in it; for a namespace that can't be read, the path of its directory.
    ///
    /// # Errors
    /// Only for the directory of all records; each record has a result of its own.
    pub fn look(&self) -> Result<Vec<Look>, Error> {
        let mut records = Vec::new();
        for (dir, keys) in self.namespaces()? {
            let keys = match keys {
                Ok(keys) => keys,
                Err(error) => {
                    records.push((dir, Err(error)));
                    continue;
                }
            };
            for key in keys {
                // A record that was deleted meanwhile is left out.
                if let Some(found) = self.load(&key).transpose() {
                    records.push((self.dir(&key).join(RECORD), found));
                }
            }
        }
        Ok(records)
    }

    /// The records that have crashed the daemon and were moved to a directory that recovery does not read.
    ///
    /// # Errors
    /// The directory can't be listed.
    pub fn set_aside_records(&self) -> Result<Vec<PathBuf>, Error> {
        let dir = self.root.join(CRASHED);
        Ok(entries(&dir)?.into_iter().map(|name| dir.join(name)).collect())
    }
}
