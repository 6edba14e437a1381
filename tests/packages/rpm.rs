//! The RPM package, with rpm: installation, upgrade, downgrade, removal.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;

use crate::common::daemon;
use crate::common::node::Node;
use crate::common::process::{self, Outcome};
use crate::common::spec::Spec;
use crate::common::systemd::{self, DAEMON_SERVICE, DAEMON_SOCKET};
use crate::common::task::{Io, SIGKILL};
use crate::package::{
    LooseProgram, NAME, Package, assert_daemon_is_the_packages, assert_units_are_the_packages, state,
};

const PACKAGES: &str = "/usr/local/lib/testbed/packages";
const NEW: &str = "new.rpm";
/// The same program under a lower version number.
const LOWER: &str = "lower.rpm";

/// Where rpm looks for its configuration.
const CONFIG: &str = "/usr/lib/rpm";

/// The program that the scripts of an RPM call. On distributions with RPM it belongs to systemd.
const HELPER: &str = "/usr/lib/systemd/systemd-update-helper";
const HELPER_TEXT: &str = "#!/bin/sh
command=$1
shift
case $command in
install-system-units) systemctl --no-reload preset \"$@\" ;;
remove-system-units) systemctl --no-reload disable --now \"$@\" ;;
mark-restart-system-units) for unit; do systemctl set-property \"$unit\" Markers=+needs-restart; done ;;
*) exit 3 ;;
esac
";

/// rpm in the guest, and neither the RPM nor the Debian package at the beginning and at the end.
struct Rpm {
    _debian: Package,
}

impl Rpm {
    fn new() -> Rpm {
        let debian = Package::purged();
        process::succeed("tar", &["-C", PACKAGES, "-xf", &format!("{PACKAGES}/rpm.tar")]);
        let _ = fs::remove_file(CONFIG);
        std::os::unix::fs::symlink(format!("{PACKAGES}/rpm/config"), CONFIG)
            .expect("link rpm's configuration");
        fs::write(HELPER, HELPER_TEXT).expect("write the helper");
        fs::set_permissions(HELPER, fs::Permissions::from_mode(0o755)).expect("make the helper a program");
        Rpm { _debian: debian }
    }

    fn run(&self, arguments: &[&str]) -> Outcome {
        let mut command = Command::new(format!("{PACKAGES}/rpm/rpm"));
        command.env("LD_LIBRARY_PATH", format!("{PACKAGES}/rpm/lib"));
        process::outcome(command.args(arguments).current_dir(PACKAGES))
    }

    /// Runs rpm, and then the actions of systemd's file triggers, which belong to other packages of an RPM
    /// distribution.
    fn install(&self, options: &[&str], file: &str) {
        // The packages that this package requires are installed as Debian packages.
        let arguments = [&["--upgrade", "--nodeps"], options, &[file]].concat();
        let outcome = self.run(&arguments);
        assert_eq!(outcome.code, Some(0), "install {file}: {}{}", outcome.text(), outcome.stderr);
        process::succeed("systemctl", &["daemon-reload"]);
        process::succeed("systemctl", &["reload-or-restart", "--marked"]);
    }

    fn erase(&self) -> Outcome {
        self.run(&["--erase", NAME])
    }

    fn version(&self) -> Option<String> {
        let found = self.run(&["--query", "--queryformat=%{VERSION}", NAME]);
        (found.code == Some(0)).then(|| found.text())
    }
}

impl Drop for Rpm {
    fn drop(&mut self) {
        if self.version().is_some() {
            self.run(&["--erase", "--nodeps", "--noscripts", NAME]);
        }
        for file in [HELPER, CONFIG] {
            let _ = fs::remove_file(file);
        }
        process::run("systemctl", &["daemon-reload"]);
    }
}

#[test]
fn an_rpm_is_installed_upgraded_and_removed_and_keeps_containers() {
    let rpm = Rpm::new();
    rpm.install(&[], LOWER);
    assert_eq!(state(DAEMON_SOCKET).0, "enabled", "the preset enables the socket");
    let verified = rpm.run(&["--verify", "--nodeps", NAME]);
    assert_eq!((verified.code, verified.text().as_str()), (Some(0), ""));

    let node = Node::exclusive();
    let container = node.container("kept", Spec::sleeping()).started(&Io::default());
    let (pid, waiting) = (container.pid(), container.waiting());
    assert_daemon_is_the_packages();

    let refused = rpm.erase();
    assert_eq!(refused.code, Some(1), "{refused:?}");
    for words in [
        "not removed: these containers use it",
        container.id.as_str(),
        "delete them with the client",
        "-bundle BUNDLE delete",
    ] {
        assert!(refused.stderr.contains(words) || refused.text().contains(words), "{words:?}: {refused:?}");
    }
    assert!(rpm.version().is_some());

    // As if an older version were installed, whose socket unit does not name containerd.
    let wanted = format!("/etc/systemd/system/containerd.service.wants/{DAEMON_SOCKET}");
    fs::remove_file(&wanted).expect("remove the link");
    for (options, file) in [([].as_slice(), NEW), (&["--oldpackage"], LOWER)] {
        let before = systemd::main_pid(DAEMON_SERVICE);
        rpm.install(options, file);
        assert_ne!(systemd::main_pid(DAEMON_SERVICE), before, "{file} restarts the daemon");
        assert_eq!(container.pid(), pid, "the container continues after the installation of {file}");
        assert!(Path::new(&wanted).exists(), "{file} enables all that is new");
    }

    container.kill(SIGKILL).expect("kill");
    assert_eq!(waiting.exit().expect("wait").status, 137);
    container.delete().expect("delete");
    let removed = rpm.erase();
    assert_eq!(removed.code, Some(0), "{removed:?}");
    assert_eq!(rpm.version(), None);
    assert_eq!(daemon::processes(), Vec::<u32>::new());
    assert!(!Path::new("/run").join(NAME).exists());
    for unit in [DAEMON_SOCKET, DAEMON_SERVICE] {
        assert!(!Path::new("/usr/lib/systemd/system").join(unit).exists(), "{unit}");
    }
}

#[test]
fn an_rpm_takes_over_a_daemon_that_a_copy_of_the_program_has_started() {
    let _program = LooseProgram::alone();
    let node = Node::exclusive();
    let container = node.container("tried", Spec::sleeping()).started(&Io::default());
    let pid = container.pid();
    // This removes the Debian package, which is not installed.
    let rpm = Rpm::new();
    rpm.install(&[], NEW);
    assert_units_are_the_packages();
    assert_eq!(container.pid(), pid);
    drop(container);
    assert_eq!(rpm.erase().code, Some(0));
}
