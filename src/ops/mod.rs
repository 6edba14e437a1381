//! What the calls of the Task API do: one verb, one file.
//!
//! The verbs join the adapters (`unit`, `oci`, `stdio`, `cgroup`, `store`), which don't know each
//! other, around the domain in `task`.

mod create;
mod delete;
mod error;
mod kill;
mod observe;
mod publish;
mod start;
mod state;
mod streams;
mod wait;

use std::fs::File;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::SystemTime;

use tokio::sync::mpsc;
use tokio::task::JoinHandle;

use crate::id::TaskKey;
use crate::store::{Owing, Store};
use crate::task::outbox::TaskEvent;
use crate::task::phase::{Effect, Event};
use crate::task::registry::Registry;
use crate::task::{Task, registry};
use crate::unit::properties::Systemd;
use crate::unit::proxy::Manager;

pub use create::{CreateTask, LAUNCH_ERROR, PID_FILE};
pub use error::Error;
pub use state::{State, Status};

/// A live task, with what the running daemon attaches to it.
pub type Entry = registry::Entry<Live>;

/// What belongs to the running daemon only. Recovery makes it anew.
#[derive(Default)]
pub struct Live {
    /// The init process. Held since it is known: its number can't be taken by another.
    process: Option<OwnedFd>,
    /// The writing end of the client's stdin FIFO: without it the process would see EOF whenever a
    /// client goes away.
    stdin: Option<File>,
    /// Reading ends of our own FIFOs, from before the container has the other end until a pump or a
    /// logger reads them.
    held: Vec<(&'static str, File)>,
    /// Copies to files.
    pumps: Vec<JoinHandle<()>>,
    /// The task is deleted; this is where its last events are kept.
    owing: Option<Owing>,
}

/// The daemon's inside: everything a verb needs.
pub struct Shim {
    store: Store,
    registry: Registry<Live>,
    manager: Arc<Manager>,
    systemd: Systemd,
    /// This program, for units that run it.
    program: PathBuf,
    /// Tasks that owe events, for the publisher.
    outgoing: mpsc::UnboundedSender<Arc<Entry>>,
}

impl Shim {
    /// Puts the parts together. Tasks that owe events come out of the returned receiver; it has no
    /// bound, as each task stands in it a few times at most, and the events are in the outboxes.
    pub fn new(
        store: Store,
        manager: Arc<Manager>,
        systemd: Systemd,
        program: PathBuf,
    ) -> (Arc<Self>, mpsc::UnboundedReceiver<Arc<Entry>>) {
        let (outgoing, receiver) = mpsc::unbounded_channel();
        let registry = Registry::default();
        (Arc::new(Self { store, registry, manager, systemd, program, outgoing }), receiver)
    }

    /// How many tasks there are.
    pub fn task_count(&self) -> usize {
        self.registry.all().len()
    }

    fn entry(&self, key: &TaskKey) -> Result<Arc<Entry>, Error> {
        self.registry.get(key).ok_or_else(|| Error::UnknownTask { key: key.clone() })
    }

    /// A task that has been created: while Create is under way there is none for others.
    fn created(&self, key: &TaskKey) -> Result<Arc<Entry>, Error> {
        let entry = self.entry(key)?;
        if entry.task().init.pid().is_none() {
            return Err(Error::UnknownTask { key: key.clone() });
        }
        Ok(entry)
    }

    /// Applies an event to a task's init process: memory, then record, then the effects.
    ///
    /// # Errors
    /// The phase refuses it, or the record can't be written; then nothing has changed.
    fn apply(&self, entry: &Arc<Entry>, event: Event) -> Result<(), Error> {
        self.apply_with(entry, event, |_| ())
    }

    /// As [`Self::apply`], together with another change of the task.
    fn apply_with(
        &self,
        entry: &Arc<Entry>,
        event: Event,
        change: impl FnOnce(&mut Task),
    ) -> Result<(), Error> {
        let effects = {
            let mut task = entry.task();
            let mut next = task.clone();
            change(&mut next);
            let effects = next.apply(event, now_usec())?;
            if next == *task {
                return Ok(());
            }
            self.store.save(&next)?;
            *task = next;
            effects
        };
        for effect in effects {
            match effect {
                Effect::AnnounceCreated { pid } => tracing::debug!(pid, "created"),
                Effect::AnnounceStarted { pid } => tracing::debug!(pid, "started"),
                Effect::AnnounceExit { pid, exit } => {
                    tracing::debug!(pid, status = exit.status, "ended with status {}", exit.status)
                }
                Effect::Wake => {
                    let ended = entry.task().init.exit();
                    ended.into_iter().for_each(|exit| entry.wake(exit));
                }
            }
        }
        self.announce(entry);
        Ok(())
    }

    /// Tells the publisher that a task may owe events.
    fn announce(&self, entry: &Arc<Entry>) {
        if !entry.task().outbox.is_empty() {
            // The publisher ends with the daemon only.
            let _ = self.outgoing.send(entry.clone());
        }
    }
}

/// Now, in microseconds since 1970.
fn now_usec() -> u64 {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_micros()).unwrap_or(u64::MAX)
}

/// Runs blocking work (disk, mounts, clients' files) away from the async runtime.
async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Result<T, Error> {
    tokio::task::spawn_blocking(work).await.map_err(|_| Error::Stopping)
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
