//! Keeps the limits of a container equal on its unit and in its own cgroup.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::cgroup::limits as files;
use crate::services::{Entry, Error, WaitsFor, blocking, waiting};
use crate::task::limits::{Attribute, Limits, UnitLimits};
use crate::task::{Placement, Task};
use crate::unit;
use crate::unit::limits::of_unit;

use super::Cgroups;

impl Cgroups {
    /// Reconciles the limits at Create. The unit gets the limits that the client requests; the container gets the limits
    /// that only the unit has (from a drop-in or an annotation).
    ///
    /// Returns the limits of the unit's cgroup. If systemd refuses a limit, a warning is logged and only the container has
    /// it.
    pub(crate) async fn join_limits(
        &self,
        task: &Task,
        container: &Path,
    ) -> Result<Option<UnitLimits>, Error> {
        let Some((unit, container)) = nested_at(task, container) else {
            return Ok(None);
        };
        let (outer, inner) = (read(&unit).await?, read(&container).await?);
        let (given, wanted) = (outer.set(), inner.set());
        // An earlier daemon may have set some of the container's limits on the unit before it ended.
        let own = given.differing_from(&inner).differing_from(&of_unit(&inner)).attributes();
        let down = given.without(&wanted);
        if !down.is_empty() {
            let container = container.clone();
            waiting(WaitsFor::Limits, &task.key, move || files::write(&container, &down)).await??;
        }
        let seen = self.show_limits(task, &unit, &container, outer, wanted.without(&given)).await?;
        Ok(Some(UnitLimits { seen, given: own }))
    }

    /// Sets new limits of the container on its unit, after an Update, except those that the unit had before the container: both
    /// hold. Otherwise as [`Self::join_limits`].
    pub(crate) async fn show_new_limits(&self, task: &Task, new: &Limits) -> Result<Option<Limits>, Error> {
        let Some((unit, container)) = nested(task) else {
            return Ok(None);
        };
        let outer = read(&unit).await?;
        let new = match known_limits(task) {
            Some(UnitLimits { given, .. }) => new.except(given),
            None => new.clone(),
        };
        self.show_limits(task, &unit, &container, outer, new).await.map(Some)
    }

    /// Sets limits again after a thaw: systemd 256 and 257 do not apply limits to a frozen unit.
    pub(crate) async fn show_unshown(self: Arc<Self>, entry: Arc<Entry>) {
        let _limits = entry.limits.lock().await;
        let unshown = std::mem::take(&mut entry.init.live().cgroup.unshown);
        if unshown.is_empty() {
            return;
        }
        let task = entry.task().clone();
        let shown = self.show_new_limits(&task, &unshown).await;
        let shown = shown.and_then(|limits| self.note_limits(&entry, limits));
        if let Err(error) = shown {
            tracing::warn!(task = %entry.key, %error, "task {}: can't set its limits on its unit, so systemctl shows the old limits: {error}", entry.key);
        }
    }

    /// Records the limits of the unit's cgroup that the container's limits were last compared with.
    pub(crate) fn note_limits(&self, entry: &Arc<Entry>, seen: Option<Limits>) -> Result<(), Error> {
        self.tasks.note(entry, |task| {
            task.init.phase.container_mut().into_iter().for_each(|container| {
                let given = container.limits.take().map(|limits| limits.given).unwrap_or_default();
                container.limits = seen.clone().map(|seen| UnitLimits { seen, given });
            });
            Ok(Vec::new())
        })?;
        Ok(())
    }

    async fn show_limits(
        &self,
        task: &Task,
        unit: &Path,
        container: &Path,
        outer: Limits,
        mut new: Limits,
    ) -> Result<Limits, Error> {
        if new.get(Attribute::CpuMax).is_some() && has_cpu_burst(container).await? {
            // Each cgroup saves up time of its own. A unit with the quota would stop a burst of its container, and systemd has no
            // property for bursts.
            new = Limits::default_of(Attribute::CpuMax).over(&new);
        }
        let new = of_unit(&new).differing_from(&outer);
        if new.is_empty() {
            return Ok(outer);
        }
        let properties = unit::limits::properties(&new);
        match self.manager.set_properties(task.unit(), &properties).await {
            Ok(()) => read(unit).await,
            Err(error) => {
                tracing::warn!(task = %task.key, %error, "task {}: can't set its limits on its unit, so systemctl shows the old limits: {error}", task.key);
                Ok(outer)
            }
        }
    }

    /// Applies limits that somebody has set on the unit (`systemctl set-property`) to the container.
    pub(crate) async fn carry_limits_down(self: Arc<Self>, entry: Arc<Entry>) {
        if let Err(error) = self.try_to_carry_down(&entry).await {
            tracing::warn!(task = %entry.key, %error, "task {}: can't apply new limits of its unit to the container: {error}", entry.key);
        }
    }

    async fn try_to_carry_down(&self, entry: &Arc<Entry>) -> Result<(), Error> {
        let _limits = entry.limits.lock().await;
        let task = entry.task().clone();
        // Before the first comparison, a difference does not mean that somebody has changed the unit.
        let (Some(known), Some((unit, container)), true) =
            (known_limits(&task), nested(&task), task.init.is_alive())
        else {
            return Ok(());
        };
        let outer = read(&unit).await?;
        let new = outer.differing_from(&known.seen);
        if new.is_empty() {
            return Ok(());
        }
        let inner = read(&container).await?;
        for (attribute, value) in new.iter() {
            tracing::info!(task = %entry.key, "task {}: its unit has a new {} of {value:?}", entry.key, attribute.file());
        }
        // An earlier daemon may have shown a limit of the container on the unit, and ended before it recorded that.
        let down = new.differing_from(&inner).differing_from(&of_unit(&inner));
        let written = waiting(WaitsFor::Limits, &entry.key, move || files::write(&container, &down)).await?;
        self.note_limits(entry, Some(outer))?;
        Ok(written?)
    }
}

fn known_limits(task: &Task) -> Option<&UnitLimits> {
    task.init.phase.container()?.limits.as_ref()
}

/// The cgroups of a task's unit and of its container. None if the container's cgroup is outside of the unit.
pub(crate) fn nested(task: &Task) -> Option<(PathBuf, PathBuf)> {
    nested_at(task, task.cgroup()?)
}

fn nested_at(task: &Task, container: &Path) -> Option<(PathBuf, PathBuf)> {
    match &task.placement {
        Placement::Unit { .. } => Some((container.parent()?.to_owned(), container.to_owned())),
        Placement::Foreign { .. } => None,
    }
}

async fn has_cpu_burst(cgroup: &Path) -> Result<bool, Error> {
    let cgroup = cgroup.to_owned();
    Ok(blocking(move || files::has_cpu_burst(&cgroup)).await??)
}

/// Reads the limits of a cgroup on a blocking thread.
pub(crate) async fn read(cgroup: &Path) -> Result<Limits, Error> {
    let cgroup = cgroup.to_owned();
    Ok(blocking(move || files::read(&cgroup)).await??)
}
