//! The cgroups in which the OCI runtime works.
//!
//! `create` works in the cgroup that the client names (ShimCgroup), or in one of its own in the daemon's slice: what the
//! runtime uses counts neither as the container's nor as the pod's, limits of either do not delay it, it does not die with
//! the daemon, and all of it can be killed. The unit's own cgroup is empty then, as it must be once controllers are enabled
//! in it.

use std::io;
use std::path::{Path, PathBuf};

use crate::cgroup;
use crate::id::UnitName;
use crate::task::Task;

use super::contract::LAUNCH_CGROUP;
use super::error::Error;

/// Where the OCI runtime creates the container of a unit.
///
/// # Errors
/// The daemon's own cgroup can't be read.
pub fn of(unit: &UnitName) -> Result<PathBuf, cgroup::Error> {
    Ok(all()?.join(unit.as_str()))
}

/// Where the commands run that the daemon starts itself.
///
/// # Errors
/// The daemon's own cgroup can't be read.
pub fn of_commands() -> Result<PathBuf, cgroup::Error> {
    Ok(all()?.join("commands"))
}

/// Beside the daemon's own cgroup, in its slice: `systemctl kill` of the service, which kills the whole cgroup of the
/// service, ends nothing in here.
fn all() -> Result<PathBuf, cgroup::Error> {
    let own = cgroup::of_self()?;
    Ok(own.parent().unwrap_or(&own).join("containerd-shim-runtime"))
}

/// Kills everything that `launch` and the OCI runtime have started to create a container, except the container.
pub fn kill(unit: &UnitName) {
    if let Err(error) = of(unit).and_then(|cgroup| cgroup::kill(&cgroup)) {
        tracing::warn!(%unit, %error, "{unit}: can't kill the processes that create its container: {error}");
    }
}

/// Removes the cgroup of a container that has been created. It stays if something that a hook has started runs in it.
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

/// Removes the cgroups whose last process has ended. Whoever is about to use one makes it again.
pub fn sweep() {
    let Ok(all) = all() else {
        return;
    };
    for cgroup in cgroup::children(&all).into_iter().chain([all]) {
        // One that is in use stays.
        let _ = cgroup::remove(&cgroup);
    }
}

/// In the unit: moves this process to where the OCI runtime works. For an exec that is the unit's own cgroup where the
/// client names none.
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
