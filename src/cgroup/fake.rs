//! A cgroup hierarchy in a temporary directory, for tests.

use std::fs;
use std::io::Write;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::LazyLock;

use crate::sys;

/// All tests use it, so it is removed when the test process ends.
static ROOT: LazyLock<PathBuf> = LazyLock::new(|| {
    let root = tempfile::Builder::new().prefix("shim-test-cgroups-").tempdir().unwrap().keep();
    fs::create_dir(root.join(".processes")).unwrap();
    fs::write(root.join("cgroup.controllers"), "cpu io memory pids\n").unwrap();
    assert!(sys::at_exit(remove_root));
    root
});

extern "C" fn remove_root() {
    // A thread that has not ended may still write there.
    let _ = fs::remove_dir_all(root());
}

pub(super) fn root() -> &'static Path {
    &ROOT
}

/// The file with the cgroup of a process: its file here if it was placed, otherwise that of /proc.
pub(super) fn proc_file(pid: u32) -> PathBuf {
    let placed = process(pid);
    if placed.exists() { placed } else { PathBuf::from(format!("/proc/{pid}/cgroup")) }
}

fn process(pid: u32) -> PathBuf {
    root().join(".processes").join(pid.to_string())
}

/// Makes a cgroup.
pub fn make(cgroup: &Path) {
    fs::create_dir_all(super::dir(cgroup)).unwrap();
    set_frozen(cgroup, false);
    fs::write(super::dir(cgroup).join("cgroup.freeze"), "0\n").unwrap();
}

/// Puts a process into a cgroup.
pub fn place(cgroup: &Path, pid: u32) {
    fs::write(process(pid), [b"0::", cgroup.as_os_str().as_bytes(), b"\n"].concat()).unwrap();
    let file = super::dir(cgroup).join("cgroup.procs");
    let there = fs::read_to_string(&file).unwrap_or_default();
    fs::write(file, format!("{there}{pid}\n")).unwrap();
}

/// Makes the cgroup of a process unreadable, as one whose path is too long.
pub fn hide(pid: u32) {
    // Only a file can be read.
    let _ = fs::remove_file(process(pid));
    fs::create_dir(process(pid)).unwrap();
}

/// Marks a cgroup as frozen or thawed. Does nothing if it does not exist.
pub fn set_frozen(cgroup: &Path, frozen: bool) {
    let text = format!("populated 0\nfrozen {}\n", u8::from(frozen));
    let path = super::dir(cgroup).join("cgroup.events");
    // Not truncated, so that a reader sees one of the two states, as with the kernel's file, and never an empty file.
    let opened = fs::File::options().write(true).create(true).truncate(false).open(path);
    let _ = opened.and_then(|mut file| file.write_all(text.as_bytes()));
}

/// True once [`super::kill`] was called for the cgroup.
pub fn is_to_be_killed(cgroup: &Path) -> bool {
    super::dir(cgroup).join("cgroup.kill").exists()
}

/// Removes a process that has ended.
pub fn forget_process(pid: u32) {
    let _ = fs::remove_file(process(pid));
}

/// Removes a cgroup and those below it.
pub fn remove(cgroup: &Path) {
    let _ = fs::remove_dir_all(super::dir(cgroup));
}
