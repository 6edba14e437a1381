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
    /// A FIFO of ours (or the terminal), from which the daemon copies.
    Copied(Copied),
    /// A FIFO of ours, which the logger reads.
    Logger,
}

/// Where the daemon copies a stream to.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Copied {
    /// What the client named.
    pub client: Option<Sink>,
    /// The journal, under the container's unit.
    pub journal: bool,
    /// The client does not wait for the journal, which may miss what it does not take at once.
    #[serde(default)]
    pub aside: bool,
}

/// A client's end of a stream.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Sink {
    /// Its FIFO.
    Fifo(PathBuf),
    /// Its FIFO, which gets nothing but the end: the output goes elsewhere.
    EndOnly(PathBuf),
    /// Its file. Not handed to the process itself: a container that opens `/dev/stdout` anew would
    /// write over its beginning.
    File {
        /// The file; appended to.
        path: PathBuf,
        /// Make it, and its directories, if it is not there.
        create: bool,
    },
    /// Its logger.
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
    /// The process has a terminal: it is its standard input, output and error, and the daemon holds
    /// the other side. `stdin` and `stdout` say where that leads, `stderr` nothing.
    pub terminal: bool,
    /// Standard input.
    pub stdin: Input,
    /// The client wants the process to see the end of its input (CloseIO).
    #[serde(default)]
    pub stdin_closed: bool,
    /// Standard output.
    pub stdout: Output,
    /// Standard error.
    pub stderr: Output,
    /// Who reads [`Output::Logger`] and [`Sink::Logger`].
    pub logger: Option<Logger>,
    /// The number under which systemd keeps the daemon's ends.
    #[serde(default)]
    pub kept: u64,
}
