//! Create: check everything, write the record, start the unit.
//!
//! The record is written before anything else changes. A Create that fails is rolled back: unit, state of the OCI
//! runtime, mounts, FIFOs, record.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::sync::Arc;

use crate::cgroup::stats::MemoryEvents;
use crate::cgroup::{self, cgroups_path};
use crate::fault::{self, Point};
use crate::files;
use crate::id::{TaskId, TaskKey, UnitName};
use crate::launch::contract::{Kind, LAUNCHED, PID_FILE};
use crate::launch::{self, command};
use crate::oci::bundle::Spec;
use crate::oci::criu::{self, CONFIG_ANNOTATION};
use crate::oci::resources::Resources;
use crate::oci::{containerd, metadata, options, runtime};
use crate::services::process::{hold, lives_in, program_of, read_pid};
use crate::services::registry::{Conflict, Verb};
use crate::services::{Attempt, Entry, Error, Shim};
use crate::session::{OpenStreams, ReopenMode};
use crate::stdio::{fifo, uri};
use crate::task::outbox::Outbox;
use crate::task::phase::{Container, Event, Phase};
use crate::task::process::{Lifecycle, Process};
use crate::task::request::{Containerd, Create, Stdio};
use crate::task::wiring::Wiring;
use crate::task::{Placement, Task, TaskMetadata};
use crate::unit::properties::{self, UnitMetadata};
use crate::unit::{self, name};

use super::additions;
use super::request_unit::{Daemon, NameTaken, request_unit};

/// The address of containerd for events, if neither the bundle nor the environment names one.
const DEFAULT_TTRPC: &str = "/run/containerd/containerd.sock.ttrpc";
const DEFAULT_GRPC: &str = "/run/containerd/containerd.sock";

/// True for the state of a unit that has been started (`ActiveState`, org.freedesktop.systemd1(5)).
fn is_under_way(state: &str) -> bool {
    !matches!(state, "inactive" | "failed")
}

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
    pub options: options::Source,
}

impl Shim {
    /// Creates a container whose init process waits for Start. Returns the pid of that process.
    ///
    /// # Errors
    /// The request is invalid or a step fails. The Create is rolled back.
    pub async fn create(self: &Arc<Self>, call: CreateTask, attempt: Attempt) -> Result<u32, Error> {
        if let (Attempt::Replayed, Some(entry)) = (attempt, self.tasks.registry.get(&call.key)) {
            // The earlier daemon's Create may still be running.
            drop(entry.init.verb.lock().await);
            let phase = entry.task().init.phase.clone();
            if !phase.is_creating() {
                // A container that waits for its restore has no process.
                return Ok(phase.pid().unwrap_or_default());
            }
        }
        self.tasks.recall_failure(&call.key.init(), attempt)?;
        if let Some(entry) = self.tasks.registry.get(&call.key) {
            if !entry.task().is_leftover {
                return Err(Error::Exists { key: call.key });
            }
            self.remove_leftover(&entry).await?;
        }
        self.fds.has_room()?;
        let shim = self.clone();
        let init = call.key.init();
        let (task, environment) = self.files.run(&init, move || shim.prepare(call)).await??;
        self.check_types(&task.properties).await?;
        let (entry, _verb) = self.register(task)?;
        match self.bring_up(&entry, &environment).await {
            Ok(pid) => Ok(pid),
            Err(error) => {
                self.roll_back_create(&entry).await;
                Err(error)
            }
        }
    }

