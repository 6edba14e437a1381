//! What systemd reports, applied to the tasks.

use std::collections::HashSet;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use tokio::sync::Semaphore;

use crate::cgroup;
use crate::fault::{self, Point};
use crate::id::UnitName;
use crate::services::process::{has_ended, hold};
use crate::services::streams::Streams;
use crate::services::{Entry, Process, Tasks};
use crate::sys;
use crate::task::lifecycle::{Event, Exit, ObservedExit};
use crate::task::phase::Phase;
use crate::unit;
use crate::unit::main_process::{MainProcess, WaitStatus};
use crate::unit::observations::Observations;
use crate::unit::systemd::Systemd;

use super::{Cgroups, Cleanup};

/// How many units are queried at the same time after signals. systemd answers one call after the other.
pub(super) const MAX_QUERIES: usize = 16;

/// The exit status that means "unknown" to containerd.
const UNKNOWN_STATUS: u32 = 255;

/// How long the report of an end is delayed while the processes that init left behind are killed.
const LEFT_BEHIND_LIMIT: Duration = Duration::from_secs(2);

/// How long [`Units::reference_each`] waits for the operation that is under way for a task.
const VERB_LIMIT: Duration = Duration::from_secs(5);

/// How long the daemon waits before it references units again that it could not reference.
const REFERENCE_PAUSE: Duration = Duration::from_secs(10);

/// Serialises the rounds in which the daemon references units.
#[derive(Default)]
struct References {
    /// Held for the length of a round.
    turn: tokio::sync::Mutex<()>,
    /// True if another round is requested.
    again: AtomicBool,
}

impl References {
    /// Runs a round, once no other one runs. One round serves all calls that arrive while it waits for its turn. Returns
    /// false if the round has failed, to the call that has run it.
    async fn round(&self, round: impl Future<Output = bool>) -> bool {
        self.again.store(true, Ordering::SeqCst);
        let _turn = self.turn.lock().await;
        !self.again.swap(false, Ordering::SeqCst) || round.await
    }
}

/// Applies what systemd reports about units to the tasks.
pub struct Units {
    /// The live tasks and their records.
    pub(super) tasks: Arc<Tasks>,
    manager: Arc<dyn Systemd>,
    /// The sessions of processes.
    streams: Arc<Streams>,
    /// Knows the kills for lack of memory, which are reported before the end of a container.
    cgroups: Arc<Cgroups>,
    /// Removes the units of execs that have ended.
    cleanup: Arc<Cleanup>,
    /// The rounds in which the daemon references units.
    references: References,
}

impl Units {
    /// Puts the parts together.
    pub(crate) fn new(
        tasks: Arc<Tasks>,
        manager: Arc<dyn Systemd>,
        streams: Arc<Streams>,
        cgroups: Arc<Cgroups>,
        cleanup: Arc<Cleanup>,
    ) -> Self {
        Self { tasks, manager, streams, cgroups, cleanup, references: References::default() }
    }

    /// Background task: applies what systemd reports about units. Never returns.
    pub async fn observe(self: Arc<Self>, observations: Arc<Observations>) {
        let all = async {
            loop {
                tokio::spawn(self.clone().keep_order());
                observations.receive_missed().await;
                self.resync().await;
            }
        };
        let each = async {
            let queries = Arc::new(Semaphore::new(MAX_QUERIES));
            loop {
                // The semaphore is never closed.
                let query = queries.clone().acquire_owned().await;
                let report = observations.next().await;
                let this = self.clone();
                tokio::spawn(async move {
                    this.service_changed(&report.unit, report.main).await;
                    drop(query);
                });
            }
        };
        tokio::join!(all, each);
    }

    /// Lets systemd stop containers before containerd at shutdown. Somebody may have stopped the slice that this needs.
    async fn keep_order(self: Arc<Self>) {
        if let Err(error) = self.manager.keep_order().await {
            tracing::warn!(%error, "at shutdown, systemd may stop containerd before containers, so containerd would not learn how they ended: {error}");
        }
    }

    /// Handles a report of systemd that the main process of a unit has changed. A repeated report changes nothing.
    async fn service_changed(self: &Arc<Self>, unit: &UnitName, told: MainProcess) {
        let Some((entry, process)) = self.tasks.registry.by_unit(unit) else {
            return;
        };
        if told.ended.is_some() {
            self.read_end(&entry, &process, told).await;
        } else if process.exec().is_some() {
            // When a unit is stopped, systemd forgets a main process that is not its child.
            self.query(&entry, &process).await;
        }
    }

