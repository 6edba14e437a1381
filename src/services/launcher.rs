//! How units run this program: the daemon's side of `launch`, with what it keeps for it.

use std::collections::{HashMap, VecDeque};
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crate::cgroup;
use crate::id::{ProcessKey, UnitName};
use crate::launch::contract::Kind;
use crate::launch::{self, command};
use crate::oci::options;
use crate::oci::sealed::{self, Copies};
use crate::task::Task;
use crate::task::request::Runtime;

use super::files::SlowFiles;
use super::{Error, WaitsFor, blocking, waiting};

/// How units run this program.
pub struct Launcher {
    program: PathBuf,
    copies: Arc<Copies>,
    /// The kernel is getting ready for moves between cgroups.
    warming: Arc<AtomicBool>,
    /// The search paths in which a usable criu was found, and its file.
    criu: Mutex<HashMap<String, Version>>,
    /// Cgroups in ShimCgroups that had processes when they were to be removed.
    left: Mutex<VecDeque<PathBuf>>,
}

/// A program: its device, inode, and change time.
type Version = (u64, u64, i64);

/// How often the daemon looks for unused copies.
const SWEEP_INTERVAL: Duration = Duration::from_secs(10);
/// How often the daemon removes empty cgroups. This needs a thread, which would never end if it were needed more often.
const CGROUP_INTERVAL: Duration = Duration::from_secs(20);

/// The largest number of cgroups in ShimCgroups that are remembered. If there are more, some are left to their owner.
const MOST_LEFT: usize = 1024;

/// The most search paths that are remembered. Each containerd has one.
const MOST_PATHS: usize = 64;

impl Launcher {
    /// A launcher of this program.
    pub(crate) fn new(program: PathBuf) -> Self {
        let (copies, warming) = (Arc::default(), Arc::default());
        Self { program, copies, warming, criu: Mutex::default(), left: Mutex::default() }
    }

    /// The command line of a unit that starts a process.
    pub(crate) fn command(&self, kind: impl Into<Kind>, key: &ProcessKey) -> Vec<String> {
        command::command_line(&self.program, kind.into(), key)
    }

    /// A copy of the task's OCI runtime, if there can be one. The runtime may be on a disk that does not answer.
    ///
    /// # Errors
    /// The disk does not answer.
    pub(crate) async fn sealed_runtime(
        &self,
        files: &SlowFiles,
        task: &Task,
    ) -> Result<Option<sealed::SealedRef>, Error> {
        if !sealed::is_wanted(&task.runtime.binary) {
            return Ok(None);
        }
        let (copies, binary) = (self.copies.clone(), task.runtime.binary.clone());
        let copied = waiting(WaitsFor::Disk, &task.key, move || copies.copy_of(&binary));
        files.in_time(&task.key.init(), copied).await
    }

    /// True if the criu in this search path, which is that of the process's task, is known to be usable.
    ///
    /// # Errors
    /// A disk of the search path does not answer.
    pub(crate) async fn knows_criu(
        &self,
        files: &SlowFiles,
        process: &ProcessKey,
        path: &str,
    ) -> Result<bool, Error> {
        let found = version_of_criu(files, process, path).await?;
        Ok(found.is_some() && self.criu().get(path).copied() == found)
    }

    /// The criu in this search path can be used.
    ///
    /// # Errors
    /// As [`Self::knows_criu`].
    pub(crate) async fn remember_criu(
        &self,
        files: &SlowFiles,
        process: &ProcessKey,
        path: &str,
    ) -> Result<(), Error> {
        let Some(found) = version_of_criu(files, process, path).await? else {
            return Ok(());
        };
        let mut criu = self.criu();
        if criu.len() >= MOST_PATHS {
            criu.clear();
        }
        criu.insert(path.to_owned(), found);
        Ok(())
    }

    fn criu(&self) -> MutexGuard<'_, HashMap<String, Version>> {
        self.criu.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Prepares the kernel for the moves of a process between cgroups ([`cgroup::warm_up`]) once `spawned` resolves to true: systemd
    /// has spawned the process. An earlier preparation would delay systemd: it holds a lock that mkdir(2) of the unit's cgroup needs.
    pub(crate) fn warm_up_after(&self, spawned: impl Future<Output = bool> + Send + 'static) {
        let warming = self.warming.clone();
        tokio::spawn(async move {
            if !spawned.await || warming.swap(true, Ordering::Relaxed) {
                return;
            }
            tokio::task::spawn_blocking(move || {
                if let Err(error) = cgroup::warm_up() {
                    tracing::debug!(%error, "can't prepare the kernel for moves between cgroups, creates are slower: {error}");
                }
                warming.store(false, Ordering::Relaxed);
            });
        });
    }

