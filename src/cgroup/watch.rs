//! Changes of cgroups, as they happen: one inotify instance for all of them.
//!
//! The kernel tells of `memory.events` and `cgroup.events` whatever has changed them (kernfs_notify), and
//! of other files if somebody has written them.

use std::collections::HashMap;
use std::ffi::OsString;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use nix::errno::Errno;
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify, InotifyEvent, WatchDescriptor};
use tokio::io::unix::AsyncFd;

use crate::task::limits::Attribute;

use super::{Error, dir, error};

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
pub struct Watch<K> {
    inotify: Inotify,
    ready: AsyncFd<OwnedFd>,
    watched: Mutex<HashMap<WatchDescriptor, (K, Change)>>,
}

/// A cgroup is watched until this is dropped.
pub struct Watched<K> {
    watch: Arc<Watch<K>>,
    /// The kernel counts them per file: two of these must not be for the same one.
    descriptors: Vec<WatchDescriptor>,
}

impl<K: Clone> Watch<K> {
    /// # Errors
    /// There are too many of them, or no async runtime.
    pub fn new() -> io::Result<Arc<Self>> {
        let inotify = Inotify::init(InitFlags::IN_CLOEXEC | InitFlags::IN_NONBLOCK)?;
        let ready = crate::sys::watch(inotify.as_fd().try_clone_to_owned()?)?;
        Ok(Arc::new(Self { inotify, ready, watched: Mutex::default() }))
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
        let files = [(memory, "memory.events", Change::Memory), (container, "cgroup.events", Change::State)];
        let files = files.map(|(cgroup, file, change)| (dir(cgroup).join(file), change));
        let limits = limits.map(|cgroup| (dir(cgroup), Change::Limits));
        for (path, change) in files.into_iter().chain(limits) {
            let mut all = self.watched();
            match self.inotify.add_watch(&path, AddWatchFlags::IN_MODIFY) {
                Ok(descriptor) => {
                    all.insert(descriptor, (key.clone(), change));
                    watched.descriptors.push(descriptor);
                }
                // No such controller.
                Err(Errno::ENOENT) if change == Change::Memory => {}
                Err(errno) => return Err(error("watch", &path)(errno.into())),
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
        loop {
            let mut ready = self.ready.readable().await?;
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
        let events = match self.inotify.read_events() {
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
            let _ = self.watch.inotify.rm_watch(*descriptor);
        }
    }
}
