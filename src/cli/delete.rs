//! `delete`: takes away whatever a task left, with or without the daemon, within containerd's 5 s.
//!
//! containerd calls it after every Delete as well (then there is nothing left to do), and when the
//! connection of a task has ended: it has given the task up, and publishes the exit that is printed
//! here.

use std::path::{Path, PathBuf};

use protobuf::Message;
use ttrpc::Code;

use crate::api::{client, convert};
use crate::id::{Owner, TaskKey};
use crate::oci::command::CommandLine;
use crate::oci::{bundle, mount};
use crate::store::{Found, Store};
use crate::supervise::cleanup::{self, Stop, Troubles};
use crate::task::Task;
use crate::task::phase::Exit;
use crate::{cgroup, config, unit};

use super::arguments::Global;
use super::{Failure, block_on, key_of, print, say};

/// Killed: what a task that was given up ends with.
const KILLED: u32 = 128 + 9;

pub(super) fn run(global: &Global) -> Result<(), Failure> {
    let bundle = match global.bundle.as_str() {
        "" => std::env::current_dir()
            .map_err(|error| Failure(format!("can't read the working directory: {error}")))?,
        bundle => PathBuf::from(bundle),
    };
    let key = key_of(global, &bundle)?;
    let store = Store::new(config::STATE_DIR);
    let response = match recorded_as(&store, &key) {
        Some(found) => clean_up(&store, &found, &key),
        None => Ok(None),
    };
    unmount(&bundle);
    let response = match response? {
        Some(response) => response,
        None => convert::delete(0, Some(killed_now())).write_to_bytes().map_err(Failure::new)?,
    };
    print(&response)
}

/// The name under which this containerd's task is recorded, if it is. Earlier versions recorded the tasks of
/// every containerd as those of the usual one; another containerd's task is not touched.
fn recorded_as(store: &Store, key: &TaskKey) -> Option<TaskKey> {
    let is_own = |task: &Task| bundle::owner(&task.request.bundle, &key.namespace, &key.id) == key.owner;
    [key.clone(), key.of(Owner::default())].into_iter().filter(|found| store.knows(found)).find(|found| {
        match store.load(found) {
            Ok(Some(found)) => is_own(&found.task),
            // What can't be told is left to the daemon, or there is no task yet.
            Ok(None) | Err(_) => found == key,
        }
    })
}

fn clean_up(store: &Store, key: &TaskKey, named: &TaskKey) -> Result<Option<Vec<u8>>, Failure> {
    let asked =
        block_on(async { tokio::time::timeout(config::DELETE_LIMIT, client::clean_up(named)).await })?;
    let reason = match asked {
        Ok(Ok(response)) => return response.write_to_bytes().map(Some).map_err(Failure::new),
        // The daemon knows best: it is gone, or its record can't be read and is left for a person.
        Ok(Err(ttrpc::Error::RpcStatus(status))) if status.code() == Code::NOT_FOUND => return Ok(None),
        Err(_) => {
            // The daemon continues with it; doing the same at the same time would only disturb.
            say(&format!("task {key}: the daemon is still cleaning up"));
            return Ok(None);
        }
        Ok(Err(ttrpc::Error::RpcStatus(status))) if status.code() == Code::FAILED_PRECONDITION => {
            // Nothing of it runs, and the daemon keeps what it needs to try again: the bundle may go.
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
    let pid = task.init.pid().unwrap_or_default();
    let exit = task.init.exit().unwrap_or_else(killed_now);
    convert::delete(pid, Some(exit)).write_to_bytes().map(Some).map_err(Failure::new)
}

/// The daemon's own steps, but that a unit's end is not waited for: that takes a listener. What is left over is
/// said, and the record stays for the daemon to try again.
fn without_daemon(store: &Store, task: &Task) -> Result<(), Failure> {
    let mut troubles = Troubles::default();
    if let Some(cgroup) = task.cgroup() {
        troubles.add(cgroup::kill(cgroup));
    }
    let dir = store.dir(&task.key);
    let execs = task.execs.values().flat_map(|exec| std::iter::once(&exec.unit).chain(&exec.logger));
    let execs = std::future::ready(execs.cloned().collect());
    block_on(async {
        let manager = unit::manager::Manager::default();
        troubles.join(
            cleanup::remove_task(&manager, &CommandLine::default(), task, &dir, Stop::Killed, execs).await,
        );
    })?;
    if !troubles.is_empty() {
        return Err(Failure(format!("task {}: {}", task.key, troubles.text())));
    }
    store.remove(&task.key).map_err(Failure::new)
}

/// A rootfs in the host's mount namespace keeps containerd from removing the bundle.
fn unmount(bundle: &Path) {
    if let Err(error) = mount::unmount_all(&bundle.join("rootfs")) {
        say(&error.to_string());
    }
}

fn killed_now() -> Exit {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    Exit { status: KILLED, at_usec: u64::try_from(now.as_micros()).unwrap_or(u64::MAX) }
}
