//! Runs the commands of the OCI runtime that the daemon needs: `start`, `update`, `delete`, and `launch` in its place.
//!
//! They run outside of the cgroup of the daemon's service. `systemctl kill` of the service kills that whole cgroup, and a
//! killed `runc start` can end its container. The next daemon waits for the command that runs.
//!
//! Each command has a cgroup of its own. The daemon kills a command that takes too long with all processes in this cgroup,
//! also with those that have become daemons. If a command ends by itself, processes that a hook has left behind continue, as
//! under containerd-shim-runc-v2: a hook may start a daemon.
//!
//! They run in the mount and network namespaces of the task's containerd, so that hooks see what they see under
//! containerd-shim-runc-v2.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};
use tokio::time::timeout;

use crate::cgroup::{self, cgroups_path};
use crate::config;
use crate::fault::{self, Failure};
use crate::files;
use crate::path_error::io_error;
use crate::sys;
use crate::sys::bounded_file::Messages;
use crate::sys::spawn::{self, Setup};

use super::namespaces;
use super::runtime::{Cli, Error, OciRuntime, VERSION};

/// Runs the OCI runtime's program for each command.
#[derive(Debug, Default)]
pub struct CommandLine {
    /// The cgroup below which each command has its own. `None`: commands run in the cgroup of this process.
    cgroup: Option<PathBuf>,
}

/// How long a command waits for a process that one of its hooks has left behind. A daemon that a hook starts closes its
/// standard streams within this time.
const ORPHAN_LIMIT: Duration = Duration::from_secs(5);
/// How often the daemon checks whether a command waits for such a process.
const ORPHAN_INTERVAL: Duration = Duration::from_secs(1);
/// How long an OCI runtime may take to print its version.
const VERSION_LIMIT: Duration = Duration::from_secs(10);

#[async_trait]
impl OciRuntime for CommandLine {
    async fn start(&self, cli: &Cli<'_>) -> Result<(), Error> {
        let mut command = cli.in_bundle("start")?;
        command.arg(cli.id.as_str());
        self.run(cli, "start", &command).await
    }

    async fn update(&self, cli: &Cli<'_>, resources: &Path) -> Result<(), Error> {
        let mut command = cli.command("update")?;
        command.arg("--resources").arg(resources).arg(cli.id.as_str());
        self.run(cli, "update", &command).await
    }

    /// A runtime that was killed gets a second chance.
    async fn delete(&self, cli: &Cli<'_>) -> Result<(), Error> {
        let mut command = cli.in_bundle("delete")?;
        command.arg("--force").arg(cli.id.as_str());
        let mut deleted = self.run(cli, "delete", &command).await;
        if matches!(deleted, Err(Error::Killed { .. })) {
            deleted = self.run(cli, "delete", &command).await;
        }
        self.remove_cgroups(cli).await;
        deleted
    }

    async fn settle(&self, cli: &Cli<'_>) {
        // A command that takes longer waits for a process that a hook has left behind. The daemon removes its cgroup later, once
        // the cgroup is empty.
        if cli.lock().exists()
            && !matches!(timeout(ORPHAN_LIMIT, cli.settled("delete", cli.runtime.limit())).await, Ok(Ok(())))
        {
            return;
        }
        self.remove_cgroups(cli).await;
    }

    async fn defect(&self, cli: &Cli<'_>) -> Option<Error> {
        match cli.version() {
            Ok(command) => {
                let late = Err(Error::TimedOut { verb: VERSION, limit: VERSION_LIMIT });
                timeout(VERSION_LIMIT, self.run(cli, VERSION, &command)).await.unwrap_or(late).err()
            }
            Err(error) => Some(error),
        }
    }

    async fn launch(
        &self,
        cli: &Cli<'_>,
        verb: &'static str,
        limit: Duration,
        command: &[String],
    ) -> Result<(), Error> {
        let program = command.first().map(String::as_str).unwrap_or_default();
        let arguments = command.iter().skip(1);
        let mut command = cli.equipped(Path::new(program), verb)?;
        command.args(arguments);
        self.run_for(cli, verb, limit, &command).await
    }
}

impl CommandLine {
    /// Runs commands below this cgroup, which is created when it is needed.
    pub fn in_cgroup(cgroup: PathBuf) -> Self {
        Self { cgroup: Some(cgroup) }
    }

