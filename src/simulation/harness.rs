//! A node for tests of operations: a fake systemd, a fake OCI runtime, a fake containerd, a store in a temporary directory, and
//! daemons that come and go.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Arc, LazyLock};
use std::time::Duration;

use tempfile::TempDir;
use tokio_util::sync::CancellationToken;

use crate::api::events::publish;
use crate::api::status;
use crate::cgroup;
use crate::cgroup::watch::Watch;
use crate::config;
use crate::effects::Effects;
use crate::id::{ExecId, Namespace, ProcessKey, TaskId, TaskKey, UnitName};
use crate::launch::fake::{BRIEF_STATUS, FakeLaunch};
use crate::oci::containerd::write_containerd;
use crate::oci::criu::Checkpoint;
use crate::oci::options;
use crate::ops::{AddExec, CreateTask};
use crate::ops::{Parts, Shim};
use crate::recovery::read_records;
use crate::services::files::SlowFiles;
use crate::services::runtime_files::RuntimeFiles;
use crate::services::{Delivery, Error};
use crate::session::fds::StreamFds;
use crate::store::Store;
use crate::store::delete_replies::{DeleteReplies, Deleted};
use crate::store::failures::Failures;
use crate::task::request::{Containerd, Create, Stdio};
use crate::transport::event_connection::EventConnections;
use crate::unit::fake::FakeSystemd;
use crate::unit::fd_store::FdStore;
use crate::unit::name;
use crate::unit::notify::Notifier;
use crate::unit::observations::Observations;
use crate::unit::relay::Relay;

use super::containerd::{FakeContainerd, KeptConnections};
use super::panics::Panics;
use super::runtime::{FakeRuntime, Starts};

/// A client that waits for the answer of its Delete.
pub fn waiting_client() -> &'static CancellationToken {
    static WAITS: LazyLock<CancellationToken> = LazyLock::new(CancellationToken::new);
    &WAITS
}

/// The exit code of the exec.
pub(crate) const EXEC_STATUS: u32 = BRIEF_STATUS;

/// A node with one task and one exec, both with fixed names.
pub(crate) struct World {
    root: TempDir,
    /// Counts the effects of the daemon, and lets one of them fail or end the daemon.
    pub(crate) effects: Arc<Effects>,
    /// The node's systemd.
    pub(crate) systemd: Arc<FakeSystemd>,
    /// The `launch` of its units.
    pub(crate) launch: Arc<FakeLaunch>,
    pub(crate) task: TaskKey,
    containerd: Arc<FakeContainerd>,
    /// The connections to containerd that outlive a daemon.
    kept: Arc<KeptConnections>,
    /// True if the task is restored from a checkpoint.
    restores: bool,
    /// True if the descriptor store of the next daemons is full.
    pub(crate) has_full_store: bool,
    /// What the commands `start` of the OCI runtimes of the next daemons do.
    pub(crate) starts: Starts,
    /// The work on the files of OCI runtimes of all daemons, if a test has made their disks unreachable.
    occupied: Option<RuntimeFiles>,
}

impl World {
    /// A node on which nothing runs. `name` identifies the test, and is the task's namespace.
    pub(crate) fn new(name: &str) -> Self {
        let root = tempfile::Builder::new().prefix(&format!("shim-test-{name}-")).tempdir().unwrap();
        fs::create_dir(root.path().join("bundle")).unwrap();
        fs::write(root.path().join("bundle/config.json"), "{}").unwrap();
        let containerd = FakeContainerd::listen(root.path().join("containerd.ttrpc"));
        let effects = Effects::of(&root.path().join("state"));
        let launch = FakeLaunch::new(Store::new(root.path().join("state")));
        let systemd = FakeSystemd::new(effects.clone(), launch.clone());
        let task = TaskKey::usual(Namespace::new(name).unwrap(), TaskId::new("web").unwrap());
        let (kept, starts) = (KeptConnections::new(effects.clone()), Starts::Work);
        let world = Self {
            root,
            effects,
            systemd,
            launch,
            task,
            containerd,
            kept,
            restores: false,
            has_full_store: false,
            starts,
            occupied: None,
        };
        world.called_from(&world.root.path().join("bundle"));
        world
    }

    /// As [`World::new`], for a task that is restored from a checkpoint.
    pub(crate) fn restoring(name: &str) -> Self {
        let mut world = Self::new(name);
        world.restores = true;
        world
    }

    /// The task's init process.
    pub(crate) fn init(&self) -> ProcessKey {
        self.task.init()
    }

    pub(crate) fn exec(&self) -> ProcessKey {
        ProcessKey { task: self.task.clone(), exec: Some(ExecId::new("probe").unwrap()) }
    }

    /// The unit of the task.
    pub(crate) fn unit(&self) -> UnitName {
        name::candidates(&self.task).next().unwrap()
    }

