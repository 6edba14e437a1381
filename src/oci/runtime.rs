//! The command line and the log of the OCI runtime. runc, crun and youki have the same commands.

use std::ffi::{OsStr, OsString};
use std::fs::{self, File};
use std::io::{self, Read};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus};
use std::time::Duration;

use async_trait::async_trait;

use crate::id::TaskId;
use crate::path_error::{PathError, io_error};
use crate::task::Task;
use crate::task::request::{Containerd, Runtime};

use super::log::last_error;
use super::state::Leftover;

/// Why a command of the OCI runtime failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The binary could not be run.
    #[error("OCI runtime {verb} failed: can't run {binary}: {source}")]
    Spawn {
        /// The command.
        verb: &'static str,
        binary: PathBuf,
        /// The error of the system call.
        #[source]
        source: io::Error,
    },
    /// There is no directory for the log of the command, and it can't be made.
    #[error("OCI runtime {verb} failed: there is no directory for its log: {source}")]
    Directory {
        /// The command that was not run.
        verb: &'static str,
        #[source]
        source: PathError,
    },
    /// The environment for the command can't be read. With another environment, its hooks could do something else.
    #[error("OCI runtime {verb} failed: the environment of its containerd is not known: {source}")]
    Environment {
        /// The command that was not run.
        verb: &'static str,
        #[source]
        source: PathError,
    },
    /// The command failed.
    #[error("OCI runtime {verb} failed: {reason}")]
    Failed {
        /// The command.
        verb: &'static str,
        /// The last error in its log.
        reason: String,
    },
    /// The command was killed by another process, or crashed.
    #[error("OCI runtime {verb} failed: {reason}")]
    Killed {
        /// The command.
        verb: &'static str,
        /// The last error in its log, or the signal.
        reason: String,
    },
    /// The command took too long, and was killed with every process that it had started.
    #[error("OCI runtime {verb} failed: it did not end within {} s and was killed (option RuntimeTimeoutSec)", .limit.as_secs())]
    TimedOut {
        /// The command.
        verb: &'static str,
        /// The time limit.
        limit: Duration,
    },
    /// The command waited for a process that one of its hooks has left behind, and was killed.
    #[error(
        "OCI runtime {verb} failed: a process that one of its hooks started keeps the hook's output open; such a process must close its standard streams"
    )]
    Orphan {
        /// The command.
        verb: &'static str,
    },
    /// An earlier command for the same container does not end, even after SIGKILL.
    #[error(
        "OCI runtime {verb} failed: an earlier command for this container (pid {pid}) did not end after SIGKILL; see /proc/{pid}/stack"
    )]
    Busy {
        /// The command that could not be run.
        verb: &'static str,
        /// The pid of the earlier command.
        pid: u32,
    },
}

impl Error {
    /// What the daemon does with the state of a container whose `delete` has failed with this error. If the runtime does not end,
    /// is killed twice, waits for a process that a hook has left behind, or can't read the state, the daemon removes the state
    /// itself. systemd ends the container's processes with the unit.
    pub fn leftover(&self) -> Leftover {
        match self {
            Self::Spawn { .. } | Self::Directory { .. } | Self::Environment { .. } => Leftover::Keep,
            Self::Failed { .. } => Leftover::KeepReadable,
            Self::Killed { .. } | Self::TimedOut { .. } | Self::Orphan { .. } | Self::Busy { .. } => {
                Leftover::Remove
            }
        }
    }
}

/// The name of the command [`Cli::exec`], and of its log.
pub const EXEC: &str = "exec";

/// The name of the command [`Cli::restore`], and of its log.
pub const RESTORE: &str = "restore";

/// The name of the command [`Cli::version`].
pub const VERSION: &str = "--version";

/// The OCI runtime, for one container.
#[derive(Clone, Copy, Debug)]
pub struct Cli<'a> {
    /// The binary and its options.
    pub runtime: &'a Runtime,
    /// The container.
    pub id: &'a TaskId,
    /// The containerd of its task, in whose namespaces the commands run.
    pub containerd: &'a Containerd,
    /// Its bundle.
    pub bundle: &'a Path,
    /// A directory for its logs.
    pub dir: &'a Path,
}

