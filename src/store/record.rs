//! The files of a task's record.
//!
//! `record.json` has everything except the execs. Each exec has its own `execs/<exec>/record.json`, so that the cost of a
//! change does not depend on the number of execs. A change of both is written to the exec's file first, together with the
//! events that the change adds to the outbox. If the daemon ends before it has written `record.json`, the next daemon takes
//! the events from the exec's file: each event is in the outbox once, and in order.
//!
//! If `record.json` contains execs, the files of execs are ignored: the record has version 1, which had no such files, or
//! a write of the whole record was interrupted.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::id::{ExecId, TaskKey};
use crate::path_error::io_error;
use crate::task::Task;
use crate::task::exec::Exec;
use crate::task::outbox::Owed;

use super::files::{self, MAX_BYTES, entries, make_dir, replace, replace_by_turns};
use super::{EXECS, Error, Store};

/// The version of the records that are written. Version 1 is read as well.
pub(super) const VERSION: u32 = 2;

/// The limit for a change that the daemon can refuse. The rest of [`MAX_BYTES`] is for observations: an exit must be
/// recorded even in a large record.
const MAX_DECIDED_BYTES: usize = MAX_BYTES / 2;

pub(super) const RECORD: &str = "record.json";
pub(super) const RECORD_NEW: &str = "record.json.new";
/// The end of the name of a deleted task's record that is being written. That of the record ends with a number.
pub(super) const OWED_NEW: &str = ".new";

#[derive(Serialize)]
struct Writing<'a> {
    version: u32,
    task: &'a Task,
}

#[derive(Serialize)]
struct WritingExec<'a> {
    version: u32,
    exec: &'a Exec,
    /// The events of the change that wrote the file.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    owed: Vec<&'a Owed>,
}

#[derive(Deserialize)]
struct VersionOnly {
    version: u32,
}

#[derive(Deserialize)]
struct Reading {
    task: Task,
}

#[derive(Deserialize)]
struct ReadingExec {
    exec: Exec,
    #[serde(default)]
    owed: Vec<Owed>,
}

/// Why a record is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cause {
    /// The daemon is about to do something.
    Decision,
    /// Something has happened already.
    Observation,
}

impl Cause {
    fn limit(self) -> usize {
        match self {
            Self::Decision => MAX_DECIDED_BYTES,
            Self::Observation => MAX_BYTES,
        }
    }
}

/// A record that was read.
#[derive(Debug)]
pub struct Found {
    pub task: Task,
    /// True if [`Store::save`] can write changes. Otherwise [`Store::save_whole`] must write the record first.
    pub is_current: bool,
    /// Execs whose records can't be read. They may run.
    pub unreadable_execs: usize,
}

impl Store {
    /// Writes the difference between `before`, the content of the record, and `task`. If somebody has removed the task's
    /// directory, writes the whole record.
    ///
    /// # Errors
    /// [`Error::Io`], [`Error::TooLarge`]. A part of the change may be written then.
    pub fn save(&self, before: &Task, task: &Task, cause: Cause) -> Result<(), Error> {
        match self.save_change(before, task, cause) {
            Err(_) if !self.knows(&task.key)? => self.save_whole(task, cause),
            saved => saved,
        }
    }

    fn save_change(&self, before: &Task, task: &Task, cause: Cause) -> Result<(), Error> {
        for (id, exec) in &task.execs {
            if before.execs.get(id).is_none_or(|old| !Arc::ptr_eq(old, exec) && old != exec) {
                let new = task.outbox.since(&before.outbox);
                let owed = new.filter(|owed| owed.event.exec() == Some(id)).collect();
                self.write_exec(&task.key, id, &WritingExec { version: VERSION, exec, owed }, cause)?;
            }
        }
        let without_execs = Task { execs: before.execs.clone(), ..task.clone() };
        if without_execs != *before {
            self.write_task(&Task { execs: BTreeMap::new(), ..without_execs }, cause)?;
        }
        let removed = before.execs.keys().filter(|id| !task.execs.contains_key(id));
        removed.into_iter().try_for_each(|id| self.remove_exec_dir(&task.key, id))
    }

    /// Writes the whole record of a task, whatever is on disk, and makes its directory if there is none. The record of an exec
    /// that can't be read stays.
    ///
    /// # Errors
    /// As [`Self::save`].
    pub fn save_whole(&self, task: &Task, cause: Cause) -> Result<(), Error> {
        if !self.knows(&task.key)? {
            let dir = self.dir(&task.key);
            make_dir(&dir).map_err(io_error("create", &dir))?;
        }
        if !task.execs.is_empty() {
            // First everything in one file. The files of execs are ignored until the last step removes the execs from it.
            self.write_task(task, cause)?;
            for (id, exec) in &task.execs {
                let dir = self.exec_dir(&task.key, id);
                make_dir(&dir).map_err(io_error("create", &dir))?;
                let whole = WritingExec { version: VERSION, exec, owed: Vec::new() };
                self.write_exec(&task.key, id, &whole, cause)?;
            }
        }
        let mut unreadable = Vec::new();
        let words = entries(&self.dir(&task.key).join(EXECS))?;
        let ids = words.iter().filter_map(|word| ExecId::new(word).ok());
        for id in ids.filter(|id| !task.execs.contains_key(id)) {
            match self.load_exec(&task.key, &id) {
                Ok(Some(_)) => self.remove_exec_dir(&task.key, &id)?,
                // The exec is being added.
                Ok(None) => {}
                // The exec may run, and a later daemon may be able to read its record.
                Err(error) => unreadable.push(error),
            }
        }
        self.write_task(&Task { execs: BTreeMap::new(), ..task.clone() }, cause)?;
        for error in unreadable {
            tracing::warn!(task = %task.key, %error, "task {}: the daemon does not manage an exec, and keeps its record: {error}", task.key);
        }
        Ok(())
    }

