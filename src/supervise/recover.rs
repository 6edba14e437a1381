//! Recovery: what an earlier daemon left becomes tasks again, and each is compared with its unit.

use std::collections::HashSet;
use std::sync::Arc;

use tokio::sync::oneshot;

use crate::fault::{self, Point};
use crate::id::{ExecId, UnitName};
use crate::oci::runtime;
use crate::services::changes::Stored;
use crate::services::process::program_of;
use crate::services::{Entry, Error, Process, Shim, blocking, go_on};
use crate::store::Found;
use crate::suspect::{Crashes, Suspect};
use crate::task::Task;
use crate::task::exec::ExecPhase;
use crate::task::phase::{Event, Phase};

use super::systemd::cant_look;

impl Shim {
    /// Takes in what an earlier daemon left: records become tasks, and each is compared with its unit. A record
    /// that has crashed daemons before is moved aside instead. Directories without a record are removed.
    ///
    /// # Errors
    /// The records can't be listed.
    pub async fn recover(self: &Arc<Self>, crashes: &Arc<Crashes>) -> Result<(), Error> {
        let (store, crashes) = (self.store.clone(), crashes.clone());
        let load = move || {
            // These directories cost some memory and nothing else: tasks are recovered all the same.
            if let Err(error) = store.remove_remains() {
                tracing::warn!(%error, "directories that a removal has left behind can't be removed: {error}");
            }
            (store.load_all(&crashes), store.load_owed())
        };
        let (records, owed) = blocking(load).await?;
        let records = records?;
        let is_recorded = |owed: &Task| {
            let recorded = records.iter().flatten();
            recorded.filter(|found| found.task.key == owed.key).any(|found| found.task.init == owed.init)
        };
        for (owing, task) in owed? {
            match task {
                // A Delete was cut off before it removed the record, which has these events too.
                Ok(task) if is_recorded(&task) => {
                    if let Err(error) = owing.discard() {
                        tracing::warn!(task = %task.key, %error, "task {}: its last events may be published twice: {error}", task.key);
                    }
                }
                Ok(task) => {
                    // More than fit have been taken by an earlier version: they are published as well.
                    let _ = self.tasks.owings.begin(&task.containerd.ttrpc_address);
                    let entry = Arc::new(Entry::detached(task));
                    entry.init.live().stored = Stored::Owed(owing);
                    self.tasks.announce(&entry);
                }
                Err(error) => tracing::error!(%error, "events of a deleted task are not published: {error}"),
            }
        }
        let living = self.living().await;
        for record in records {
            match record {
                Ok(Found { task, is_current }) => match self.tasks.registry.insert(task) {
                    Ok((entry, verb)) => {
                        drop(verb);
                        if !is_current {
                            self.tasks.write_later(&entry);
                        }
                        let task = entry.task().clone();
                        let execs = task.execs.values().map(|exec| &exec.wiring);
                        execs.chain([&task.wiring]).for_each(|wiring| self.fds.reserve(wiring.kept));
                        let suspect = Suspect::record(&entry.key);
                        suspect.watch(self.take_in(&entry, &living)).await;
                    }
                    Err(taken) => tracing::error!(?taken, "two records for one task: {taken:?}"),
                },
                Err(error) => tracing::error!(%error, "a task is not taken in: {error}"),
            }
        }
        self.fds.drop_unclaimed();
        tokio::spawn(self.clone().refer_to_units());
        Ok(())
    }

