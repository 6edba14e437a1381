//! The Sandbox API: a sandbox is a task whose spec, rootfs and first process come from the shim. A sandbox survives
//! everything that a task survives.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use serde_json::Value;

use crate::cgroup::stats::Stats;
use crate::config;
use crate::id::{ProcessKey, TaskKey, UnitName};
use crate::launch;
use crate::launch::contract::LAUNCHED;
use crate::oci::options;
use crate::oci::pod::{self, Pod, Seccomp};
use crate::oci::{bundle, pod_files, profiles};
use crate::services::{Delivery, Error, WaitsFor, blocking};
use crate::task::lifecycle::Exit;
use crate::task::request::{Create, Mount, Places, Sandbox, Stdio};

use super::Shim;
use super::create::Begun;
use super::delete::kill_and_wait;
use super::new_task::check_bundle_path;
use super::{CreateTask, Status};

const SIGTERM: u32 = nix::libc::SIGTERM as u32;

/// A CreateSandbox call.
#[derive(Clone, Debug)]
pub struct CreateSandbox {
    /// The new sandbox.
    pub key: TaskKey,
    pub bundle: PathBuf,
    /// The mounts of the rootfs that its client requests. If there are any, the client's spec decides what runs in the sandbox.
    pub rootfs: Vec<Mount>,
    /// The pod, if the client is CRI.
    pub pod: Option<Pod>,
    /// The file of the network namespace; empty if the client has made none.
    pub network: String,
    /// The OCI runtime's options.
    pub options: options::OptionsSource,
    /// Whether the client has a lease for the socket over which it called.
    pub has_lease: Option<bool>,
}

#[derive(Clone, Debug)]
pub struct SandboxState {
    /// The status of its first process.
    pub status: Status,
    /// The pid of that process. `None` if there has been none.
    pub pid: Option<u32>,
    /// The time of its creation.
    pub created: SystemTime,
    /// The exit of that process, if it has ended.
    pub exit: Option<Exit>,
    pub unit: UnitName,
    /// The slice of the unit: that of the pod, for a pod.
    pub slice: UnitName,
}

impl Shim {
    /// Creates a sandbox. Its first process waits for [`Self::start`], as that of any task.
    ///
    /// # Errors
    /// As [`Self::create`], or the pod's files can't be made.
    pub async fn create_sandbox(
        self: &Arc<Self>,
        call: CreateSandbox,
        delivery: Delivery,
    ) -> Result<(), Error> {
        if !launch::sandbox::is_possible() {
            return Err(Error::NotImplemented("a sandbox on this architecture"));
        }
        check_bundle_path(&call.bundle)?;
        let init = call.key.init();
        // Before the files are made: what is left of an earlier sandbox has the same files.
        if let Begun::Earlier(_) = self.begin_create(&call.key, &call.bundle, delivery).await? {
            return Ok(());
        }
        let (to_prepare, key) = (call.clone(), call.key.clone());
        let undo = move |late: Result<Option<Sandbox>, Error>| {
            let places = late.ok().flatten().and_then(|sandbox| sandbox.places);
            let removed = places.map_or(Ok(()), |places| pod_files::remove(&places));
            removed.unwrap_or_else(|error| warn_of_files(&key, &error));
        };
        let prepared = self.files.run_or_undo(WaitsFor::Disk, &init, move || prepare(&to_prepare), undo);
        let sandbox = prepared.await.map_err(Error::busy_means_exists)??;
        let places = sandbox.as_ref().and_then(|sandbox| sandbox.places.clone());
        let create = CreateTask {
            key: call.key,
            request: Create {
                bundle: call.bundle,
                rootfs: call.rootfs,
                checkpoint: None,
                sandbox,
                has_lease: call.has_lease,
            },
            stdio: Stdio::default(),
            options: call.options,
        };
        let created = self.create_anew(create).await;
        if let (Err(_), true, Some(places)) = (&created, self.tasks.entry(&init.task).is_err(), places) {
            // If the task was registered, its rollback has removed the files.
            // containerd calls Shutdown, which finds no task.
            let removed = self.files.run(WaitsFor::Disk, &init, move || pod_files::remove(&places)).await;
            let removed = removed.and_then(|removed| Ok(removed?));
            removed.unwrap_or_else(|error| warn_of_files(&init.task, &error));
        }
        created.map(drop)
    }

    /// Starts a sandbox. Returns its pid and its state, once the first process has blocked its signals: an earlier SIGTERM would
    /// be lost, or would end the process without the exit code 0.
    ///
    /// # Errors
    /// As [`Self::start`].
    pub async fn start_sandbox(
        self: &Arc<Self>,
        init: &ProcessKey,
        delivery: Delivery,
    ) -> Result<(u32, SandboxState), Error> {
        /// The process needs some 100 µs. A machine on which it takes longer than this limit is busy with other work.
        const PAUSE: Duration = Duration::from_millis(2);
        const LIMIT: Duration = Duration::from_secs(2);
        let pid = self.start(init, delivery).await?;
        if self.tasks.created(&init.task)?.task().request.sandbox.is_some() {
            let taking = async {
                while !blocking(move || takes_signals(pid)).await? {
                    tokio::time::sleep(PAUSE).await;
                }
                Ok::<_, Error>(())
            };
            if let Ok(taking) = tokio::time::timeout(LIMIT, taking).await {
                taking?;
            }
        }
        Ok((pid, self.sandbox_state(&init.task).await?))
    }