    pub(crate) fn exec_unit(&self) -> UnitName {
        name::exec_candidates(&self.unit(), &ExecId::new("probe").unwrap()).next().unwrap()
    }

    pub(crate) fn create_call(&self) -> CreateTask {
        let options = options::Options {
            binary_name: "/bin/true".to_owned(),
            root: self.root.path().join("runtime").display().to_string(),
            log: "none".to_owned(),
            ..options::Options::default()
        };
        CreateTask {
            key: self.task.clone(),
            request: Create {
                bundle: self.root.path().join("bundle"),
                checkpoint: self.restores.then(|| "/checkpoint".into()),
                ..Create::default()
            },
            stdio: Stdio::default(),
            options: options::OptionsSource::Given(Box::new(options)),
        }
    }

    pub(crate) fn exec_call(&self) -> AddExec {
        let spec = br#"{"args":["true"],"cwd":"/"}"#.to_vec();
        AddExec {
            task: self.task.clone(),
            exec: ExecId::new("probe").unwrap(),
            stdio: Stdio::default(),
            spec,
        }
    }

    /// Runs a daemon, which recovers and then does `work`, until both are done and nothing is left to do. Returns
    /// `None` if the daemon ended before.
    pub(crate) fn live<T, W>(&self, work: impl FnOnce(Arc<Shim>) -> W + Send + 'static) -> Option<T>
    where
        T: Send + 'static,
        W: Future<Output = T> + Send + 'static,
    {
        let panics = Panics::watch();
        let runtime =
            tokio::runtime::Builder::new_current_thread().enable_all().start_paused(true).build().unwrap();
        let done = runtime.block_on(async {
            let working = async {
                let shim = self.start_daemon();
                let recovered = shim.clone();
                // In a future of its own, so that a panic in it does not end the test.
                tokio::spawn(async move {
                    let records = read_records(recovered.store.clone(), Arc::default());
                    recovered.recover(records.await.unwrap().unwrap()).await;
                })
                .await
                .ok()?;
                self.spawn_loops(&shim);
                let done = tokio::spawn(work(shim)).await.ok()?;
                tokio::time::sleep(SETTLED).await;
                Some(done)
            };
            tokio::select! {
                biased;
                () = self.effects.death() => None,
                done = working => Some(done.unwrap()),
            }
        });
        self.kept.end();
        // Drops the futures of the daemon that has ended, and then waits for its blocking work.
        drop(runtime);
        panics.assert_none();
        done
    }

    fn start_daemon(&self) -> Arc<Shim> {
        let fd_store = Arc::new(if self.has_full_store { full_store() } else { empty_store() });
        let notify = self.notify_socket();
        let (shim, outgoing) = Shim::new(Parts {
            store: Store::new(self.root.path().join("state")),
            delete_replies: DeleteReplies::open(&self.root.path().join("answers")).unwrap(),
            failures: Failures::open(&self.root.path().join("answers")).unwrap(),
            code: status::number,
            fds: StreamFds::new(fd_store, Vec::new()),
            cgroups: Watch::new(),
            manager: self.systemd.clone(),
            oci: Arc::new(self.runtime()),
            program: PathBuf::from("/shim"),
            files: SlowFiles::new(config::FILES_LIMIT),
            // A daemon that has ended has no threads. In the simulation, they may work for a moment longer.
            runtime_files: self.occupied.clone().unwrap_or_else(runtime_files),
            relay: if notify.exists() { Relay::to(&notify) } else { Relay::new() },
        });
        let (connections, earlier) = EventConnections::adopt(self.kept.clone(), &mut self.kept.begin());
        let outgoing = self.containerd.only(outgoing, self.effects.clone());
        tokio::spawn(publish(shim.tasks.clone(), outgoing, connections, earlier));
        let containerd = self.containerd.clone();
        tokio::spawn(async move {
            loop {
                containerd.tick();
                tokio::time::sleep(TICK).await;
            }
        });
        shim
    }

    fn spawn_loops(&self, shim: &Arc<Shim>) {
        let observations = Arc::<Observations>::default();
        self.systemd.observed_by(observations.clone());
        tokio::spawn(shim.units.clone().observe(observations));
        tokio::spawn(shim.units.clone().find_missed_ends());
        tokio::spawn(shim.cgroups.clone().observe());
        tokio::spawn(shim.cleanup.clone().write_pending());
        let systemd = self.systemd.clone();
        tokio::spawn(async move {
            loop {
                systemd.tick();
                tokio::time::sleep(TICK).await;
            }
        });
    }

    /// From now on, the disks of OCI runtimes do not answer until the result is dropped.
    pub(crate) fn occupy_runtime_files(&mut self) -> impl Sized + use<> {
        self.occupied.insert(runtime_files()).occupy(&self.task)
    }

    /// Makes the bundle anew, as containerd does for each Create.
    pub(crate) fn new_bundle(&self) {
        let (bundle, old) = (self.root.path().join("bundle"), self.root.path().join("old-bundle"));
        fs::rename(&bundle, &old).unwrap();
        fs::create_dir(&bundle).unwrap();
        fs::copy(old.join("config.json"), bundle.join("config.json")).unwrap();
        self.called_from(&bundle);
    }

    /// The events that containerd has got, in this order, as words. An event that was sent twice is there twice.
    pub(crate) fn events(&self) -> Vec<&'static str> {
        self.containerd.events()
    }

