//! Changes of cgroups, as they happen: one inotify instance for all of them.
//!
//! The kernel tells of `memory.events` and `cgroup.events` whatever has changed them (kernfs_notify), and
//! of other files if somebody has written them.

use std::collections::HashMap;
use std::ffi::OsString;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use nix::errno::Errno;
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify, InotifyEvent, WatchDescriptor};
use tokio::io::unix::AsyncFd;
use tokio::sync::Notify;

use crate::path_error::io_error;
use crate::task::limits::Attribute;

use super::{Error, dir};

/// What has changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Change {
    /// `memory.events`
    Memory,
    /// `cgroup.events`: empty or not, frozen or not.
    State,
    /// A limit, by a write.
    Limits,
    /// Anything: some changes were too many to be told.
    Any,
}

/// Watches cgroups, each known to the caller by a `K`.
///
/// The kernel allows 128 inotify instances per user, and a limited number of watches: other programs, and
/// containers without a user namespace, can use them up. What can't be watched then is tried again.
pub struct Watch<K> {
    source: OnceLock<Source>,
    /// There is a source now.
    opened: Notify,
    /// Something could not be watched.
    is_missing: AtomicBool,
    missed: Notify,
    watched: Mutex<HashMap<WatchDescriptor, (K, Change)>>,
}

/// Where the kernel tells of changes.
struct Source {
    inotify: Inotify,
    ready: AsyncFd<OwnedFd>,
}

impl Source {
    fn new() -> io::Result<Self> {
        let inotify = Inotify::init(InitFlags::IN_CLOEXEC | InitFlags::IN_NONBLOCK)?;
        let ready = crate::sys::watch(inotify.as_fd().try_clone_to_owned()?)?;
        Ok(Self { inotify, ready })
    }
}

/// When what could not be watched is tried again: nothing tells that there is room.
const RETRY: Duration = Duration::from_secs(10);

/// A cgroup is watched until this is dropped.
pub struct Watched<K> {
    watch: Arc<Watch<K>>,
    /// The kernel counts them per file: two of these must not be for the same one.
    descriptors: Vec<WatchDescriptor>,
}

impl<K: Clone> Watch<K> {
    /// Nothing is watched yet. Needs the async runtime.
    pub fn new() -> Arc<Self> {
        let watch = Self {
            source: OnceLock::new(),
            opened: Notify::new(),
            is_missing: AtomicBool::new(false),
            missed: Notify::new(),
            watched: Mutex::default(),
        };
        if let Err(error) = watch.source() {
            tracing::warn!(%error, "changes of cgroups are not noticed at the moment: {error}");
        }
        Arc::new(watch)
    }

    fn source(&self) -> io::Result<&Source> {
        if let Some(source) = self.source.get() {
            return Ok(source);
        }
        let new = Source::new()?;
        let source = self.source.get_or_init(|| new);
        self.opened.notify_one();
        Ok(source)
    }

    /// Notes that something is not watched. True if that was not so before.
    pub fn miss(&self) -> bool {
        self.missed.notify_one();
        !self.is_missing.swap(true, Ordering::Relaxed)
    }

    /// Resolves when what is not watched should be tried again. Never, if there is nothing.
    pub async fn retry(&self) {
        while !self.is_missing.load(Ordering::Relaxed) {
            self.missed.notified().await;
        }
        tokio::time::sleep(RETRY).await;
        self.is_missing.store(false, Ordering::Relaxed);
    }

    /// Watches what happens to the processes of a container's cgroup, what the memory events of `memory` are, and
    /// who changes limits of `limits`.
    ///
    /// # Errors
    /// One of them is gone, or there are more than the kernel allows (fs.inotify.max_user_watches).
    pub fn add(
        self: &Arc<Self>,
        key: &K,
        container: &Path,
        memory: &Path,
        limits: Option<&Path>,
    ) -> Result<Watched<K>, Error> {
        let mut watched = Watched { watch: self.clone(), descriptors: Vec::new() };
        let source = self.source().map_err(io_error("watch", &dir(container)))?;
        let files = [(memory, "memory.events", Change::Memory), (container, "cgroup.events", Change::State)];
        let files = files.map(|(cgroup, file, change)| (dir(cgroup).join(file), change));
        let limits = limits.map(|cgroup| (dir(cgroup), Change::Limits));
        for (path, change) in files.into_iter().chain(limits) {
            let mut all = self.watched();
            match source.inotify.add_watch(&path, AddWatchFlags::IN_MODIFY) {
                Ok(descriptor) => {
                    all.insert(descriptor, (key.clone(), change));
                    watched.descriptors.push(descriptor);
                }
                // No such controller.
                Err(Errno::ENOENT) if change == Change::Memory => {}
                Err(errno) => return Err(io_error("watch", &path)(errno).into()),
            }
        }
        Ok(watched)
    }

    fn watched(&self) -> MutexGuard<'_, HashMap<WatchDescriptor, (K, Change)>> {
        self.watched.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What has changed, as soon as something has; with nothing to go by, it may be any of them.
    ///
    /// # Errors
    /// The kernel does not tell.
    pub async fn next(&self) -> io::Result<Vec<(Option<K>, Change)>> {
        let source = loop {
            match self.source.get() {
                Some(source) => break source,
                None => self.opened.notified().await,
            }
        };
        loop {
            let mut ready = source.ready.readable().await?;
            let changes = self.pending()?;
            if !changes.is_empty() {
                return Ok(changes);
            }
            ready.clear_ready();
        }
    }

    /// What has changed by now and was not told yet.
    ///
    /// # Errors
    /// As [`Self::next`].
    pub fn pending(&self) -> io::Result<Vec<(Option<K>, Change)>> {
        let Some(source) = self.source.get() else {
            return Ok(Vec::new());
        };
        let events = match source.inotify.read_events() {
            Err(Errno::EAGAIN) => return Ok(Vec::new()),
            events => events?,
        };
        let watched = self.watched();
        let is_limit = |name: &OsString| Attribute::ALL.iter().any(|a| name == a.file());
        let change = |event: InotifyEvent| {
            if event.mask.contains(AddWatchFlags::IN_Q_OVERFLOW) {
                return Some((None, Change::Any));
            }
            let (key, change) = watched.get(&event.wd)?;
            let counts = *change != Change::Limits || event.name.as_ref().is_some_and(is_limit);
            counts.then(|| (Some(key.clone()), *change))
        };
        Ok(events.into_iter().filter_map(change).collect())
    }
}

impl<K> Drop for Watched<K> {
    fn drop(&mut self) {
        let mut all = self.watch.watched.lock().unwrap_or_else(PoisonError::into_inner);
        for descriptor in &self.descriptors {
            all.remove(descriptor);
            // It goes by itself with what it watches.
            let _ = self.watch.source.get().map(|source| source.inotify.rm_watch(*descriptor));
        }
    }
}
