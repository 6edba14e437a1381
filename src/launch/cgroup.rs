//! The cgroups in which the OCI runtime works.
//!
//! `create` works in the cgroup that the client names (ShimCgroup), or in a cgroup of its own in the daemon's slice. So the
//! kernel does not charge the resources of the runtime to the container or the pod, and their limits do not delay it. The
//! runtime outlives the daemon, and the daemon can kill all its processes. The unit's own cgroup stays empty, because
//! controllers can be enabled only in an empty cgroup.

use std::io;
use std::path::{Path, PathBuf};

use crate::cgroup;
use crate::id::UnitName;
use crate::task::Task;

use super::contract::LAUNCH_CGROUP;
use super::error::Error;

/// The cgroup in which the OCI runtime creates the container of a unit.
///
/// # Errors
/// The daemon's own cgroup can't be read.
pub fn of(unit: &UnitName) -> Result<PathBuf, cgroup::Error> {
    Ok(all()?.join(unit.as_str()))
}

/// The parent of the cgroups of the OCI runtime's commands that the daemon runs.
///
/// # Errors
/// The daemon's own cgroup can't be read.
pub fn of_commands() -> Result<PathBuf, cgroup::Error> {
    Ok(all()?.join("commands"))
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
    daemon.parent().unwrap_or(daemon).join("containerd-shim-runtime")
}

/// Kills all processes that create a container: `launch`, the OCI runtime and their children, but not the container.
pub fn kill(unit: &UnitName) {
    if let Err(error) = of(unit).and_then(|cgroup| cgroup::kill(&cgroup)) {
        tracing::warn!(%unit, %error, "{unit}: can't kill the processes that create its container: {error}");
    }
}

/// Removes the cgroup in which a container was created, unless a process that a hook started still runs in it.
pub fn remove(unit: &UnitName) {
    match of(unit).and_then(|cgroup| cgroup::remove(&cgroup)) {
        Ok(true) => {}
        Ok(false) => {
            tracing::debug!(%unit, "{unit}: a process that a hook or a mount helper started still runs");
        }
        Err(error) => {
            tracing::warn!(%unit, %error, "{unit}: can't remove the cgroup in which its container was created: {error}");
        }
    }
}

/// Removes the cgroups without processes. They are created again when they are needed.
pub fn sweep() {
    let Ok(all) = all() else {
        return;
    };
    let commands = of_commands().map(|cgroup| cgroup::children(&cgroup)).unwrap_or_default();
    for cgroup in commands.into_iter().chain(cgroup::children(&all)).chain([all]) {
        // Fails for a cgroup that is in use.
        let _ = cgroup::remove(&cgroup);
    }
}

/// In the unit: moves this process to the cgroup in which the OCI runtime works. For an exec, that is the unit's own cgroup
/// if the client names none.
pub(super) fn enter(task: &Task, is_exec: bool) -> Result<(), Error> {
    let from_daemon = || std::env::var_os(LAUNCH_CGROUP).map(PathBuf::from);
    match task.runtime.cgroup.clone().or_else(from_daemon) {
        Some(cgroup) => Ok(cgroup::enter(Path::new(&cgroup))?),
        None if is_exec => Ok(()),
        None => Err(Error::System {
            action: "find the cgroup for the OCI runtime",
            source: io::ErrorKind::NotFound.into(),
        }),
    }
}
