//! Delete: removes a task that has ended, or an exec.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::MutexGuard;
use tokio_util::sync::CancellationToken;

use crate::config;
use crate::fault::{self, Point};
use crate::id::{ProcessKey, TaskKey};
use crate::services::registry::Completion;
use crate::services::{Delivery, Entry, Error, Process};
use crate::store::delete_replies::Deleted;
use crate::sys;
use crate::task::lifecycle::{Exit, Lifecycle};
use crate::task::outbox::TaskEvent;
use crate::task::phase::Phase;

use super::Shim;
use super::kill::end_all;

impl Shim {
    /// The response of an earlier daemon to the same Delete, if this call is a replay.
    pub(super) fn answered(&self, key: &ProcessKey, delivery: Delivery) -> Option<Deleted> {
        if delivery == Delivery::First { None } else { self.delete_replies.find(key) }
    }

    /// Removes an exec, or a task with all of its execs. The process has ended or was never started. Returns its pid and
    /// its exit status. `gone` is cancelled when the client no longer waits: the process then stays, with its exit status, until
    /// the client asks again.
    ///
    /// # Errors
    /// The process runs, something can't be removed, or the client is gone. The call can be repeated.
    pub async fn delete(
        self: &Arc<Self>,
        key: &ProcessKey,
        delivery: Delivery,
        gone: &CancellationToken,
    ) -> Result<Deleted, Error> {
        let deleted = match &key.exec {
            None => self.delete_init(&key.task, delivery, gone).await,
            Some(_) => self.delete_exec(key, gone).await,
        };
        match deleted {
            Err(error @ (Error::UnknownTask { .. } | Error::UnknownExec { .. })) => {
                self.answered(key, delivery).ok_or(error)
            }
            deleted => deleted,
        }
    }

    /// Removes a task that has been created. A client that deletes a task during its Create has given up that Create, and
    /// containerd does not ask again: the daemon removes the task, and the client gets the answer that there is no such task.
    async fn delete_init(
        self: &Arc<Self>,
        key: &TaskKey,
        delivery: Delivery,
        gone: &CancellationToken,
    ) -> Result<Deleted, Error> {
        if let Ok(entry) = self.tasks.entry(key)
            && self.give_up_create(&entry, delivery).await?
        {
            return Err(Error::UnknownTask { key: key.clone() });
        }
        let entry = self.tasks.created(key)?;
        self.delete_task(&entry, gone).await
    }

    /// Removes a task. If the task was created and never started, kills its process before.
    pub(super) async fn delete_task(
        self: &Arc<Self>,
        entry: &Arc<Entry>,
        gone: &CancellationToken,
    ) -> Result<Deleted, Error> {
        let phase = entry.task().init.phase.clone();
        if phase.is_alive() && entry.init.live().is_checkpointing {
            // The checkpoint may hang.
            return Err(Error::NotDeletable { phase: phase.word() });
        }
        let _verb = end_restores(entry).await;
        // Another Delete may have removed it while this one waited, and another task may have its id by now.
        if !self.tasks.is_live(entry) {
            return Err(Error::UnknownTask { key: entry.key.clone() });
        }
        let phase = entry.task().init.phase.clone();
        let exit = match phase {
            Phase::Stopped { exit, .. } => exit,
            Phase::Created { .. } => kill_and_wait(entry).await?,
            // No process has run, and containerd expects status 0 for such a container.
            Phase::Prepared => Exit { status: 0, at_usec: sys::now_usec() },
            Phase::Creating { .. }
            | Phase::Restoring { .. }
            | Phase::Starting { .. }
            | Phase::Running { .. }
            | Phase::Ending { .. } => {
                return Err(Error::NotDeletable { phase: "running" });
            }
            Phase::Paused { .. } => return Err(Error::NotDeletable { phase: "paused" }),
        };
        fault::point(Point::DeleteBegun);
        let task = entry.task().clone();
        let pid = task.init.pid();
        let troubles = self.cleanup.remove_container(&task, entry).await;
        if !troubles.is_empty() {
            return Err(Error::NotRemoved { process: entry.key.to_string(), reason: troubles.text() });
        }
        self.tasks.await_accepted(entry, None).await;
        check_client(&entry.init.key, gone)?;
        let deleted = Deleted { pid, exit: Some(exit) };
        self.delete_replies.record(&entry.init.key, deleted)?;
        self.forget(entry, TaskEvent::Deleted { pid, exit })?;
        fault::point(Point::DeleteForgotten);
        Ok(deleted)
    }

