//! Exec: adds a process to a task. Nothing runs before Start.

use std::sync::Arc;
use std::time::Duration;

use crate::fault::{self, Point};
use crate::id::{ExecId, ProcessKey, TaskKey, UnitName};
use crate::launch::contract::PROCESS_SPEC;
use crate::oci::{metadata, process};
use crate::services::pending::Stored;
use crate::services::registry::{Conflict, Verb};
use crate::services::{Delivery, Entry, Error, Process, WaitsFor, exec_share};
use crate::stdio::{fifo, uri};
use crate::sys;
use crate::task::Task;
use crate::task::exec::{Exec, ExecPhase};
use crate::task::outbox::TaskEvent;
use crate::task::request::Stdio;
use crate::task::wiring::Wiring;
use crate::unit::{name, search_path};

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

/// How long a new exec waits until systemd has stopped the unit of a deleted exec that has its name.
const STOP_LIMIT: Duration = Duration::from_secs(2);

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
            return Err(Error::ExecNamedAsTask { exec: id.to_string() });
        }
        self.fds.has_room()?;
        let spec = process::ProcessSpec::read(&spec, stdio.terminal)?;
        let task = entry.task().clone();
        takes_execs(&task)?;
        let log = task.runtime.log;
        let store_number = self.fds.next_number();
        let process_key = ProcessKey { task: key.clone(), exec: Some(id.clone()) };
        let mut units = name::exec_candidates(&entry.init.unit, &id);
        let read_files = move || {
            let wiring = uri::wiring(&stdio, log, uri::Role::Exec, fifo::kind)?;
            let unit = units.find(|unit| !search_path::has_file(unit));
            Ok::<_, Error>((stdio, Wiring { store_number, ..wiring }, unit))
        };
        let read = self.files.run(WaitsFor::LogFile, &process_key, read_files).await;
        let (stdio, wiring, unit) = read.map_err(Error::busy_means_exists)??;
        // An exec with this id may have been deleted just now. After the limit, the new exec gets another unit.
        let is_free = self.tasks.registry.until_stopped(&key, |stopping| Some(stopping) == unit.as_ref());
        let _ = tokio::time::timeout(STOP_LIMIT, is_free).await;
        exec_share::check_streams(&entry.task(), &id, &wiring, &self.fds)?;
        let description = metadata::of_exec(&task.init.description, &id, &spec.program);
        // The exec may run. What follows would remove its record.
        self.store.check_exec(&key, &id)?;
        let names = name::exec_candidates(&entry.init.unit, &id);
        let taken = self.taken_names(names, wiring.logger.is_some()).await?;
        let (process, _verb) = self.register_exec(&entry, &id, unit, &taken)?;
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
            self.remove_unnoted(&entry, &id);
        }
        noted
    }

    /// Removes an exec that could not be recorded.
    fn remove_unnoted(&self, entry: &Entry, id: &ExecId) {
        {
            let _task = entry.task();
            // If the task was deleted, the directory may belong to an exec of another task with the same id.
            if let Stored::Record = entry.init.live().disk.stored {
                // The caller gets the first error.
                let _ = self.store.remove_exec_dir(&entry.key, id);
            }
        }
        // Until now, no other exec could get the id.
        self.tasks.registry.remove_exec(entry, id);
    }

    /// Writes the process spec of an exec, and then its record. Both happen under the lock of the task: a Delete removes the
    /// directory of the task under this lock.
    fn note_exec(
        &self,
        entry: &Arc<Entry>,
        id: &ExecId,
        exec: Exec,
        spec: &process::ProcessSpec,
    ) -> Result<(), Error> {
        self.tasks.change(entry, |task| {
            // Init may have ended while this call waited for the disk of the log file.
            takes_execs(task)?;
            let dir = self.store.create_exec_dir(&entry.key, id)?;
            spec.write(&dir.join(PROCESS_SPEC))?;
            fault::point(Point::ExecPrepared);
            task.execs.insert(id.clone(), Arc::new(exec));
            task.owe(TaskEvent::ExecAdded { exec: id.clone() }, sys::now_usec());
            Ok(Vec::new())
        })?;
        fault::point(Point::ExecNoted);
        Ok(())
    }

    /// Registers the exec under its id and the first unit name that neither a task has nor somebody else (`taken`), starting with
    /// the name `first`. `first` is `None` if each of the exec's names is masked or has a file.
    fn register_exec(
        &self,
        entry: &Entry,
        id: &ExecId,
        first: Option<UnitName>,
        taken: &[UnitName],
    ) -> Result<(Arc<Process>, Verb), Error> {
        let units = name::exec_candidates(&entry.init.unit, id);
        let units = units.skip_while(|unit| first.as_ref() != Some(unit));
        for unit in units.filter(|unit| !taken.contains(unit)) {
            match self.tasks.registry.insert_exec(entry, id, unit, None) {
                Ok(registered) => return Ok(registered),
                Err(Conflict::Key) => return Err(Error::ExecExists { exec: id.to_string() }),
                Err(Conflict::Deleted) => return Err(Error::UnknownTask { key: entry.key.clone() }),
                Err(Conflict::Unit) => {}
            }
        }
        Err(Error::NoUnitName { key: entry.key.clone() })
    }
}

