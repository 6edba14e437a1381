//! Common problems on somebody's first day: the error of `ctr run` says what failed, on what, and what to do, and
//! `doctor` reports the same problem.

use serde_json::Value;
use std::ffi::OsStr;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use crate::common::daemon::{self, Frozen};
use crate::common::disturb::{start_bus, stop_bus};
use crate::common::image::IMAGE;
use crate::common::leaks::STATE_DIRECTORY;
use crate::common::node::{NAMESPACE, Need, Node, unique};
use crate::common::process::{self, Outcome};
use crate::common::shim::stop_daemon;
use crate::common::spec::Spec;
use crate::common::stdio::Scratch;
use crate::common::systemd::{self, DropIn};
use crate::common::task::Io;
use crate::common::{needs, wait};
use crate::ctr::Made;

const PROGRAM: &str = "containerd-shim-systemd-v1";

/// The error of `ctr run` on a machine where it has to fail. The container is removed.
fn refused(node: &Node, flags: &[&str]) -> String {
    let made = Made(unique("newcomer"));
    let shares = if Need::Controllers.missing().is_some() { &["--cpu-shares", "0"][..] } else { &[] };
    let head = ["90", "ctr", "--namespace", NAMESPACE, "run", "--rm", "--runtime", &node.runtime];
    let outcome = process::run("timeout", &[&head, shares, flags, &[IMAGE, &made.0, "true"]].concat());
    assert_eq!(outcome.code, Some(1), "{outcome:?}");
    outcome.stderr
}

/// The checks of `doctor` that are not OK: status, name, and the rest of the line.
fn faults(outcome: &Outcome) -> Vec<[String; 3]> {
    let report: Value =
        serde_json::from_slice(&outcome.stdout).unwrap_or_else(|error| panic!("{error}: {outcome:?}"));
    let checks = report["checks"].as_array().expect("checks").iter();
    let text = |check: &Value, name: &str| check[name].as_str().unwrap_or_default().to_string();
    let faults = checks.filter(|check| check["status"] != "ok").map(|check| {
        [
            text(check, "status"),
            text(check, "name"),
            format!("{}: {}", text(check, "found"), text(check, "advice")),
        ]
    });
    // A guest may lack controllers; other tests replace the program.
    faults.filter(|[_, name, line]| name != "controllers" && !line.contains("was replaced since")).collect()
}

fn doctor() -> Outcome {
    process::run(PROGRAM, &["doctor", "--json"])
}

/// Asserts that `doctor` finds exactly one error, with this name and these words.
#[track_caller]
fn finds(outcome: &Outcome, name: &str, words: &[&str]) {
    let faults = faults(outcome);
    assert_eq!(outcome.code, Some(1), "{outcome:?}");
    let found = faults.iter().any(|[status, check, line]| {
        status == "error" && check == name && words.iter().all(|word| line.contains(word))
    });
    assert!(found, "{name} {words:?}: {faults:?}");
    assert!(faults.iter().all(|[status, check, _]| status != "error" || check == name), "{faults:?}");
}

#[track_caller]
fn says(error: &str, words: &[&str]) {
    for word in words {
        assert!(error.contains(word), "{word:?} is not in {error}");
    }
}