    /// Checks the request and the bundle, without side effects. Also returns the environment of the OCI runtime, in the
    /// format of /proc/PID/environ.
    fn prepare(&self, call: CreateTask) -> Result<(Task, Vec<u8>), Error> {
        let CreateTask { key, request, stdio, options, .. } = call;
        check_bundle_path(&request.bundle)?;
        if let Some(images) = &request.checkpoint {
            criu::client_path("image path", images)?;
        }
        let spec = Spec::read(&request.bundle)?;
        let resources = spec.resources()?;
        check_resources(&resources)?;
        let (containerd, environment) = self.containerd_of(&key, &request.bundle, &spec)?;
        let options = options.read()?;
        let mut runtime = options.resolve(&key.namespace, &containerd.path)?;
        if runtime.io_owner == (0, 0) {
            // Otherwise root in the container could not open its own /dev/stdout: the inode belongs to a user
            // who has no id there.
            runtime.io_owner = spec.mapped_root().unwrap_or_default();
        }
        runtime.environment = self.store.environment(&key);
        let wiring = uri::wiring(&stdio, runtime.log, uri::Role::Init, fifo::kind)?;
        let wiring = Wiring { kept: self.fds.next_number(), ..wiring };
        let wiring = if request.checkpoint.is_some() { wiring.for_restore() } else { wiring };
        let TaskMetadata { description, fields } = metadata::of(&key, &spec);
        let init = Process {
            unit: name::candidates(&key).next().ok_or(Error::NoUnitName { key: key.clone() })?,
            logger: None,
            stdio,
            wiring,
            description,
            phase: Phase::Creating { exit: None },
        };
        let task = Task {
            placement: placement(&key, &spec, request.checkpoint.is_some())?,
            fields,
            // Mounts by a hook or by a wrapper of the runtime must be visible on the host, or in the mount namespace of
            // containerd if it has one. There, containerd unmounts the rootfs when it removes the bundle.
            rootfs_on_host: !request.rootfs.is_empty()
                && (request.checkpoint.is_some()
                    || spec.shares_mounts_with_host()
                    || spec.has_hooks()
                    || !runtime::is_plain(&runtime.binary)),
            init,
            properties: additions::properties(
                &key.to_string(),
                &spec,
                options.properties,
                &options.annotation_properties,
            )?,
            notify: additions::notifies(&key.to_string(), &spec, options.notify)?,
            devices: additions::allowed_devices(&spec, &resources.devices, &runtime),
            execs: BTreeMap::new(),
            outbox: Outbox::default(),
            muted: false,
            is_leftover: false,
            key,
            request,
            runtime,
            containerd,
        };
        Ok((task, environment))
    }

    /// The containerd that calls, and its environment: `start` wrote both into the bundle. containerd 2.x does
    /// not call `start` for the later containers of a pod; they belong to the containerd of their sandbox.
    fn containerd_of(
        &self,
        key: &TaskKey,
        bundle: &Path,
        spec: &Spec,
    ) -> Result<(Containerd, Vec<u8>), Error> {
        if let Some(mut found) = containerd::read_containerd(bundle)? {
            let environment = std::mem::take(&mut found.environment).join("\0").into_bytes();
            return Ok((found, environment));
        }
        let sandbox = sandbox_of(spec)
            .and_then(|id| {
                self.tasks.registry.get(&self.tasks.own(&TaskKey { id, ..key.clone() }, &key.owner))
            })
            .map(|entry| entry.task().clone());
        Ok(match sandbox {
            // The file is missing if an earlier version made the sandbox.
            Some(sandbox) => (sandbox.containerd, fs::read(sandbox.runtime.environment).unwrap_or_default()),
            None => {
                let containerd = Containerd {
                    ttrpc_address: DEFAULT_TTRPC.to_owned(),
                    grpc_address: DEFAULT_GRPC.to_owned(),
                    ..Containerd::default()
                };
                (containerd, Vec::new())
            }
        })
    }

    /// Registers the task under its id and the first unit name that is free.
    fn register(&self, task: Task) -> Result<(Arc<Entry>, Verb), Error> {
        let key = task.key.clone();
        for unit in name::candidates(&key) {
            let logger = task.init.wiring.logger.as_ref().map(|_| name::logger(&unit)).transpose()?;
            let init = Process { unit, logger, ..task.init.clone() };
            match self.tasks.registry.insert(Task { init, ..task.clone() }) {
                Ok((entry, verb)) => {
                    if !self.tasks.registry.namesakes(&key).is_empty() {
                        keep_apart(&mut entry.task());
                    }
                    return Ok((entry, verb));
                }
                Err(Conflict::Key) => return Err(Error::Exists { key }),
                Err(Conflict::Unit) => {}
            }
        }
        Err(Error::NoUnitName { key })
    }

