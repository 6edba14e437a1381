//! The kinds of `launch` that the daemon runs like commands of the OCI runtime: in the namespaces of the task's containerd,
//! outside of the daemon's cgroup, with a time limit, one at a time for each container. If one fails, the log of the command
//! has the reason.

use std::io::Write;

use crate::oci::mount as rootfs;

use super::contract::CommandKind;
use super::error::Error;
use super::process::Process;
use super::{checkpoint, probe};

/// Runs a command. A checkpoint returns only if it fails.
pub(super) fn run(kind: CommandKind, process: &Process<'_>) -> Result<(), Error> {
    let done = match kind {
        CommandKind::Criu => probe::run(process),
        CommandKind::Mount => mount(process),
        CommandKind::Checkpoint => checkpoint::run(process).map(|never| match never {}),
    };
    if let Err(error) = &done {
        let entry = serde_json::json!({ "level": "error", "msg": error.to_string() });
        let log = process.cli().log(kind.word());
        let written = std::fs::File::options().create(true).append(true).open(log);
        // Without the entry, the daemon reports the exit code.
        let _ = written.and_then(|mut file| writeln!(file, "{entry}"));
    }
    done
}

/// Mounts the rootfs where containerd sees it: containerd may unpack files into it before Start.
fn mount(process: &Process<'_>) -> Result<(), Error> {
    let request = &process.task.request;
    let target = request.bundle.join("rootfs");
    // An earlier attempt may have been interrupted.
    rootfs::unmount_all(&target)?;
    std::env::set_current_dir("/").map_err(|source| Error::System { action: "change to /", source })?;
    Ok(rootfs::mount_all(&target, &request.rootfs)?)
}
