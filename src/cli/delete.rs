//! `delete`: removes what is left of a task, with or without the daemon, within containerd's limit of 5 s.
//!
//! containerd calls `delete` in two cases: after every Delete, when nothing is left to do, and after the connection
//! of a task has ended. In the second case containerd has given up the task, and publishes the exit that this command
//! prints.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use containerd_shim_protos::api::DeleteResponse;
use protobuf::Message;
use ttrpc::Code;

use crate::api::{client, convert};
use crate::id::{Owner, ProcessKey, TaskKey};
use crate::oci::command::CommandLine;
use crate::oci::{containerd, mount};
use crate::services::files::SlowFiles;
use crate::services::own_unit::OwnUnit;
use crate::services::runtime_files::RuntimeFiles;
use crate::store::{self, Cause, Found, Store};
use crate::supervise::removal::{Removal, Stop, Troubles};
use crate::sys;
use crate::task::Task;
use crate::task::lifecycle::Exit;
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
    let response = match recorded_as(&store, &key, &bundle)? {
        Some(found) => clean_up(&store, &found, &key)?,
        None => None,
    };
    // Not after an error: the container may run.
    unmount(&bundle);
    let response = match response {
        Some(response) => response,
        None => convert::delete(None, Some(killed_now())).write_to_bytes().map_err(Failure::new)?,
    };
    print(&response)
}

/// The key of this containerd's task in the record, if it has one. Earlier versions recorded the tasks of every containerd
/// as tasks of the usual one. The task of another containerd is not touched.
///
/// # Errors
/// The task has another bundle than the caller names, a record that can't be read may be that of the task, or the caller may not
/// read records.
fn recorded_as(store: &Store, key: &TaskKey, bundle: &Path) -> Result<Option<TaskKey>, Failure> {
    let mut undecided = None;
    for found in [key.clone(), key.of(Owner::default())] {
        if !store.knows(&found).map_err(Failure::new)? {
            continue;
        }
        match store.load(&found) {
            Ok(Some(Found { task, .. })) => {
                let recorded = &task.request.bundle;
                if containerd::owner(recorded, &key.namespace, &key.id) == key.owner {
                    check_bundle(&found, recorded, bundle)?;
                    return Ok(Some(found));
                }
            }
            // If the record can't be read, the daemon decides. Otherwise there is no task.
            Ok(None) | Err(_) if found == *key => undecided = Some(found),
            Ok(None) | Err(_) => {}
        }
    }
    Ok(recorded_with(store, key, bundle)?.or(undecided))
}

/// The key of the task with another owner that has this bundle, if there is one. The daemon takes the owner of a pod's sandbox
/// as the owner of the pod's containers, and containerd keeps the bundles of the two in different directories.
///
/// # Errors
/// A record that can't be read may be that of the task.
fn recorded_with(store: &Store, key: &TaskKey, bundle: &Path) -> Result<Option<TaskKey>, Failure> {
    let mut unreadable = Ok(None);
    for found in store.namesakes(key).map_err(Failure::new)? {
        match store.load(&found) {
            Ok(Some(Found { task, .. })) if is_bundle(&task.request.bundle, bundle) => {
                return Ok(Some(found));
            }
            Ok(Some(_)) => {}
            Ok(None) | Err(_) => {
                if let Err(failure) = check_record(store, &found) {
                    unreadable = Err(failure);
                }
            }
        }
    }
    unreadable
}

/// Checks that the bundle that the caller names is that of the task: containerd always names it, a person may name another one
/// while the task runs.
fn check_bundle(key: &TaskKey, recorded: &Path, named: &Path) -> Result<(), Failure> {
    if is_bundle(recorded, named) {
        return Ok(());
    }
    let (recorded, named) = (recorded.display(), named.display());
    Err(Failure(format!("task {key} has the bundle {recorded}, not {named}, so nothing was removed")))
}

/// True if both paths are those of the same bundle.
fn is_bundle(recorded: &Path, named: &Path) -> bool {
    // The same path needs no look at a disk that may not answer.
    recorded == named || is_same_directory(recorded, named)
}

