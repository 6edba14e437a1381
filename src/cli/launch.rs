//! What runs inside of a unit: prepares what the OCI runtime (or a logger) needs, and becomes it.
//!
//! Reads the record that the daemon has written, and leaves the reason of a failure beside it. One
//! thread, no async runtime, nothing that stays.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use nix::sys::resource::{Resource, setrlimit};

use crate::cgroup;
use crate::config;
use crate::id::TaskKey;
use crate::oci::runtime::Cli;
use crate::oci::{bundle, mount as rootfs};
use crate::ops::{LAUNCH_ERROR, PID_FILE};
use crate::stdio::fifo;
use crate::store::Store;
use crate::task::wiring::{Input, Output, pipe};
use crate::task::{Placement, Task};
use crate::unit::properties::LAUNCH_SUBGROUP;

use super::Failure;

/// Made by the first `launch` of a record: a second one is `systemctl restart`, which is a stop.
const LAUNCHED: &str = "launched";

pub(super) fn run(what: &str, key: &TaskKey) -> Result<(), Failure> {
    let store = Store::new(config::STATE_DIR);
    let dir = store.dir(key);
    let task = match store.load(key) {
        Ok(Some(task)) => task,
        Ok(None) => {
            return Err(Failure(format!("task {key}: there is no record; only the shim starts this unit")));
        }
        Err(error) => return Err(Failure::new(error)),
    };
    let failure = match what {
        "logger" => become_logger(&task, &dir),
        _ => become_runtime(&task, &dir),
    };
    if what != "logger" && !matches!(failure, Error::Again) {
        // The daemon reads it; without it, it takes the OCI runtime's log.
        let _ = std::fs::write(dir.join(LAUNCH_ERROR), failure.to_string());
    }
    Err(Failure::new(failure))
}

