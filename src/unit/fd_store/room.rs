//! How many files the daemon can still open.

use std::os::fd::{AsRawFd, OwnedFd};

use crate::sys;
use crate::unit::holder::MAX_FDS;

/// How many files the daemon must be able to open in addition: to start again, and to end what runs. From here on, new work
/// is refused. The daemon has its limit from PID 1, because `LimitNOFILE=` does not apply to a command with `+`
/// (`exec_invoke()` in systemd). PID 1 has the limit `fs.nr_open`, or less in a container.
pub(super) fn headroom(limit: u64) -> u64 {
    (limit / 8).clamp(128, 1024)
}

/// How many descriptors this process can still open.
pub(super) struct Room {
    limit: u64,
    free: u64,
}

impl Room {
    pub(super) fn now() -> Self {
        let (limit, free) = sys::descriptors();
        Self { limit, free }
    }

    /// Whether this process can open what so many holders hold, and leave the [`headroom`].
    pub(super) fn is_enough_for(&self, holders: usize) -> bool {
        self.free > (holders * MAX_FDS) as u64 + headroom(self.limit)
    }

    /// Subtracts what was opened. The kernel gives the lowest free number to a new descriptor, so these numbers show what is
    /// left without a system call.
    pub(super) fn subtract(&mut self, opened: &[(String, OwnedFd)]) {
        let numbers = opened.iter().filter_map(|(_, fd)| u64::try_from(fd.as_raw_fd()).ok());
        let left = numbers.map(|number| self.limit.saturating_sub(number + 1));
        self.free = left.chain([self.free]).min().unwrap_or_default();
    }
}
