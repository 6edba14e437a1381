//! Reports pauses of containers to containerd, also those that somebody else caused (`systemctl freeze`).

use std::path::Path;
use std::sync::Arc;

use crate::cgroup::limits::is_frozen;
use crate::services::{Entry, Error};
use crate::task::lifecycle::Event;

use super::Cgroups;

impl Cgroups {
    /// Reads whether a task is frozen, and reports a change to containerd.
    pub(crate) fn note_freezer(self: &Arc<Self>, entry: &Arc<Entry>) {
        if entry.init.live().is_checkpointing {
            return;
        }
        let cgroup = entry.task().cgroup().map(Path::to_owned);
        let noted = match cgroup.map(|cgroup| is_frozen(&cgroup)) {
            Some(Ok(Some(true))) => {
                self.tasks.note_event(entry, &entry.init, Event::Frozen).map(drop).map_err(Error::from)
            }
            Some(Ok(Some(false))) => {
                if !entry.init.live().cgroup.unshown.is_empty() {
                    tokio::spawn(self.clone().show_unshown(entry.clone()));
                }
                self.tasks.note_event(entry, &entry.init, Event::Thawed).map(drop).map_err(Error::from)
            }
            Some(Err(error)) => Err(error.into()),
            Some(Ok(None)) | None => Ok(()),
        };
        if let Err(error) = noted {
            tracing::error!(task = %entry.key, %error, "task {}: can't record whether it is frozen: {error}", entry.key);
        }
    }
}
