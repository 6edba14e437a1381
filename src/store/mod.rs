//! The record of each task on disk.
//!
//! `<state>/<namespace>/<id>/record.json` (`<id>+<owner>` for another containerd than the usual one), written before the effect that it announces and replaced
//! by rename, so that a reader finds the old or the new one and nothing between. A deleted task
//! whose last events are still owed to containerd has its record moved to `<state>/.owed/`.
//!
//! All paths are on a tmpfs (`/run`): these calls touch memory only and are short enough to be made
//! on the async runtime.

pub mod answers;
mod aside;
mod record;

use std::fs::{self, DirBuilder};
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use crate::effects;
use crate::id::{ExecId, Namespace, TaskKey};
use crate::suspect::{Crashes, LIMIT, Suspect};
use crate::task::Task;
use crate::task::exec::Outcome;

pub use record::{Cause, Found};
use record::{RECORD, RECORD_NEW, VERSION, read_limited, read_task, replace, write_owed};

/// Holds what `deleted` tasks still owe; no namespace begins with a dot.
const OWED: &str = ".owed";

/// Holds the records that have crashed the daemon.
const CRASHED: &str = ".crashed";

/// Holds the notify sockets of containers.
const NOTIFY: &str = ".notify";

/// Holds console sockets.
const CONSOLES: &str = ".consoles";

/// The directories of a task's execs, in that of the task.
const EXECS: &str = "execs";

/// What became of an exec's start, in its directory.
const OUTCOME: &str = "outcome.json";
const OUTCOME_NEW: &str = "outcome.json.new";

/// The environment of a task's OCI runtime, in the form of /proc/PID/environ.
const ENVIRONMENT: &str = "environment";

/// What can go wrong with records.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Reading or writing failed.
    #[error("{action} {path}: {source}")]
    Io {
        /// What was tried.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
    /// Recovering the record has crashed the daemon more than once.
    #[error(
        "{path} crashed the daemon {LIMIT} times and was moved to {to}; its container, if it still runs, is without the daemon"
    )]
    SetAside {
        /// The record.
        path: PathBuf,
        /// Where it is now.
        to: PathBuf,
    },
    /// The file is no record.
    #[error("record {path} can't be read: {source}; it is left as it is")]
    Malformed {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        #[source]
        source: serde_json::Error,
    },
    /// The file belongs to a newer version of this program.
    #[error("record {path} has version {found}, this program reads up to {VERSION}; it is left as it is")]
    Newer {
        /// The file.
        path: PathBuf,
        /// Its version.
        found: u32,
    },
    /// The file is too large to be a record.
    #[error("record {path} is larger than {limit} bytes; it is left as it is")]
    TooLarge {
        /// The file.
        path: PathBuf,
        /// In bytes.
        limit: usize,
    },
}

/// The directory of all records.
#[derive(Clone, Debug)]
pub struct Store {
    root: PathBuf,
}

impl Store {
    /// A store below `root`, which is made when the first record is.
    pub fn new(root: impl Into<PathBuf>) -> Self {
        Self { root: root.into() }
    }

    /// The directory of a task: its record and the small files that go with it.
    pub fn dir(&self, key: &TaskKey) -> PathBuf {
        self.root.join(key.namespace.as_str()).join(key.word())
    }

    /// The directory of an exec, in that of its task.
    pub fn exec_dir(&self, key: &TaskKey, exec: &ExecId) -> PathBuf {
        self.dir(key).join(EXECS).join(exec.as_str())
    }

    /// Makes an exec's directory, empty.
    ///
    /// # Errors
    /// [`Error::Io`]
    pub fn create_exec_dir(&self, key: &TaskKey, exec: &ExecId) -> Result<PathBuf, Error> {
        self.remove_exec_dir(key, exec)?;
        let dir = self.exec_dir(key, exec);
        make_dir(&dir).map_err(io_error("create", &dir))?;
        Ok(dir)
    }

