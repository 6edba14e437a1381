//! `wake`: waits for a call while the daemon is stopped, and starts it.
//!
//! systemd watches the daemon's sockets, but not the connections that it keeps for it: containerd's next
//! call on one of them would wait for ever.

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use std::os::fd::AsFd;

use crate::id::UnitName;
use crate::unit::name;
use crate::unit::proxy::Manager;

use super::{Failure, block_on};

pub(super) fn run() -> Result<(), Failure> {
    let stdin = std::io::stdin();
    let mut fds = [PollFd::new(stdin.as_fd(), PollFlags::POLLIN)];
    while let Err(errno) = poll(&mut fds, PollTimeout::NONE) {
        if errno != nix::errno::Errno::EINTR {
            return Err(Failure(format!("wait for a call: {errno}")));
        }
    }
    let daemon = UnitName::new(name::DAEMON_SERVICE).map_err(Failure::new)?;
    block_on(async {
        let manager = Manager::default();
        drop(manager.connect().await.map_err(Failure::new)?);
        manager.start_without_waiting(&daemon).await.map_err(Failure::new)
    })?
}