    /// Background task: drops sealed runtime copies that have been idle for [`sealed::IDLE_LIMIT`], and empty cgroups of
    /// the OCI runtime. Never returns.
    pub async fn forget_idle(&self) {
        let (mut copies, mut cgroups) =
            (tokio::time::interval(SWEEP_INTERVAL), tokio::time::interval(CGROUP_INTERVAL));
        loop {
            tokio::select! {
                _ = copies.tick() => self.copies.sweep(),
                _ = cgroups.tick() => self.remove_empty_cgroups().await,
            }
        }
    }

    /// Removes the cgroup in which the process of a unit was started, once no process that a hook started runs in it.
    pub(crate) async fn remove_cgroup(&self, runtime: &Runtime, unit: &UnitName) {
        if let Some(left) = launch::cgroup::remove(runtime, unit).await {
            self.leave([left]);
        }
    }

    /// Removes the cgroups of OCI runtimes that have no processes. Has no time limit: the next try would wait for the same lock of
    /// the kernel.
    pub(crate) async fn remove_empty_cgroups(&self) {
        // The lock is not held meanwhile: threads of the async runtime need it.
        let mut left = std::mem::take(&mut *self.left());
        let swept = blocking(move || {
            // A cgroup that can't be removed for another reason is left to its owner.
            left.retain(|cgroup| matches!(cgroup::remove_blocking(cgroup), Ok(false)));
            launch::cgroup::sweep_blocking();
            left
        });
        // Fails only while the daemon stops.
        self.leave(swept.await.unwrap_or_default());
    }

    fn leave(&self, cgroups: impl IntoIterator<Item = PathBuf>) {
        let mut left = self.left();
        left.extend(cgroups);
        while left.len() > MOST_LEFT {
            left.pop_front();
        }
    }

    fn left(&self) -> MutexGuard<'_, VecDeque<PathBuf>> {
        self.left.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The criu in a search path, which may lead to a disk that does not answer.
async fn version_of_criu(
    files: &SlowFiles,
    process: &ProcessKey,
    path: &str,
) -> Result<Option<Version>, Error> {
    let path = path.to_owned();
    let find = move || {
        let file = options::find("criu", &path)?.metadata().ok()?;
        Some((file.dev(), file.ino(), file.ctime()))
    };
    files.run(WaitsFor::Disk, process, find).await
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::FILES_LIMIT;
    use crate::id::{Namespace, TaskKey};
    use futures_util::FutureExt;

    #[tokio::test]
    async fn a_criu_is_known_until_its_file_changes() {
        let process = TaskKey::from_word(Namespace::new("default").unwrap(), "web").unwrap().init();
        let (launcher, files) = (Launcher::new(PathBuf::new()), SlowFiles::new(FILES_LIMIT));
        let dir = tempfile::tempdir().unwrap();
        let path = format!("/no/such/dir:{}", dir.path().display());
        let knows = async || launcher.knows_criu(&files, &process, &path).await.unwrap();
        launcher.remember_criu(&files, &process, &path).await.unwrap();
        assert!(!knows().await, "there is none");
        crate::oci::write_script(&dir.path().join("criu"), "exit 0");
        assert!(!knows().await);
        launcher.remember_criu(&files, &process, &path).await.unwrap();
        assert!(knows().await);
        std::fs::remove_file(dir.path().join("criu")).unwrap();
        assert!(!knows().await);
    }

    #[tokio::test(start_paused = true)]
    async fn a_search_path_with_a_dead_disk_holds_up_only_the_threads_for_such_disks() {
        let process = TaskKey::from_word(Namespace::new("default").unwrap(), "dead").unwrap().init();
        let files = SlowFiles::new(FILES_LIMIT);
        let (answer, disk) = std::sync::mpsc::channel::<()>();
        let waits = Arc::new(Mutex::new(disk));
        // All threads of this task wait for the disk.
        let hanging: Vec<_> = (0..8)
            .map(|_| {
                let (waits, task) = (waits.clone(), process.task.clone());
                tokio::spawn(async move {
                    waiting(WaitsFor::Disk, &task, move || waits.lock().unwrap().recv().is_err()).await
                })
            })
            .collect();
        tokio::task::yield_now().await;
        let launcher = Launcher::new(PathBuf::new());
        let looked = launcher.knows_criu(&files, &process, "/usr/bin");
        tokio::pin!(looked);
        assert!(looked.as_mut().now_or_never().is_none());
        drop(answer);
        assert!(!looked.await.unwrap());
        for thread in hanging {
            assert!(thread.await.unwrap().unwrap());
        }
    }
}
