//! Why operations have failed whose replies may not have been sent.
//!
//! A failed Create removes its record, and a failed Start changes it back, before the reply is sent. If the daemon ends between
//! the two, the next daemon finds the request in the request journal, and its error in this file. Without the file, the next
//! daemon would begin the operation once more. The file has a fixed number of places of one page each: a place is written
//! whole or not at all.

use std::collections::HashMap;
use std::fs::File;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};

use crate::id::{Owner, ProcessKey};
use crate::path_error::io_error;
use crate::text;

use super::Error;
use super::files::open_in_root;

const FILE: &str = ".failures";
/// The number of places. Fewer operations can be between their failure and the reply.
const PLACES: u64 = 64;
const PLACE: usize = 4096;
/// The longest text of an error, in bytes, and the longest one if JSON escapes every byte of it.
const TEXT: usize = 2500;
const ESCAPED_TEXT: usize = 400;
/// More failures than can ever happen. A line with a greater number was not written by this program.
const MOST: u64 = u64::MAX / 2;

/// What distinguishes the attempts to create or start a process with the same name: the file system and the inode of a
/// directory that is made anew for each process, and the number of the call.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Attempt {
    device: u64,
    inode: u64,
    /// `None` if there was no call, or an earlier version has noted the attempt.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    call: Option<u64>,
}

impl Attempt {
    /// The attempt of a call, to which this directory belongs. `None` if there is no such directory.
    pub fn of(dir: &Path, call: Option<u64>) -> Option<Self> {
        let found = std::fs::metadata(dir).ok()?;
        Some(Self { device: found.dev(), inode: found.ino(), call })
    }

    /// True if this may be the same attempt, as far as its call is known.
    fn is_same(self, other: Self) -> bool {
        let is_same_call = self.call.is_none() || other.call.is_none() || self.call == other.call;
        (self.device, self.inode) == (other.device, other.inode) && is_same_call
    }
}

/// The reply to an operation that has failed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failure {
    /// The status code.
    pub code: i32,
    /// The text.
    pub text: String,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
struct Line {
    seq: u64,
    process: String,
    owner: Owner,
    attempt: Attempt,
    #[serde(flatten)]
    failure: Failure,
}

/// A process: its name, and the containerd of its task.
type Key = (String, Owner);

#[derive(Debug, Default)]
struct State {
    /// The number of the next line.
    next: u64,
    /// The last line of each process.
    lines: HashMap<Key, Line>,
}

/// The file.
#[derive(Debug)]
pub struct Failures {
    file: File,
    state: Mutex<State>,
}

