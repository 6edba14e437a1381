//! What systemd reports, applied to the tasks.

use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use tokio::sync::Semaphore;

use crate::cgroup;
use crate::fault::{self, Point};
use crate::id::UnitName;
use crate::services::changes::Noted;
use crate::services::{Entry, Process, Shim, blocking, now_usec};
use crate::task::phase::{Event, Exit, Phase, Seen};
use crate::unit;
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
        } else if process.exec().is_some() {
            // A unit that is stopped lets go of a process that is not systemd's child.
            self.query_unit(&entry, &process).await;
        }
    }

    /// Reads how a main process has ended after systemd has told of its end.
    async fn look_after_end(self: &Arc<Self>, entry: &Arc<Entry>, process: &Arc<Process>, told: MainProcess) {
        if entry.task().process(process.exec()).is_none_or(|process| process.exit().is_some()) {
            return;
        }
        let read = self.manager.main_process(&process.unit).await.unwrap_or_else(|error| {
            log_query_error(process, &error);
            None
        });
        let main = last_word(told, read);
        match main.ended {
            Some(ended) => self.ended(entry, process, seen(main, ended)),
            None => {
                let key = &process.key;
                tracing::warn!(process = %key, "{key}: systemd has told of its end, but it still runs");
            }
        }
    }

    /// Looks at every unit: signals may have been missed.
    pub async fn resync(self: &Arc<Self>) {
        tokio::spawn(self.clone().refer_to_units());
        let running = self.running_units().await;
        for entry in self.tasks.registry.all() {
            for process in entry.processes() {
                if !running.contains(&process.unit) {
                    self.query_unit(&entry, &process).await;
                }
            }
        }
    }

    /// Asks systemd whether a process has ended that is believed to live. A Create or a Start under way finds out for
    /// itself.
    pub(crate) async fn query_unit(self: &Arc<Self>, entry: &Arc<Entry>, process: &Arc<Process>) {
        if !entry.task().process(process.exec()).is_some_and(|process| process.is_alive()) {
            return;
        }
        let main = match self.manager.main_process(&process.unit).await {
            Ok(main) => main,
            Err(error) => return log_query_error(process, &error),
        };
        let exit = match (main, process.exec()) {
            (Some(main @ MainProcess { ended: Some(ended), .. }), _) => {
                return self.ended(entry, process, seen(main, ended));
            }
            (Some(MainProcess { pid: 1.., .. }), _) | (Some(_), None) => return,
            (None, None) => Exit { status: UNKNOWN_STATUS, at_usec: now_usec() },
            // Stopped from outside: systemd sends SIGTERM and SIGKILL, and does not wait for what is not
            // its child.
            (_, Some(_)) => exit_of(Ended::killed(now_usec())),
        };
        let (key, status) = (&process.key, exit.status);
        tracing::warn!(process = %key, "{key}: its unit was stopped; exit code unknown, reporting {status}");
        self.ended(entry, process, Seen { pid: None, exit });
    }

    fn ended(self: &Arc<Self>, entry: &Arc<Entry>, process: &Arc<Process>, seen: Seen) {
        fault::point(Point::ExitSeen);
        if process.exec().is_some() {
            return self.note_end(entry, process, seen);
        }
        let (runs, cgroup) = {
            let task = entry.task();
            let runs = matches!(task.init.phase, Phase::Running { .. } | Phase::Paused { .. });
            (runs, task.cgroup().map(Path::to_owned))
        };
        let knows_kills = !runs || self.knows_oom_kills(entry, seen);
        // Without a pid namespace of its own init's children outlive it, and RemainAfterExit keeps
        // systemd from ending them.
        let left_behind = cgroup.filter(|cgroup| cgroup::is_populated(cgroup));
        if knows_kills && left_behind.is_none() {
            return self.note_end(entry, process, seen);
        }
        // This may be told again in the meantime.
        if !std::mem::replace(&mut process.live().is_ending, true) {
            let (shim, entry) = (self.clone(), entry.clone());
            tokio::spawn(async move {
                if !knows_kills {
                    shim.ask_for_oom_kills(&entry).await;
                }
                if let Some(cgroup) = left_behind {
                    kill_left_behind(&entry, cgroup).await;
                }
                shim.note_end(&entry, &entry.init, seen);
                entry.init.live().is_ending = false;
            });
        }
    }

    fn note_end(self: &Arc<Self>, entry: &Arc<Entry>, process: &Arc<Process>, seen: Seen) {
        let noted = match self.tasks.note_event(entry, process, Event::Exited(seen)) {
            Ok(noted) => noted,
            Err(error) => {
                let key = &process.key;
                tracing::error!(process = %key, %error, "{key}: can't note its end: {error}");
                return;
            }
        };
        fault::point(Point::ExitNoted);
        if process.exec().is_none() {
            return self.close_input(entry, process);
        }
        process.live().attempt_ended.notify_one();
        self.after_exec(entry, process);
        // Until it is written, the unit keeps the exit.
        if noted == Noted::Written {
            self.remove_ended_exec(entry, process);
        }
    }

    /// The units that need no closer look: their main processes live, and when one ends that is told.
    pub(crate) async fn running_units(&self) -> HashSet<UnitName> {
        self.manager.running_units().await.unwrap_or_else(|error| {
            tracing::warn!(%error, "can't list the units, each is looked at: {error}");
            HashSet::new()
        })
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

fn log_query_error(process: &Process, error: &unit::error::Error) {
    let key = &process.key;
    tracing::warn!(process = %key, %error, "{key}: can't query its unit: {error}");
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
