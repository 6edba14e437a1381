//! ResizePty: the size of a terminal's window.

use crate::id::ProcessKey;
use crate::services::{Error, Tasks};

impl Tasks {
    /// Sets the size of the terminal, in characters. If the daemon has not received the terminal yet, it sets the size as
    /// soon as it does. Without a terminal nothing happens.
    ///
    /// # Errors
    /// There is no such process, or an exec has ended.
    pub fn resize(&self, key: &ProcessKey, columns: u32, rows: u32) -> Result<(), Error> {
        let (entry, process) = self.process(key)?;
        if key.exec.is_some() && entry.has_recorded_end(&process) {
            return Err(Error::ResizeStopped);
        }
        let clip = |size: u32| u16::try_from(size).unwrap_or(u16::MAX);
        let window = (clip(columns), clip(rows));
        let mut live = process.live();
        live.window = Some(window);
        Ok(live.session.resize(window)?)
    }
}
