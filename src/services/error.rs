//! Why an operation failed. `api/status.rs` has the status code of each error.

use crate::id::{ProcessKey, TaskKey};
use crate::task::Task;
use crate::task::lifecycle::Refusal;
use crate::task::request::Runtime;
use crate::{cgroup, oci, session, stdio, store, unit};

/// Why an operation failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// There is no such task.
    #[error("task {key}: container not created: not found")]
    UnknownTask {
        /// The requested name.
        key: TaskKey,
    },
    /// There is no such exec.
    #[error("task {}: process does not exist {}: not found", .key.task, .key.id())]
    UnknownExec {
        /// The requested name.
        key: ProcessKey,
    },
    /// The exec's id is in use.
    #[error("id {exec}: already exists")]
    ExecExists {
        /// The requested name.
        exec: String,
    },
    /// The exec has the id of its container.
    #[error(
        "exec id {exec} is the id of the container, and containerd could not tell the two ends apart: already exists"
    )]
    ExecNamedAsTask {
        /// The requested name.
        exec: String,
    },
    /// No process can be added to the task.
    #[error("cannot exec in a {phase} state")]
    NoExecIn {
        /// The state.
        phase: &'static str,
    },
    /// The task's init has ended, and the exec with it.
    #[error("container {key} init process is not running: failed precondition")]
    InitGone { key: TaskKey },
    /// The exec does not run: no signal can be sent to it.
    #[error("exec kill error: process not created: failed precondition")]
    NotStarted,
    /// The exec has ended, and its terminal has no size any more.
    #[error("cannot resize a stopped container")]
    ResizeStopped,
    /// The kernel waits for the container.
    #[error("{process}: its terminal does not answer: a process of the container keeps it busy")]
    TerminalDoesNotAnswer { process: ProcessKey },
    /// The exec's process spec is not usable.
    #[error(transparent)]
    Process(#[from] oci::process::Error),
    /// systemd can keep no more descriptors for the daemon.
    #[error(transparent)]
    FdStore(#[from] unit::fd_store::Error),
    /// The container has as many execs as one container may have.
    #[error(transparent)]
    ExecShare(#[from] super::exec_share::Error),
    /// The streams of a process can't be used.
    #[error(transparent)]
    Session(#[from] session::Error),
    /// A stream can't be watched.
    #[error("stdio: watch a stream: {0}")]
    Watch(#[source] std::io::Error),
    /// A disk does not answer.
    #[error(
        "{process}: the files of its bundle, its log file or its OCI runtime do not answer; check the disks that they are on"
    )]
    FilesDoNotAnswer {
        /// The process whose files they are.
        process: ProcessKey,
    },
    /// A thread of another call works on the files of the process. That call may have been cancelled.
    #[error("{process}: another call still works on its files; try again")]
    FilesBusy { process: ProcessKey },
    /// The id is in use.
    #[error("task {key}: already exists")]
    Exists {
        /// The requested name.
        key: TaskKey,
    },
    /// A container with this id runs, and the daemon has no record of it.
    #[error(
        "task {key}: already exists: unit {unit} runs it, but the daemon has no record of it; if nothing uses it any more, run \
         systemctl stop {unit}"
    )]
    Unmanaged { key: TaskKey, unit: String },
    /// The OCI runtime has a container with this id, and the daemon did not make it.
    #[error(
        "task {key}: already exists: the OCI runtime has a container of this id in {root}, which the daemon did not create; if \
         nothing uses it any more, remove it with the OCI runtime: {binary} --root {root} delete --force {}",
        .key.id
    )]
    InRuntime {
        key: TaskKey,
        /// Where the runtime keeps its state.
        root: String,
        /// The runtime.
        binary: String,
    },
    /// A unit of the task's name is in use by something else.
    #[error("task {key}: all names for its unit are in use by others")]
    NoUnitName { key: TaskKey },
    /// The requested cgroup has processes that do not belong to the container.
    #[error(
        "linux.cgroupsPath {path:?}: this cgroup, or one below it, has processes already, which would end with the container; \
         request a cgroup that is empty or does not exist"
    )]
    CgroupInUse {
        /// The cgroup.
        path: std::path::PathBuf,
    },
    /// The phase does not allow it.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// The process has ended.
    #[error("process already finished: not found")]
    Finished,
    /// No signal has this number.
    #[error("signal {0} does not exist")]
    Signal(u32),
    /// The kernel refused a signal.
    #[error("signal {signal} to process {process}: {source}")]
    Kill { signal: u32, process: String, source: std::io::Error },
    /// A killed process was not reported as ended.
    #[error(
        "task {key} was killed, but systemd has not reported its end in time; see systemctl status {unit}"
    )]
    NotEnding { key: TaskKey, unit: String },
    /// An annotation is neither yes nor no.
    #[error("annotation io.containerd.systemd.notify is {value:?}: it must be \"true\" or \"false\"")]
    Notify { value: String },
    /// Some of its processes can't be frozen.
    #[error("task {key} can't be paused: its processes did not freeze in time and continue to run")]
    NotFreezing { key: TaskKey },
    /// Something that belongs to a process could not be removed.
    #[error("{process}: not everything could be removed, try again: {reason}")]
    NotRemoved {
        process: String,
        /// The names of the parts that could not be removed, with the reasons.
        reason: String,
    },
    /// An earlier Create with this id has failed, and something of it could not be removed.
    #[error("task {key}: what a failed create left behind can't be removed yet; see the log of the daemon")]
    Leftover { key: TaskKey },
    /// The init process is in no state to be deleted.
    #[error("cannot delete a {phase} process")]
    NotDeletable {
        /// The state.
        phase: &'static str,
    },
    /// This version does not support the call.
    #[error("io.containerd.systemd.v1 does not support {0}")]
    NotImplemented(&'static str),
    /// criu can't dump the output of a container.
    #[error(
        "task {key} can't be checkpointed: its output goes to the journal through a socket, which criu can't dump; create \
         the container with streams, or without the runtime option Log = \"client\""
    )]
    JournalSocket { key: TaskKey },
    /// criu can't be used.
    #[error(transparent)]
    Criu(oci::criu::Problem),
    /// A checkpoint or a restore failed, and criu has written a log.
    #[error("{reason}; the log of criu is {log}")]
    WithLog { reason: String, log: std::path::PathBuf },
    /// The request for a checkpoint or a restore is not valid.
    #[error(transparent)]
    Checkpoint(#[from] oci::criu::Invalid),
    /// The bundle's path is not absolute.
    #[error("bundle {0:?} must be an absolute path without \"..\"")]
    BundlePath(std::path::PathBuf),
    /// The bundle is not usable.
    #[error(transparent)]
    Bundle(#[from] oci::bundle::Error),
    /// The files of a pod can't be made.
    #[error(transparent)]
    PodFiles(#[from] oci::pod_files::Error),
    /// A security profile that a pod names can't be used.
    #[error(transparent)]
    Profile(#[from] oci::profiles::Error),
    /// The limits are not usable.
    #[error(transparent)]
    Resources(#[from] oci::resources::Error),
    /// A requested property of the unit can't be set.
    #[error(transparent)]
    Property(#[from] unit::annotation::Error),
    /// The options are not usable.
    #[error(transparent)]
    Options(#[from] oci::options::Error),
    /// The stdio strings are not usable.
    #[error(transparent)]
    Stdio(#[from] stdio::uri::InvalidStdio),
    /// A stream can't be opened.
    #[error(transparent)]
    Stream(#[from] stdio::fifo::Error),
    /// The requested cgroup path is not usable.
    #[error(transparent)]
    CgroupsPath(#[from] cgroup::cgroups_path::InvalidPath),
    /// A name is not usable.
    #[error(transparent)]
    Name(#[from] crate::id::InvalidName),
    /// The container could not be created. The reason comes from `launch` or from the OCI runtime.
    #[error("{0}")]
    Launch(String),
    /// The OCI runtime failed.
    #[error(transparent)]
    Runtime(#[from] oci::runtime::Error),
    /// A mount could not be removed.
    #[error(transparent)]
    Mount(#[from] oci::mount::Error),
    /// The cgroup file system failed.
    #[error(transparent)]
    Cgroup(#[from] cgroup::Error),
    /// systemd failed.
    #[error(transparent)]
    Unit(#[from] unit::error::Error),
    /// The record can't be written or read.
    #[error(transparent)]
    Store(#[from] store::Error),
    /// The logger did not become ready.
    #[error("logging binary {program} did not call ready: {reason}")]
    Logger { program: String, reason: String },
    /// The client of a Delete did not wait for the answer.
    #[error("{process} was not deleted: its client did not wait for the end of the call; delete it again")]
    ClientGone { process: ProcessKey },
    /// A Create or a Start was cancelled.
    #[error("{process} was deleted before it had started")]
    GivenUp { process: ProcessKey },
    /// A checkpoint or a restore was ended by another call.
    #[error("{process}: criu was stopped, because the task was killed or deleted while criu worked on it")]
    Interrupted { process: ProcessKey },
    /// systemd starts no unit in a frozen slice.
    #[error(
        "{process} was not started: systemd starts nothing in {slice}, which is frozen; see systemctl thaw"
    )]
    FrozenSlice {
        process: ProcessKey,
        /// The slice. It or one of its parents is frozen.
        slice: String,
    },
    /// Somebody has stopped the unit or its slice during a Create or a restore.
    #[error(
        "{process} was not started: somebody has stopped {unit} or its slice meanwhile; see journalctl -u {unit}"
    )]
    StoppedMeanwhile { process: ProcessKey, unit: String },
    /// A Create takes too long.
    #[error(
        "OCI runtime create failed: {unit} was stopped because it did not start in time (option RuntimeTimeoutSec): a hook or a mount may hang{hint}; see journalctl -u {unit}"
    )]
    CreateTimedOut {
        unit: String,
        /// The settings of the administrator that may be the reason, or nothing.
        hint: String,
    },
    /// A start takes too long.
    #[error("OCI runtime exec failed: {unit} has not started a process within {} s; see systemctl status {unit}", .limit.as_secs())]
    StartTimedOut {
        /// Its unit.
        unit: String,
        /// The time limit.
        limit: std::time::Duration,
    },
    /// Too many threads wait.
    #[error(
        "task {task}: too many threads wait for {waits_for}, for this container or in total; try again once they answer"
    )]
    ManyWait {
        /// The task whose call was refused.
        task: TaskKey,
        /// What the threads wait for.
        waits_for: &'static str,
    },
    /// No thread could be made for work that waits.
    #[error(
        "no thread can be made to wait for a client: {0}; the limit of tasks of the daemon or of the machine is reached"
    )]
    NoThread(#[source] std::io::Error),
    /// systemd did not run the command of a unit.
    #[error("{process} was not started: {reason}")]
    NotRun {
        /// The process.
        process: ProcessKey,
        /// Why, with the unit.
        reason: String,
    },
    /// The operation has failed in an earlier daemon, and this is the replay of its call.
    #[error("{text}")]
    Earlier {
        /// The status code of its error.
        code: i32,
        /// The text of its error.
        text: String,
    },
    /// The daemon is about to end.
    #[error("the runtime's daemon is stopping")]
    Stopping,
}

impl Error {
    /// [`Self::InRuntime`] for a task whose runtime keeps its state where the task says.
    pub(crate) fn in_runtime(task: &Task) -> Self {
        let Runtime { root, binary, .. } = &task.runtime;
        let (root, binary) = (root.display().to_string(), binary.display().to_string());
        Self::InRuntime { key: task.key.clone(), root, binary }
    }

    /// An error of the OCI runtime that says that criu can't be used, as [`Self::Criu`]. Every other error is returned
    /// unchanged.
    #[must_use]
    pub fn with_criu_problem(self) -> Self {
        match &self {
            Self::Launch(_) | Self::Runtime(_) => {
                oci::criu::Problem::of_runtime(&self.to_string()).map_or(self, Self::Criu)
            }
            _ => self,
        }
    }

    /// For a call that adds a task or an exec: if the files of the process are busy, another call adds it.
    #[must_use]
    pub(crate) fn busy_means_exists(self) -> Self {
        match self {
            Self::FilesBusy { process: ProcessKey { task, exec: None } } => Self::Exists { key: task },
            Self::FilesBusy { process: ProcessKey { exec: Some(exec), .. } } => {
                Self::ExecExists { exec: exec.to_string() }
            }
            other => other,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_an_error_of_the_oci_runtime_about_criu_is_one_of_criu() {
        let launch = |reason: &str| Error::Launch(reason.to_owned()).with_criu_problem();
        assert!(matches!(launch("could not load `libcriu.so.2`"), Error::Criu(_)));
        assert!(matches!(launch("no space left on device"), Error::Launch(_)));
        assert!(matches!(Error::Stopping.with_criu_problem(), Error::Stopping));
    }
}