    /// The node's containerd.
    pub(super) fn containerd(&self) -> Arc<FakeContainerd> {
        self.containerd.clone()
    }

    /// Notes in a bundle that the node's containerd calls, as `start` does.
    pub(super) fn called_from(&self, bundle: &Path) {
        let containerd = Containerd { ttrpc_address: self.containerd.address(), ..Containerd::default() };
        write_containerd(bundle, &containerd).unwrap();
    }

    /// What is left of the task outside of the daemon: units, files, the OCI runtime's state.
    pub(crate) fn remains(&self) -> Vec<String> {
        let mut remains: Vec<String> = self.systemd.units().into_iter().map(|(unit, _)| unit).collect();
        for dir in [self.root.path().join("state").join(self.task.namespace.as_str()), self.runtime_root()] {
            let entries = fs::read_dir(&dir).into_iter().flatten().flatten();
            remains.extend(entries.map(|entry| entry.path().display().to_string()));
        }
        remains
    }

    /// The node's OCI runtime.
    pub(crate) fn runtime(&self) -> FakeRuntime {
        FakeRuntime {
            effects: self.effects.clone(),
            systemd: self.systemd.clone(),
            store: Store::new(self.state_dir()),
            starts: self.starts,
        }
    }

    /// Where the records are.
    pub(crate) fn state_dir(&self) -> PathBuf {
        self.root.path().join("state")
    }

    /// Where systemd's notify socket is, if a test makes one.
    pub(crate) fn notify_socket(&self) -> PathBuf {
        self.root.path().join("notify")
    }

    /// The notify socket of the container.
    pub(crate) fn container_socket(&self) -> PathBuf {
        Store::new(self.root.path().join("state")).notify_socket(&name::short_name(&self.unit()))
    }

    /// The directory in which the OCI runtime keeps the state of the containers.
    pub(crate) fn runtime_root(&self) -> PathBuf {
        self.root.path().join("runtime").join(self.task.namespace.as_str())
    }
}

impl Drop for World {
    fn drop(&mut self) {
        Effects::forget(&self.root.path().join("state"));
        cgroup::fake::remove(
            &Path::new("/").join(name::namespace_slice(&self.task.namespace).unwrap().as_str()),
        );
    }
}

pub(crate) fn runtime_files() -> RuntimeFiles {
    RuntimeFiles::new(config::RUNTIME_FILES_LIMIT)
}

fn empty_store() -> FdStore {
    FdStore::adopt(Vec::new()).unwrap().0
}

/// A descriptor store with one descriptor more than it has room for.
fn full_store() -> FdStore {
    let passed = vec![("other".to_owned(), fs::File::open("/dev/null").unwrap().into())];
    FdStore::with(Notifier::new().unwrap(), 0, passed).0
}

/// After this time, a daemon without calls has nothing left to do. The clock is paused: it takes no time.
const SETTLED: Duration = Duration::from_secs(3);

/// How often systemd and containerd have their turns. This is a time of the paused clock, which never advances by more at once:
/// otherwise the daemon would give containerd up before it could answer.
const TICK: Duration = Duration::from_millis(20);

/// A step in the life of a task.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Step {
    Create,
    Start,
    AddExec,
    StartExec,
    /// The exec's process ends, and somebody waits for it.
    EndExec,
    DeleteExec,
    Pause,
    Resume,
    Update,
    /// A checkpoint, after which the task continues.
    Checkpoint,
    /// A checkpoint with which the task ends.
    CheckpointExit,
    /// SIGKILL, and its effect.
    Kill,
    Delete,
}

impl Step {
    /// A life with checkpoints.
    pub(crate) const CHECKPOINTS: [Self; 8] = [
        Self::Create,
        Self::Start,
        Self::Checkpoint,
        Self::Pause,
        Self::Checkpoint,
        Self::Resume,
        Self::CheckpointExit,
        Self::Delete,
    ];

    /// A whole life.
    pub(crate) const ALL: [Self; 11] = [
        Self::Create,
        Self::Start,
        Self::AddExec,
        Self::StartExec,
        Self::EndExec,
        Self::DeleteExec,
        Self::Pause,
        Self::Resume,
        Self::Update,
        Self::Kill,
        Self::Delete,
    ];

