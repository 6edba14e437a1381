//! The one map of live tasks.
//!
//! The map's lock is short and never held over an await. Each task has two locks of its own: a
//! short one on its state, and one that a verb with several steps holds from its first to its last
//! (never State, Wait or Kill: they must answer while the OCI runtime hangs).

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::watch;

use crate::id::{TaskKey, UnitName};

use super::Task;
use super::phase::Exit;

/// A live task, with what memory adds to its record. `L` is what the adapters attach to it.
pub struct Entry<L> {
    /// Its name, for reading without a lock.
    pub key: TaskKey,
    /// Its unit, for reading without a lock.
    pub unit: UnitName,
    /// Held by the one verb that is changing the task.
    pub verb: tokio::sync::Mutex<()>,
    /// What belongs to the running daemon only: descriptors, pumps.
    live: Mutex<L>,
    task: Mutex<Task>,
    exit: watch::Sender<Option<Exit>>,
}

impl<L: Default> Entry<L> {
    /// A task that is in no registry: it is deleted, and only owes events.
    pub fn detached(task: Task) -> Self {
        Self::new(task)
    }

    fn new(task: Task) -> Self {
        let exit = task.init.exit();
        Self {
            key: task.key.clone(),
            unit: task.unit.clone(),
            verb: tokio::sync::Mutex::default(),
            live: Mutex::default(),
            task: Mutex::new(task),
            exit: watch::Sender::new(exit),
        }
    }
}

impl<L> Entry<L> {
    /// The state, locked for a moment. Not to be held over an await.
    pub fn task(&self) -> MutexGuard<'_, Task> {
        // A panic ends the process, so there is no poison to respect.
        self.task.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What belongs to the running daemon only, locked for a moment.
    pub fn live(&self) -> MutexGuard<'_, L> {
        self.live.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Tells all who wait how the process ended.
    pub fn wake(&self, exit: Exit) {
        self.exit.send_replace(Some(exit));
    }

    /// Resolves when the init process has ended; at once if it has.
    pub async fn ended(&self) -> Exit {
        let mut receiver = self.exit.subscribe();
        loop {
            if let Some(exit) = *receiver.borrow_and_update() {
                return exit;
            }
            // The sender lives in self: waiting can't fail while we are borrowed.
            if receiver.changed().await.is_err() {
                std::future::pending::<()>().await;
            }
        }
    }
}

/// Why a task could not be added.
#[derive(Debug, PartialEq, Eq)]
pub enum Taken {
    /// The key belongs to a live task.
    Key,
    /// The unit belongs to a live task.
    Unit,
}

struct Maps<L> {
    tasks: HashMap<TaskKey, Arc<Entry<L>>>,
    units: HashMap<UnitName, TaskKey>,
}

/// The live tasks of this node.
pub struct Registry<L> {
    maps: Mutex<Maps<L>>,
}

impl<L> Default for Registry<L> {
    fn default() -> Self {
        Self { maps: Mutex::new(Maps { tasks: HashMap::new(), units: HashMap::new() }) }
    }
}

impl<L: Default> Registry<L> {
    /// Adds a task.
    ///
    /// # Errors
    /// Its key or its unit is taken; nothing has changed.
    pub fn insert(&self, task: Task) -> Result<Arc<Entry<L>>, Taken> {
        let mut maps = self.maps();
        if maps.tasks.contains_key(&task.key) {
            return Err(Taken::Key);
        }
        if maps.units.contains_key(&task.unit) {
            return Err(Taken::Unit);
        }
        let entry = Arc::new(Entry::new(task));
        maps.units.insert(entry.unit.clone(), entry.key.clone());
        maps.tasks.insert(entry.key.clone(), entry.clone());
        Ok(entry)
    }
}

impl<L> Registry<L> {
    fn maps(&self) -> MutexGuard<'_, Maps<L>> {
        self.maps.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The task of that name.
    pub fn get(&self, key: &TaskKey) -> Option<Arc<Entry<L>>> {
        self.maps().tasks.get(key).cloned()
    }

    /// The task of that unit.
    pub fn by_unit(&self, unit: &UnitName) -> Option<Arc<Entry<L>>> {
        let maps = self.maps();
        maps.tasks.get(maps.units.get(unit)?).cloned()
    }

    /// All tasks, in no order.
    pub fn all(&self) -> Vec<Arc<Entry<L>>> {
        self.maps().tasks.values().cloned().collect()
    }

    /// Forgets a task.
    pub fn remove(&self, key: &TaskKey) {
        let mut maps = self.maps();
        if let Some(entry) = maps.tasks.remove(key) {
            maps.units.remove(&entry.unit);
        }
    }
}
