//! What systemd reports, applied to the tasks.

use std::collections::HashSet;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use tokio::sync::Semaphore;

use crate::cgroup;
use crate::fault::{self, Point};
use crate::id::{ExecId, UnitName};
use crate::services::changes::Noted;
use crate::services::{Entry, Error, Process, Shim, blocking, now_usec};
use crate::task::exec::{ExecEvent, ExecPhase};
use crate::task::phase::{Event, Exit, Phase, Seen};
use crate::unit::main_process::{Ended, MainProcess};
use crate::unit::observations::Observations;

/// How many units are looked at at a time after a signal. systemd answers one call after the other.
const MAX_LOOKS: usize = 16;

/// What containerd takes for "unknown".
const UNKNOWN_STATUS: u32 = 255;

/// How long an end waits until what init left behind is killed.
const LEFT_BEHIND_LIMIT: Duration = Duration::from_secs(2);

/// The order in which the daemon refers to units: one round after the other.
#[derive(Default)]
pub struct References {
    turn: tokio::sync::Mutex<()>,
    /// Another round is asked for.
    again: AtomicBool,
}

impl Shim {
    /// Deals with what is noticed of units, for as long as it is polled.
    pub async fn observe(self: Arc<Self>, observations: Arc<Observations>) {
        let all = async {
            loop {
                observations.receive_missed().await;
                self.resync().await;
            }
        };
        let each = async {
            let looks = Arc::new(Semaphore::new(MAX_LOOKS));
            loop {
                // The semaphore is never closed.
                let look = looks.clone().acquire_owned().await;
                let (unit, told) = observations.next().await;
                let shim = self.clone();
                tokio::spawn(async move {
                    shim.service_changed(&unit, told).await;
                    drop(look);
                });
            }
        };
        tokio::join!(all, each);
    }

    /// The main process of a unit is no longer what it was, as systemd has told; a repeat changes nothing.
    async fn service_changed(self: &Arc<Self>, unit: &UnitName, told: MainProcess) {
        let Some((entry, process)) = self.tasks.registry.by_unit(unit) else {
            return;
        };
        if told.ended.is_some() {
            self.look_after_end(&entry, &process, told).await;
        } else if let Some(id) = &process.key.exec
            && runs(&entry, id)
        {
            // A unit that is stopped lets go of a process that is not systemd's child.
            let looked = self.look_at_exec(&entry, &process, id).await;
            looked.unwrap_or_else(|error| cant_look(&process, &error));
        }
    }

    /// Reads how a main process has ended after systemd has told of its end.
    async fn look_after_end(self: &Arc<Self>, entry: &Arc<Entry>, process: &Arc<Process>, told: MainProcess) {
        let exec = process.key.exec.as_ref();
        let is_noted = match exec {
            Some(id) => entry.task().execs.get(id).is_none_or(|exec| exec.phase.exit().is_some()),
            None => entry.task().init.exit().is_some(),
        };
        if is_noted {
            return;
        }
        let read = self.manager.main_process(&process.unit).await.unwrap_or_else(|error| {
            cant_look(process, &error.into());
            None
        });
        let main = last_word(told, read);
        match (exec, main.ended) {
            (None, Some(ended)) => self.ended(entry, seen(main, ended)),
            (Some(id), Some(ended)) => self.exec_ended(entry, process, id, seen(main, ended)),
            (_, None) => {
                let key = &process.key;
                tracing::warn!(process = %key, "{key}: systemd has told of its end, but it still runs");
            }
        }
    }

    /// Looks at every unit: signals may have been missed.
    pub async fn resync(self: &Arc<Self>) {
        tokio::spawn(self.clone().refer_to_units());
        let living = self.living().await;
        for entry in self.tasks.registry.all() {
            if !living.contains(&entry.init.unit) {
                self.look_at(&entry).await.unwrap_or_else(|error| cant_look(&entry.init, &error));
            }
            for process in entry.execs() {
                if let Some(id) = &process.key.exec
                    && !living.contains(&process.unit)
                {
                    let looked = self.look_at_exec(&entry, &process, id).await;
                    looked.unwrap_or_else(|error| cant_look(&process, &error));
                }
            }
        }
    }

