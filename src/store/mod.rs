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

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, RenameFlags, renameat2};
use serde::{Deserialize, Serialize};

use crate::id::{ExecId, Namespace, TaskKey};
use crate::suspect::{Crashes, LIMIT, Suspect};
use crate::task::Task;
use crate::task::exec::Outcome;

/// The version of the record that is written. Read are this one and the one before.
const VERSION: u32 = 1;

/// A record larger than this is not one of ours.
const MAX_RECORD_BYTES: u64 = 4 << 20;

/// Holds what `deleted` tasks still owe; no namespace begins with a dot.
const OWED: &str = ".owed";

/// Holds the records that have crashed the daemon.
const CRASHED: &str = ".crashed";

/// Holds console sockets.
const CONSOLES: &str = ".consoles";

/// The directories of a task's execs, in that of the task.
const EXECS: &str = "execs";

/// What became of an exec's start, in its directory.
const OUTCOME: &str = "outcome.json";
const OUTCOME_NEW: &str = "outcome.json.new";

/// The environment of a task's OCI runtime, in the form of /proc/PID/environ.
const ENVIRONMENT: &str = "environment";

const RECORD: &str = "record.json";
const RECORD_NEW: &str = "record.json.new";

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
    #[error("record {path} is larger than {MAX_RECORD_BYTES} bytes; it is left as it is")]
    TooLarge {
        /// The file.
        path: PathBuf,
    },
}

#[derive(Serialize)]
struct Writing<'a> {
    version: u32,
    task: &'a Task,
}

#[derive(Deserialize)]
struct VersionOnly {
    version: u32,
}