    /// Empties an exec's directory but for its record and one more file.
    ///
    /// # Errors
    /// [`Error::Io`]
    pub fn clear_exec_dir(&self, key: &TaskKey, exec: &ExecId, kept: Option<&str>) -> Result<(), Error> {
        let dir = self.exec_dir(key, exec);
        let is_kept = |name: &str| name == RECORD || name == RECORD_NEW || Some(name) == kept;
        for name in entries(&dir)?.into_iter().filter(|name| !is_kept(name)) {
            let path = dir.join(name);
            match fs::remove_file(&path) {
                Err(e) if e.kind() == io::ErrorKind::NotFound => {}
                removed => removed.map_err(io_error("remove", &path))?,
            }
        }
        Ok(())
    }

    /// Removes an exec's directory; it is no error if there is none.
    ///
    /// # Errors
    /// [`Error::Io`]
    pub fn remove_exec_dir(&self, key: &TaskKey, exec: &ExecId) -> Result<(), Error> {
        remove_dir(&self.exec_dir(key, exec)).map(drop)
    }

    /// Tells the daemon what became of an exec's start: in a file, in one step.
    ///
    /// # Errors
    /// [`Error::Io`]
    pub fn write_outcome(dir: &Path, outcome: &Outcome) -> Result<(), Error> {
        let (path, new) = (dir.join(OUTCOME), dir.join(OUTCOME_NEW));
        let text =
            serde_json::to_vec(outcome).map_err(|source| Error::Malformed { path: path.clone(), source })?;
        replace(&path, &new, &text)
    }

    /// What became of an exec's start; nothing if it is not known yet.
    ///
    /// # Errors
    /// The file can't be read.
    pub fn read_outcome(dir: &Path) -> Result<Option<Outcome>, Error> {
        let path = dir.join(OUTCOME);
        let Some(text) = read_limited(&path)? else {
            return Ok(None);
        };
        serde_json::from_slice(&text).map(Some).map_err(|source| Error::Malformed { path, source })
    }

    /// Where a process gets its terminal: a name that fits into a socket's address, which the path of
    /// the record does not (108 bytes, unix(7)).
    pub fn console(&self, name: &str) -> PathBuf {
        self.root.join(CONSOLES).join(name)
    }

    /// Where a container notifies: a short name, as for [`Self::console`].
    pub fn notify_socket(&self, name: &str) -> PathBuf {
        self.root.join(NOTIFY).join(name)
    }

    /// Makes a new task's directory and writes its first record, and the environment of its OCI runtime.
    ///
    /// What a crashed Create left in the directory is removed first.
    ///
    /// # Errors
    /// [`Error::Io`]; the directory is gone again then.
    pub fn create(&self, task: &Task, environment: &[u8]) -> Result<(), Error> {
        self.remove(&task.key)?;
        let dir = self.dir(&task.key);
        make_dir(&dir).map_err(io_error("create", &dir))?;
        let file = self.environment(&task.key);
        let written = replace(&file, &file.with_extension("new"), environment);
        written.and_then(|()| self.save_whole(task)).inspect_err(|_| {
            // The first error is the one to report.
            let _ = self.remove(&task.key);
        })
    }

    /// The file with the environment of a task's OCI runtime.
    pub fn environment(&self, key: &TaskKey) -> PathBuf {
        self.dir(key).join(ENVIRONMENT)
    }

    /// True if there is anything on disk about the task.
    pub fn knows(&self, key: &TaskKey) -> bool {
        self.dir(key).exists()
    }

    /// Every record. One that can't be read does not hide the others.
    ///
    /// # Errors
    /// Only for the directory of all records; each record has a result of its own.
    pub fn load_all(&self, crashes: &Crashes) -> Result<Vec<Result<Found, Error>>, Error> {
        let mut tasks = Vec::new();
        for namespace in entries(&self.root)? {
            let Ok(namespace) = Namespace::new(&namespace) else {
                continue;
            };
            for word in entries(&self.root.join(namespace.as_str()))? {
                let Ok(key) = TaskKey::from_word(namespace.clone(), &word) else {
                    continue;
                };
                let suspect = Suspect::record(&key);
                if crashes.is_given_up(suspect) {
                    // Whoever moves it back wants it to be tried again.
                    crashes.forget(suspect);
                    tasks.extend(self.set_aside(&key).map(Err));
                } else {
                    tasks.extend(suspect.run(|| self.load(&key)).transpose());
                }
            }
        }
        Ok(tasks)
    }

