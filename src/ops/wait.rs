//! Wait: the end of the init process.

use crate::id::TaskKey;
use crate::task::phase::Exit;

use super::{Error, Shim};

impl Shim {
    /// Resolves when the init process has ended; at once if it has.
    ///
    /// # Errors
    /// There is no such task.
    pub async fn wait(&self, key: &TaskKey) -> Result<Exit, Error> {
        let entry = self.created(key)?;
        Ok(entry.ended().await)
    }
}
