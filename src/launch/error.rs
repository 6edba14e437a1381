//! Why `launch` did not start a process.

use std::io;
use std::path::PathBuf;

use crate::id::ProcessKey;
use crate::oci::{bundle, criu, mount, namespaces, runtime};
use crate::stdio::fifo;
use crate::{cgroup, store};

use super::{core_scheduling, handoff};

/// Why nothing was launched.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The task has no record.
    #[error("{key}: no record found; only the runtime's daemon starts this unit")]
    NoRecord {
        /// The process that the arguments name.
        key: ProcessKey,
    },
    /// The record has no such exec.
    #[error("{key}: the record has no such exec; only the runtime's daemon starts this unit")]
    NoExec {
        /// The process that the arguments name.
        key: ProcessKey,
    },
    /// The unit was restarted.
    #[error("the unit of a container can't be restarted; create a new container through containerd")]
    Again,
    /// containerd's namespaces can't be entered.
    #[error(transparent)]
    Namespaces(#[from] namespaces::Error),
    /// A namespace of the spec can't be joined.
    #[error(transparent)]
    NotJoinable(#[from] namespaces::NotJoinable),
    /// A cgroup can't be entered.
    #[error(transparent)]
    Cgroup(#[from] cgroup::Error),
    /// `config.json` can't be edited.
    #[error(transparent)]
    Bundle(#[from] bundle::Error),
    /// The rootfs can't be mounted.
    #[error(transparent)]
    Mount(#[from] mount::Error),
    /// The container's containerd wants core scheduling.
    #[error(transparent)]
    CoreScheduling(#[from] core_scheduling::Error),
    /// A FIFO can't be opened.
    #[error(transparent)]
    Stream(#[from] fifo::Error),
    /// A system call failed.
    #[error("can't {action}: {source}")]
    System {
        /// The action, as in "open /dev/null".
        action: &'static str,
        /// The error of the system call.
        #[source]
        source: io::Error,
    },
    /// A logger was started again when its process had ended.
    #[error("no process writes to the logger, and everything has been read")]
    NothingToLog,
    /// systemd can't take over the process.
    #[error(transparent)]
    Handoff(#[from] handoff::Error),
    /// `exec` of the OCI runtime failed.
    #[error("OCI runtime exec failed: {0}")]
    Runtime(String),
    /// A command of the OCI runtime can't be prepared, or `exec` took too long.
    #[error(transparent)]
    Command(#[from] runtime::Error),
    /// The exec's unit was stopped.
    #[error("OCI runtime exec failed: the exec's unit was stopped during its start")]
    Terminated,
    /// The record, or another file in the task's directory, can't be read or written.
    #[error(transparent)]
    Store(#[from] store::Error),
    /// criu can't be used.
    #[error(transparent)]
    Criu(#[from] criu::Problem),
    /// The request for a checkpoint does not exist.
    #[error("the request for the checkpoint is missing; only the daemon can start a checkpoint")]
    NoRequest,
    /// A file of a checkpoint can't be read or written.
    #[error("checkpoint: can't {action} {path}: {source}")]
    Checkpoint {
        /// The action, as in "read".
        action: &'static str,
        /// The file or directory.
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    /// The images of a checkpoint can't be restored.
    #[error(transparent)]
    Images(#[from] criu::images::Error),
    /// The OCI runtime can't be run.
    #[error("OCI runtime {verb} failed: can't run {binary}: {source}")]
    Exec {
        /// Its command.
        verb: &'static str,
        /// The binary, or a copy of it.
        binary: PathBuf,
        /// The error of the system call.
        #[source]
        source: io::Error,
    },
}

/// Makes an error of a failed system call.
pub(super) fn system(action: &'static str) -> impl FnOnce(nix::Error) -> Error {
    move |errno| Error::System { action, source: errno.into() }
}
