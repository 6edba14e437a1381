//! Recovery: rebuilds the tasks from their records, and compares each with its unit.

use std::collections::HashSet;
use std::sync::{Arc, mpsc};

use tokio::sync::oneshot;
use tokio::task::JoinHandle;

use crate::fault::{self, Point};
use crate::id::UnitName;
use crate::launch::contract::Outcome;
use crate::launch::report;
use crate::oci::runtime;
use crate::oci::state::State;
use crate::ops::Shim;
use crate::services::pending::Stored;
use crate::services::process::hold;
use crate::services::streams::resumption::Resumption;
use crate::services::{Entry, Error, Process, blocking, exec_share, resume_in_background};

use crate::store::{self, Found, OwedTask, Store};
use crate::suspect::{self, Crashes, Suspect};
use crate::task::Task;
use crate::task::lifecycle::{Event, ObservedExit};
use crate::task::phase::Phase;

/// What an earlier daemon has recorded.
pub struct Records {
    tasks: Vec<Result<Found, store::Error>>,
    owed: Vec<OwedTask>,
    /// Records were moved aside, and their processes may still run.
    has_set_aside: bool,
}

/// Begins to read the records. A record that has crashed daemons before is moved aside instead. Directories without a record
/// are removed. Needs the async runtime.
///
/// # Errors
/// The result is an error if the records can't be listed.
pub fn read_records(store: Store, crashes: Arc<Crashes>) -> JoinHandle<Result<Records, Error>> {
    let read = move || {
        // What is left only costs some memory, so the tasks are recovered nevertheless.
        if let Err(error) = store.remove_leftovers() {
            tracing::warn!(%error, "can't remove what an earlier daemon has left unfinished: {error}");
        }
        let (tasks, owed) = (store.load_all(&crashes)?, store.load_owed()?);
        // If this can't be found out, nothing is removed.
        Ok(Records { tasks, owed, has_set_aside: store.has_set_aside().unwrap_or(true) })
    };
    tokio::spawn(async move { blocking(read).await? })
}

/// Work for the second thread of a recovery.
type Work = Box<dyn FnOnce() + Send>;

/// A recovery that is under way.
struct Recovery {
    /// The units that run.
    running: HashSet<UnitName>,
    /// The streams that are to be opened again.
    streams: Vec<Resumption>,
    /// Processes may run whose records this daemon can't use, so it does not manage these processes.
    has_unmanaged: bool,
    /// A second thread does this work, in the order in which it is sent.
    second_thread: mpsc::Sender<Work>,
}

impl Recovery {
    fn in_second_thread(&self, work: impl FnOnce() + Send + 'static) {
        let work = Box::new(suspect::inherit_fn(work));
        // If the second thread has ended, this thread does the work.
        if let Err(mpsc::SendError(work)) = self.second_thread.send(work) {
            work();
        }
    }
}

impl Shim {
    /// Recovers the tasks of an earlier daemon: compares each recorded task with its unit.
    ///
    /// Calls can be served once this returns. The result completes once the streams of all processes are open again.
    pub async fn recover(self: &Arc<Self>, records: Records) -> JoinHandle<()> {
        let Records { tasks: records, owed, has_set_aside } = records;
        self.announce_owed(&records, owed);
        let (second_thread, works) = mpsc::channel::<Work>();
        let done = tokio::spawn(blocking(move || works.into_iter().for_each(|work| work())));
        let running = self.units.running().await;
        let mut recovery =
            Recovery { running, streams: Vec::new(), has_unmanaged: has_set_aside, second_thread };
        for record in records {
            match record {
                Ok(Found { task, is_current, unreadable_execs }) => match self.tasks.registry.insert(task) {
                    Ok((entry, verb)) => {
                        drop(verb);
                        recovery.has_unmanaged |= unreadable_execs > 0;
                        if !is_current {
                            self.tasks.write_later(&entry);
                        }
                        let task = entry.task().clone();
                        let execs = task.execs.values().map(|exec| &exec.wiring);
                        execs
                            .chain([&task.init.wiring])
                            .for_each(|wiring| self.fds.reserve(wiring.store_number));
                        let suspect = Suspect::record(&entry.key);
                        suspect.watch(self.recover_task(&entry, &mut recovery)).await;
                    }
                    Err(conflict) => {
                        recovery.has_unmanaged = true;
                        tracing::error!(
                            ?conflict,
                            "a task is not recovered, another record has its id or its unit: {conflict:?}"
                        );
                    }
                },
                Err(error) => {
                    recovery.has_unmanaged = true;
                    tracing::error!(%error, "a task is not recovered: {error}");
                }
            }
        }
        self.tasks.find_owners(&self.files).await;
        let Recovery { streams, has_unmanaged, second_thread, .. } = recovery;
        drop(second_thread);
        if let Err(error) = done.await.unwrap_or(Err(Error::Stopping)) {
            tracing::warn!(%error, "can't watch the cgroups of some tasks: {error}");
        }
        self.fds.end_claims(has_unmanaged);
        let this = self.clone();
        tokio::spawn(async move {
            this.streams.resume_all(streams).await;
            this.later.begin();
            tokio::spawn(this.units.clone().reference_all());
        })
    }