#[derive(Deserialize)]
struct Reading {
    task: Task,
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
        written.and_then(|()| self.save(task)).inspect_err(|_| {
            // The first error is the one to report.
            let _ = self.remove(&task.key);
        })
    }

    /// The file with the environment of a task's OCI runtime.
    pub fn environment(&self, key: &TaskKey) -> PathBuf {
        self.dir(key).join(ENVIRONMENT)
    }

    /// Replaces a task's record.
    ///
    /// # Errors
    /// [`Error::Io`]; the old record stands then.
    pub fn save(&self, task: &Task) -> Result<(), Error> {
        write_record(&self.dir(&task.key), RECORD, task)
    }

    /// A task's record, if there is one.
    ///
    /// # Errors
    /// The record can't be read.
    pub fn load(&self, key: &TaskKey) -> Result<Option<Task>, Error> {
        read_record(&self.dir(key).join(RECORD))
    }

    /// True if there is anything on disk about the task.
    pub fn knows(&self, key: &TaskKey) -> bool {
        self.dir(key).exists()
    }

    /// Every record. One that can't be read does not hide the others.
    ///
    /// # Errors
    /// Only for the directory of all records; each record has a result of its own.
    pub fn load_all(&self, crashes: &Crashes) -> Result<Vec<Result<Task, Error>>, Error> {
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
                let path = self.dir(&key).join(RECORD);
                if crashes.is_given_up(suspect) {
                    // Whoever moves it back wants it to be tried again.
                    crashes.forget(suspect);
                    tasks.extend(self.set_aside(&key).map(Err));
                } else {
                    tasks.extend(suspect.run(|| read_record(&path)).transpose());
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
        write_record(&dir, &name, task)?;
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
            if let Some(task) = read_record(&dir.join(&name)).transpose() {
                tasks.push((Owing { dir: dir.clone(), name }, task));
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
        if !task.outbox.is_empty() {
            return write_record(&self.dir, &self.name, task);
        }
        let path = self.dir.join(&self.name);
        match fs::remove_file(&path) {
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
    match fs::remove_dir_all(dir) {
        Ok(()) => Ok(true),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(e) => Err(io_error("remove", dir)(e)),
    }
}

fn make_dir(dir: &Path) -> io::Result<()> {
    // Another task's removal can take the parent away between two steps of the recursion.
    const TRIES: u32 = 5;
    let mut tries = 0;
    loop {
        match DirBuilder::new().recursive(true).mode(0o700).create(dir) {
            Err(e) if e.kind() == io::ErrorKind::NotFound && tries < TRIES => tries += 1,
            result => return result,
        }
    }
}

fn write_record(dir: &Path, name: &str, task: &Task) -> Result<(), Error> {
    let path = dir.join(name);
    let text = serde_json::to_vec(&Writing { version: VERSION, task })
        .map_err(|source| Error::Malformed { path: path.clone(), source })?;
    if name == RECORD {
        return replace_by_turns(&path, &dir.join(RECORD_NEW), text);
    }
    replace(&path, &dir.join(format!("{name}.new")), &text)
}

/// The unit in which a tmpfs gives out room.
const PAGE: usize = 4096;

/// Replaces a file in one step by a second one, which stays and is the next to be written over. So a record
/// takes no new room while it needs no more pages than before: an exit can be recorded when `/run` is full.
fn replace_by_turns(path: &Path, other: &Path, mut text: Vec<u8>) -> Result<(), Error> {
    let mut options = OpenOptions::new();
    let options = options.write(true).create(true).truncate(false).mode(0o600);
    let mut file = options.open(other).map_err(io_error("create", other))?;
    let length = file.metadata().map_err(io_error("look at", other))?.len();
    // Blanks behind a record do not matter; what is left of an older and longer one would.
    text.resize(text.len().next_multiple_of(PAGE), b'\n');
    file.write_all(&text).map_err(io_error("write", other))?;
    if length > text.len() as u64 {
        file.set_len(text.len() as u64).map_err(io_error("shorten", other))?;
    }
    match renameat2(AT_FDCWD, other, AT_FDCWD, path, RenameFlags::RENAME_EXCHANGE) {
        Ok(()) => Ok(()),
        // There is no such file yet, or a file system other than a tmpfs can't do it.
        Err(Errno::ENOENT | Errno::EINVAL | Errno::ENOSYS) => {
            fs::rename(other, path).map_err(io_error("replace", path))
        }
        Err(errno) => Err(io_error("replace", path)(errno.into())),
    }
}

/// Writes a file in one step, by way of another name.
fn replace(path: &Path, new: &Path, text: &[u8]) -> Result<(), Error> {
    let mut file = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(new)
        .map_err(io_error("create", new))?;
    file.write_all(text).map_err(io_error("write", new))?;
    fs::rename(new, path).map_err(io_error("replace", path))
}

/// A file of ours; nothing if it is not there.
fn read_limited(path: &Path) -> Result<Option<Vec<u8>>, Error> {
    let file = match File::open(path) {
        Ok(file) => file,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(io_error("open", path)(e)),
    };
    let mut text = Vec::new();
    file.take(MAX_RECORD_BYTES + 1).read_to_end(&mut text).map_err(io_error("read", path))?;
    if text.len() as u64 > MAX_RECORD_BYTES {
        return Err(Error::TooLarge { path: path.to_owned() });
    }
    Ok(Some(text))
}

fn read_record(path: &Path) -> Result<Option<Task>, Error> {
    let Some(text) = read_limited(path)? else {
        return Ok(None);
    };
    let malformed = |source| Error::Malformed { path: path.to_owned(), source };
    let VersionOnly { version } = serde_json::from_slice(&text).map_err(malformed)?;
    if version > VERSION {
        return Err(Error::Newer { path: path.to_owned(), found: version });
    }
    let Reading { task } = serde_json::from_slice(&text).map_err(malformed)?;
    Ok(Some(task))
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
    use crate::task::phase::{Event, Phase};
    use crate::task::{Face, Placement};

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

    #[test]
    fn a_record_comes_back_as_it_was_written() {
        let (_scratch, store) = Scratch::new("round-trip");
        let mut a = task("a");
        store.create(&a, b"").unwrap();
        a.apply(Event::Created { pid: 7 }, 1).unwrap();
        store.save(&a).unwrap();
        store.create(&task("b"), b"").unwrap();
        assert_eq!(store.load(&a.key).unwrap(), Some(a.clone()));
        assert_eq!(store.load_all(&Crashes::default()).unwrap().len(), 2);
        store.remove(&a.key).unwrap();
        store.remove(&a.key).unwrap();
        assert_eq!(store.load(&a.key).unwrap(), None);
    }

    #[test]
    fn a_record_that_changes_takes_no_new_room() {
        use std::os::unix::fs::MetadataExt;
        let (_scratch, store) = Scratch::new("turns");
        let mut a = task("a");
        a.face.description = "x".repeat(3 * PAGE);
        store.create(&a, b"").unwrap();
        store.save(&a).unwrap();
        let dir = store.dir(&a.key);
        let files = || {
            let mut files: Vec<_> = [RECORD, RECORD_NEW]
                .map(|name| fs::metadata(dir.join(name)).map(|file| (file.ino(), file.len())).unwrap())
                .into();
            files.sort_unstable();
            files
        };
        let before = files();
        a.apply(Event::Created { pid: 7 }, 1).unwrap();
        store.save(&a).unwrap();
        assert_eq!(store.load(&a.key).unwrap(), Some(a.clone()));
        a.apply(Event::StartBegun, 2).unwrap();
        store.save(&a).unwrap();
        assert_eq!(files(), before);
        assert_eq!(store.load(&a.key).unwrap(), Some(a.clone()));
        a.face.description.clear();
        store.save(&a).unwrap();
        assert_eq!(store.load(&a.key).unwrap(), Some(a), "nothing is left of a longer one");
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