    async fn bring_up(self: &Arc<Self>, entry: &Arc<Entry>, environment: &[u8]) -> Result<u32, Error> {
        let task = entry.task().clone();
        let dir = self.store.dir(&task.key);
        self.store.create(&task, environment)?;
        fault::point(Point::CreateRecorded);
        if task.request.checkpoint.is_some() {
            self.check_criu(&task).await?;
            return self.prepare_restore(entry, &task, &dir).await;
        }
        let plan = Arc::new(self.streams.plan(entry, &entry.init)?);
        let opened = self.streams.open(&plan).await?;
        self.notifications.listen(entry).await?;
        fault::point(Point::CreateOpened);
        self.start_unit(entry, &task, &dir, Daemon::This).await?;
        self.finish_create(entry, &task, &dir, opened).await
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
                return self.prepare_restore(entry, &task, &dir).await;
            }
            self.resume_unit(entry, claimed).await
        };
        if let Err(error) = resumed.await {
            tracing::warn!(task = %task.key, %error, "task {}: a create that a restart interrupted has failed and is rolled back: {error}", task.key);
            if let Error::Launch(_) = error {
                // Before the task is forgotten: the replay of the call may come at that moment.
                self.tasks.remember_failure(entry.init.key.clone(), error);
            }
            self.roll_back_create(entry).await;
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
        // The receiver is gone if the daemon stops.
        let _ = claimed.send(());
        // A unit that is not running and never ran `launch` belongs to an earlier task of this name.
        if state.is_some_and(|state| is_under_way(&state)) || dir.join(LAUNCHED).exists() {
            self.await_unit(entry, &task, &dir, self.manager.wait_until_started(task.unit())).await?;
        } else {
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
        // Not removed if a hook has left processes in it.
        launch::cgroup::remove(task.unit());
        let pid =
            read_pid(&dir.join(PID_FILE)).ok_or_else(|| Error::Launch(self.launch_failure(task, dir)))?;
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
        self.watch_cgroup(entry);
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
            self.make_pod_slice(task.placement.slice(), task).await?;
        }
        let init = task.key.init();
        let command = self.launcher.command(Kind::Container, &init);
        let sandbox = self.tasks.sandbox_of(task);
        let shown = UnitMetadata {
            description: &task.init.description,
            identifier: metadata::identifier(&task.fields),
            fields: &task.fields,
            slice: task.placement.slice(),
            sandbox: sandbox.as_ref(),
        };
        let copy = self.launcher.sealed_runtime(task).await?;
        let own = task.runtime.cgroup.is_none().then(|| launch::cgroup::of(task.unit())).transpose()?;
        let environment = command::environment(copy.as_ref(), own.as_deref());
        let pid_file = dir.join(PID_FILE);
        let limit = task.runtime.create_limit();
        let properties = properties::container(&shown, &command, &environment, &pid_file, limit, task.notify);
        let additions = additions::of(task)?;
        let begin = || self.manager.begin_referenced(task.unit(), &properties, &additions);
        let taken = NameTaken {
            is_own: || async {
                let state = self.manager.active_state(task.unit()).await?;
                Ok(state.is_some_and(|state| is_under_way(&state)))
            },
            remove: || async {
                self.manager.release(task.unit()).await;
                Ok(self.manager.reset_failed(task.unit()).await?)
            },
        };
        let requested = request_unit(&*self.manager, task.unit(), begun_by, begin, taken).await;
        self.launcher.warm_up();
        let requested = requested.map_err(|error| match error {
            Error::Unit(error) => additions::refused(task, error),
            other => other,
        });
        match requested? {
            Some(job) => self.await_unit(entry, task, dir, self.manager.wait_for_start(job)).await,
            None => self.await_unit(entry, task, dir, self.manager.wait_until_started(task.unit())).await,
        }
    }

    /// Waits until `job` reports that the unit is up. Fails when containerd has given the task up.
    async fn await_unit(
        &self,
        entry: &Entry,
        task: &Task,
        dir: &Path,
        job: impl Future<Output = Result<(), unit::error::Error>>,
    ) -> Result<(), Error> {
        let given_up = entry.init.live().given_up.clone();
        let done = tokio::select! {
            done = job => done,
            () = given_up.cancelled() => return Err(Error::GivenUp { process: entry.init.key.clone() }),
        };
        match done {
            Err(unit::error::Error::Job { .. }) if self.manager.has_timed_out(task.unit()).await => {
                Err(Error::CreateTimedOut { unit: task.unit().to_string() })
            }
            Err(unit::error::Error::Job { .. }) => Err(Error::Launch(self.launch_failure(task, dir))),
            other => Ok(other?),
        }
    }

    fn launch_failure(&self, task: &Task, dir: &Path) -> String {
        if let Some(reason) = command::failure(dir) {
            return reason;
        }
        let cli = runtime::Cli::of(task, dir);
        let verb = if task.request.checkpoint.is_some() { runtime::RESTORE } else { "create" };
        format!("OCI runtime {verb} failed: {}", cli.reason(verb, None))
    }

    /// Records the container: its init process, its cgroup and its limits.
    async fn record_container(&self, entry: &Arc<Entry>, pid: u32) -> Result<(), Error> {
        let task = entry.task().clone();
        let (program, found) = (program_of(pid), cgroup::of_process(pid).ok());
        let (mut limits, mut oom_kills) = (None, 0);
        if let Some(cgroup) = &found {
            limits = self.join_limits(&task, cgroup).await?;
            // A cgroup that the client has created may already have counted kills.
            oom_kills = MemoryEvents::read(cgroup)?.unwrap_or_default().oom_kill;
        }
        // If the process has ended in the meantime, its cgroup can't be read any more.
        let cgroup = found.unwrap_or_else(|| task.placement.cgroup(task.unit()));
        let container = Container { pid, cgroup, limits, oom_kills };
        fault::point(Point::CreateLimited);
        self.tasks.apply(entry, &entry.init, Event::Created { container, program })
    }

    async fn make_pod_slice(&self, slice: &UnitName, task: &Task) -> Result<(), Error> {
        let pod =
            |name: &str| task.fields.iter().find(|(field, _)| field == name).map(|(_, value)| value.as_str());
        let description = match (pod("POD_NAMESPACE"), pod("POD_NAME")) {
            (Some(namespace), Some(name)) => format!("Pod {namespace}/{name}"),
            _ => format!("Pod of container {}", task.key),
        };
        match self.manager.start_transient(slice, &properties::pod_slice(&description)).await {
            Ok(()) | Err(unit::error::Error::Exists { .. }) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }
}

