//! The process behind a pid. A pidfd shows whether its process has ended. After that, another process may get the pid.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::task::{Placement, Task};
use crate::{cgroup, config, sys};

use super::{Entry, Error, Process};

/// Opens a pidfd of a process. If the process does not exist any more, it has ended, and systemd reports how.
pub(crate) fn hold(entry: &Entry, process: &Process, pid: u32) {
    let held = sys::pidfd_open(pid).ok();
    // Checked after pidfd_open: if another process has the pid by now, the pidfd is dropped. A process whose cgroup can't be read
    // (its path may be too long) is not another one.
    let held = held.filter(|_| !has_ended(&entry.task(), pid));
    process.live().process = held.map(Arc::new);
}

/// Resolves when a task's init process has ended, and the command of the OCI runtime has had time to end as well. Never
/// resolves if the process can't be watched: the caller has a time limit, too.
pub(crate) async fn init_is_gone(entry: &Entry) {
    init_has_ended(entry).await;
    tokio::time::sleep(config::AFTER_INIT_LIMIT).await;
}

/// Resolves once init has ended: no other process of the container starts any more. Never resolves if init can't be watched.
pub(crate) async fn init_has_ended(entry: &Entry) {
    let held = entry.init.live().process.as_ref().and_then(|process| process.try_clone().ok());
    let ended = async { sys::ended(held.ok_or(std::io::ErrorKind::NotFound)?).await };
    if ended.await.is_err() {
        std::future::pending::<()>().await;
    }
}

/// Resolves when what is under way for a task must end: containerd has given the task up, or a client interrupts a checkpoint or
/// a restore. Returns the error for the interrupted call.
pub(crate) async fn cancelled(entry: &Entry) -> Error {
    let (given_up, interrupted) = {
        let live = entry.init.live();
        (live.attempt.given_up.clone(), live.attempt.interrupted.clone())
    };
    let process = entry.init.key.clone();
    tokio::select! {
        () = given_up.cancelled() => Error::GivenUp { process },
        () = interrupted.cancelled() => Error::Interrupted { process },
    }
}

/// True if a process is in the cgroup of the task. Otherwise another process has got the pid.
pub(crate) fn lives_in(task: &Task, pid: u32) -> bool {
    cgroup::of_process(pid).is_ok_and(|found| is_place_of(task, &found))
}

/// True if a process of the task has ended: no process has its pid any more, or one outside of the task. False if that can't be
/// found out.
pub(crate) fn has_ended(task: &Task, pid: u32) -> bool {
    match cgroup::of_process(pid) {
        Ok(found) => !is_place_of(task, &found),
        Err(error) => error.is_gone(),
    }
}

/// True if processes of the task are in this cgroup.
fn is_place_of(task: &Task, found: &Path) -> bool {
    match (task.cgroup(), &task.placement) {
        (Some(container), _) => found.starts_with(container),
        // Create has not noted it yet.
        (None, Placement::Unit { .. }) => found.iter().any(|part| part == task.unit().as_str()),
        (None, Placement::Foreign { path, .. }) => {
            let path: Vec<_> = path.iter().skip(1).collect();
            found.iter().collect::<Vec<_>>().ends_with(&path)
        }
    }
}

/// The cgroup of a new container whose init process is in `found`. `None` if that is not in the place of the task. crun can move
/// init to a cgroup below that of the container (`run.oci.delegate-cgroup`).
pub(crate) fn container_cgroup(task: &Task, found: PathBuf) -> Option<PathBuf> {
    let Placement::Unit { child, .. } = &task.placement else {
        return is_place_of(task, &found).then_some(found);
    };
    let is_container = |path: &&Path| path.ends_with(Path::new(task.unit().as_str()).join(child));
    found.ancestors().find(is_container).map(Path::to_owned)
}

/// Reads a PID file.
pub(crate) fn read_pid(path: &Path) -> Option<u32> {
    fs::read_to_string(path).ok()?.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::services::Delivery;
    use crate::simulation::harness::{Step, World};

    #[test]
    fn the_cgroup_of_a_container_is_the_child_of_its_unit() {
        let world = World::new("container-cgroup");
        world.take(&[Step::Create], Delivery::First).unwrap().unwrap();
        let init = world.init();
        let task = world.live(move |shim| async move { shim.tasks.process(&init).unwrap().0.task().clone() });
        let task = task.unwrap();
        let own = task.placement.cgroup(task.unit());
        let of = |path: PathBuf| container_cgroup(&task, path);
        assert_eq!(of(own.clone()), Some(own.clone()));
        assert_eq!(of(own.join("delegated/more")), Some(own.clone()));
        let outer = Path::new("/machine.slice").join(own.strip_prefix("/").unwrap());
        assert_eq!(of(outer.join("delegated")), Some(outer));
        let unit = own.parent().unwrap();
        for other in [unit.to_owned(), unit.join("other"), unit.join("other").join(own.file_name().unwrap())]
        {
            assert_eq!(of(other), None);
        }
    }
}
