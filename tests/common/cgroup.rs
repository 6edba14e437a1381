//! The kernel's view of a container: its cgroup and the files in it.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use super::wait;

/// The cgroup of a process, as a directory.
pub fn of(pid: u32) -> PathBuf {
    let text = fs::read_to_string(format!("/proc/{pid}/cgroup")).expect("the process lives");
    let path = text.lines().find_map(|line| line.strip_prefix("0::/")).expect("a place in cgroup v2");
    Path::new("/sys/fs/cgroup").join(path)
}

/// A file's text, trimmed; empty if the file does not exist.
pub fn read(cgroup: &Path, file: &str) -> String {
    fs::read_to_string(cgroup.join(file)).unwrap_or_default().trim_end().to_string()
}

/// The number of a key in a file of `key number` lines.
pub fn number(cgroup: &Path, file: &str, key: &str) -> Option<u64> {
    read(cgroup, file).lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(' ')?.parse().ok())
}

/// Whether all processes of the cgroup are frozen.
pub fn is_frozen(cgroup: &Path) -> bool {
    number(cgroup, "cgroup.events", "frozen") == Some(1)
}

/// Waits until a file has this text.
pub fn wait_for(cgroup: &Path, file: &str, text: &str) {
    let mut last = String::new();
    let seen = wait::within(wait::LIMIT, || {
        last = read(cgroup, file);
        (last == text).then_some(())
    });
    assert!(seen.is_some(), "{}/{file} is {last:?}, not {text:?}", cgroup.display());
}

/// All settings of a cgroup, without counters. `cgroup.freeze` is left out: each runtime freezes another cgroup.
pub fn settings(cgroup: &Path) -> BTreeMap<String, String> {
    let is_setting = |name: &str| {
        let ends =
            ["max", "min", "low", "high", "weight", "weight.nice", "idle", "burst", "cpus", "mems", "group"];
        let others = ["io.bfq.weight", "cpuset.cpus.partition", "cgroup.type"];
        name.split_once('.').is_some_and(|(_, rest)| ends.iter().any(|end| rest.ends_with(end)))
            || others.contains(&name)
    };
    let entries = fs::read_dir(cgroup).expect("the cgroup is there").flatten();
    let names =
        entries.filter_map(|entry| entry.file_name().into_string().ok()).filter(|name| is_setting(name));
    names.map(|name| (name.clone(), read(cgroup, &name))).collect()
}