    /// The cgroup of the next command for a container. No cgroup is used twice: a process that a hook has left behind in one
    /// must not be killed with a later command.
    fn new_cgroup(&self, cli: &Cli<'_>) -> Option<PathBuf> {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let (pid, number) = (std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        self.cgroup.as_ref().map(|parent| parent.join(format!("{}{pid}.{number}", prefix(cli))))
    }

    /// Removes the cgroups of commands during which an earlier daemon has ended.
    async fn remove_cgroups(&self, cli: &Cli<'_>) {
        let (all, prefix) = (self.cgroup.as_deref().map(cgroup::children).unwrap_or_default(), prefix(cli));
        let is_own = |cgroup: &PathBuf| {
            cgroup.file_name().is_some_and(|name| name.to_string_lossy().starts_with(&prefix))
        };
        for cgroup in all.iter().filter(|cgroup| is_own(cgroup)) {
            remove_cgroup(cgroup).await;
        }
    }

    /// Runs a command while no other command of this container runs. If the future is dropped, the command is killed with
    /// every process that it has started.
    async fn run(&self, cli: &Cli<'_>, verb: &'static str, command: &Command) -> Result<(), Error> {
        self.run_for(cli, verb, cli.runtime.limit(), command).await
    }

    async fn run_for(
        &self,
        cli: &Cli<'_>,
        verb: &'static str,
        limit: Duration,
        command: &Command,
    ) -> Result<(), Error> {
        // Somebody may have removed it with the record, and a Delete has to work then.
        let made = files::make_dir(cli.dir, 0o700).map_err(io_error("create", cli.dir));
        made.map_err(|source| Error::Directory { verb, source })?;
        let killed = fault::due(&[Failure::RuntimeKilled]).map(|_| killed());
        let command = killed.as_ref().unwrap_or(command);
        let failed = |source| Error::Spawn { verb, binary: cli.runtime.binary.clone(), source };
        let (cgroup, messages) = (self.new_cgroup(cli), Messages::new());
        let mut tries = 0;
        let late = |_| Error::TimedOut { verb, limit };
        let mut running = loop {
            cli.settled(verb, limit).await?;
            tries += 1;
            let started = match spawn(cli, command, cgroup.as_deref(), &messages) {
                Ok(child) => {
                    let mut running = Running { child: Some(child), cgroup: cgroup.clone() };
                    // The program may be on a disk that does not answer.
                    timeout(limit, running.started()).await.map_err(late)?.map(|()| running)
                }
                Err(error) => Err(error),
            };
            match started {
                Err(error) if tries < TRIES && is_passing(&error) => {}
                started => break started.map_err(failed)?,
            }
        };
        let pid = running.id();
        let ended = tokio::select! {
            ended = timeout(limit, running.ended()) => ended,
            () = waits_for_orphan(pid, cgroup.as_deref()), if verb == "delete" => {
                // The process that was left behind continues to run.
                running.cgroup = None;
                return Err(Error::Orphan { verb });
            }
        };
        let status = ended.map_err(late)?.map_err(failed)?;
        if let Some(cgroup) = &cgroup {
            // Somebody else has killed the command.
            if status.signal().is_some() {
                log_kill(cgroup::kill(cgroup).await);
            }
            remove_cgroup(cgroup).await;
        }
        if status.success() {
            return Ok(());
        }
        let reason = cli.reason(verb, status, &messages.text());
        Err(match status.signal() {
            Some(_) => Error::Killed { verb, reason },
            None => Error::Failed { verb, reason },
        })
    }
}

/// The beginning of the names of a container's cgroups. Two containerds can have a container with the same id, but not
/// with the same directory.
fn prefix(cli: &Cli<'_>) -> String {
    let dir = cli.dir.strip_prefix(config::STATE_DIR).unwrap_or(cli.dir).to_string_lossy();
    cgroups_path::escape(&format!("{}+", dir.trim_start_matches('/').replace('/', "+")))
}