    /// Ends a sandbox: asks its first process to end, and kills it after `limit`. It is no error if it has ended. Containers
    /// that share its pid namespace end with it.
    ///
    /// # Errors
    /// There is no such sandbox, or it does not end.
    pub async fn stop_sandbox(
        self: &Arc<Self>,
        key: &TaskKey,
        limit: Option<Duration>,
        delivery: Delivery,
    ) -> Result<(), Error> {
        let entry = self.tasks.created(key)?;
        match self.tasks.kill(&entry.init.key, SIGTERM, false, delivery).await {
            Ok(()) => {}
            Err(Error::Finished) => return Ok(()),
            Err(error) => return Err(error),
        }
        let limit = limit.unwrap_or(config::SANDBOX_STOP_LIMIT);
        if tokio::time::timeout(limit, entry.init.ended()).await.is_err() {
            kill_and_wait(&entry).await?;
        }
        Ok(())
    }

    /// Removes a sandbox, and kills it first. It is no error if there is none.
    ///
    /// # Errors
    /// Something can't be removed. The call can be repeated.
    pub async fn shut_down_sandbox(self: &Arc<Self>, key: &TaskKey) -> Result<(), Error> {
        let removed = async {
            let entry = self.tasks.entry(key)?;
            self.end_create(&entry).await?;
            self.kill_and_delete(&entry).await
        };
        match removed.await {
            Ok(_) | Err(Error::UnknownTask { .. }) => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// The state of a sandbox.
    ///
    /// # Errors
    /// There is no such sandbox.
    pub async fn sandbox_state(&self, key: &TaskKey) -> Result<SandboxState, Error> {
        let state = self.tasks.state(&key.init())?;
        let task = self.tasks.created(key)?.task().clone();
        let launched = self.store.dir(key).join(LAUNCHED);
        let created = blocking(move || fs::metadata(launched).and_then(|found| found.modified())).await?;
        Ok(SandboxState {
            status: state.status,
            pid: state.pid,
            // The file exists as long as the task.
            created: created.unwrap_or(SystemTime::UNIX_EPOCH),
            exit: state.exit,
            unit: task.unit().clone(),
            slice: task.placement.slice().clone(),
        })
    }

    /// The statistics of a sandbox: for a pod, those of its parent cgroup, with all of its containers.
    ///
    /// # Errors
    /// There is no such sandbox, or its numbers can't be read.
    pub async fn sandbox_stats(&self, key: &TaskKey) -> Result<Stats, Error> {
        let task = self.tasks.created(key)?.task().clone();
        let is_pod = task.fields.iter().any(|(field, _)| field == "POD_NAME");
        if !is_pod || task.init.exit().is_some() {
            return self.stats(key).await;
        }
        let pod = task.placement.parent();
        blocking(move || Ok(Stats::read(&pod, &pod)?)).await?
    }
}

/// True if the first process of a sandbox has blocked its signals, which is its first action, or if the process has ended.
fn takes_signals(pid: u32) -> bool {
    const HANGUP: u64 = 1;
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let blocked = status.lines().find_map(|line| line.strip_prefix("SigBlk:"));
    blocked.is_none_or(|mask| u64::from_str_radix(mask.trim(), 16).is_ok_and(|mask| mask & HANGUP != 0))
}

/// Writes the spec into the bundle, and the pod's files to where CRI looks for them. Can be repeated.
fn prepare(call: &CreateSandbox) -> Result<Option<Sandbox>, Error> {
    if !call.rootfs.is_empty() {
        return Ok(None);
    }
    let seccomp = match call.pod.as_ref().map(|pod| &pod.seccomp) {
        Some(Seccomp::File(path)) => Some(profiles::seccomp(path)?),
        Some(Seccomp::Own) | None => None,
    };
    let Some(pod) = &call.pod else {
        let node = node(seccomp);
        bundle::rewrite_whole(&call.bundle, |given| match given {
            Some(given) => pod::with_init(given, &node),
            None => pod::spec(call.key.id.as_str(), None, &call.network, &node),
        })?;
        return Ok(Some(Sandbox { places: None }));
    };
    let node = node(seccomp);
    if let Some(profile) = pod.apparmor.as_ref().filter(|_| node.apparmor) {
        profiles::check_apparmor(profile)?;
    }
    let places = pod_files::places(&call.bundle, call.key.id.as_str());
    let prepared = prepare_pod(call, pod, places.as_ref(), node);
    if let (Err(_), Some(places)) = (&prepared, &places) {
        // The first error is the one to report.
        let _ = pod_files::remove(places);
    }
    prepared.map(|()| Some(Sandbox { places }))
}

/// As [`prepare`], for a pod. An existing spec was written by an earlier attempt.
fn prepare_pod(
    call: &CreateSandbox,
    pod: &Pod,
    places: Option<&Places>,
    mut node: pod::Node,
) -> Result<(), Error> {
    if let Some(places) = places {
        pod_files::make(pod, places)?;
        if pod.user.is_some() && !call.network.is_empty() {
            node.user_namespace = pod_files::pin_user_namespace(Path::new(&call.network), places)?;
        }
    }
    let spec = pod::spec(call.key.id.as_str(), Some(pod), &call.network, &node);
    Ok(bundle::write_whole(&call.bundle, &spec)?)
}

/// The Create of a sandbox has failed, and nobody removes its files later.
fn warn_of_files(sandbox: &TaskKey, error: &dyn std::error::Error) {
    tracing::warn!(%error, "sandbox {sandbox}: the files of the pod stay: {error}");
}

fn node(seccomp: Option<Value>) -> pod::Node {
    let says = |path: &str, word: &str| fs::read_to_string(path).is_ok_and(|text| text.trim() == word);
    let score = fs::read_to_string("/proc/self/oom_score_adj").ok();
    pod::Node {
        selinux: profiles::selinux_is_active(),
        apparmor: says("/sys/module/apparmor/parameters/enabled", "Y"),
        oom_score_adj: score.and_then(|score| score.trim().parse().ok()).unwrap_or_default(),
        seccomp,
        user_namespace: None,
    }
}
