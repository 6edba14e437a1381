//! The daemon as systemd runs it: killed, held up, stopped, and back again.

use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::Duration;

use nix::errno::Errno;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::systemd::{self, DAEMON_SERVICE};
use super::{process, wait};

/// The daemon's process, if there is one. From `/proc`, since systemd may be executing itself anew.
pub fn pid() -> Option<u32> {
    process::with_command_line("containerd-shim-systemd-v1 serve").first().copied()
}

/// Whether a signal has stopped it, as SIGSTOP does.
pub fn is_stopped(pid: u32) -> bool {
    process::status(pid, "State").is_some_and(|state| state.starts_with('T'))
}

/// Sends a signal to a process that may have gone meanwhile.
pub fn signal(pid: u32, signal: Signal) {
    let raw = i32::try_from(pid).expect("a pid is a small number");
    match kill(Pid::from_raw(raw), signal) {
        Ok(()) | Err(Errno::ESRCH) => {}
        Err(errno) => panic!("send {signal} to {pid}: {errno}"),
    }
}

/// Sends SIGKILL to the daemon as soon as there is one; returns its pid. It may be anywhere by then, also
/// in the middle of its own start.
pub fn kill_now() -> u32 {
    let pid = wait::until("there is a daemon", pid);
    signal(pid, Signal::SIGKILL);
    wait::until_true("a killed daemon is gone", || self::pid() != Some(pid));
    pid
}

/// Waits until a daemon other than that one serves.
pub fn wait_for_another(than: u32) -> u32 {
    wait::until("another daemon serves", || serving().filter(|pid| *pid != than))
}

/// Kills the daemon and waits until the next one serves.
pub fn killed() {
    wait_for_another(kill_now());
}

/// Does something while the daemon is killed over and over. It lives for a moment each time, on some turns
/// for less than it takes to be ready. Says how often.
pub fn killed_during<T>(act: impl FnOnce() -> T) -> (T, u64) {
    let done = thread::scope(|scope| {
        let (end, ended) = mpsc::channel::<()>();
        let killer = scope.spawn(move || {
            let mut kills = 0;
            let moment = |kills| Duration::from_millis(40 * (kills % 7));
            while ended.recv_timeout(moment(kills)) == Err(RecvTimeoutError::Timeout) {
                kill_now();
                kills += 1;
            }
            kills
        });
        let done = act();
        drop(end);
        (done, killer.join().expect("the killer does not panic"))
    });
    wait::until("the daemon serves again", serving);
    done
}

/// The pid of a daemon that has said that it is ready.
pub fn serving() -> Option<u32> {
    let pid = pid()?;
    // One question, so that both answers are about the same daemon.
    let args = ["show", "--property=ActiveState,MainPID", DAEMON_SERVICE];
    let shown = process::run("systemctl", &args).text();
    let serves = |line: &str| line == "ActiveState=active";
    let is_main = |line: &str| line == format!("MainPID={pid}");
    (shown.lines().any(serves) && shown.lines().any(is_main)).then_some(pid)
}

/// `systemctl restart`, or another verb of systemctl's, on the daemon's service.
pub fn systemctl(verb: &str) {
    process::succeed("systemctl", &[verb, DAEMON_SERVICE]);
}

/// A time in which the daemon does nothing, not even hear: it is stopped by a signal. SIGKILL ends it, so
/// that what it has not done or heard by then it never will.
pub struct Down {
    pid: u32,
}

impl Down {
    pub fn begin() -> Down {
        let pid = wait::until("there is a daemon", serving);
        signal(pid, Signal::SIGSTOP);
        wait::until_true("the daemon is stopped", || is_stopped(pid));
        Down { pid }
    }

    /// The next daemon serves when this returns.
    pub fn end(self) {
        let pid = self.pid;
        drop(self);
        wait_for_another(pid);
    }
}

impl Drop for Down {
    fn drop(&mut self) {
        signal(self.pid, Signal::SIGKILL);
    }
}

/// The systemd of this machine, by its number.
pub fn systemd_version() -> u32 {
    let text = process::succeed("systemctl", &["--version"]);
    let number = text.split_whitespace().nth(1).and_then(|word| word.parse().ok());
    number.unwrap_or_else(|| panic!("no version in {text:?}"))
}

/// A drop-in of the daemon's own service, in force after its restart and gone on drop.
pub struct DropIn;

impl DropIn {
    const DIRECTORY: &str = "/run/systemd/system/containerd-shim-systemd-v1.service.d";

    pub fn new(text: &str) -> DropIn {
        let drop_in = DropIn;
        std::fs::create_dir_all(Self::DIRECTORY).expect("make the directory of a drop-in");
        std::fs::write(format!("{}/50-test.conf", Self::DIRECTORY), text).expect("write a drop-in");
        process::succeed("systemctl", &["daemon-reload"]);
        systemctl("restart");
        drop_in
    }
}

impl Drop for DropIn {
    fn drop(&mut self) {
        // Each a thing to tidy up: the next test would say what is wrong.
        let _ = std::fs::remove_dir_all(Self::DIRECTORY);
        process::run("systemctl", &["daemon-reload"]);
        process::run("systemctl", &["restart", DAEMON_SERVICE]);
    }
}

/// How often systemd has started it again by itself.
pub fn restarts() -> u32 {
    systemd::property(DAEMON_SERVICE, "NRestarts").parse().unwrap_or(0)
}
