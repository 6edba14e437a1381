//! The one map of live tasks.
//!
//! The map has a lock, each task has a lock for its execs and a lock for its state, and each process has a lock for its live
//! side. These locks are held for a short time, never over an await, and are taken in this order: map, execs, state
//! ([`Entry::task`]), live side ([`Process::live`]). No code holds the locks of two live sides. In tests, the locks check
//! their order (`ordered`).
//!
//! In addition, an operation with several steps holds `verb` of its process from its first step to its last. State, Wait
//! and Kill do not: they must answer while the OCI runtime hangs.

use std::collections::HashMap;
use std::sync::Arc;

use tokio::sync::{SetOnce, watch};

use crate::id::{ExecId, Owner, ProcessKey, TaskKey, UnitName};

use crate::task::Task;
use crate::task::lifecycle::Exit;

use super::ordered::{Guard, Ordered};

/// The ranks of the locks, which are taken in this order. A thread holds one lock of each rank at most.
const MAP: u8 = 0;
const EXECS: u8 = 1;
const STATE: u8 = 2;
const LIVE: u8 = 3;

/// A process in memory: init, or an exec. `L` is what the adapters attach to it.
pub struct Process<L> {
    /// Its name.
    pub key: ProcessKey,
    pub unit: UnitName,
    /// Held by the operation that changes the process. There is one at a time.
    pub verb: Arc<tokio::sync::Mutex<()>>,
    /// What belongs to the running daemon only: descriptors, pumps.
    live: Ordered<L, LIVE>,
    end: Arc<SetOnce<Completion>>,
}

/// How the life of a process ended, for calls that wait for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Completion {
    /// It has ended.
    Exited(Exit),
    /// It was deleted without ever having run.
    Deleted,
}

impl<L: Default> Process<L> {
    fn new(key: ProcessKey, unit: UnitName, exit: Option<Exit>) -> Arc<Self> {
        Arc::new(Self {
            key,
            unit,
            verb: Arc::default(),
            live: Ordered::default(),
            end: Arc::new(SetOnce::new_with(exit.map(Completion::Exited))),
        })
    }
}

impl<L> Process<L> {
    /// What belongs to the running daemon only, locked for a moment. Not to be held over an await.
    pub fn live(&self) -> Guard<'_, L> {
        self.live.lock()
    }

    /// The id of the exec. `None` for an init process.
    pub fn exec(&self) -> Option<&ExecId> {
        self.key.exec.as_ref()
    }

    /// True if the end of the process is known.
    pub fn has_ended(&self) -> bool {
        self.end.initialized()
    }

    /// Wakes all calls that wait for the process. Only the first completion counts.
    pub fn wake(&self, end: Completion) {
        // Fails if it is not the first.
        let _ = self.end.set(end);
    }

    /// Resolves when the process has ended; at once if it has.
    pub fn ended(&self) -> impl Future<Output = Completion> + Send + use<L> {
        let end = self.end.clone();
        async move { *end.wait().await }
    }
}

/// A live task, with what memory adds to its record.
pub struct Entry<L> {
    /// Its name.
    pub key: TaskKey,
    /// Its first process.
    pub init: Arc<Process<L>>,
    /// Locked while the limits of the container change.
    pub limits: tokio::sync::Mutex<()>,
    execs: Ordered<HashMap<ExecId, Arc<Process<L>>>, EXECS>,
    task: Ordered<Task, STATE>,
}

impl<L: Default> Entry<L> {
    /// A task that is in no registry: it is deleted, and only owes events.
    pub fn detached(task: Task) -> Self {
        Self::new(task)
    }

    fn new(task: Task) -> Self {
        let key = task.key.init();
        Self {
            key: task.key.clone(),
            init: Process::new(key, task.init.unit.clone(), task.init.exit()),
            limits: tokio::sync::Mutex::default(),
            execs: Ordered::default(),
            task: Ordered::new(task),
        }
    }
}

