//! The contract between the daemon and `launch`: arguments, environment, file names, and the reported outcome (pure).
//!
//! The file names are those in a process's directory (`Store::dir`, `Store::exec_dir`). The FIFOs there are in
//! [`super::pipes`]; the log and the lock of the OCI runtime are `oci::runtime`'s alone.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Deserializer, Serialize};

use crate::id::{ExecId, Namespace, ProcessKey, TaskKey};
use crate::oci::criu::Checkpoint;
use crate::store::failures::Failure;
use crate::task::lifecycle::Exit;
use crate::task::request::Runtime;

/// The variable with the reference to the copy of the OCI runtime.
pub const SEALED_RUNTIME: &str = "CONTAINERD_SHIM_SYSTEMD_RUNTIME";

/// The variable with the cgroup in which the OCI runtime creates a container.
pub const LAUNCH_CGROUP: &str = "CONTAINERD_SHIM_SYSTEMD_CGROUP";

/// The variable with the path of the notify socket (sd_notify(3)).
pub const NOTIFY_SOCKET: &str = "NOTIFY_SOCKET";

/// The variable with the watchdog interval (sd_watchdog_enabled(3)).
pub const WATCHDOG_USEC: &str = "WATCHDOG_USEC";

/// The PID file of a container's unit: the OCI runtime writes it, and systemd reads the main process from it.
pub const PID_FILE: &str = "init.pid";

/// The file to which the OCI runtime writes the pid of an exec.
pub const EXEC_PID_FILE: &str = "pid";

/// The file with the process spec of an exec.
pub const PROCESS_SPEC: &str = "process.json";

/// The file to which `launch` writes why it could not start a container.
pub const LAUNCH_ERROR: &str = "launch.err";

/// Why the logger's program was not executed, as text. In the directory of the process.
pub const LOGGER_ERROR: &str = "logger.err";

/// The file to which `launch` writes the [`Outcome`] of an exec.
pub const OUTCOME: &str = "outcome.json";

/// The file that the first `launch` of a record creates. A second `launch` is `systemctl restart`, which acts as a
/// stop.
pub const LAUNCHED: &str = "launched";

/// The file with the [`CheckpointNote`], which the daemon writes and `launch` reads.
pub const CHECKPOINT: &str = "checkpoint.json";

/// The file to which `launch` writes why criu can't be used.
pub const CRIU_PROBLEM: &str = "criu.json";

/// criu's work directory for a checkpoint whose client names none.
pub const DUMP_WORK: &str = "criu-dump";

/// criu's work directory for a restore whose client names none.
pub const RESTORE_WORK: &str = "criu-restore";

/// The configuration of criu for a checkpoint or a restore.
pub const CRIU_CONFIG: &str = "criu.conf";

/// The configuration of criu that overrides the options of the OCI runtime in a restore.
pub const CRIU_OVERRIDES: &str = "criu-overrides.conf";

/// A checkpoint that the daemon has begun. If the daemon ends meanwhile, the next one completes it.
#[derive(Debug, Serialize, Deserialize)]
pub struct CheckpointNote {
    pub request: Checkpoint,
    /// True if the unit was frozen before.
    pub was_paused: bool,
    /// The reply to the call. `None` while the checkpoint is under way.
    #[serde(default, deserialize_with = "outcome_of_checkpoint")]
    pub outcome: Option<Result<(), Failure>>,
    /// The number of the call. `None` in a note of an earlier version.
    #[serde(default)]
    pub call: Option<u64>,
}

/// The status code `UNKNOWN` of gRPC.
const UNKNOWN: i32 = 2;

/// Reads the outcome in a [`CheckpointNote`]. An earlier version has written the reason of a failure, or an empty text after
/// success.
fn outcome_of_checkpoint<'d, D: Deserializer<'d>>(note: D) -> Result<Option<Result<(), Failure>>, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Written {
        Now(Result<(), Failure>),
        Earlier(String),
    }
    let outcome = |written: Written| match written {
        Written::Now(outcome) => outcome,
        Written::Earlier(text) if text.is_empty() => Ok(()),
        Written::Earlier(text) => Err(Failure { code: UNKNOWN, text }),
    };
    Ok(Option::deserialize(note)?.map(outcome))
}

/// What `launch` starts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Unit(UnitKind),
    Command(CommandKind),
}

/// A process that `launch` starts in a unit of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum UnitKind {
    /// A container, up to its init process, which waits for Start.
    Container,
    Exec,
    /// A `binary://` logger.
    Logger,
}

/// What the daemon lets `launch` do without a unit, like a command of the OCI runtime.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CommandKind {
    /// The check whether criu can be used.
    Criu,
    /// The mounts of a rootfs in the host's mount namespace, for a container that Start restores.
    Mount,
    /// A checkpoint of a container.
    Checkpoint,
}

impl Kind {
    pub const ALL: [Self; 6] = [
        Self::Unit(UnitKind::Container),
        Self::Unit(UnitKind::Exec),
        Self::Unit(UnitKind::Logger),
        Self::Command(CommandKind::Criu),
        Self::Command(CommandKind::Mount),
        Self::Command(CommandKind::Checkpoint),
    ];

