//! Resume: thaws a paused container.

use std::sync::Arc;

use crate::fault::{self, Point};
use crate::id::TaskKey;
use crate::services::{Delivery, Error};
use crate::task::lifecycle::Event;
use crate::task::phase::Phase;

use super::Shim;
use super::pause::{refused, thaw};

impl Shim {
    /// Thaws the processes of a container.
    ///
    /// # Errors
    /// The container is not paused, or a cgroup above it is frozen as well.
    pub async fn resume(self: &Arc<Self>, key: &TaskKey, delivery: Delivery) -> Result<(), Error> {
        let entry = self.tasks.created(key)?;
        let _verb = entry.init.verb.lock().await;
        let task = entry.task().clone();
        match &task.init.phase {
            Phase::Paused { .. } => {}
            Phase::Running { .. } if delivery == Delivery::Replayed => return Ok(()),
            other => return Err(refused("resume", other)),
        }
        thaw(&*self.manager, &task).await?;
        fault::point(Point::ResumeDone);
        self.tasks.note_event(&entry, &entry.init, Event::Thawed)?;
        fault::point(Point::ResumeNoted);
        self.cgroups.clone().show_unshown(entry.clone()).await;
        Ok(())
    }
}
