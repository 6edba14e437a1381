//! Checkpoint: dumps the processes of a container with criu. They continue to run, or end with the checkpoint.
//!
//! Clients pause a task around a checkpoint. systemd freezes the unit's cgroup, and criu thaws and freezes the
//! container's cgroup below it: in a frozen unit criu would wait without end. So the daemon thaws the unit and
//! freezes only the container's cgroup before the checkpoint, and freezes the unit again afterwards.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use tokio_util::sync::CancellationToken;

use crate::cgroup;
use crate::fault::{self, Point};
use crate::files;
use crate::id::TaskKey;
use crate::launch::contract::{CHECKPOINT, CRIU_PROBLEM, CheckpointNote, CommandKind, DUMP_WORK, dump_work};
use crate::oci::criu::{self, Checkpoint, Problem};
use crate::oci::runtime::Cli;
use crate::services::process::{cancelled, init_is_gone};
use crate::services::{Delivery, Entry, Error, WaitsFor, blocking};
use crate::store::failures::Failure;
use crate::suspect;
use crate::task::phase::Phase;
use crate::task::wiring::Output;
use crate::task::{Placement, Task};
use crate::unit::systemd::Systemd;

use super::Shim;
use super::pause::refused;

/// The copy of criu's log in the bundle, as containerd-shim-runc-v2 names it.
const LOG_COPY: &str = "criu-dump.log";

/// How long criu may work on a checkpoint after it has ended the container.
const EXIT_LIMIT: Duration = Duration::from_secs(60);

/// What a container does after its checkpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Afterwards {
    Continues,
    HasEnded,
}

impl Shim {
    /// Takes a checkpoint of a container.
    ///
    /// # Errors
    /// The container does not run, criu can't be used, or criu fails. The container continues as before.
    pub async fn checkpoint(
        self: &Arc<Self>,
        key: &TaskKey,
        request: Checkpoint,
        delivery: Delivery,
    ) -> Result<(), Error> {
        let entry = self.tasks.created(key)?;
        let _verb = entry.init.verb.lock().await;
        let task = entry.task().clone();
        if delivery == Delivery::Replayed
            && let Some(CheckpointNote { request: earlier, outcome: Some(outcome), call, .. }) = self.begun(key)?
            && earlier == request
            // The client may have requested the same before, and got the outcome.
            && call.is_none_or(|call| Some(call) == suspect::request())
        {
            return outcome.map_err(|Failure { code, text }| Error::Earlier { code, text });
        }
        match &task.init.phase {
            Phase::Running { .. } | Phase::Paused { .. } => {}
            other => return Err(refused("checkpoint", other)),
        }
        let wiring = &task.init.wiring;
        if [&wiring.stdout, &wiring.stderr].contains(&&Output::Journal) {
            return Err(Error::JournalSocket { key: key.clone() });
        }
        entry.init.live().attempt.interrupted = CancellationToken::new();
        self.check_criu(&entry, &task).await?;
        self.remove_log(&entry, dump_work(&request, &self.store.dir(key)).join(criu::DUMP_LOG)).await?;
        let (was_paused, call) = (task.init.phase.is_paused(), suspect::request());
        let begun = CheckpointNote { request, was_paused, outcome: None, call };
        self.write_begun(key, &begun)?;
        fault::point(Point::CheckpointRecorded);
        let taken = self.take_checkpoint(&entry, &task, &begun).await;
        self.conclude_checkpoint(&entry, begun, taken).await
    }

    async fn take_checkpoint(&self, entry: &Entry, task: &Task, begun: &CheckpointNote) -> Result<(), Error> {
        entry.init.live().is_checkpointing = true;
        let dir = self.store.dir(&task.key);
        if begun.request.work.is_none() {
            // An earlier checkpoint may have left a log, which must not be mistaken for the log of this one.
            let work = dir.join(DUMP_WORK);
            blocking(move || remove_dir(&work)).await??;
        }
        if begun.was_paused {
            freeze_only_container(&*self.manager, task).await?;
        }
        fault::point(Point::CheckpointThawed);
        let taken = tokio::select! {
            taken = self.launch_for(entry, task, &dir, CommandKind::Checkpoint) => taken,
            error = init_has_ended(entry, &begun.request) => Err(error),
        };
        fault::point(Point::CheckpointDone);
        taken
    }

    /// Removes the log of an earlier command of criu. A client may have named its directory, and kept it.
    pub(super) async fn remove_log(&self, entry: &Entry, log: PathBuf) -> Result<(), Error> {
        let removed = self.files.run(WaitsFor::Disk, &entry.init.key, move || criu::remove_log(&log)).await?;
        Ok(removed.map_err(crate::store::Error::from)?)
    }