    async fn take_in(self: &Arc<Self>, entry: &Arc<Entry>, living: &HashSet<UnitName>) {
        fault::point(Point::RecoverTask);
        let task = entry.task().clone();
        if task.is_leftover {
            let (shim, leftover) = (self.clone(), entry.clone());
            // It logs what is left.
            tokio::spawn(async move { shim.remove_leftover(&leftover).await });
            return;
        }
        if task.muted {
            let (shim, given_up) = (self.clone(), entry.clone());
            tokio::spawn(async move { shim.remove_given_up(&given_up).await });
        }
        match task.init {
            Phase::Creating { .. } => {
                let (shim, creating) = (self.clone(), entry.clone());
                go_on(&entry.init, |taken| async move { shim.resume_create(&creating, taken).await }).await;
                return;
            }
            Phase::Starting { .. } => {
                let (shim, starting) = (self.clone(), entry.clone());
                go_on(&entry.init, |taken| async move { shim.finish_start(&starting, taken).await }).await;
            }
            Phase::Created { .. }
            | Phase::Running { .. }
            | Phase::Paused { .. }
            | Phase::Ending { .. }
            | Phase::Stopped { .. } => {}
        }
        for (id, exec) in &task.execs {
            match self.tasks.registry.insert_exec(entry, id, exec.unit.clone(), exec.phase.exit()) {
                Ok((process, verb)) => {
                    drop(verb);
                    self.take_in_exec(entry, &process, id, living).await;
                }
                Err(taken) => {
                    tracing::error!(?taken, "exec {id} of task {}: not taken in: {taken:?}", task.key)
                }
            }
        }
        if let Some(pid) = task.init.pid().filter(|_| task.init.is_alive()) {
            self.hold(entry, pid);
            self.watch_cgroup(entry);
            self.listen_again(entry);
        }
        self.recover_streams(entry, &entry.init).await;
        if !living.contains(&entry.init.unit) {
            self.look_at(entry).await.unwrap_or_else(|error| cant_look(&entry.init, &error));
        }
        self.tasks.announce(entry);
    }

    /// After a restart: settles a Start that was cut off.
    async fn finish_start(self: &Arc<Self>, entry: &Arc<Entry>, taken: oneshot::Sender<()>) {
        // Nobody waits any more if the daemon ends. The streams are taken over as those of one that runs.
        let _ = taken.send(());
        let task = entry.task().clone();
        let dir = self.store.dir(&task.key);
        let cli = runtime::Cli::of(&task, &dir);
        if let Err(error) = cli.settled("start").await {
            tracing::error!(task = %task.key, %error, "task {}: its start was cut off, and does not end: {error}", task.key);
        }
        // A `runc start` that was cut off may have let init go, and not said so: starting it again
        // would wait for its end.
        let program = task.init.pid().and_then(program_of);
        let waits = cli.waits_for_start() && program == task.waiting_program;
        if !waits {
            cli.note_start();
        }
        let event = if waits { Event::StartFailed } else { Event::Started };
        if let Err(error) = self.tasks.note_event(entry, event) {
            tracing::error!(task = %task.key, %error, "task {}: can't finish its start: {error}", task.key);
        }
    }

    async fn take_in_exec(
        self: &Arc<Self>,
        entry: &Arc<Entry>,
        process: &Arc<Process>,
        id: &ExecId,
        living: &HashSet<UnitName>,
    ) {
        let phase = entry.task().execs.get(id).map(|exec| exec.phase.clone());
        self.recover_exec(entry, process, id).await;
        if let Some(ExecPhase::Running { .. } | ExecPhase::Stopped { .. }) = phase {
            self.recover_streams(entry, process).await;
            if living.contains(&process.unit) {
                return;
            }
            let looked = self.look_at_exec(entry, process, id).await;
            looked.unwrap_or_else(|error| cant_look(process, &error));
            // An earlier daemon may have ended before it removed the unit.
            if matches!(phase, Some(ExecPhase::Stopped { .. })) {
                self.remove_ended_exec(entry, process);
            }
        }
    }

    /// After a restart: goes on with a start that was cut off, or takes it back; holds what runs.
    async fn recover_exec(self: &Arc<Self>, entry: &Arc<Entry>, process: &Arc<Process>, id: &ExecId) {
        let phase = entry.task().execs.get(id).map(|exec| exec.phase.clone());
        match phase {
            Some(ExecPhase::Starting { .. }) => {
                let (shim, entry, id) = (self.clone(), entry.clone(), id.clone());
                let starting = process.clone();
                go_on(process, |taken| async move {
                    shim.resume_start(&entry, &starting, &id, taken).await;
                })
                .await;
            }
            Some(ExecPhase::Running { pid }) => {
                self.hold_exec(entry, process, pid);
                self.let_boot_finish(entry, process);
            }
            Some(ExecPhase::Added | ExecPhase::Stopped { .. }) | None => {}
        }
        self.after_exec(entry, process);
    }
}
