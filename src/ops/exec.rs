//! Exec: adds a process to a task. Nothing runs before Start.

use std::sync::Arc;

use crate::fault::{self, Point};
use crate::id::{ExecId, ProcessKey, TaskKey, UnitName};
use crate::launch::contract::PROCESS_SPEC;
use crate::oci::{metadata, process};
use crate::services::registry::{Conflict, Verb};
use crate::services::{Delivery, Entry, Error, Process, WaitsFor, exec_share};
use crate::stdio::{fifo, uri};
use crate::sys;
use crate::task::exec::{Exec, ExecPhase};
use crate::task::outbox::TaskEvent;
use crate::task::request::Stdio;
use crate::task::wiring::Wiring;
use crate::unit::name;

use super::Shim;

/// An Exec call.
#[derive(Debug)]
pub struct AddExec {
    pub task: TaskKey,
    /// The id of the new exec.
    pub exec: ExecId,
    /// Its stdio strings.
    pub stdio: Stdio,
    /// Its process spec (OCI, JSON).
    pub spec: Vec<u8>,
}

impl Shim {
    /// Records a new exec. Nothing runs before Start.
    ///
    /// # Errors
    /// The id is in use, the spec or the stdio strings are invalid, the task has ended, or it has too many execs.
    pub async fn add_exec(self: &Arc<Self>, call: AddExec, delivery: Delivery) -> Result<(), Error> {
        let AddExec { task: key, exec: id, stdio, spec } = call;
        let entry = self.tasks.created(&key)?;
        if delivery == Delivery::Replayed && entry.process(Some(&id)).is_some() {
            return Ok(());
        }
        if id.as_str() == key.id.as_str() {
            // containerd could not tell the exit events of the exec and of init apart.
            return Err(Error::ExecExists { exec: id.to_string() });
        }
        self.fds.has_room()?;
        let spec = process::ProcessSpec::read(&spec, stdio.terminal)?;
        let task = entry.task().clone();
        if task.init.phase.is_paused() || !task.init.is_alive() {
            return Err(Error::NoExecIn { phase: task.init.word() });
        }
        let log = task.runtime.log;
        let store_number = self.fds.next_number();
        let process_key = ProcessKey { task: key.clone(), exec: Some(id.clone()) };
        let read_wiring = move || {
            let wiring = uri::wiring(&stdio, log, uri::Role::Exec, fifo::kind);
            wiring.map(|wiring| (stdio, Wiring { store_number, ..wiring }))
        };
        let (stdio, wiring) = self.files.run(WaitsFor::LogFile, &process_key, read_wiring).await??;
        exec_share::check_streams(&entry.task(), &id, &wiring, &self.fds)?;
        let description = metadata::of_exec(&task.init.description, &id, &spec.args);
        let (process, _verb) = self.register_exec(&entry, &id)?;
        process.live().spec_bytes = spec.bytes();
        let exec = |unit: UnitName| {
            let logger = wiring.logger.as_ref().map(|_| name::logger(&unit)).transpose()?;
            Ok(Exec { unit, logger, stdio, wiring, description, phase: ExecPhase::Added })
        };
        let noted = exec_share::check_added(&entry)
            .map_err(Error::from)
            .and_then(|()| exec(process.unit.clone()))
            .and_then(|exec| self.note_exec(&entry, &id, exec, &spec));
        if noted.is_err() {
            self.tasks.registry.remove_exec(&entry, &id);
            // The caller gets the first error.
            let _ = self.store.remove_exec_dir(&key, &id);
        }
        noted
    }

    /// Writes the process spec of an exec, and then its record.
    fn note_exec(
        &self,
        entry: &Arc<Entry>,
        id: &ExecId,
        exec: Exec,
        spec: &process::ProcessSpec,
    ) -> Result<(), Error> {
        let dir = self.store.create_exec_dir(&entry.key, id)?;
        spec.write(&dir.join(PROCESS_SPEC))?;
        fault::point(Point::ExecPrepared);
        self.tasks.change(entry, |task| {
            task.execs.insert(id.clone(), Arc::new(exec));
            task.owe(TaskEvent::ExecAdded { exec: id.clone() }, sys::now_usec());
            Ok(Vec::new())
        })?;
        fault::point(Point::ExecNoted);
        Ok(())
    }

    /// Registers the exec under its id and the first unit name that is free.
    fn register_exec(&self, entry: &Entry, id: &ExecId) -> Result<(Arc<Process>, Verb), Error> {
        for unit in name::exec_candidates(&entry.init.unit, id) {
            match self.tasks.registry.insert_exec(entry, id, unit, None) {
                Ok(registered) => return Ok(registered),
                Err(Conflict::Key) => return Err(Error::ExecExists { exec: id.to_string() }),
                Err(Conflict::Unit) => {}
            }
        }
        Err(Error::NoUnitName { key: entry.key.clone() })
    }
}
