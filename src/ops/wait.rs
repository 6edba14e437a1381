//! Wait: the end of a process.

use crate::id::ProcessKey;
use crate::services::registry::Completion;
use crate::services::{Delivery, Error};
use crate::task::lifecycle::Exit;

use super::Shim;

impl Shim {
    /// Waits until the process ends. Returns at once if it has ended.
    ///
    /// # Errors
    /// There is no such process, or it is deleted before it has run.
    pub async fn wait(&self, key: &ProcessKey, delivery: Delivery) -> Result<Exit, Error> {
        let process = match self.tasks.process(key) {
            Ok((_, process)) => process,
            Err(error) => {
                // The process may have ended and been deleted before the replay.
                let exit = self.answered(key, delivery).and_then(|deleted| deleted.exit);
                return exit.ok_or(error);
            }
        };
        match (process.ended().await, &key.exec) {
            (Completion::Exited(exit), _) => Ok(exit),
            (Completion::Deleted, None) => Err(Error::UnknownTask { key: key.task.clone() }),
            (Completion::Deleted, Some(_)) => Err(Error::UnknownExec { key: key.clone() }),
        }
    }
}
