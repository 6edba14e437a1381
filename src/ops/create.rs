//! Create: check everything, write the record, start the unit.
//!
//! The record is written before anything else changes. A Create that fails is rolled back: unit, state of the OCI
//! runtime, mounts, FIFOs, record.

use std::path::Path;
use std::sync::Arc;

use nix::errno::Errno;

use crate::cgroup;
use crate::cgroup::limits;
use crate::cgroup::stats::MemoryEvents;
use crate::fault::{self, Point};
use crate::id::{TaskKey, UnitName};
use crate::launch::contract::{LAUNCHED, PID_FILE, UnitKind};
use crate::launch::{self, command};
use crate::oci::criu::CONFIG_ANNOTATION;
use crate::oci::state::State;
use crate::oci::{metadata, options, runtime};
use crate::services::own_unit::OwnUnit;
use crate::services::process::{cancelled, container_cgroup, hold, lives_in, read_pid};
use crate::services::registry::{Conflict, Verb};
use crate::services::{Delivery, Entry, Error, WaitsFor};
use crate::session::{OpenStreams, ReopenMode};
use crate::task::Task;
use crate::task::lifecycle::{Container, Event, Lifecycle};
use crate::task::process::Process;
use crate::task::request::{Create, Stdio};
use crate::unit::properties::{self, UnitMetadata};
use crate::unit::systemd::{Systemd, is_under_way};
use crate::unit::{self, name};

use super::Shim;
use super::additions;
use super::others::keep_apart;
use super::request_unit::{Daemon, NameTaken, request_unit};

/// A Create call.
#[derive(Debug)]
pub struct CreateTask {
    /// The new task.
    pub key: TaskKey,
    /// The request of the client.
    pub request: Create,
    /// The stdio strings of its init process.
    pub stdio: Stdio,
    /// The OCI runtime's options.
    pub options: options::OptionsSource,
}

/// Which daemon has begun a Create.
pub(super) enum Begun {
    /// This daemon begins it.
    Now,
    /// An earlier daemon has begun it, and it has succeeded. With the pid of the init process, or `None` if Start restores the
    /// process.
    Earlier(Option<u32>),
}

impl Shim {
    /// Creates a container whose init process waits for Start. Returns the pid of that process, or `None` if Start restores
    /// the process.
    ///
    /// # Errors
    /// The request is invalid or a step fails. The Create is rolled back.
    pub async fn create(
        self: &Arc<Self>,
        call: CreateTask,
        delivery: Delivery,
    ) -> Result<Option<u32>, Error> {
        match self.begin_create(&call.key, &call.request.bundle, delivery).await? {
            Begun::Now => self.create_anew(call).await,
            Begun::Earlier(pid) => Ok(pid),
        }
    }

    /// The first step of a Create: finds out whether an earlier daemon's Create has succeeded. Otherwise makes sure that nothing
    /// has the id.
    ///
    /// # Errors
    /// A task has the id, what is left of one can't be removed, or this is the replay of a Create that has failed.
    pub(super) async fn begin_create(
        self: &Arc<Self>,
        key: &TaskKey,
        bundle: &Path,
        delivery: Delivery,
    ) -> Result<Begun, Error> {
        if let (Delivery::Replayed, Some(entry)) = (delivery, self.tasks.registry.get(key)) {
            // The earlier daemon's Create may still be running.
            drop(entry.init.verb.lock().await);
            let phase = entry.task().init.phase.clone();
            if !phase.is_creating() {
                return Ok(Begun::Earlier(phase.pid()));
            }
        }
        self.check_failure(&key.init(), bundle.to_owned(), delivery).await?;
        self.free_id(key).await?;
        Ok(Begun::Now)
    }

