//! The OCI runtime's command line and its log. runc, crun and youki take the same words.

use std::ffi::{OsStr, OsString};
use std::fs::{self, File};
use std::io::{self, Read, Seek, SeekFrom};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus};
use std::time::Duration;

use async_trait::async_trait;
use serde::Deserialize;

use crate::id::TaskId;
use crate::task::Task;
use crate::task::request::{Containerd, Runtime};

/// How much of the log's end is looked at for the reason of a failure.
const LOG_TAIL_BYTES: u64 = 64 << 10;
/// How many entries of it are looked at.
const MOST_LOG_ENTRIES: usize = 200;

/// A command of the OCI runtime that failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// It could not be run.
    #[error("OCI runtime {verb} failed: can't run {binary}: {source}")]
    Spawn {
        /// The command.
        verb: &'static str,
        /// The binary.
        binary: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// It failed; the reason is in its own words.
    #[error("OCI runtime {verb} failed: {reason}")]
    Failed {
        /// The command.
        verb: &'static str,
        /// Its last error.
        reason: String,
    },
    /// Somebody killed it, or it crashed; the reason is in its own words if it left any.
    #[error("OCI runtime {verb} failed: {reason}")]
    Killed {
        /// The command.
        verb: &'static str,
        /// Its last error, or the signal.
        reason: String,
    },
    /// It took too long and was killed, with all that it had started.
    #[error("OCI runtime {verb} failed: it did not end within {} s and was killed (option RuntimeTimeoutSec)", .limit.as_secs())]
    TimedOut {
        /// The command.
        verb: &'static str,
        /// How long it was given.
        limit: Duration,
    },
    /// An earlier command for the same container does not end, and can't be killed.
    #[error(
        "OCI runtime {verb} failed: an earlier command for this container (pid {pid}) did not end after SIGKILL; see /proc/{pid}/stack"
    )]
    Busy {
        /// The command that could not be run.
        verb: &'static str,
        /// The earlier one.
        pid: u32,
    },
}

/// The command of [`Cli::exec`], which names its log too.
pub const EXEC: &str = "exec";

/// The OCI runtime, for one container.
#[derive(Clone, Copy, Debug)]
pub struct Cli<'a> {
    /// The binary and its options.
    pub runtime: &'a Runtime,
    /// The container.
    pub id: &'a TaskId,
    /// The containerd of its task, in whose namespaces the commands run.
    pub containerd: &'a Containerd,
    /// A directory for its logs.
    pub dir: &'a Path,
}