/// True if both paths lead to the same directory. Somebody may have removed the directory: then true if both paths lead to the
/// same name in the same parent.
fn is_same_directory(recorded: &Path, named: &Path) -> bool {
    let inode = |path: &Path| std::fs::metadata(path).map(|found| (found.dev(), found.ino())).ok();
    match inode(recorded) {
        Some(recorded) => inode(named) == Some(recorded),
        None => {
            let parent = |path: &Path| path.parent().and_then(|parent| parent.canonicalize().ok());
            recorded.file_name() == named.file_name()
                && parent(recorded).is_some_and(|recorded| parent(named) == Some(recorded))
        }
    }
}

/// What the daemon answers to the request to clean up.
#[derive(Debug, PartialEq)]
enum Answer {
    Done(DeleteResponse),
    /// The task does not exist, or its record can't be read.
    Nothing,
    /// The daemon cleans up later, also if it ends meanwhile: the record says that the task is given up. The daemon does not
    /// need the bundle, which containerd may remove. The same work in this process would only interfere.
    Later(String),
    /// The daemon does not clean up.
    Refused(String),
    /// There is no daemon.
    NoDaemon(String),
}

impl Answer {
    /// `None`: the daemon has not answered in time. `is_given_up`: whether the record says that the task is given up.
    fn of(answer: Option<Result<DeleteResponse, client::Error>>, is_given_up: impl FnOnce() -> bool) -> Self {
        match answer {
            None if is_given_up() => Self::Later("the daemon is still cleaning up".to_owned()),
            // containerd keeps the bundle, and runs this command again when it starts.
            None => Self::Refused("it does not answer".to_owned()),
            Some(Ok(response)) => Self::Done(response),
            Some(Err(client::Error::Refused(status))) => match status.code() {
                Code::NOT_FOUND => Self::Nothing,
                // No process is left, and the daemon tries again.
                Code::FAILED_PRECONDITION => Self::Later(status.message),
                _ => Self::Refused(status.message),
            },
            Some(Err(client::Error::NoDaemon(error))) => Self::NoDaemon(error.to_string()),
        }
    }
}

/// Removes the task whose record has this key. `caller`: the key by the bundle that the caller names.
fn clean_up(store: &Store, key: &TaskKey, caller: &TaskKey) -> Result<Option<Vec<u8>>, Failure> {
    // Only the bundle says which containerd has a task that an earlier version recorded.
    let named = if key.owner.is_usual() { caller } else { key };
    let asked =
        block_on(async { tokio::time::timeout(config::DELETE_LIMIT, client::clean_up(named)).await })?;
    let reason = match Answer::of(asked.ok(), || is_given_up(store, key)) {
        Answer::Done(response) => return response.write_to_bytes().map(Some).map_err(Failure::new),
        Answer::Nothing => return check_record(store, key).map(|()| None),
        Answer::Later(reason) => {
            say(&format!("task {key}: {reason}"));
            return Ok(None);
        }
        Answer::Refused(reason) => return Err(Failure(format!("the daemon can't clean up: {reason}"))),
        Answer::NoDaemon(reason) => reason,
    };
    say(&format!("task {key}: the daemon can't clean up ({reason}), cleaning up without it"));
    let Some(Found { task, .. }) = store.load(key).map_err(Failure::new)? else {
        store.remove(key).map_err(Failure::new)?;
        return Ok(None);
    };
    // The next daemon removes what can't be removed now.
    if let Err(error) = give_up(store, &task) {
        say(&error.to_string());
    }
    without_daemon(store, &task)?;
    let pid = task.init.pid();
    let exit = task.init.exit().unwrap_or_else(killed_now);
    convert::delete(pid, Some(exit)).write_to_bytes().map(Some).map_err(Failure::new)
}

/// Checks that a task that the daemon does not have has no record that can't be read or was moved aside. Such a record is left for
/// the administrator: its container may run, so its end must not be reported.
fn check_record(store: &Store, key: &TaskKey) -> Result<(), Failure> {
    store.check(key).map_err(|error| Failure(format!("task {key}: its container may run, but {error}")))
}

/// True if the record says that the task is given up, or there is no record any more.
fn is_given_up(store: &Store, key: &TaskKey) -> bool {
    matches!(store.load(key), Ok(None | Some(Found { task: Task { given_up: true, .. }, .. })))
}

