//! The live tasks of this node, with their records and outboxes.

use std::collections::HashSet;
use std::sync::Arc;

use tokio::sync::{Notify, mpsc};

use crate::fault::{self, Point};
use crate::id::{ProcessKey, TaskKey, UnitName};
use crate::store::Store;
use crate::task::Task;
use crate::task::outbox::TaskEvent;

use super::pending::{Owings, Unwritten};
use super::publishing::Publishing;
use super::registry::Registry;
use super::{Entry, Error, Live, Process};

/// The live tasks of this node. `changes` is how they change.
pub struct Tasks {
    /// The tasks by their names and units.
    pub(crate) registry: Arc<Registry<Live>>,
    /// Their records.
    pub(super) store: Store,
    /// Tasks that owe events, for the publisher.
    outgoing: mpsc::UnboundedSender<Arc<Entry>>,
    /// Tasks whose records could not be written.
    pub(super) unwritten: Unwritten<Arc<Entry>>,
    /// Notified of each task that is removed.
    pub(crate) removed: Arc<Notify>,
    /// Deleted tasks that owe events.
    pub(crate) owings: Owings,
    /// What the publisher and the calls know of each other.
    pub publishing: Publishing,
}

/// An event in containerd's order, with what the publisher has to know.
pub struct Outgoing {
    /// Its place in the task's order.
    pub seq: u64,
    /// When it happened, in microseconds since 1970.
    pub at_usec: u64,
    /// What happened.
    pub event: TaskEvent,
    /// The task as it is now.
    pub task: Task,
}

impl Tasks {
    /// Makes an empty collection. The returned receiver yields the tasks that owe events. It holds each task at most once;
    /// the events are in the outboxes.
    pub(crate) fn new(store: Store) -> (Self, mpsc::UnboundedReceiver<Arc<Entry>>) {
        let (outgoing, receiver) = mpsc::unbounded_channel();
        let tasks = Self {
            registry: Arc::default(),
            store,
            outgoing,
            unwritten: Unwritten::default(),
            removed: Arc::default(),
            owings: Owings::default(),
            publishing: Publishing::default(),
        };
        (tasks, receiver)
    }

    /// How many tasks there are.
    pub fn count(&self) -> usize {
        self.registry.len()
    }

    /// Whether a task is in a slice, or in one below it.
    pub fn uses_slice(&self, slice: &UnitName) -> bool {
        let stem = slice.as_str().trim_end_matches(".slice");
        let is_in = |used: &str| {
            used.strip_prefix(stem).is_some_and(|rest| rest == ".slice" || rest.starts_with('-'))
        };
        self.registry.any(|entry| is_in(entry.task().placement.slice().as_str()))
    }

    /// The unit of the sandbox that the shim has made for the pod of a container. `None` for the sandbox itself, and for a
    /// pod whose sandbox is a container.
    pub(crate) fn sandbox_of(&self, task: &Task) -> Option<UnitName> {
        fn pod(task: &Task) -> Option<(&UnitName, &str)> {
            let mut fields = task.fields.iter();
            let (_, uid) = fields.find(|(field, _)| field == "POD_UID")?;
            Some((task.placement.slice(), uid.as_str()))
        }
        let own = pod(task)?;
        let all = self.registry.all();
        all.iter().filter(|entry| entry.key != task.key).find_map(|entry| {
            let other = entry.task();
            let is_sandbox = other.request.sandbox.is_some() && pod(&other) == Some(own);
            is_sandbox.then(|| other.unit().clone())
        })
    }

    /// The addresses of all containerds that have tasks, or that deleted tasks owe events.
    pub fn containerds(&self) -> HashSet<String> {
        let all = self.registry.all();
        let of_tasks = all.iter().map(|entry| entry.task().containerd.ttrpc_address.clone());
        of_tasks.chain(self.owings.addresses()).collect()
    }

    /// A task, also one whose Create is under way.
    pub(crate) fn entry(&self, key: &TaskKey) -> Result<Arc<Entry>, Error> {
        self.registry.get(key).ok_or_else(|| Error::UnknownTask { key: key.clone() })
    }