/// Checks that execs can be added to a task.
fn takes_execs(task: &Task) -> Result<(), Error> {
    if task.init.phase.is_paused() || !task.init.is_alive() {
        return Err(Error::NoExecIn { phase: task.init.word() });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::simulation::harness::{Node, Step, World};

    /// Takes steps while a call waits for a disk, and then lets the call continue. Returns what the call returns.
    async fn meanwhile<T: Send + 'static>(
        disk: WaitsFor,
        call: impl Future<Output = T> + Send + 'static,
        steps: Vec<(Step, Node)>,
        key: &TaskKey,
    ) -> T {
        let turns = disk.all_turns(key).await;
        let called = tokio::spawn(call);
        tokio::time::sleep(Duration::from_millis(1)).await;
        for (step, node) in steps {
            step.take(node, Delivery::First).await.unwrap();
        }
        assert!(!called.is_finished());
        drop(turns);
        called.await.unwrap()
    }

    /// Adds an exec while the steps are taken, and takes more steps afterwards. Returns the error.
    fn added_meanwhile(world: &World, steps: &[Step], more: &[Step]) -> Error {
        let (call, steps, more) = (world.exec_call(), world.nodes(steps), world.nodes(more));
        let added = world.live(move |shim| async move {
            let (adding, key) = (shim.clone(), call.task.clone());
            let add = async move { adding.add_exec(call, Delivery::First).await };
            let steps = steps.into_iter().map(|(step, node)| (step, node(shim.clone()))).collect();
            let added = meanwhile(WaitsFor::LogFile, add, steps, &key).await;
            for (step, node) in more {
                step.take(node(shim.clone()), Delivery::First).await.unwrap();
            }
            added
        });
        added.unwrap().unwrap_err()
    }

    #[test]
    fn no_exec_is_added_to_a_task_that_was_deleted_meanwhile() {
        let world = World::new("exec-deleted");
        world.take(&[Step::Create, Step::Start], Delivery::First).unwrap().unwrap();
        let error = added_meanwhile(&world, &[Step::Kill, Step::Delete], &[]);
        assert!(matches!(error, Error::UnknownTask { .. }), "{error}");
        assert_eq!(world.remains(), Vec::<String>::new());
        assert_eq!(world.events(), ["create", "start", "exit", "delete"]);
    }

    #[test]
    fn an_exec_that_was_not_added_to_a_deleted_task_does_not_take_the_unit_of_another() {
        let world = World::new("exec-namesake");
        world.take(&[Step::Create, Step::Start], Delivery::First).unwrap().unwrap();
        let steps = [Step::Kill, Step::Delete, Step::Create, Step::Start];
        // The exec of the new task gets the unit that it would have got in a new daemon.
        let more =
            [Step::AddExec, Step::StartExec, Step::EndExec, Step::DeleteExec, Step::Kill, Step::Delete];
        let error = added_meanwhile(&world, &steps, &more);
        assert!(matches!(error, Error::UnknownTask { .. }), "{error}");
        assert_eq!(world.remains(), Vec::<String>::new());
    }

    #[test]
    fn no_exec_is_added_to_a_task_whose_init_process_has_ended_or_is_frozen_meanwhile() {
        for (step, phase) in [(Step::Kill, "stopped"), (Step::Pause, "paused")] {
            let world = World::new(&format!("exec-{phase}"));
            world.take(&[Step::Create, Step::Start], Delivery::First).unwrap().unwrap();
            let error = added_meanwhile(&world, &[step], &[]);
            assert!(matches!(error, Error::NoExecIn { phase: found } if found == phase), "{error}");
            assert!(!world.events().contains(&"exec-added"));
            let dir =
                crate::store::Store::new(world.state_dir()).exec_dir(&world.task, &world.exec_call().exec);
            assert!(!dir.exists());
        }
    }

    #[test]
    fn no_exec_is_started_in_a_task_whose_init_process_has_ended_meanwhile() {
        let world = World::new("exec-start-late");
        world.take(&[Step::Create, Step::Start, Step::AddExec], Delivery::First).unwrap().unwrap();
        let (exec, steps) = (world.exec(), world.nodes(&[Step::Kill]));
        let started = world.live(move |shim| async move {
            let (starting, key) = (shim.clone(), exec.task.clone());
            let start = async move { starting.start(&exec, Delivery::Replayed).await };
            let steps = steps.into_iter().map(|(step, node)| (step, node(shim.clone()))).collect();
            meanwhile(WaitsFor::Disk, start, steps, &key).await
        });
        assert!(matches!(started, Some(Err(Error::InitGone { .. }))), "{started:?}");
        assert_eq!(world.events(), ["create", "start", "exec-added", "exit"]);
    }
}
