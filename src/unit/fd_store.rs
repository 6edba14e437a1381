//! Descriptors that outlive the daemon.
//!
//! systemd's descriptor store (sd_notify(3), `FDSTORE=1`) keeps descriptors open while the daemon is down, and passes them
//! to the next daemon. The daemon puts [`Holder`]s into the store, and its descriptors into the holders.

use std::collections::{HashMap, VecDeque};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, PoisonError};

use nix::errno::Errno;
use tokio::time::{Instant, sleep};

use crate::{fault, sys};

use super::holder::Holder;
use super::notify::{Notifier, RETRY, SEND_LIMIT};

mod room;

use room::{Room, headroom};

/// How many descriptors systemd stores for the daemon (`FileDescriptorStoreMax=`). It closes further ones without a
/// message.
///
/// systemd passes the names of all descriptors in one environment variable, which the kernel limits to 128 KiB (execve(2),
/// `MAX_ARG_STRLEN`). Names of up to nine letters and digits fit.
pub const STORE_LIMIT: u32 = 12_000;

/// Entries that are reserved for work that has begun already. New work is refused once only these are left.
const STORE_RESERVE: u32 = 500;

/// The names of holders in the store consist of this letter and a number.
const PREFIX: char = 'h';

/// The first letters of the names of connections: those of clients, and the daemon's own to the bus. A daemon with too few
/// descriptors opens connections first: without its connection, a task does not answer.
const CONNECTIONS: [char; 2] = ['c', 'r'];

/// How many empty holders are made at once. systemd always has at least one of them already: a descriptor in it outlives
/// the daemon immediately, even if systemd is busy.
const SPARE: usize = 4;
/// How many empty holders are kept in the store.
const MAX_IDLE: usize = 64;

/// Why a descriptor can't be kept.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The store is full.
    #[error(
        "systemd's descriptor store has {count} entries of the runtime's daemon, the limit is {limit}: delete tasks or execs that have ended, or close connections"
    )]
    Full {
        /// The number of entries.
        count: usize,
        /// The number of entries that are allowed.
        limit: usize,
    },
    /// The daemon can open few more files.
    #[error(
        "the runtime's daemon can open {free} more files of {limit}: delete tasks or execs that have ended, or raise the limit of PID 1 (RLIMIT_NOFILE), from which the daemon has it"
    )]
    Descriptors {
        /// The number of files that can be opened.
        free: u64,
        /// The number of files that may be open.
        limit: u64,
    },
    /// The daemon could not read the descriptors of its processes.
    #[error(
        "the runtime's daemon could not open what {count} entries of systemd's descriptor store hold: raise the limit of PID 1 (RLIMIT_NOFILE), from which the daemon has it, and restart the daemon; its log has the reason"
    )]
    Unread {
        /// The number of entries.
        count: usize,
    },
    /// A holder can't be made.
    #[error("can't create a socket to hold descriptors: {0}")]
    Make(io::Error),
    /// The descriptors can't be sent to the holder.
    #[error("can't put descriptors into the socket that holds them: {0}")]
    Put(Errno),
    /// systemd's notify socket can't be reached.
    #[error("can't store a descriptor in systemd's descriptor store: {0}")]
    Send(Errno),
}

