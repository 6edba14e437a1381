//! The OCI runtime's command line and its log. runc, crun and youki take the same words.

use std::ffi::{OsStr, OsString};
use std::fs::{self, File};
use std::io::{self, Read, Seek, SeekFrom};
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::time::Duration;

use async_trait::async_trait;
use nix::fcntl::{FcntlArg, fcntl};
use serde::Deserialize;
use tokio::time::timeout;

use crate::id::TaskId;
use crate::sys;
use crate::task::request::Runtime;

/// How much of the log's end is looked at for the reason of a failure.
const LOG_TAIL_BYTES: u64 = 64 << 10;

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
    /// It took too long and was killed, with all that it had started.
    #[error("OCI runtime {verb} failed: it was killed as it had not ended after {} s (option RuntimeTimeoutSec)", .limit.as_secs())]
    TimedOut {
        /// The command.
        verb: &'static str,
        /// How long it was given.
        limit: Duration,
    },
    /// An earlier command for the same container does not end, and can't be killed.
    #[error(
        "OCI runtime {verb} failed: an earlier command for this container (pid {pid}) does not end, although it was killed; see /proc/{pid}/stack"
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
    /// A directory for its logs.
    pub dir: &'a Path,
}

/// The seam between the daemon and the OCI runtime: the commands that the daemon itself runs. Tests put a fake in
/// the place of [`CommandLine`].
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

/// The OCI runtime as a program that is run for each command.
pub struct CommandLine;

#[async_trait]
impl OciRuntime for CommandLine {
    async fn start(&self, cli: &Cli<'_>) -> Result<(), Error> {
        cli.start().await
    }

    async fn update(&self, cli: &Cli<'_>, resources: &Path) -> Result<(), Error> {
        cli.update(resources).await
    }

    async fn delete(&self, cli: &Cli<'_>) -> Result<(), Error> {
        cli.delete().await
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

    /// Lets a created container's process run. Dropped before it resolves, the command is killed.
    ///
    /// # Errors
    /// [`Error`]
    async fn start(&self) -> Result<(), Error> {
        let mut command = self.command("start");
        command.arg(self.id.as_str());
        self.run("start", command).await
    }

    /// Gives a container other limits; `resources` is a file with OCI `LinuxResources`. Dropped before it resolves,
    /// the command is killed.
    ///
    /// # Errors
    /// [`Error`]
    async fn update(&self, resources: &Path) -> Result<(), Error> {
        let mut command = self.command("update");
        command.arg("--resources").arg(resources).arg(self.id.as_str());
        self.run("update", command).await
    }

    /// Removes what the runtime keeps of a container; no error if there is nothing.
    ///
    /// A runtime that does not end is killed, and its state of the container is removed without it: the container's
    /// processes are the unit's to end, and the id must be free again.
    ///
    /// # Errors
    /// [`Error`]
    async fn delete(&self) -> Result<(), Error> {
        let mut command = self.command("delete");
        command.arg("--force").arg(self.id.as_str());
        match self.run("delete", command).await {
            Err(error @ (Error::TimedOut { .. } | Error::Busy { .. })) => {
                tracing::warn!(id = %self.id, %error, "container {}: its state is removed without the OCI runtime: {error}", self.id);
                self.remove_state()
            }
            deleted => deleted,
        }
    }

    fn remove_state(&self) -> Result<(), Error> {
        match fs::remove_dir_all(self.state()) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                let reason = format!("remove {}: {error}", self.state().display());
                Err(Error::Failed { verb: "delete", reason })
            }
            _ => Ok(()),
        }
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

