//! Reports changes of cgroups, with one inotify instance for all of them.
//!
//! The kernel reports every change of `memory.events` and `cgroup.events` (kernfs_notify). It reports a change of other
//! files only if a process wrote them.

use std::collections::{HashMap, HashSet};
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

/// A change of a cgroup.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Change {
    /// `memory.events`
    Memory,
    /// `cgroup.events`: empty or not, frozen or not.
    State,
    /// A process has written a limit.
    Limits,
    /// Possibly everything: the kernel dropped reports, as there were too many.
    Any,
}

/// Watches cgroups. A `K` identifies each of them.
///
/// The kernel allows 128 inotify instances per user, and a limited number of watches: other programs, and
/// containers without a user namespace, can use them up. A cgroup that can't be watched is tried again later.
pub struct Watch<K> {
    /// Makes the inotify instance.
    open: Open,
    source: OnceLock<Source>,
    /// Notified when the source is open.
    opened: Notify,
    /// True if a cgroup could not be watched.
    is_missing: AtomicBool,
    missed: Notify,
    watched: Mutex<HashMap<WatchDescriptor, File<K>>>,
}

/// A file that is watched. inotify has one descriptor for it, however often it is watched.
struct File<K> {
    key: K,
    change: Change,
    /// How many [`Watched`] have its descriptor.
    users: usize,
}

type Open = fn() -> Result<Inotify, Errno>;

/// The inotify instance.
struct Source {
    inotify: Inotify,
    ready: AsyncFd<OwnedFd>,
}

impl Source {
    fn new(open: Open) -> io::Result<Self> {
        let inotify = open()?;
        let ready = crate::sys::watch(inotify.as_fd().try_clone_to_owned()?)?;
        Ok(Self { inotify, ready })
    }
}

/// How often unwatched cgroups are tried again. No event announces that the kernel allows another watch.
const RETRY: Duration = Duration::from_secs(10);

/// How often inotify is read at a time. A read gives up to 256 events. Without a bound, containers that change their cgroups all the
/// time could keep the daemon reading.
const MOST_READS: usize = 64;

/// The changes that were read.
struct Changes<K> {
    all: Vec<(Option<K>, Change)>,
    /// The files that have changed.
    seen: HashSet<WatchDescriptor>,
    /// True if inotify had no more.
    is_complete: bool,
}

impl<K> Default for Changes<K> {
    fn default() -> Self {
        Self { all: Vec::new(), seen: HashSet::new(), is_complete: false }
    }
}

/// Watches a cgroup until it is dropped.
pub struct Watched<K> {
    watch: Arc<Watch<K>>,
    descriptors: Vec<WatchDescriptor>,
}

impl<K: Clone> Watch<K> {
    /// Makes a watch without cgroups. Needs the async runtime.
    pub fn new() -> Arc<Self> {
        Self::opened_by(|| Inotify::init(InitFlags::IN_CLOEXEC | InitFlags::IN_NONBLOCK))
    }

    fn opened_by(open: Open) -> Arc<Self> {
        let watch = Self {
            open,
            source: OnceLock::new(),
            opened: Notify::new(),
            is_missing: AtomicBool::new(false),
            missed: Notify::new(),
            watched: Mutex::default(),
        };
        if let Err(error) = watch.source() {
            tracing::warn!(%error, "can't watch cgroups at the moment: {error}");
        }
        Arc::new(watch)
    }

    fn source(&self) -> io::Result<&Source> {
        if let Some(source) = self.source.get() {
            return Ok(source);
        }
        let new = Source::new(self.open)?;
        let source = self.source.get_or_init(|| new);
        self.opened.notify_one();
        Ok(source)
    }

    /// Records that a cgroup is not watched. Returns false if that was recorded already.
    pub fn miss(&self) -> bool {
        self.missed.notify_one();
        !self.is_missing.swap(true, Ordering::Relaxed)
    }

    /// Waits until unwatched cgroups should be tried again. Never returns if there are none. A future that is dropped forgets how
    /// long it has waited.
    pub async fn retry(&self) {
        while !self.is_missing.load(Ordering::Relaxed) {
            self.missed.notified().await;
        }
        tokio::time::sleep(RETRY).await;
        self.is_missing.store(false, Ordering::Relaxed);
    }