    /// Runs `launch` for a task, with the time limit of a Create. Fails when [`cancelled`].
    pub(super) async fn launch_for(
        &self,
        entry: &Entry,
        task: &Task,
        dir: &Path,
        kind: CommandKind,
    ) -> Result<(), Error> {
        let command = self.launcher.command(kind, &entry.init.key);
        let cli = Cli::of(task, dir);
        tokio::select! {
            done = self.oci.launch(&cli, kind.word(), task.runtime.create_limit(), &command) => {
                done.map_err(|error| Error::from(error).with_criu_problem())
            }
            error = cancelled(entry) => Err(error),
        }
    }

    /// The last steps: freezes the unit again if it was frozen before, copies the log to where the client looks for it, writes
    /// the outcome to disk for a replay, and removes everything else.
    async fn conclude_checkpoint(
        self: &Arc<Self>,
        entry: &Arc<Entry>,
        begun: CheckpointNote,
        taken: Result<(), Error>,
    ) -> Result<(), Error> {
        let task = entry.task().clone();
        let ended = matches!(taken, Err(Error::Interrupted { .. } | Error::InitGone { .. }));
        let continues = !ended && (taken.is_err() || !begun.request.exit);
        self.put_back(entry, &begun, if continues { Afterwards::Continues } else { Afterwards::HasEnded })
            .await;
        fault::point(Point::CheckpointFrozen);
        let (own, bundle) = (self.store.dir(&task.key).join(DUMP_WORK), task.request.bundle.clone());
        let log = dump_work(&begun.request, &self.store.dir(&task.key)).join(criu::DUMP_LOG);
        let taken = match taken {
            Err(error @ Error::Runtime(_)) => {
                let kept = self
                    .files
                    .run(WaitsFor::Disk, &entry.init.key, move || copy_log(&log, &bundle.join(LOG_COPY)))
                    .await
                    .unwrap_or(None);
                Err(with_log(error, kept))
            }
            taken => taken,
        };
        let outcome = taken.as_ref().copied().map_err(|error| self.failure(error));
        let noted = self.write_begun(&task.key, &CheckpointNote { outcome: Some(outcome), ..begun });
        fault::point(Point::CheckpointNoted);
        let cleared = match noted {
            Ok(()) => blocking(move || remove_dir(&own)).await?,
            // The next daemon finds the outcome in the log of criu.
            failed => failed,
        };
        if let Err(error) = cleared {
            tracing::warn!(task = %task.key, %error, "task {}: can't remove the files of its checkpoint: {error}", task.key);
        }
        taken
    }

    /// Freezes the unit again if the container was paused, and lets the daemon report changes of the freezer again.
    async fn put_back(self: &Arc<Self>, entry: &Arc<Entry>, begun: &CheckpointNote, container: Afterwards) {
        let task = entry.task().clone();
        let is_frozen = begun.was_paused && container == Afterwards::Continues;
        let frozen = if is_frozen { freeze_unit_again(&*self.manager, &task).await } else { Ok(()) };
        entry.init.live().is_checkpointing = false;
        self.cgroups.note_freezer(entry);
        if let Err(error) = frozen {
            tracing::warn!(task = %entry.key, %error, "task {}: can't freeze its unit again, so systemctl shows the frozen container as running: {error}", entry.key);
        }
    }

    /// After a restart: completes a checkpoint that was interrupted. The command itself continued without the daemon.
    pub(crate) async fn finish_checkpoint(self: &Arc<Self>, entry: &Arc<Entry>) {
        let begun = match self.begun(&entry.key) {
            Ok(Some(begun @ CheckpointNote { outcome: None, .. })) => begun,
            Ok(_) => return,
            Err(error) => {
                tracing::error!(task = %entry.key, %error, "task {}: can't read the note about its checkpoint: {error}", entry.key);
                return;
            }
        };
        let (task, dir) = (entry.task().clone(), self.store.dir(&entry.key));
        let must_end = async {
            tokio::select! {
                error = cancelled(entry) => error,
                error = init_has_ended(entry, &begun.request) => error,
            };
        };
        let (cli, limit) = (Cli::of(&task, &dir), task.runtime.create_limit());
        let settled = cli.settled_unless(CommandKind::Checkpoint.word(), limit, must_end).await;
        let log = dump_work(&begun.request, &dir).join(criu::DUMP_LOG);
        let dumped = self.files.run(WaitsFor::Disk, &entry.init.key, move || criu::has_dumped(&log)).await;
        let concluded = match (settled, dumped) {
            (Ok(()), Ok(true)) => self.conclude_checkpoint(entry, begun, Ok(())).await,
            // If the client still waits, the replay of its call returns the checkpoint.
            (settled, _) => {
                self.put_back(entry, &begun, Afterwards::Continues).await;
                let removed = self.store.remove_scratch(&entry.key, &[CHECKPOINT]);
                settled.map_err(Error::from).and(removed.map_err(Error::from))
            }
        };
        if let Err(error) = concluded {
            tracing::warn!(task = %entry.key, %error, "task {}: a checkpoint that a restart interrupted could not be completed: {error}", entry.key);
        }
    }