    /// Reads how a main process ended, after systemd has reported its end.
    async fn read_end(self: &Arc<Self>, entry: &Arc<Entry>, process: &Arc<Process>, told: MainProcess) {
        if entry.task().process(process.exec()).is_none_or(|process| process.exit().is_some()) {
            return;
        }
        let read = match process.exec() {
            None => self.manager.main_process(&process.unit).await,
            Some(_) => self.manager.ended_process(&process.unit).await,
        };
        let read = read.unwrap_or_else(|error| {
            log_query_error(process, &error);
            None
        });
        let main = trusted_report(told, read);
        match main.ended {
            // systemd has refused the process of the exec, and `launch` has ended in its place; or the report is about an earlier
            // unit of this name.
            Some(_) if is_of_another(entry, process, main) => self.query(entry, process).await,
            Some(ended) => self.ended(entry, process, seen(main, ended)),
            None => {
                let key = &process.key;
                tracing::warn!(process = %key, "{key}: systemd reported its end, but it still runs");
            }
        }
    }

    /// Queries every unit, as signals may have been missed.
    pub async fn resync(self: &Arc<Self>) {
        tokio::spawn(self.clone().reference_all());
        let running = self.running().await;
        for entry in self.tasks.registry.all() {
            for process in entry.processes() {
                if !running.contains(&process.unit) {
                    self.query(&entry, &process).await;
                }
            }
        }
    }

    /// Opens a pidfd of a process that an earlier daemon has recorded, and whose unit runs. Somebody may have moved the process to
    /// another cgroup: then systemd says whether it still has this pid.
    pub(crate) async fn hold_again(&self, entry: &Entry, process: &Process, pid: u32) {
        hold(entry, process, pid);
        if process.live().process.is_some() {
            return;
        }
        let Ok(held) = sys::pidfd_open(pid) else {
            return;
        };
        // Queried after pidfd_open: if the process still has the pid then, the pidfd is that of this process.
        match self.manager.main_process(&process.unit).await {
            Ok(Some(main)) if main.pid == Some(pid) => process.live().process = Some(Arc::new(held)),
            Ok(_) => {}
            Err(error) => log_query_error(process, &error),
        }
    }

    /// Asks systemd whether a process that the record says is alive has ended. During Create and Start, the query waits for
    /// their end: see [`Self::query_if_due`].
    pub(crate) async fn query(self: &Arc<Self>, entry: &Arc<Entry>, process: &Arc<Process>) {
        // Set before the record is read: a Start that ends after that finds it.
        process.live().attempt.is_query_due = true;
        if !entry.task().process(process.exec()).is_some_and(|process| process.is_alive()) {
            return;
        }
        process.live().attempt.is_query_due = false;
        let main = match self.manager.main_process(&process.unit).await {
            Ok(main) => main,
            Err(error) => return log_query_error(process, &error),
        };
        // A process that nobody has reaped yet has ended, too.
        let is_over = process.live().process.as_ref().is_some_and(|process| is_over(process));
        let (pid, has_ended) = {
            let task = entry.task();
            let pid = task.process(process.exec()).and_then(|process| process.pid());
            (pid, is_over || pid.is_some_and(|pid| has_ended(&task, pid)))
        };
        let unknown = || Exit { status: UNKNOWN_STATUS, at_usec: sys::now_usec() };
        let killed = || exit_of(WaitStatus::killed_at(sys::now_usec()));
        let exit = match (main, process.exec()) {
            (Some(main @ MainProcess { ended: Some(ended), last_pid, .. }), _)
                if last_pid.is_none() || last_pid == pid =>
            {
                return self.ended(entry, process, seen(main, ended));
            }
            // systemd never had this process as the main process of the unit, and will report no end.
            (Some(main), exec) if has_ended && main.pid != pid && main.last_pid != pid => {
                match (exec, main.ended) {
                    // `launch` is about to end like the exec, and systemd will report that.
                    (Some(_), None) if main.pid.is_some() => return,
                    // `launch` had to hand the exec over, and has exited like it.
                    (Some(_), Some(ended)) => exit_of(ended),
                    (Some(_), None) => killed(),
                    (None, _) => unknown(),
                }
            }
            (Some(MainProcess { pid: Some(_), .. } | MainProcess { ended: Some(_), .. }), _)
            | (Some(_), None) => return,
            (None, None) => unknown(),
            // Stopped from outside: systemd sends SIGTERM and SIGKILL, and does not wait for a process that is not
            // its child.
            (_, Some(_)) => killed(),
        };
        // systemd may have reported how the process ended, and unloaded the unit, before it answered.
        for told in self.manager.unhandled_ends(&process.unit).await {
            if let Some(ended) = told.ended
                && !is_of_another(entry, process, told)
            {
                return self.ended(entry, process, seen(told, ended));
            }
        }
        let (key, status) = (&process.key, exit.status);
        tracing::warn!(process = %key, "{key}: systemd does not know how it ended: its unit disappeared, was stopped by somebody else, or never had this process; reporting {status}");
        self.ended(entry, process, ObservedExit { pid: None, exit });
    }