fn spawn(
    cli: &Cli<'_>,
    command: &Command,
    cgroup: Option<&Path>,
    messages: &Messages,
) -> io::Result<spawn::Child> {
    let cgroup = cgroup.map(cgroup::open_made).transpose().map_err(io::Error::other)?;
    let cgroup = cgroup.as_ref().map(AsFd::as_fd);
    let namespaces = namespaces::open(cli.containerd).unwrap_or_else(|error| {
        tracing::warn!(id = %cli.id, %error, "container {}: {error}; the OCI runtime and its hooks run in the host's namespaces", cli.id);
        Vec::new()
    });
    let messages = messages.file().map(OwnedFd::from);
    spawn::spawn(command, Setup { lock: &cli.lock(), cgroup, namespaces, messages })
}

/// Resolves when a command does nothing but wait for the output of a process that its hook has left behind, for
/// [`ORPHAN_LIMIT`].
async fn waits_for_orphan(pid: u32, cgroup: Option<&Path>) {
    let Some(cgroup) = cgroup else {
        return std::future::pending().await;
    };
    let mut since = None;
    loop {
        tokio::time::sleep(ORPHAN_INTERVAL).await;
        // Most commands that hang wait for a child. These need no thread, although many of them may hang.
        let waits = !sys::tree::has_living_child(pid) && {
            let others = cgroup.to_owned();
            let look = tokio::task::spawn_blocking(move || {
                let others = cgroup::processes::processes(&others).unwrap_or_default();
                sys::tree::waits_for_one_of(pid, &others)
            });
            look.await.unwrap_or(false)
        };
        if !waits {
            since = None;
        } else if since.get_or_insert_with(Instant::now).elapsed() >= ORPHAN_LIMIT {
            return;
        }
    }
}

fn log_kill(killed: Result<(), cgroup::Error>) {
    if let Err(error) = killed {
        tracing::warn!(%error, "can't kill the processes that a command of the OCI runtime has left behind: {error}");
    }
}

/// Removes the cgroup of a command that has ended, unless a process that a hook left behind runs in it.
async fn remove_cgroup(cgroup: &Path) {
    if let Err(error) = cgroup::remove(cgroup).await {
        tracing::warn!(%error, "can't remove the cgroup of a command of the OCI runtime: {error}");
    }
}

/// A command that kills itself. A test can request that the daemon runs this command instead.
fn killed() -> Command {
    let mut command = Command::new("/bin/sh");
    command.args(["-c", "kill -9 $$"]);
    command
}

/// True if another try can help: another command took the lock first, or the empty cgroup was removed.
fn is_passing(error: &io::Error) -> bool {
    [sys::child::LOCK_IS_HELD, Errno::ENODEV].iter().any(|errno| error.raw_os_error() == Some(*errno as i32))
}

/// True for the cgroup of one command.
fn is_of_one_command(cgroup: &Path) -> bool {
    let all = Path::new(config::RUNTIME_CGROUP).join(config::COMMANDS_CGROUP);
    cgroup.parent().is_some_and(|parent| parent.ends_with(all))
}

