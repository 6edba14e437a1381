//! The last answers to Delete.
//!
//! A Delete takes the record away before its answer has been sent. If the daemon ends in between, the
//! next one finds the same Delete among its open requests, and here what to answer. A file with a
//! fixed number of places, each within a page of a tmpfs: one write, which happens as a whole or not
//! at all.

use std::fs::{DirBuilder, File, OpenOptions};
use std::os::unix::fs::{DirBuilderExt, FileExt, OpenOptionsExt};
use std::path::Path;
use std::sync::{Mutex, PoisonError};

use nix::fcntl::{FallocateFlags, fallocate};
use serde::{Deserialize, Serialize};

use crate::id::{Owner, ProcessKey};
use crate::path_error::io_error;
use crate::task::phase::Exit;

use super::Error;

const FILE: &str = ".answers";
/// More than there can be between taking a record away and sending the answer.
const PLACES: u64 = 256;
const PLACE: usize = 512;
/// More Deletes than there can be: a line with a greater number is none of ours.
const MOST: u64 = u64::MAX / 2;

/// What a Delete answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Deleted {
    /// The process that it was, 0 if none.
    pub pid: u32,
    /// How it ended, if it ever ran.
    pub exit: Option<Exit>,
}

#[derive(Clone, Serialize, Deserialize)]
struct Line {
    seq: u64,
    process: String,
    #[serde(default)]
    owner: Owner,
    #[serde(flatten)]
    deleted: Deleted,
}

/// The file.
#[derive(Debug)]
pub struct Answers {
    file: File,
    next: Mutex<u64>,
}

impl Answers {
    /// Opens the file in the directory of all records, which is made if it is not there.
    ///
    /// # Errors
    /// [`Error::Io`]
    pub fn open(root: &Path) -> Result<Self, Error> {
        DirBuilder::new().recursive(true).mode(0o700).create(root).map_err(io_error("create", root))?;
        let path = root.join(FILE);
        let mut options = OpenOptions::new();
        let file = options.read(true).write(true).create(true).truncate(false).mode(0o600).open(&path);
        let file = file.map_err(io_error("open", &path))?;
        // A Delete must not fail for want of room. Where there is none now, one may.
        if let Err(errno) = fallocate(&file, FallocateFlags::empty(), 0, PLACES as i64 * PLACE as i64) {
            tracing::warn!(%errno, "can't reserve space for {}: {errno}", path.display());
        }
        let mut answers = Self { file, next: Mutex::default() };
        answers.next = Mutex::new(answers.lines().map(|line| line.seq + 1).max().unwrap_or(0));
        Ok(answers)
    }

    /// Keeps what the Delete of a process is about to answer.
    ///
    /// # Errors
    /// [`Error::Io`]
    pub fn keep(&self, process: &ProcessKey, deleted: Deleted) -> Result<(), Error> {
        let mut next = self.next.lock().unwrap_or_else(PoisonError::into_inner);
        let line =
            Line { seq: *next, process: process.to_string(), owner: process.task.owner.clone(), deleted };
        let path = Path::new(FILE);
        let mut text =
            serde_json::to_vec(&line).map_err(|source| Error::Malformed { path: path.to_owned(), source })?;
        text.resize(PLACE, b'\n');
        let at = (*next % PLACES) * PLACE as u64;
        self.file.write_all_at(&text, at).map_err(io_error("write", path))?;
        *next += 1;
        Ok(())
    }

    /// What the last Delete of a process has answered, or was about to. Of several containerds' processes
    /// with these names the caller's own comes first.
    pub fn find(&self, process: &ProcessKey) -> Option<Deleted> {
        let (name, owner) = (process.to_string(), &process.task.owner);
        let is_it = |line: &Line| line.process == name && (line.owner == *owner || owner.is_usual());
        let last = self.lines().filter(is_it).max_by_key(|line| (line.owner == *owner, line.seq));
        last.map(|line| line.deleted)
    }

    fn lines(&self) -> impl Iterator<Item = Line> {
        (0..PLACES).filter_map(|place| {
            let mut text = [0; PLACE];
            self.file.read_exact_at(&mut text, place * PLACE as u64).ok()?;
            serde_json::from_slice(&text).ok().filter(|line: &Line| line.seq <= MOST)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::id::{ExecId, Namespace, Owner, TaskId, TaskKey};

    fn key(exec: Option<&str>) -> ProcessKey {
        let task = TaskKey::usual(Namespace::new("n").unwrap(), TaskId::new("t").unwrap());
        ProcessKey { task, exec: exec.map(|exec| ExecId::new(exec).unwrap()) }
    }

    #[test]
    fn the_last_answer_is_found_after_a_restart() {
        let root = tempfile::tempdir().unwrap();
        let answers = Answers::open(root.path()).unwrap();
        let deleted = |pid| Deleted { pid, exit: Some(Exit { status: 7, at_usec: u64::MAX }) };
        assert_eq!(answers.find(&key(None)), None);
        for pid in 0..u32::try_from(PLACES).unwrap() + 3 {
            answers.keep(&key(None), deleted(pid)).unwrap();
        }
        answers.keep(&key(Some("e")), Deleted { pid: 0, exit: None }).unwrap();
        let again = Answers::open(root.path()).unwrap();
        assert_eq!(again.find(&key(None)), Some(deleted(u32::try_from(PLACES).unwrap() + 2)));
        assert_eq!(again.find(&key(Some("e"))), Some(Deleted { pid: 0, exit: None }));
        again.keep(&key(None), deleted(1)).unwrap();
        assert_eq!(again.find(&key(None)), Some(deleted(1)));
    }

    #[test]
    fn the_longest_names_fit_into_a_place() {
        let long = |length| "x".repeat(length);
        let task = TaskKey {
            owner: Owner::new("0123456789abcdef").unwrap(),
            namespace: Namespace::new(long(crate::id::MAX_IDENTIFIER)).unwrap(),
            id: TaskId::new(long(crate::id::MAX_IDENTIFIER)).unwrap(),
        };
        let process = ProcessKey { task, exec: Some(ExecId::new(long(crate::id::MAX_IDENTIFIER)).unwrap()) };
        let deleted = Deleted { pid: u32::MAX, exit: Some(Exit { status: u32::MAX, at_usec: u64::MAX }) };
        let line =
            Line { seq: MOST, process: process.to_string(), owner: process.task.owner.clone(), deleted };
        assert!(serde_json::to_vec(&line).unwrap().len() <= PLACE);
    }
}
