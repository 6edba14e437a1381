//! Counts everything that a container could leave behind, before and after a test.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use super::node::NAMESPACE;
use super::{daemon, process, systemd, wait};

pub const STATE_DIRECTORY: &str = "/run/containerd-shim-systemd-v1";
const RUNC_STATE: &str = "/run/containerd/runc";
const LOG_EXTRA_FIELDS: &str = "/run/systemd/units";

/// The directory with the record of a container.
pub fn task_directory(id: &str) -> PathBuf {
    Path::new(STATE_DIRECTORY).join(NAMESPACE).join(id)
}

/// Everything that exists now, by kind and name.
#[derive(Clone, Debug, PartialEq)]
pub struct Traces(BTreeMap<&'static str, BTreeSet<String>>);

impl Traces {
    pub fn take() -> Traces {
        // The daemon creates these directories for the first terminal and for the first events that are still to be published
        // after a Delete, and keeps them.
        let kept = [".consoles", ".owed"].map(|name| format!("{STATE_DIRECTORY}/{name}"));
        let log_extra_fields =
            below(Path::new(LOG_EXTRA_FIELDS), 1).filter(|name| name.contains("log-extra-fields"));
        Traces(BTreeMap::from([
            ("unit", systemd::list_units("containerd-*").into_iter().filter_map(unit_name).collect()),
            ("mount", mounts()),
            ("cgroup", cgroups()),
            ("descriptor of the daemon", descriptors()),
            ("stored descriptor", stored_descriptors()),
            ("temporary file", below(Path::new("/tmp"), 2).filter(|name| !is_private_tmp(name)).collect()),
            (
                "state file",
                below(Path::new(STATE_DIRECTORY), 8).filter(|name| !kept.contains(name)).collect(),
            ),
            ("runc state", below(Path::new(RUNC_STATE), 2).collect()),
            ("log-extra-fields file", log_extra_fields.collect()),
            ("bundle", below(Path::new("/run/containerd/io.containerd.runtime.v2.task"), 2).collect()),
            ("shim process", shims()),
            ("runtime process", pids("runc")),
        ]))
    }

    /// Everything whose name contains this text, as [`Self::since`] writes it.
    fn named(&self, text: &str) -> Vec<String> {
        let mut all = self.since(&Traces(BTreeMap::new()));
        all.retain(|name| name.contains(text));
        all
    }

    /// Everything that is new since `before`: `kind: name`, sorted. Empty if nothing leaked.
    pub fn since(&self, before: &Traces) -> Vec<String> {
        let none = BTreeSet::new();
        let kinds = self.0.iter();
        kinds
            .flat_map(|(kind, now)| {
                let was = before.0.get(kind).unwrap_or(&none);
                now.difference(was).map(move |name| format!("{kind}: {name}"))
            })
            .collect()
    }
}

/// Asserts that nothing is left. Waits for work that is still under way.
pub fn assert_none(what: &str, before: &Traces) {
    assert_empty(what, |now| now.since(before));
}

/// As [`assert_none`], for everything whose name contains this text, whenever it was made.
pub fn assert_none_named(text: &str) {
    assert_empty(text, |now| now.named(text));
}

fn assert_empty(what: &str, find: impl Fn(&Traces) -> Vec<String>) {
    let mut leaks = Vec::new();
    let clean = wait::within(wait::LIMIT, || {
        leaks = find(&Traces::take());
        leaks.is_empty().then_some(())
    });
    assert!(clean.is_some(), "{what} left:\n{}", leaks.join("\n"));
}

/// The directory of a service with `PrivateTmp=`, which is another one after each restart: dbus-broker has it.
fn is_private_tmp(name: &str) -> bool {
    name.starts_with("/tmp/systemd-private-")
}

/// Counts units of containers, execs and loggers. Slices of namespaces stay.
fn unit_name(line: String) -> Option<String> {
    let name = line.split_whitespace().next()?.to_string();
    let stays = name.ends_with(".slice") || name.starts_with("containerd-shim-systemd-v1.");
    (!stays).then_some(name)
}

fn mounts() -> BTreeSet<String> {
    let table = fs::read_to_string("/proc/1/mountinfo").expect("read mountinfo of PID 1");
    // systemd mounts credentials of its own services at any time.
    let points = table.lines().filter_map(|line| line.split(' ').nth(4));
    points.filter(|point| !point.starts_with("/run/credentials")).map(str::to_string).collect()
}

/// All cgroups, except those of services of the system and of logins. Slices of namespaces stay.
fn cgroups() -> BTreeSet<String> {
    let root = Path::new("/sys/fs/cgroup");
    let mut found = BTreeSet::new();
    let mut queue: Vec<PathBuf> = systemd::directories(root);
    while let Some(path) = queue.pop() {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        if ["system.slice", "user.slice", "init.scope"].contains(&name.as_ref()) {
            continue;
        }
        // The daemon keeps those below which the OCI runtime works for a while, and has one for its guard.
        let below = ["containerd-shim-runtime/commands", "containerd-shim-runtime/guards"];
        let is_kept = name == "containerd-shim-runtime" || below.iter().any(|kept| path.ends_with(kept));
        if !name.ends_with(".slice") && !is_kept {
            found.insert(path.to_string_lossy().into_owned());
        }
        queue.extend(systemd::directories(&path));
    }
    found
}

/// The daemon's descriptors by kind, numbered if there are several of a kind.
fn descriptors() -> BTreeSet<String> {
    let holders = holders();
    let mut counts: BTreeMap<String, u32> = BTreeMap::new();
    for target in open_by_daemon().into_iter().filter(|target| !holders.contains_key(target)) {
        // The number of a socket or pipe has no meaning here.
        *counts.entry(target.split('[').next().unwrap_or_default().to_string()).or_default() += 1;
    }
    // The daemon watches cgroups by one inotify instance, of which it has two descriptors. If the kernel allows none when the
    // daemon starts (all guests on one kernel share a limit), it opens the instance later.
    counts.retain(|kind, count| *count > 2 || kind != "anon_inode:inotify");
    // The daemon creates one sealed copy of the OCI runtime for its first container.
    counts.retain(|kind, count| {
        *count > 1 || !["/memfd:runc", "/memfd:crun"].iter().any(|name| kind.starts_with(name))
    });
    counts.into_iter().flat_map(|(kind, count)| (1..=count).map(move |n| format!("{kind} #{n}"))).collect()
}

/// The daemon's open files, with the kernel's names.
fn open_by_daemon() -> Vec<String> {
    let daemon = systemd::main_pid(systemd::DAEMON_SERVICE);
    let entries = fs::read_dir(format!("/proc/{daemon}/fd")).into_iter().flatten().flatten();
    entries
        .map(|entry| fs::read_link(entry.path()).unwrap_or_default().to_string_lossy().into_owned())
        .collect()
}

/// The sockets in the descriptor store that hold descriptors, numbered.
fn stored_descriptors() -> BTreeSet<String> {
    let holders = holders();
    let is_used = |target: &String| holders.get(target).is_some_and(|is_empty| !is_empty);
    let used = open_by_daemon().into_iter().filter(is_used).count();
    (1..=used).map(|n| format!("holder #{n}")).collect()
}

/// The sockets in which daemons keep descriptors, as the kernel names them, and whether each of them is empty. Empty
/// ones stay for later use. Guests that share a network also see the sockets of other guests.
fn holders() -> BTreeMap<String, bool> {
    let sockets = process::run("ss", &["-xanH"]).text();
    // Columns: type, state, bytes in its queue, bytes sent, address, inode.
    let holder = |line: &str| {
        let columns: Vec<&str> = line.split_whitespace().collect();
        let [_, _, queue, _, address, inode, ..] = columns[..] else { return None };
        address
            .starts_with("@containerd-shim-systemd-v1/")
            .then(|| (format!("socket:[{inode}]"), queue == "0"))
    };
    sockets.lines().filter_map(holder).collect()
}

/// All processes of shims, except the daemon, which may have been restarted.
fn shims() -> BTreeSet<String> {
    let daemon = daemon::pid().map(|pid| pid.to_string());
    pids("containerd-shim").into_iter().filter(|pid| daemon.as_ref() != Some(pid)).collect()
}

fn pids(comm: &str) -> BTreeSet<String> {
    process::named(comm).iter().map(u32::to_string).collect()
}

/// The paths of everything below a directory, to a depth. Empty if the directory does not exist.
fn below(directory: &Path, depth: u32) -> impl Iterator<Item = String> + use<> {
    let mut found = Vec::new();
    let mut queue = vec![(directory.to_owned(), depth)];
    while let Some((path, depth)) = queue.pop() {
        for entry in fs::read_dir(&path).into_iter().flatten().flatten() {
            found.push(entry.path().to_string_lossy().into_owned());
            if depth > 1 && entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                queue.push((entry.path(), depth - 1));
            }
        }
    }
    found.into_iter()
}
