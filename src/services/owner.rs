//! Finds the task that a caller means. Two containerds may use the same namespace and id.

use std::path::Path;
use std::sync::Arc;

use crate::id::{Owner, TaskKey};
use crate::oci::containerd;

use super::Entry;
use super::tasks::Tasks;

impl Tasks {
    /// The key of a containerd's own task with these names, whether the task exists or not.
    pub fn own(&self, named: &TaskKey, owner: &Owner) -> TaskKey {
        let own = named.of(owner.clone());
        if owner.is_usual() || self.registry.get(&own).is_some() {
            return own;
        }
        // Earlier versions recorded the tasks of every containerd as those of the usual one.
        let usual = named.of(Owner::default());
        let recorded = self.registry.get(&usual).filter(|entry| owner_of(entry) == *owner);
        if recorded.is_some() { usual } else { own }
    }

    /// As [`Self::own`], for a caller of which only the bundle that it names is known.
    pub fn own_by_bundle(&self, named: &TaskKey, bundle: &Path) -> TaskKey {
        self.own(named, &containerd::owner(bundle, &named.namespace, &named.id))
    }

    /// The key of the task with these names, for an unknown caller: the task of the usual containerd, or the only such task.
    pub fn any(&self, named: &TaskKey) -> TaskKey {
        if self.registry.get(named).is_some() {
            return named.clone();
        }
        match &self.registry.namesakes(named)[..] {
            [only] => only.key.clone(),
            _ => named.clone(),
        }
    }

    /// True if the task is that containerd's own.
    pub(crate) fn is_own(entry: &Arc<Entry>, owner: &Owner) -> bool {
        let recorded = &entry.key.owner;
        if recorded.is_usual() { owner_of(entry) == *owner } else { recorded == owner }
    }
}

fn owner_of(entry: &Entry) -> Owner {
    let bundle = entry.task().request.bundle.clone();
    containerd::owner(&bundle, &entry.key.namespace, &entry.key.id)
}