    /// The steps of a Create after [`Self::begin_create`].
    ///
    /// # Errors
    /// As [`Self::create`].
    pub(super) async fn create_anew(self: &Arc<Self>, call: CreateTask) -> Result<Option<u32>, Error> {
        self.fds.has_room()?;
        let init = call.key.init();
        let shim = self.clone();
        let prepared = self.files.run(WaitsFor::Disk, &init, move || shim.prepare(call)).await;
        let (task, environment) = prepared.map_err(Error::busy_means_exists)??;
        additions::check_types(&*self.manager, &task.properties).await?;
        let taken = self.taken_names(name::candidates(&task.key), task.init.wiring.logger.is_some()).await?;
        self.check_unmanaged(&task, &taken).await?;
        let is_known = self.is_known_to_runtime(&task).await?;
        let (entry, _verb) = self.register(task, &taken, is_known)?;
        match self.bring_up(&entry, &environment).await {
            Ok(pid) => Ok(pid),
            Err(error) => {
                self.undo_create(&entry, &error).await;
                fault::point(Point::CreateUndone);
                Err(error)
            }
        }
    }

    /// Rolls back a failed Create. `error` is the response, also to a replay of the call.
    async fn undo_create(&self, entry: &Arc<Entry>, error: &Error) {
        let bundle = entry.task().request.bundle.clone();
        self.note_failure(&entry.init.key, bundle, error).await;
        self.cleanup.roll_back_create(entry).await;
    }

    /// Registers the task under its id and the first unit name that neither another task has nor somebody else (`taken`),
    /// starting with the name in `task`. `is_known`: see [`Self::is_known_to_runtime`].
    fn register(&self, task: Task, taken: &[UnitName], is_known: bool) -> Result<(Arc<Entry>, Verb), Error> {
        let key = task.key.clone();
        let first = task.init.unit.clone();
        let units = name::candidates(&key).skip_while(|unit| *unit != first);
        for unit in units.filter(|unit| !taken.contains(unit)) {
            let logger = task.init.wiring.logger.as_ref().map(|_| name::logger(&unit)).transpose()?;
            let init = Process { unit, logger, ..task.init.clone() };
            match self.tasks.registry.insert(Task { init, ..task.clone() }) {
                Ok((entry, verb)) => {
                    entry.init.live().bundle_owner = Some(key.owner.clone());
                    if is_known || !self.tasks.registry.namesakes(&key).is_empty() {
                        keep_apart(&mut entry.task());
                    }
                    return Ok((entry, verb));
                }
                // Only the task of an exec can be deleted.
                Err(Conflict::Key | Conflict::Deleted) => return Err(Error::Exists { key }),
                Err(Conflict::Unit) => {}
            }
        }
        Err(Error::NoUnitName { key })
    }

    async fn bring_up(
        self: &Arc<Self>,
        entry: &Arc<Entry>,
        environment: &[u8],
    ) -> Result<Option<u32>, Error> {
        let task = {
            let task = entry.task();
            // Under the lock: the task may be given up at the same time, and the record has to say so.
            self.store.create(&task, environment)?;
            task.clone()
        };
        let dir = self.store.dir(&task.key);
        fault::point(Point::CreateRecorded);
        if task.request.checkpoint.is_some() {
            self.check_criu(entry, &task).await?;
            self.prepare_restore(entry, &task, &dir).await?;
            return Ok(None);
        }
        let plan = Arc::new(self.streams.plan(entry, &entry.init)?);
        let opened = self.streams.open_unless(&plan, cancelled(entry)).await?;
        self.notifications.listen(entry).await?;
        fault::point(Point::CreateOpened);
        self.start_unit(entry, &task, &dir, Daemon::This).await?;
        self.finish_create(entry, &task, &dir, opened).await.map(Some)
    }

