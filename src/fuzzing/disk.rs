//! What is read from files that a client, an earlier version or a broken disk wrote.

use std::cell::RefCell;
use std::fs;
use std::path::PathBuf;

use crate::oci::bundle::{self, Edits, Spec};
use crate::store::Store;
use crate::task::Task;

/// A directory of this thread, made once.
fn scratch(name: &str) -> PathBuf {
    thread_local! {
        static MADE: RefCell<Vec<PathBuf>> = const { RefCell::new(Vec::new()) };
    }
    let unique = format!("shim-fuzz-{}-{:?}-{name}", std::process::id(), std::thread::current().id());
    let dir = std::env::temp_dir().join(unique);
    MADE.with_borrow_mut(|made| {
        if !made.contains(&dir) {
            fs::create_dir_all(&dir).unwrap_or_else(|error| panic!("{}: {error}", dir.display()));
            made.push(dir.clone());
        }
    });
    dir
}

/// A bundle's `config.json`: what can be read can be rewritten, and says the same afterwards.
pub(super) fn bundle(data: &[u8]) {
    let dir = scratch("bundle");
    fs::write(dir.join("config.json"), data).unwrap_or_else(|error| panic!("write config.json: {error}"));
    let Ok(spec) = Spec::read(&dir) else { return };
    let edits = Edits { cgroups_path: Some("/a/b".into()), ..Edits::default() };
    bundle::edit(&dir, &edits)
        .unwrap_or_else(|error| panic!("a spec that can be read can't be edited: {error}"));
    let edited = Spec::read(&dir).unwrap_or_else(|error| panic!("an edited spec can't be read: {error}"));
    assert_eq!(edited.cgroups_path(), "/a/b");
    assert_eq!(edited.annotations(""), spec.annotations(""));
    assert_eq!(edited.has_hooks(), spec.has_hooks());
    assert_eq!(edited.shares_mounts_with_host(), spec.shares_mounts_with_host());
}

/// A task as a record has it: what can be saved can be loaded, and is the same.
pub(super) fn record(data: &[u8]) {
    let Ok(task) = serde_json::from_slice::<Task>(data) else { return };
    let store = Store::new(scratch("record"));
    if store.create(&task, b"PATH=/bin").is_err() {
        return;
    }
    let loaded = store.load(&task.key).unwrap_or_else(|error| panic!("a record can't be loaded: {error}"));
    assert_eq!(loaded.map(|found| found.task), Some(task.clone()));
    store.remove(&task.key).unwrap_or_else(|error| panic!("a record can't be removed: {error}"));
}
