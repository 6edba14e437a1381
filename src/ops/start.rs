//! Start: lets a created container's process run, or an exec.

use std::sync::Arc;

use crate::cgroup::limits::is_frozen;
use crate::fault::{self, Point};
use crate::id::{ProcessKey, TaskKey};
use crate::oci::runtime;
use crate::services::{Attempt, Error, Shim, blocking};
use crate::task::phase::{Event, Refusal};

use super::kill::kill_all;

impl Shim {
    /// Starts a process; returns it.
    ///
    /// # Errors
    /// It is not in the phase for that, or the OCI runtime fails; then it stays as it was.
    pub async fn start(self: &Arc<Self>, key: &ProcessKey, attempt: Attempt) -> Result<u32, Error> {
        match &key.exec {
            None => self.start_init(&key.task, attempt).await,
            Some(exec) => self.start_exec(key, exec, attempt).await,
        }
    }

    async fn start_init(self: &Arc<Self>, key: &TaskKey, attempt: Attempt) -> Result<u32, Error> {
        let entry = self.tasks.created(key)?;
        let _verb = entry.init.verb.lock().await;
        let phase = entry.task().init.clone();
        if let (Attempt::Replayed, true, Some(pid)) = (attempt, phase.has_run(), phase.pid()) {
            return Ok(pid);
        }
        let task = entry.task().clone();
        if task.cgroup.as_deref().map(is_frozen).transpose()?.flatten() == Some(true) {
            // The OCI runtime would wait for it until somebody thaws it.
            return Err(Error::Refused(Refusal { verb: "start", phase: "paused" }));
        }
        self.tasks.apply(&entry, Event::StartBegun)?;
        fault::point(Point::StartRecorded);
        let dir = self.store.dir(key);
        let cli = runtime::Cli { runtime: &task.runtime, id: &key.id, dir: &dir };
        let started = tokio::select! {
            started = self.oci.start(&cli) => started.map_err(Error::from),
            () = Self::init_is_gone(&entry) => Err(Error::InitGone { key: key.clone() }),
        };
        if started.is_err() && !cli.waits_for_start() {
            // It has been let go, and nobody says so: it ends, as runc has it end when a poststart hook fails.
            let task = task.clone();
            blocking(move || kill_all(&task, nix::libc::SIGKILL as u32)).await??;
        }
        fault::point(Point::StartDone);
        let event = if started.is_ok() { Event::Started } else { Event::StartFailed };
        self.tasks.note_event(&entry, event)?;
        started?;
        fault::point(Point::StartNoted);
        // It may have been frozen meanwhile.
        self.note_freezer(&entry);
        Ok(task.init.pid().unwrap_or_default())
    }
}
