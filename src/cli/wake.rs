//! `wake`: waits for a call while the daemon is stopped, and starts it.
//!
//! systemd watches the daemon's listening sockets, but not the kept connections: containerd's next call on one of
//! them would wait for ever.

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use std::os::fd::AsFd;

use super::{Failure, check_user, start};

pub(super) fn run() -> Result<(), Failure> {
    check_user()?;
    let stdin = std::io::stdin();
    let mut fds = [PollFd::new(stdin.as_fd(), PollFlags::POLLIN)];
    while let Err(errno) = poll(&mut fds, PollTimeout::NONE) {
        if errno != nix::errno::Errno::EINTR {
            return Err(Failure(format!("can't wait for a call: {errno}")));
        }
    }
    // The daemon's socket may be stopped, too. A connection to it starts the daemon.
    start::bring_up()
}
