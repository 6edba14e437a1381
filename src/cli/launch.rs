//! What runs inside of a unit: prepares what the OCI runtime (or a logger) needs, and becomes it.
//!
//! Reads the record that the daemon has written, and leaves the reason of a failure beside it. One
//! thread, no async runtime, nothing that stays.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use nix::errno::Errno;
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, CpuSet, sched_getaffinity, sched_setaffinity, unshare};
use nix::sys::prctl::set_child_subreaper;
use nix::sys::resource::{Resource, setrlimit};
use nix::unistd::Pid;

use crate::cgroup;
use crate::config;
use crate::id::{ExecId, ProcessKey};
use crate::oci::bundle::{self, Edits};
use crate::oci::mount as rootfs;
use crate::oci::runtime::{self, Cli};
use crate::oci::sealed::{self, Place};
use crate::ops::{
    EXEC_PID_FILE, LAUNCH_CGROUP, LAUNCH_ERROR, LAUNCHED, PID_FILE, PROCESS_SPEC, SEALED_RUNTIME,
};
use crate::stdio::fifo;
use crate::store::{self, Store};
use crate::task::exec::Outcome;
use crate::task::phase::Exit;
use crate::task::wiring::{Input, Output, Wiring, pipe};
use crate::task::{Placement, Task};
use crate::unit::name;

use super::arguments::Launch;
use super::bounded::{self, End};
use super::{Failure, handoff, namespaces};

pub(super) fn run(what: Launch, key: &ProcessKey) -> Result<(), Failure> {
    let store = Store::new(config::STATE_DIR);
    let task = match store.load_with(&key.task, key.exec.as_ref()) {
        Ok(Some(task)) => task,
        Ok(None) => {
            return Err(Failure(format!("{key}: there is no record; only the shim starts this unit")));
        }
        Err(error) => return Err(Failure::new(error)),
    };
    let Some(process) = Process::of(&store, &task, key.exec.as_ref()) else {
        return Err(Failure(format!("{key}: the record has no such exec; only the shim starts this unit")));
    };
    let entered = match what {
        Launch::Container | Launch::Logger => namespaces::enter(&task.containerd),
        Launch::Exec => {
            namespaces::enter_host();
            Ok(())
        }
    };
    let failure = match (entered, what) {
        (Err(error), _) => error.into(),
        (Ok(()), Launch::Container) => become_runtime(&process),
        (Ok(()), Launch::Exec) => return exec(&process).map_err(Failure::new),
        (Ok(()), Launch::Logger) => {
            let failure = become_logger(&process);
            return Err(Failure::new(failure));
        }
    };
    if !matches!(failure, Error::Again) {
        // The daemon reads it; without it, it takes the OCI runtime's log.
        let _ = std::fs::write(process.dir.join(LAUNCH_ERROR), failure.to_string());
    }
    Err(Failure::new(failure))
}

/// The process to launch, as the record has it.
struct Process<'a> {
    task: &'a Task,
    exec: Option<&'a ExecId>,
    /// Its small files.
    dir: PathBuf,
    wiring: &'a Wiring,
    /// Its console socket, if it is to have a terminal.
    console: Option<PathBuf>,
}

impl<'a> Process<'a> {
    fn of(store: &Store, task: &'a Task, exec: Option<&'a ExecId>) -> Option<Self> {
        let (dir, unit, wiring) = match exec {
            None => (store.dir(&task.key), &task.unit, &task.wiring),
            Some(id) => {
                let exec = task.execs.get(id)?;
                (store.exec_dir(&task.key, id), &exec.unit, &exec.wiring)
            }
        };
        let console = wiring.terminal.then(|| store.console(&name::short_name(unit)));
        Some(Self { task, exec, dir, wiring, console })
    }

