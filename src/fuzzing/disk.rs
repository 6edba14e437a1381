//! Fuzz targets for files that a client or an earlier version wrote, or that a broken disk has changed.

use std::fs;
use std::path::Path;

use tempfile::TempDir;

use crate::id::{ExecId, Namespace, TaskId, TaskKey};
use crate::launch::contract::Outcome;
use crate::launch::report;
use crate::oci::bundle::{self, Edits, Spec};
use crate::oci::containerd;
use crate::store::delete_replies::{DeleteReplies, Deleted};
use crate::store::{Cause, Store};
use crate::suspect::Crashes;
use crate::task::Task;
use crate::task::lifecycle::Exit;
use crate::task::limits::Limits;
use crate::task::outbox::TaskEvent;
use crate::transport::sockets::Leases;

use super::{first_line, go};

/// A directory that is removed when it is dropped.
fn scratch() -> TempDir {
    tempfile::tempdir().unwrap_or_else(|error| panic!("a scratch directory: {error}"))
}

fn write(path: &Path, data: &[u8]) {
    let dir = path.parent().map(fs::create_dir_all);
    let written = dir.unwrap_or(Ok(())).and_then(|()| fs::write(path, data));
    written.unwrap_or_else(|error| panic!("write {}: {error}", path.display()));
}

fn key() -> TaskKey {
    let names = Namespace::new("default").and_then(|namespace| Ok((namespace, TaskId::new("web")?)));
    let (namespace, id) = names.unwrap_or_else(|error| panic!("{error}"));
    TaskKey::usual(namespace, id)
}

/// Target: a bundle's `config.json`. A spec that can be read can be rewritten, and has the same meaning afterwards. The shim
/// reads it as runc does.
pub(super) fn bundle(data: &[u8]) {
    let _ = go::check(data, &bundle::SHAPE);
    let dir = scratch();
    let dir = dir.path();
    write(&dir.join("config.json"), data);
    let Ok(spec) = Spec::read(dir) else { return };
    let edits = Edits {
        cgroups_path: Some("/a/b".into()),
        env: vec!["A=1".to_owned()],
        binds: vec![("/run/x".into(), "/y".to_owned())],
        ..Edits::default()
    };
    bundle::edit(dir, &edits)
        .unwrap_or_else(|error| panic!("a spec that can be read can't be edited: {error}"));
    let edited = Spec::read(dir).unwrap_or_else(|error| panic!("an edited spec can't be read: {error}"));
    assert_eq!(edited.cgroups_path(), "/a/b");
    assert_eq!(edited.annotations(""), spec.annotations(""));
    assert_eq!(edited.has_hooks(), spec.has_hooks());
    assert_eq!(edited.shares_mounts_with_host(), spec.shares_mounts_with_host());
    assert_eq!(edited.mapped_root(), spec.mapped_root());
    assert_eq!(edited.hostname, spec.hostname);
    assert_eq!(edited.resources().ok(), spec.resources().ok());
}

/// Target: the record of a task. A task that can be saved can be loaded, and is unchanged.
pub(super) fn record(data: &[u8]) {
    if let Ok(task) = serde_json::from_slice::<Task>(data) {
        check_record(&task);
    }
}

/// Checks that a task can be loaded unchanged after it was saved, also after a change.
pub(super) fn check_record(task: &Task) {
    let dir = scratch();
    let store = Store::new(dir.path());
    if store.create(task, b"PATH=/bin").is_err() {
        return;
    }
    let loaded = || {
        let loaded = store.load(&task.key);
        loaded.unwrap_or_else(|error| panic!("a record can't be loaded: {error}")).map(|found| found.task)
    };
    let mut before = task.clone();
    before.outbox.mend();
    assert_eq!(loaded(), Some(before.clone()));
    let mut later = before.clone();
    later.outbox.push(TaskEvent::Exited { pid: 1, exit: Exit { status: 1, at_usec: u64::MAX } }, u64::MAX);
    if store.save(&before, &later, crate::store::Cause::Observation).is_ok() {
        assert_eq!(loaded(), Some(later));
    }
    store.remove(&task.key).unwrap_or_else(|error| panic!("a record can't be removed: {error}"));
}

/// Target: one of the files that the daemon keeps. The first line is the name of the file, and the rest is its content. Every
/// content can be read or is refused, and what was read can be written and read again.
pub(super) fn file(data: &[u8]) {
    let Some((name, content)) = first_line(data) else { return };
    let dir = scratch();
    let root = dir.path();
    match name {
        "answers" => replies(root, content),
        "owed" => owed(root, content),
        "outcome" => outcome(root, content),
        "socket" => socket(root, content),
        "start" => start(root, content),
        "limits" => limits(root, content),
        "task" => task(root, content),
        "exec" => exec(root, content),
        _ => {}
    }
}