    /// True if a checkpoint was begun and not completed.
    pub(crate) fn is_checkpointing(&self, key: &TaskKey) -> bool {
        matches!(self.begun(key), Ok(Some(CheckpointNote { outcome: None, .. })))
    }

    fn begun(&self, key: &TaskKey) -> Result<Option<CheckpointNote>, Error> {
        Ok(self.store.read_scratch(key, CHECKPOINT)?)
    }

    fn write_begun(&self, key: &TaskKey, begun: &CheckpointNote) -> Result<(), Error> {
        Ok(self.store.write_note(key, CHECKPOINT, begun)?)
    }

    /// Checks that criu can be used. A criu that could be used is not checked again.
    pub(super) async fn check_criu(&self, entry: &Entry, task: &Task) -> Result<(), Error> {
        let path = &task.runtime.path;
        if self.launcher.knows_criu(&self.files, &entry.init.key, path).await? {
            return Ok(());
        }
        let command = self.launcher.command(CommandKind::Criu, &task.key.init());
        self.store.remove_scratch(&task.key, &[CRIU_PROBLEM])?;
        let dir = self.store.dir(&task.key);
        let cli = Cli::of(task, &dir);
        let checked = tokio::select! {
            checked = self.oci.launch(&cli, CommandKind::Criu.word(), task.runtime.limit(), &command) => checked,
            error = cancelled(entry) => return Err(error),
        };
        let Err(error) = checked else {
            return self.launcher.remember_criu(&self.files, &entry.init.key, path).await;
        };
        let problem: Option<Problem> = self.store.read_scratch(&task.key, CRIU_PROBLEM)?;
        Err(problem.map_or_else(|| error.into(), Error::Criu))
    }
}

/// Resolves when the init process has ended, for whatever reason, and criu has had the time to end by itself: with
/// the option exit, criu kills the process, and completes the checkpoint afterwards.
async fn init_has_ended(entry: &Entry, request: &Checkpoint) -> Error {
    if entry.task().init.is_alive() {
        init_is_gone(entry).await;
    }
    tokio::time::sleep(if request.exit { EXIT_LIMIT } else { Duration::ZERO }).await;
    Error::InitGone { key: entry.key.clone() }
}

/// Freezes the container's own cgroup instead of the unit's.
async fn freeze_only_container(manager: &dyn Systemd, task: &Task) -> Result<(), Error> {
    let Some(cgroup) = own_cgroup(task) else {
        return Ok(());
    };
    blocking(move || cgroup::freeze(&cgroup, true)).await??;
    Ok(manager.thaw(task.unit()).await?)
}

async fn freeze_unit_again(manager: &dyn Systemd, task: &Task) -> Result<(), Error> {
    let Some(cgroup) = own_cgroup(task) else {
        return Ok(());
    };
    // If this fails, the container stays frozen by its own cgroup, which Resume thaws as well.
    manager.freeze(task.unit()).await?;
    Ok(blocking(move || cgroup::freeze(&cgroup, false)).await??)
}

/// The cgroup of a container below that of its unit. `None` if the container's cgroup is elsewhere: then Pause has
/// frozen that cgroup itself.
fn own_cgroup(task: &Task) -> Option<PathBuf> {
    task.cgroup().filter(|_| matches!(task.placement, Placement::Unit { .. })).map(Path::to_owned)
}

fn remove_dir(dir: &Path) -> Result<(), Error> {
    match fs::remove_dir_all(dir) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(crate::store::Error::from(crate::path_error::io_error("remove", dir)(error)).into())
        }
        _ => Ok(()),
    }
}

/// Copies a log of criu. Returns the path of the copy, and the first error in it. `None` if criu has written no log.
pub(super) fn copy_log(log: &Path, copy: &Path) -> Option<(PathBuf, Option<String>)> {
    let text = criu::read_log(log)?;
    files::replace(copy, &copy.with_extension("log.new"), 0o600, &text).ok()?;
    Some((copy.to_owned(), criu::first_error(&String::from_utf8_lossy(&text))))
}

pub(super) fn with_log(error: Error, kept: Option<(PathBuf, Option<String>)>) -> Error {
    match kept {
        Some((log, reason)) => {
            let reason = reason.map_or_else(|| error.to_string(), |reason| format!("{error}: {reason}"));
            Error::WithLog { reason, log }
        }
        None => error,
    }
}
