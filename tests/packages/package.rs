//! Installs and removes the package.

use std::fs;
use std::path::Path;
use std::process::Command;

use crate::common::process::{self, Outcome};
use crate::common::shim::BINARY;
use crate::common::systemd::{self, DAEMON_SERVICE, DAEMON_SOCKET};

pub const NAME: &str = "containerd-shim-systemd-v1";

/// The package of this source.
pub const NEW: &str = "/usr/local/lib/testbed/packages/new.deb";
/// The same program under a lower version number.
pub const LOWER: &str = "/usr/local/lib/testbed/packages/lower.deb";
/// A version that can only read version 1 of the records (`tests/upgrade/README.md`).
pub const PREVIOUS: &str = "/usr/local/lib/testbed/packages/previous.deb";

/// The configuration with which mmdebstrap lets dpkg leave out documentation in the guest.
const EXCLUDES: &str = "/etc/dpkg/dpkg.cfg.d/99mmdebstrap";

/// The package, which is not installed at the beginning and at the end of a test.
pub struct Package;

impl Package {
    pub fn purged() -> Package {
        let _ = fs::remove_file(EXCLUDES);
        purge();
        Package
    }

    pub fn installed(file: &str) -> Package {
        let package = Package::purged();
        package.install(file);
        package
    }

    /// Installs a file as an administrator does; the version may be lower than the one that is installed.
    pub fn install(&self, file: &str) {
        let outcome = self.try_install(file);
        assert_eq!(outcome.code, Some(0), "install {file}: {}{}", outcome.text(), outcome.stderr);
    }

    pub fn try_install(&self, file: &str) -> Outcome {
        apt(&["install", "--allow-downgrades", file])
    }

    pub fn remove(&self) -> Outcome {
        apt(&["remove", NAME])
    }

    pub fn purge(&self) -> Outcome {
        apt(&["purge", NAME])
    }

    /// The version that is installed, and dpkg's state of the package.
    pub fn version(&self) -> (String, String) {
        let shown =
            process::run("dpkg-query", &["--show", "--showformat=${Version} ${db:Status-Status}", NAME]);
        let text = shown.text();
        let (version, status) = text.split_once(' ').unwrap_or(("", ""));
        (version.to_string(), status.to_string())
    }
}

impl Drop for Package {
    fn drop(&mut self) {
        purge();
    }
}

/// A copy of the program in containerd's `PATH`, for which no unit is installed.
pub struct LooseProgram;

impl LooseProgram {
    /// Without the package.
    pub fn alone() -> LooseProgram {
        let package = Package::installed(LOWER);
        fs::copy(Path::new("/usr/bin").join(NAME), BINARY).expect("copy the program");
        drop(package);
        restart_containerd();
        LooseProgram
    }
}

impl Drop for LooseProgram {
    fn drop(&mut self) {
        let _ = fs::remove_file(BINARY);
        restart_containerd();
    }
}

/// containerd remembers where it has found the program.
fn restart_containerd() {
    process::run("systemctl", &["restart", "containerd.service"]);
}

/// The version of a package's file.
pub fn version_of(file: &str) -> String {
    process::succeed("dpkg-deb", &["--field", file, "Version"]).trim().to_string()
}

/// The output of `is-enabled` and `is-active` for a unit.
pub fn state(unit: &str) -> (String, String) {
    let ask = |what| process::run("systemctl", &[what, unit]).text().trim().to_string();
    (ask("is-enabled"), ask("is-active"))
}

/// Asserts that systemd has read the units of the package, and that the socket is enabled.
pub fn assert_units_are_the_packages() {
    for unit in [DAEMON_SOCKET, DAEMON_SERVICE] {
        assert_eq!(systemd::property(unit, "FragmentPath"), format!("/usr/lib/systemd/system/{unit}"));
    }
    assert_eq!(state(DAEMON_SOCKET), ("enabled".to_string(), "active".to_string()));
}

/// Asserts that the daemon runs the program of the package.
pub fn assert_daemon_is_the_packages() {
    let daemon = systemd::main_pid(DAEMON_SERVICE);
    let program = fs::read_link(format!("/proc/{daemon}/exe")).expect("the daemon's program");
    assert_eq!(program, Path::new("/usr/bin").join(NAME));
}

/// Whether the daemon and its socket are served by files of the package.
pub fn is_at_work() -> bool {
    state(DAEMON_SOCKET).1 == "active" && state(DAEMON_SERVICE).1 == "active"
}

fn purge() {
    if Path::new("/usr/bin").join(NAME).exists() || process::run("dpkg", &["--status", NAME]).code == Some(0)
    {
        let outcome = process::run("dpkg", &["--purge", NAME]);
        // A test that has failed may have left containers, which keep the package.
        if outcome.code != Some(0) && !std::thread::panicking() {
            panic!("purge: {}{}", outcome.text(), outcome.stderr);
        }
    }
    process::run("systemctl", &["unmask", DAEMON_SOCKET]);
}

fn apt(arguments: &[&str]) -> Outcome {
    let mut command = Command::new("apt-get");
    command.args(["--quiet", "--yes", "--option=Dpkg::Use-Pty=false", "--option=Dpkg::Progress-Fancy=false"]);
    process::outcome(command.args(arguments).env("DEBIAN_FRONTEND", "noninteractive"))
}
