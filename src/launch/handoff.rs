//! Makes a process that is not systemd's child the main process of a unit, without losing its exit.
//!
//! The process is a child of `launch`: the OCI runtime that started it has exited, and `launch` is a subreaper. `MAINPID=`
//! makes it the unit's main process. When `launch` exits, PID 1 becomes its parent and gets its exit. If the process ends
//! before that, it is a zombie whose exit only `launch` can read. `launch` does not reap it, reports its exit, and exits in
//! the same way:
//! - If systemd did not take the process over (it refuses a zombie), `launch` is still the main process.
//! - If systemd took it over while it ran, the zombie becomes a child of PID 1 when `launch` exits.
//!
//! A process that ends while `launch` exits becomes a zombie of PID 1 as well, which then reaps it as the main process.
//!
//! A process with several threads has two ends. Once its first thread has ended, /proc shows a zombie, and systemd refuses it
//! (`pid_is_alive()`, 252 to 262). But it can be reaped, and has an exit, only when its last thread has ended. Between
//! the two, `launch` can't find out whether systemd took the process over, so `launch` waits for the exit. Usually all threads
//! end at about the same time. A program can also end its first thread alone (pthread_exit(3)) and continue: then `launch`
//! stays until the program ends. A process that another one traces (ptrace(2)) has two ends as well: its parent can't reap
//! it before the tracer lets go.

use std::convert::Infallible;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::net::UnixDatagram;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags};
use nix::sys::socket::{getsockopt, setsockopt, sockopt};

use crate::config::BARRIER_LIMIT;
use crate::sys::{self, tree};
use crate::unit::main_process::WaitStatus;
use crate::unit::notify;

/// A hundred years. systemd takes "infinity" for no extension.
const LONG_USEC: u64 = 100 * 365 * 24 * 3600 * 1_000_000;

/// The pid of systemd.
const SYSTEMD: u32 = 1;

/// If the first thread of a process has ended, how long `launch` waits for the other threads before it reports the process:
/// usually, they are ending too.
const THREADS_LIMIT: Duration = Duration::from_secs(1);

/// What became of a process that was handed over.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Handover {
    /// systemd reaps it.
    Taken,
    /// It has ended. The caller must call [`end_as`].
    Ended(WaitStatus),
    /// It runs, and systemd may have refused it. The caller must call [`end_with`].
    Unclear,
}

/// Why a process can't be handed over.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The process does not exist, and its exit can't be read.
    #[error("process {pid} and its exit status can't be found: {source}")]
    Lost {
        /// The process.
        pid: u32,
        /// The error of the system call.
        source: io::Error,
    },
    /// systemd can't be notified.
    #[error("can't notify systemd of the process: {0}")]
    Notify(String),
    /// systemd does not answer.
    #[error("systemd did not confirm the process within {} s", BARRIER_LIMIT.as_secs())]
    Silent,
}

/// Hands the process over.
pub(super) fn hand_over(pid: u32) -> Result<Handover, Error> {
    if let Some(ended) = peek(pid)? {
        return Ok(Handover::Ended(ended));
    }
    let socket = notify::connect().map_err(|error| Error::Notify(error.to_string()))?;
    let socket = socket.ok_or_else(|| Error::Notify("NOTIFY_SOCKET is not set".to_owned()))?;
    // A drop-in for all services may set `TimeoutStartSec=`. The process runs as long as it wants. It is the main process then,
    // and systemd would believe it: a root user who finds systemd's socket in the container could name any process of the host
    // (systemd 254 has `NOTIFYACCESS=`, earlier versions ignore it).
    let text = format!("MAINPID={pid}\nNOTIFYACCESS=none\nEXTEND_TIMEOUT_USEC={LONG_USEC}");
    tell(&text, &socket, SYSTEMD, BARRIER_LIMIT)?;
    outcome(pid, THREADS_LIMIT)
}

