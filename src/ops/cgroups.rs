//! What the kernel reports of the containers' cgroups, applied to the tasks; and their limits, which are
//! the same seen from the unit and from the container.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::cgroup::limits as files;
use crate::cgroup::watch::Change;
use crate::id::TaskKey;
use crate::task::limits::Limits;
use crate::task::phase::Event;
use crate::task::{Placement, Task};
use crate::unit;

use super::{Entry, Error, Shim, blocking};

impl Shim {
    /// Applies what the kernel tells, for as long as it does; a repeat changes nothing.
    pub async fn observe_cgroups(self: Arc<Self>) {
        loop {
            let changes = tokio::select! {
                changes = self.cgroups.next() => changes,
                () = self.cgroups.retry() => {
                    self.watch_missed_cgroups();
                    continue;
                }
            };
            match changes {
                Ok(changes) => self.apply_changes(changes),
                Err(error) => {
                    tracing::error!(%error, "changes of cgroups are not noticed any more: {error}");
                    return;
                }
            }
        }
    }

    pub(super) fn apply_changes(self: &Arc<Self>, changes: Vec<(Option<TaskKey>, Change)>) {
        for (key, change) in changes {
            match key {
                Some(key) => self.registry.get(&key).iter().for_each(|entry| self.changed(entry, change)),
                None => self.registry.all().iter().for_each(|entry| self.changed(entry, change)),
            }
        }
    }

    fn changed(self: &Arc<Self>, entry: &Arc<Entry>, change: Change) {
        if matches!(change, Change::Memory | Change::Any) {
            self.memory_changed(entry);
        }
        if matches!(change, Change::State | Change::Any) {
            self.note_freezer(entry);
        }
        if matches!(change, Change::Limits | Change::Any) {
            tokio::spawn(self.clone().carry_limits_down(entry.clone()));
        }
    }

    /// Watches the cgroups that could not be watched before.
    fn watch_missed_cgroups(self: &Arc<Self>) {
        for entry in self.registry.all() {
            let is_missed = entry.init.live().watched.is_none() && entry.task().init.is_alive();
            if is_missed && entry.task().init.pid().is_some() {
                self.watch_cgroup(&entry);
            }
        }
    }

    /// Watches a task's cgroup from now on, and looks at what has happened in it before.
    pub(super) fn watch_cgroup(self: &Arc<Self>, entry: &Arc<Entry>) {
        let task = entry.task().clone();
        let Some(container) = &task.cgroup else {
            return;
        };
        let limits = nested(&task).map(|(unit, _)| unit);
        let memory = memory_events_of(&task).unwrap_or(container);
        match self.cgroups.add(&entry.key, container, memory, limits.as_deref()) {
            Ok(watched) => entry.init.live().watched = Some(watched),
            // It has ended, and systemd has removed it.
            Err(error) if error.is_gone() => {}
            // Others that are missed at the same time are so for the same reason.
            Err(error) if self.cgroups.miss() => {
                tracing::warn!(task = %entry.key, %error, "task {}: what happens to its cgroup is not noticed for now: {error}", entry.key);
            }
            Err(_) => {}
        }
        self.note_oom_kills(entry);
        self.note_freezer(entry);
        tokio::spawn(self.clone().carry_limits_down(entry.clone()));
    }

    /// Tells containerd that a task is frozen, or is no more, whoever has done it.
    pub(super) fn note_freezer(self: &Arc<Self>, entry: &Arc<Entry>) {
        let cgroup = entry.task().cgroup.clone();
        let noted = match cgroup.map(|cgroup| files::is_frozen(&cgroup)) {
            Some(Ok(Some(true))) => self.note_event(entry, Event::Frozen).map(drop).map_err(Error::from),
            Some(Ok(Some(false))) => {
                if !entry.init.live().unshown.is_empty() {
                    tokio::spawn(self.clone().show_unshown(entry.clone()));
                }
                self.note_event(entry, Event::Thawed).map(drop).map_err(Error::from)
            }
            Some(Err(error)) => Err(error.into()),
            Some(Ok(None)) | None => Ok(()),
        };
        if let Err(error) = noted {
            tracing::error!(task = %entry.key, %error, "task {}: can't note whether it is frozen: {error}", entry.key);
        }
    }

    /// A container's limits are as the client wants them: the unit gets the same, and the container what an
    /// administrator (a drop-in) or an annotation wants of the unit where the client wants nothing.
    ///
    /// Returns the limits of the unit's cgroup. A limit that systemd does not take is one of the container
    /// alone: that is a warning.
    pub(super) async fn join_limits(&self, task: &Task, container: &Path) -> Result<Option<Limits>, Error> {
        let Some((unit, container)) = nested_at(task, container) else {
            return Ok(None);
        };
        let (outer, inner) = (read(&unit).await?, read(&container).await?);
        let (given, wanted) = (outer.set(), inner.set());
        let down = given.without(&wanted);
        if !down.is_empty() {
            blocking(move || files::write(&container, &down)).await??;
        }
        self.show_limits(task, &unit, outer, &wanted.without(&given)).await.map(Some)
    }