    /// Removes the task from disk and from memory. Its last events move to a file for the publisher.
    fn forget(&self, entry: &Arc<Entry>, event: TaskEvent) -> Result<(), Error> {
        self.tasks.note_deleted(entry, event)?;
        self.tasks.remove(&entry.key);
        self.tasks.announce(entry);
        Ok(())
    }

    /// Removes an exec that does not run. Returns its pid and its exit status, or neither if it never ran. Cancels a start
    /// in progress: its client has gone away (a probe does so after its timeout), and the start may hang in the container.
    ///
    /// # Errors
    /// The exec runs, or something can't be removed. The call can be repeated.
    async fn delete_exec(
        self: &Arc<Self>,
        key: &ProcessKey,
        gone: &CancellationToken,
    ) -> Result<Deleted, Error> {
        let (entry, process) = self.tasks.process(key)?;
        let has_run = entry.task().process(process.exec()).is_none_or(|exec| exec.has_run());
        if !has_run {
            process.live().attempt.given_up.cancel();
        }
        let deleted = self.delete_idle_exec(&entry, &process, gone).await;
        if deleted.is_err() {
            process.live().attempt.given_up = CancellationToken::new();
        }
        deleted
    }

    async fn delete_idle_exec(
        self: &Arc<Self>,
        entry: &Arc<Entry>,
        process: &Arc<Process>,
        gone: &CancellationToken,
    ) -> Result<Deleted, Error> {
        let _verb = process.verb.lock().await;
        let key = &process.key;
        let unknown = || Error::UnknownExec { key: key.clone() };
        // Another Delete may have removed it while this one waited, and another exec may have its id by now.
        if !self.tasks.is_live_process(entry, process) {
            return Err(unknown());
        }
        let id = process.exec().ok_or_else(unknown)?;
        let exec = entry.task().execs.get(id).cloned().ok_or_else(unknown)?;
        if exec.phase.is_live() {
            return Err(Error::NotDeletable { phase: "running" });
        }
        fault::point(Point::ExecDeleteBegun);
        self.streams.drain(process).await;
        let troubles = self.cleanup.remove_deleted_exec(entry, process).await;
        if !troubles.is_empty() {
            return Err(Error::NotRemoved { process: key.to_string(), reason: troubles.text() });
        }
        fault::point(Point::ExecDeleteUnit);
        self.tasks.await_accepted(entry, Some(id)).await;
        check_client(key, gone)?;
        let deleted = Deleted { pid: exec.pid(), exit: exec.exit() };
        self.delete_replies.record(key, deleted)?;
        fault::point(Point::ExecDeleteKept);
        self.tasks.change(entry, |task| {
            task.execs.remove(id);
            Ok(Vec::new())
        })?;
        self.tasks.registry.remove_exec(entry, id);
        fault::point(Point::ExecDeleteForgotten);
        Ok(deleted)
    }
}

/// Checks that the client still waits for the answer. Otherwise containerd would keep a task that this daemon does not know, and
/// nobody would learn the exit status.
fn check_client(key: &ProcessKey, gone: &CancellationToken) -> Result<(), Error> {
    if gone.is_cancelled() { Err(Error::ClientGone { process: key.clone() }) } else { Ok(()) }
}

/// Waits for the current operation on the init process, and ends restores, because a restore may hang. If a restore
/// completes before it is ended, the task runs.
async fn end_restores(entry: &Arc<Entry>) -> MutexGuard<'_, ()> {
    /// Another Start may get the lock first and begin another restore. So the phase is checked again after this time.
    const INTERVAL: Duration = Duration::from_secs(1);
    loop {
        if let Phase::Restoring { .. } = entry.task().init.phase {
            entry.init.live().attempt.interrupted.cancel();
        }
        if let Ok(verb) = tokio::time::timeout(INTERVAL, entry.init.verb.lock()).await {
            return verb;
        }
    }
}

/// Kills all processes of a task, and waits until systemd reports the end of init.
pub(super) async fn kill_and_wait(entry: &Arc<Entry>) -> Result<Exit, Error> {
    let task = entry.task().clone();
    end_all(entry, &task).await?;
    let unknown = || Error::UnknownTask { key: entry.key.clone() };
    match tokio::time::timeout(config::KILL_LIMIT, entry.init.ended()).await {
        Ok(Completion::Exited(exit)) => Ok(exit),
        Ok(Completion::Deleted) => Err(unknown()),
        Err(_) => Err(Error::NotEnding { key: entry.key.clone(), unit: entry.init.unit.to_string() }),
    }
}