    /// After a restart: completes a Create that was interrupted, or rolls it back. Sends to `claimed` once it has claimed
    /// the descriptors of the streams from the descriptor store.
    pub(crate) async fn resume_create(
        self: &Arc<Self>,
        entry: &Arc<Entry>,
        claimed: tokio::sync::oneshot::Sender<()>,
    ) {
        let task = entry.task().clone();
        let dir = self.store.dir(&task.key);
        let resumed = async {
            if task.request.checkpoint.is_some() {
                // A restore has no streams before Start. Its mounts may take minutes.
                let _ = claimed.send(());
                return self.prepare_restore(entry, &task, &dir).await;
            }
            self.resume_unit(entry, claimed).await?;
            // The process may have ended while no daemon received systemd's signals.
            self.units.query(entry, &entry.init).await;
            Ok(())
        };
        if let Err(error) = resumed.await {
            tracing::warn!(task = %task.key, %error, "task {}: a create that a restart interrupted has failed and is rolled back: {error}", task.key);
            if let Error::Launch(_) | Error::NotRun { .. } = error {
                self.undo_create(entry, &error).await;
            } else {
                // The end of the earlier daemon may be the reason: the replay of the call begins the Create once more.
                self.cleanup.roll_back_create(entry).await;
            }
        }
    }

    /// After a restart: completes the start of a container's unit.
    pub(super) async fn resume_unit(
        self: &Arc<Self>,
        entry: &Arc<Entry>,
        claimed: tokio::sync::oneshot::Sender<()>,
    ) -> Result<u32, Error> {
        let task = entry.task().clone();
        let dir = self.store.dir(&task.key);
        let state = self.manager.active_state(task.unit()).await?;
        let plan = Arc::new(self.streams.plan(entry, &entry.init)?);
        let mut opened = self.streams.reopen(plan.clone(), ReopenMode::Starting).await?;
        self.notifications.listen(entry).await?;
        // The receiver was dropped if the daemon stops.
        let _ = claimed.send(());
        let is_under_way = state.is_some_and(|state| is_under_way(&state));
        // A unit that is not running and never ran `launch` belongs to an earlier task of this name.
        if dir.join(LAUNCHED).exists() || is_under_way && own_unit(&task, &dir).is_own(&*self.manager).await?
        {
            self.await_unit(entry, &task, &dir, self.manager.wait_for_earlier_start_job(task.unit())).await?;
        } else {
            // While no daemon ran, another shim may have made a container of this id.
            if self.runtime_files.state(&task, State::exists).await? {
                return Err(Error::in_runtime(&task));
            }
            self.streams.resume_logger(&plan, &mut opened).await?;
            self.start_unit(entry, &task, &dir, Daemon::Earlier).await?;
        }
        self.finish_create(entry, &task, &dir, opened).await
    }

    /// Completes a Create once the unit is up. The main process of the unit is the container's init process.
    pub(super) async fn finish_create(
        self: &Arc<Self>,
        entry: &Arc<Entry>,
        task: &Task,
        dir: &Path,
        opened: OpenStreams,
    ) -> Result<u32, Error> {
        fault::point(Point::CreateUp);
        // The cgroup stays if a hook has left processes in it.
        self.launcher.remove_cgroup(&task.runtime, task.unit()).await;
        let Some(pid) = read_pid(&dir.join(PID_FILE)) else {
            // systemd calls a start that a condition prevents a success.
            return Err(self.launch_failure(entry, task, dir).await);
        };
        if task.request.checkpoint.is_some()
            && let Ok(place) = cgroup::of_process(pid)
            && !lives_in(task, pid)
        {
            return Err(Error::Launch(format!(
                "OCI runtime restore failed: criu has put the processes into cgroup {}, outside of the container; \
                 remove the annotation {CONFIG_ANNOTATION}, or add \"manage-cgroups=ignore\" to the file that it names",
                place.display()
            )));
        }
        hold(entry, &entry.init, pid);
        self.streams.start_session(entry, &entry.init, opened).await?;
        fault::point(Point::CreatePumping);
        self.record_container(entry, pid).await?;
        fault::point(Point::CreateAdopted);
        self.cgroups.watch(entry);
        self.units.query_if_due(entry, &entry.init);
        Ok(pid)
    }