impl<L> Entry<L> {
    /// The state, locked for a moment. Not to be held over an await.
    pub fn task(&self) -> Guard<'_, Task> {
        self.task.lock()
    }

    /// True if the record has the end of a process.
    pub fn has_recorded_end(&self, process: &Process<L>) -> bool {
        self.task().process(process.exec()).is_some_and(|process| process.exit().is_some())
    }

    /// True if `process` is one of this task, and the record does not have its end. A process that was deleted does not run,
    /// even if another one has the same id.
    pub fn still_runs(&self, process: &Arc<Process<L>>) -> bool {
        let is_there = self.process(process.exec()).is_some_and(|found| Arc::ptr_eq(&found, process));
        is_there && !self.has_recorded_end(process)
    }

    fn execs_map(&self) -> Guard<'_, HashMap<ExecId, Arc<Process<L>>>> {
        self.execs.lock()
    }

    /// A process: the exec with that id, or the init process.
    pub fn process(&self, exec: Option<&ExecId>) -> Option<Arc<Process<L>>> {
        match exec {
            None => Some(self.init.clone()),
            Some(exec) => self.execs_map().get(exec).cloned(),
        }
    }

    /// All its processes, init last.
    pub fn processes(&self) -> Vec<Arc<Process<L>>> {
        let mut processes = self.execs();
        processes.push(self.init.clone());
        processes
    }

    /// Its execs, in no order.
    pub fn execs(&self) -> Vec<Arc<Process<L>>> {
        self.execs_map().values().cloned().collect()
    }
}

/// The lock of a process that an operation holds while it changes the process.
pub type Verb = tokio::sync::OwnedMutexGuard<()>;

/// Why a task or an exec could not be added.
#[derive(Debug, PartialEq, Eq)]
pub enum Conflict {
    /// Another live task or exec has the id.
    Key,
    /// Another live task or exec has the unit, or a deleted exec had it and systemd is still stopping it.
    Unit,
    /// The task of the exec was deleted.
    Deleted,
}

/// A process and its task.
pub type Found<L> = (Arc<Entry<L>>, Arc<Process<L>>);

struct Maps<L> {
    tasks: HashMap<TaskKey, Arc<Entry<L>>>,
    /// How many tasks each containerd has.
    owners: HashMap<Owner, usize>,
    units: HashMap<UnitName, ProcessKey>,
    /// The units of deleted execs that systemd is still stopping, and what resolves once they are stopped.
    stopping: HashMap<UnitName, (TaskKey, watch::Receiver<()>)>,
}

/// While this exists, no other exec gets the unit of a deleted exec.
pub struct Stopping<L> {
    registry: Arc<Registry<L>>,
    unit: UnitName,
    /// Its end wakes those who wait for the unit.
    _stopped: watch::Sender<()>,
}

impl<L> Drop for Stopping<L> {
    fn drop(&mut self) {
        self.registry.maps().stopping.remove(&self.unit);
    }
}

/// The most units of deleted execs of one task that systemd is still stopping.
const MOST_STOPPING: usize = 64;

/// The live tasks of this node.
pub struct Registry<L> {
    maps: Ordered<Maps<L>, MAP>,
}

impl<L> Default for Registry<L> {
    fn default() -> Self {
        Self {
            maps: Ordered::new(Maps {
                tasks: HashMap::new(),
                owners: HashMap::new(),
                units: HashMap::new(),
                stopping: HashMap::new(),
            }),
        }
    }
}

impl<L: Default> Registry<L> {
    /// Adds a task without its execs, for which [`Self::insert_exec`] is called. Returns the task with its verb lock, so that no
    /// other operation can begin first.
    ///
    /// # Errors
    /// Its key or its unit is taken; nothing has changed.
    pub fn insert(&self, task: Task) -> Result<(Arc<Entry<L>>, Verb), Conflict> {
        let mut maps = self.maps();
        if maps.tasks.contains_key(&task.key) {
            return Err(Conflict::Key);
        }
        if maps.units.contains_key(&task.init.unit) {
            return Err(Conflict::Unit);
        }
        let entry = Arc::new(Entry::new(task));
        // Nobody else knows the new process, so the lock is free.
        let verb = entry.init.verb.clone().try_lock_owned().map_err(|_| Conflict::Key)?;
        maps.units.insert(entry.init.unit.clone(), entry.init.key.clone());
        *maps.owners.entry(entry.key.owner.clone()).or_default() += 1;
        maps.tasks.insert(entry.key.clone(), entry.clone());
        Ok((entry, verb))
    }

