//! The commands that containerd, systemd and people run.

pub mod arguments;
mod calls;
mod delete;
mod first_threads;
mod info;
mod people;
mod serve;
mod serving;
mod start;
mod wake;

use std::ffi::OsString;
use std::io::{self, Read, Write};
use std::path::Path;
use std::process::ExitCode;

use arguments::{Command, Flags};
#[cfg(any(test, fuzzing))]
pub use start::is_bootstrap;

use crate::config::{self, NAME};
use crate::launch;
use crate::oci::containerd;
use crate::telemetry::say;

/// The longest message that a command accepts on standard input.
const MAX_STDIN_BYTES: u64 = 4 << 20;

/// Why a command failed, as one sentence for its caller.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct Failure(String);

impl Failure {
    fn new(text: impl ToString) -> Self {
        Self(text.to_string())
    }
}

/// Runs the command that the arguments name.
pub fn run(args: impl IntoIterator<Item = OsString>) -> ExitCode {
    let command = match arguments::texts(args).and_then(|args| arguments::parse(&args)) {
        Ok(command) => command,
        Err(error) => {
            say(&match error {
                arguments::Error::NoCommand => format!("{error}\n\n{USAGE}"),
                // The usage of all commands would hide the mistake.
                arguments::Error::Tool { tool, .. } => format!("{error}\ntry '{NAME} {tool} --help'"),
                _ => format!("{error}\ntry '{NAME} -h'"),
            });
            return ExitCode::from(MISUSED);
        }
    };
    let result = match command {
        Command::Help => show(USAGE),
        Command::Version => show(&version()),
        Command::Info(flags) => info::run(&flags),
        Command::Start(flags) => start::run(&flags),
        Command::Delete(flags) => delete::run(&flags),
        Command::Serve if !serve::has_work() => {
            say(&format!("only systemd runs serve: start {} instead", crate::unit::name::DAEMON_SOCKET));
            return ExitCode::from(MISUSED);
        }
        Command::Serve => serve::run(),
        Command::Wake => wake::run(),
        #[cfg(feature = "faults")]
        Command::Faults => {
            let names: Vec<_> = crate::fault::Point::ALL.iter().map(|point| point.name()).collect();
            print(format!("{}\n", names.join("\n")).as_bytes())
        }
        Command::Launch { kind, key } => match launch::run(kind, &key) {
            Err(launch::Error::NothingToLog) => return ExitCode::from(config::NOTHING_TO_LOG),
            launched => launched.map_err(Failure::new),
        },
        Command::Tool(tool, given) => match people::run(tool, &given) {
            Ok(true) => Ok(()),
            Ok(false) => return ExitCode::FAILURE,
            Err(failure) => Err(failure),
        },
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            say(&failure.to_string());
            ExitCode::FAILURE
        }
    }
}

/// The exit code for wrong arguments. systemd does not restart the daemon's service after this code.
const MISUSED: u8 = 2;

const USAGE: &str = "\
containerd-shim-systemd-v1: a containerd runtime in which every container is a systemd unit

Nothing has to be run by hand. Put this program into containerd's PATH and name the runtime:
    ctr run --runtime io.containerd.systemd.v1 IMAGE NAME
Then look at the container with systemctl status, journalctl -u and systemd-cgls:
    containerd-<namespace>-<id>.service

Called by containerd:
    containerd-shim-systemd-v1 -namespace NS -id ID -address ADDR -publish-binary BIN start
    containerd-shim-systemd-v1 -namespace NS -id ID -address ADDR -bundle DIR delete
    containerd-shim-systemd-v1 -info        what the runtime can do (protobuf)
Called by systemd:
    containerd-shim-systemd-v1 serve        the daemon, one per machine, socket-activated
    containerd-shim-systemd-v1 launch …     inside a container's unit; the daemon runs it, too
    containerd-shim-systemd-v1 wake         starts the daemon at the next call, while it is stopped
For people (each has --help):
    containerd-shim-systemd-v1 doctor       what is wrong on this machine, and what to do about it
    containerd-shim-systemd-v1 ps           the tasks of this runtime with their units
    containerd-shim-systemd-v1 inspect ID   all that is known of a task
Without a command:
    containerd-shim-systemd-v1 -v           version
    containerd-shim-systemd-v1 -h           this text
";

fn version() -> String {
    format!("{NAME}:\n  Version:  {}\n  Runtime:  io.containerd.systemd.v1\n", env!("CARGO_PKG_VERSION"))
}

/// Writes a response to standard output. containerd reads all of standard output, so nothing else may be written there.
fn print(answer: &[u8]) -> Result<(), Failure> {
    write(io::stdout().lock(), answer).map_err(unwritten)
}

/// Writes a text for a person to standard output. A reader that has closed it has read enough, such as `head -1`.
fn show(text: &str) -> Result<(), Failure> {
    unless_closed(write(io::stdout().lock(), text.as_bytes())).map_err(unwritten)
}

fn write(mut out: impl Write, answer: &[u8]) -> io::Result<()> {
    out.write_all(answer)?;
    out.flush()
}

fn unless_closed(written: io::Result<()>) -> io::Result<()> {
    match written {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        written => written,
    }
}

fn unwritten(error: io::Error) -> Failure {
    Failure(format!("can't write to standard output: {error}"))
}

/// Fails for a user who is not root. containerd may be root of a user namespace only.
fn check_user() -> Result<(), Failure> {
    match nix::unistd::geteuid().is_root() {
        true => Ok(()),
        false => Err(Failure::new("must run as root")),
    }
}

/// All of standard input.
fn read_stdin() -> Result<Vec<u8>, Failure> {
    let mut input = Vec::new();
    let read = io::stdin().lock().take(MAX_STDIN_BYTES + 1).read_to_end(&mut input);
    read.map_err(|error| Failure(format!("can't read standard input: {error}")))?;
    if input.len() as u64 > MAX_STDIN_BYTES {
        return Err(Failure(format!("standard input is larger than {MAX_STDIN_BYTES} bytes")));
    }
    Ok(input)
}

/// Runs a future on an async runtime with one thread, for commands that need a runtime.
fn block_on<T>(errand: impl Future<Output = T>) -> Result<T, Failure> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    Ok(runtime.map_err(|error| Failure(format!("can't set up the async runtime: {error}")))?.block_on(errand))
}

/// Checks the flags with which containerd names the task of this bundle.
fn key_of(flags: &Flags, bundle: &Path) -> Result<crate::id::TaskKey, Failure> {
    use crate::id::{Namespace, TaskId, TaskKey};
    let namespace =
        Namespace::new(&flags.namespace).map_err(|error| Failure(format!("-namespace: {error}")))?;
    let id = TaskId::new(&flags.id).map_err(|error| Failure(format!("-id: {error}")))?;
    let owner = containerd::owner(bundle, &namespace, &id);
    Ok(TaskKey { owner, namespace, id })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reader_that_has_read_enough_is_no_failure_but_a_full_disk_is() {
        let (reader, writer) = io::pipe().unwrap();
        drop(reader);
        let written = write(writer, b"text");
        assert_eq!(written.as_ref().unwrap_err().kind(), io::ErrorKind::BrokenPipe);
        unless_closed(written).unwrap();
        let full = std::fs::OpenOptions::new().write(true).open("/dev/full").unwrap();
        unless_closed(write(full, b"text")).unwrap_err();
    }
}