    /// Reads a task's record, if it has one.
    ///
    /// # Errors
    /// It can't be read.
    pub fn load(&self, key: &TaskKey) -> Result<Option<Found>, Error> {
        let Some(mut found) = self.load_task(key)? else {
            return Ok(None);
        };
        if found.is_current {
            let mut events = Vec::new();
            for word in entries(&self.dir(key).join(EXECS))? {
                let Ok(id) = ExecId::new(&word) else {
                    continue;
                };
                match self.load_exec(key, &id) {
                    Ok(Some(ReadingExec { exec, owed })) => {
                        found.task.execs.insert(id, Arc::new(exec));
                        events.extend(owed);
                    }
                    // The daemon ended before it recorded the exec.
                    Ok(None) => {}
                    Err(error) => {
                        found.unreadable_execs += 1;
                        tracing::error!(%error, "can't recover an exec of task {key}: {error}");
                    }
                }
            }
            found.is_current = !found.task.catch_up(events);
        }
        Ok(Some(found))
    }

    /// Reads a task's record with one of its execs, or without execs.
    ///
    /// # Errors
    /// As [`Self::load`].
    pub fn load_with(&self, key: &TaskKey, exec: Option<&ExecId>) -> Result<Option<Task>, Error> {
        let Some(mut found) = self.load_task(key)? else {
            return Ok(None);
        };
        if let Some(id) = exec.filter(|_| found.is_current)
            && let Some(ReadingExec { exec, .. }) = self.load_exec(key, id)?
        {
            found.task.execs.insert(id.clone(), Arc::new(exec));
        }
        Ok(Some(found.task))
    }

    fn load_task(&self, key: &TaskKey) -> Result<Option<Found>, Error> {
        read_task(&self.dir(key).join(RECORD))
    }

    fn load_exec(&self, key: &TaskKey, id: &ExecId) -> Result<Option<ReadingExec>, Error> {
        let path = self.exec_dir(key, id).join(RECORD);
        let Some((text, _)) = read_versioned(&path)? else {
            return Ok(None);
        };
        parse(&path, &text).map(Some)
    }

    /// Checks whether the record of an exec can be read, if there is one.
    ///
    /// # Errors
    /// It can't be read.
    pub fn check_exec(&self, key: &TaskKey, id: &ExecId) -> Result<(), Error> {
        self.load_exec(key, id).map(drop)
    }

    fn write_task(&self, task: &Task, cause: Cause) -> Result<(), Error> {
        let dir = self.dir(&task.key);
        let text = text(&dir.join(RECORD), &Writing { version: VERSION, task }, cause)?;
        replace_by_turns(&dir.join(RECORD), &dir.join(RECORD_NEW), text)
    }

    fn write_exec(
        &self,
        key: &TaskKey,
        id: &ExecId,
        exec: &WritingExec<'_>,
        cause: Cause,
    ) -> Result<(), Error> {
        let dir = self.exec_dir(key, id);
        let text = text(&dir.join(RECORD), exec, cause)?;
        replace_by_turns(&dir.join(RECORD), &dir.join(RECORD_NEW), text)
    }
}

/// Writes the record of a deleted task, for its outbox.
pub(super) fn write_owed(dir: &Path, name: &str, task: &Task) -> Result<(), Error> {
    let path = dir.join(name);
    let task = Task { execs: BTreeMap::new(), ..task.clone() };
    let text = text(&path, &Writing { version: VERSION, task: &task }, Cause::Observation)?;
    replace(&path, &dir.join(format!("{name}{OWED_NEW}")), &text)
}

/// Reads a task's `record.json`, without the files of its execs.
pub(super) fn read_task(path: &Path) -> Result<Option<Found>, Error> {
    let Some((text, version)) = read_versioned(path)? else {
        return Ok(None);
    };
    let Reading { mut task } = parse(path, &text)?;
    task.outbox.mend();
    let is_current = version == VERSION && task.execs.is_empty();
    Ok(Some(Found { task, is_current, unreadable_execs: 0 }))
}

fn text(path: &Path, content: &impl Serialize, cause: Cause) -> Result<Vec<u8>, Error> {
    let text =
        serde_json::to_vec(content).map_err(|source| Error::NotJson { path: path.to_owned(), source })?;
    if text.len() > cause.limit() {
        return Err(Error::TooLarge { path: path.to_owned(), limit: cause.limit() });
    }
    Ok(text)
}

fn parse<T: for<'d> Deserialize<'d>>(path: &Path, text: &[u8]) -> Result<T, Error> {
    serde_json::from_slice(text).map_err(|source| Error::Malformed { path: path.to_owned(), source })
}

fn read_versioned(path: &Path) -> Result<Option<(Vec<u8>, u32)>, Error> {
    let Some(text) = files::read_by_turns(path)? else {
        return Ok(None);
    };
    let VersionOnly { version } = parse(path, &text)?;
    if version > VERSION {
        return Err(Error::Newer { path: path.to_owned(), found: version });
    }
    Ok(Some((text, version)))
}