/// Why nothing was launched.
#[derive(Debug, thiserror::Error)]
enum Error {
    #[error("this container has run already: a restart of its unit is a stop, containerd makes new ones")]
    Again,
    #[error(transparent)]
    Cgroup(#[from] cgroup::Error),
    #[error(transparent)]
    Bundle(#[from] bundle::Error),
    #[error(transparent)]
    Mount(#[from] rootfs::Error),
    #[error(transparent)]
    Stream(#[from] fifo::Error),
    #[error("{action}: {source}")]
    System {
        action: &'static str,
        #[source]
        source: io::Error,
    },
    #[error("OCI runtime create failed: can't run {binary}: {source}")]
    Exec {
        binary: PathBuf,
        #[source]
        source: io::Error,
    },
}

fn system(action: &'static str) -> impl FnOnce(nix::Error) -> Error {
    move |errno| Error::System { action, source: errno.into() }
}

/// Returns only if it fails.
fn become_runtime(task: &Task, dir: &Path) -> Error {
    match prepare(task, dir) {
        Ok(mut command) => {
            // exec also gives SIGPIPE its default back, which Rust had ignored.
            let source = command.exec();
            Error::Exec { binary: task.runtime.binary.clone(), source }
        }
        Err(error) => error,
    }
}

fn prepare(task: &Task, dir: &Path) -> Result<Command, Error> {
    match OpenOptions::new().write(true).create_new(true).mode(0o600).open(dir.join(LAUNCHED)) {
        Ok(_) => {}
        Err(e) if e.kind() == io::ErrorKind::AlreadyExists => return Err(Error::Again),
        Err(source) => return Err(Error::System { action: "mark the record as launched", source }),
    }
    let bundle = &task.request.bundle;
    if let Placement::Unit { child, .. } = &task.placement {
        let unit = enter_launch_cgroup()?;
        bundle::set_cgroups_path(bundle, &unit.join(child))?;
    }
    if !task.request.rootfs.is_empty() {
        if !task.rootfs_on_host {
            own_mount_namespace()?;
        }
        rootfs::mount_all(&bundle.join("rootfs"), &task.request.rootfs)?;
    }
    let streams = open_streams(task, dir)?;
    for (resource, soft, hard) in &task.containerd.rlimits {
        set_limit(*resource, *soft, *hard)?;
    }
    let cli = Cli { runtime: &task.runtime, id: &task.key.id, dir };
    let mut command = cli.create(bundle, &dir.join(PID_FILE));
    let [stdin, stdout, stderr] = streams;
    command.stdin(stdin).stdout(stdout).stderr(stderr);
    Ok(command)
}

/// The OCI runtime works in a cgroup beside the container's: what it uses is not the container's, and
/// the unit's own cgroup must have no processes once controllers are enabled in it. systemd 254 and
/// later starts us there (DelegateSubgroup=), an older one in the unit's own.
fn enter_launch_cgroup() -> Result<PathBuf, Error> {
    let own = cgroup::of_self()?;
    if own.file_name().is_some_and(|name| name == LAUNCH_SUBGROUP) {
        return Ok(own.parent().map(Path::to_owned).unwrap_or_default());
    }
    cgroup::enter(&own.join(LAUNCH_SUBGROUP))?;
    Ok(own)
}

/// A mount namespace that sees what the host mounts, and keeps to itself what is mounted here.
fn own_mount_namespace() -> Result<(), Error> {
    unshare(CloneFlags::CLONE_NEWNS).map_err(system("make a mount namespace"))?;
    mount(None::<&str>, "/", None::<&str>, MsFlags::MS_REC | MsFlags::MS_SLAVE, None::<&str>)
        .map_err(system("make the mount namespace a slave of the host's"))
}

fn open_streams(task: &Task, dir: &Path) -> Result<[Stdio; 3], Error> {
    let stdin = match &task.wiring.stdin {
        Input::Null => Stdio::null(),
        // The daemon has the other end, so this does not wait.
        Input::Fifo(path) => fifo::open_blocking_reader(path)?.into(),
    };
    let stdout = open_output(&task.wiring.stdout, task.wiring.stdout_pipe(), task, dir)?;
    let stderr = open_output(&task.wiring.stderr, task.wiring.stderr_pipe(), task, dir)?;
    Ok([stdin, stdout, stderr])
}

fn open_output(output: &Output, own_pipe: Option<&str>, task: &Task, dir: &Path) -> Result<Stdio, Error> {
    let file = match (output, own_pipe) {
        (Output::Journal, _) => return Ok(Stdio::inherit()),
        (Output::Fifo(path), _) => fifo::open_output(path, config::STDIO_LIMIT)?,
        (Output::File { .. } | Output::Logger, Some(name)) => fifo::open_both(&dir.join(name))?,
        // Writable, unlike with containerd-shim-runc-v2: programs don't expect EBADF.
        (Output::Null | Output::File { .. } | Output::Logger, _) => return Ok(dev_null()?.into()),
    };
    let (uid, gid) = task.runtime.io_owner;
    if (uid, gid) != (0, 0) {
        let (uid, gid) = (nix::unistd::Uid::from_raw(uid), nix::unistd::Gid::from_raw(gid));
        nix::unistd::fchown(&file, Some(uid), Some(gid)).map_err(system("give a stream its owner"))?;
    }
    Ok(file.into())
}

fn dev_null() -> Result<File, Error> {
    let opened = OpenOptions::new().read(true).write(true).open("/dev/null");
    opened.map_err(|source| Error::System { action: "open /dev/null", source })
}

/// Limits that containers inherit under runc.v2, from containerd; systemd's defaults differ.
fn set_limit(resource: u32, soft: u64, hard: u64) -> Result<(), Error> {
    let known = RESOURCES.iter().find(|known| **known as u32 == resource);
    // A number that this version does not know is one that it did not write.
    known.map_or(Ok(()), |known| setrlimit(*known, soft, hard).map_err(system("set a resource limit")))
}

/// The resource limits that a process inherits.
pub(super) const RESOURCES: [Resource; 15] = [
    Resource::RLIMIT_CPU,
    Resource::RLIMIT_FSIZE,
    Resource::RLIMIT_DATA,
    Resource::RLIMIT_STACK,
    Resource::RLIMIT_CORE,
    Resource::RLIMIT_RSS,
    Resource::RLIMIT_NPROC,
    Resource::RLIMIT_NOFILE,
    Resource::RLIMIT_MEMLOCK,
    Resource::RLIMIT_AS,
    Resource::RLIMIT_LOCKS,
    Resource::RLIMIT_SIGPENDING,
    Resource::RLIMIT_MSGQUEUE,
    Resource::RLIMIT_NICE,
    Resource::RLIMIT_RTPRIO,
];

/// Returns only if it fails.
fn become_logger(task: &Task, dir: &Path) -> Error {
    let Some(logger) = &task.wiring.logger else {
        return Error::System { action: "find the logger", source: io::ErrorKind::NotFound.into() };
    };
    let pipes = || -> Result<Vec<OwnedFd>, Error> {
        let stdout = fifo::open_blocking_reader(&dir.join(pipe::STDOUT))?;
        let stderr = fifo::open_blocking_reader(&dir.join(pipe::STDERR))?;
        let ready = OpenOptions::new().write(true).open(dir.join(pipe::READY));
        let ready =
            ready.map_err(|source| Error::System { action: "open the logger's ready pipe", source })?;
        Ok(vec![stdout.into(), stderr.into(), ready.into()])
    };
    let mut command = Command::new(&logger.program);
    command
        .args(&logger.args)
        .env_clear()
        .env("CONTAINER_ID", task.key.id.as_str())
        .env("CONTAINER_NAMESPACE", task.key.namespace.as_str())
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    let placed =
        pipes().and_then(|pipes| crate::sys::place_from_three(pipes).map_err(system("place the pipes")));
    match placed {
        Ok(()) => Error::Exec { binary: logger.program.clone(), source: command.exec() },
        Err(error) => {
            // A person reads it in the journal of the logger's unit.
            let _ = writeln!(io::stderr(), "{error}");
            error
        }
    }
}
