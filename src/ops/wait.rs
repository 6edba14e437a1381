//! Wait: the end of a process.

use crate::id::ProcessKey;
use crate::task::phase::Exit;
use crate::task::registry::End;

use super::{Error, Shim};

impl Shim {
    /// Resolves when the process has ended; at once if it has.
    ///
    /// # Errors
    /// There is no such process, or it is deleted without having run.
    pub async fn wait(&self, key: &ProcessKey) -> Result<Exit, Error> {
        let (_, process) = self.process(key)?;
        match (process.ended().await, &key.exec) {
            (End::Exited(exit), _) => Ok(exit),
            (End::Deleted, None) => Err(Error::UnknownTask { key: key.task.clone() }),
            (End::Deleted, Some(_)) => Err(Error::UnknownExec { key: key.clone() }),
        }
    }
}