    fn cli(&self) -> Cli<'_> {
        Cli { runtime: &self.task.runtime, id: &self.task.key.id, dir: &self.dir }
    }

    /// Notes that it is launched: a second time is `systemctl restart`, which is a stop.
    fn mark(&self) -> Result<(), Error> {
        let opened =
            OpenOptions::new().write(true).create_new(true).mode(0o600).open(self.dir.join(LAUNCHED));
        match opened {
            Ok(_) => Ok(()),
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => Err(Error::Again),
            Err(source) => Err(Error::System { action: "mark the record as launched", source }),
        }
    }

    /// Tells the daemon what became of its start.
    fn tell(&self, outcome: &Outcome) -> Result<(), Error> {
        Store::write_outcome(&self.dir, outcome)?;
        // A daemon that is not there just now finds the file when it is back.
        let doorbell = self.dir.join(pipe::DOORBELL);
        let _ = OpenOptions::new().write(true).custom_flags(nix::libc::O_NONBLOCK).open(doorbell);
        Ok(())
    }

    /// The limits and processors that containers have under runc.v2, from containerd; those of systemd differ.
    fn limit(&self) -> Result<(), Error> {
        let wanted = &self.task.containerd.processors;
        if !wanted.is_empty() && processors().ok().as_ref() != Some(wanted) {
            use_processors(wanted)?;
        }
        for (resource, soft, hard) in &self.task.containerd.rlimits {
            set_limit(*resource, *soft, *hard)?;
        }
        Ok(())
    }

    /// A copy of the OCI runtime in memory, if the daemon has one.
    fn sealed_runtime(&self) -> Option<File> {
        std::env::var(SEALED_RUNTIME).ok()?.parse::<Place>().ok()?.open()
    }

    /// Runs the copy of the OCI runtime, or, if the kernel refuses to execute that, the binary itself.
    fn with_runtime<T>(&self, run: impl Fn(&Path) -> Result<T, Error>) -> Result<T, Error> {
        if let Some(copy) = self.sealed_runtime() {
            match run(&sealed::path_of(&copy)) {
                Err(Error::Exec { .. }) => {}
                ran => return ran,
            }
        }
        run(&self.task.runtime.binary)
    }

    /// Gives a command what the process is to have.
    fn equip(&self, command: &mut Command, streams: &Streams) -> Result<(), Error> {
        command.env_remove(SEALED_RUNTIME).env_remove(LAUNCH_CGROUP);
        // runc would make a socket of its own for the container, and wait for it at every start.
        command.env_remove(NOTIFY_SOCKET).env_remove(WATCHDOG_USEC);
        let [stdin, stdout, stderr] = streams.to_stdio()?;
        command.stdin(stdin).stdout(stdout).stderr(stderr);
        // glibc's posix_spawn(3) leaves signal 32 ignored, which the container's process would inherit. With a
        // group to set, which is the one it has, the standard library does not use it.
        command.gid(0);
        Ok(())
    }

    fn open_streams(&self) -> Result<Streams, Error> {
        if self.wiring.terminal {
            return Ok(Streams([Stream::Null, Stream::Null, Stream::Null]));
        }
        let stdin = match &self.wiring.stdin {
            Input::Null => Stream::Null,
            // The daemon has the other end, so this does not wait.
            Input::Fifo(path) => Stream::File(self.owned(fifo::open_blocking_reader(path)?)?),
        };
        let stdout = self.open_output(&self.wiring.stdout, self.wiring.stdout_pipe())?;
        let stderr = self.open_output(&self.wiring.stderr, self.wiring.stderr_pipe())?;
        Ok(Streams([stdin, stdout, stderr]))
    }

    fn open_output(&self, output: &Output, own_pipe: Option<&str>) -> Result<Stream, Error> {
        let file = match (output, own_pipe) {
            (Output::Journal, _) => return Ok(Stream::Inherited),
            (Output::Fifo(path), _) => fifo::open_output(path, config::STDIO_LIMIT)?,
            // Read-write: while the daemon is down it still has a reader.
            (Output::Copied(_) | Output::Logger, Some(name)) => fifo::open_both(&self.dir.join(name))?,
            // Writable, unlike with containerd-shim-runc-v2: programs don't expect EBADF.
            (Output::Null | Output::Copied(_) | Output::Logger, _) => return Ok(Stream::File(dev_null()?)),
        };
        Ok(Stream::File(self.owned(file)?))
    }

    /// Gives a stream to the user that the options name, or that the container's root is mapped to, so that a
    /// program in the container can open its own stream again.
    fn owned(&self, stream: File) -> Result<File, Error> {
        let (uid, gid) = self.task.runtime.io_owner;
        if (uid, gid) != (0, 0) {
            let (uid, gid) = (nix::unistd::Uid::from_raw(uid), nix::unistd::Gid::from_raw(gid));
            nix::unistd::fchown(&stream, Some(uid), Some(gid))
                .map_err(system("change the owner of a stream"))?;
        }
        Ok(stream)
    }
}