    pub(super) async fn start_unit(
        &self,
        entry: &Entry,
        task: &Task,
        dir: &Path,
        begun_by: Daemon,
    ) -> Result<(), Error> {
        if name::is_pod_slice(task.placement.slice()) {
            make_pod_slice(&*self.manager, task.placement.slice(), task).await?;
        }
        let init = task.key.init();
        let command = self.launcher.command(UnitKind::Container, &init);
        let sandbox = self.tasks.sandbox_of(task);
        let shown = UnitMetadata {
            description: &task.init.description,
            identifier: metadata::identifier(&task.fields),
            fields: &task.fields,
            slice: task.placement.slice(),
            sandbox: sandbox.as_ref(),
        };
        let copy = self.launcher.sealed_runtime(&self.files, task).await?;
        let own = task.runtime.cgroup.is_none().then(|| launch::cgroup::of(task.unit())).transpose()?;
        let environment = command::environment(copy.as_ref(), own.as_deref());
        let (pid_file, launched) = (dir.join(PID_FILE), dir.join(LAUNCHED));
        let limit = task.runtime.create_limit();
        let properties =
            properties::container(&shown, &command, &environment, &pid_file, &launched, limit, task.notify);
        let additions = additions::of(task)?;
        let begin = || self.manager.begin_referenced(task.unit(), &properties, &additions);
        let taken = NameTaken {
            is_own: || async {
                let state = self.manager.active_state(task.unit()).await?;
                Ok(state.is_some_and(|state| is_under_way(&state))
                    && own_unit(task, dir).is_own(&*self.manager).await?)
            },
            remove: || async {
                self.manager.release(task.unit()).await;
                Ok(self.manager.reset_failed(task.unit()).await?)
            },
        };
        let requested = request_unit(&*self.manager, task.unit(), begun_by, begin, taken).await;
        let requested = requested.map_err(|error| match error {
            Error::Unit(error) => additions::refused(task, error),
            other => other,
        });
        match requested? {
            Some(mut job) => {
                fault::point(Point::CreateBegun);
                self.launcher.warm_up_after(job.spawned());
                self.await_unit(entry, task, dir, self.manager.wait_for_start_job(job)).await
            }
            None => {
                self.await_unit(entry, task, dir, self.manager.wait_for_earlier_start_job(task.unit())).await
            }
        }
    }

    /// Waits until `job` reports that the unit is up. Fails when [`cancelled`].
    async fn await_unit(
        &self,
        entry: &Entry,
        task: &Task,
        dir: &Path,
        job: impl Future<Output = Result<(), unit::error::Error>>,
    ) -> Result<(), Error> {
        let done = tokio::select! {
            // A Create that is cancelled never succeeds, even if its unit has just started.
            biased;
            error = cancelled(entry) => return Err(error),
            done = job => done,
        };
        match done {
            Err(unit::error::Error::Job { .. }) if self.manager.has_timed_out(task.unit()).await => {
                let settings = self.manager.restrictions(task.unit()).await;
                let hint = settings.map(|all| format!(", or it is because of {all}")).unwrap_or_default();
                Err(Error::CreateTimedOut { unit: task.unit().to_string(), hint })
            }
            Err(unit::error::Error::Job { .. }) if is_in_frozen_slice(task, dir) => {
                let slice = task.placement.slice().to_string();
                Err(Error::FrozenSlice { process: entry.init.key.clone(), slice })
            }
            // JobRemoved's result (org.freedesktop.systemd1(5)) for a job that another job has replaced.
            Err(unit::error::Error::Job { result, .. }) if result == "canceled" => {
                Err(Error::StoppedMeanwhile {
                    process: entry.init.key.clone(),
                    unit: task.unit().to_string(),
                })
            }
            Err(unit::error::Error::Job { .. }) => {
                let failure = self.launch_failure(entry, task, dir).await;
                Err(self.with_settings(task.unit(), failure).await)
            }
            other => Ok(other?),
        }
    }

