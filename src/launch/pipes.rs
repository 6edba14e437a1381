//! The daemon's FIFOs in a process's directory (pure).
//!
//! The daemon makes them, and `launch` passes them to the process and to its logger.

use crate::task::wiring::{Copied, Output, Sink, Wiring};

/// Standard output, for the daemon to read.
pub const STDOUT: &str = "stdout";
/// Standard error, for the daemon to read.
pub const STDERR: &str = "stderr";
/// Standard output, for the logger to read.
pub const LOG_STDOUT: &str = "log-stdout";
/// Standard error, for the logger to read.
pub const LOG_STDERR: &str = "log-stderr";
/// The logger's third pipe, on which the logger reports that it is ready.
pub const READY: &str = "ready";
/// Standard input without a writer, for a restored process whose client gives it no input.
pub const NO_INPUT: &str = "no-input";
/// The doorbell: `launch` opens and closes it for writing when the outcome of an exec's start is known.
pub const DOORBELL: &str = "doorbell";

impl Wiring {
    /// The daemon's FIFO for the process's standard output, if it needs one.
    pub fn stdout_pipe(&self) -> Option<&'static str> {
        match &self.stdout {
            Output::Copied(_) if !self.terminal => Some(STDOUT),
            Output::Logger => Some(LOG_STDOUT),
            Output::Copied(_) | Output::Null | Output::Journal | Output::Fifo(_) => None,
        }
    }

    /// The daemon's FIFO for the process's standard error, if it needs one. It is that of standard output if both have the
    /// same destination, so that lines stay in order. A logger has a pipe for each.
    pub fn stderr_pipe(&self) -> Option<&'static str> {
        match &self.stderr {
            Output::Copied(copied) if self.stderr == self.stdout && copied.client != Some(Sink::Logger) => {
                Some(STDOUT)
            }
            Output::Copied(_) => Some(STDERR),
            Output::Logger => Some(LOG_STDERR),
            Output::Null | Output::Journal | Output::Fifo(_) => None,
        }
    }

    /// All FIFOs of the daemon that the process needs.
    pub fn own_pipes(&self) -> Vec<&'static str> {
        let logger = [LOG_STDOUT, LOG_STDERR, READY];
        let mut pipes = if self.logger.is_some() { logger.to_vec() } else { Vec::new() };
        for name in self.stdout_pipe().into_iter().chain(self.stderr_pipe()) {
            if !pipes.contains(&name) {
                pipes.push(name);
            }
        }
        pipes
    }

    /// The streams that the daemon copies: the FIFO of each (`None` for the terminal), the logger's pipe for it, and its
    /// destinations.
    pub fn copies(&self) -> Vec<(Option<&'static str>, &'static str, &Copied)> {
        let mut copies = Vec::new();
        if let Output::Copied(copied) = &self.stdout {
            copies.push((self.stdout_pipe(), LOG_STDOUT, copied));
        }
        if let (Output::Copied(copied), Some(STDERR)) = (&self.stderr, self.stderr_pipe()) {
            copies.push((Some(STDERR), LOG_STDERR, copied));
        }
        copies
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::task::wiring::{JournalCopy, Logger};

    fn copied(client: Option<Sink>) -> Output {
        Output::Copied(Copied { client, journal: JournalCopy::Complete })
    }

    fn pipes(stdout: Output, stderr: Output) -> Vec<&'static str> {
        Wiring { stdout, stderr, ..Wiring::default() }.own_pipes()
    }

    #[test]
    fn streams_with_one_destination_share_a_pipe() {
        let fifo = |path: &str| copied(Some(Sink::Fifo(path.into())));
        assert_eq!(pipes(copied(None), copied(None)), [STDOUT]);
        assert_eq!(pipes(fifo("/a"), fifo("/b")), [STDOUT, STDERR]);
        assert!(pipes(Output::Journal, Output::Fifo("/b".into())).is_empty());
    }

    #[test]
    fn a_terminal_needs_no_pipe() {
        let wiring = Wiring { terminal: true, stdout: copied(None), ..Wiring::default() };
        assert!(wiring.own_pipes().is_empty());
    }

    #[test]
    fn a_logger_has_a_pipe_for_each_stream() {
        let logger = Logger { program: "/bin/log".into(), args: Vec::new(), strict: false };
        let (stdout, stderr) = (Output::Logger, Output::Logger);
        let wiring = Wiring { stdout, stderr, logger: Some(logger), ..Wiring::default() };
        assert_eq!(wiring.own_pipes(), [LOG_STDOUT, LOG_STDERR, READY]);
        let (stdout, stderr) = (copied(Some(Sink::Logger)), copied(Some(Sink::Logger)));
        let wiring = Wiring { stdout, stderr, ..wiring };
        assert_eq!(wiring.own_pipes(), [LOG_STDOUT, LOG_STDERR, READY, STDOUT, STDERR]);
    }
}
