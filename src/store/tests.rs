use super::*;
use crate::id::{TaskId, UnitName};
use crate::task::Placement;
use crate::task::exec::{Exec, ExecPhase};
use crate::task::lifecycle::{Container, Event, Exit, ObservedExit};
use crate::task::limits::UnitLimits;
use crate::task::outbox::TaskEvent;
use crate::task::phase::Phase;
use crate::task::process::Process;
use std::io::Read;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use tempfile::TempDir;

fn scratch() -> (TempDir, Store) {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::new(dir.path());
    (dir, store)
}

fn task(id: &str) -> Task {
    let slice = UnitName::new("containerd-default.slice").unwrap();
    Task {
        key: TaskKey::usual(Namespace::new("default").unwrap(), TaskId::new(id).unwrap()),
        init: Process {
            unit: UnitName::new("containerd-default-a.service").unwrap(),
            logger: None,
            stdio: Default::default(),
            wiring: Default::default(),
            description: String::new(),
            phase: Phase::Creating { exit: None },
        },
        properties: Vec::new(),
        devices: None,
        request: Default::default(),
        runtime: Default::default(),
        containerd: Default::default(),
        placement: Placement::Unit { slice, child: id.to_owned() },
        rootfs_on_host: false,
        fields: Vec::new(),
        execs: Default::default(),
        outbox: Default::default(),
        notify: true,
        given_up: false,
        is_leftover: false,
    }
}

fn created() -> Event {
    let container =
        Container { pid: 7, cgroup: "/a".into(), limits: Some(UnitLimits::default()), oom_kills: 2 };
    Event::Created { container, program: Some((1, 2)) }
}

/// Gives a task a description.
fn describe(task: &mut Task, text: String) {
    task.init.description = text;
}

fn exec(unit: &str) -> Arc<Exec> {
    Arc::new(Exec {
        unit: UnitName::new(unit).unwrap(),
        logger: None,
        stdio: Default::default(),
        wiring: Default::default(),
        description: "x".repeat(2 * 4096),
        phase: ExecPhase::Added,
    })
}

/// Adds an exec, as the daemon does.
fn with_exec(store: &Store, task: &Task, id: &str) -> Task {
    let id = ExecId::new(id).unwrap();
    store.create_exec_dir(&task.key, &id).unwrap();
    let mut next = task.clone();
    next.execs.insert(id.clone(), exec("containerd-default-a:e.service"));
    next.owe(TaskEvent::ExecAdded { exec: id }, 3);
    store.save(task, &next, Cause::Decision).unwrap();
    next
}

fn load(store: &Store) -> Task {
    let found = store.load(&task("a").key).unwrap().unwrap();
    assert!(found.is_current);
    found.task
}

#[test]
fn a_record_comes_back_as_it_was_written() {
    let (_scratch, store) = scratch();
    let mut a = task("a");
    store.create(&a, b"").unwrap();
    let before = a.clone();
    a.apply(None, created(), 1).unwrap();
    store.save(&before, &a, Cause::Observation).unwrap();
    store.create(&task("b"), b"").unwrap();
    assert_eq!(load(&store), a);
    let one = with_exec(&store, &a, "one");
    let two = with_exec(&store, &one, "two");
    assert_eq!(load(&store), two);
    let mut begun = two.clone();
    let id = ExecId::new("two").unwrap();
    begun.apply(Some(&id), Event::StartBegun, 4).unwrap();
    store.save(&two, &begun, Cause::Decision).unwrap();
    assert_eq!(load(&store), begun);
    let only = store.load_with(&a.key, Some(&id)).unwrap().unwrap();
    assert_eq!(only.execs.into_iter().collect::<Vec<_>>(), [(id.clone(), begun.execs[&id].clone())]);
    store.save(&begun, &one, Cause::Observation).unwrap();
    assert_eq!(load(&store), one);
    assert_eq!(store.load_all(&Crashes::default()).unwrap().len(), 2);
    store.remove(&a.key).unwrap();
    store.remove(&a.key).unwrap();
    assert!(store.load(&a.key).unwrap().is_none());
}

