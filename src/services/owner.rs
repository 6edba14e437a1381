//! Finds the task that a caller means. Two containerds may use the same namespace and id.
//!
//! A containerd is known by the directory of its bundles. The path of a bundle is resolved in a separate thread, because its
//! disk may not answer.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use crate::id::{Owner, TaskKey};
use crate::oci::containerd;

use super::files::SlowFiles;
use super::tasks::Tasks;
use super::{Entry, Error, WaitsFor};

/// How long a daemon that starts waits for the disks of bundles.
const OWNERS_LIMIT: Duration = Duration::from_secs(2);

impl Tasks {
    /// The key of a containerd's own task with these names, whether the task exists or not.
    pub fn own(&self, named: &TaskKey, owner: &Owner) -> TaskKey {
        let own = named.of(owner.clone());
        if owner.is_usual() || self.registry.get(&own).is_some() {
            return own;
        }
        // Earlier versions recorded the tasks of every containerd as those of the usual one.
        let usual = named.of(Owner::default());
        let recorded = self.registry.get(&usual).filter(|entry| Self::is_own(entry, owner));
        if recorded.is_some() { usual } else { own }
    }

    /// The key of the task with these names, for an unknown caller: the task of the usual containerd, or the only such task.
    pub fn any(&self, named: &TaskKey) -> TaskKey {
        self.usual_or(named, |_| true)
    }

    /// As [`Self::any`], for a caller that has no lease: the task of one that has a lease is not the caller's. The usual
    /// containerd also deletes the task of a Create that has failed.
    pub fn without_lease(&self, named: &TaskKey) -> TaskKey {
        // Of a task of an earlier version, nobody knows.
        self.usual_or(named, |entry| entry.task().request.has_lease != Some(true))
    }

    fn usual_or(&self, named: &TaskKey, may_be: impl Fn(&Arc<Entry>) -> bool) -> TaskKey {
        if self.registry.get(named).is_some() {
            return named.clone();
        }
        let mut others = self.registry.namesakes(named);
        others.retain(may_be);
        match &others[..] {
            [only] => only.key.clone(),
            _ => named.clone(),
        }
    }

    /// True if the task is that containerd's own.
    pub(crate) fn is_own(entry: &Arc<Entry>, owner: &Owner) -> bool {
        let recorded = &entry.key.owner;
        if !recorded.is_usual() {
            return recorded == owner;
        }
        let found = entry.init.live().bundle_owner.clone();
        found.map_or_else(|| owner.is_usual(), |found| found == *owner)
    }

    /// As [`Self::own`], for a caller that is known by the bundle it names only.
    ///
    /// # Errors
    /// The disk of the bundle does not answer, or another call for this task waits for it.
    pub(crate) async fn own_by_bundle(
        &self,
        files: &SlowFiles,
        named: &TaskKey,
        bundle: &Path,
    ) -> Result<TaskKey, Error> {
        Ok(self.own(named, &owner_by_bundle(files, named, bundle).await?))
    }

    /// After a restart: finds out which containerd the bundles of tasks belong to whose records do not say it. Until that
    /// is known, they belong to the usual one.
    pub(crate) async fn find_owners(&self, files: &SlowFiles) {
        let all = self.registry.all();
        let unknown = all.iter().filter(|entry| entry.key.owner.is_usual()).map(|entry| async {
            let bundle = entry.task().request.bundle.clone();
            match owner_by_bundle(files, &entry.key, &bundle).await {
                Ok(owner) => entry.init.live().bundle_owner = Some(owner),
                Err(error) => {
                    tracing::warn!(task = %entry.key, %error, "task {}: can't find out which containerd its bundle belongs to: {error}", entry.key);
                }
            }
        });
        let all_known = async { drop(futures_util::future::join_all(unknown).await) };
        // The owner of a bundle whose disk does not answer in time stays unknown.
        let _ = tokio::time::timeout(OWNERS_LIMIT, all_known).await;
    }
}

async fn owner_by_bundle(files: &SlowFiles, named: &TaskKey, bundle: &Path) -> Result<Owner, Error> {
    let TaskKey { namespace, id, .. } = named.clone();
    // Another containerd names another path, so its call does not wait for this one.
    let by_name = Owner::of_bundle(bundle, &namespace, &id);
    if containerd::is_in_usual_place(bundle, &namespace, &id) {
        return Ok(by_name);
    }
    let bundle = bundle.to_owned();
    let process = named.of(by_name).init();
    files.run(WaitsFor::Disk, &process, move || containerd::owner(&bundle, &namespace, &id)).await
}
