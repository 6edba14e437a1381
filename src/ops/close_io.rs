//! CloseIO: a process sees the end of its input.

use crate::id::ProcessKey;
use crate::services::Error;

use super::Shim;

impl Shim {
    /// Closes the daemon's writing end of a process's stdin. The process sees EOF once every client has closed the FIFO
    /// as well.
    ///
    /// # Errors
    /// There is no such process.
    pub fn close_stdin(&self, key: &ProcessKey) -> Result<(), Error> {
        let (entry, process) = self.tasks.process(key)?;
        self.tasks.note(&entry, |task| {
            let process = task.process_mut(key.exec.as_ref());
            process.into_iter().for_each(|process| process.wiring.stdin_closed = true);
            Ok(Vec::new())
        })?;
        self.streams.close_stdin_writer(&entry, &process);
        Ok(())
    }
}