    /// Takes the step.
    pub(crate) async fn take(self, node: Node, delivery: Delivery) -> Result<(), Error> {
        let (shim, init, exec) = (node.shim.clone(), &node.init.clone(), &node.exec.clone());
        match self {
            Self::Create => shim.create(node.create, delivery).await.map(drop),
            Self::Start => shim.start(init, delivery).await.map(drop),
            Self::AddExec => shim.add_exec(node.exec_call, delivery).await,
            Self::StartExec => shim.start(exec, delivery).await.map(drop),
            Self::EndExec => {
                node.systemd.end(&node.exec_unit, EXEC_STATUS as i32);
                // This is a time of the paused clock.
                let waited = tokio::time::timeout(Duration::from_secs(3600), shim.wait(exec, delivery)).await;
                assert_eq!(waited.expect("the end of the exec")?.status, EXEC_STATUS);
                Ok(())
            }
            Self::DeleteExec => shim.delete(exec, delivery, waiting_client()).await.map(|deleted| {
                assert_eq!(status(deleted), Some(EXEC_STATUS));
            }),
            Self::Pause => shim.pause(&init.task, delivery).await,
            Self::Resume => shim.resume(&init.task, delivery).await,
            Self::Update => shim.update(&init.task, br#"{"pids":{"limit":5}}"#.to_vec(), delivery).await,
            Self::Checkpoint => {
                let request = Checkpoint { image: "/checkpoint".into(), ..Checkpoint::default() };
                shim.checkpoint(&init.task, request, delivery).await
            }
            Self::CheckpointExit => {
                let request = Checkpoint { image: "/other".into(), exit: true, ..Checkpoint::default() };
                shim.checkpoint(&init.task, request, delivery).await?;
                let exit = shim.wait(init, delivery).await?;
                assert_eq!(exit.status, 137);
                Ok(())
            }
            Self::Kill => {
                shim.tasks.kill(init, nix::libc::SIGKILL as u32, false, delivery).await?;
                let exit = shim.wait(init, delivery).await?;
                assert_eq!(exit.status, 137);
                Ok(())
            }
            Self::Delete => shim.delete(init, delivery, waiting_client()).await.map(|deleted| {
                assert_eq!(status(deleted), Some(137));
            }),
        }
    }
}

fn status(deleted: Deleted) -> Option<u32> {
    deleted.exit.map(|exit| exit.status)
}

/// The parts of a [`World`] that a step needs, as a step runs in a future of its own.
pub(crate) struct Node {
    pub(crate) shim: Arc<Shim>,
    pub(crate) systemd: Arc<FakeSystemd>,
    pub(crate) init: ProcessKey,
    pub(crate) exec: ProcessKey,
    pub(crate) exec_unit: UnitName,
    create: CreateTask,
    exec_call: AddExec,
}

impl World {
    /// Takes steps one after the other, in one daemon, until one fails. Returns `None` if the daemon ended.
    pub(crate) fn take(&self, steps: &[Step], delivery: Delivery) -> Option<Result<(), Error>> {
        let steps = self.nodes(steps);
        self.live(move |shim| async move {
            for (step, node) in steps {
                step.take(node(shim.clone()), delivery).await?;
            }
            Ok(())
        })
    }

    /// The steps, each with what makes its [`Node`].
    pub(crate) fn nodes(
        &self,
        steps: &[Step],
    ) -> Vec<(Step, impl FnOnce(Arc<Shim>) -> Node + Send + 'static)> {
        steps.iter().map(|step| (*step, self.parts())).collect()
    }

    /// Makes a [`Node`] of a daemon.
    pub(crate) fn parts(&self) -> impl FnOnce(Arc<Shim>) -> Node + Send + 'static {
        let (systemd, init, exec, exec_unit) =
            (self.systemd.clone(), self.init(), self.exec(), self.exec_unit());
        let (create, exec_call) = (self.create_call(), self.exec_call());
        move |shim| Node { shim, systemd, init, exec, exec_unit, create, exec_call }
    }

    /// What a client sees of the task in a daemon that has just recovered, and what systemd has.
    pub(crate) fn seen(&self) -> Vec<String> {
        let (init, exec) = (self.init(), self.exec());
        let shown = self.live(move |shim| async move {
            let state = |key: &ProcessKey| {
                shim.tasks.state(key).map(|state| (state.status, state.exit.map(|e| e.status)))
            };
            let state = |key| state(key).map_or_else(|error| error.to_string(), |state| format!("{state:?}"));
            vec![state(&init), state(&exec)]
        });
        let units = self.systemd.units().into_iter().map(|(unit, state)| format!("{unit} {state}"));
        shown.unwrap().into_iter().chain(units).collect()
    }
}
