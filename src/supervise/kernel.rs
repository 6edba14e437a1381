//! Applies what the kernel reports about the cgroups of containers to the tasks.

use std::pin::pin;
use std::sync::Arc;

use crate::cgroup::watch::{Change, Watch};
use crate::id::TaskKey;
use crate::services::later::Later;
use crate::services::{Entry, Tasks};
use crate::unit::systemd::Systemd;

use super::limits::nested;
use super::oom::memory_events_of;

/// Applies what the kernel reports about the cgroups of containers: kills for lack of memory, freezes, new limits.
pub struct Cgroups {
    /// The live tasks and their records.
    pub(super) tasks: Arc<Tasks>,
    /// systemd, which gets new limits, and which counts the kills in a cgroup that does not exist any more.
    pub(super) manager: Arc<dyn Systemd>,
    /// Reports changes in the cgroups.
    pub(super) watch: Arc<Watch<TaskKey>>,
    later: Arc<Later>,
}

impl Cgroups {
    /// Puts the parts together.
    pub(crate) fn new(
        tasks: Arc<Tasks>,
        manager: Arc<dyn Systemd>,
        watch: Arc<Watch<TaskKey>>,
        later: Arc<Later>,
    ) -> Self {
        Self { tasks, manager, watch, later }
    }

    /// Background task: applies what the kernel reports. A repeated report changes nothing. Returns only after an error.
    pub async fn observe(self: Arc<Self>) {
        // One future for all rounds: a new one in each round would begin its pause again at each report.
        let mut retry = pin!(self.watch.retry());
        loop {
            let changes = tokio::select! {
                changes = self.watch.next() => changes,
                () = &mut retry => {
                    self.watch_missed_cgroups();
                    retry.set(self.watch.retry());
                    continue;
                }
            };
            match changes {
                Ok(changes) => self.apply_changes(changes),
                Err(error) => {
                    tracing::error!(%error, "can't watch cgroups any more, so pauses and kills for lack of memory are not reported: {error}");
                    return;
                }
            }
        }
    }

    /// Applies what the kernel has reported.
    pub(crate) fn apply_changes(self: &Arc<Self>, changes: Vec<(Option<TaskKey>, Change)>) {
        for (key, change) in changes {
            match key {
                Some(key) => {
                    self.tasks.registry.get(&key).iter().for_each(|entry| self.changed(entry, change))
                }
                None => self.tasks.registry.all().iter().for_each(|entry| self.changed(entry, change)),
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
        for entry in self.tasks.registry.all() {
            let is_missed = entry.init.live().cgroup.watched.is_none() && entry.task().init.is_alive();
            if is_missed && entry.task().init.pid().is_some() {
                self.watch(&entry);
            }
        }
    }

    /// Begins to watch the cgroup of a task, and applies what has happened in it before.
    pub(crate) fn watch(self: &Arc<Self>, entry: &Arc<Entry>) {
        self.watch_state(entry);
        tokio::spawn(self.clone().carry_limits_down(entry.clone()));
    }

    /// The same for a task that is recovered. What has happened to its limits is applied after recovery.
    pub(crate) fn watch_again(self: &Arc<Self>, entry: &Arc<Entry>) {
        self.watch_state(entry);
        self.later.spawn(self.clone().carry_limits_down(entry.clone()));
    }

    fn watch_state(self: &Arc<Self>, entry: &Arc<Entry>) {
        let task = entry.task().clone();
        let Some(container) = task.cgroup() else {
            return;
        };
        let limits = nested(&task).map(|(unit, _)| unit);
        let memory = memory_events_of(&task).unwrap_or(container);
        match self.watch.add(&entry.key, container, memory, limits.as_deref()) {
            Ok(watched) => entry.init.live().cgroup.watched = Some(watched),
            // The container has ended, and systemd has removed the cgroup.
            Err(error) if error.is_gone() => {}
            // Logged once: other cgroups fail for the same reason at the same time.
            Err(error) if self.watch.miss() => {
                tracing::warn!(task = %entry.key, %error, "task {}: can't watch its cgroup for now: {error}", entry.key);
            }
            Err(_) => {}
        }
        self.note_oom_kills(entry);
        self.note_freezer(entry);
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::Path;
    use std::time::Duration;

    use super::*;
    use crate::cgroup;
    use crate::id::TaskId;
    use crate::services::Delivery;
    use crate::simulation::harness::{Step, World};

    #[test]
    fn reports_of_another_cgroup_do_not_delay_the_next_try_to_watch_one() {
        let world = World::new("missed-watch");
        world.take(&[Step::Create, Step::Start], Delivery::First).unwrap().unwrap();
        let init = world.init();
        let events = world
            .live(move |shim| async move {
                let task = shim.tasks.process(&init).unwrap().0.task().clone();
                cgroup::dir(task.cgroup().unwrap()).join("cgroup.events")
            })
            .unwrap();
        // The kernel refuses to watch this one, as it does when there are too many watches.
        fs::remove_file(&events).unwrap();
        std::os::unix::fs::symlink(&events, &events).unwrap();
        let init = world.init();
        let watched = world.live(move |shim| async move {
            let entry = shim.tasks.process(&init).unwrap().0;
            let is_watched = || entry.init.live().cgroup.watched.is_some();
            let other = Path::new("/busy.slice");
            cgroup::fake::make(other);
            let key = TaskKey { id: TaskId::new("other").unwrap(), ..entry.key.clone() };
            let _watched = shim.cgroups.watch.add(&key, other, other, None).unwrap();
            let before = is_watched();
            fs::remove_file(&events).unwrap();
            cgroup::fake::set_frozen(entry.task().cgroup().unwrap(), false);
            for frozen in [true, false, true] {
                tokio::time::sleep(Duration::from_secs(5)).await;
                cgroup::fake::set_frozen(other, frozen);
            }
            cgroup::fake::remove(other);
            (before, is_watched())
        });
        assert_eq!(watched, Some((false, true)));
    }
}