impl Failures {
    /// Opens the file in the directory of all records. Creates both if they do not exist.
    ///
    /// # Errors
    /// [`Error::Io`]
    pub fn open(root: &Path) -> Result<Self, Error> {
        let file = open_in_root(root, FILE)?;
        let mut state = State::default();
        let mut lines: Vec<Line> = (0..PLACES).filter_map(|place| read(&file, place)).collect();
        lines.sort_by_key(|line| line.seq);
        for line in lines {
            state.next = line.seq + 1;
            state.lines.insert((line.process.clone(), line.owner.clone()), line);
        }
        Ok(Self { file, state: Mutex::new(state) })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes the reply to a failed operation on a process, before the reply is sent.
    ///
    /// # Errors
    /// [`Error::Io`]
    pub fn note(&self, process: &ProcessKey, attempt: Attempt, failure: Failure) -> Result<(), Error> {
        let mut state = self.state();
        let (seq, key) = (state.next, key(process));
        let encoded = |limit| {
            let failure = Failure { text: text::shortened(failure.text.clone(), limit), ..failure };
            let line = Line { seq, process: key.0.clone(), owner: key.1.clone(), attempt, failure };
            serde_json::to_vec(&line).map(|text| (line, text))
        };
        let not_json = |source| Error::NotJson { path: FILE.into(), source };
        let (mut line, mut bytes) = encoded(TEXT).map_err(not_json)?;
        if bytes.len() > PLACE {
            (line, bytes) = encoded(ESCAPED_TEXT).map_err(not_json)?;
        }
        self.write(seq, bytes)?;
        state.next += 1;
        state.lines.retain(|_, other| other.seq + PLACES > seq);
        state.lines.insert(key, line);
        Ok(())
    }

    /// Forgets the reply to the last failed operation on a process: its client has begun another one.
    pub fn forget(&self, process: &ProcessKey) {
        if let Some(line) = self.state().lines.remove(&key(process)) {
            // The file is not the only thing that tells two attempts apart.
            let _ = self.write(line.seq, Vec::new());
        }
    }

    /// The reply to the last failed operation on a process, if it belongs to this attempt.
    pub fn find(&self, process: &ProcessKey, attempt: Attempt) -> Option<Failure> {
        let state = self.state();
        let line = state.lines.get(&key(process)).filter(|line| line.attempt.is_same(attempt));
        line.map(|line| line.failure.clone())
    }

    fn write(&self, seq: u64, mut text: Vec<u8>) -> Result<(), Error> {
        text.resize(PLACE, b'\n');
        let written = self.file.write_all_at(&text, (seq % PLACES) * PLACE as u64);
        Ok(written.map_err(io_error("write", Path::new(FILE)))?)
    }
}

fn key(process: &ProcessKey) -> Key {
    (process.to_string(), process.task.owner.clone())
}

fn read(file: &File, place: u64) -> Option<Line> {
    let mut text = [0; PLACE];
    file.read_exact_at(&mut text, place * PLACE as u64).ok()?;
    serde_json::from_slice(&text).ok().filter(|line: &Line| line.seq <= MOST)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::id::{ExecId, MAX_IDENTIFIER, Namespace, TaskId, TaskKey};

    fn process(id: &str) -> ProcessKey {
        TaskKey::usual(Namespace::new("n").unwrap(), TaskId::new(id).unwrap()).init()
    }

    fn attempt(inode: u64) -> Attempt {
        Attempt { device: u64::MAX, inode, call: None }
    }

    fn called(call: u64) -> Attempt {
        Attempt { call: Some(call), ..attempt(u64::MAX) }
    }

    fn failure(text: &str) -> Failure {
        Failure { code: 2, text: text.to_owned() }
    }

    #[test]
    fn the_last_failure_of_an_attempt_is_found_after_a_restart() {
        let root = tempfile::tempdir().unwrap();
        let failures = Failures::open(root.path()).unwrap();
        failures.note(&process("a"), attempt(1), failure("first")).unwrap();
        failures.note(&process("a"), attempt(1), failure("second")).unwrap();
        failures.note(&process("b"), attempt(1), failure("other")).unwrap();
        for failures in [failures, Failures::open(root.path()).unwrap()] {
            assert_eq!(failures.find(&process("a"), attempt(1)), Some(failure("second")));
            assert_eq!(failures.find(&process("a"), attempt(2)), None);
            assert_eq!(failures.find(&process("c"), attempt(1)), None);
        }
    }

    #[test]
    fn a_call_does_not_get_the_failure_of_another_call() {
        let root = tempfile::tempdir().unwrap();
        let failures = Failures::open(root.path()).unwrap();
        failures.note(&process("a"), called(7), failure("why")).unwrap();
        failures.note(&process("b"), attempt(u64::MAX), failure("why")).unwrap();
        for failures in [failures, Failures::open(root.path()).unwrap()] {
            let is_found = |id, attempt| failures.find(&process(id), attempt).is_some();
            assert_eq!(
                [called(7), called(8), attempt(u64::MAX)].map(|by| is_found("a", by)),
                [true, false, true]
            );
            // An earlier version has noted it, or there was no call.
            assert!(is_found("b", called(7)));
        }
    }

    #[test]
    fn a_failure_is_forgotten_for_good() {
        let root = tempfile::tempdir().unwrap();
        let failures = Failures::open(root.path()).unwrap();
        failures.note(&process("a"), attempt(1), failure("first")).unwrap();
        failures.forget(&process("a"));
        assert_eq!(failures.find(&process("a"), attempt(1)), None);
        assert_eq!(Failures::open(root.path()).unwrap().find(&process("a"), attempt(1)), None);
    }

    #[test]
    fn more_failures_than_places_take_the_place_of_the_oldest_ones() {
        let root = tempfile::tempdir().unwrap();
        let failures = Failures::open(root.path()).unwrap();
        for number in 0..PLACES + 3 {
            failures.note(&process(&format!("t{number}")), attempt(1), failure("why")).unwrap();
        }
        for failures in [failures, Failures::open(root.path()).unwrap()] {
            assert_eq!(failures.find(&process("t2"), attempt(1)), None);
            assert_eq!(failures.find(&process("t3"), attempt(1)), Some(failure("why")));
            assert_eq!(failures.state().next, PLACES + 3);
        }
    }

    #[test]
    fn the_longest_names_and_texts_fit_into_a_place() {
        let root = tempfile::tempdir().unwrap();
        let failures = Failures::open(root.path()).unwrap();
        let long = |length| "x".repeat(length);
        let task = TaskKey {
            owner: Owner::new("0123456789abcdef").unwrap(),
            namespace: Namespace::new(long(MAX_IDENTIFIER)).unwrap(),
            id: TaskId::new(long(MAX_IDENTIFIER)).unwrap(),
        };
        let process = ProcessKey { task, exec: Some(ExecId::new(long(MAX_IDENTIFIER)).unwrap()) };
        for (text, kept) in [("x".repeat(9000), TEXT), ("\u{1}".repeat(9000), ESCAPED_TEXT)] {
            failures.note(&process, called(u64::MAX), failure(&text)).unwrap();
            let found = Failures::open(root.path()).unwrap().find(&process, called(u64::MAX)).unwrap();
            assert_eq!(found.text, text::shortened(text, kept));
        }
    }
}
