//! The OCI side: the bundle, the runtime and its options, the rootfs.

pub mod bundle;
pub mod canonical;
pub mod command;
pub mod containerd;
pub mod criu;
pub mod devices;
pub mod features;
pub mod idmap;
pub mod log;
pub mod metadata;
pub mod mount;
mod mount_error;
pub mod mount_options;
pub mod namespaces;
pub mod options;
pub mod pod;
pub mod pod_files;
pub mod process;
pub mod profiles;
pub mod resources;
pub mod runtime;
pub mod sealed;
pub mod signal;
pub mod state;
pub mod turns;

/// Writes an executable script for a test.
///
/// Another process writes it: if this process did, a child of another test could inherit the open file, and execve(2) of the
/// script would fail with ETXTBSY.
#[cfg(test)]
pub(crate) fn write_script(path: &std::path::Path, script: &str) {
    use std::io::Write;
    let mut shell = std::process::Command::new("sh");
    let shell = shell.args(["-c", "cat >\"$0\" && chmod 755 \"$0\""]).arg(path);
    let mut writer = shell.stdin(std::process::Stdio::piped()).spawn().unwrap();
    writer.stdin.take().unwrap().write_all(format!("#!/bin/sh\n{script}\n").as_bytes()).unwrap();
    assert!(writer.wait().unwrap().success());
}