    /// Create or Start has put a process into the record: makes the query that came too early, if there was any, in the
    /// background. The process may have ended since then, and nobody will report its end once more.
    pub(crate) fn query_if_due(self: &Arc<Self>, entry: &Arc<Entry>, process: &Arc<Process>) {
        if !std::mem::take(&mut process.live().attempt.is_query_due) {
            return;
        }
        let key = &process.key;
        tracing::debug!(process = %key, "{key}: querying its unit, as a query came too early during its start");
        let (this, entry, process) = (self.clone(), entry.clone(), process.clone());
        tokio::spawn(async move { this.query(&entry, &process).await });
    }

    fn ended(self: &Arc<Self>, entry: &Arc<Entry>, process: &Arc<Process>, seen: ObservedExit) {
        fault::point(Point::ExitSeen);
        if process.exec().is_some() {
            return self.note_end(entry, process, seen);
        }
        // systemd may report the same exit again. The second report must not be noted before the kills that the first one asks for.
        if std::mem::replace(&mut process.live().is_ending, true) {
            return;
        }
        let (runs, cgroup) = {
            let task = entry.task();
            let runs = matches!(task.init.phase, Phase::Running { .. } | Phase::Paused { .. });
            (runs, task.cgroup().map(Path::to_owned))
        };
        let knows_kills = !runs || self.cgroups.knows_oom_kills(entry, seen);
        // Without a pid namespace of its own, the children of init outlive it, and under RemainAfterExit systemd
        // does not kill them.
        let left_behind = cgroup.filter(|cgroup| cgroup::is_populated(cgroup));
        if knows_kills && left_behind.is_none() {
            self.note_end_of_init(entry, seen);
            return;
        }
        let (this, entry) = (self.clone(), entry.clone());
        tokio::spawn(async move {
            if !knows_kills {
                this.cgroups.ask_for_oom_kills(&entry).await;
            }
            if let Some(cgroup) = left_behind {
                kill_left_behind(&entry, &cgroup).await;
            }
            this.note_end_of_init(&entry, seen);
        });
    }

    fn note_end_of_init(self: &Arc<Self>, entry: &Arc<Entry>, seen: ObservedExit) {
        self.note_end(entry, &entry.init, seen);
        entry.init.live().is_ending = false;
    }

    fn note_end(self: &Arc<Self>, entry: &Arc<Entry>, process: &Arc<Process>, seen: ObservedExit) {
        let noted = match self.tasks.note_event(entry, process, Event::Exited(seen)) {
            Ok(noted) => noted,
            Err(error) => {
                let key = &process.key;
                tracing::error!(process = %key, %error, "{key}: can't record its end: {error}");
                return;
            }
        };
        fault::point(Point::ExitNoted);
        if process.exec().is_none() {
            return self.streams.close_input(entry, process);
        }
        process.live().attempt.unit_ended.notify_one();
        self.cleanup.after_exec(entry, process, noted);
    }

    /// The units whose main process runs. They need no query: systemd will report the end.
    pub(crate) async fn running(&self) -> HashSet<UnitName> {
        self.manager.running_units().await.unwrap_or_else(|error| {
            tracing::warn!(%error, "can't list the units of systemd, querying each of them: {error}");
            HashSet::new()
        })
    }

    /// References the unit of every task over the current connection to the bus, and then drops the references over earlier
    /// connections. Tries again until every unit has a reference.
    pub(crate) async fn reference_all(self: Arc<Self>) {
        while !self.references.round(self.reference_each()).await {
            tokio::time::sleep(REFERENCE_PAUSE).await;
        }
    }