/// The seam between the daemon and the OCI runtime: the commands that the daemon itself runs. Tests put a fake in
/// the place of [`super::command::CommandLine`].
#[async_trait]
pub trait OciRuntime: Send + Sync {
    /// Lets a created container's process run. Dropped before it resolves, the command is killed.
    ///
    /// # Errors
    /// [`Error`]
    async fn start(&self, cli: &Cli<'_>) -> Result<(), Error>;

    /// Gives a container other limits; `resources` is a file with OCI `LinuxResources`.
    ///
    /// # Errors
    /// [`Error`]
    async fn update(&self, cli: &Cli<'_>, resources: &Path) -> Result<(), Error>;

    /// Removes what the runtime keeps of a container; no error if there is nothing.
    ///
    /// # Errors
    /// [`Error`]
    async fn delete(&self, cli: &Cli<'_>) -> Result<(), Error>;
}

impl<'a> Cli<'a> {
    /// The OCI runtime for a task, with its logs in `dir`.
    pub fn of(task: &'a Task, dir: &'a Path) -> Self {
        Self { runtime: &task.runtime, id: &task.key.id, containerd: &task.containerd, dir }
    }
}

impl Cli<'_> {
    /// `create`, for a process that becomes it; `program` is the binary or a copy of it. With a console socket the container's init gets a
    /// terminal.
    pub fn create(&self, program: &Path, bundle: &Path, pid_file: &Path, console: Option<&Path>) -> Command {
        let mut command = self.command_of(program, "create");
        command.arg("--bundle").arg(bundle).arg("--pid-file").arg(pid_file);
        if let Some(console) = console {
            command.arg("--console-socket").arg(console);
        }
        if self.runtime.no_pivot {
            command.arg("--no-pivot");
        }
        if self.runtime.no_new_keyring {
            command.arg("--no-new-keyring");
        }
        command.arg(self.id.as_str());
        command
    }

    /// `exec` (`program` as with [`Self::create`]), which leaves the new process behind, its pid in `pid_file`.
    pub fn exec(&self, program: &Path, process: &Path, pid_file: &Path, console: Option<&Path>) -> Command {
        let mut command = self.command_of(program, EXEC);
        command.arg("--process").arg(process).arg("--detach").arg("--pid-file").arg(pid_file);
        if let Some(console) = console {
            command.arg("--console-socket").arg(console);
        }
        command.arg(self.id.as_str());
        command
    }

    /// The runtime keeps something of this container.
    pub fn knows(&self) -> bool {
        self.state().exists()
    }

    /// The container has been created and waits for `start`: the FIFO on which runc's and crun's
    /// init waits is still there.
    pub fn waits_for_start(&self) -> bool {
        self.start_fifo().exists()
    }

    /// Tells runc that init has been let go, which a `runc start` that was cut off has not.
    pub fn note_start(&self) {
        // Not there is what we want.
        let _ = std::fs::remove_file(self.start_fifo());
    }

    fn start_fifo(&self) -> PathBuf {
        self.state().join("exec.fifo")
    }

    /// The file on which a running command holds a lock, for as long as it runs.
    pub(super) fn lock(&self) -> PathBuf {
        self.dir.join("runtime.lock")
    }

    /// What the runtime keeps of this container. An id has no slash and is not `..`.
    pub(super) fn state(&self) -> PathBuf {
        self.runtime.root.join(self.id.as_str())
    }

    /// Why a command failed, from the log that it was given.
    pub fn reason(&self, verb: &str, status: Option<ExitStatus>) -> String {
        last_error(&self.log(verb)).unwrap_or_else(|| match status {
            Some(status) => match (status.code(), status.signal()) {
                (Some(code), _) => format!("{} ended with code {code} and no message", self.binary_name()),
                (None, Some(signal)) => format!("{} was killed by signal {signal}", self.binary_name()),
                (None, None) => format!("{} ended in an unknown way", self.binary_name()),
            },
            None => format!("{} left no message", self.binary_name()),
        })
    }

    fn binary_name(&self) -> String {
        self.runtime.binary.file_name().unwrap_or_default().to_string_lossy().into_owned()
    }

    fn log(&self, verb: &str) -> PathBuf {
        self.dir.join(format!("{verb}.log"))
    }

    /// A command that the daemon runs.
    pub(super) fn command(&self, verb: &str) -> Command {
        self.command_of(&self.runtime.binary, verb)
    }

    fn command_of(&self, program: &Path, verb: &str) -> Command {
        let log = self.log(verb);
        // Both append: an old error must not be taken for a new one.
        let _ = fs::remove_file(&log);
        let mut command = Command::new(program);
        command.arg0(&self.runtime.binary);
        command.arg("--root").arg(&self.runtime.root).arg("--log").arg(log).args([
            "--log-format",
            "json",
            verb,
        ]);
        // Complete, for those who read it back (`sys/spawn.rs`).
        command.env_clear().envs(self.environment().unwrap_or_else(|| std::env::vars_os().collect()));
        command.env("PATH", &self.runtime.path);
        // The runtime would take systemd's words to us for its container.
        for name in
            ["NOTIFY_SOCKET", "LISTEN_FDS", "LISTEN_PID", "LISTEN_FDNAMES", "WATCHDOG_USEC", "WATCHDOG_PID"]
        {
            command.env_remove(name);
        }
        command
    }

    /// The environment of the task's containerd; nothing for a task of an earlier version.
    fn environment(&self) -> Option<Vec<(OsString, OsString)>> {
        let text = fs::read(&self.runtime.environment).ok()?;
        let variable = |entry: &[u8]| {
            let equals = entry.iter().position(|byte| *byte == b'=')?;
            let (name, value) = (entry.get(..equals)?, entry.get(equals + 1..)?);
            let is_name = !name.is_empty();
            is_name.then(|| (OsStr::from_bytes(name).to_owned(), OsStr::from_bytes(value).to_owned()))
        };
        Some(text.split(|byte| *byte == 0).filter_map(variable).collect())
    }
}

fn last_error(log: &Path) -> Option<String> {
    let mut file = File::open(log).ok()?;
    let length = file.metadata().ok()?.len();
    file.seek(SeekFrom::Start(length.saturating_sub(LOG_TAIL_BYTES))).ok()?;
    let mut text = Vec::new();
    file.take(LOG_TAIL_BYTES).read_to_end(&mut text).ok()?;
    last_error_in(&text)
}

/// The last error in the end of a log: objects of JSON, of a line each (runc, crun 1.21) or of several (crun 1.28).
pub fn last_error_in(text: &[u8]) -> Option<String> {
    #[derive(Deserialize)]
    struct Line {
        level: String,
        msg: String,
    }
    let text = String::from_utf8_lossy(text);
    let begins = text.match_indices('{').filter(|(at, _)| *at == 0 || text[..*at].ends_with('\n')).rev();
    // A text of nothing but beginnings is none of an OCI runtime.
    let mut lines = begins.take(MOST_LOG_ENTRIES).filter_map(|(at, _)| {
        serde_json::Deserializer::from_str(&text[at..]).into_iter::<Line>().next()?.ok()
    });
    lines.find(|line| matches!(line.level.as_str(), "error" | "fatal" | "panic")).map(|line| line.msg)
}

/// True for the programs runc and crun themselves, which mount nothing on the host: not for a script, nor for a
/// wrapper of another name, which may add hooks to the spec (as nvidia-container-runtime does).
pub fn is_plain(binary: &Path) -> bool {
    let is_known = binary.file_name().is_some_and(|name| name == "runc" || name == "crun");
    is_known && is_elf(binary)
}

/// True for a program, as opposed to a script.
pub(super) fn is_elf(binary: &Path) -> bool {
    let mut magic = [0; 4];
    File::open(binary).and_then(|mut file| file.read_exact(&mut magic)).is_ok() && &magic == b"\x7fELF"
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_error_of_the_log_is_the_reason() {
        let dir = tempfile::tempdir().unwrap();
        let log = dir.path().join("create.log");
        let text = concat!(
            "{\"level\":\"warning\",\"msg\":\"a\",\"time\":\"t\"}\n",
            "{\"level\":\"error\",\"msg\":\"first\",\"time\":\"t\"}\n",
            "not json\n",
            "{\"level\":\"error\",\"msg\":\"exec: \\\"nope\\\": executable file not found in $PATH\"}\n",
        );
        fs::write(&log, text).unwrap();
        assert_eq!(last_error(&log).unwrap(), "exec: \"nope\": executable file not found in $PATH");
        fs::write(&log, "{\n  \"msg\": \"over {two} lines\",\n  \"level\": \"error\"\n}").unwrap();
        assert_eq!(last_error(&log).unwrap(), "over {two} lines");
        assert_eq!(last_error(&dir.path().join("none.log")), None);
    }

    #[test]
    fn create_has_the_options_that_were_asked_for() {
        let runtime = Runtime {
            binary: "/usr/bin/runc".into(),
            root: "/run/r/default".into(),
            no_pivot: true,
            ..Runtime::default()
        };
        let id = TaskId::new("web").unwrap();
        let containerd = Containerd::default();
        let cli = Cli { runtime: &runtime, id: &id, containerd: &containerd, dir: Path::new("/run/x") };
        let command = cli.create(&runtime.binary, Path::new("/b"), Path::new("/run/x/init.pid"), None);
        let args: Vec<_> = command.get_args().map(|arg| arg.to_string_lossy().into_owned()).collect();
        assert_eq!(
            args.join(" "),
            "--root /run/r/default --log /run/x/create.log --log-format json create \
             --bundle /b --pid-file /run/x/init.pid --no-pivot web"
        );
    }
}