    /// Why there is no init process, according to `launch`, the OCI runtime, or systemd if neither ran.
    async fn launch_failure(&self, entry: &Entry, task: &Task, dir: &Path) -> Error {
        if let Some(reason) = command::failure(dir) {
            return Error::Launch(reason);
        }
        let cli = runtime::Cli::of(task, dir);
        let verb = if task.request.checkpoint.is_some() { runtime::RESTORE } else { "create" };
        let failed = |reason: String| Error::Launch(format!("OCI runtime {verb} failed: {reason}"));
        if let Some(reason) = cli.logged(verb) {
            return failed(reason);
        }
        let (obstacle, silence) = (self.manager.obstacle(task.unit()).await, cli.silence());
        if !dir.join(LAUNCHED).exists()
            && let Some(reason) = obstacle
        {
            return Error::NotRun { process: entry.init.key.clone(), reason };
        }
        if let Some(defect) = self.oci.defect(&cli).await {
            return failed(format!("{silence}; {defect}"));
        }
        match obstacle {
            // `launch` or the OCI runtime was killed, or crashed. systemd knows the name of the first only.
            Some(reason) => {
                let binary = task.runtime.binary.display();
                failed(format!("{silence}; the command of the unit runs {binary} in its place: {reason}"))
            }
            None => failed(silence),
        }
    }

    /// Adds to the reason for a failure the settings in the drop-ins of the unit that may have caused it.
    pub(super) async fn with_settings(&self, unit: &UnitName, failure: Error) -> Error {
        let Error::Launch(reason) = failure else { return failure };
        match self.manager.restrictions(unit).await.filter(|_| is_of_restrictions(&reason)) {
            Some(settings) => Error::Launch(format!("{reason}; it may be because of {settings}")),
            None => Error::Launch(reason),
        }
    }

    /// Records the container: its init process, its cgroup and its limits.
    async fn record_container(&self, entry: &Arc<Entry>, pid: u32) -> Result<(), Error> {
        let task = entry.task().clone();
        // The process may have ended, and another one of the node may have its pid and be elsewhere.
        let found = cgroup::of_process(pid).ok().and_then(|found| container_cgroup(&task, found));
        let program = self.runtime_files.program_of(&task.key, pid).await?;
        let (mut limits, mut oom_kills) = (None, 0);
        if let Some(cgroup) = &found {
            limits = self.cgroups.join_limits(&task, cgroup).await?;
            // A cgroup that the client has created may already have counted kills.
            oom_kills = MemoryEvents::read(cgroup)?.unwrap_or_default().oom_kill;
        }
        let cgroup = found.unwrap_or_else(|| task.placement.cgroup(task.unit()));
        let container = Container { pid, cgroup, limits, oom_kills };
        fault::point(Point::CreateLimited);
        self.tasks.apply(entry, &entry.init, Event::Created { container, program })
    }
}

async fn make_pod_slice(manager: &dyn Systemd, slice: &UnitName, task: &Task) -> Result<(), Error> {
    let pod =
        |name: &str| task.fields.iter().find(|(field, _)| field == name).map(|(_, value)| value.as_str());
    let description = match (pod("POD_NAMESPACE"), pod("POD_NAME")) {
        (Some(namespace), Some(name)) => format!("Pod {namespace}/{name}"),
        _ => format!("Pod of container {}", task.key),
    };
    match manager.start_transient(slice, &properties::pod_slice(&description)).await {
        Ok(()) | Err(unit::error::Error::Exists { .. }) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

/// Whether a process that settings of its unit restrict can fail for this reason. Everything can restrict `launch`. The OCI
/// runtime reports the kernel's error.
fn is_of_restrictions(reason: &str) -> bool {
    let reason = reason.to_ascii_lowercase();
    !reason.starts_with("oci runtime")
        || [Errno::EPERM, Errno::EROFS]
            .iter()
            .any(|error| reason.contains(&error.desc().to_ascii_lowercase()))
}

/// True if systemd (from 257 on) has not run `launch` because the slice is frozen.
fn is_in_frozen_slice(task: &Task, dir: &Path) -> bool {
    let slice = task.placement.slice().slice_cgroup();
    !dir.join(LAUNCHED).exists() && matches!(limits::is_frozen(&slice), Ok(Some(true)))
}

/// The unit of a container that is being created.
fn own_unit(task: &Task, dir: &Path) -> OwnUnit {
    OwnUnit::of(task.key.init(), task.unit().clone(), dir.to_owned(), false)
}