    /// Its name in the arguments.
    pub fn word(self) -> &'static str {
        match self {
            Self::Unit(UnitKind::Container) => "container",
            Self::Unit(UnitKind::Exec) => "exec",
            Self::Unit(UnitKind::Logger) => "logger",
            Self::Command(command) => command.word(),
        }
    }

    /// True if it can be for an exec, or, without an exec, for the init process.
    fn is_for(self, exec: Option<&str>) -> bool {
        match self {
            Self::Unit(UnitKind::Container) | Self::Command(_) => exec.is_none(),
            Self::Unit(UnitKind::Exec) => exec.is_some(),
            Self::Unit(UnitKind::Logger) => true,
        }
    }
}

impl CommandKind {
    /// Its name in the arguments, which is the name of its log, too.
    pub fn word(self) -> &'static str {
        match self {
            Self::Criu => "criu",
            Self::Mount => "mount",
            Self::Checkpoint => "checkpoint",
        }
    }
}

impl From<UnitKind> for Kind {
    fn from(kind: UnitKind) -> Self {
        Self::Unit(kind)
    }
}

impl From<CommandKind> for Kind {
    fn from(kind: CommandKind) -> Self {
        Self::Command(kind)
    }
}

/// criu's work directory for a checkpoint of the task whose files are in `dir`.
pub fn dump_work(request: &Checkpoint, dir: &Path) -> PathBuf {
    request.work.clone().unwrap_or_else(|| dir.join(DUMP_WORK))
}

/// criu's work directory for the restore of a task whose files are in `dir`.
pub fn restore_work(runtime: &Runtime, dir: &Path) -> PathBuf {
    if runtime.criu_work.as_os_str().is_empty() { dir.join(RESTORE_WORK) } else { runtime.criu_work.clone() }
}

/// The outcome of the start of an exec.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "outcome", rename_all = "snake_case")]
pub enum Outcome {
    /// The process runs, and is the main process of its unit.
    Started {
        /// The pid of the process.
        pid: u32,
    },
    /// The process ended before systemd confirmed it as the main process.
    Ended {
        /// The pid of the process.
        pid: u32,
        exit: Exit,
    },
    /// The process was not started.
    Failed {
        /// The reason, from the OCI runtime if it gave one.
        reason: String,
    },
}

/// The arguments that follow the name of the program, for the process `key`.
pub fn arguments(kind: Kind, key: &ProcessKey) -> Vec<String> {
    let task = key.task.word();
    let words = ["launch", kind.word(), key.task.namespace.as_str(), &task];
    words.into_iter().chain(key.exec.as_ref().map(ExecId::as_str)).map(str::to_owned).collect()
}

/// Reads the arguments after the word `launch`. `None` if [`arguments`] does not make such arguments.
pub fn parse(words: &[&str]) -> Option<(Kind, ProcessKey)> {
    let (word, namespace, id, exec) = match *words {
        [word, namespace, id] => (word, namespace, id, None),
        [word, namespace, id, exec] => (word, namespace, id, Some(exec)),
        _ => return None,
    };
    let kind = Kind::ALL.into_iter().find(|kind| kind.word() == word && kind.is_for(exec))?;
    let task = TaskKey::from_word(Namespace::new(namespace).ok()?, id).ok()?;
    let exec = exec.map(ExecId::new).transpose().ok()?;
    Some((kind, ProcessKey { task, exec }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_outcome_of_a_checkpoint_is_read_in_the_forms_of_all_versions() {
        let note = |outcome: serde_json::Value| {
            let request = Checkpoint::default();
            serde_json::json!({ "request": request, "was_paused": false, "outcome": outcome })
        };
        let read = |note| serde_json::from_value::<CheckpointNote>(note).unwrap().outcome;
        let failed = |code, text: &str| Some(Err(Failure { code, text: text.to_owned() }));
        assert_eq!(read(note("".into())), Some(Ok(())));
        assert_eq!(read(note("no space".into())), failed(UNKNOWN, "no space"));
        for outcome in [None, Some(Ok(())), failed(1, "cancelled"), failed(1, "")] {
            assert_eq!(read(note(serde_json::to_value(&outcome).unwrap())), outcome);
        }
    }

    #[test]
    fn launch_reads_the_arguments_that_the_daemon_writes() {
        let task = |word| TaskKey::from_word(Namespace::new("default").unwrap(), word).unwrap();
        for word in ["web", "web+0123456789abcdef"] {
            let init = task(word).init();
            let exec = ProcessKey { task: task(word), exec: Some(ExecId::new("e1").unwrap()) };
            for (kind, of_init, of_exec) in [
                (UnitKind::Container.into(), true, false),
                (UnitKind::Exec.into(), false, true),
                (UnitKind::Logger.into(), true, true),
                (CommandKind::Criu.into(), true, false),
                (CommandKind::Mount.into(), true, false),
                (CommandKind::Checkpoint.into(), true, false),
            ] {
                for (key, is_possible) in [(&init, of_init), (&exec, of_exec)] {
                    let arguments = arguments(kind, key);
                    let words: Vec<_> = arguments.iter().map(String::as_str).collect();
                    assert_eq!(words[0], "launch");
                    let expected = is_possible.then(|| (kind, key.clone()));
                    assert_eq!(parse(&words[1..]), expected, "{arguments:?}");
                }
            }
        }
    }
}