    /// The units that need no closer look: their main processes live, and when one ends that is told.
    pub(crate) async fn living(&self) -> HashSet<UnitName> {
        self.manager.running_units().await.unwrap_or_else(|error| {
            tracing::warn!(%error, "can't list the units, each is looked at: {error}");
            HashSet::new()
        })
    }

    /// Asks systemd whether the process of an exec has ended.
    pub(crate) async fn look_at_exec(
        self: &Arc<Self>,
        entry: &Arc<Entry>,
        process: &Arc<Process>,
        id: &ExecId,
    ) -> Result<(), Error> {
        // A Start under way finds out for itself.
        if !runs(entry, id) {
            return Ok(());
        }
        let main = self.manager.main_process(&process.unit).await?;
        match main {
            Some(main @ MainProcess { ended: Some(ended), .. }) => {
                self.exec_ended(entry, process, id, seen(main, ended));
            }
            Some(MainProcess { pid: 1.., .. }) => {}
            // Stopped from outside: systemd sends SIGTERM and SIGKILL, and does not wait for what is not
            // its child.
            Some(MainProcess { pid: 0, ended: None, .. }) | None => {
                let key = &process.key;
                tracing::warn!(process = %key, "{key}: its unit was stopped, which took the exit code along");
                let killed = exit_of(Ended::killed(now_usec()));
                self.exec_ended(entry, process, id, Seen { pid: None, exit: killed });
            }
        }
        Ok(())
    }

    fn exec_ended(self: &Arc<Self>, entry: &Arc<Entry>, process: &Arc<Process>, id: &ExecId, seen: Seen) {
        fault::point(Point::ExitSeen);
        let noted = match self.tasks.note_exec_event(entry, id, ExecEvent::Exited(seen)) {
            Ok(noted) => noted,
            Err(error) => {
                tracing::error!(process = %process.key, %error, "{}: can't note its end: {error}", process.key);
                return;
            }
        };
        fault::point(Point::ExitNoted);
        process.live().attempt_ended.notify_one();
        self.after_exec(entry, process);
        // Until it is written, the unit keeps the exit.
        if noted == Noted::Written {
            self.remove_ended_exec(entry, process);
        }
    }

    /// Asks systemd whether the init process of a task has ended.
    pub(crate) async fn look_at(self: &Arc<Self>, entry: &Arc<Entry>) -> Result<(), Error> {
        let phase = entry.task().init.clone();
        // A Create under way finds out for itself.
        if phase.pid().is_none() || !phase.is_alive() {
            return Ok(());
        }
        let main = self.manager.main_process(&entry.init.unit).await?;
        match main {
            Some(main) => {
                if let Some(ended) = main.ended {
                    self.ended(entry, seen(main, ended));
                }
            }
            None => {
                tracing::warn!(task = %entry.key, "task {}: its unit is gone and took the exit code along", entry.key);
                let exit = Exit { status: UNKNOWN_STATUS, at_usec: now_usec() };
                self.ended(entry, Seen { pid: None, exit });
            }
        }
        Ok(())
    }

    fn ended(self: &Arc<Self>, entry: &Arc<Entry>, seen: Seen) {
        fault::point(Point::ExitSeen);
        let (runs, cgroup) = {
            let task = entry.task();
            (matches!(task.init, Phase::Running { .. } | Phase::Paused { .. }), task.cgroup.clone())
        };
        let knows_kills = !runs || self.knows_oom_kills(entry, seen);
        // Without a pid namespace of its own init's children outlive it, and RemainAfterExit keeps
        // systemd from ending them.
        let left_behind = cgroup.filter(|cgroup| cgroup::is_populated(cgroup));
        if knows_kills && left_behind.is_none() {
            return self.end(entry, seen);
        }
        // This may be told again in the meantime.
        if !std::mem::replace(&mut entry.init.live().is_ending, true) {
            let (shim, entry) = (self.clone(), entry.clone());
            tokio::spawn(async move {
                if !knows_kills {
                    shim.ask_for_oom_kills(&entry).await;
                }
                if let Some(cgroup) = left_behind {
                    kill_left_behind(&entry, cgroup).await;
                }
                shim.end(&entry, seen);
                entry.init.live().is_ending = false;
            });
        }
    }

