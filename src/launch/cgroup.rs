//! The cgroups in which the OCI runtime works.
//!
//! `create` works in a cgroup of its own, in the daemon's slice or in the cgroup that the client names (ShimCgroup). So the
//! kernel does not charge the resources of the runtime to the container or the pod, and their limits do not delay it. The
//! runtime outlives the daemon, and the daemon can kill all its processes. The unit's own cgroup stays empty, because
//! controllers can be enabled only in an empty cgroup.

use std::io;
use std::path::{Path, PathBuf};

use crate::cgroup;
use crate::config::{COMMANDS_CGROUP, RUNTIME_CGROUP};
use crate::id::UnitName;
use crate::task::request::Runtime;

use super::contract::LAUNCH_CGROUP;
use super::error::Error;
use super::process::Process;

/// The cgroup in which the OCI runtime works for a unit whose task has no ShimCgroup: it creates the container there.
///
/// # Errors
/// The daemon's own cgroup can't be read.
pub fn of(unit: &UnitName) -> Result<PathBuf, cgroup::Error> {
    Ok(all()?.join(unit.as_str()))
}

/// The cgroup in which the OCI runtime works for a unit of a task: that of the container, or of an exec. It has one of its own in
/// the ShimCgroup, too: the client may have processes there, and other tasks may have the same ShimCgroup.
fn of_task(runtime: &Runtime, unit: &UnitName) -> Result<PathBuf, cgroup::Error> {
    match &runtime.cgroup {
        Some(shim_cgroup) => Ok(shim_cgroup.join(unit.as_str())),
        None => of(unit),
    }
}

/// The parent of the cgroups of the OCI runtime's commands that the daemon runs.
///
/// # Errors
/// The daemon's own cgroup can't be read.
pub fn of_commands() -> Result<PathBuf, cgroup::Error> {
    Ok(all()?.join(COMMANDS_CGROUP))
}

/// The cgroup of the processes that keep the descriptors of ended daemons open.
///
/// # Errors
/// The daemon's own cgroup can't be read.
pub fn of_guards() -> Result<PathBuf, cgroup::Error> {
    Ok(all()?.join("guards"))
}

/// The parent of the cgroups in which OCI runtimes work, in the daemon's slice. `systemctl kill` of the daemon's
/// service kills all processes in the cgroup of the service, but none below this parent.
fn all() -> Result<PathBuf, cgroup::Error> {
    Ok(beside(&cgroup::of_self()?))
}

/// The cgroup that contains the cgroups of all runtime commands. It is found from the cgroup of this process, which is the
/// daemon or runs in a unit of the shim.
pub fn beside(daemon: &Path) -> PathBuf {
    daemon.parent().unwrap_or(daemon).join(RUNTIME_CGROUP)
}

/// Kills all processes that start the process of a unit: `launch`, the OCI runtime and their children, but not the process.
pub async fn kill(runtime: &Runtime, unit: &UnitName) {
    let killed = async { cgroup::kill(&of_task(runtime, unit)?).await };
    if let Err(error) = killed.await {
        tracing::warn!(%unit, %error, "{unit}: can't kill the processes that start its process: {error}");
    }
}

/// Removes the cgroup in which the process of a unit was started, unless a process that a hook started still runs in it. Returns such
/// a cgroup if it is in a ShimCgroup, where [`sweep_blocking`] does not look.
pub async fn remove(runtime: &Runtime, unit: &UnitName) -> Option<PathBuf> {
    let removed = async { cgroup::remove(&of_task(runtime, unit)?).await };
    match removed.await {
        Ok(true) => None,
        Ok(false) => {
            tracing::debug!(%unit, "{unit}: a process that a hook or a mount helper started still runs");
            runtime.cgroup.as_ref().map(|shim_cgroup| shim_cgroup.join(unit.as_str()))
        }
        Err(error) => {
            tracing::warn!(%unit, %error, "{unit}: can't remove the cgroup in which its process was started: {error}");
            None
        }
    }
}