impl Cli<'_> {
    /// Waits for a command that an earlier daemon has begun, which continues without that daemon. A command that takes
    /// too long is killed.
    ///
    /// # Errors
    /// [`Error::Busy`], or the lock can't be read.
    pub async fn settled(&self, verb: &'static str, limit: Duration) -> Result<(), Error> {
        self.settled_unless(verb, limit, std::future::pending()).await
    }

    /// As [`Self::settled`]. Kills the command also when `must_end` resolves.
    ///
    /// # Errors
    /// As [`Self::settled`].
    pub async fn settled_unless(
        &self,
        verb: &'static str,
        limit: Duration,
        must_end: impl Future<Output = ()>,
    ) -> Result<(), Error> {
        let unreadable = |source| Error::Spawn { verb, binary: self.runtime.binary.clone(), source };
        let Some(holder) = self.holder().map_err(unreadable)? else {
            return Ok(());
        };
        tokio::select! {
            ended = timeout(limit, holder.ended()) => {
                if ended.is_ok() {
                    return Ok(());
                }
                tracing::warn!(id = %self.id, "container {}: killing an OCI runtime command that takes too long (pid {})", self.id, holder.pid);
            }
            () = must_end => {}
        }
        // A command of an earlier version has no cgroup of its own.
        if let Some(cgroup) = cgroup::of_process(holder.pid).ok().filter(|cgroup| is_of_one_command(cgroup)) {
            log_kill(cgroup::kill(&cgroup).await);
        }
        // The search takes as long as the machine has processes. The pid is not reused meanwhile: the command holds the lock
        // until it ends, and its parent reaps it.
        let pid = holder.pid;
        let _ = tokio::task::spawn_blocking(move || sys::tree::kill(pid)).await;
        timeout(DEATH_LIMIT, holder.ended()).await.map_err(|_| Error::Busy { verb, pid: holder.pid })
    }

    /// The running command for this container, which holds the lock. An earlier daemon may have started it.
    fn holder(&self) -> io::Result<Option<Holder>> {
        let mut options = File::options();
        let options = options.read(true).write(true).create(true).truncate(false).mode(0o600);
        let file = match options.open(self.lock()) {
            // There is no directory, so no command has the lock.
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            opened => opened?,
        };
        let holder_of = || -> io::Result<Option<u32>> {
            let mut found = sys::child::whole_file(nix::libc::F_WRLCK);
            fcntl(&file, FcntlArg::F_GETLK(&mut found))?;
            // A process in another pid namespace has no pid here.
            let is_held = i32::from(found.l_type) != nix::libc::F_UNLCK;
            Ok(u32::try_from(found.l_pid).ok().filter(|pid| is_held && *pid != 0))
        };
        let Some(pid) = holder_of()? else {
            return Ok(None);
        };
        let process = match sys::pidfd_open(pid) {
            Ok(process) => process,
            Err(Errno::ESRCH) => return Ok(None),
            Err(errno) => return Err(errno.into()),
        };
        // The pid was not reused: its process still holds the lock.
        Ok((holder_of()? == Some(pid)).then_some(Holder { pid, process }))
    }
}

/// How often a command is tried again because another one took the lock first, or its cgroup was removed.
const TRIES: u32 = 16;

/// How long a process may take to end after SIGKILL. One that takes longer hangs in the kernel.
const DEATH_LIMIT: Duration = Duration::from_secs(2);

/// A command that holds the lock.
struct Holder {
    pid: u32,
    process: OwnedFd,
}

impl Holder {
    /// Waits until the command has ended.
    async fn ended(&self) {
        let ended = async { sys::ended(self.process.try_clone()?).await };
        if ended.await.is_err() {
            // The process can't be watched. The caller has a time limit.
            std::future::pending::<()>().await;
        }
    }
}

/// A command that is killed on drop, with every process that it has started. A task then reaps it, which can take long if
/// the command hangs in the kernel.
struct Running {
    /// The command, until it has ended.
    child: Option<spawn::Child>,
    /// The cgroup that is killed with it.
    cgroup: Option<PathBuf>,
}

impl Running {
    /// Its pid; 0 if it has ended.
    fn id(&self) -> u32 {
        self.child.as_ref().map_or(0, spawn::Child::id)
    }

    async fn started(&mut self) -> io::Result<()> {
        let child = self.child.as_mut().ok_or(io::ErrorKind::NotFound)?;
        let started = child.started().await;
        if started.is_err() {
            // It was reaped.
            self.child = None;
        }
        started
    }

    async fn ended(&mut self) -> io::Result<std::process::ExitStatus> {
        let child = self.child.as_mut().ok_or(io::ErrorKind::NotFound)?;
        let status = child.wait().await?;
        self.child = None;
        Ok(status)
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let Some(mut child) = self.child.take() else {
            return;
        };
        // A thread that may wait does this: the kernel may hold a lock, and the search takes as long as the machine has processes.
        // The pid can't be reused before the process is reaped.
        let (pid, cgroup) = (child.id(), self.cgroup.take());
        let to_kill = cgroup.clone();
        let kill = move || {
            to_kill.into_iter().for_each(|cgroup| log_kill(cgroup::kill_blocking(&cgroup)));
            sys::tree::kill(pid);
        };
        let Ok(runtime) = tokio::runtime::Handle::try_current() else {
            return kill();
        };
        let killed = runtime.spawn_blocking(kill);
        runtime.spawn(async move {
            // Fails only while the runtime ends.
            let _ = killed.await;
            drop(child.wait().await);
            if let Some(cgroup) = cgroup {
                remove_cgroup(&cgroup).await;
            }
        });
    }
}

#[cfg(test)]
mod tests;