#[test]
fn a_change_costs_the_same_however_many_execs_there_are() {
    let (_scratch, store) = scratch();
    let mut a = task("a");
    store.create(&a, b"").unwrap();
    for number in 0..100 {
        a = with_exec(&store, &a, &format!("e{number}"));
        a.outbox.clear();
    }
    let text = fs::read(store.dir(&a.key).join(RECORD)).unwrap();
    assert!(text.len() < 3 * 4096, "{}", text.len());
    store.save_whole(&a, Cause::Observation).unwrap();
    assert_eq!(load(&store), a);
}

#[test]
fn a_record_of_version_1_is_read_and_is_written_in_the_current_version() {
    let (_scratch, store) = scratch();
    let mut a = task("a");
    store.create(&a, b"").unwrap();
    a = with_exec(&store, &a, "one");
    // Version 1 had everything in one file, and only the reader limited its length.
    (0..90_000).for_each(|_| a.outbox.push(TaskEvent::Started { pid: 1 }, 7));
    let text = serde_json::json!({ "version": 1, "task": a }).to_string();
    assert!(text.len() > 4 << 20);
    fs::remove_dir_all(store.dir(&a.key).join(EXECS)).unwrap();
    fs::create_dir_all(store.exec_dir(&a.key, &ExecId::new("one").unwrap())).unwrap();
    fs::write(store.dir(&a.key).join(RECORD), text).unwrap();
    let found = store.load(&a.key).unwrap().unwrap();
    assert!(!found.is_current);
    assert_eq!(found.task, a);
    store.save_whole(&a, Cause::Observation).unwrap();
    assert_eq!(load(&store), a);
}

#[test]
fn a_record_of_the_old_form_is_valid_until_it_is_split_into_files() {
    let (_scratch, store) = scratch();
    let mut a = task("a");
    store.create(&a, b"").unwrap();
    a = with_exec(&store, &a, "one");
    let mut later = a.clone();
    let id = ExecId::new("one").unwrap();
    later.apply(Some(&id), Event::StartBegun, 4).unwrap();
    // The daemon ends after the first step.
    let text = serde_json::json!({ "version": VERSION, "task": later }).to_string();
    fs::write(store.dir(&a.key).join(RECORD), text).unwrap();
    let found = store.load(&a.key).unwrap().unwrap();
    assert!(!found.is_current);
    assert_eq!(found.task, later);
}

#[test]
fn a_change_of_an_exec_that_was_cut_off_is_completed_once_and_in_order() {
    let (_scratch, store) = scratch();
    let mut a = task("a");
    store.create(&a, b"").unwrap();
    a.apply(None, created(), 1).unwrap();
    a = with_exec(&store, &a, "one");
    let id = ExecId::new("one").unwrap();
    let exit = Exit { status: 3, at_usec: 9 };
    let ended = Event::Exited(ObservedExit { pid: None, exit });
    let changes = [
        (None, Event::StartBegun),
        (None, Event::InitStarted),
        (Some(&id), Event::StartBegun),
        (Some(&id), Event::ExecStarted { pid: 8 }),
        (None, ended.clone()),
        // This event also lets the exit of the init process be published.
        (Some(&id), ended),
    ];
    let record = store.dir(&a.key).join(RECORD);
    for (process, event) in changes {
        let (before, old) = (a.clone(), fs::read(&record).unwrap());
        a.apply(process, event, 9).unwrap();
        store.save(&before, &a, Cause::Observation).unwrap();
        if process.is_some() {
            // The daemon ended before it wrote the task.
            fs::write(&record, old).unwrap();
            assert_eq!(store.load(&a.key).unwrap().unwrap().task, a);
            store.save_whole(&a, Cause::Observation).unwrap();
        }
        assert_eq!(load(&store), a);
    }
    assert!(a.init.exit().is_some());
}