    /// What the runtime keeps of this container. An id has no slash and is not `..`.
    fn state(&self) -> PathBuf {
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

    fn command(&self, verb: &str) -> Command {
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
        if let Some(environment) = self.environment() {
            command.env_clear().envs(environment);
        }
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

    /// Waits for a command that an earlier daemon has begun: it goes on without that one. A command that takes too
    /// long is killed.
    ///
    /// # Errors
    /// [`Error::Busy`], or the lock can't be read.
    pub async fn settled(&self, verb: &'static str) -> Result<(), Error> {
        let unreadable = |source| Error::Spawn { verb, binary: self.runtime.binary.clone(), source };
        let Some(holder) = self.holder().map_err(unreadable)? else {
            return Ok(());
        };
        if timeout(self.runtime.limit(), holder.ended()).await.is_ok() {
            return Ok(());
        }
        tracing::warn!(id = %self.id, "container {}: an OCI runtime command that does not end is killed (pid {})", self.id, holder.pid);
        sys::tree::kill(holder.pid);
        timeout(DEATH_LIMIT, holder.ended()).await.map_err(|_| Error::Busy { verb, pid: holder.pid })
    }

    /// The command for this container that runs now, whoever has started it: it holds the lock.
    fn holder(&self) -> io::Result<Option<Holder>> {
        let file = File::options()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(self.lock())?;
        let holder_of = || -> io::Result<Option<u32>> {
            let mut found = sys::child::whole_file(nix::libc::F_WRLCK);
            fcntl(&file, FcntlArg::F_GETLK(&mut found))?;
            // A process of another pid namespace has no number here.
            let is_held = i32::from(found.l_type) != nix::libc::F_UNLCK;
            Ok(u32::try_from(found.l_pid).ok().filter(|pid| is_held && *pid != 0))
        };
        let Some(pid) = holder_of()? else {
            return Ok(None);
        };
        let process = match sys::pidfd_open(pid) {
            Ok(process) => process,
            Err(nix::errno::Errno::ESRCH) => return Ok(None),
            Err(errno) => return Err(errno.into()),
        };
        // Only now the number is known to be that of the holder.
        Ok((holder_of()? == Some(pid)).then_some(Holder { pid, process }))
    }

    /// The file on which a running command holds a lock, for as long as it runs.
    fn lock(&self) -> PathBuf {
        self.dir.join("runtime.lock")
    }

    /// Runs a command, with no other of this container beside it. Dropped before it resolves, the command is killed
    /// with all that it has started.
    async fn run(&self, verb: &'static str, mut command: Command) -> Result<(), Error> {
        let limit = self.runtime.limit();
        let failed = |source| Error::Spawn { verb, binary: self.runtime.binary.clone(), source };
        // Hooks may leave children behind: nothing of theirs may hold a pipe of ours open.
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        sys::child::locks(&mut command, &self.lock()).map_err(failed)?;
        let mut command = tokio::process::Command::from(command);
        let mut tries = 0;
        let child = loop {
            self.settled(verb).await?;
            tries += 1;
            match command.spawn() {
                // Another was faster.
                Err(error)
                    if tries < TRIES && error.raw_os_error() == Some(sys::child::LOCK_IS_HELD as i32) => {}
                spawned => break spawned.map_err(failed)?,
            }
        };
        let mut running = Running(child);
        let Ok(ended) = timeout(limit, running.0.wait()).await else {
            return Err(Error::TimedOut { verb, limit });
        };
        let status = ended.map_err(failed)?;
        if status.success() {
            return Ok(());
        }
        Err(Error::Failed { verb, reason: self.reason(verb, Some(status)) })
    }
}

/// How often a command may find that another has taken the lock before it.
const TRIES: u32 = 16;

/// How long a process may take to end after SIGKILL. One that takes longer sleeps in the kernel, perhaps for ever.
const DEATH_LIMIT: Duration = Duration::from_secs(2);

/// A command that holds the lock.
struct Holder {
    pid: u32,
    process: OwnedFd,
}

impl Holder {
    /// Resolves when it has ended.
    async fn ended(&self) {
        let ended = async { sys::ended(self.process.try_clone()?).await };
        if ended.await.is_err() {
            // It can't be watched: whoever waits gives up in time.
            std::future::pending::<()>().await;
        }
    }
}

/// A command that is killed, with all that it has started, when nobody waits for it any more. It is not waited for
/// then, as it may sleep in the kernel; tokio takes its exit when there is one.
struct Running(tokio::process::Child);

impl Drop for Running {
    fn drop(&mut self) {
        // There is no number once its exit has been taken.
        if let Some(pid) = self.0.id() {
            sys::tree::kill(pid);
        }
    }
}

/// The last error of a log: objects of JSON, of a line each (runc, crun 1.21) or of several (crun 1.28).
fn last_error(log: &Path) -> Option<String> {
    #[derive(Deserialize)]
    struct Line {
        level: String,
        msg: String,
    }
    let mut file = File::open(log).ok()?;
    let length = file.metadata().ok()?.len();
    file.seek(SeekFrom::Start(length.saturating_sub(LOG_TAIL_BYTES))).ok()?;
    let mut text = Vec::new();
    file.take(LOG_TAIL_BYTES).read_to_end(&mut text).ok()?;
    let text = String::from_utf8_lossy(&text);
    let begins = text.match_indices('{').filter(|(at, _)| *at == 0 || text[..*at].ends_with('\n')).rev();
    let mut lines = begins.filter_map(|(at, _)| {
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
        let dir = std::env::temp_dir().join(format!("runtime-test-{}", std::process::id()));
        fs::create_dir_all(&dir).unwrap();
        let log = dir.join("create.log");
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
        assert_eq!(last_error(&dir.join("none.log")), None);
        fs::remove_dir_all(&dir).unwrap();
    }

    /// A directory for a test, with an OCI runtime that is this shell script.
    fn scratch(name: &str, script: &str) -> (PathBuf, Runtime) {
        use std::os::unix::fs::PermissionsExt;
        let dir = std::env::temp_dir().join(format!("runtime-test-{name}-{}", std::process::id()));
        let _ = fs::remove_dir_all(&dir);
        fs::create_dir_all(dir.join("root/web")).unwrap();
        let binary = dir.join("runtime");
        fs::write(&binary, format!("#!/bin/sh\ncd {}\n{script}\n", dir.display())).unwrap();
        fs::set_permissions(&binary, fs::Permissions::from_mode(0o755)).unwrap();
        let path = std::env::var("PATH").unwrap();
        let runtime = Runtime { binary, root: dir.join("root"), path, limit_sec: 1, ..Runtime::default() };
        (dir, runtime)
    }

    /// The process whose number is in this file has ended, or does within the time.
    fn ends(file: &Path) -> bool {
        use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
        use std::os::fd::AsFd;
        let pid = fs::read_to_string(file).unwrap().trim().parse().unwrap();
        let Ok(process) = sys::pidfd_open(pid) else { return true };
        let limit = PollTimeout::try_from(Duration::from_secs(10)).unwrap();
        poll(&mut [PollFd::new(process.as_fd(), PollFlags::POLLIN)], limit) == Ok(1)
    }

    #[tokio::test]
    async fn a_command_that_does_not_end_is_killed_with_all_that_it_started() {
        let script = "trap '' TERM INT HUP; setsid sleep 1000 & echo $! > child; sleep 1000";
        let (dir, runtime) = scratch("hangs", script);
        let id = TaskId::new("web").unwrap();
        let cli = Cli { runtime: &runtime, id: &id, dir: &dir };
        let error = cli.start().await.unwrap_err();
        assert!(matches!(error, Error::TimedOut { verb: "start", .. }), "{error}");
        assert!(error.to_string().contains("after 1 s"), "{error}");
        cli.settled("start").await.unwrap();
        assert!(ends(&dir.join("child")));
        fs::remove_dir_all(&dir).unwrap();
    }

    #[tokio::test]
    async fn a_command_that_nobody_waits_for_is_killed() {
        let (dir, runtime) = scratch("dropped", "echo $$ > self; kill -USR1 $PPID; sleep 1000");
        let mut begun =
            tokio::signal::unix::signal(tokio::signal::unix::SignalKind::user_defined1()).unwrap();
        let runtime = Runtime { limit_sec: 1000, ..runtime };
        let id = TaskId::new("web").unwrap();
        let cli = Cli { runtime: &runtime, id: &id, dir: &dir };
        tokio::select! {
            ended = cli.start() => panic!("{ended:?}"),
            _ = begun.recv() => {}
        }
        assert!(ends(&dir.join("self")));
        fs::remove_dir_all(&dir).unwrap();
    }

    #[tokio::test]
    async fn commands_for_a_container_run_one_after_the_other_and_children_left_behind_hold_nothing_up() {
        let script = "mkdir running || exit 9; sleep 1000 & sleep 0.05; rmdir running";
        let (dir, runtime) = scratch("turns", script);
        let runtime = Runtime { limit_sec: 60, ..runtime };
        let id = TaskId::new("web").unwrap();
        let cli = Cli { runtime: &runtime, id: &id, dir: &dir };
        let ran = futures_util::future::join_all((0..4).map(|_| cli.start())).await;
        assert!(ran.iter().all(Result::is_ok), "{ran:?}");
        assert!(cli.holder().unwrap().is_none());
        fs::remove_dir_all(&dir).unwrap();
    }

    #[tokio::test]
    async fn a_delete_that_does_not_end_frees_the_id() {
        let (dir, runtime) = scratch("delete", "sleep 1000");
        let id = TaskId::new("web").unwrap();
        let cli = Cli { runtime: &runtime, id: &id, dir: &dir };
        assert!(cli.knows());
        cli.delete().await.unwrap();
        assert!(!cli.knows());
        fs::remove_dir_all(&dir).unwrap();
    }

    #[tokio::test]
    async fn a_command_runs_with_the_oom_score_of_an_ordinary_process() {
        let (dir, runtime) = scratch("oom", "cat /proc/self/oom_score_adj > score");
        let id = TaskId::new("web").unwrap();
        Cli { runtime: &runtime, id: &id, dir: &dir }.start().await.unwrap();
        assert_eq!(fs::read_to_string(dir.join("score")).unwrap(), "0\n");
        fs::remove_dir_all(&dir).unwrap();
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
        let cli = Cli { runtime: &runtime, id: &id, dir: Path::new("/run/x") };
        let command = cli.create(&runtime.binary, Path::new("/b"), Path::new("/run/x/init.pid"), None);
        let args: Vec<_> = command.get_args().map(|arg| arg.to_string_lossy().into_owned()).collect();
        assert_eq!(
            args.join(" "),
            "--root /run/r/default --log /run/x/create.log --log-format json create \
             --bundle /b --pid-file /run/x/init.pid --no-pivot web"
        );
    }
}