fn replies(root: &Path, content: &[u8]) {
    write(&root.join(".answers"), content);
    let open = || DeleteReplies::open(root).unwrap_or_else(|error| panic!("{error}"));
    let replies = open();
    let process = key().init();
    let _ = replies.find(&process);
    for pid in 1..4 {
        let deleted = Deleted { pid: Some(pid), exit: Some(Exit { status: 0, at_usec: 7 }) };
        replies.record(&process, deleted).unwrap_or_else(|error| panic!("{error}"));
        assert_eq!(replies.find(&process), Some(deleted), "the last answer counts");
        assert_eq!(open().find(&process), Some(deleted), "the last answer counts after a restart");
    }
}

fn owed(root: &Path, content: &[u8]) {
    write(&root.join(".owed").join("default:web:7"), content);
    let store = Store::new(root);
    let load = || store.load_owed().unwrap_or_else(|error| panic!("{error}"));
    for (owing, task) in load() {
        let Ok(task) = task else { continue };
        owing.update(&task).unwrap_or_else(|error| panic!("{error}"));
        let again: Vec<_> = load().into_iter().filter_map(|(_, task)| task.ok()).collect();
        let without_execs = Task { execs: Default::default(), ..task.clone() };
        assert_eq!(again, if task.outbox.is_empty() { vec![] } else { vec![without_execs] });
    }
}

fn outcome(root: &Path, content: &[u8]) {
    write(&root.join("outcome.json"), content);
    let read = || report::read(root);
    let Ok(Some(outcome)) = read() else { return };
    report::write(root, &outcome).unwrap_or_else(|error| panic!("{error}"));
    let again: Option<Outcome> = read().unwrap_or_else(|error| panic!("{error}"));
    assert_eq!(again, Some(outcome));
}

fn socket(root: &Path, content: &[u8]) {
    write(&root.join(".sockets/3"), content);
    let leases = Leases::new(root);
    let lease = leases.holder(3).lease().unwrap_or_else(|error| panic!("{error}"));
    let (namespace, owner) = (key().namespace, key().owner);
    for namespace in [None, Some(&namespace)] {
        let claim = || leases.claim(&owner, namespace).unwrap_or_else(|error| panic!("{error}"));
        let claimed = claim();
        assert!(claimed.is_some() && claim() == claimed, "{lease:?}");
    }
}

fn start(root: &Path, content: &[u8]) {
    write(&root.join("containerd-shim-systemd.json"), content);
    let Ok(Some(containerd)) = containerd::read_containerd(root) else { return };
    containerd::write_containerd(root, &containerd).unwrap_or_else(|error| panic!("{error}"));
    let again = containerd::read_containerd(root).unwrap_or_else(|error| panic!("{error}"));
    assert_eq!(again, Some(containerd));
}

fn limits(root: &Path, content: &[u8]) {
    const NAME: &str = "limits-before.json";
    let (store, key) = (Store::new(root), key());
    write(&store.dir(&key).join(NAME), content);
    let read = || store.read_scratch::<Limits>(&key, NAME);
    let Ok(Some(limits)) = read() else { return };
    let text = serde_json::to_vec(&limits).unwrap_or_else(|error| panic!("{error}"));
    store.write_scratch(&key, NAME, &text).unwrap_or_else(|error| panic!("{error}"));
    assert_eq!(read().unwrap_or_else(|error| panic!("{error}")), Some(limits));
}

fn task(root: &Path, content: &[u8]) {
    let (store, key) = (Store::new(root), key());
    write(&store.dir(&key).join("record.json"), content);
    let crashes = Crashes::default();
    let all = store.load_all(&crashes).unwrap_or_else(|error| panic!("{error}"));
    assert!(all.len() <= 1);
    let _ = store.load_with(&key, None);
    let Ok(Some(found)) = store.load(&key) else { return };
    // A record in the directory of another task is not written there again.
    if found.task.key == key && store.save_whole(&found.task, Cause::Observation).is_ok() {
        let again = store.load(&key).unwrap_or_else(|error| panic!("{error}"));
        let again = again.unwrap_or_else(|| panic!("the record is gone"));
        assert!(again.is_current);
        assert_eq!(again.task, found.task);
    }
}

fn exec(root: &Path, content: &[u8]) {
    let (store, key) = (Store::new(root), key());
    let exec = ExecId::new("e").unwrap_or_else(|error| panic!("{error}"));
    let record = include_bytes!("../../fuzz/corpus/record/task");
    let Ok(task) = serde_json::from_slice::<Task>(record) else { panic!("the corpus has no task") };
    let task = Task { key: key.clone(), execs: Default::default(), ..task };
    store.create(&task, b"").unwrap_or_else(|error| panic!("{error}"));
    write(&store.exec_dir(&key, &exec).join("record.json"), content);
    let found = store.load(&key).unwrap_or_else(|error| panic!("a broken exec hides its task: {error}"));
    let found = found.unwrap_or_else(|| panic!("a broken exec hides its task"));
    if store.save_whole(&found.task, Cause::Observation).is_ok() {
        let again = store.load(&key).unwrap_or_else(|error| panic!("{error}"));
        assert_eq!(again.map(|found| found.task), Some(found.task));
    }
}