    /// A task whose Create has completed. Until then other calls get "not found".
    pub(crate) fn created(&self, key: &TaskKey) -> Result<Arc<Entry>, Error> {
        let entry = self.entry(key)?;
        if entry.task().init.phase.is_creating() {
            return Err(Error::UnknownTask { key: key.clone() });
        }
        Ok(entry)
    }

    /// A process of a task that has been created.
    pub(crate) fn process(&self, key: &ProcessKey) -> Result<(Arc<Entry>, Arc<Process>), Error> {
        let entry = self.created(&key.task)?;
        let process = entry.process(key.exec.as_ref());
        let process = process.ok_or_else(|| Error::UnknownExec { key: key.clone() })?;
        Ok((entry, process))
    }

    /// Whether this is still the registered task of its key.
    pub(crate) fn is_live(&self, entry: &Arc<Entry>) -> bool {
        self.registry.get(&entry.key).is_some_and(|found| Arc::ptr_eq(&found, entry))
    }

    /// Whether this is still the registered process of its key.
    pub(crate) fn is_live_process(&self, entry: &Arc<Entry>, process: &Arc<Process>) -> bool {
        let found = entry.process(process.exec());
        self.is_live(entry) && found.is_some_and(|found| Arc::ptr_eq(&found, process))
    }

    /// Removes a task from memory, and wakes those who wait for its processes.
    pub(crate) fn remove(&self, key: &TaskKey) {
        self.registry.remove(key);
        self.removed.notify_one();
    }

    /// Tells the publisher that a task may owe events.
    pub(crate) fn announce(&self, entry: &Arc<Entry>) {
        if entry.task().outbox.is_empty() {
            return;
        }
        if !std::mem::replace(&mut entry.init.live().is_announced, true) {
            // The publisher runs as long as the daemon.
            let _ = self.outgoing.send(entry.clone());
        }
    }

    /// The publisher calls this before it reads the outbox of a task. Later events announce the task again.
    pub fn begin_publishing(&self, entry: &Entry) {
        entry.init.live().is_announced = false;
    }

    /// The event that a task has to publish before any other.
    pub fn first_owed(&self, entry: &Entry) -> Option<Outgoing> {
        let task = entry.task();
        let owed = task.outbox.first()?.clone();
        Some(Outgoing { seq: owed.seq, at_usec: owed.at_usec, event: owed.event, task: task.clone() })
    }

    /// containerd has accepted a task's event.
    pub fn accepted(&self, entry: &Arc<Entry>, seq: u64) {
        fault::point(Point::PublishTaken);
        self.note_accepted(entry, seq);
        self.publishing.note_accepted();
        fault::point(Point::PublishNoted);
    }
}

#[cfg(test)]
mod tests {
    use crate::services::Delivery;
    use crate::simulation::harness::{Step, World};

    #[test]
    fn a_task_that_owes_many_events_waits_for_the_publisher_once() {
        let world = World::new("announced");
        world.take(&[Step::Create, Step::Start], Delivery::First).unwrap().unwrap();
        let init = world.init();
        let counts = world.live(move |shim| async move {
            let (entry, _) = shim.tasks.process(&init).unwrap();
            let (tasks, mut outgoing) = super::Tasks::new(shim.tasks.store.clone());
            entry.task().note_oom_kills(50, 1);
            let count = |outgoing: &mut tokio::sync::mpsc::UnboundedReceiver<_>| {
                std::iter::from_fn(|| outgoing.try_recv().ok()).count()
            };
            (0..1000).for_each(|_| tasks.announce(&entry));
            let first = count(&mut outgoing);
            // Events that come while the publisher works announce the task again, once.
            tasks.begin_publishing(&entry);
            (0..1000).for_each(|_| tasks.announce(&entry));
            (first, count(&mut outgoing))
        });
        assert_eq!(counts, Some((1, 1)));
    }
}