    /// Adds an exec to a task, as [`Self::insert`] adds a task.
    ///
    /// # Errors
    /// Its id or its unit is taken, or the task was deleted; nothing has changed.
    pub fn insert_exec(
        &self,
        entry: &Entry<L>,
        id: &ExecId,
        unit: UnitName,
        exit: Option<Exit>,
    ) -> Result<(Arc<Process<L>>, Verb), Conflict> {
        let mut maps = self.maps();
        // Nothing would ever remove the unit of the exec from the map.
        if !maps.tasks.get(&entry.key).is_some_and(|found| std::ptr::eq(&**found, entry)) {
            return Err(Conflict::Deleted);
        }
        let mut execs = entry.execs_map();
        if execs.contains_key(id) {
            return Err(Conflict::Key);
        }
        if maps.units.contains_key(&unit) || maps.stopping.contains_key(&unit) {
            return Err(Conflict::Unit);
        }
        let key = ProcessKey { task: entry.key.clone(), exec: Some(id.clone()) };
        let process = Process::new(key, unit, exit);
        let verb = process.verb.clone().try_lock_owned().map_err(|_| Conflict::Key)?;
        maps.units.insert(process.unit.clone(), process.key.clone());
        execs.insert(id.clone(), process.clone());
        Ok((process, verb))
    }
}

impl<L> Registry<L> {
    fn maps(&self) -> Guard<'_, Maps<L>> {
        self.maps.lock()
    }

    pub fn get(&self, key: &TaskKey) -> Option<Arc<Entry<L>>> {
        self.maps().tasks.get(key).cloned()
    }

    /// The tasks of other containerds with the same namespace and id.
    pub fn namesakes(&self, key: &TaskKey) -> Vec<Arc<Entry<L>>> {
        let maps = self.maps();
        let others = maps.owners.keys().filter(|owner| **owner != key.owner);
        others.filter_map(|owner| maps.tasks.get(&key.of(owner.clone())).cloned()).collect()
    }

    /// The process with that unit.
    pub fn by_unit(&self, unit: &UnitName) -> Option<Found<L>> {
        let maps = self.maps();
        let key = maps.units.get(unit)?;
        let entry = maps.tasks.get(&key.task)?.clone();
        let process = entry.process(key.exec.as_ref())?;
        Some((entry, process))
    }

    /// The number of tasks.
    pub fn len(&self) -> usize {
        self.maps().tasks.len()
    }

    /// Whether `is` returns true for one of the tasks.
    pub fn any(&self, mut is: impl FnMut(&Entry<L>) -> bool) -> bool {
        self.maps().tasks.values().any(|entry| is(entry))
    }

    /// All tasks, in no order.
    pub fn all(&self) -> Vec<Arc<Entry<L>>> {
        self.maps().tasks.values().cloned().collect()
    }

    /// Reserves the unit of an exec that is about to be deleted: no other exec gets it until systemd has stopped it. `None` if
    /// the task has many such units: then the Delete has to wait until the unit is stopped.
    pub fn stopping(self: &Arc<Self>, process: &Process<L>) -> Option<Stopping<L>> {
        let mut maps = self.maps();
        let task = &process.key.task;
        if maps.stopping.values().filter(|(other, _)| other == task).count() >= MOST_STOPPING {
            return None;
        }
        let (sender, receiver) = watch::channel(());
        maps.stopping.insert(process.unit.clone(), (task.clone(), receiver));
        Some(Stopping { registry: self.clone(), unit: process.unit.clone(), _stopped: sender })
    }

    /// Waits until systemd has stopped the units of all deleted execs of a task for which `is_meant` returns true.
    pub async fn until_stopped(&self, task: &TaskKey, is_meant: impl Fn(&UnitName) -> bool) {
        let stopping: Vec<_> = {
            let maps = self.maps();
            let of_task = maps.stopping.iter().filter(|(unit, (other, _))| other == task && is_meant(unit));
            of_task.map(|(_, (_, stopped))| stopped.clone()).collect()
        };
        for mut stopped in stopping {
            // Nothing is sent: the end of the sender is the message.
            while stopped.changed().await.is_ok() {}
        }
    }

    /// Removes a task and its execs, and wakes the calls that still wait for one of them.
    pub fn remove(&self, key: &TaskKey) {
        let mut maps = self.maps();
        if let Some(entry) = maps.tasks.remove(key) {
            if let Some(tasks) = maps.owners.get_mut(&key.owner) {
                *tasks -= 1;
            }
            maps.owners.retain(|_, tasks| *tasks > 0);
            let execs = std::mem::take(&mut *entry.execs_map());
            for process in execs.into_values().chain([entry.init.clone()]) {
                maps.units.remove(&process.unit);
                process.wake(Completion::Deleted);
            }
        }
    }

    /// Removes an exec, and wakes the calls that still wait for it.
    pub fn remove_exec(&self, entry: &Entry<L>, id: &ExecId) {
        let mut maps = self.maps();
        if let Some(process) = entry.execs_map().remove(id) {
            maps.units.remove(&process.unit);
            process.wake(Completion::Deleted);
        }
    }
}
