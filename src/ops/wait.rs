//! Wait: the end of a process.

use crate::id::ProcessKey;
use crate::task::phase::Exit;
use crate::task::registry::End;

use super::{Attempt, Deleted, Error, Shim};

impl Shim {
    /// Resolves when the process has ended; at once if it has.
    ///
    /// # Errors
    /// There is no such process, or it is deleted without having run.
    pub async fn wait(&self, key: &ProcessKey, attempt: Attempt) -> Result<Exit, Error> {
        let process = match (self.process(key), self.answered(key, attempt)) {
            (Ok((_, process)), _) => process,
            // It has ended and is deleted since.
            (Err(_), Some(Deleted { exit: Some(exit), .. })) => return Ok(exit),
            (Err(error), _) => return Err(error),
        };
        match (process.ended().await, &key.exec) {
            (End::Exited(exit), _) => Ok(exit),
            (End::Deleted, None) => Err(Error::UnknownTask { key: key.task.clone() }),
            (End::Deleted, Some(_)) => Err(Error::UnknownExec { key: key.clone() }),
        }
    }
}
