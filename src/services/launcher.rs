//! How units run this program: the daemon's side of `launch`, with what it keeps for it.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::cgroup;
use crate::id::ProcessKey;
use crate::launch::contract::Kind;
use crate::launch::{self, command};
use crate::oci::sealed::{self, Copies};
use crate::task::Task;

use super::{Error, blocking};

/// How units run this program.
pub struct Launcher {
    /// This program.
    program: PathBuf,
    copies: Arc<Copies>,
    /// The kernel is getting ready for moves between cgroups.
    warming: Arc<AtomicBool>,
}

impl Launcher {
    /// A launcher of this program.
    pub(super) fn new(program: PathBuf) -> Self {
        Self { program, copies: Arc::default(), warming: Arc::default() }
    }

    /// The command line of a unit that starts a process.
    pub(crate) fn command(&self, kind: Kind, key: &ProcessKey) -> Vec<String> {
        command::command_line(&self.program, kind, key)
    }

    /// A copy of the task's OCI runtime, if there can be one.
    pub(crate) async fn sealed_runtime(&self, task: &Task) -> Result<Option<sealed::Place>, Error> {
        let (copies, binary) = (self.copies.clone(), task.runtime.binary.clone());
        blocking(move || copies.place(&binary)).await
    }

    /// A process is about to be moved between cgroups; see [`cgroup::warm_up`].
    pub(crate) fn warm_up(&self) {
        if self.warming.swap(true, Ordering::Relaxed) {
            return;
        }
        let warming = self.warming.clone();
        tokio::task::spawn_blocking(move || {
            if let Err(error) = cgroup::warm_up() {
                tracing::debug!(%error, "can't prepare the kernel for moves between cgroups, creates are slower: {error}");
            }
            warming.store(false, Ordering::Relaxed);
        });
    }

    /// Background task: drops sealed runtime copies that have been idle for [`sealed::IDLE_LIMIT`], and empty cgroups of
    /// the OCI runtime. Never returns.
    pub async fn forget_idle(&self) {
        let mut ticks = tokio::time::interval(sealed::IDLE_LIMIT / 2);
        loop {
            ticks.tick().await;
            self.copies.sweep();
            launch::cgroup::sweep();
        }
    }
}