/// Removes the cgroups without processes in the daemon's slice. They are created again when they are needed. Must not run on the
/// async runtime.
pub fn sweep_blocking() {
    let Ok(all) = all() else {
        return;
    };
    let commands = of_commands().map(|cgroup| cgroup::children(&cgroup)).unwrap_or_default();
    for cgroup in commands.into_iter().chain(cgroup::children(&all)).chain([all]) {
        // Fails for a cgroup that is in use.
        let _ = cgroup::remove_blocking(&cgroup);
    }
}

/// In the unit: moves this process to the cgroup in which the OCI runtime works. For an exec, that is the unit's own cgroup
/// if the client names none.
pub(super) fn enter(process: &Process<'_>) -> Result<(), Error> {
    let task = process.task;
    let own =
        task.process(process.exec).map(|recorded| &recorded.unit).filter(|_| task.runtime.cgroup.is_some());
    let cgroup = match own {
        Some(unit) => Some(of_task(&task.runtime, unit)?),
        None => std::env::var_os(LAUNCH_CGROUP).map(PathBuf::from),
    };
    match cgroup {
        Some(cgroup) => Ok(cgroup::enter(&cgroup)?),
        None if process.exec.is_some() => Ok(()),
        None => Err(Error::System {
            action: "find the cgroup for the OCI runtime",
            source: io::ErrorKind::NotFound.into(),
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cgroup::fake;
    use crate::launch::fake::Launches;
    use crate::oci::options::OptionsSource;
    use crate::ops::CreateTask;
    use crate::services::Delivery;
    use crate::simulation::harness::World;
    use crate::store::Store;

    fn create_call(world: &World, shim_cgroup: &Path) -> CreateTask {
        let mut call = world.create_call();
        if let OptionsSource::Given(options) = &mut call.options {
            options.shim_cgroup = shim_cgroup.display().to_string();
        }
        call
    }

    #[test]
    fn each_unit_has_a_cgroup_of_its_own_in_the_shim_cgroup_and_only_this_one_is_killed() {
        let (world, shim_cgroup) = (World::new("shim-cgroup"), Path::new("/of-the-client"));
        let [of_container, of_exec] =
            [world.unit(), world.exec_unit()].map(|unit| shim_cgroup.join(unit.as_str()));
        let (call, exec_call) = (create_call(&world, shim_cgroup), world.exec_call());
        let (init, exec) = (world.init(), world.exec());
        let task = world
            .live(move |shim| async move {
                shim.create(call, Delivery::First).await.unwrap();
                shim.start(&init, Delivery::First).await.unwrap();
                shim.add_exec(exec_call, Delivery::First).await.unwrap();
                shim.tasks.process(&init).unwrap().0.task().clone()
            })
            .unwrap();
        let store = Store::new(world.state_dir());
        for id in [None, exec.exec.as_ref()] {
            enter(&Process::of(&store, &task, id).unwrap()).unwrap();
        }
        for cgroup in [&of_container, &of_exec] {
            assert!(cgroup::dir(cgroup).join("cgroup.procs").exists(), "{cgroup:?}");
        }
        assert!(!cgroup::dir(shim_cgroup).join("cgroup.procs").exists());
        world.launch.set(Launches::Fail("the OCI runtime fails".to_owned()));
        let started =
            world.live(move |shim| async move { shim.start(&exec, Delivery::First).await }).unwrap();
        started.unwrap_err();
        let killed = [shim_cgroup, &of_container, &of_exec].map(fake::is_to_be_killed);
        assert_eq!(killed, [false, false, true]);
        fake::remove(shim_cgroup);
    }

    #[test]
    fn what_a_failed_create_left_in_a_shim_cgroup_is_killed() {
        let (world, shim_cgroup) = (World::new("shim-cgroup-create"), Path::new("/of-another-client"));
        let of_container = shim_cgroup.join(world.unit().as_str());
        // The OCI runtime or a hook hangs there.
        fake::make(&of_container);
        world.launch.set(Launches::Fail("the OCI runtime fails".to_owned()));
        let call = create_call(&world, shim_cgroup);
        let created =
            world.live(move |shim| async move { shim.create(call, Delivery::First).await }).unwrap();
        created.unwrap_err();
        assert!(fake::is_to_be_killed(&of_container) && !fake::is_to_be_killed(shim_cgroup));
        fake::remove(shim_cgroup);
    }
}