    /// One try of [`Self::reference_all`]. Returns false if a unit has no reference: then those of earlier daemons stay.
    /// Skips a task that is being deleted: nobody would release its reference.
    ///
    /// A task whose operation hangs delays no other task.
    async fn reference_each(self: &Arc<Self>) -> bool {
        let all = self.tasks.registry.all();
        // The exits of units that have ended by now are known, so a moment without references loses nothing unless the daemon
        // ends, too.
        self.manager.make_room_for_references(all.len()).await;
        let referred = all.into_iter().map(|entry| {
            let this = self.clone();
            async move {
                // Nobody deletes the task meanwhile.
                let Ok(_verb) = tokio::time::timeout(VERB_LIMIT, entry.init.verb.lock()).await else {
                    return Err(None);
                };
                if this.tasks.is_live(&entry) {
                    this.manager.reference(&entry.init.unit).await.map_err(Some)
                } else {
                    Ok(())
                }
            }
        });
        let referred = futures_util::future::join_all(referred).await;
        let failed: Vec<_> = referred.into_iter().filter_map(Result::err).collect();
        if failed.is_empty() {
            self.manager.forget_earlier_references().await;
            return true;
        }
        let mut failed = failed.into_iter().flatten();
        let Some(error) = failed.next() else {
            return false;
        };
        let others = failed.count();
        tracing::warn!(%error, "can't reference a unit (and {others} others), so its exit code is lost if somebody stops it while the daemon is down; trying again: {error}");
        false
    }
}

/// Kills the processes that init left behind, before its end is reported. Gives up after a limit: the end is reported in
/// any case.
async fn kill_left_behind(entry: &Entry, cgroup: &Path) {
    if let Err(error) = cgroup::kill_within(LEFT_BEHIND_LIMIT, cgroup).await {
        tracing::warn!(task = %entry.key, %error, "task {}: can't kill the processes that its init process left behind: {error}", entry.key);
    }
}

/// Which of the two reports about the end of a main process to trust: the answer that systemd gave when it was queried,
/// or, if the answer is about another process or about none, the signal before it.
///
/// In the second case the unit was unloaded or started again in the meantime, and systemd has forgotten what it signalled.
/// The unit of an exec is unloaded as soon as somebody stops it.
fn trusted_report(told: MainProcess, read: Option<MainProcess>) -> MainProcess {
    let is_same = |read: &MainProcess| told.last_pid.is_none() || read.last_pid == told.last_pid;
    read.filter(is_same).unwrap_or(told)
}

/// True if a report is about another process than the one in the record.
fn is_of_another(entry: &Entry, process: &Process, main: MainProcess) -> bool {
    let pid = entry.task().process(process.exec()).and_then(|process| process.pid());
    pid.is_some() && main.last_pid.is_some() && main.last_pid != pid
}

/// True if the process of a pidfd has ended.
fn is_over(process: &OwnedFd) -> bool {
    sys::ends_within(process, Duration::ZERO) == Ok(true)
}

fn log_query_error(process: &Process, error: &unit::error::Error) {
    let key = &process.key;
    tracing::warn!(process = %key, %error, "{key}: can't query its unit: {error}");
}

fn seen(main: MainProcess, ended: WaitStatus) -> ObservedExit {
    ObservedExit { pid: main.last_pid, exit: exit_of(ended) }
}

fn exit_of(ended: WaitStatus) -> Exit {
    Exit { status: ended.exit_status(), at_usec: ended.at_usec.unwrap_or_else(sys::now_usec) }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TOLD: MainProcess = MainProcess {
        pid: None,
        last_pid: Some(7),
        ended: Some(WaitStatus { code: 1, status: 3, at_usec: Some(5) }),
    };

    #[test]
    fn the_answer_to_a_query_counts_more_than_the_signal_before_it() {
        let runs = MainProcess { pid: Some(7), last_pid: Some(7), ended: None };
        assert_eq!(trusted_report(TOLD, Some(runs)), runs);
        let ended = MainProcess { ended: Some(WaitStatus { code: 2, status: 9, at_usec: Some(6) }), ..TOLD };
        assert_eq!(trusted_report(TOLD, Some(ended)), ended);
    }

    #[test]
    fn an_exit_is_not_lost_when_the_unit_has_been_unloaded_or_started_again() {
        assert_eq!(trusted_report(TOLD, None), TOLD);
        for later in [
            MainProcess::default(),
            MainProcess { pid: Some(8), last_pid: Some(8), ended: None },
            MainProcess {
                last_pid: Some(8),
                ended: Some(WaitStatus { code: 1, status: 0, at_usec: Some(9) }),
                ..TOLD
            },
        ] {
            assert_eq!(trusted_report(TOLD, Some(later)), TOLD);
        }
    }
}
