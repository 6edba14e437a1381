//! Pumps of a terminal: its output to a pipe, and a client's input to it.

use std::io;
use std::os::fd::OwnedFd;
use std::pin::pin;
use std::time::Duration;

use nix::errno::Errno;
use nix::fcntl::splice;
use nix::poll::PollFlags;
use tokio::io::unix::AsyncFd;

use super::pipe::{CHUNK, NO_WAIT, data_in, grow, is_ready, room_in};
use super::terminal::Terminal;

/// How often the daemon tries to deliver input that waits until a program opens its terminal again.
const REOPEN_PAUSE: Duration = Duration::from_millis(200);

/// The largest amount of a terminal's output in the kernel: 64 KiB, and a page in the line discipline (tty_buffer.c). A
/// process that has ended has no more unread output.
const TERMINAL_HOLDS: usize = 128 << 10;

/// Moves from a terminal to a pipe until the process has ended, and then what is left in the terminal.
pub(super) async fn move_terminal(
    terminal: &Terminal,
    to: &AsyncFd<OwnedFd>,
    over: impl Future<Output = ()>,
) -> io::Result<()> {
    let mut over = pin!(async {
        tokio::select! {
            () = over => {}
            () = terminal.hung_up() => {}
        }
    });
    let all = async {
        loop {
            // If no program has the terminal open, one can open it again while the process runs.
            if !move_output(terminal, to, CHUNK).await? {
                terminal.output().await?;
            }
            tokio::task::consume_budget().await;
        }
    };
    let ended: io::Result<()> = tokio::select! {
        failed = all => failed,
        () = &mut over => Ok(()),
    };
    ended?;
    let mut left = TERMINAL_HOLDS;
    // The kernel flushes its buffers before it reports that there is no output (n_tty_poll).
    while left > 0 && is_ready(terminal.master(), PollFlags::POLLIN)? {
        match splice(terminal.master(), None, to, None, left, NO_WAIT) {
            Ok(0) | Err(Errno::EIO) => break,
            Ok(moved) => left = left.saturating_sub(moved),
            Err(Errno::EAGAIN) if !is_ready(to, PollFlags::POLLOUT)? && !grow(to) => room_in(to).await?,
            Err(Errno::EAGAIN | Errno::EINTR) => {}
            Err(errno) => return Err(errno.into()),
        }
        tokio::task::consume_budget().await;
    }
    Ok(())
}

/// Moves output from a terminal to a pipe. Returns false if no program has the terminal open.
async fn move_output(terminal: &Terminal, to: &AsyncFd<OwnedFd>, length: usize) -> io::Result<bool> {
    loop {
        match splice(terminal.master(), None, to, None, length, NO_WAIT) {
            Ok(0) | Err(Errno::EIO) => return Ok(false),
            Ok(_) => return Ok(true),
            // The kernel does not report which side is not ready. Both may be ready by now.
            Err(Errno::EAGAIN) if !is_ready(to, PollFlags::POLLOUT)? => room_in(to).await?,
            Err(Errno::EAGAIN) if !is_ready(terminal.master(), PollFlags::POLLIN)? => {
                terminal.output().await?
            }
            Err(Errno::EAGAIN) => tokio::task::consume_budget().await,
            Err(Errno::EINTR) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
}

/// Copies a client's input to a terminal until every writer has closed the FIFO. While no program has the terminal open,
/// the input waits in the FIFO.
///
/// # Errors
/// The terminal can't be written, or the FIFO can't be read.
pub async fn input(fifo: &AsyncFd<OwnedFd>, terminal: &Terminal) -> io::Result<()> {
    loop {
        match splice(fifo, None, terminal.master(), None, CHUNK, NO_WAIT) {
            Ok(0) => return Ok(()),
            Ok(_) => {}
            // No program has the terminal open. The kernel does not report when one opens it again.
            Err(Errno::EIO) => tokio::time::sleep(REOPEN_PAUSE).await,
            Err(Errno::EAGAIN) if !is_ready(fifo, PollFlags::POLLIN)? => {
                data_in(fifo).await?;
            }
            Err(Errno::EAGAIN) if !is_ready(terminal.master(), PollFlags::POLLOUT)? => {
                terminal.room().await?
            }
            Err(Errno::EAGAIN | Errno::EINTR) => {}
            Err(errno) => return Err(errno.into()),
        }
        tokio::task::consume_budget().await;
    }
}