#[test]
fn every_written_record_can_be_read_and_reserved_space_is_enough_for_an_exit() {
    let (_scratch, store) = scratch();
    let mut a = task("a");
    store.create(&a, b"").unwrap();
    let before = a.clone();
    describe(&mut a, "x".repeat(33 << 20));
    let refused = store.save(&before, &a, Cause::Decision);
    assert!(matches!(refused, Err(Error::TooLarge { .. })), "{refused:?}");
    store.save(&before, &a, Cause::Observation).unwrap();
    assert!(load(&store) == a);
}

#[test]
fn a_record_that_changes_takes_no_new_room() {
    use std::os::unix::fs::MetadataExt;
    let (_scratch, store) = scratch();
    let mut a = task("a");
    describe(&mut a, "x".repeat(3 * 4096));
    store.create(&a, b"").unwrap();
    store.save_whole(&a, Cause::Observation).unwrap();
    let dir = store.dir(&a.key);
    let files = || {
        let mut files: Vec<_> = [RECORD, RECORD_NEW]
            .map(|name| fs::metadata(dir.join(name)).map(|file| (file.ino(), file.len())).unwrap())
            .into();
        files.sort_unstable();
        files
    };
    let before = files();
    for event in [created(), Event::StartBegun] {
        let old = a.clone();
        a.apply(None, event, 1).unwrap();
        store.save(&old, &a, Cause::Observation).unwrap();
        assert_eq!(load(&store), a);
    }
    assert_eq!(files(), before);
    let old = a.clone();
    describe(&mut a, String::new());
    store.save(&old, &a, Cause::Observation).unwrap();
    assert_eq!(load(&store), a, "nothing is left of a longer one");
}

#[test]
fn a_reader_gets_one_version_of_a_file_however_fast_it_is_written() {
    let scratch = tempfile::tempdir().unwrap();
    let (path, other) = (scratch.path().join(RECORD), scratch.path().join(RECORD_NEW));
    let write = |letter: u8| files::replace_by_turns(&path, &other, vec![letter; 256 << 10]).unwrap();
    write(b'a');
    let is_over = AtomicBool::new(false);
    let torn = std::thread::scope(|threads| {
        threads.spawn(|| {
            let letters = (b'a'..=b'z').cycle();
            letters.take_while(|_| !is_over.load(Ordering::Relaxed)).for_each(write);
        });
        let read = || files::read_by_turns(&path).unwrap().unwrap();
        let is_torn = |text: Vec<u8>| text != vec![text[0]; 256 << 10];
        let torn = (0..2000).filter(|_| is_torn(read())).count();
        is_over.store(true, Ordering::Relaxed);
        torn
    });
    assert_eq!(torn, 0);
}

#[test]
fn a_file_that_is_being_read_is_not_overwritten_and_the_next_one_is() {
    use std::os::unix::fs::MetadataExt;
    let (_scratch, store) = scratch();
    let (mut a, one) = (task("a"), "1".repeat(4096));
    describe(&mut a, one.clone());
    store.create(&a, b"").unwrap();
    let record = store.dir(&a.key).join(RECORD);
    let mut reader = fs::File::open(&record).unwrap();
    rustix::fs::flock(&reader, rustix::fs::FlockOperation::LockShared).unwrap();
    let mut inodes = Vec::new();
    for text in ["2", "3", "4", "5"] {
        let old = a.clone();
        describe(&mut a, text.repeat(4096));
        store.save(&old, &a, Cause::Observation).unwrap();
        assert_eq!(load(&store), a);
        inodes.push(fs::metadata(&record).unwrap().ino());
    }
    let mut text = String::new();
    reader.read_to_string(&mut text).unwrap();
    assert!(text.contains(&one));
    assert!(!inodes.contains(&reader.metadata().unwrap().ino()));
    assert_eq!(inodes[..2], inodes[2..], "two files take turns");
}