    /// Watches the state of a container's cgroup, the memory events of the cgroup `memory`, and writes to limits of the
    /// cgroups `limits`.
    ///
    /// # Errors
    /// A cgroup does not exist, or the kernel allows no more watches (fs.inotify.max_user_watches).
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
                    let new = || File { key: key.clone(), change, users: 0 };
                    all.entry(descriptor).or_insert_with(new).users += 1;
                    watched.descriptors.push(descriptor);
                }
                // The cgroup has no memory controller.
                Err(Errno::ENOENT) if change == Change::Memory => {}
                Err(errno) => return Err(io_error("watch", &path)(errno).into()),
            }
        }
        Ok(watched)
    }

    fn watched(&self) -> MutexGuard<'_, HashMap<WatchDescriptor, File<K>>> {
        self.watched.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for changes. The cgroup is `None` if it is unknown what has changed.
    ///
    /// # Errors
    /// inotify failed.
    pub async fn next(&self) -> io::Result<Vec<(Option<K>, Change)>> {
        let source = loop {
            match self.source.get() {
                Some(source) => break source,
                None => self.opened.notified().await,
            }
        };
        loop {
            let mut ready = source.ready.readable().await?;
            let Changes { all: changes, is_complete, .. } = self.read(source)?;
            if is_complete {
                ready.clear_ready();
            }
            if !changes.is_empty() {
                return Ok(changes);
            }
        }
    }

    /// The changes that were not reported yet, without waiting.
    ///
    /// # Errors
    /// As [`Self::next`].
    pub fn pending(&self) -> io::Result<Vec<(Option<K>, Change)>> {
        self.source.get().map_or(Ok(Vec::new()), |source| Ok(self.read(source)?.all))
    }

    /// The changes that were not reported yet, each once.
    fn read(&self, source: &Source) -> io::Result<Changes<K>> {
        let mut changes = Changes::default();
        for _ in 0..MOST_READS {
            match source.inotify.read_events() {
                Ok(events) => self.translate(events, &mut changes),
                Err(Errno::EAGAIN) => {
                    changes.is_complete = true;
                    break;
                }
                // The next read fails, too. What was read is not lost.
                Err(_) if !changes.all.is_empty() => break,
                Err(error) => return Err(error.into()),
            }
        }
        Ok(changes)
    }

    fn translate(&self, events: Vec<InotifyEvent>, changes: &mut Changes<K>) {
        let watched = self.watched();
        let is_limit = |name: &OsString| Attribute::ALL.iter().any(|a| name == a.file());
        for event in events {
            if event.mask.contains(AddWatchFlags::IN_Q_OVERFLOW) {
                changes.all.push((None, Change::Any));
                continue;
            }
            let Some(File { key, change, .. }) = watched.get(&event.wd) else {
                continue;
            };
            let counts = *change != Change::Limits || event.name.as_ref().is_some_and(is_limit);
            if counts && changes.seen.insert(event.wd) {
                changes.all.push((Some(key.clone()), *change));
            }
        }
    }
}

impl<K> Drop for Watched<K> {
    fn drop(&mut self) {
        let mut all = self.watch.watched.lock().unwrap_or_else(PoisonError::into_inner);
        for descriptor in &self.descriptors {
            let Some(file) = all.get_mut(descriptor) else {
                continue;
            };
            file.users -= 1;
            if file.users > 0 {
                continue;
            }
            all.remove(descriptor);
            // Fails if the kernel removed the watch with its file.
            let _ = self.watch.source.get().map(|source| source.inotify.rm_watch(*descriptor));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cgroup::fake;

    /// True while the kernel allows no inotify instance.
    static IS_REFUSED: AtomicBool = AtomicBool::new(true);

    #[tokio::test]
    async fn a_watch_that_gets_no_inotify_instance_works_once_there_is_one() {
        let watch = Watch::opened_by(|| match IS_REFUSED.load(Ordering::SeqCst) {
            true => Err(Errno::EMFILE),
            false => Inotify::init(InitFlags::IN_CLOEXEC | InitFlags::IN_NONBLOCK),
        });
        let cgroup = Path::new("/watch-test.slice");
        fake::make(cgroup);
        assert!(watch.add(&"web", cgroup, cgroup, None).is_err());
        assert!(watch.pending().unwrap().is_empty());
        let waiting = {
            let watch = watch.clone();
            tokio::spawn(async move { watch.next().await })
        };
        tokio::task::yield_now().await;
        IS_REFUSED.store(false, Ordering::SeqCst);
        let _watched = watch.add(&"web", cgroup, cgroup, None).unwrap();
        fake::set_frozen(cgroup, true);
        let changes = waiting.await.unwrap().unwrap();
        fake::remove(cgroup);
        assert!(changes.contains(&(Some("web"), Change::State)), "{changes:?}");
    }

    #[tokio::test]
    async fn a_cgroup_that_is_watched_twice_is_watched_until_both_watches_have_ended() {
        let (watch, cgroup) = (Watch::new(), Path::new("/watched-twice.slice"));
        fake::make(cgroup);
        let both = [(); 2].map(|()| watch.add(&"web", cgroup, cgroup, None).unwrap());
        let [first, second] = both;
        drop(first);
        fake::set_frozen(cgroup, true);
        assert!(watch.pending().unwrap().contains(&(Some("web"), Change::State)));
        drop(second);
        fake::set_frozen(cgroup, false);
        assert_eq!(watch.pending().unwrap(), []);
        fake::remove(cgroup);
    }

    /// Queues `count` events that nobody wants, of two files in turn: the kernel makes one of consecutive events that are equal.
    fn make_unwanted_events(cgroup: &Path, count: usize) {
        for number in 0..count {
            let _ = std::fs::write(dir(cgroup).join(["one", "two"][number % 2]), "1");
        }
    }

    #[tokio::test]
    async fn a_change_behind_many_others_is_found() {
        let (watch, cgroup, noisy) =
            (Watch::new(), Path::new("/behind.slice"), Path::new("/noisy-behind.slice"));
        [cgroup, noisy].into_iter().for_each(fake::make);
        let _watched = watch.add(&"web", cgroup, cgroup, None).unwrap();
        let _noise = watch.add(&"noise", noisy, noisy, Some(noisy)).unwrap();
        make_unwanted_events(noisy, 1000);
        fake::set_frozen(cgroup, true);
        assert_eq!(watch.pending().unwrap(), [(Some("web"), Change::State)]);
        assert_eq!(watch.pending().unwrap(), []);
        make_unwanted_events(noisy, 1000);
        fake::set_frozen(cgroup, false);
        let changes = tokio::time::timeout(Duration::from_secs(20), watch.next()).await;
        [cgroup, noisy].into_iter().for_each(fake::remove);
        assert_eq!(changes.expect("a change").unwrap(), [(Some("web"), Change::State)]);
    }
}