    /// Announces the events of deleted tasks to the publisher.
    fn announce_owed(&self, records: &[Result<Found, store::Error>], all: Vec<OwedTask>) {
        let is_recorded = |owed: &Task| {
            let recorded = records.iter().flatten();
            recorded
                .filter(|found| found.task.key == owed.key)
                .any(|found| found.task.init.phase == owed.init.phase)
        };
        for (owing, task) in all {
            match task {
                // A Delete was interrupted before it removed the record, which has these events as well.
                Ok(task) if is_recorded(&task) => {
                    if let Err(error) = owing.discard() {
                        tracing::warn!(task = %task.key, %error, "task {}: its last events may be published twice: {error}", task.key);
                    }
                }
                Ok(task) => {
                    // An earlier version may have kept more of them than this version does. All of them are published.
                    let _ = self.tasks.owings.begin(&task.containerd.ttrpc_address);
                    let entry = Arc::new(Entry::detached(task));
                    entry.init.live().disk.stored = Stored::Owed(owing);
                    self.tasks.announce(&entry);
                }
                Err(error) => tracing::error!(%error, "events of a deleted task are not published: {error}"),
            }
        }
    }

    async fn recover_task(self: &Arc<Self>, entry: &Arc<Entry>, recovery: &mut Recovery) {
        fault::point(Point::RecoverTask);
        let task = entry.task().clone();
        if task.given_up {
            // What an earlier daemon has begun is not completed.
            entry.init.live().attempt.given_up.cancel();
        }
        let remove_left = || {
            let (shim, left) = (self.clone(), entry.clone());
            tokio::spawn(async move { shim.try_to_remove_left(&left).await });
        };
        if task.is_to_be_rolled_back() {
            return remove_left();
        }
        entry.init.live().is_checkpointing = self.is_checkpointing(&entry.key);
        if let Phase::Creating { .. } = task.init.phase {
            let (shim, creating) = (self.clone(), entry.clone());
            resume_in_background(&entry.init, |claimed| async move {
                shim.resume_create(&creating, claimed).await;
            })
            .await;
            return;
        }
        for (id, exec) in &task.execs {
            match self.tasks.registry.insert_exec(entry, id, exec.unit.clone(), exec.exit()) {
                Ok((_, verb)) => drop(verb),
                Err(conflict) => {
                    recovery.has_unmanaged = true;
                    tracing::error!(
                        ?conflict,
                        "exec {id} of task {}: not recovered, another record has its id or its unit: {conflict:?}",
                        task.key
                    )
                }
            }
        }
        for process in entry.processes() {
            self.recover_process(entry, &process, recovery).await;
        }
        self.tasks.announce(entry);
        if task.given_up {
            // Waits for what was resumed above.
            remove_left();
        }
    }