/// The content of a file, which is restored on drop.
struct Kept(&'static str, Vec<u8>);

impl Kept {
    fn new(path: &'static str) -> Kept {
        Kept(path, fs::read(path).expect("read a file"))
    }
}

impl Drop for Kept {
    fn drop(&mut self) {
        let _ = fs::write(self.0, &self.1);
    }
}

/// A command that undoes something on drop, also when a test fails.
struct Undo(&'static [&'static [&'static str]]);

impl Drop for Undo {
    fn drop(&mut self) {
        for command in self.0 {
            process::run(command[0], &command[1..]);
        }
    }
}

#[test]
fn a_healthy_machine_has_nothing_to_do() {
    needs!(OurShim);
    let node = Node::exclusive();
    let container = node.container("healthy", Spec::sleeping()).started(&Io::default());
    let outcome = doctor();
    assert_eq!((outcome.code, faults(&outcome)), (Some(0), Vec::new()));
    // Other users may run doctor, too. It names the checks for which they lack permission.
    let outcome = process::as_nobody(&[PROGRAM, "doctor", "--json"]);
    assert_eq!(outcome.code, Some(0), "{outcome:?}");
    assert!(faults(&outcome).iter().all(|[status, ..]| status == "unknown"), "{outcome:?}");
    assert!(faults(&outcome).iter().any(|[_, name, _]| name == "records"), "{outcome:?}");
    container.end();
}

#[test]
fn a_wrong_option_is_named() {
    needs!(OurShim);
    let node = Node::exclusive();
    let place = Scratch::new("newcomer");
    let file = place.text("options.toml");
    fs::write(&file, "BinaryNmae = \"crun\"\n").expect("write options");
    says(&refused(&node, &["--runtime-config-path", &file]), &["BinaryNmae", &file, "BinaryName"]);
    let kept = Kept::new("/etc/containerd/config.toml");
    let runtime = "\n[plugins.\"io.containerd.grpc.v1.cri\".containerd.runtimes.systemd]\n\
                   runtime_type = \"io.containerd.systemd.v1\"\noptions.BinaryNmae = \"crun\"\n";
    // containerd is not restarted: doctor reads the file that the next start of containerd would read.
    let text = "version = 2\n".to_string() + runtime;
    fs::write(kept.0, text).expect("write containerd's configuration");
    finds(&doctor(), "configuration", &["BinaryNmae", "config.toml", "runtime systemd"]);
}

#[test]
fn a_masked_unit_is_named() {
    needs!(OurShim);
    let node = Node::exclusive();
    let unit = "containerd-shim-systemd-v1.socket";
    stop_daemon();
    // A service that keeps descriptors stays loaded, from systemd 262 on with its socket, and no mask takes the place of a transient
    // unit that is loaded. An older systemd, and a service that is not loaded, have nothing to clean.
    process::run("systemctl", &["clean", "--what=fdstore", systemd::DAEMON_SERVICE]);
    let undo = Undo(&[&["systemctl", "unmask", "--runtime", "containerd-shim-systemd-v1.socket"]]);
    process::succeed("systemctl", &["mask", "--runtime", unit]);
    says(&refused(&node, &[]), &[unit, "masked", "systemctl unmask"]);
    finds(&doctor(), "units", &[unit, "masked", "systemctl unmask"]);
    drop(undo);
    node.container("unmasked", Spec::sleeping()).started(&Io::default()).end();
}

#[test]
fn a_drop_in_with_which_no_container_starts_is_named() {
    needs!(OurShim);
    let node = Node::exclusive();
    let namespace = unique("broken");
    let drop_in = DropIn::for_namespace(&namespace, "[Service]\nType=simple\n");
    let start =
        || node.container("broken", Spec::sleeping()).namespace(&namespace).make().create(&Io::default());
    start().expect_err("a unit of another type");
    let file = format!("containerd-{}-.service.d/50-e2e.conf", systemd::escaped(&namespace));
    finds(&doctor(), "units", &[&file, "sets Type=simple", "remove Type=simple", "daemon-reload"]);
    drop(drop_in);
    process::succeed("systemctl", &["daemon-reload"]);
    start().expect("the remedy helps");
}

#[test]
fn a_full_disk_is_named() {
    needs!(OurShim);
    let node = Node::exclusive();
    stop_daemon();
    fs::create_dir_all(STATE_DIRECTORY).expect("make the directory of the records");
    process::succeed("mount", &["-t", "tmpfs", "-o", "size=64k,mode=700", "none", STATE_DIRECTORY]);
    let undo = Undo(&[
        &["systemctl", "stop", "containerd-shim-systemd-v1.socket", "containerd-shim-systemd-v1.service"],
        &["umount", STATE_DIRECTORY],
    ]);
    // dd ends when there is no more room.
    process::run("dd", &["if=/dev/zero", &format!("of={STATE_DIRECTORY}/.fill"), "bs=512"]);
    says(&refused(&node, &[]), &[STATE_DIRECTORY, "No space left", "doctor"]);
    finds(&doctor(), "space", &[STATE_DIRECTORY, "make it larger"]);
    drop(undo);
}

#[test]
fn a_missing_runc_is_reported() {
    needs!(OurShim);
    let node = Node::exclusive();
    process::succeed("mount", &["--bind", "/dev/null", "/usr/sbin/runc"]);
    let undo = Undo(&[&["umount", "/usr/sbin/runc"]]);
    says(&refused(&node, &[]), &["\"runc\"", "BinaryName", "/usr/sbin"]);
    finds(&doctor(), "oci-runtime", &["\"runc\"", "install it"]);
    drop(undo);
}

/// A drop-in for containerd's service. The service is restarted with the drop-in, and without it on drop.
pub struct ForContainerd<'n>(&'n Node);

impl<'n> ForContainerd<'n> {
    const DIRECTORY: &'static str = "/run/systemd/system/containerd.service.d";

    pub fn new(node: &'n Node, text: &str) -> ForContainerd<'n> {
        fs::create_dir_all(Self::DIRECTORY).expect("make the directory of drop-ins");
        fs::write(Path::new(Self::DIRECTORY).join("newcomer.conf"), text).expect("write a drop-in");
        process::succeed("systemctl", &["daemon-reload"]);
        node.restart_containerd();
        ForContainerd(node)
    }
}

impl Drop for ForContainerd<'_> {
    fn drop(&mut self) {
        let _ = fs::remove_file(Path::new(Self::DIRECTORY).join("newcomer.conf"));
        process::run("systemctl", &["daemon-reload"]);
        self.0.restart_containerd();
    }
}

#[test]
fn cgroup_v1_is_reported() {
    needs!(OurShim);
    let node = Node::exclusive();
    let changed = ForContainerd::new(&node, "[Service]\nTemporaryFileSystem=/sys/fs/cgroup\n");
    says(&refused(&node, &[]), &["cgroup v2", "/sys/fs/cgroup", "systemd.unified_cgroup_hierarchy=1"]);
    drop(changed);
    let script = format!("mount -t tmpfs none /sys/fs/cgroup; exec {PROGRAM} doctor --json");
    let outcome = process::run("unshare", &["--mount", "sh", "-c", &script]);
    finds(&outcome, "cgroup", &["/sys/fs/cgroup", "systemd.unified_cgroup_hierarchy=1"]);
}

#[test]
fn a_bus_that_does_not_run_is_reported() {
    needs!(OurShim);
    let node = Node::exclusive();
    // The daemon runs already, so it loses its connection.
    node.container("before", Spec::sleeping()).started(&Io::default()).end();
    stop_bus();
    let (error, outcome) = (refused(&node, &[]), doctor());
    start_bus();
    says(&error, &["systemd can't be reached over D-Bus", "check that dbus runs"]);
    finds(&outcome, "dbus", &["D-Bus", "systemctl status dbus.socket"]);
    // A daemon that starts without a bus answers no call, and without a bus nobody can start its units.
    let stop_service = || drop(process::succeed("systemctl", &["stop", systemd::DAEMON_SERVICE]));
    for stop in [&stop_service as &dyn Fn(), &stop_daemon] {
        stop();
        stop_bus();
        let error = refused(&node, &[]);
        start_bus();
        says(&error, &["systemd can't be reached over D-Bus", "doctor"]);
    }
    node.container("after", Spec::sleeping()).started(&Io::default()).end();
}

#[test]
fn a_daemon_that_waits_for_the_bus_is_reported() {
    needs!(OurShim);
    let node = Node::exclusive();
    let before = node.container("before", Spec::sleeping()).started(&Io::default());
    // The next daemon waits for the bus, which accepts connections and does not answer.
    let frozen = Frozen::new(systemd::main_pid("dbus.service"));
    daemon::kill_now();
    let error = refused(&node, &[]);
    drop(frozen);
    says(
        &error,
        &["has not answered for 30 s", "systemctl status containerd-shim-systemd-v1.service", "doctor"],
    );
    before.end();
}

#[test]
fn a_drop_in_with_which_the_daemon_cant_start_is_named() {
    needs!(OurShim);
    let node = Node::exclusive();
    let undo = Undo(&[&["systemctl", "daemon-reload"]]);
    for (lines, setting) in [
        ("ExecStartPre=false", "ExecStartPre=false"),
        ("ExecStart=\nExecStart=/bin/false", "ExecStart=/bin/false"),
        ("RootDirectory=/usr", "RootDirectory=/usr"),
        ("Type=oneshot", "Type=oneshot"),
    ] {
        stop_daemon();
        let _drop_in = DropIn::for_daemon(&format!("[Service]\n{lines}\n"));
        process::succeed("systemctl", &["daemon-reload"]);
        let begun = Instant::now();
        let error = refused(&node, &[]);
        assert!(begun.elapsed() < Duration::from_secs(35), "{:?}: {error}", begun.elapsed());
        let words = [setting, "containerd-shim-systemd-v1.service.d/50-e2e.conf"];
        says(&error, &words);
        let outcome = doctor();
        let is_named = |[status, _, line]: &[String; 3]| {
            status == "error" && words.iter().all(|word| line.contains(word))
        };
        assert!(faults(&outcome).iter().any(is_named), "{outcome:?}");
    }
    stop_daemon();
    drop(undo);
    node.container("after", Spec::sleeping()).started(&Io::default()).end();
}

#[test]
fn a_directory_of_records_that_cant_be_used_is_named() {
    needs!(OurShim);
    let node = Node::exclusive();
    stop_daemon();
    fs::remove_dir_all(STATE_DIRECTORY).expect("remove the directory of the records");
    fs::write(STATE_DIRECTORY, "").expect("write a file");
    let undo = Undo(&[&["rm", "-f", STATE_DIRECTORY]]);
    says(&refused(&node, &[]), &[STATE_DIRECTORY, "Not a directory", "doctor"]);
    finds(&doctor(), "records", &[STATE_DIRECTORY, "is no directory"]);
    drop(undo);
    node.container("after", Spec::sleeping()).started(&Io::default()).end();
}

#[test]
fn sockets_whose_files_were_removed_are_made_again() {
    needs!(OurShim, PreservedStore);
    let node = Node::exclusive();
    let before = node.container("before", Spec::sleeping()).started(&Io::default());
    process::succeed("sh", &["-c", "rm /run/containerd-shim-systemd-v1.sock*"]);
    node.container("after", Spec::sleeping()).started(&Io::default()).end();
    before.exec(Spec::sh("exit 5")).started(&Io::default()).wait().expect("the end of an exec");
    before.end();
}

/// systemd knows no settings of the daemon's units any more: nothing restarts the daemon.
#[test]
fn a_daemon_whose_unit_files_were_removed_is_started_again() {
    needs!(OurShim);
    let node = Node::exclusive();
    let fragment = systemd::property(systemd::DAEMON_SERVICE, "FragmentPath");
    if !fragment.starts_with("/run/systemd/transient/") {
        return needs::skip(needs::name_of(|| ()), "the daemon's units are not transient here");
    }
    let before = node.container("before", Spec::sleeping()).started(&Io::default());
    let pid = before.pid();
    process::succeed("sh", &["-c", "rm /run/systemd/transient/containerd-shim-systemd-v1.*"]);
    process::succeed("systemctl", &["daemon-reload"]);
    assert_eq!(systemd::property(systemd::DAEMON_SERVICE, "LoadState"), "not-found");
    // The daemon runs on.
    assert_eq!(before.exec_sh("exit 5").exit_status(), 5);
    daemon::kill_now();
    wait::until_true("the service has failed", || {
        systemd::property(systemd::DAEMON_SERVICE, "ActiveState") == "failed"
    });
    node.container("after", Spec::sleeping()).started(&Io::default()).end();
    for unit in [systemd::DAEMON_SERVICE, systemd::DAEMON_SOCKET] {
        assert_eq!(systemd::property(unit, "LoadState"), "loaded", "{unit}");
        assert!(systemd::is_active(unit), "{unit}");
    }
    assert_eq!(before.pid(), pid);
    assert_eq!(before.exec_sh("exit 7").exit_status(), 7);
    before.end();
    // The next daemon is restarted as usual.
    daemon::kill_now();
    node.container("last", Spec::sleeping()).started(&Io::default()).end();
}

#[test]
fn tasks_are_listed_and_inspected_by_every_user() {
    needs!(OurShim);
    let node = Node::exclusive();
    let container = node.container("listed", Spec::sleeping()).started(&Io::default());
    let unit = crate::common::systemd::unit_of(&container);
    let pid = container.pid().to_string();
    let nobody = ["--reuid=65534", "--regid=65534", "--clear-groups", PROGRAM];
    for user in [vec![PROGRAM], [vec!["setpriv"], nobody.to_vec()].concat()] {
        let run = |args: &[&str]| process::succeed(user[0], &[&user[1..], args].concat());
        let table = run(&["ps", "--namespace", NAMESPACE]);
        let line = table.lines().find(|line| line.contains(&unit)).unwrap_or_else(|| panic!("{table}"));
        let words: Vec<&str> = line.split_whitespace().collect();
        assert!(words.starts_with(&[NAMESPACE, &container.id, &unit]), "{line}");
        assert!(words.contains(&"running") && words.contains(&pid.as_str()), "{line}");
        assert!(run(&["ps", "-q"]).lines().any(|id| id == container.id), "{}", run(&["ps", "-q"]));
        let page = run(&["inspect", &container.id[..container.id.len() - 1]]);
        assert!(page.contains(&unit) && page.contains(&pid), "{page}");
    }
    let details = process::succeed(PROGRAM, &["inspect", "--json", &container.id]);
    let details: Value = serde_json::from_str(&details).expect("JSON");
    assert_eq!(details["record"]["unit"], unit.as_str());
    container.kill(9).expect("kill");
    assert_eq!(container.exit_status(), 137);
    let table = process::succeed(PROGRAM, &["ps"]);
    assert!(table.contains("stopped (137)"), "{table}");
    let missing = process::run(PROGRAM, &["inspect", "no-such-task"]);
    assert!(missing.code == Some(1) && missing.stderr.contains("no-such-task"), "{missing:?}");
    container.delete().expect("delete");
}

#[test]
fn a_reader_that_has_read_enough_is_no_failure() {
    needs!(OurShim);
    let node = Node::exclusive();
    let container = node.container("piped", Spec::sleeping()).started(&Io::default());
    for args in [&["ps"][..], &["inspect", &container.id], &["doctor"], &["ps", "--help"], &["-h"]] {
        let (reader, writer) = std::io::pipe().expect("a pipe");
        drop(reader);
        let outcome = process::outcome(Command::new(PROGRAM).args(args).stdout(writer));
        assert_eq!((outcome.code, outcome.stderr.as_str()), (Some(0), ""), "{args:?}");
    }
    container.end();
}

#[test]
fn an_argument_that_is_not_text_is_a_mistake() {
    needs!(OurShim);
    let broken = OsStr::from_bytes(b"web\xff");
    for args in [&["ps"][..], &["inspect"], &["doctor"], &["-id"], &["launch", "container", "default"], &[]] {
        let outcome = process::outcome(Command::new(PROGRAM).args(args).arg(broken));
        assert_eq!(outcome.code, Some(2), "{args:?}: {outcome:?}");
        assert!(outcome.stderr.contains("not UTF-8 text"), "{args:?}: {outcome:?}");
    }
}

#[test]
fn the_tables_of_every_version_of_containerds_configuration_are_known() {
    needs!(OurShim);
    let _node = Node::exclusive();
    let kept = Kept::new("/etc/containerd/config.toml");
    // containerd is not restarted: doctor reads the file that the next start of containerd would read.
    for version in [3, 4] {
        let text = format!(
            "version = {version}\n[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.systemd]\n\
             runtime_type = \"io.containerd.systemd.v1\"\noptions.log = \"tee\"\n"
        );
        fs::write(kept.0, text).expect("write containerd's configuration");
        let outcome = doctor();
        assert_eq!((outcome.code, faults(&outcome)), (Some(0), Vec::new()), "{version}");
    }
    let text = "version = 3\n[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.systemd]\n\
                runtime_type = \"io.containerd.systemd.v1\"\n\
                options.Properties = { TimeoutSpotSec = \"5\" }\n";
    fs::write(kept.0, text).expect("write containerd's configuration");
    finds(&doctor(), "configuration", &["runtime systemd", "no property TimeoutSpotUSec"]);
}