/// Records that the task is given up, as the daemon does.
fn give_up(store: &Store, task: &Task) -> Result<(), store::Error> {
    let mut task = task.clone();
    task.give_up();
    store.save_whole(&task, Cause::Observation)
}

/// The same steps as in the daemon, but without waiting for the end of units, which would need a subscription. If a step
/// fails, the error is printed, and the record is kept so that the daemon can try again.
fn without_daemon(store: &Store, task: &Task) -> Result<(), Failure> {
    let mut troubles = Troubles::default();
    if let Some(cgroup) = task.cgroup() {
        troubles.add(cgroup::kill_blocking(cgroup));
    }
    let dir = store.dir(&task.key);
    let execs = std::future::ready(units_of_execs(store, task));
    block_on(async {
        let manager = &unit::manager::Manager::connected().await.map_err(Failure::new)?;
        let oci = &CommandLine::default();
        let files = &SlowFiles::new(config::FILES_LIMIT);
        let runtime_files = &RuntimeFiles::new(config::RUNTIME_FILES_LIMIT);
        let removal = Removal { manager, oci, files, runtime_files, task, dir: &dir, stop: Stop::Killed };
        troubles.join(removal.of_task(execs).await);
        Ok(())
    })??;
    if !troubles.is_empty() {
        return Err(Failure(format!("task {}: {}", task.key, troubles.text())));
    }
    store.remove(&task.key).map_err(Failure::new)
}

/// The units of the execs of a task, and of their loggers.
fn units_of_execs(store: &Store, task: &Task) -> Vec<OwnUnit> {
    let units = task.execs.iter().flat_map(|(id, exec)| {
        let key = ProcessKey { task: task.key.clone(), exec: Some(id.clone()) };
        let (dir, logger) = (store.process_dir(&key), OwnUnit::recorded_logger(key.clone(), exec));
        [Some(OwnUnit::recorded(key, exec, dir)), logger]
    });
    units.flatten().collect()
}

/// Unmounts a rootfs in the host's mount namespace. While the rootfs is mounted, containerd can't remove the bundle.
fn unmount(bundle: &Path) {
    if let Err(error) = mount::unmount_all(&bundle.join("rootfs")) {
        say(&error.to_string());
    }
}