/// A stream of a process to be.
enum Stream {
    Null,
    Inherited,
    File(File),
}

/// Its streams, opened once: a client that does not come is waited for once.
struct Streams([Stream; 3]);

impl Streams {
    fn to_stdio(&self) -> Result<[Stdio; 3], Error> {
        let stdio = |stream: &Stream| match stream {
            Stream::Null => Ok(Stdio::null()),
            Stream::Inherited => Ok(Stdio::inherit()),
            Stream::File(file) => file.try_clone().map(Stdio::from),
        };
        let [stdin, stdout, stderr] = self.0.each_ref().map(stdio);
        let failed = |source| Error::System { action: "duplicate a stream", source };
        Ok([stdin.map_err(failed)?, stdout.map_err(failed)?, stderr.map_err(failed)?])
    }
}

/// Why nothing was launched.
#[derive(Debug, thiserror::Error)]
enum Error {
    #[error("this container has run already: a restart of its unit is a stop, containerd makes new ones")]
    Again,
    #[error(transparent)]
    Namespaces(#[from] namespaces::Error),
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
    #[error(transparent)]
    Handoff(#[from] handoff::Error),
    #[error("OCI runtime exec failed: {0}")]
    Runtime(String),
    #[error(transparent)]
    TimedOut(#[from] runtime::Error),
    #[error("OCI runtime exec failed: its unit was stopped while it was starting")]
    Terminated,
    #[error(transparent)]
    Store(#[from] store::Error),
    #[error("OCI runtime {verb} failed: can't run {binary}: {source}")]
    Exec {
        verb: &'static str,
        binary: PathBuf,
        #[source]
        source: io::Error,
    },
}

fn system(action: &'static str) -> impl FnOnce(nix::Error) -> Error {
    move |errno| Error::System { action, source: errno.into() }
}

/// Returns only if it fails.
fn become_runtime(process: &Process<'_>) -> Error {
    if let Err(error) = prepare(process) {
        return error;
    }
    let (bundle, pid_file) = (&process.task.request.bundle, process.dir.join(PID_FILE));
    let (cli, console) = (process.cli(), process.console.as_deref());
    let streams = match process.open_streams() {
        Ok(streams) => streams,
        Err(error) => return error,
    };
    process
        .with_runtime(|program| {
            let mut command = cli.create(program, bundle, &pid_file, console);
            process.equip(&mut command, &streams)?;
            // exec also gives SIGPIPE its default back, which Rust had ignored.
            Err::<std::convert::Infallible, _>(Error::Exec {
                verb: "create",
                binary: program.to_owned(),
                source: command.exec(),
            })
        })
        .map_or_else(|error| error, |never| match never {})
}

fn prepare(process: &Process<'_>) -> Result<(), Error> {
    process.mark()?;
    let task = process.task;
    let bundle = &task.request.bundle;
    let mut edits = Edits::default();
    if let Placement::Unit { child, .. } = &task.placement {
        edits.cgroups_path = Some(cgroup::of_self()?.join(child));
    }
    if task.notify {
        let socket = Store::new(config::STATE_DIR).notify_socket(&name::short_name(&task.unit));
        pass_on_notifications(&mut edits, socket);
    }
    bundle::edit(bundle, &edits)?;
    leave_unit(task)?;
    if !task.request.rootfs.is_empty() {
        if !task.rootfs_on_host {
            own_mount_namespace()?;
        }
        rootfs::mount_all(&bundle.join("rootfs"), &task.request.rootfs)?;
    }
    process.limit()
}

/// Has the OCI runtime add the process to the container, hands it over to systemd, tells the daemon,
/// and leaves.
fn exec(process: &Process<'_>) -> Result<(), Error> {
    process.mark()?;
    let (pid, ended) = match add_process(process).and_then(|pid| Ok((pid, handoff::hand_over(pid)?))) {
        Ok(added) => added,
        Err(error) => {
            // There may be a process, or what is to become one: nobody would know of it.
            bounded::kill_all();
            process.tell(&Outcome::Failed { reason: error.to_string() })?;
            return Err(error);
        }
    };
    match ended {
        None => process.tell(&Outcome::Started { pid }),
        Some(ended) => {
            let exit = Exit { status: ended.exit_status(), at_usec: ended.at_usec };
            process.tell(&Outcome::Ended { pid, exit })?;
            handoff::end_as(ended)
        }
    }
}

fn add_process(process: &Process<'_>) -> Result<u32, Error> {
    // What the runtime leaves behind becomes a child of ours: it can't end without a trace.
    set_child_subreaper(true).map_err(system("become a subreaper"))?;
    let (spec, pid_file) = (process.dir.join(PROCESS_SPEC), process.dir.join(EXEC_PID_FILE));
    let (cli, console) = (process.cli(), process.console.as_deref());
    if let Some(cgroup) = &process.task.runtime.cgroup {
        cgroup::enter(cgroup)?;
    }
    process.limit()?;
    let limit = process.task.runtime.limit();
    // They are the process's alone after this.
    let streams = process.open_streams()?;
    let ended = process.with_runtime(|program| {
        let mut command = cli.exec(program, &spec, &pid_file, console);
        process.equip(&mut command, &streams)?;
        let failed = |source| Error::Exec { verb: runtime::EXEC, binary: program.to_owned(), source };
        bounded::run(&mut command, limit).map_err(failed)
    })?;
    drop(streams);
    let status = match ended {
        End::Exited(status) => status,
        End::TimedOut => return Err(runtime::Error::TimedOut { verb: runtime::EXEC, limit }.into()),
        End::Terminated => return Err(Error::Terminated),
    };
    if !status.success() {
        return Err(Error::Runtime(cli.reason(runtime::EXEC, Some(status))));
    }
    let pid = std::fs::read_to_string(&pid_file).ok().and_then(|text| text.trim().parse().ok());
    pid.ok_or_else(|| Error::Runtime("it left no pid file".to_owned()))
}

/// The OCI runtime works in the cgroup that the client names (ShimCgroup), or in one in the daemon's slice: what it
/// uses counts neither as the container's nor as the pod's, limits of either do not delay it, and it does not die
/// with the daemon. The unit's own cgroup is empty then, as it must be once controllers are enabled in it.
fn leave_unit(task: &Task) -> Result<(), Error> {
    if let Some(cgroup) = &task.runtime.cgroup {
        return Ok(cgroup::enter(cgroup)?);
    }
    let missing = || Error::System {
        action: "find the cgroup for the OCI runtime",
        source: io::ErrorKind::NotFound.into(),
    };
    let cgroup = std::env::var_os(LAUNCH_CGROUP).ok_or_else(missing)?;
    Ok(cgroup::enter(Path::new(&cgroup))?)
}

/// The container gets what systemd gives to a service that notifies, with a socket of its own in the place of
/// systemd's. The time of the watchdog is that of the unit; the process that systemd means is not known in the
/// container.
fn pass_on_notifications(edits: &mut Edits, own: PathBuf) {
    let Some(socket) = std::env::var(NOTIFY_SOCKET).ok().filter(|path| path.starts_with('/')) else {
        return;
    };
    edits.env.push(format!("{NOTIFY_SOCKET}={socket}"));
    edits.env.extend(std::env::var(WATCHDOG_USEC).map(|usec| format!("{WATCHDOG_USEC}={usec}")));
    edits.binds.push((own, socket));
}

/// sd_notify(3)
const NOTIFY_SOCKET: &str = "NOTIFY_SOCKET";
/// sd_watchdog_enabled(3)
const WATCHDOG_USEC: &str = "WATCHDOG_USEC";

/// A mount namespace that sees what the host mounts, and keeps to itself what is mounted here.
fn own_mount_namespace() -> Result<(), Error> {
    unshare(CloneFlags::CLONE_NEWNS).map_err(system("make a mount namespace"))?;
    mount(None::<&str>, "/", None::<&str>, MsFlags::MS_REC | MsFlags::MS_SLAVE, None::<&str>)
        .map_err(system("make the mount namespace a slave of the host's"))
}

fn dev_null() -> Result<File, Error> {
    let opened = OpenOptions::new().read(true).write(true).open("/dev/null");
    opened.map_err(|source| Error::System { action: "open /dev/null", source })
}

fn set_limit(resource: u32, soft: u64, hard: u64) -> Result<(), Error> {
    // A number that this version does not know is one that it did not write.
    let Some(known) = RESOURCES.iter().find(|known| **known as u32 == resource) else {
        return Ok(());
    };
    match setrlimit(*known, soft, hard) {
        Err(Errno::EPERM) if *known == Resource::RLIMIT_NOFILE => {
            // `fs.nr_open` is lower by now than the limit that containerd has, and nobody can set such a limit
            // any more (kernel/sys.c, do_prlimit).
            let most = std::fs::read_to_string("/proc/sys/fs/nr_open").ok();
            let most = most.and_then(|text| text.trim().parse().ok()).unwrap_or(hard);
            setrlimit(*known, soft.min(most), hard.min(most))
        }
        set => set,
    }
    .map_err(system("set a resource limit"))
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
fn become_logger(process: &Process<'_>) -> Error {
    let Some(logger) = &process.wiring.logger else {
        return Error::System { action: "find the logger", source: io::ErrorKind::NotFound.into() };
    };
    let pipes = || -> Result<Vec<OwnedFd>, Error> {
        let stdout = fifo::open_blocking_reader(&process.dir.join(pipe::LOG_STDOUT))?;
        let stderr = fifo::open_blocking_reader(&process.dir.join(pipe::LOG_STDERR))?;
        let ready = OpenOptions::new().write(true).open(process.dir.join(pipe::READY));
        let ready =
            ready.map_err(|source| Error::System { action: "open the logger's ready pipe", source })?;
        Ok(vec![stdout.into(), stderr.into(), ready.into()])
    };
    let key = &process.task.key;
    let mut command = Command::new(&logger.program);
    command
        .args(&logger.args)
        .env_clear()
        .env("CONTAINER_ID", process.exec.map_or(key.id.as_str(), ExecId::as_str))
        .env("CONTAINER_NAMESPACE", key.namespace.as_str())
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    let placed =
        pipes().and_then(|pipes| crate::sys::place_from_three(pipes).map_err(system("place the pipes")));
    match placed {
        Ok(()) => Error::System { action: "run the logger", source: command.exec() },
        Err(error) => error,
    }
}

/// The processors that this process may use, by number.
pub(super) fn processors() -> nix::Result<Vec<usize>> {
    let set = sched_getaffinity(Pid::from_raw(0))?;
    Ok((0..CpuSet::count()).filter(|cpu| set.is_set(*cpu).unwrap_or(false)).collect())
}

/// Processors that are gone by now are left out; without any of them the present ones stay.
fn use_processors(wanted: &[usize]) -> Result<(), Error> {
    let mut set = CpuSet::new();
    for cpu in wanted {
        set.set(*cpu).map_err(system("choose a processor"))?;
    }
    match sched_setaffinity(Pid::from_raw(0), &set) {
        // No processor of the set is left.
        Err(Errno::EINVAL) => Ok(()),
        bound => bound.map_err(system("set the CPU affinity")),
    }
}
