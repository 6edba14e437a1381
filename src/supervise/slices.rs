//! Stops the slices of namespaces and pods that have become empty.
//!
//! systemd starts `containerd.slice` and `containerd-<namespace>.slice` for the first unit in them, and does not
//! stop them with the last one. The daemon starts `containerd-<namespace>-<pod>.slice`.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::Notify;

use crate::cgroup;
use crate::id::UnitName;
use crate::unit::systemd::Systemd;

/// How long an empty slice stays. Containers that are created one after the other would otherwise make it again each
/// time.
const LINGER: Duration = Duration::from_secs(1);

/// Background task: looks for empty slices once at the start, and after each deletion of a task. `is_used` says
/// whether a task is in a slice, also one whose unit does not exist yet. Never returns.
pub async fn run(
    manager: Arc<dyn Systemd>,
    deleted: Arc<Notify>,
    is_used: impl Fn(&UnitName) -> bool + Send + Sync,
) {
    loop {
        tokio::time::sleep(LINGER).await;
        if let Err(error) = stop_empty(&*manager, &is_used).await {
            tracing::warn!(%error, "can't stop an empty slice: {error}");
        }
        deleted.notified().await;
    }
}

async fn stop_empty(
    manager: &dyn Systemd,
    is_used: &(impl Fn(&UnitName) -> bool + Send + Sync),
) -> Result<(), crate::unit::error::Error> {
    let mut slices = manager.active_slices().await?;
    // Inner slices are stopped first: an outer slice is empty only after that.
    slices.sort_unstable_by_key(|slice| std::cmp::Reverse(slice.as_str().len()));
    for slice in slices {
        manager.stop_alone_if(&slice, &|| !is_used(&slice) && is_empty(&slice)).await?;
    }
    Ok(())
}

/// True if no unit has a cgroup in the slice.
fn is_empty(slice: &UnitName) -> bool {
    let dir = cgroup::dir(&slice.slice_cgroup());
    let Ok(entries) = std::fs::read_dir(dir) else {
        // systemd makes the cgroup of a slice with that of the first unit in it.
        return true;
    };
    let is_dir = |path: PathBuf| path.is_dir();
    !entries.flatten().any(|entry| is_dir(entry.path()))
}
