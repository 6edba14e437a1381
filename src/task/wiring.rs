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

/// Names of the FIFOs in a process's directory.
pub mod pipe {
    /// Standard output, for the daemon to read.
    pub const STDOUT: &str = "stdout";
    /// Standard error, for the daemon to read.
    pub const STDERR: &str = "stderr";
    /// Standard output, for the logger to read.
    pub const LOG_STDOUT: &str = "log-stdout";
    /// Standard error, for the logger to read.
    pub const LOG_STDERR: &str = "log-stderr";
    /// The logger's third pipe: ready.
    pub const READY: &str = "ready";
    /// Rings when it is known what became of an exec's start.
    pub const DOORBELL: &str = "doorbell";
}

impl Wiring {
    /// The FIFO of ours that is the process's standard output.
    pub fn stdout_pipe(&self) -> Option<&'static str> {
        match &self.stdout {
            Output::Copied(_) if !self.terminal => Some(pipe::STDOUT),
            Output::Logger => Some(pipe::LOG_STDOUT),
            Output::Copied(_) | Output::Null | Output::Journal | Output::Fifo(_) => None,
        }
    }

    /// The FIFO of ours that is its standard error: the same one when both lead to one place, so that
    /// lines stay in order. A logger has a pipe for each.
    pub fn stderr_pipe(&self) -> Option<&'static str> {
        match &self.stderr {
            Output::Copied(copied) if self.stderr == self.stdout && copied.client != Some(Sink::Logger) => {
                Some(pipe::STDOUT)
            }
            Output::Copied(_) => Some(pipe::STDERR),
            Output::Logger => Some(pipe::LOG_STDERR),
            Output::Null | Output::Journal | Output::Fifo(_) => None,
        }
    }

    /// The FIFOs of ours that this needs.
    pub fn own_pipes(&self) -> Vec<&'static str> {
        let logger = [pipe::LOG_STDOUT, pipe::LOG_STDERR, pipe::READY];
        let mut pipes = if self.logger.is_some() { logger.to_vec() } else { Vec::new() };
        for name in self.stdout_pipe().into_iter().chain(self.stderr_pipe()) {
            if !pipes.contains(&name) {
                pipes.push(name);
            }
        }
        pipes
    }

    /// What the daemon copies: the FIFO of ours it comes from (nothing for the terminal), the
    /// logger's pipe that it would belong to, and where it goes.
    pub fn copies(&self) -> Vec<(Option<&'static str>, &'static str, &Copied)> {
        let mut copies = Vec::new();
        if let Output::Copied(copied) = &self.stdout {
            copies.push((self.stdout_pipe(), pipe::LOG_STDOUT, copied));
        }
        if let (Output::Copied(copied), Some(pipe::STDERR)) = (&self.stderr, self.stderr_pipe()) {
            copies.push((Some(pipe::STDERR), pipe::LOG_STDERR, copied));
        }
        copies
    }
}
