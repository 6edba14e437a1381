//! Update: other limits for a container, in its cgroup and on its unit.

use std::sync::Arc;

use serde_json::Value;

use crate::cgroup::limits as files;
use crate::fault::{self, Point};
use crate::id::TaskKey;
use crate::oci::resources::Resources;
use crate::oci::{self, runtime};
use crate::task::limits::{Attribute, Limits};
use crate::task::phase::Refusal;

use super::cgroups::is_paused;
use super::create::check_resources;
use super::{Error, Shim, blocking};

/// The file in a task's directory with the resources of an Update under way.
const RESOURCES: &str = "resources.json";

impl Shim {
    /// Gives a container other limits: OCI `LinuxResources`, in JSON. What they don't name stays as it is.
    ///
    /// # Errors
    /// They are wrong, the container has ended, or the OCI runtime fails; then it has the limits that it had.
    pub async fn update(self: &Arc<Self>, key: &TaskKey, resources: Vec<u8>) -> Result<(), Error> {
        let named = check(&resources)?;
        let entry = self.created(key)?;
        let _verb = entry.init.verb.lock().await;
        let _limits = entry.limits.lock().await;
        let task = entry.task().clone();
        if !task.init.is_alive() {
            return Err(Error::Refused(Refusal { verb: "update", phase: task.init.word() }));
        }
        let before = self.limits_of(&task.cgroup).await?;
        let dir = self.store.dir(key);
        let path = self.store.write_aside(key, RESOURCES, &resources)?;
        let cli = runtime::Cli { runtime: &task.runtime, id: &key.id, dir: &dir };
        let updated = cli.update(&path).await;
        fault::point(Point::UpdateDone);
        let after = self.limits_of(&task.cgroup).await?;
        let changed = after.differing_from(&before);
        // The OCI runtime sets all that it knows, also what an administrator has changed since.
        let new = if updated.is_ok() { changed.only(&named) } else { Limits::default() };
        self.restore(&task.cgroup, &before, &changed.without(&new)).await?;
        // It is of no use any more.
        let _ = tokio::fs::remove_file(&path).await;
        updated?;
        let limits = self.show_new_limits(&task, &new).await?;
        if is_paused(&task) {
            let mut live = entry.init.live();
            live.unshown = new.over(&live.unshown);
        }
        fault::point(Point::UpdateShown);
        self.change(&entry, |task| {
            task.limits = limits;
            Ok(Vec::new())
        })
    }

    async fn limits_of(&self, cgroup: &Option<std::path::PathBuf>) -> Result<Limits, Error> {
        match cgroup.clone() {
            Some(cgroup) => Ok(blocking(move || files::read(&cgroup)).await??),
            None => Ok(Limits::default()),
        }
    }
}

impl Shim {
    /// Gives back what an update has changed beyond its words.
    async fn restore(
        &self,
        cgroup: &Option<std::path::PathBuf>,
        before: &Limits,
        changed: &Limits,
    ) -> Result<(), Error> {
        let back: Limits = before
            .iter()
            .filter(|(attribute, _)| changed.get(*attribute).is_some())
            .map(|(attribute, value)| (attribute, value.to_owned()))
            .collect();
        match cgroup.clone() {
            Some(cgroup) if !back.is_empty() => Ok(blocking(move || files::write(&cgroup, &back)).await??),
            Some(_) | None => Ok(()),
        }
    }
}

/// The fields of `LinuxResources` and the files that they change (opencontainers/cgroups, fs2).
const FIELDS: [(&str, &[Attribute]); 16] = [
    ("/memory/limit", &[Attribute::MemoryMax, Attribute::MemorySwapMax]),
    ("/memory/swap", &[Attribute::MemorySwapMax]),
    ("/memory/reservation", &[Attribute::MemoryLow]),
    ("/cpu/shares", &[Attribute::CpuWeight]),
    ("/cpu/idle", &[Attribute::CpuIdle, Attribute::CpuWeight]),
    ("/cpu/quota", &[Attribute::CpuMax]),
    ("/cpu/period", &[Attribute::CpuMax]),
    ("/cpu/cpus", &[Attribute::Cpus]),
    ("/cpu/mems", &[Attribute::MemoryNodes]),
    ("/pids/limit", &[Attribute::Pids]),
    ("/blockIO/weight", &[Attribute::IoWeight]),
    ("/blockIO/weightDevice", &[Attribute::IoWeight]),
    ("/blockIO/throttleReadBpsDevice", &[Attribute::IoMax]),
    ("/blockIO/throttleWriteBpsDevice", &[Attribute::IoMax]),
    ("/blockIO/throttleReadIOPSDevice", &[Attribute::IoMax]),
    ("/blockIO/throttleWriteIOPSDevice", &[Attribute::IoMax]),
];

/// The limits that a client names, if they can be set.
fn check(text: &[u8]) -> Result<Vec<Attribute>, Error> {
    let mut resources = Resources::parse(text)?;
    // No OCI runtime changes these afterwards.
    resources.devices.clear();
    resources.hugepage_limits.clear();
    resources.block_io.throttles.clear();
    resources.rdma = false;
    check_resources(&resources)?;
    Ok(named(&serde_json::from_slice(text).map_err(oci::resources::Error::Malformed)?))
}

/// The limits that a client names.
fn named(resources: &Value) -> Vec<Attribute> {
    let fields =
        FIELDS.iter().filter(|(field, _)| resources.pointer(field).is_some_and(|value| !value.is_null()));
    let fields = fields.flat_map(|(_, attributes)| attributes.iter().copied());
    let unified = |attribute: &Attribute| resources["unified"].get(attribute.file()).is_some();
    fields.chain(Attribute::ALL.into_iter().filter(unified)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_a_client_names_is_named() {
        let resources = serde_json::json!({
            "memory": {"limit": 1, "swap": null},
            "cpu": {},
            "unified": {"memory.high": "5"},
        });
        assert_eq!(
            named(&resources),
            [Attribute::MemoryMax, Attribute::MemorySwapMax, Attribute::MemoryHigh]
        );
        assert!(named(&Value::Null).is_empty());
    }
}
