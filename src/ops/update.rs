//! Update: changes the limits of a container, in its cgroup and on its unit.

use std::path::Path;
use std::sync::Arc;

use serde_json::Value;

use crate::cgroup::limits as files;
use crate::fault::{self, Point};
use crate::id::TaskKey;
use crate::oci::resources::Resources;
use crate::oci::{self, runtime};
use crate::services::process::init_is_gone;
use crate::services::{Delivery, Error, WaitsFor, waiting};
use crate::supervise::limits::read;
use crate::task::lifecycle::Refusal;
use crate::task::limits::{Attribute, Limits};

use super::Shim;
use super::new_task::check_resources;

/// The file in the directory of a task that has the resources of the current Update.
const RESOURCES: &str = "resources.json";
/// The file that has the limits of the container before the Update.
const BEFORE: &str = "limits-before.json";

impl Shim {
    /// Changes the limits of a container. `resources` is an OCI `LinuxResources` in JSON. Limits that it does not name are
    /// unchanged.
    ///
    /// # Errors
    /// The resources are invalid, the container has ended, or the OCI runtime fails. The container keeps its limits.
    pub async fn update(
        self: &Arc<Self>,
        key: &TaskKey,
        resources: Vec<u8>,
        delivery: Delivery,
    ) -> Result<(), Error> {
        let resources = oci::resources::canonical(&resources)?;
        let Named { limits: named, burst } = check(resources.as_bytes())?;
        let entry = self.tasks.created(key)?;
        let _verb = entry.init.verb.lock().await;
        let _limits = entry.limits.lock().await;
        let task = entry.task().clone();
        if !task.init.is_alive() {
            return Err(Error::Refused(Refusal { verb: "update", phase: task.init.word() }));
        }
        let Some(cgroup) = task.cgroup().map(Path::to_owned) else {
            return Err(Error::UnknownTask { key: key.clone() });
        };
        let before = self.limits_before(key, &cgroup, delivery).await?;
        let dir = self.store.dir(key);
        let path = self.store.write_scratch(key, RESOURCES, resources.as_bytes())?;
        let cli = runtime::Cli::of(&task, &dir);
        let updated = tokio::select! {
            updated = self.oci.update(&cli, &path) => updated.map_err(Error::from),
            () = init_is_gone(&entry) => Err(Error::InitGone { key: key.clone() }),
        };
        fault::point(Point::UpdateDone);
        let after = read(&cgroup).await?;
        // The OCI runtime also resets limits that the Update does not name and that an administrator has changed.
        let new = if updated.is_ok() { after.only(&named) } else { Limits::default() };
        let back = before.without(&new).differing_from(&after);
        if !back.is_empty() {
            waiting(WaitsFor::Limits, key, move || files::write(&cgroup, &back)).await??;
        }
        // The unit has the container's quota only while the container has no burst.
        let has_quota = burst && updated.is_ok();
        let new = if has_quota { new.over(&before.only(&[Attribute::CpuMax])) } else { new };
        let limits = self.cgroups.show_new_limits(&task, &new).await?;
        if task.init.phase.is_paused() {
            let mut live = entry.init.live();
            live.cgroup.unshown = new.over(&live.cgroup.unshown);
        }
        fault::point(Point::UpdateShown);
        self.cgroups.note_limits(&entry, limits)?;
        self.store.remove_scratch(key, &[RESOURCES, BEFORE])?;
        updated
    }

    /// The limits of a container before an Update. For a replayed Update, the limits before its first attempt.
    async fn limits_before(&self, key: &TaskKey, cgroup: &Path, delivery: Delivery) -> Result<Limits, Error> {
        let kept = if delivery == Delivery::Replayed { self.store.read_scratch(key, BEFORE)? } else { None };
        if let Some(before) = kept {
            return Ok(before);
        }
        let before = read(cgroup).await?;
        self.store.write_note(key, BEFORE, &before)?;
        Ok(before)
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

/// What a client names.
#[derive(Debug, PartialEq)]
struct Named {
    limits: Vec<Attribute>,
    /// The CPU time that may be saved up, which no property shows.
    burst: bool,
}

/// What a client names, checked.
fn check(text: &[u8]) -> Result<Named, Error> {
    let mut resources = Resources::parse(text)?;
    // No OCI runtime can change these after Create.
    resources.devices.clear();
    resources.hugepage_limits.clear();
    resources.block_io.throttles.clear();
    resources.rdma = false;
    check_resources(&resources)?;
    Ok(named(&serde_json::from_slice(text).map_err(oci::resources::Error::Malformed)?))
}

/// What a client names.
fn named(resources: &Value) -> Named {
    let has = |field: &str| resources.pointer(field).is_some_and(|value| !value.is_null());
    let fields = FIELDS.iter().filter(|(field, _)| has(field));
    let fields = fields.flat_map(|(_, attributes)| attributes.iter().copied());
    let unified = |attribute: &Attribute| resources["unified"].get(attribute.file()).is_some();
    let burst = has("/cpu/burst") || resources["unified"].get(files::CPU_BURST).is_some();
    Named { limits: fields.chain(Attribute::ALL.into_iter().filter(unified)).collect(), burst }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::simulation::harness::{Step, World};

    #[test]
    fn limits_that_are_put_back_wait_for_the_kernel_in_threads_of_their_own() {
        let world = World::new("put-back");
        world.take(&[Step::Create, Step::Start], Delivery::First).unwrap().unwrap();
        let key = world.task.clone();
        let (refused, updated) = world
            .live(move |shim| async move {
                let before: Limits = [(Attribute::MemoryMax, "4096".to_owned())].into_iter().collect();
                shim.store.write_note(&key, BEFORE, &before).unwrap();
                let turns = WaitsFor::Limits.all_turns(&key).await;
                let update = || shim.update(&key, b"{}".to_vec(), Delivery::Replayed);
                let refused = update().await;
                drop(turns);
                (refused, update().await)
            })
            .unwrap();
        assert!(matches!(refused, Err(Error::ManyWait { .. })), "{refused:?}");
        assert!(updated.is_ok(), "{updated:?}");
    }

    #[test]
    fn an_update_names_only_the_fields_of_the_client() {
        let resources = serde_json::json!({
            "memory": {"limit": 1, "swap": null},
            "cpu": {},
            "unified": {"memory.high": "5", "cpu.max.burst": "7"},
        });
        let limits = vec![Attribute::MemoryMax, Attribute::MemorySwapMax, Attribute::MemoryHigh];
        assert_eq!(named(&resources), Named { limits, burst: true });
        assert_eq!(named(&Value::Null), Named { limits: Vec::new(), burst: false });
        assert!(named(&serde_json::json!({"cpu": {"burst": 0}})).burst);
    }
}
