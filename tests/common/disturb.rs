//! Disturbances of the daemon, and of the services that it needs.

use nix::sys::signal::Signal;

use super::node::Node;
use super::systemd::{self, DAEMON_SERVICE};
use super::{daemon, process, wait};

#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Disturbance {
    /// SIGKILL to the daemon.
    Kill,
    /// `systemctl kill` of the daemon's service: SIGKILL to every process in its cgroup.
    WholeCgroup,
    /// SIGSTOP to the daemon, until its watchdog acts.
    Hang,
    /// SIGSTOP to the daemon while systemd reads all units again, and SIGCONT: it receives many signals at once.
    Stall,
    /// `systemctl restart` of the daemon.
    Restart,
    /// `systemctl daemon-reexec`.
    Reexec,
    /// `systemctl daemon-reload`.
    Reload,
    /// A restart of the system bus.
    Bus,
    /// SIGKILL to containerd, and a start of the next one.
    Containerd,
}

impl Disturbance {
    pub const ALL: [Disturbance; 9] = [
        Disturbance::Kill,
        Disturbance::WholeCgroup,
        Disturbance::Hang,
        Disturbance::Stall,
        Disturbance::Restart,
        Disturbance::Reexec,
        Disturbance::Reload,
        Disturbance::Bus,
        Disturbance::Containerd,
    ];

    pub fn name(self) -> &'static str {
        match self {
            Disturbance::Kill => "kill",
            Disturbance::WholeCgroup => "cgroup",
            Disturbance::Hang => "hang",
            Disturbance::Stall => "stall",
            Disturbance::Restart => "restart",
            Disturbance::Reexec => "reexec",
            Disturbance::Reload => "reload",
            Disturbance::Bus => "bus",
            Disturbance::Containerd => "containerd",
        }
    }

    /// Whether it disturbs the daemon. The stock shim has no daemon.
    pub fn is_ours(self) -> bool {
        use Disturbance::{Hang, Kill, Restart, Stall, WholeCgroup};
        matches!(self, Kill | WholeCgroup | Hang | Stall | Restart)
    }

    /// Disturbs, even if the effects of an earlier disturbance last. Returns an error if systemd refuses. systemctl waits for
    /// its job; the caller has to wait for the effects of the other disturbances.
    pub fn happen(self) -> Result<(), String> {
        match self {
            Disturbance::Kill => signal_daemon(Signal::SIGKILL),
            Disturbance::WholeCgroup => daemon::kill_cgroup(),
            Disturbance::Hang => signal_daemon(Signal::SIGSTOP),
            Disturbance::Stall => return stall(),
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

    /// Disturbs, and waits until everything works again.
    pub fn pass(self, node: &Node) {
        let daemon = daemon::serving();
        self.happen().unwrap_or_else(|error| panic!("{self:?}: {error}"));
        match (self, daemon) {
            (_, Some(pid)) if self.is_ours() && self != Disturbance::Stall => {
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

/// Sends a signal to the daemon, if it runs.
fn signal_daemon(signal: Signal) {
    if let Some(pid) = daemon::pid() {
        daemon::signal(pid, signal);
    }
}

/// Stops the daemon during a `systemctl daemon-reload`. Another disturbance may end it meanwhile.
fn stall() -> Result<(), String> {
    let stalled = daemon::pid();
    signal_daemon(Signal::SIGSTOP);
    let reloaded = systemctl(&["daemon-reload"]);
    if daemon::pid() == stalled {
        signal_daemon(Signal::SIGCONT);
    }
    reloaded
}

/// systemd stops restarting a service that ends too often: reset its counter.
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

/// Starts containerd at once. systemd would wait some seconds, and give up after some restarts.
pub fn start_containerd() {
    forget_starts();
    process::succeed("systemctl", &["restart", "containerd.service"]);
}