/// What became of a process that systemd was told of.
fn outcome(pid: u32, limit: Duration) -> Result<Handover, Error> {
    // In this order: if the first thread lives now, it lived when systemd looked.
    if let Some(ended) = peek(pid)? {
        return Ok(Handover::Ended(ended));
    }
    if !tree::first_thread_has_ended(pid) {
        return Ok(Handover::Taken);
    }
    wait(pid, limit)?;
    Ok(peek(pid)?.map_or(Handover::Unclear, Handover::Ended))
}

/// Waits for the end of a child that nobody else reaps.
fn wait(pid: u32, limit: Duration) -> Result<(), Error> {
    let ended = sys::pidfd_open(pid).and_then(|process| sys::ends_within(&process, limit));
    ended.map(drop).map_err(lost(pid))
}

fn lost(pid: u32) -> impl Fn(Errno) -> Error {
    move |errno| Error::Lost { pid, source: errno.into() }
}

fn peek(pid: u32) -> Result<Option<WaitStatus>, Error> {
    let ended = sys::peek_exit(pid).map_err(lost(pid))?;
    Ok(ended.map(status))
}

fn status((code, status): (i32, i32)) -> WaitStatus {
    WaitStatus { code, status, at_usec: Some(sys::now_usec()) }
}

/// Tells systemd something, and waits until systemd has dealt with it.
///
/// systemd deals with one notification after the other. So it has dealt with the first once it has read the second, which
/// says nothing. `BARRIER=1` with a descriptor (sd_notify_barrier(3)) would do the same, but to close a descriptor, systemd (257)
/// makes a copy of PID 1 by fork(2), which costs more than all that `launch` does.
///
/// `speaker`: the process that says nothing. PID 1, because its unit is a scope, and scopes ignore notifications.
fn tell(text: &str, socket: &UnixDatagram, speaker: u32, limit: Duration) -> Result<(), Error> {
    let failed = |error: io::Error| Error::Notify(error.to_string());
    // The least that the kernel allows.
    setsockopt(socket, sockopt::SndBuf, &0).map_err(|errno| failed(errno.into()))?;
    let room = getsockopt(socket, sockopt::SndBuf).map_err(|errno| failed(errno.into()))?;
    socket.set_write_timeout(Some(limit)).map_err(failed)?;
    socket.send(text.as_bytes()).map_err(failed)?;
    // The kernel announces that a socket is writable once at most a quarter of its room is in use (af_unix.c, `unix_writable`). This
    // message uses more, so the socket is writable when systemd has read it.
    let nothing = format!("X_NOTHING={}", "-".repeat(room / 4));
    sys::send_as(socket, &nothing, speaker).map_err(failed)?;
    let begun = Instant::now();
    while sys::unread_by_peer(socket).map_err(|errno| failed(errno.into()))? > 0 {
        let left = limit.saturating_sub(begun.elapsed());
        match sys::poll(&mut [PollFd::new(socket.as_fd(), PollFlags::POLLOUT)], left) {
            Ok(true) => {}
            Ok(false) => return Err(Error::Silent),
            Err(errno) => return Err(failed(errno.into())),
        }
    }
    Ok(())
}

/// Waits for the end of a process, and exits in the same way.
///
/// # Errors
/// Its exit can't be read.
pub(super) fn end_with(pid: u32) -> Result<Infallible, Error> {
    end_as(exit_of(pid)?)
}

fn exit_of(pid: u32) -> Result<WaitStatus, Error> {
    sys::wait_for_exit(pid).map(status).map_err(lost(pid))
}

