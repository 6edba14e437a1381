//! Pause: freezes a container through systemd. Resume uses the same code to thaw it.

use std::path::Path;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use crate::cgroup;
use crate::fault::{self, Point};
use crate::id::TaskKey;
use crate::services::{Delivery, Error, WaitsFor, blocking, waiting};
use crate::task::lifecycle::{Event, Lifecycle, Refusal};
use crate::task::phase::Phase;
use crate::task::{Placement, Task};
use crate::unit;
use crate::unit::systemd::Systemd;

use super::Shim;

/// How long a freeze may take. A process that the kernel can't freeze (it is in a driver, or traced) would leave the
/// others half frozen. runc has the same limit.
const FREEZE_LIMIT: Duration = Duration::from_millis(if cfg!(test) { 5_000 } else { 10_000 });

/// How long systemd may take to notice that the kernel has frozen or thawed the cgroup.
const ANSWER_LIMIT: Duration = Duration::from_secs(1);

impl Shim {
    /// Freezes a container's processes.
    ///
    /// # Errors
    /// The container does not run, or can't be frozen; then it continues to run.
    pub async fn pause(self: &Arc<Self>, key: &TaskKey, delivery: Delivery) -> Result<(), Error> {
        let entry = self.tasks.created(key)?;
        let _verb = entry.init.verb.lock().await;
        let task = entry.task().clone();
        match &task.init.phase {
            Phase::Running { .. } => {}
            Phase::Paused { .. } if delivery == Delivery::Replayed => return Ok(()),
            other => return Err(refused("pause", other)),
        }
        let frozen = freeze(&*self.manager, &task).await;
        fault::point(Point::PauseDone);
        if let Err(error) = frozen {
            // Thaws what is frozen already. The caller gets the first error.
            let _ = thaw(&*self.manager, &task).await;
            return Err(match error {
                Error::Cgroup(error) if error.is_timeout() => Error::NotFreezing { key: key.clone() },
                error => error,
            });
        }
        self.tasks.note_event(&entry, &entry.init, Event::Frozen)?;
        fault::point(Point::PauseNoted);
        Ok(())
    }
}

async fn freeze(manager: &dyn Systemd, task: &Task) -> Result<(), Error> {
    set_frozen(task, true, manager.freeze(task.unit())).await
}

pub(super) async fn thaw(manager: &dyn Systemd, task: &Task) -> Result<(), Error> {
    if let Some(cgroup) = task.cgroup().map(Path::to_owned) {
        // The container's own cgroup is still frozen if the daemon could not freeze the unit again after a checkpoint.
        blocking(move || cgroup::freeze(&cgroup, false)).await??;
    }
    set_frozen(task, false, manager.thaw(task.unit())).await
}

/// Waits until the cgroup is frozen or thawed and systemd has answered. systemd 257 never answers if the unit ends at
/// that moment.
async fn set_frozen(
    task: &Task,
    frozen: bool,
    by_systemd: impl Future<Output = Result<(), unit::error::Error>>,
) -> Result<(), Error> {
    let Some(cgroup) = task.cgroup().map(Path::to_owned) else {
        return Ok(by_systemd.await?);
    };
    let is_foreign = matches!(task.placement, Placement::Foreign { .. });
    let seen = waiting(WaitsFor::Client, &task.key, move || {
        if is_foreign {
            cgroup::freeze(&cgroup, frozen)?;
        }
        cgroup::until_frozen(&cgroup, frozen, FREEZE_LIMIT)
    });
    if is_foreign {
        return Ok(seen.await??);
    }
    let mut by_systemd = pin!(by_systemd);
    tokio::select! {
        answered = &mut by_systemd => return Ok(answered?),
        seen = seen => match seen {
            // systemd alone says when the unit is frozen.
            Err(Error::NoThread(_) | Error::ManyWait { .. }) => {
                let late = |_| Error::NotFreezing { key: task.key.clone() };
                return Ok(tokio::time::timeout(FREEZE_LIMIT, by_systemd).await.map_err(late)??);
            }
            seen => seen??,
        },
    }
    tokio::time::timeout(ANSWER_LIMIT, by_systemd).await.unwrap_or(Ok(())).map_err(Error::from)
}

pub(super) fn refused(verb: &'static str, phase: &Phase) -> Error {
    Error::Refused(Refusal { verb, phase: phase.word() })
}