/// The commands of the OCI runtime that the daemon itself runs. Tests use a fake instead of
/// [`super::command::CommandLine`].
#[async_trait]
pub trait OciRuntime: Send + Sync {
    /// Starts the process of a created container. If the future is dropped, the command is killed.
    ///
    /// # Errors
    /// [`Error`]
    async fn start(&self, cli: &Cli<'_>) -> Result<(), Error>;

    /// Changes the limits of a container. `resources` is a file with OCI `LinuxResources`.
    ///
    /// # Errors
    /// [`Error`]
    async fn update(&self, cli: &Cli<'_>, resources: &Path) -> Result<(), Error>;

    /// Removes the runtime's state of a container. It is no error if there is none.
    ///
    /// # Errors
    /// [`Error`]. [`Error::leftover`] says what is to be done with the state then.
    async fn delete(&self, cli: &Cli<'_>) -> Result<(), Error>;

    /// Removes the cgroups of commands of an ended daemon, for a container that the runtime does not know any more.
    /// Such a command may still run: it has removed the state, and nothing else depends on it.
    async fn settle(&self, _cli: &Cli<'_>) {}

    /// Why the OCI runtime can't even print its version: for a command that has failed and left no message, because its standard
    /// error was that of a container. `None` if it can.
    async fn defect(&self, _cli: &Cli<'_>) -> Option<Error> {
        None
    }

    /// Runs `launch`, which becomes the OCI runtime or does something in its place. `verb` names it and its log, and
    /// `command` is its command line.
    ///
    /// # Errors
    /// [`Error`]
    async fn launch(
        &self,
        cli: &Cli<'_>,
        verb: &'static str,
        limit: Duration,
        command: &[String],
    ) -> Result<(), Error>;
}

impl<'a> Cli<'a> {
    /// The OCI runtime for a task, with its logs in `dir`.
    pub fn of(task: &'a Task, dir: &'a Path) -> Self {
        let bundle = &task.request.bundle;
        Self { runtime: &task.runtime, id: &task.key.id, containerd: &task.containerd, bundle, dir }
    }
}

impl Cli<'_> {
    /// The command `create`, for a process that becomes it. `program` is the binary or a copy of it. With a console socket,
    /// the init process gets a terminal.
    ///
    /// # Errors
    /// [`Error::Environment`]
    pub fn create(
        &self,
        program: &Path,
        bundle: &Path,
        pid_file: &Path,
        console: Option<&Path>,
    ) -> Result<Command, Error> {
        let mut command = self.command_of(program, "create")?;
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
        Ok(command)
    }

    /// The command `exec`, which starts a process, writes its pid to `pid_file` and exits. `program`: as for
    /// [`Self::create`].
    ///
    /// # Errors
    /// [`Error::Environment`]
    pub fn exec(
        &self,
        program: &Path,
        process: &Path,
        pid_file: &Path,
        console: Option<&Path>,
    ) -> Result<Command, Error> {
        let mut command = self.command_of(program, EXEC)?;
        command.arg("--process").arg(process).arg("--detach").arg("--pid-file").arg(pid_file);
        if let Some(console) = console {
            command.arg("--console-socket").arg(console);
        }
        command.arg(self.id.as_str());
        Ok(command)
    }

    /// The command `restore`, which makes a container of `images`, writes the pid of its init process to `pid_file` and
    /// exits. `program`: as for [`Self::create`].
    ///
    /// # Errors
    /// [`Error::Environment`]
    pub fn restore(
        &self,
        program: &Path,
        bundle: &Path,
        pid_file: &Path,
        console: Option<&Path>,
        options: &[OsString],
    ) -> Result<Command, Error> {
        let mut command = self.command_of(program, RESTORE)?;
        command.arg("--bundle").arg(bundle).arg("--detach").arg("--pid-file").arg(pid_file).args(options);
        if let Some(console) = console {
            command.arg("--console-socket").arg(console);
        }
        if self.runtime.no_pivot {
            command.arg("--no-pivot");
        }
        command.arg(self.id.as_str());
        Ok(command)
    }

    /// The command that prints the version.
    ///
    /// # Errors
    /// [`Error::Environment`]
    pub fn version(&self) -> Result<Command, Error> {
        let mut command = self.equipped(&self.runtime.binary, VERSION)?;
        command.arg(VERSION);
        Ok(command)
    }

    /// The command `checkpoint`.
    ///
    /// # Errors
    /// [`Error::Environment`]
    pub fn checkpoint(&self, options: &[OsString]) -> Result<Command, Error> {
        let mut command = self.command("checkpoint")?;
        command.args(options).arg(self.id.as_str());
        Ok(command)
    }

    /// The file that a command locks while it runs.
    pub(super) fn lock(&self) -> PathBuf {
        self.dir.join("runtime.lock")
    }

    /// The last error in the log of a command.
    pub fn logged(&self, verb: &str) -> Option<String> {
        last_error(&self.log(verb))
    }

    /// Why a command failed, according to its log, or else to what it said on standard error.
    pub fn reason(&self, verb: &str, status: ExitStatus, said: &str) -> String {
        self.logged(verb).unwrap_or_else(|| {
            let binary = self.runtime.binary.display();
            let how = match (status.code(), status.signal()) {
                (Some(code), _) => format!("{binary} ended with code {code}"),
                (None, Some(signal)) => format!("{binary} was killed by signal {signal}"),
                (None, None) => format!("{binary} ended in an unknown way"),
            };
            if said.is_empty() {
                format!("{how} and no message")
            } else {
                format!("{how} and the message: {said}")
            }
        })
    }

    /// Why there is no container, if `create` or `restore` has ended without a message.
    pub fn silence(&self) -> String {
        format!("{} left neither a message nor a process", self.runtime.binary.display())
    }

    /// The log of a command.
    pub fn log(&self, verb: &str) -> PathBuf {
        self.dir.join(format!("{verb}.log"))
    }

    /// A command that the daemon runs.
    pub(super) fn command(&self, verb: &'static str) -> Result<Command, Error> {
        self.command_of(&self.runtime.binary, verb)
    }

    fn command_of(&self, program: &Path, verb: &'static str) -> Result<Command, Error> {
        let log = self.log(verb);
        let mut command = self.equipped(program, verb)?;
        command.arg0(&self.runtime.binary);
        command.arg("--root").arg(&self.runtime.root).arg("--log").arg(log).args([
            "--log-format",
            "json",
            verb,
        ]);
        Ok(command)
    }

    /// A command that runs hooks. They expect the bundle as working directory, as under containerd-shim-runc-v2. containerd has
    /// its bundles below /run, which is in memory. A bundle elsewhere may be on a disk that does not answer, and a Delete
    /// has to work then: the command runs in `/`.
    pub(super) fn in_bundle(&self, verb: &'static str) -> Result<Command, Error> {
        let mut command = self.command(verb)?;
        if self.bundle.starts_with("/run") {
            command.current_dir(self.bundle);
        }
        Ok(command)
    }

    /// A command with the environment of the OCI runtime, and without an old log.
    pub(super) fn equipped(&self, program: &Path, verb: &'static str) -> Result<Command, Error> {
        // runc and crun append to the log: an old error must not be reported again.
        let _ = fs::remove_file(self.log(verb));
        let mut command = Command::new(program);
        // The complete environment, as `sys/spawn.rs` expects.
        let environment = self.environment().map_err(|source| Error::Environment { verb, source })?;
        command.env_clear().envs(environment.unwrap_or_else(|| std::env::vars_os().collect()));
        command.env("PATH", &self.runtime.path);
        // The runtime would pass the variables that systemd sets for this process to the container.
        for name in
            ["NOTIFY_SOCKET", "LISTEN_FDS", "LISTEN_PID", "LISTEN_FDNAMES", "WATCHDOG_USEC", "WATCHDOG_PID"]
        {
            command.env_remove(name);
        }
        Ok(command)
    }

    /// The environment of the task's containerd. `None` for a task of an earlier version, which has no file for it.
    fn environment(&self) -> Result<Option<Vec<(OsString, OsString)>>, PathError> {
        let path = &self.runtime.environment;
        let text = match fs::read(path) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(io_error("read", path)(error)),
        };
        let variable = |entry: &[u8]| {
            let equals = entry.iter().position(|byte| *byte == b'=')?;
            let (name, value) = (entry.get(..equals)?, entry.get(equals + 1..)?);
            let is_name = !name.is_empty();
            is_name.then(|| (OsStr::from_bytes(name).to_owned(), OsStr::from_bytes(value).to_owned()))
        };
        Ok(Some(text.split(|byte| *byte == 0).filter_map(variable).collect()))
    }
}

/// True for runc and crun themselves, which mount nothing on the host. False for a script, and for a program with another
/// name, which may add hooks to the spec (as nvidia-container-runtime does).
pub fn is_plain(binary: &Path) -> bool {
    let is_known = binary.file_name().is_some_and(|name| name == "runc" || name == "crun");
    is_known && is_elf(binary)
}

/// True for an ELF program, false for a script.
pub(super) fn is_elf(binary: &Path) -> bool {
    let mut magic = [0; 4];
    File::open(binary).and_then(|mut file| file.read_exact(&mut magic)).is_ok() && &magic == b"\x7fELF"
}

#[cfg(test)]
mod tests {
    use super::*;

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
        let cli = Cli {
            runtime: &runtime,
            id: &id,
            containerd: &containerd,
            bundle: Path::new("/b"),
            dir: Path::new("/run/x"),
        };
        let command =
            cli.create(&runtime.binary, Path::new("/b"), Path::new("/run/x/init.pid"), None).unwrap();
        let args: Vec<_> = command.get_args().map(|arg| arg.to_string_lossy().into_owned()).collect();
        assert_eq!(
            args.join(" "),
            "--root /run/r/default --log /run/x/create.log --log-format json create \
             --bundle /b --pid-file /run/x/init.pid --no-pivot web"
        );
    }

    #[test]
    fn a_command_has_the_environment_of_containerd_or_is_not_run() {
        let dir = tempfile::tempdir().unwrap();
        let variables = |environment: PathBuf| {
            let runtime = Runtime { environment, ..Runtime::default() };
            let (id, containerd) = (TaskId::new("web").unwrap(), Containerd::default());
            let cli = Cli {
                runtime: &runtime,
                id: &id,
                containerd: &containerd,
                bundle: dir.path(),
                dir: dir.path(),
            };
            let command = cli.command("start")?;
            let variables =
                command.get_envs().filter_map(|(name, value)| Some((name.to_owned(), value?.to_owned())));
            Ok::<_, Error>(variables.collect::<Vec<_>>())
        };
        let path = dir.path().join("environment");
        // A task of an earlier version.
        let of_daemon = variables(path.clone()).unwrap();
        let own: Vec<_> = std::env::vars_os().collect();
        assert!(of_daemon.len() > 1 && of_daemon.iter().all(|one| one.0 == "PATH" || own.contains(one)));
        fs::write(&path, "A=b\0=c\0").unwrap();
        let of_containerd = variables(path.clone()).unwrap();
        assert_eq!(
            of_containerd,
            [("A", "b"), ("PATH", "")].map(|(name, value)| (name.into(), value.into()))
        );
        fs::remove_file(&path).unwrap();
        fs::create_dir(&path).unwrap();
        let error = variables(path.clone()).unwrap_err();
        assert!(matches!(error, Error::Environment { verb: "start", .. }), "{error:?}");
        assert!(error.to_string().contains(path.to_str().unwrap()), "{error}");
        assert_eq!(error.leftover(), Leftover::Keep);
    }
}
