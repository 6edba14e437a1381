//! Start: lets a created container's process run, or an exec.

use std::sync::Arc;

use crate::id::{ProcessKey, TaskKey};
use crate::oci::runtime;
use crate::task::phase::Event;

use super::{Error, Shim};

impl Shim {
    /// Starts a process; returns it.
    ///
    /// # Errors
    /// It is not in the phase for that, or the OCI runtime fails; then it stays as it was.
    pub async fn start(self: &Arc<Self>, key: &ProcessKey) -> Result<u32, Error> {
        match &key.exec {
            None => self.start_init(&key.task).await,
            Some(exec) => self.start_exec(key, exec).await,
        }
    }

    async fn start_init(self: &Arc<Self>, key: &TaskKey) -> Result<u32, Error> {
        let entry = self.created(key)?;
        let _verb = entry.init.verb.lock().await;
        self.apply(&entry, Event::StartBegun)?;
        let task = entry.task().clone();
        let dir = self.store.dir(key);
        let cli = runtime::Cli { runtime: &task.runtime, id: &key.id, dir: &dir };
        let started = cli.start().await;
        let event = if started.is_ok() { Event::Started } else { Event::StartFailed };
        self.apply(&entry, event)?;
        started?;
        Ok(task.init.pid().unwrap_or_default())
    }
}