    /// Moves the record of a task out of the way of recovery, for a person to look at. Returns the error that
    /// names it; nothing if there is no record.
    fn set_aside(&self, key: &TaskKey) -> Option<Error> {
        let dir = self.root.join(CRASHED);
        let path = self.dir(key).join(RECORD);
        let to = dir.join(format!("{}:{}.json", key.namespace, key.word()));
        match make_dir(&dir).and_then(|()| fs::rename(&path, &to)) {
            Ok(()) => Some(Error::SetAside { path, to }),
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            Err(error) => Some(io_error("move", &path)(error)),
        }
    }

    /// Removes a task's directory; it is no error if there is none.
    ///
    /// # Errors
    /// [`Error::Io`]
    pub fn remove(&self, key: &TaskKey) -> Result<(), Error> {
        if remove_dir(&self.dir(key))? {
            // The namespace's directory goes with its last task; it is not empty if others are left.
            let _ = fs::remove_dir(self.root.join(key.namespace.as_str()));
        }
        Ok(())
    }

    /// Keeps the record of a deleted task until its last events are accepted.
    ///
    /// # Errors
    /// [`Error::Io`]
    pub fn keep_owed(&self, task: &Task) -> Result<Owing, Error> {
        let dir = self.root.join(OWED);
        make_dir(&dir).map_err(io_error("create", &dir))?;
        // The id can be used again before the events are accepted: the time keeps the files apart.
        let seq = task.outbox.first().map_or(0, |owed| owed.at_usec);
        let name = format!("{}:{}:{seq}", task.key.namespace, task.key.word());
        write_owed(&dir, &name, task)?;
        Ok(Owing { dir, name })
    }

    /// The deleted tasks that still owe events.
    ///
    /// # Errors
    /// Only for the directory as a whole.
    pub fn load_owed(&self) -> Result<Vec<OwedTask>, Error> {
        let dir = self.root.join(OWED);
        let mut tasks = Vec::new();
        for name in entries(&dir)?.into_iter().filter(|name| !name.ends_with(".new")) {
            if let Some(found) = read_task(&dir.join(&name)).transpose() {
                tasks.push((Owing { dir: dir.clone(), name }, found.map(|found| found.task)));
            }
        }
        Ok(tasks)
    }
}

/// A deleted task that still owes events, or why its file can't be read.
pub type OwedTask = (Owing, Result<Task, Error>);

/// Where a deleted task's last events are kept.
#[derive(Clone, Debug)]
pub struct Owing {
    dir: PathBuf,
    name: String,
}

impl Owing {
    /// Writes what is still owed; the file goes when nothing is.
    ///
    /// # Errors
    /// [`Error::Io`]
    pub fn update(&self, task: &Task) -> Result<(), Error> {
        if task.outbox.is_empty() {
            return self.discard();
        }
        write_owed(&self.dir, &self.name, task)
    }

    /// Removes the file.
    ///
    /// # Errors
    /// [`Error::Io`]
    pub fn discard(&self) -> Result<(), Error> {
        let path = self.dir.join(&self.name);
        match effects::disk(&path).and_then(|()| fs::remove_file(&path)) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
            removed => removed.map_err(io_error("remove", &path)),
        }
    }
}

