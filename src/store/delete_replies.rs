//! The last replies to Delete.
//!
//! Delete removes the record before its reply is sent. If the daemon ends between the two, the next daemon finds the request in
//! the request journal, and the reply in this file. The file has a fixed number of places, each within a page of a tmpfs:
//! a place is written whole or not at all.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::{Mutex, PoisonError};

use nix::fcntl::{FallocateFlags, fallocate};
use serde::{Deserialize, Serialize};

use crate::id::{Owner, ProcessKey};
use crate::path_error::io_error;
use crate::task::lifecycle::Exit;
use crate::task::optional_pid;

use super::Error;
use super::files::open_in_root;

const FILE: &str = ".answers";
/// The number of places. Fewer deletes can be between the removal of a record and the reply.
const PLACES: u64 = 256;
const PLACE: usize = 512;
/// More deletes than can ever happen. A line with a greater number was not written by this program.
const MOST: u64 = u64::MAX / 2;

/// The content of a reply to Delete.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Deleted {
    /// The pid of the process. `None` if it had none.
    #[serde(with = "optional_pid")]
    pub pid: Option<u32>,
    /// The exit of the process, if it ran.
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
pub struct DeleteReplies {
    file: File,
    next: Mutex<u64>,
}

impl DeleteReplies {
    /// Opens the file in the directory of all records. Creates both if they do not exist.
    ///
    /// # Errors
    /// [`Error::Io`]
    pub fn open(root: &Path) -> Result<Self, Error> {
        let file = open_in_root(root, FILE)?;
        // Reserves space now, so that a later Delete does not fail because the file system is full.
        if let Err(errno) = fallocate(&file, FallocateFlags::empty(), 0, PLACES as i64 * PLACE as i64) {
            tracing::warn!(%errno, "can't reserve space for {}: {errno}", root.join(FILE).display());
        }
        let mut replies = Self { file, next: Mutex::default() };
        replies.next = Mutex::new(replies.lines().map(|line| line.seq + 1).max().unwrap_or(0));
        Ok(replies)
    }

    /// Records the reply to the Delete of a process, before it is sent.
    ///
    /// # Errors
    /// [`Error::Io`]
    pub fn record(&self, process: &ProcessKey, deleted: Deleted) -> Result<(), Error> {
        let mut next = self.next.lock().unwrap_or_else(PoisonError::into_inner);
        let line =
            Line { seq: *next, process: process.to_string(), owner: process.task.owner.clone(), deleted };
        let path = Path::new(FILE);
        let mut text =
            serde_json::to_vec(&line).map_err(|source| Error::NotJson { path: path.to_owned(), source })?;
        text.resize(PLACE, b'\n');
        let at = (*next % PLACES) * PLACE as u64;
        self.file.write_all_at(&text, at).map_err(io_error("write", path))?;
        *next += 1;
        Ok(())
    }

    /// The reply to the last Delete of a process. If processes of several containerds have these names, the caller's own
    /// is preferred.
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
        let replies = DeleteReplies::open(root.path()).unwrap();
        let deleted =
            |pid: u32| Deleted { pid: Some(pid), exit: Some(Exit { status: 7, at_usec: u64::MAX }) };
        assert_eq!(replies.find(&key(None)), None);
        for pid in 1..u32::try_from(PLACES).unwrap() + 3 {
            replies.record(&key(None), deleted(pid)).unwrap();
        }
        replies.record(&key(Some("e")), Deleted { pid: None, exit: None }).unwrap();
        let again = DeleteReplies::open(root.path()).unwrap();
        assert_eq!(again.find(&key(None)), Some(deleted(u32::try_from(PLACES).unwrap() + 2)));
        assert_eq!(again.find(&key(Some("e"))), Some(Deleted { pid: None, exit: None }));
        again.record(&key(None), deleted(1)).unwrap();
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
        let deleted =
            Deleted { pid: Some(u32::MAX), exit: Some(Exit { status: u32::MAX, at_usec: u64::MAX }) };
        let line =
            Line { seq: MOST, process: process.to_string(), owner: process.task.owner.clone(), deleted };
        assert!(serde_json::to_vec(&line).unwrap().len() <= PLACE);
    }
}