#[test]
fn a_record_is_read_while_the_guard_of_a_killed_daemon_keeps_a_lock() {
    use rustix::fs::{FlockOperation, flock};
    let (_scratch, store) = scratch();
    let mut a = task("a");
    store.create(&a, b"").unwrap();
    let mut save = |text: &str| {
        let old = a.clone();
        describe(&mut a, text.into());
        store.save(&old, &a, Cause::Observation).unwrap();
        assert_eq!(load(&store), a);
    };
    save("two files");
    for name in [RECORD, RECORD_NEW] {
        let file = fs::File::open(store.dir(&task("a").key).join(name)).unwrap();
        flock(&file, FlockOperation::NonBlockingLockExclusive).unwrap();
        ["1", "2", "3"].into_iter().for_each(&mut save);
    }
}

#[test]
fn removing_the_last_task_removes_the_directories() {
    let (scratch, store) = scratch();
    store.create(&task("a"), b"").unwrap();
    store.remove(&task("a").key).unwrap();
    assert_eq!(fs::read_dir(scratch.path()).unwrap().count(), 0);
}

#[test]
fn a_broken_record_is_named_and_hides_no_other() {
    let (_scratch, store) = scratch();
    store.create(&task("a"), b"").unwrap();
    store.create(&task("b"), b"").unwrap();
    let path = store.dir(&task("a").key).join(RECORD);
    fs::write(&path, "{\"version\":1,\"task\":{").unwrap();
    let all = store.load_all(&Crashes::default()).unwrap();
    assert_eq!(all.iter().filter(|r| r.is_ok()).count(), 1);
    let broken = all.into_iter().find_map(Result::err).unwrap();
    assert!(broken.to_string().contains(path.to_str().unwrap()), "{broken}");
}

#[test]
fn a_newer_record_is_refused_and_left_untouched() {
    let (_scratch, store) = scratch();
    store.create(&task("a"), b"").unwrap();
    let path = store.dir(&task("a").key).join(RECORD);
    fs::write(&path, "{\"version\":99,\"task\":{\"from\":\"the future\"}}").unwrap();
    assert!(matches!(store.load(&task("a").key), Err(Error::Newer { found: 99, .. })));
    assert!(fs::read_to_string(&path).unwrap().contains("the future"));
}

#[test]
fn owed_events_outlive_the_task_until_they_are_accepted() {
    let (_scratch, store) = scratch();
    let mut a = task("a");
    a.apply(None, created(), 1).unwrap();
    let owing = store.retain_owed(&a).unwrap();
    assert_eq!(store.load_owed().unwrap().len(), 1);
    a.outbox.accepted(0);
    owing.update(&a).unwrap();
    assert!(store.load_owed().unwrap().is_empty());
    let dir = store.root.join(".owed");
    fs::write(dir.join("default:a:1.new"), "{").unwrap();
    store.remove_leftovers().unwrap();
    assert_eq!(entries(&dir).unwrap(), [""; 0]);
}

#[test]
fn directories_without_a_record_are_removed_and_those_set_aside_are_kept() {
    let (_scratch, store) = scratch();
    let all = ["recorded", "half-removed", "set-aside"].map(task);
    all.iter().for_each(|task| store.create(task, b"A=1").unwrap());
    let [recorded, half_removed, set_aside] = all.map(|task| task.key);
    // The directory looks as if a daemon had been killed while it removed the directory.
    fs::remove_file(store.dir(&half_removed).join(RECORD)).unwrap();
    assert!(!store.has_set_aside().unwrap());
    store.set_aside(&set_aside).unwrap();
    fs::create_dir(store.root.join("empty")).unwrap();
    store.remove_leftovers().unwrap();
    assert_eq!(
        [&recorded, &half_removed, &set_aside].map(|key| store.knows(key).unwrap()),
        [true, false, true]
    );
    assert!(store.load(&recorded).unwrap().is_some());
    assert!(!store.root.join("empty").exists());
    assert!(store.root.join("default").exists());
    assert!(store.has_set_aside().unwrap());
    store.remove(&set_aside).unwrap();
    assert!(!store.has_set_aside().unwrap(), "the task is gone");
}

