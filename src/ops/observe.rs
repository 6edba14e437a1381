//! What systemd reports, applied to the tasks.

use std::sync::Arc;

use crate::cgroup;
use crate::id::UnitName;
use crate::oci::runtime;
use crate::task::phase::{Event, Exit, Phase};
use crate::unit::proxy::{Ended, MainProcess};
use crate::unit::watch::Observation;

use super::{Entry, Error, Shim, blocking, now_usec};

/// What containerd takes for "unknown".
const UNKNOWN_STATUS: u32 = 255;

impl Shim {
    /// Applies an observation; a repeat changes nothing.
    pub async fn observe(self: &Arc<Self>, observation: Observation) {
        match observation {
            Observation::Service { unit, main } => self.service_changed(&unit, main),
            Observation::Resync => self.resync().await,
        }
    }

    fn service_changed(self: &Arc<Self>, unit: &UnitName, main: MainProcess) {
        let Some(entry) = self.registry.by_unit(unit) else {
            return;
        };
        if let Some(ended) = main.ended.filter(|_| is_init(&entry, main)) {
            self.ended(&entry, exit_of(ended));
        }
    }

    /// Looks at every unit: signals may have been missed.
    pub async fn resync(self: &Arc<Self>) {
        for entry in self.registry.all() {
            if let Err(error) = self.look_at(&entry).await {
                tracing::warn!(task = %entry.key, %error, "task {}: can't look at its unit: {error}", entry.key);
            }
        }
    }

    async fn look_at(self: &Arc<Self>, entry: &Arc<Entry>) -> Result<(), Error> {
        let phase = entry.task().init.clone();
        // A Create under way finds out for itself.
        if phase.exit().is_some() || phase.pid().is_none() {
            return Ok(());
        }
        let main = self.manager.main_process(&entry.unit).await?;
        match main {
            Some(main) => {
                if let Some(ended) = main.ended.filter(|_| is_init(entry, main)) {
                    self.ended(entry, exit_of(ended));
                }
            }
            None => {
                tracing::warn!(task = %entry.key, "task {}: its unit is gone and took the exit code along", entry.key);
                self.ended(entry, Exit { status: UNKNOWN_STATUS, at_usec: now_usec() });
            }
        }
        Ok(())
    }

    fn ended(self: &Arc<Self>, entry: &Arc<Entry>, exit: Exit) {
        if let Err(error) = self.apply(entry, Event::Exited(exit)) {
            // The record could not be written. The unit keeps the exit; the next look finds it.
            tracing::error!(task = %entry.key, %error, "task {}: can't note its end: {error}", entry.key);
            return;
        }
        entry.live().close_input();
        let cgroup = entry.task().cgroup.clone();
        let Some(cgroup) = cgroup else {
            return;
        };
        // Without a pid namespace of its own init's children outlive it, and RemainAfterExit keeps
        // systemd from ending them.
        tokio::task::spawn_blocking(move || {
            if cgroup::is_populated(&cgroup)
                && let Err(error) = cgroup::kill(&cgroup)
            {
                tracing::warn!(%error, "can't kill what init left behind: {error}");
            }
        });
    }

    /// Takes in what an earlier daemon left: records become tasks, and each is compared with its unit.
    ///
    /// # Errors
    /// The records can't be listed.
    pub async fn recover(self: &Arc<Self>) -> Result<(), Error> {
        let store = self.store.clone();
        let (records, owed) = blocking(move || (store.load_all(), store.load_owed())).await?;
        for (owing, task) in owed? {
            match task {
                Ok(task) => {
                    let entry = Arc::new(Entry::detached(task));
                    entry.live().owing = Some(owing);
                    self.announce(&entry);
                }
                Err(error) => tracing::error!(%error, "events of a deleted task are not published: {error}"),
            }
        }
        for record in records? {
            match record {
                Ok(task) => match self.registry.insert(task) {
                    Ok(entry) => self.take_in(&entry).await,
                    Err(taken) => tracing::error!(?taken, "two records for one task: {taken:?}"),
                },
                Err(error) => tracing::error!(%error, "a task is not taken in: {error}"),
            }
        }
        Ok(())
    }

    async fn take_in(self: &Arc<Self>, entry: &Arc<Entry>) {
        let task = entry.task().clone();
        match task.init {
            Phase::Creating { .. } => {
                tracing::warn!(task = %task.key, "task {}: its create was cut off, it is taken back", task.key);
                let _verb = entry.verb.lock().await;
                self.take_back(entry).await;
                return;
            }
            Phase::Starting { .. } => {
                let dir = self.store.dir(&task.key);
                let cli = runtime::Cli { runtime: &task.runtime, id: &task.key.id, dir: &dir };
                let event = if cli.waits_for_start() { Event::StartFailed } else { Event::Started };
                if let Err(error) = self.apply(entry, event) {
                    tracing::error!(task = %task.key, %error, "task {}: can't finish its start: {error}", task.key);
                }
            }
            Phase::Created { .. } | Phase::Running { .. } | Phase::Stopped { .. } => {}
        }
        if let (Some(pid), None) = (task.init.pid(), task.init.exit()) {
            entry.live().process = crate::sys::pidfd_open(pid).ok();
            self.recover_streams(entry).await;
            if let Err(error) = self.look_at(entry).await {
                tracing::warn!(task = %task.key, %error, "task {}: can't look at its unit: {error}", task.key);
            }
        }
        self.announce(entry);
    }
}

/// The end that systemd reports is that of this task's init, not of what it took for one before.
fn is_init(entry: &Entry, main: MainProcess) -> bool {
    entry.task().init.pid().is_none_or(|pid| main.last_pid == 0 || main.last_pid == pid)
}

fn exit_of(ended: Ended) -> Exit {
    let at_usec = if ended.at_usec == 0 { now_usec() } else { ended.at_usec };
    Exit { status: ended.exit_status(), at_usec }
}