    fn end(self: &Arc<Self>, entry: &Arc<Entry>, seen: Seen) {
        if let Err(error) = self.tasks.note_event(entry, Event::Exited(seen)) {
            tracing::error!(task = %entry.key, %error, "task {}: can't note its end: {error}", entry.key);
            return;
        }
        fault::point(Point::ExitNoted);
        self.close_input(entry, &entry.init);
    }

    /// Refers to the unit of every task over the present connection to the bus, and lets go of earlier
    /// ones. Not to that of a task that is being deleted: nobody would give the reference back.
    ///
    /// A task whose verb hangs holds up no other one. One call does this for all that come while it waits for its turn.
    pub(crate) async fn refer_to_units(self: Arc<Self>) {
        self.references.again.store(true, Ordering::SeqCst);
        let _one = self.references.turn.lock().await;
        if !self.references.again.swap(false, Ordering::SeqCst) {
            return;
        }
        let referred = self.tasks.registry.all().into_iter().map(|entry| {
            let shim = self.clone();
            async move {
                let _verb = entry.init.verb.lock().await;
                if shim.tasks.is_live(&entry) {
                    shim.manager.reference(&entry.init.unit).await;
                }
            }
        });
        futures_util::future::join_all(referred).await;
        self.manager.forget_earlier_references();
    }
}

/// Kills what init has left behind, before its end is told. What the kernel does not kill in time does not
/// hold the end back.
async fn kill_left_behind(entry: &Entry, cgroup: PathBuf) {
    let killed = blocking(move || cgroup::kill(&cgroup));
    let reason = match tokio::time::timeout(LEFT_BEHIND_LIMIT, killed).await {
        Ok(Ok(Ok(()))) => return,
        Ok(Ok(Err(error))) => error.to_string(),
        Ok(Err(error)) => error.to_string(),
        Err(_) => format!("not done within {} s", LEFT_BEHIND_LIMIT.as_secs()),
    };
    tracing::warn!(task = %entry.key, "task {}: can't kill what init left behind: {reason}", entry.key);
}

/// What is believed of a main process of whose end systemd has told: what systemd answers when it is asked.
///
/// Unless it answers of another process, or of none. Then the unit was unloaded or started again in the meantime: systemd
/// does not know any more what it has told. An exec's unit is unloaded as soon as somebody stops it.
fn last_word(told: MainProcess, read: Option<MainProcess>) -> MainProcess {
    let is_same = |read: &MainProcess| told.last_pid == 0 || read.last_pid == told.last_pid;
    read.filter(is_same).unwrap_or(told)
}

/// Logs that systemd could not be asked about a unit.
pub(crate) fn cant_look(process: &Process, error: &Error) {
    tracing::warn!(process = %process.key, %error, "{}: can't look at its unit: {error}", process.key);
}

fn runs(entry: &Entry, id: &ExecId) -> bool {
    matches!(entry.task().execs.get(id).map(|exec| &exec.phase), Some(ExecPhase::Running { .. }))
}

fn seen(main: MainProcess, ended: Ended) -> Seen {
    Seen { pid: (main.last_pid != 0).then_some(main.last_pid), exit: exit_of(ended) }
}

fn exit_of(ended: Ended) -> Exit {
    let at_usec = if ended.at_usec == 0 { now_usec() } else { ended.at_usec };
    Exit { status: ended.exit_status(), at_usec }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TOLD: MainProcess =
        MainProcess { pid: 0, last_pid: 7, ended: Some(Ended { code: 1, status: 3, at_usec: 5 }) };

    #[test]
    fn what_systemd_answers_counts_more_than_what_it_has_told() {
        let runs = MainProcess { pid: 7, last_pid: 7, ended: None };
        assert_eq!(last_word(TOLD, Some(runs)), runs);
        let ended = MainProcess { ended: Some(Ended { code: 2, status: 9, at_usec: 6 }), ..TOLD };
        assert_eq!(last_word(TOLD, Some(ended)), ended);
    }

    #[test]
    fn an_end_is_not_lost_when_the_unit_has_been_unloaded_or_started_again() {
        assert_eq!(last_word(TOLD, None), TOLD);
        for later in [
            MainProcess::default(),
            MainProcess { pid: 8, last_pid: 8, ended: None },
            MainProcess { pid: 0, last_pid: 8, ended: Some(Ended { code: 1, status: 0, at_usec: 9 }) },
        ] {
            assert_eq!(last_word(TOLD, Some(later)), TOLD);
        }
    }
}