    /// Resumes a start that was interrupted. Opens a pidfd for a process that lives, claims its streams, and queries its unit
    /// if the process does not run any more.
    async fn recover_process(
        self: &Arc<Self>,
        entry: &Arc<Entry>,
        process: &Arc<Process>,
        recovery: &mut Recovery,
    ) {
        self.note_end_of_brief_exec(entry, process);
        let exec = process.exec();
        if exec.is_some() {
            exec_share::note_spec(&self.store, process);
            exec_share::remove_spec(&self.store, entry, process);
        }
        let (is_starting, pid, was_there, has_ended) = match entry.task().process(exec) {
            Some(recorded) => (
                recorded.is_starting(),
                recorded.pid().filter(|_| recorded.is_alive()),
                recorded.pid().is_some(),
                recorded.exit().is_some(),
            ),
            None => return,
        };
        if is_starting {
            let (shim, entry, starting) = (self.clone(), entry.clone(), process.clone());
            resume_in_background(process, |claimed| async move {
                match starting.exec() {
                    None if entry.task().init.pid().is_none() => shim.resume_restore(&entry, claimed).await,
                    None => shim.finish_start(&entry, claimed).await,
                    Some(_) => shim.resume_exec(&entry, &starting, claimed).await,
                }
            })
            .await;
        }
        if exec.is_none() && process.live().is_checkpointing {
            let (shim, entry) = (self.clone(), entry.clone());
            resume_in_background(process, |_| async move { shim.finish_checkpoint(&entry).await }).await;
        }
        let is_running = recovery.running.contains(&process.unit);
        if let Some(pid) = pid {
            if is_running {
                self.units.hold_again(entry, process, pid).await;
            } else {
                hold(entry, process, pid);
            }
            if exec.is_some() {
                self.cancel_long_start_job(entry, process);
            } else {
                let (cgroups, watched) = (self.cgroups.clone(), entry.clone());
                let watch = move || cgroups.watch_again(&watched);
                // Kills for lack of memory are reported before the end of a container, which is looked for below.
                if is_running {
                    recovery.in_second_thread(watch)
                } else {
                    watch()
                }
                self.notifications.listen_again(entry);
            }
        }
        self.cleanup.close_ended_exec(entry, process);
        if !was_there {
            return;
        }
        recovery.streams.extend(self.streams.recover(entry, process));
        if is_running {
            return;
        }
        self.units.query(entry, process).await;
        // An earlier daemon may have ended before it removed the unit.
        if exec.is_some() && has_ended {
            self.cleanup.remove_ended_exec(entry, process);
        }
    }

    /// Records the end of an exec that ended before `launch` handed it over: systemd does not know it. An earlier version wrote
    /// the start and the end of such an exec one after the other, so its record may contain only the start.
    fn note_end_of_brief_exec(&self, entry: &Arc<Entry>, process: &Process) {
        let recorded =
            entry.task().process(process.exec()).filter(|exec| exec.is_alive()).and_then(|exec| exec.pid());
        let (Some(pid), Some(_)) = (recorded, process.exec()) else {
            return;
        };
        // If the report can't be read, the unit shows how the exec ended.
        let Ok(Some(Outcome::Ended { pid: ended, exit })) =
            report::read(&self.store.process_dir(&process.key))
        else {
            return;
        };
        let seen = ObservedExit { pid: Some(ended), exit };
        if ended == pid
            && let Err(error) = self.tasks.note_event(entry, process, Event::Exited(seen))
        {
            tracing::error!(process = %process.key, %error, "{}: can't record its end: {error}", process.key);
        }
    }

    /// True if the container of a Start that was interrupted still waits. If the disk with the runtime's state does not answer, the
    /// container counts as waiting unless its process is another program by now.
    async fn waits_for_start(&self, task: &Task) -> bool {
        let program = match task.init.pid() {
            Some(pid) => self.runtime_files.program_of(&task.key, pid).await,
            None => Ok(None),
        };
        // If the disk with the program does not answer, the FIFO decides.
        let may_wait = program.map_or(true, |program| program == task.init.phase.program());
        let look = move |state: &State| {
            let waits = may_wait && state.waits_for_start();
            if !waits {
                state.mark_started();
            }
            waits
        };
        self.runtime_files.state(task, look).await.unwrap_or_else(|error| {
            tracing::error!(task = %task.key, %error, "task {}: can't find out whether its interrupted start has released it: {error}", task.key);
            may_wait
        })
    }

    /// After a restart: completes a Start that was interrupted.
    async fn finish_start(self: &Arc<Self>, entry: &Arc<Entry>, claimed: oneshot::Sender<()>) {
        // The receiver was dropped if the daemon stops. The streams are reopened as those of a process that runs.
        let _ = claimed.send(());
        let task = entry.task().clone();
        let dir = self.store.dir(&task.key);
        let cli = runtime::Cli::of(&task, &dir);
        let given_up = entry.init.live().attempt.given_up.clone();
        if let Err(error) = cli.settled_unless("start", task.runtime.limit(), given_up.cancelled()).await {
            tracing::error!(task = %task.key, %error, "task {}: the OCI runtime still works on a start that a restart interrupted: {error}", task.key);
        }
        // A `runc start` that was interrupted may have released init without reporting it. A second `runc start` would
        // then wait until init ends.
        let waits = self.waits_for_start(&task).await;
        // The replay of the call gets the failure that the earlier daemon has noted. That daemon has killed init.
        let has_failed = self.noted_failure(&entry.init.key, dir.clone()).await.is_some();
        let event = if waits || has_failed { Event::StartFailed } else { Event::InitStarted };
        if let Err(error) = self.tasks.note_event(entry, &entry.init, event) {
            tracing::error!(task = %task.key, %error, "task {}: can't record the end of its start: {error}", task.key);
        }
    }
}