/// Checks the path of a bundle.
pub(super) fn check_bundle_path(bundle: &Path) -> Result<(), Error> {
    if files::is_plain(bundle) { Ok(()) } else { Err(Error::BundlePath(bundle.to_owned())) }
}

/// Checks that this machine can apply the limits.
pub(crate) fn check_resources(resources: &Resources) -> Result<(), Error> {
    resources.check()?;
    if resources.needs().next().is_some() {
        resources.check_controllers(&cgroup::controllers()?)?;
    }
    Ok(())
}

/// The slice of the unit and the cgroup of the container, as the client requests them.
fn placement(key: &TaskKey, spec: &Spec, restores: bool) -> Result<Placement, Error> {
    let ours = || -> Result<UnitName, Error> {
        Ok(match (key.namespace.as_str(), sandbox_of(spec)) {
            ("k8s.io", Some(sandbox)) => name::pod_slice(&key.namespace, &sandbox)?,
            _ => name::namespace_slice(&key.namespace)?,
        })
    };
    let requested = cgroups_path::parse(spec.cgroups_path(), &key.namespace, &key.id)?;
    // A client restores a container with the spec of the original, whose default path has another id.
    let requested = if restores && requested.is_default_of_another(&key.namespace) {
        cgroups_path::Requested::Default
    } else {
        requested
    };
    Ok(match requested {
        cgroups_path::Requested::Default => {
            Placement::Unit { slice: ours()?, child: cgroups_path::escape(key.id.as_str()) }
        }
        cgroups_path::Requested::Slice { slice, child } => {
            Placement::Unit { slice: UnitName::new(slice)?, child }
        }
        cgroups_path::Requested::Literal(path) => {
            if let Some(placement) = own_placement(key, &path)? {
                return Ok(placement);
            }
            tracing::warn!(
                task = %key,
                "task {key}: its client insists on cgroup {}, outside of the unit: \
                 systemctl shows neither its processes nor its memory",
                path.display()
            );
            Placement::Foreign { slice: name::namespace_slice(&key.namespace)?, path }
        }
    })
}

/// The placement in a bundle that an earlier attempt of the same Create has already rewritten.
fn own_placement(key: &TaskKey, path: &Path) -> Result<Option<Placement>, Error> {
    let parts: Vec<_> = path.iter().filter_map(|part| part.to_str()).collect();
    let [.., slice, unit, child] = parts[..] else {
        return Ok(None);
    };
    if !name::candidates(key).any(|own| own.as_str() == unit) {
        return Ok(None);
    }
    Ok(Some(Placement::Unit { slice: UnitName::new(slice)?, child: child.to_owned() }))
}

/// The pod's sandbox (pause container) that a container belongs to; a sandbox belongs to itself.
fn sandbox_of(spec: &Spec) -> Option<TaskId> {
    spec.annotation("io.kubernetes.cri.sandbox-id").and_then(|id| TaskId::new(id).ok())
}

/// The OCI runtime knows containers by their ids alone: where two containerds have the same one, the later task
/// gets a state directory of its own.
fn keep_apart(task: &mut Task) {
    let owner = if task.key.owner.is_usual() { "containerd" } else { task.key.owner.as_str() };
    let mut root = task.runtime.root.clone().into_os_string();
    root.push(format!("+{owner}"));
    task.runtime.root = root.into();
}