fn killed_now() -> Exit {
    Exit { status: KILLED, at_usec: sys::now_usec() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::services::Delivery;
    use crate::simulation::harness::{Step, World};

    #[test]
    fn an_error_of_the_daemon_is_not_reported_as_an_unfinished_cleanup() {
        let of = |answer| Answer::of(answer, || true);
        let refused = |code| Some(Err(client::Error::Refused(ttrpc::get_status(code, "the reason"))));
        assert_eq!(of(refused(Code::NOT_FOUND)), Answer::Nothing);
        assert_eq!(of(refused(Code::FAILED_PRECONDITION)), Answer::Later("the reason".to_owned()));
        for code in [Code::INTERNAL, Code::UNKNOWN, Code::INVALID_ARGUMENT, Code::UNAVAILABLE] {
            assert_eq!(of(refused(code)), Answer::Refused("the reason".to_owned()));
        }
        let no_daemon = of(Some(Err(client::Error::NoDaemon(ttrpc::Error::Socket("refused".to_owned())))));
        assert!(matches!(no_daemon, Answer::NoDaemon(_)), "{no_daemon:?}");
    }

    #[test]
    fn a_task_is_not_removed_for_another_bundle() {
        let world = World::new("delete-bundle");
        world.take(&[Step::Create, Step::Start], Delivery::First).unwrap().unwrap();
        let (store, key) = (Store::new(world.state_dir()), world.task.clone());
        let bundle = store.load(&key).unwrap().unwrap().task.request.bundle;
        let other = tempfile::tempdir().unwrap();
        for wrong in [other.path(), Path::new("/no/such/bundle"), &bundle.join("..")] {
            let Failure(error) = check_bundle(&key, &bundle, wrong).unwrap_err();
            assert!(error.contains(&bundle.display().to_string()), "{error}");
        }
        let link = other.path().join("link");
        std::os::unix::fs::symlink(&bundle, &link).unwrap();
        for right in [&bundle, &link, &bundle.join(".")] {
            check_bundle(&key, &bundle, right).unwrap();
        }
        let (link, name) = (other.path().join("parent"), bundle.file_name().unwrap());
        std::os::unix::fs::symlink(bundle.parent().unwrap(), &link).unwrap();
        std::fs::remove_dir_all(&bundle).unwrap();
        check_bundle(&key, &bundle, &link.join(name)).unwrap();
        for wrong in [other.path(), Path::new("/no/such/bundle"), &other.path().join(name), &link] {
            check_bundle(&key, &bundle, wrong).unwrap_err();
        }
    }

    /// The sandbox of a pod and its containers have the same owner, and bundles in different directories.
    #[test]
    fn a_container_is_found_by_its_bundle_if_its_sandbox_has_another_owner() {
        let caller = World::new("delete-pod").task.clone();
        let with_owner = |owner: &str| {
            let mut world = World::new("delete-pod");
            world.task = caller.of(Owner::new(owner).unwrap());
            world.take(&[Step::Create, Step::Start], Delivery::First).unwrap().unwrap();
            let store = Store::new(world.state_dir());
            let bundle = store.load(&world.task).unwrap().unwrap().task.request.bundle;
            (world, store, bundle)
        };
        let (world, store, bundle) = with_owner("0123456789abcdef");
        let (other, _, other_bundle) = with_owner("fedcba9876543210");
        let namesake = store.dir(&other.task);
        std::fs::create_dir(&namesake).unwrap();
        let record = Store::new(other.state_dir()).dir(&other.task).join("record.json");
        std::fs::copy(record, namesake.join("record.json")).unwrap();
        let links = tempfile::tempdir().unwrap();
        let link = links.path().join("link");
        std::os::unix::fs::symlink(&bundle, &link).unwrap();
        let found = |bundle: &Path| recorded_as(&store, &caller, bundle);
        for right in [&bundle, &link] {
            assert_eq!(found(right).unwrap().as_ref(), Some(&world.task));
        }
        assert_eq!(found(&other_bundle).unwrap().as_ref(), Some(&other.task));
        assert_eq!(found(links.path()).unwrap(), None);
        // This record may be that of any task with this name.
        std::fs::write(namesake.join("record.json"), "{").unwrap();
        assert_eq!(found(&bundle).unwrap().as_ref(), Some(&world.task));
        let Failure(error) = found(&other_bundle).unwrap_err();
        assert!(error.contains("may run") && error.contains("record.json"), "{error}");
        // A directory without a record is no task.
        std::fs::remove_file(namesake.join("record.json")).unwrap();
        assert_eq!(found(&other_bundle).unwrap(), None);
    }

    #[test]
    fn a_task_whose_record_can_not_be_read_is_not_reported_as_ended() {
        let world = World::new("delete-unreadable");
        world.take(&[Step::Create, Step::Start], Delivery::First).unwrap().unwrap();
        let (store, key) = (Store::new(world.state_dir()), world.task.clone());
        std::fs::write(store.dir(&key).join("record.json"), "{").unwrap();
        let Failure(error) = check_record(&store, &key).unwrap_err();
        assert!(error.contains("may run") && error.contains("record.json"), "{error}");
        std::fs::remove_dir_all(store.dir(&key)).unwrap();
        assert!(check_record(&store, &key).is_ok());
    }

    #[test]
    fn an_unfinished_cleanup_is_a_success_only_if_the_next_daemon_completes_it() {
        let world = World::new("delete-later");
        world.take(&[Step::Create, Step::Start, Step::AddExec], Delivery::First).unwrap().unwrap();
        let (store, key) = (Store::new(world.state_dir()), world.task.clone());
        let answer = || Answer::of(None, || is_given_up(&store, &key));
        assert!(matches!(answer(), Answer::Refused(_)));
        let task = store.load(&key).unwrap().unwrap().task;
        give_up(&store, &task).unwrap();
        assert!(matches!(answer(), Answer::Later(reason) if reason.contains("still")));
        world.live(|_| async {}).unwrap();
        assert_eq!(world.remains(), Vec::<String>::new());
        assert!(matches!(answer(), Answer::Later(_)));
        assert_eq!(world.events(), ["create", "start", "exec-added"]);
    }
}