fn io_error(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Error + use<> {
    let path = path.to_owned();
    move |source| Error::Io { action, path, source }
}

/// True if there was something to remove.
fn remove_dir(dir: &Path) -> Result<bool, Error> {
    match effects::disk(dir).and_then(|()| fs::remove_dir_all(dir)) {
        Ok(()) => Ok(true),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(e) => Err(io_error("remove", dir)(e)),
    }
}

fn make_dir(dir: &Path) -> io::Result<()> {
    // Another task's removal can take the parent away between two steps of the recursion.
    const TRIES: u32 = 5;
    let mut tries = 0;
    effects::disk(dir)?;
    loop {
        match DirBuilder::new().recursive(true).mode(0o700).create(dir) {
            Err(e) if e.kind() == io::ErrorKind::NotFound && tries < TRIES => tries += 1,
            result => return result,
        }
    }
}

/// The names in a directory; none if the directory is not there.
fn entries(dir: &Path) -> Result<Vec<String>, Error> {
    let listing = match fs::read_dir(dir) {
        Ok(listing) => listing,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(e) => return Err(io_error("list", dir)(e)),
    };
    Ok(listing.filter_map(|entry| entry.ok()?.file_name().into_string().ok()).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::id::{TaskId, UnitName};
    use crate::task::exec::{Exec, ExecEvent, ExecPhase};
    use crate::task::outbox::TaskEvent;
    use crate::task::phase::{Event, Phase};
    use crate::task::{Face, Placement};
    use std::sync::Arc;

    struct Scratch(PathBuf);

    impl Scratch {
        fn new(name: &str) -> (Self, Store) {
            let dir = std::env::temp_dir().join(format!("store-test-{name}-{}", std::process::id()));
            let _ = fs::remove_dir_all(&dir);
            (Self(dir.clone()), Store::new(dir))
        }
    }

    impl Drop for Scratch {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    fn task(id: &str) -> Task {
        let slice = UnitName::new("containerd-default.slice").unwrap();
        Task {
            key: TaskKey::usual(Namespace::new("default").unwrap(), TaskId::new(id).unwrap()),
            unit: UnitName::new("containerd-default-a.service").unwrap(),
            logger: None,
            properties: Vec::new(),
            devices: None,
            request: Default::default(),
            wiring: Default::default(),
            runtime: Default::default(),
            containerd: Default::default(),
            placement: Placement::Unit { slice, child: id.to_owned() },
            cgroup: None,
            rootfs_on_host: false,
            waiting_program: None,
            face: Face::default(),
            init: Phase::Creating { exit: None },
            execs: Default::default(),
            outbox: Default::default(),
            oom_kills: 2,
            limits: Some(crate::task::limits::Limits::default()),
            notify: true,
            muted: false,
            is_leftover: false,
        }
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
        let (_scratch, store) = Scratch::new("round-trip");
        let mut a = task("a");
        store.create(&a, b"").unwrap();
        let before = a.clone();
        a.apply(Event::Created { pid: 7 }, 1).unwrap();
        store.save(&before, &a, Cause::Note).unwrap();
        store.create(&task("b"), b"").unwrap();
        assert_eq!(load(&store), a);
        let one = with_exec(&store, &a, "one");
        let two = with_exec(&store, &one, "two");
        assert_eq!(load(&store), two);
        let mut begun = two.clone();
        let id = ExecId::new("two").unwrap();
        begun.apply_exec(&id, ExecEvent::StartBegun, 4).unwrap();
        store.save(&two, &begun, Cause::Decision).unwrap();
        assert_eq!(load(&store), begun);
        let only = store.load_with(&a.key, Some(&id)).unwrap().unwrap();
        assert_eq!(only.execs.into_iter().collect::<Vec<_>>(), [(id.clone(), begun.execs[&id].clone())]);
        store.save(&begun, &one, Cause::Note).unwrap();
        assert_eq!(load(&store), one);
        assert_eq!(store.load_all(&Crashes::default()).unwrap().len(), 2);
        store.remove(&a.key).unwrap();
        store.remove(&a.key).unwrap();
        assert!(store.load(&a.key).unwrap().is_none());
    }

    #[test]
    fn a_change_costs_the_same_however_many_execs_there_are() {
        let (_scratch, store) = Scratch::new("many");
        let mut a = task("a");
        store.create(&a, b"").unwrap();
        for number in 0..100 {
            a = with_exec(&store, &a, &format!("e{number}"));
            a.outbox.clear();
        }
        let text = fs::read(store.dir(&a.key).join(RECORD)).unwrap();
        assert!(text.len() < 3 * 4096, "{}", text.len());
        store.save_whole(&a).unwrap();
        assert_eq!(load(&store), a);
    }

    #[test]
    fn a_record_of_the_version_before_is_read_and_becomes_a_present_one() {
        let (_scratch, store) = Scratch::new("version-1");
        let mut a = task("a");
        store.create(&a, b"").unwrap();
        a = with_exec(&store, &a, "one");
        // It held everything in one file, and was bounded by the reader alone.
        (0..90_000).for_each(|_| a.outbox.push(TaskEvent::Started { pid: 1 }, 7));
        let text = serde_json::json!({ "version": 1, "task": a }).to_string();
        assert!(text.len() > 4 << 20);
        fs::remove_dir_all(store.dir(&a.key).join(EXECS)).unwrap();
        fs::create_dir_all(store.exec_dir(&a.key, &ExecId::new("one").unwrap())).unwrap();
        fs::write(store.dir(&a.key).join(RECORD), text).unwrap();
        let found = store.load(&a.key).unwrap().unwrap();
        assert!(!found.is_current);
        assert_eq!(found.task, a);
        store.save_whole(&a).unwrap();
        assert_eq!(load(&store), a);
    }

    #[test]
    fn a_whole_record_counts_until_it_is_in_its_parts() {
        let (_scratch, store) = Scratch::new("whole");
        let mut a = task("a");
        store.create(&a, b"").unwrap();
        a = with_exec(&store, &a, "one");
        let mut later = a.clone();
        let id = ExecId::new("one").unwrap();
        later.apply_exec(&id, ExecEvent::StartBegun, 4).unwrap();
        // The daemon ends after the first step.
        let text = serde_json::json!({ "version": VERSION, "task": later }).to_string();
        fs::write(store.dir(&a.key).join(RECORD), text).unwrap();
        let found = store.load(&a.key).unwrap().unwrap();
        assert!(!found.is_current);
        assert_eq!(found.task, later);
    }

    #[test]
    fn what_can_be_written_can_be_read_and_a_note_has_room_after_any_decision() {
        let (_scratch, store) = Scratch::new("large");
        let mut a = task("a");
        store.create(&a, b"").unwrap();
        let before = a.clone();
        a.face.description = "x".repeat(33 << 20);
        let refused = store.save(&before, &a, Cause::Decision);
        assert!(matches!(refused, Err(Error::TooLarge { .. })), "{refused:?}");
        store.save(&before, &a, Cause::Note).unwrap();
        assert!(load(&store) == a);
    }

    #[test]
    fn a_record_that_changes_takes_no_new_room() {
        use std::os::unix::fs::MetadataExt;
        let (_scratch, store) = Scratch::new("turns");
        let mut a = task("a");
        a.face.description = "x".repeat(3 * 4096);
        store.create(&a, b"").unwrap();
        store.save_whole(&a).unwrap();
        let dir = store.dir(&a.key);
        let files = || {
            let mut files: Vec<_> = [RECORD, RECORD_NEW]
                .map(|name| fs::metadata(dir.join(name)).map(|file| (file.ino(), file.len())).unwrap())
                .into();
            files.sort_unstable();
            files
        };
        let before = files();
        for event in [Event::Created { pid: 7 }, Event::StartBegun] {
            let old = a.clone();
            a.apply(event, 1).unwrap();
            store.save(&old, &a, Cause::Note).unwrap();
            assert_eq!(load(&store), a);
        }
        assert_eq!(files(), before);
        let old = a.clone();
        a.face.description.clear();
        store.save(&old, &a, Cause::Note).unwrap();
        assert_eq!(load(&store), a, "nothing is left of a longer one");
    }

    #[test]
    fn the_last_task_takes_the_directories_along() {
        let (scratch, store) = Scratch::new("empty");
        store.create(&task("a"), b"").unwrap();
        store.remove(&task("a").key).unwrap();
        assert_eq!(fs::read_dir(&scratch.0).unwrap().count(), 0);
    }

    #[test]
    fn a_broken_record_is_named_and_hides_no_other() {
        let (_scratch, store) = Scratch::new("broken");
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
        let (_scratch, store) = Scratch::new("newer");
        store.create(&task("a"), b"").unwrap();
        let path = store.dir(&task("a").key).join(RECORD);
        fs::write(&path, "{\"version\":99,\"task\":{\"from\":\"the future\"}}").unwrap();
        assert!(matches!(store.load(&task("a").key), Err(Error::Newer { found: 99, .. })));
        assert!(fs::read_to_string(&path).unwrap().contains("the future"));
    }

    #[test]
    fn owed_events_outlive_the_task_and_go_when_accepted() {
        let (_scratch, store) = Scratch::new("owed");
        let mut a = task("a");
        a.apply(Event::Created { pid: 7 }, 1).unwrap();
        let owing = store.keep_owed(&a).unwrap();
        assert_eq!(store.load_owed().unwrap().len(), 1);
        a.outbox.accepted(0);
        owing.update(&a).unwrap();
        assert!(store.load_owed().unwrap().is_empty());
    }
}