/// Sends a message with descriptors to systemd.
type Sending = fn(&Notifier, &str, &[BorrowedFd<'_>]) -> Result<(), Errno>;

/// The descriptors that outlive the daemon, by name. A name consists of a letter and a number.
#[derive(Debug)]
pub struct FdStore {
    notifier: Notifier,
    limit: usize,
    state: Mutex<State>,
}

/// The contents of the store. Only this process changes them.
#[derive(Debug, Default)]
struct State {
    used: Used,
    idle: VecDeque<Named>,
    /// The number of the next holder.
    next: u64,
    /// How many descriptors an earlier version put directly into the store, by name.
    direct: HashMap<String, usize>,
    /// Entries that this process could not read, mostly because it had too few descriptors. A later daemon may have enough.
    unread: usize,
    /// The warning that the store is nearly full was logged.
    is_warned: bool,
    /// The warning that few more files can be opened was logged.
    is_warned_of_files: bool,
}

/// A holder, and the number in its name in the store.
#[derive(Debug)]
struct Named {
    number: u64,
    holder: Holder,
}

impl Named {
    fn name(&self) -> String {
        format!("{PREFIX}{}", self.number)
    }
}

/// The holders that have descriptors.
#[derive(Debug, Default)]
struct Used {
    by_label: HashMap<String, Vec<Named>>,
    /// The number of holders. Each descriptor that is stored asks for it, and 1,000 containers have 6,000 holders.
    count: usize,
}

impl Used {
    fn add(&mut self, label: String, holder: Named) {
        // Nearly every label has one holder, and a list that grows by itself has room for four.
        self.by_label.entry(label).or_insert_with(|| Vec::with_capacity(1)).push(holder);
        self.count += 1;
    }

    fn take(&mut self, label: &str) -> Vec<Named> {
        let taken = self.by_label.remove(label).unwrap_or_default();
        self.count -= taken.len();
        taken
    }

    fn count_of(&self, label: &str) -> usize {
        self.by_label.get(label).map_or(0, Vec::len)
    }
}

impl State {
    /// The number of entries in the store.
    fn count(&self) -> usize {
        self.used.count + self.direct.values().sum::<usize>() + self.unread
    }

    fn warn_of_files(&mut self, limit: u64, free: u64) {
        let is_low = free < limit / 5;
        if is_low && !self.is_warned_of_files {
            tracing::warn!(
                "this daemon can open {free} more files of {limit} (RLIMIT_NOFILE): from {} on, containers and execs are refused, and connections a little later",
                headroom(limit)
            );
        }
        self.is_warned_of_files = is_low;
    }

    fn next_number(&mut self) -> u64 {
        let number = self.next;
        self.next += 1;
        number
    }
}

impl FdStore {
    /// Takes over the store of the daemon's service. `passed`: the descriptors that systemd passed to this process.
    /// Returns the store, and what earlier daemons put into it, by name.
    ///
    /// # Errors
    /// systemd's notify socket can't be reached.
    pub fn adopt(passed: Vec<(String, OwnedFd)>) -> io::Result<(Self, Vec<(String, OwnedFd)>)> {
        Ok(Self::with(Notifier::new()?, STORE_LIMIT as usize - MAX_IDLE - SPARE, passed))
    }

    /// As [`Self::adopt`], with room for `limit` entries.
    pub(crate) fn with(
        notifier: Notifier,
        limit: usize,
        passed: Vec<(String, OwnedFd)>,
    ) -> (Self, Vec<(String, OwnedFd)>) {
        let (mut state, mut found) = (State::default(), Vec::new());
        let mut room = Room::now();
        let may_lack_files = !room.is_enough_for(passed.len());
        let passed = if may_lack_files { connections_first(passed) } else { passed };
        for (name, fd) in passed {
            let Some(number) = holder_number(&name) else {
                *state.direct.entry(name.clone()).or_default() += 1;
                found.push((name, fd));
                continue;
            };
            state.next = state.next.max(number + 1);
            if may_lack_files && !room.is_enough_for(0) {
                state.unread += 1;
                continue;
            }
            let holder = Holder::adopt(fd);
            let contents = match holder.contents() {
                Ok(contents) => contents,
                Err(error) => {
                    // The holder stays in systemd's store: the next daemon may be able to read it.
                    tracing::error!(%error, "can't read the descriptors that an earlier daemon stored in {name}: {error}");
                    state.unread += 1;
                    continue;
                }
            };
            room.subtract(&contents);
            match contents.first() {
                Some((label, _)) => {
                    state.used.add(label.clone(), Named { number, holder });
                }
                None => state.idle.push_back(Named { number, holder }),
            }
            found.extend(contents);
        }
        if state.unread > 0 {
            tracing::error!(
                "can't open what {} entries of systemd's descriptor store hold, so streams and connections do not work, and new work is refused: raise the limit of PID 1 (RLIMIT_NOFILE) and restart the daemon",
                state.unread
            );
        }
        let store = Self { notifier, limit, state: Mutex::new(state) };
        store.make_spare();
        (store, found)
    }

    /// The number of entries in systemd's store, without empty holders.
    pub fn count(&self) -> usize {
        self.state(|state| state.count())
    }

    /// The number of entries with this name.
    pub fn count_of(&self, name: &str) -> usize {
        self.state(|state| state.used.count_of(name) + state.direct.get(name).copied().unwrap_or(0))
    }

    /// Sends notifications to the systemd that has this store.
    pub fn notifier(&self) -> &Notifier {
        &self.notifier
    }

    /// Checks whether new work may begin that keeps descriptors.
    ///
    /// # Errors
    /// [`Error::Unread`], [`Error::Full`], [`Error::Descriptors`]
    pub fn has_room(&self) -> Result<(), Error> {
        // A process whose descriptors could not be read needs them first.
        match self.state(|state| state.unread) {
            0 => self.leaves(1),
            count => Err(Error::Unread { count }),
        }
    }

    /// Checks whether a connection may be accepted. There is room for connections longer than for other work: over a
    /// connection the daemon can answer why it refuses work.
    ///
    /// # Errors
    /// [`Error::Full`], [`Error::Descriptors`]
    pub fn has_room_for_connection(&self) -> Result<(), Error> {
        self.leaves(4)
    }

    /// Checks that this part of what is reserved is free: all of it (1), a quarter (4).
    fn leaves(&self, part: u32) -> Result<(), Error> {
        let count = self.state(|state| state.count());
        if count > self.limit_of_new_work() + (STORE_RESERVE - STORE_RESERVE / part) as usize {
            return Err(Error::Full { count, limit: self.limit });
        }
        let (limit, free) = sys::descriptors();
        self.state(|state| state.warn_of_files(limit, free));
        if free <= headroom(limit) / u64::from(part) {
            Err(Error::Descriptors { free, limit })
        } else {
            Ok(())
        }
    }

    /// Whether the store has entries that this process could not read.
    pub fn has_unread(&self) -> bool {
        self.state(|state| state.unread > 0)
    }

    /// Keeps descriptors under a name, in addition to those that the name already has. Blocks for some seconds while systemd reads
    /// no messages, if no empty holder is left: for threads that serve no calls.
    ///
    /// # Errors
    /// The store is full, or systemd can't be reached. None of the descriptors is kept then.
    pub fn keep(&self, name: &str, fds: &[BorrowedFd<'_>]) -> Result<(), Error> {
        self.keep_with(Notifier::send_one_of_many, name, fds)
    }

    /// As [`Self::keep`], and waits without blocking the thread.
    ///
    /// # Errors
    /// As [`Self::keep`].
    pub async fn keep_async(&self, name: &str, fds: &[BorrowedFd<'_>]) -> Result<(), Error> {
        let begun = Instant::now();
        loop {
            match self.keep_with(Notifier::send_at_once, name, fds) {
                Err(Error::Send(Errno::EAGAIN)) if begun.elapsed() < SEND_LIMIT => sleep(RETRY).await,
                kept => return kept,
            }
        }
    }

    /// `send`: sends the message about a new holder.
    fn keep_with(&self, send: Sending, name: &str, fds: &[BorrowedFd<'_>]) -> Result<(), Error> {
        if fault::is_forgetful() || !self.notifier.has_systemd() {
            return Ok(());
        }
        let limit = self.limit;
        let count = self.state(|state| state.count());
        if count >= limit {
            return Err(Error::Full { count, limit });
        }
        // The one that was made or emptied first: systemd may not have received the message about the last one yet.
        let holder = match self.state(|state| state.idle.pop_front()) {
            Some(holder) => holder,
            None => self.make(send)?,
        };
        if let Err(errno) = holder.holder.put(name, fds) {
            self.state(|state| state.idle.push_back(holder));
            return Err(Error::Put(errno));
        }
        self.state(|state| {
            state.used.add(name.to_owned(), holder);
            self.warn(state);
        });
        self.make_spare();
        Ok(())
    }

    /// Closes all descriptors that are kept under a name.
    pub fn forget(&self, name: &str) {
        self.take(name).into_iter().for_each(|holder| self.empty(holder));
    }

    /// Closes the descriptors under a name that `is_kept` refuses. The others stay kept all the time.
    ///
    /// # Errors
    /// They can't be read: all of them are still kept.
    pub fn retain(&self, name: &str, is_kept: impl Fn(&OwnedFd) -> bool) -> Result<(), Error> {
        self.state(|state| {
            let mut holders = state.used.by_label.get(name).into_iter().flatten();
            holders.try_for_each(|named| named.holder.retain(&is_kept)).map_err(Error::Put)
        })
    }

    /// As [`Self::forget`], but a container can make the close wait for as long as it likes. The returned function closes the
    /// descriptors. `None` if there is nothing left to close. The name can be used again at once.
    pub fn forget_later(self: &Arc<Self>, name: &str) -> Option<impl FnOnce() + Send + use<>> {
        let (this, holders) = (self.clone(), self.take(name));
        (!holders.is_empty()).then_some(move || holders.into_iter().for_each(|holder| this.empty(holder)))
    }

    /// Removes a name. Returns the holders of its descriptors.
    fn take(&self, name: &str) -> Vec<Named> {
        let (holders, is_direct) =
            self.state(|state| (state.used.take(name), state.direct.contains_key(name)));
        if is_direct && self.remove_or_warn(name) {
            self.state(|state| state.direct.remove(name));
        }
        holders
    }

    /// Closes the descriptors in a holder.
    fn empty(&self, holder: Named) {
        match holder.holder.clear() {
            Ok(()) => self.keep_idle(holder),
            Err(error) => {
                let name = holder.name();
                tracing::warn!(%error, "can't empty the holder {name}: {error}");
                self.remove_or_warn(&name);
            }
        }
    }

    /// Keeps an empty holder for reuse, or removes it from the store if there are enough.
    fn keep_idle(&self, holder: Named) {
        let mut surplus = self.state(|state| {
            state.is_warned &= state.count() * 5 > self.limit * 3;
            state.idle.push_back(holder);
            state.idle.split_off(state.idle.len().min(MAX_IDLE))
        });
        while let Some(holder) = surplus.pop_front() {
            if let Err(error) = self.remove(&holder.name()) {
                tracing::debug!(%error, "can't remove an empty holder from systemd's descriptor store, it stays for later use: {error}");
                surplus.push_front(holder);
                self.state(|state| state.idle.append(&mut surplus));
            }
        }
    }

    /// Makes empty holders if at most one is left. Without one, the next descriptor would have to wait for systemd.
    fn make_spare(&self) {
        if !self.notifier.has_systemd() || self.state(|state| state.idle.len() > 1) {
            return;
        }
        for _ in 0..SPARE {
            match self.make(Notifier::send_at_once) {
                Ok(holder) => self.state(|state| state.idle.push_back(holder)),
                // The next call tries again.
                Err(Error::Send(Errno::EAGAIN)) => return,
                Err(error) => {
                    tracing::warn!(%error, "can't add an empty holder to systemd's descriptor store: {error}");
                    return;
                }
            }
        }
    }

    fn make(&self, send: Sending) -> Result<Named, Error> {
        let holder =
            Named { holder: Holder::new().map_err(Error::Make)?, number: self.state(State::next_number) };
        // FDPOLL=0: systemd must not remove a holder when it becomes readable.
        let message = format!("FDSTORE=1\nFDPOLL=0\nFDNAME={}", holder.name());
        send(&self.notifier, &message, &[holder.holder.as_fd()]).map_err(Error::Send)?;
        Ok(holder)
    }

    /// Removes the descriptors with this name from systemd's store. Does not wait for systemd.
    fn remove(&self, name: &str) -> Result<(), Errno> {
        self.notifier.send_at_once(&format!("FDSTOREREMOVE=1\nFDNAME={name}"), &[])
    }

    /// As [`Self::remove`], for descriptors that are not empty holders.
    fn remove_or_warn(&self, name: &str) -> bool {
        let removed = self.remove(name);
        if let Err(error) = removed {
            // The next daemon gets the descriptor, and removes it.
            tracing::warn!(%error, "can't remove {name} from systemd's descriptor store: {error}");
        }
        removed.is_ok()
    }

    fn warn(&self, state: &mut State) {
        let count = state.count();
        if !state.is_warned && count * 5 > self.limit * 4 {
            state.is_warned = true;
            tracing::warn!(
                "systemd's descriptor store has {count} entries of this daemon, its limit is {}: from {} entries on, containers and execs are refused, and connections a little later",
                self.limit,
                self.limit_of_new_work()
            );
        }
    }

    /// The number of entries above which new work is refused.
    fn limit_of_new_work(&self) -> usize {
        self.limit.saturating_sub(STORE_RESERVE as usize)
    }

    fn state<T>(&self, with: impl FnOnce(&mut State) -> T) -> T {
        with(&mut self.state.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// Entries in the order in which a process opens them that may have too few descriptors for all.
fn connections_first(mut passed: Vec<(String, OwnedFd)>) -> Vec<(String, OwnedFd)> {
    passed.sort_by_cached_key(|(name, fd)| {
        let label = match holder_number(name) {
            Some(_) => Holder::label_in(fd),
            None => Ok(name.clone()),
        };
        !label.is_ok_and(|label| label.starts_with(CONNECTIONS))
    });
    passed
}

fn holder_number(name: &str) -> Option<u64> {
    name.strip_prefix(PREFIX)?.parse().ok()
}

/// For tests of everything that stores descriptors.
#[cfg(test)]
pub(crate) mod testing {
    use std::os::fd::OwnedFd;
    use std::os::unix::net::UnixDatagram;

    use crate::unit::notify::Notifier;

    /// A systemd that receives the messages of a store.
    pub struct Systemd(UnixDatagram);

    impl Systemd {
        /// Returns the store's side too.
        pub fn new() -> (Self, Notifier) {
            let (here, there) = UnixDatagram::pair().unwrap();
            here.set_nonblocking(true).unwrap();
            (Self(here), Notifier::to(there))
        }

        /// Handles messages: adds to `stored`, and removes from it.
        pub fn read(&self, stored: &mut Vec<(String, OwnedFd)>) {
            while let Ok((text, fds)) = crate::sys::peek_fds(&self.0) {
                crate::sys::discard_message(&self.0).unwrap();
                let (head, name) = text.rsplit_once("FDNAME=").unwrap();
                match head {
                    "FDSTORE=1\nFDPOLL=0\n" => stored.extend(fds.into_iter().map(|fd| (name.to_owned(), fd))),
                    "FDSTOREREMOVE=1\n" => stored.retain(|(found, _)| found != name),
                    _ => unreachable!("{text:?}"),
                }
            }
        }
    }
}

#[cfg(test)]
mod tests;
