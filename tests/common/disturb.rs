//! What can happen to the daemon and to what it lives on.

use nix::sys::signal::Signal;

use super::node::Node;
use super::systemd::{self, DAEMON_SERVICE};
use super::{daemon, process, wait};

#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Disturbance {
    /// SIGKILL to the daemon.
    Kill,
    /// SIGSTOP to the daemon: its watchdog finds out.
    Hang,
    /// `systemctl restart` of the daemon.
    Restart,
    /// systemd executes itself anew.
    Reexec,
    /// systemd reads its units again.
    Reload,
    /// The system bus is restarted.
    Bus,
    /// SIGKILL to containerd, and a new one.
    Containerd,
}

impl Disturbance {
    pub const ALL: [Disturbance; 7] = [
        Disturbance::Kill,
        Disturbance::Hang,
        Disturbance::Restart,
        Disturbance::Reexec,
        Disturbance::Reload,
        Disturbance::Bus,
        Disturbance::Containerd,
    ];

    pub fn name(self) -> &'static str {
        match self {
            Disturbance::Kill => "kill",
            Disturbance::Hang => "hang",
            Disturbance::Restart => "restart",
            Disturbance::Reexec => "reexec",
            Disturbance::Reload => "reload",
            Disturbance::Bus => "bus",
            Disturbance::Containerd => "containerd",
        }
    }

    /// Whether it happens to our daemon, which the stock shim has nothing like.
    pub fn is_ours(self) -> bool {
        matches!(self, Disturbance::Kill | Disturbance::Hang | Disturbance::Restart)
    }

    /// Lets it happen, whatever is going on, and says if systemd did not want to. systemctl waits for what it
    /// has asked for; of the rest the caller sees what comes of it.
    pub fn happen(self) -> Result<(), String> {
        match self {
            Disturbance::Kill => signal_daemon(Signal::SIGKILL),
            Disturbance::Hang => signal_daemon(Signal::SIGSTOP),
            Disturbance::Restart => return systemctl(&["restart", DAEMON_SERVICE]),
            Disturbance::Reexec => return systemctl(&["daemon-reexec"]),
            Disturbance::Reload => return systemctl(&["daemon-reload"]),
            Disturbance::Bus => {
                forget_starts();
                return systemctl(&["restart", "dbus.service"]);
            }
            Disturbance::Containerd => {
                kill_containerd();
                start_containerd();
            }
        }
        Ok(())
    }

    /// Lets it happen and waits until everything is there again.
    pub fn pass(self, node: &Node) {
        let daemon = daemon::serving();
        self.happen().unwrap_or_else(|error| panic!("{self:?}: {error}"));
        match (self, daemon) {
            (Disturbance::Kill | Disturbance::Hang | Disturbance::Restart, Some(pid)) => {
                daemon::wait_for_another(pid);
            }
            (Disturbance::Containerd, _) => node.wait_for_containerd(),
            _ => wait::until_true("systemd answers", || systemctl(&["show"]).is_ok()),
        }
    }
}

fn systemctl(args: &[&str]) -> Result<(), String> {
    let outcome = process::run("systemctl", args);
    if outcome.code == Some(0) { Ok(()) } else { Err(outcome.stderr) }
}

/// To the daemon if there is one just now.
fn signal_daemon(signal: Signal) {
    if let Some(pid) = daemon::pid() {
        daemon::signal(pid, signal);
    }
}

/// systemd starts what ends too often not any more.
fn forget_starts() {
    let _ = systemctl(&["reset-failed", "dbus.socket", "dbus.service", "containerd.service"]);
}

pub fn stop_bus() {
    process::succeed("systemctl", &["stop", "dbus.socket", "dbus.service"]);
}

pub fn start_bus() {
    forget_starts();
    process::succeed("systemctl", &["start", "dbus.socket", "dbus.service"]);
}

pub fn kill_containerd() {
    let pid = systemd::main_pid("containerd.service");
    if pid != 0 {
        daemon::signal(pid, Signal::SIGKILL);
    }
}

/// At once: by itself it would come back after seconds, and not any more after a few times.
pub fn start_containerd() {
    forget_starts();
    process::succeed("systemctl", &["restart", "containerd.service"]);
}
