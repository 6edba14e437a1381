//! Installation of the package, also after an administrator has changed settings.

use std::path::Path;

use crate::common::node::Node;
use crate::common::process;
use crate::common::spec::Spec;
use crate::common::systemd::{self, DAEMON_SERVICE, DAEMON_SOCKET};
use crate::common::task::{Io, SIGKILL};
use crate::package::{
    LOWER, LooseProgram, NAME, NEW, Package, assert_daemon_is_the_packages, assert_units_are_the_packages,
    state,
};

#[test]
fn after_an_installation_a_container_runs() {
    let _package = Package::installed(NEW);
    assert_eq!(state(DAEMON_SOCKET), ("enabled".to_string(), "active".to_string()));
    assert_eq!(state(DAEMON_SERVICE).1, "inactive", "nothing runs before the first container");

    let node = Node::exclusive();
    let container = node.container("first", Spec::sleeping()).started(&Io::default());
    let unit = systemd::unit_of(&container);
    assert!(systemd::is_active(&unit));
    assert_eq!(systemd::main_pid(&unit), container.pid());
    assert_daemon_is_the_packages();
    let report = process::run(NAME, &["doctor"]).text();
    let status = |line: &str| line.split_whitespace().next().unwrap_or_default().to_string();
    // Of each line except the summary.
    let found: Vec<String> = report.lines().take_while(|line| !line.is_empty()).map(status).collect();
    assert!(found.len() > 10 && found.iter().all(|status| status == "ok" || status == "warning"), "{report}");
}

#[test]
fn every_file_of_the_package_is_there() {
    let _package = Package::installed(NEW);
    let list = process::succeed("dpkg", &["--listfiles", NAME]);
    let files: Vec<&str> = list.lines().collect();
    for file in &files {
        assert!(Path::new(file).exists(), "{file}");
    }
    let doc = format!("/usr/share/doc/{NAME}");
    for file in [
        &format!("/usr/bin/{NAME}"),
        &format!("/usr/lib/systemd/system/{DAEMON_SOCKET}"),
        &format!("/usr/lib/systemd/system/{DAEMON_SERVICE}"),
        &format!("/usr/lib/systemd/system-preset/50-{NAME}.preset"),
        &format!("/usr/share/man/man1/{NAME}.1.gz"),
        &format!("/usr/share/man/man5/{NAME}.5.gz"),
        &format!("/usr/share/man/man7/{NAME}.7.gz"),
        &format!("/usr/share/bash-completion/completions/{NAME}"),
        &format!("{doc}/copyright"),
        &format!("{doc}/THIRD-PARTY.gz"),
        &format!("{doc}/changelog.gz"),
        &format!("{doc}/docker.md"),
        &format!("{doc}/examples/config-v2.toml"),
        &format!("{doc}/examples/config-v3.toml"),
        &format!("{doc}/examples/daemon.json"),
        &format!("{doc}/examples/runtimeclass.yaml"),
    ] {
        assert!(files.contains(&file.as_str()), "the package lacks {file}: {list}");
    }
    let verified = process::run("dpkg", &["--verify", NAME]);
    assert_eq!((verified.code, verified.text().as_str()), (Some(0), ""));
    // systemd reports no problem in the units.
    let units = process::run("systemd-analyze", &["verify", "--man=no", DAEMON_SOCKET, DAEMON_SERVICE]);
    // The daemon works without these settings, which systemd has since version 254 (docs/restarts.md).
    let unknown_before_254 = ["FileDescriptorStorePreserve", "RestartSteps", "RestartMaxDelaySec"]
        .map(|key| format!("Unknown key '{key}'"));
    let is_known = |line: &str| unknown_before_254.iter().any(|complaint| line.contains(complaint));
    let mut complaints = units.stderr.lines().filter(|line| line.contains(NAME));
    assert!(complaints.all(is_known), "{}", units.stderr);
}

#[test]
fn an_upgrade_does_not_enable_a_socket_that_the_administrator_disabled() {
    let package = Package::installed(LOWER);
    process::succeed("systemctl", &["disable", DAEMON_SOCKET]);
    package.install(NEW);
    assert_eq!(state(DAEMON_SOCKET).0, "disabled");
}

#[test]
fn an_installation_after_a_removal_enables_the_socket_again() {
    let package = Package::installed(NEW);
    assert_eq!(package.remove().code, Some(0));
    package.install(NEW);
    assert_eq!(state(DAEMON_SOCKET), ("enabled".to_string(), "active".to_string()));
}

#[test]
fn an_installation_takes_over_a_daemon_that_a_copy_of_the_program_has_started() {
    let _program = LooseProgram::alone();
    let node = Node::exclusive();
    let container = node.container("tried", Spec::sleeping()).started(&Io::default());
    let pid = container.pid();
    let fragment = systemd::property(DAEMON_SOCKET, "FragmentPath");
    assert!(fragment.starts_with("/run/systemd/transient/"), "{fragment}");
    let _package = Package::installed(NEW);
    assert_units_are_the_packages();
    assert_daemon_is_the_packages();
    assert_eq!(container.pid(), pid);
    container.kill(SIGKILL).expect("kill");
    assert_eq!(container.exit_status(), 137);
    container.delete().expect("delete");
}

#[test]
fn a_start_of_containerd_finds_the_shim_although_somebody_has_stopped_its_socket() {
    let _package = Package::installed(NEW);
    let node = Node::exclusive();
    let container = node.container("stopped", Spec::sleeping()).started(&Io::default());
    let pid = container.pid();
    let stop = |units: &[&str]| process::succeed("systemctl", &[&["stop"], units].concat());
    stop(&["containerd.service"]);
    stop(&[DAEMON_SOCKET, DAEMON_SERVICE]);
    node.restart_containerd();
    assert_eq!(container.pid(), pid);
    assert!(process::runs(pid));
}
