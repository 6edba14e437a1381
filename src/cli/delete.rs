//! `delete`: removes what is left of a task, with or without the daemon, within containerd's limit of 5 s.
//!
//! containerd calls it after every Delete, when nothing is left to do, and when the connection of a task has ended: then
//! containerd has given up the task, and publishes the exit that is printed here.

use std::path::{Path, PathBuf};

use protobuf::Message;
use ttrpc::Code;

use crate::api::{client, convert};
use crate::id::{Owner, TaskKey};
use crate::oci::command::CommandLine;
use crate::oci::{containerd, mount};
use crate::store::{Found, Store};
use crate::supervise::cleanup::{Removal, Stop, Troubles};
use crate::sys;
use crate::task::Task;
use crate::task::phase::Exit;
use crate::{cgroup, config, unit};

use super::arguments::Flags;
use super::{Failure, block_on, key_of, print, say};

/// The exit status of a task that containerd has given up: killed by SIGKILL.
const KILLED: u32 = 128 + 9;

pub(super) fn run(flags: &Flags) -> Result<(), Failure> {
    let bundle = match flags.bundle.as_str() {
        "" => std::env::current_dir()
            .map_err(|error| Failure(format!("can't read the working directory: {error}")))?,
        bundle => PathBuf::from(bundle),
    };
    let key = key_of(flags, &bundle)?;
    let store = Store::new(config::STATE_DIR);
    let response = match recorded_as(&store, &key) {
        Some(found) => clean_up(&store, &found, &key),
        None => Ok(None),
    };
    unmount(&bundle);
    let response = match response? {
        Some(response) => response,
        None => convert::delete(None, Some(killed_now())).write_to_bytes().map_err(Failure::new)?,
    };
    print(&response)
}

/// The key of this containerd's task in the record, if it has one. Earlier versions recorded the tasks of every containerd
/// as tasks of the usual one. The task of another containerd is not touched.
fn recorded_as(store: &Store, key: &TaskKey) -> Option<TaskKey> {
    let is_own = |task: &Task| containerd::owner(&task.request.bundle, &key.namespace, &key.id) == key.owner;
    [key.clone(), key.of(Owner::default())].into_iter().filter(|found| store.knows(found)).find(|found| {
        match store.load(found) {
            Ok(Some(found)) => is_own(&found.task),
            // If the record can't be read, the daemon decides. Otherwise there is no task.
            Ok(None) | Err(_) => found == key,
        }
    })
}

fn clean_up(store: &Store, key: &TaskKey, named: &TaskKey) -> Result<Option<Vec<u8>>, Failure> {
    let asked =
        block_on(async { tokio::time::timeout(config::DELETE_LIMIT, client::clean_up(named)).await })?;
    let reason = match asked {
        Ok(Ok(response)) => return response.write_to_bytes().map(Some).map_err(Failure::new),
        // The task does not exist, or its record can't be read and is left for the administrator.
        Ok(Err(ttrpc::Error::RpcStatus(status))) if status.code() == Code::NOT_FOUND => return Ok(None),
        Err(_) => {
            // The daemon continues. Doing the same work here would only interfere.
            say(&format!("task {key}: the daemon is still cleaning up"));
            return Ok(None);
        }
        Ok(Err(ttrpc::Error::RpcStatus(status))) if status.code() == Code::FAILED_PRECONDITION => {
            // No process is left, and the daemon can try again without the bundle: containerd may remove it.
            say(&format!("task {key}: {}", status.message()));
            return Ok(None);
        }
        Ok(Err(ttrpc::Error::RpcStatus(status))) => {
            return Err(Failure(format!("the daemon can't clean up: {}", status.message())));
        }
        Ok(Err(error)) => error.to_string(),
    };
    say(&format!("task {key}: the daemon can't clean up ({reason}), cleaning up without it"));
    let Some(Found { task, .. }) = store.load(key).map_err(Failure::new)? else {
        store.remove(key).map_err(Failure::new)?;
        return Ok(None);
    };
    without_daemon(store, &task)?;
    let pid = task.init.pid();
    let exit = task.init.exit().unwrap_or_else(killed_now);
    convert::delete(pid, Some(exit)).write_to_bytes().map(Some).map_err(Failure::new)
}

/// The same steps as in the daemon, but without waiting for the end of units, which would need a subscription. If a step
/// fails, the error is printed, and the record is kept so that the daemon can try again.
fn without_daemon(store: &Store, task: &Task) -> Result<(), Failure> {
    let mut troubles = Troubles::default();
    if let Some(cgroup) = task.cgroup() {
        troubles.add(cgroup::kill(cgroup));
    }
    let dir = store.dir(&task.key);
    let execs = task.execs.values().flat_map(|exec| std::iter::once(&exec.unit).chain(&exec.logger));
    let execs = std::future::ready(execs.cloned().collect());
    block_on(async {
        let (manager, oci) = (&unit::manager::Manager::default(), &CommandLine::default());
        troubles.join(Removal { manager, oci, task, dir: &dir, stop: Stop::Killed }.of_task(execs).await);
    })?;
    if !troubles.is_empty() {
        return Err(Failure(format!("task {}: {}", task.key, troubles.text())));
    }
    store.remove(&task.key).map_err(Failure::new)
}

/// Unmounts a rootfs in the host's mount namespace, without which containerd can't remove the bundle.
fn unmount(bundle: &Path) {
    if let Err(error) = mount::unmount_all(&bundle.join("rootfs")) {
        say(&error.to_string());
    }
}

fn killed_now() -> Exit {
    Exit { status: KILLED, at_usec: sys::now_usec() }
}
