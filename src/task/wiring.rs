//! The destinations of the three standard streams of a process: plain data, decided once and stored in the record.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// Standard input.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Input {
    /// `/dev/null`
    #[default]
    Null,
    /// The client's FIFO. The daemon keeps it open for writing until CloseIO.
    Fifo(PathBuf),
    /// The client's regular file or character device. The process reads it without the daemon.
    File(PathBuf),
}

/// Standard output or standard error.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Output {
    /// `/dev/null`
    #[default]
    Null,
    /// The unit's own stream to the journal.
    Journal,
    /// The client's FIFO itself, without a copy.
    Fifo(PathBuf),
    /// A FIFO of the daemon, or the terminal, from which the daemon copies.
    Copied(Copied),
    /// A FIFO of the daemon, which the logger reads.
    Logger,
}

/// The destinations to which the daemon copies a stream.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "CopiedForm", into = "CopiedForm")]
pub struct Copied {
    /// The client's destination.
    pub client: Option<Sink>,
    /// The journal, under the container's unit.
    pub journal: JournalCopy,
}

/// Whether the journal gets a copy of a stream.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum JournalCopy {
    /// It gets none.
    #[default]
    None,
    /// It gets everything, and the process waits for it.
    Complete,
    /// Nothing waits for the journal: output that it does not accept at once is dropped.
    Aside,
}

/// The form of [`Copied`] in the record. Records of earlier versions do not have `aside`.
#[derive(Serialize, Deserialize)]
struct CopiedForm {
    client: Option<Sink>,
    journal: bool,
    #[serde(default)]
    aside: bool,
}

impl From<CopiedForm> for Copied {
    fn from(CopiedForm { client, journal, aside }: CopiedForm) -> Self {
        let journal = match (journal, aside) {
            (false, _) => JournalCopy::None,
            (true, false) => JournalCopy::Complete,
            (true, true) => JournalCopy::Aside,
        };
        Self { client, journal }
    }
}

impl From<Copied> for CopiedForm {
    fn from(Copied { client, journal }: Copied) -> Self {
        Self { client, journal: journal != JournalCopy::None, aside: journal == JournalCopy::Aside }
    }
}

/// A client's end of a stream.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Sink {
    Fifo(PathBuf),
    /// Its FIFO, which only gets EOF: the output goes to the journal.
    EndOnly(PathBuf),
    /// Its file. The process does not get the file itself: if the container opened `/dev/stdout`, it would overwrite the
    /// beginning.
    File {
        /// The file, to which the daemon appends.
        path: PathBuf,
        /// True if the file and its directories are created if they do not exist.
        create: bool,
    },
    Logger,
}

/// A `binary://` logger.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Logger {
    /// The program; absolute.
    pub program: PathBuf,
    /// Its arguments.
    pub args: Vec<String>,
    /// True for `binary-v2`: only a byte on its third pipe means ready. For `binary`, closing the pipe means ready, too.
    pub strict: bool,
}

/// The three streams.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Wiring {
    /// True if the process has a terminal for all three streams. The daemon holds the master side, and `stdin` and `stdout`
    /// are its destinations. `stderr` is unused.
    pub terminal: bool,
    /// Standard input.
    pub stdin: Input,
    /// True once the client closed the input (CloseIO).
    #[serde(default)]
    pub stdin_closed: bool,
    /// Standard output.
    pub stdout: Output,
    /// Standard error.
    pub stderr: Output,
    /// The logger for [`Output::Logger`] and [`Sink::Logger`].
    pub logger: Option<Logger>,
    /// The number in the names of the daemon's ends of the streams in the descriptor store. The record calls it `kept`.
    #[serde(default, rename = "kept")]
    pub store_number: u64,
}

impl Wiring {
    /// The same destinations over FIFOs: criu can only replace a FIFO by a FIFO.
    pub fn for_restore(self) -> Self {
        let by_fifo = |output| match output {
            Output::Journal => Output::Copied(Copied { journal: JournalCopy::Complete, ..Copied::default() }),
            Output::Null => Output::Copied(Copied::default()),
            Output::Fifo(_) | Output::Copied(_) | Output::Logger => output,
        };
        if self.terminal {
            return self;
        }
        Self { stdout: by_fifo(self.stdout), stderr: by_fifo(self.stderr), ..self }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_journals_copy_keeps_its_form_in_records() {
        let forms = [
            (r#"{"client":null,"journal":false,"aside":false}"#, JournalCopy::None),
            (r#"{"client":null,"journal":true,"aside":false}"#, JournalCopy::Complete),
            (r#"{"client":null,"journal":true,"aside":true}"#, JournalCopy::Aside),
        ];
        for (form, journal) in forms {
            let copied = Copied { client: None, journal };
            assert_eq!(serde_json::from_str::<Copied>(form).unwrap(), copied);
            assert_eq!(serde_json::to_string(&copied).unwrap(), form);
        }
    }

    #[test]
    fn records_of_earlier_versions_are_read() {
        let journal = |text| serde_json::from_str::<Copied>(text).unwrap().journal;
        assert_eq!(journal(r#"{"client":null,"journal":true}"#), JournalCopy::Complete);
        assert_eq!(journal(r#"{"client":null,"journal":false}"#), JournalCopy::None);
        // No version wrote this; the daemon copied nothing for it.
        assert_eq!(journal(r#"{"client":null,"journal":false,"aside":true}"#), JournalCopy::None);
    }
}