#[test]
fn the_directory_of_a_namespace_is_removed_with_its_last_files() {
    let (_scratch, store) = scratch();
    fs::create_dir_all(store.dir(&task("a").key)).unwrap();
    store.remove_leftovers().unwrap();
    assert_eq!(entries(&store.root).unwrap(), [""; 0]);
    store.remove_leftovers().unwrap();
}

#[test]
fn foreign_files_hide_no_record() {
    use std::os::unix::fs::symlink;
    let (_scratch, store) = scratch();
    store.create(&task("a"), b"").unwrap();
    let namespace = store.dir(&task("a").key).parent().unwrap().to_owned();
    let fifo = |path: PathBuf| nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU).unwrap();
    fs::write(store.root.join("file"), "x").unwrap();
    fifo(store.root.join("fifo"));
    symlink("loop", store.root.join("loop")).unwrap();
    symlink("/", namespace.join("link")).unwrap();
    fs::write(namespace.join("file"), "x").unwrap();
    for (name, make) in [
        ("b", &fifo as &dyn Fn(PathBuf)),
        ("c", &|path| fs::create_dir(path).unwrap()),
        ("d", &|path| symlink("/dev/zero", path).unwrap()),
    ] {
        fs::create_dir(namespace.join(name)).unwrap();
        make(namespace.join(name).join(RECORD));
    }
    store.remove_leftovers().unwrap();
    let all = store.load_all(&Crashes::default()).unwrap();
    assert_eq!(all.iter().filter(|found| found.is_ok()).count(), 1, "{all:?}");
    // The directory that names itself, the file and the three directories with something else than a record.
    assert_eq!(all.iter().filter(|found| found.is_err()).count(), 5, "{all:?}");
    let seen = store.look().unwrap();
    assert_eq!(seen.iter().filter(|(_, found)| found.is_ok()).count(), 1, "{seen:?}");
}

#[test]
fn the_record_of_an_exec_that_cant_be_read_stays_and_hinders_nothing() {
    let (_scratch, store) = scratch();
    let mut a = task("a");
    store.create(&a, b"").unwrap();
    a = with_exec(&store, &a, "one");
    let both = with_exec(&store, &a, "two");
    let id = ExecId::new("two").unwrap();
    let path = store.exec_dir(&a.key, &id).join(RECORD);
    let text = fs::read(&path).unwrap();
    fs::write(&path, "{\"version\":99}").unwrap();
    let mut found = load(&store);
    assert_eq!(found.execs, a.execs);
    store.save_whole(&found, Cause::Observation).unwrap();
    let before = found.clone();
    found.apply(None, created(), 5).unwrap();
    store.save(&before, &found, Cause::Observation).unwrap();
    assert_eq!(load(&store), found);
    // The next daemon is of the version that has written it.
    fs::write(&path, text).unwrap();
    assert_eq!(load(&store).execs, both.execs);
    store.remove(&a.key).unwrap();
    assert!(!store.knows(&a.key).unwrap());
}

#[test]
fn a_record_whose_directory_was_removed_is_written_again() {
    use std::os::unix::fs::PermissionsExt;
    let (dir, store) = scratch();
    let first = task("a");
    store.create(&first, b"").unwrap();
    let before = with_exec(&store, &first, "e");
    for write_whole in [false, true] {
        // An administrator removes the records of a namespace.
        fs::remove_dir_all(dir.path().join("default")).unwrap();
        let mut after = before.clone();
        describe(&mut after, format!("whole: {write_whole}"));
        if write_whole {
            store.save_whole(&after, Cause::Observation).unwrap();
        } else {
            store.save(&before, &after, Cause::Decision).unwrap();
        }
        assert_eq!(load(&store), after);
        for made in [dir.path().join("default"), store.dir(&first.key)] {
            assert_eq!(fs::metadata(&made).unwrap().permissions().mode() & 0o777, 0o700, "{made:?}");
        }
    }
}
