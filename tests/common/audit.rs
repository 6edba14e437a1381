//! Collects all events of a run and checks them: they are in order, each comes once or is repeated unchanged, and no event is
//! superfluous.

use std::collections::{HashMap, HashSet};

use super::events::Event;

/// The events of one task.
#[derive(Default)]
pub struct Audit {
    tasks: HashMap<String, Vec<Event>>,
    /// Number of events that were repeated without a change.
    pub repeats: usize,
}

impl Audit {
    pub fn add(&mut self, event: Event) {
        let Some(container) = event.container() else { return };
        let seen = self.tasks.entry(container.to_string()).or_default();
        if seen.contains(&event) {
            self.repeats += 1;
        } else {
            seen.push(event);
        }
    }

    pub fn containers(&self) -> impl Iterator<Item = &String> {
        self.tasks.keys()
    }

    /// The container's events without exact repeats.
    pub fn of(&self, container: &str) -> &[Event] {
        self.tasks.get(container).map(Vec::as_slice).unwrap_or_default()
    }

    pub fn is_deleted(&self, container: &str) -> bool {
        self.of(container).iter().any(|event| matches!(event, Event::Delete(_)))
    }

    /// The status of the exit of a process, which is an exec's id or the container's own.
    pub fn exit_of(&self, container: &str, process: &str) -> Option<u32> {
        self.of(container).iter().find_map(|event| match event {
            Event::Exit(exit) if exit.id == process => Some(exit.exit_status),
            _ => None,
        })
    }

    /// The statuses of all exits of the container's init process.
    pub fn exits_of(&self, container: &str) -> Vec<u32> {
        let exits = self.of(container).iter().filter_map(|event| match event {
            Event::Exit(exit) if exit.id == container => Some(exit.exit_status),
            _ => None,
        });
        exits.collect()
    }

    /// All faults in the order or the number of a container's events. Does not find missing events: only the caller
    /// knows which events must exist.
    pub fn faults(&self, container: &str) -> Vec<String> {
        let events: Vec<&Event> = self.of(container).iter().collect();
        faults_in(container, &events)
    }

    /// As [`Self::faults`], for a sandbox that ended with this status. When a sandbox is removed, containerd 2.1
    /// publishes an exit and a delete of its own: it takes the end of the connection for the end of a shim
    /// (`cleanupAfterDeadShim`). These events come before or after those of the shim. An exit with a third status is
    /// a fault.
    pub fn faults_of_sandbox(&self, sandbox: &str, status: u32) -> Vec<String> {
        let all = self.of(sandbox);
        let is_own = |event: &Event| match event {
            Event::Exit(exit) => exit.exit_status == status,
            Event::Delete(delete) => delete.exit_status == status,
            _ => true,
        };
        let deletes = all.iter().filter(|event| matches!(event, Event::Delete(_))).count();
        let mut seen = HashSet::new();
        let events: Vec<&Event> = all
            .iter()
            .filter(|event| match event {
                Event::Exit(_) => is_own(event) && seen.insert("exit"),
                Event::Delete(_) => (is_own(event) || deletes == 1) && seen.insert("delete"),
                _ => true,
            })
            .collect();
        let mut faults = faults_in(sandbox, &events);
        let foreign =
            self.exits_of(sandbox).into_iter().filter(|told| ![status, OF_DEAD_SHIM].contains(told));
        faults.extend(foreign.map(|told| format!("it ended with {status}, but an event says {told}")));
        faults
    }
}

/// The status of containerd's own event for a task whose shim it believes to be dead.
const OF_DEAD_SHIM: u32 = 137;

fn faults_in(container: &str, events: &[&Event]) -> Vec<String> {
    let mut faults = Vec::new();
    let mut before: HashSet<(Step, &str)> = HashSet::new();
    let mut highest: HashMap<&str, Step> = HashMap::new();
    for event in events {
        let Some((step, process)) = step(event) else { continue };
        if !before.insert((step, process)) {
            faults.push(format!("{} of {process} twice with different content", event.name()));
        }
        if highest.get(process).is_some_and(|last| *last > step) {
            faults.push(format!("{} of {process} too late", event.name()));
        }
        if process != container && before.contains(&(Step::Exit, container)) {
            faults.push(format!("{} of {process} after the exit of init", event.name()));
        }
        highest.insert(process, step);
    }
    if !faults.is_empty() {
        let names: Vec<&str> = events.iter().map(|event| event.name()).collect();
        faults.push(format!("the events were {names:?}"));
    }
    faults
}

/// The order that containerd requires.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
enum Step {
    Made,
    Started,
    Exit,
    Deleted,
}

/// An event's place in the life of a process.
fn step(event: &Event) -> Option<(Step, &str)> {
    match event {
        Event::Create(event) => Some((Step::Made, &event.container_id)),
        Event::Start(event) => Some((Step::Started, &event.container_id)),
        Event::ExecAdded(event) => Some((Step::Made, &event.exec_id)),
        Event::ExecStarted(event) => Some((Step::Started, &event.exec_id)),
        Event::Exit(event) => Some((Step::Exit, &event.id)),
        Event::Delete(event) => Some((Step::Deleted, &event.container_id)),
        Event::Paused(_) | Event::Resumed(_) | Event::Oom(_) | Event::Other(_) => None,
    }
}
