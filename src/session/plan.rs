//! What the streams of a process depend on: plain data, taken from the task.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::id::{ProcessKey, UnitName};
use crate::oci::metadata;
use crate::stdio::journal::Lines;
use crate::stdio::journal_policy::JournalPolicy;
use crate::sys::interrupt::Interrupt;
use crate::task::TaskMetadata;
use crate::task::wiring::Wiring;

/// What the streams of a process depend on.
#[derive(Debug)]
pub struct Plan {
    pub key: ProcessKey,
    /// Where its FIFOs are.
    pub dir: PathBuf,
    /// Its console socket, for a terminal.
    pub console: PathBuf,
    /// Where its streams lead.
    pub wiring: Wiring,
    /// The unit of its logger, if it has one.
    pub logger: Option<UnitName>,
    /// The unit of the container, to which all output belongs.
    pub container: UnitName,
    pub slice: UnitName,
    /// How journal lines name the container.
    pub metadata: TaskMetadata,
    /// The rate limit and the fields of the unit, for the output that goes to the journal.
    pub policy: Arc<JournalPolicy>,
    /// Ends the waits for the client and for the logger.
    pub interrupt: Interrupt,
}

impl Plan {
    /// A FIFO of the process's own.
    pub fn pipe(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    /// The Description of the logger's unit.
    pub fn logger_description(&self) -> String {
        match &self.key.exec {
            None => format!("Logger of {}", self.metadata.description),
            Some(exec) => format!("Logger of exec {exec} in {}", self.metadata.description),
        }
    }

    /// The journal's copy of one stream. `name` is that of the logger's pipe for this stream.
    pub fn journal_lines(&self, name: &str) -> Lines {
        let fields = self.metadata.fields.iter().map(|(name, value)| (name.as_str(), value.as_str()));
        let exec = self.key.exec.as_ref().map(|exec| ("CONTAINER_EXEC_ID", exec.as_str()));
        let identifier = metadata::identifier(&self.metadata.fields);
        let partial: &Path = &self.pipe(&format!("{name}.partial"));
        Lines::new(
            self.container.as_str(),
            identifier,
            fields.chain(exec),
            partial.to_owned(),
            self.policy.clone(),
        )
    }
}
