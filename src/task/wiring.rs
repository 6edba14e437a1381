//! Where the three standard streams of a process lead: plain data, decided once and kept in the
//! record.

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
    /// The client's FIFO itself: no copy, and nobody of ours in between.
    Fifo(PathBuf),
    /// A FIFO of ours, which the daemon copies to a file. Not the file itself: a container that opens
    /// `/dev/stdout` anew would write over its beginning.
    File {
        /// The file; appended to.
        path: PathBuf,
        /// Make it, and its directories, if it is not there.
        create: bool,
    },
    /// A FIFO of ours, which the logger reads.
    Logger,
}

/// A `binary://` logger.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Logger {
    /// The program; absolute.
    pub program: PathBuf,
    /// Its arguments.
    pub args: Vec<String>,
    /// `binary-v2`: only a byte on its third pipe means ready; for `binary` its end does as well.
    pub strict: bool,
}

/// The three streams.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Wiring {
    /// Standard input.
    pub stdin: Input,
    /// Standard output.
    pub stdout: Output,
    /// Standard error.
    pub stderr: Output,
    /// Who reads [`Output::Logger`].
    pub logger: Option<Logger>,
}

/// Names of the FIFOs in a task's directory.
pub mod pipe {
    /// Standard output, for the daemon or the logger to read.
    pub const STDOUT: &str = "stdout";
    /// Standard error.
    pub const STDERR: &str = "stderr";
    /// The logger's third pipe: ready.
    pub const READY: &str = "ready";
}

impl Wiring {
    /// The FIFOs of ours that this needs, by name.
    pub fn own_pipes(&self) -> Vec<&'static str> {
        let mut pipes = Vec::new();
        pipes.extend(self.stdout_pipe());
        pipes.extend(self.stderr_pipe().filter(|name| *name != pipe::STDOUT));
        if self.logger.is_some() {
            pipes.push(pipe::READY);
        }
        pipes
    }

    /// The FIFO of ours that is the process's standard output.
    pub fn stdout_pipe(&self) -> Option<&'static str> {
        matches!(self.stdout, Output::File { .. } | Output::Logger).then_some(pipe::STDOUT)
    }

    /// The FIFO of ours that is its standard error: the same one when both lead into one file, so
    /// that lines stay in order.
    pub fn stderr_pipe(&self) -> Option<&'static str> {
        match &self.stderr {
            Output::File { .. } if self.stderr == self.stdout => Some(pipe::STDOUT),
            Output::File { .. } | Output::Logger => Some(pipe::STDERR),
            Output::Null | Output::Journal | Output::Fifo(_) => None,
        }
    }
}
