//! Runs commands in the guest, and reads `/proc`.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Exit code and output of a command.
#[derive(Debug)]
pub struct Outcome {
    pub code: Option<i32>,
    pub stdout: Vec<u8>,
    pub stderr: String,
}

impl Outcome {
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.stdout).into_owned()
    }
}

/// Runs a command to its end.
pub fn run(program: &str, args: &[&str]) -> Outcome {
    outcome(Command::new(program).args(args))
}

pub fn outcome(command: &mut Command) -> Outcome {
    let output = command.output().unwrap_or_else(|error| panic!("run {command:?}: {error}"));
    Outcome {
        code: output.status.code(),
        stdout: output.stdout,
        stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
    }
}

/// Runs a command that has to succeed; returns what it printed.
pub fn succeed(program: &str, args: &[&str]) -> String {
    let outcome = run(program, args);
    assert_eq!(outcome.code, Some(0), "{program} {args:?}: {}", outcome.stderr);
    outcome.text()
}

/// Runs a program as a user without privileges.
pub fn as_nobody(program: &[&str]) -> Outcome {
    let user = ["--reuid=65534", "--regid=65534", "--clear-groups", "--"];
    run("setpriv", &[&user, program].concat())
}

/// True until the parent of a process has reaped it.
pub fn exists(pid: u32) -> bool {
    Path::new(&format!("/proc/{pid}")).exists()
}

/// True until a process ends. A process whose parent has ended becomes a child of PID 1. On a busy machine, PID 1 reaps it some
/// time after its end: until then it exists and does not run.
pub fn runs(pid: u32) -> bool {
    status(pid, "State").is_some_and(|state| !state.starts_with(['Z', 'X']))
}

/// The directories of a process's threads in /proc.
pub fn threads(pid: u32) -> impl Iterator<Item = PathBuf> {
    let all = fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
    all.map(|thread| thread.path())
}

/// A line of `/proc/PID/status`; `None` if the process or the line does not exist.
pub fn status(pid: u32, key: &str) -> Option<String> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let value = status.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(':'))?;
    Some(value.trim().to_string())
}

/// One of the process's namespaces, e.g. `net:[4026531840]`.
pub fn namespace(pid: u32, kind: &str) -> String {
    let link = format!("/proc/{pid}/ns/{kind}");
    let target = fs::read_link(&link).unwrap_or_else(|error| panic!("{link}: {error}"));
    target.to_string_lossy().into_owned()
}

/// The proportional set size of a process in KiB. `None` if the process has ended.
pub fn pss_kib(pid: u32) -> Option<u64> {
    let rollup = fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).ok()?;
    let line = rollup.lines().find_map(|line| line.strip_prefix("Pss:"))?;
    line.split_whitespace().next()?.parse().ok()
}

/// Every process whose command name (at most 15 characters) is this one.
pub fn named(comm: &str) -> Vec<u32> {
    all()
        .filter(|pid| fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|name| name.trim() == comm))
        .collect()
}

/// The name of a process (proc(5), `comm`).
pub fn name(pid: u32) -> Option<String> {
    Some(fs::read_to_string(format!("/proc/{pid}/comm")).ok()?.trim_end().to_string())
}

/// Every process whose command line contains the text.
pub fn with_command_line(text: &str) -> Vec<u32> {
    all()
        .filter(|pid| {
            let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            String::from_utf8_lossy(&line).replace('\0', " ").contains(text)
        })
        .collect()
}

fn all() -> impl Iterator<Item = u32> {
    let entries = fs::read_dir("/proc").expect("read /proc");
    entries.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
}