    /// A container has got other limits from its client: the unit gets the same. As [`Self::join_limits`]
    /// otherwise.
    pub(super) async fn show_new_limits(&self, task: &Task, new: &Limits) -> Result<Option<Limits>, Error> {
        let Some((unit, _)) = nested(task) else {
            return Ok(None);
        };
        let outer = read(&unit).await?;
        let new = new.differing_from(&outer);
        self.show_limits(task, &unit, outer, &new).await.map(Some)
    }

    /// Limits that systemd has not applied to a frozen unit (256, 257) are set again when it is thawed.
    pub(super) async fn show_unshown(self: Arc<Self>, entry: Arc<Entry>) {
        let _limits = entry.limits.lock().await;
        let unshown = std::mem::take(&mut entry.init.live().unshown);
        if unshown.is_empty() {
            return;
        }
        let task = entry.task().clone();
        let shown = self.show_new_limits(&task, &unshown).await;
        let shown = shown.and_then(|limits| self.note_limits(&entry, limits));
        if let Err(error) = shown {
            tracing::warn!(task = %entry.key, %error, "task {}: its unit does not show its limits: {error}", entry.key);
        }
    }

    /// Notes the limits of the unit's cgroup, as those that the container has been compared with.
    pub(super) fn note_limits(&self, entry: &Arc<Entry>, limits: Option<Limits>) -> Result<(), Error> {
        self.note(entry, |task| {
            task.limits = limits;
            Ok(Vec::new())
        })?;
        Ok(())
    }

    async fn show_limits(
        &self,
        task: &Task,
        unit: &Path,
        outer: Limits,
        new: &Limits,
    ) -> Result<Limits, Error> {
        if new.is_empty() {
            return Ok(outer);
        }
        let properties = unit::limits::properties(new);
        match self.manager.set_properties(&task.unit, &properties).await {
            Ok(()) => read(unit).await,
            Err(error) => {
                tracing::warn!(task = %task.key, %error, "task {}: its unit does not show its limits: {error}", task.key);
                Ok(outer)
            }
        }
    }

    /// Somebody has set limits of the unit (`systemctl set-property`): the container gets them too.
    async fn carry_limits_down(self: Arc<Self>, entry: Arc<Entry>) {
        if let Err(error) = self.try_to_carry_down(&entry).await {
            tracing::warn!(task = %entry.key, %error, "task {}: new limits of its unit don't reach the container: {error}", entry.key);
        }
    }

    async fn try_to_carry_down(&self, entry: &Arc<Entry>) -> Result<(), Error> {
        let _limits = entry.limits.lock().await;
        let task = entry.task().clone();
        // Before the first look at them the container has none of its own to lose.
        let (Some(known), Some((unit, container)), true) =
            (task.limits.clone(), nested(&task), task.init.is_alive())
        else {
            return Ok(());
        };
        let (outer, inner) = (read(&unit).await?, read(&container).await?);
        let new = outer.differing_from(&known);
        if new.is_empty() {
            return Ok(());
        }
        for (attribute, value) in new.iter() {
            tracing::info!(task = %entry.key, "task {}: its unit has a new {} of {value:?}", entry.key, attribute.file());
        }
        let down = new.differing_from(&inner);
        let written = blocking(move || files::write(&container, &down)).await?;
        self.note_limits(entry, Some(outer))?;
        Ok(written?)
    }
}

/// The cgroups of a task's unit and of its container; nothing if the container's is elsewhere.
pub(super) fn nested(task: &Task) -> Option<(PathBuf, PathBuf)> {
    nested_at(task, task.cgroup.as_deref()?)
}

/// The cgroup whose memory events are those of the container. It is the unit's: that has the same limit, meets
/// it first, as the kernel charges it for the container's cgroup itself, and counts what is below it.
pub(super) fn memory_events_of(task: &Task) -> Option<&Path> {
    let container = task.cgroup.as_deref()?;
    match &task.placement {
        Placement::Unit { .. } => container.parent(),
        Placement::Foreign { .. } => Some(container),
    }
}

fn nested_at(task: &Task, container: &Path) -> Option<(PathBuf, PathBuf)> {
    match &task.placement {
        Placement::Unit { .. } => Some((container.parent()?.to_owned(), container.to_owned())),
        Placement::Foreign { .. } => None,
    }
}

/// The limits of a cgroup, read away from the async runtime.
pub(super) async fn read(cgroup: &Path) -> Result<Limits, Error> {
    let cgroup = cgroup.to_owned();
    Ok(blocking(move || files::read(&cgroup)).await??)
}
