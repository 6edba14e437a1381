//! Queries to systemd: units by the names that our shim gives them, their properties, the journal.

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::Value;

use super::container::Container;
use super::exec::Exec;
use super::process;

pub const DAEMON_SERVICE: &str = "containerd-shim-systemd-v1.service";
/// systemd stops this slice between containers and containerd.
pub const ORDER_SLICE: &str = "containerd_shim-order.slice";
pub const DAEMON_SOCKET: &str = "containerd-shim-systemd-v1.socket";

/// The unit of a container: dashes of the namespace escaped, 64 hex digits cut to 12.
pub fn unit_of(container: &Container) -> String {
    format!("containerd-{}-{}.service", escaped(&container.namespace), short(&container.id))
}

pub fn unit_of_exec(container: &Container, exec: &Exec) -> String {
    unit_of(container).replace(".service", &format!(":{}.service", short(&exec.id)))
}

/// A pattern for the units of a container's execs.
pub fn exec_units_of(container: &Container) -> String {
    // A backslash in a pattern escapes the character after it.
    unit_of(container).replace('\\', "\\\\").replace(".service", ":*.service")
}

pub fn slice_of(namespace: &str) -> String {
    format!("containerd-{}.slice", escaped(namespace))
}

pub fn escaped(namespace: &str) -> String {
    namespace.replace('-', "\\x2d")
}

fn short(id: &str) -> &str {
    let is_digest = id.len() == 64 && id.bytes().all(|byte| byte.is_ascii_hexdigit());
    if is_digest { &id[..12] } else { id }
}

/// One property of a unit, as `systemctl show` prints it; empty for one that is unknown or unset.
pub fn property(unit: &str, name: &str) -> String {
    process::succeed("systemctl", &["show", "--value", "--property", name, "--", unit]).trim().to_string()
}

pub fn is_active(unit: &str) -> bool {
    property(unit, "ActiveState") == "active"
}

pub fn main_pid(unit: &str) -> u32 {
    property(unit, "MainPID").parse().unwrap_or_else(|error| panic!("MainPID of {unit}: {error}"))
}

/// The directory of a unit's cgroup; `None` if the unit has no cgroup.
pub fn cgroup(unit: &str) -> Option<PathBuf> {
    let path = property(unit, "ControlGroup");
    (!path.is_empty()).then(|| Path::new("/sys/fs/cgroup").join(path.trim_start_matches('/')))
}

pub fn processes_below(cgroup: &Path) -> Vec<u32> {
    let procs = fs::read_to_string(cgroup.join("cgroup.procs")).unwrap_or_default();
    let mut pids: Vec<u32> = procs.lines().filter_map(|pid| pid.parse().ok()).collect();
    for child in directories(cgroup) {
        pids.extend(processes_below(&child));
    }
    pids
}

pub fn directories(path: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(path).into_iter().flatten().flatten();
    entries
        .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()))
        .map(|entry| entry.path())
        .collect()
}

/// Loaded units whose name matches the pattern, with their state: `name load active sub`.
pub fn list_units(pattern: &str) -> Vec<String> {
    let list =
        process::succeed("systemctl", &["list-units", "--all", "--full", "--plain", "--no-legend", pattern]);
    list.lines().map(|line| line.split_whitespace().take(4).collect::<Vec<_>>().join(" ")).collect()
}

/// Journal entries that match all of `FIELD=value`. Waits until journald has everything that was written so far.
pub fn journal(matches: &[&str]) -> Vec<Value> {
    // Without --sync, a line that a process has just written could be missing.
    process::succeed("journalctl", &["--sync"]);
    let args = [&["--quiet", "--no-pager", "--output=json", "--all"], matches].concat();
    let lines = process::run("journalctl", &args).text();
    lines
        .lines()
        .map(|line| serde_json::from_str(line).unwrap_or_else(|error| panic!("{line}: {error}")))
        .collect()
}

/// A position in the journal.
pub struct Cursor(String);

impl Cursor {
    /// The current end of the journal.
    pub fn now() -> Cursor {
        let last = journal(&["--lines=1"]).pop().expect("a journal has entries");
        Cursor(last["__CURSOR"].as_str().expect("an entry has a cursor").to_string())
    }

    /// The matching entries after this position.
    pub fn entries_since(&self, matches: &[&str]) -> Vec<Value> {
        journal(&[&["--after-cursor", self.0.as_str()], matches].concat())
    }
}

/// The messages of journal entries.
pub fn messages(matches: &[&str]) -> Vec<String> {
    journal(matches).iter().filter_map(|entry| Some(entry["MESSAGE"].as_str()?.to_string())).collect()
}

/// A drop-in for all containers of a namespace, or for other services, removed on drop.
pub struct DropIn {
    directory: PathBuf,
}

impl DropIn {
    pub fn for_namespace(namespace: &str, text: &str) -> DropIn {
        DropIn::new(&format!("containerd-{}-", escaped(namespace)), text)
    }

    /// For every service whose name begins like those of containers: also for the daemon's.
    pub fn for_all(text: &str) -> DropIn {
        DropIn::new("containerd-", text)
    }

    pub fn for_daemon(text: &str) -> DropIn {
        DropIn::new("containerd-shim-systemd-v1", text)
    }

    fn new(beginning: &str, text: &str) -> DropIn {
        let directory = PathBuf::from(format!("/run/systemd/system/{beginning}.service.d"));
        fs::create_dir_all(&directory).unwrap_or_else(|error| panic!("{}: {error}", directory.display()));
        fs::write(directory.join("50-e2e.conf"), text)
            .unwrap_or_else(|error| panic!("write a drop-in: {error}"));
        DropIn { directory }
    }
}

impl Drop for DropIn {
    fn drop(&mut self) {
        // If the removal fails, the next test fails.
        let _ = fs::remove_dir_all(&self.directory);
    }
}

/// A unit that can't be started, until it is dropped.
pub struct Masked(String);

impl Masked {
    pub fn new(unit: &str) -> Masked {
        process::succeed("systemctl", &["mask", "--runtime", unit]);
        Masked(unit.to_owned())
    }
}

impl Drop for Masked {
    fn drop(&mut self) {
        process::run("systemctl", &["unmask", "--runtime", &self.0]);
    }
}
