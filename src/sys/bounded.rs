//! Runs a command with a time limit, and kills it with all that it has started if it does not end.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::process::{Child, Command, ExitStatus};
use std::time::Duration;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};

use crate::telemetry;

/// How long the processes that a command has started may take to end after SIGKILL.
const DEATH_LIMIT: Duration = Duration::from_secs(5);

/// How a command ended.
#[derive(Debug)]
pub enum CommandEnd {
    /// It ended by itself.
    Exited(ExitStatus),
    /// It was killed, with all that it had started, because it took too long.
    TimedOut,
    /// It was killed, with all that it had started, because this process received SIGTERM.
    Terminated,
}

/// Runs a command to its end. This process must be a subreaper: otherwise a process that detaches itself from the command
/// outlives the command.
///
/// # Errors
/// The command can't be run.
pub fn run(command: &mut Command, limit: Duration) -> io::Result<CommandEnd> {
    let mut signals = SigSet::empty();
    signals.add(Signal::SIGTERM);
    // SIGTERM is blocked until there is a process to kill.
    signals.thread_block()?;
    let ended = spawn(command).and_then(|child| wait(child, &signals, limit));
    signals.thread_unblock()?;
    ended
}

fn spawn(command: &mut Command) -> io::Result<Child> {
    super::child::begins_as_usual(command);
    command.spawn()
}

fn wait(mut child: Child, signals: &SigSet, limit: Duration) -> io::Result<CommandEnd> {
    let watched = super::pidfd_open(child.id()).map_err(io::Error::from);
    let first = watched.and_then(|process| Ok(first_of(&process, signals, limit)?));
    match first {
        Ok(First::Ended) => Ok(CommandEnd::Exited(child.wait()?)),
        Ok(First::Limit) => Ok(kill(CommandEnd::TimedOut)),
        Ok(First::Signal) => Ok(kill(CommandEnd::Terminated)),
        Err(error) => {
            kill(CommandEnd::Terminated);
            Err(error)
        }
    }
}

fn kill(end: CommandEnd) -> CommandEnd {
    kill_all();
    end
}

/// Kills all descendants of this process, which is a subreaper.
pub fn kill_all() {
    if !super::tree::kill_own_descendants(DEATH_LIMIT) {
        telemetry::say("a process of the OCI runtime did not end after SIGKILL: it hangs in the kernel");
    }
}

/// The first of the events that end a wait.
enum First {
    Ended,
    Signal,
    Limit,
}

fn first_of(process: &OwnedFd, signals: &SigSet, limit: Duration) -> Result<First, Errno> {
    let told = SignalFd::with_flags(signals, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)?;
    let mut fds =
        [PollFd::new(process.as_fd(), PollFlags::POLLIN), PollFd::new(told.as_fd(), PollFlags::POLLIN)];
    if !super::poll(&mut fds, limit)? {
        return Ok(First::Limit);
    }
    let is_ended = fds[0].any().unwrap_or(false);
    Ok(if is_ended { First::Ended } else { First::Signal })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::process::ExitStatusExt;

    #[test]
    fn a_command_that_ends_says_how() {
        let ended = run(Command::new("sh").args(["-c", "exit 7"]), Duration::from_secs(60)).unwrap();
        assert!(matches!(ended, CommandEnd::Exited(status) if status.code() == Some(7)), "{ended:?}");
        let killed = run(Command::new("sh").args(["-c", "kill -TERM $$"]), Duration::from_secs(60)).unwrap();
        assert!(matches!(killed, CommandEnd::Exited(status) if status.signal() == Some(15)), "{killed:?}");
    }

    #[test]
    fn a_command_that_is_not_there_is_an_error() {
        assert!(run(&mut Command::new("/no/such/command"), Duration::from_secs(60)).is_err());
    }
}