/// Exits in the same way as another process.
#[expect(clippy::disallowed_methods, reason = "the exit code is another process's, of all values")]
pub(super) fn end_as(ended: WaitStatus) -> ! {
    if let Some(signal) = ended.signal() {
        sys::die_by(signal);
    }
    std::process::exit(i32::try_from(ended.exit_status()).unwrap_or(255))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::thread::{JoinHandle, spawn};

    fn ended(handover: Handover) -> Option<u32> {
        match handover {
            Handover::Ended(ended) => Some(ended.exit_status()),
            Handover::Taken | Handover::Unclear => None,
        }
    }

    #[test]
    fn a_process_whose_first_thread_has_ended_is_watched_to_its_end() {
        let (pid, end) = tree::child_without_first_thread(7);
        assert_eq!(outcome(pid, Duration::from_millis(20)).unwrap(), Handover::Unclear);
        drop(end);
        assert_eq!(ended(outcome(pid, Duration::from_secs(60)).unwrap()), Some(7));
    }

    #[test]
    fn a_process_whose_threads_are_ending_has_an_exit() {
        let (pid, end) = tree::child_without_first_thread(9);
        let waiting = spawn(move || outcome(pid, Duration::from_secs(60)));
        drop(end);
        assert_eq!(ended(waiting.join().unwrap().unwrap()), Some(9));
    }

    #[test]
    fn a_traced_process_is_waited_for_without_use_of_a_processor() {
        let (pid, end) = tree::traced_child(7);
        assert_eq!(outcome(pid, Duration::from_millis(20)).unwrap(), Handover::Unclear);
        let (sender, receiver) = std::sync::mpsc::channel();
        let waiting = spawn(move || {
            sender.send(nix::unistd::gettid()).unwrap();
            exit_of(pid)
        });
        // The system call in which the thread sleeps; "running" if it does not sleep.
        let call = format!("/proc/self/task/{}/syscall", receiver.recv().unwrap());
        let waitid = format!("{} ", nix::libc::SYS_waitid);
        while !std::fs::read_to_string(&call).unwrap().starts_with(&waitid) {
            std::thread::yield_now();
        }
        drop(end);
        assert_eq!(waiting.join().unwrap().unwrap().exit_status(), 7);
    }

    #[test]
    fn a_process_that_runs_is_taken() {
        let mut child = std::process::Command::new("sleep").arg("1000").spawn().unwrap();
        assert_eq!(outcome(child.id(), Duration::ZERO).unwrap(), Handover::Taken);
        child.kill().unwrap();
        wait(child.id(), Duration::MAX).unwrap();
        // The exit can be read again and again.
        for _ in 0..2 {
            assert_eq!(ended(outcome(child.id(), Duration::ZERO).unwrap()), Some(137));
        }
        child.wait().unwrap();
    }

    /// systemd's socket, and a thread that tells this process something over it.
    fn told(limit: Duration) -> (UnixDatagram, JoinHandle<Result<(), Error>>) {
        let (systemd, socket) = UnixDatagram::pair().unwrap();
        systemd.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        (systemd, spawn(move || tell("MAINPID=7", &socket, std::process::id(), limit)))
    }

    fn read(systemd: &UnixDatagram) -> String {
        // systemd's NOTIFY_BUFFER_MAX
        let mut text = [0; 4096];
        let length = systemd.recv(&mut text).unwrap();
        String::from_utf8(text[..length].to_vec()).unwrap()
    }

    #[test]
    fn systemd_has_dealt_with_a_message_once_it_reads_the_next_one() {
        if !nix::unistd::geteuid().is_root() {
            return;
        }
        let (systemd, telling) = told(Duration::from_secs(60));
        assert_eq!(read(&systemd), "MAINPID=7");
        // systemd deals with the message. The second one is in the socket, or about to be.
        let mut fds = [PollFd::new(systemd.as_fd(), PollFlags::POLLIN)];
        assert_eq!(sys::poll(&mut fds, Duration::from_secs(60)), Ok(true));
        assert!(!telling.is_finished());
        assert!(read(&systemd).starts_with("X_NOTHING=-"));
        telling.join().unwrap().unwrap();
    }

    #[test]
    fn systemd_is_not_waited_for_without_a_limit() {
        if !nix::unistd::geteuid().is_root() {
            return;
        }
        let (systemd, telling) = told(Duration::from_millis(20));
        assert!(matches!(telling.join().unwrap(), Err(Error::Silent)));
        assert_eq!(read(&systemd), "MAINPID=7");
    }
}
