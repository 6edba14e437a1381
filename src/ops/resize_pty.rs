//! ResizePty: the size of a terminal's window.

use crate::id::ProcessKey;
use crate::services::streams::set_window_once_resumed;
use crate::services::{Error, Tasks};

impl Tasks {
    /// Sets the size of the terminal, in characters. If the daemon has not received the terminal yet, it sets the size as
    /// soon as it does. Without a terminal nothing happens.
    ///
    /// # Errors
    /// There is no such process, an exec has ended, or the terminal does not answer.
    pub async fn resize(&self, key: &ProcessKey, columns: u32, rows: u32) -> Result<(), Error> {
        let (entry, process) = self.process(key)?;
        if key.exec.is_some() && entry.has_recorded_end(&process) {
            return Err(Error::ResizeStopped);
        }
        let clip = |size: u32| u16::try_from(size).unwrap_or(u16::MAX);
        let window = (clip(columns), clip(rows));
        process.live().window = Some(window);
        set_window_once_resumed(&process).await
    }
}
