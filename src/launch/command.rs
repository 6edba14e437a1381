//! The daemon's side: the arguments and the environment of this program in a unit.

use std::fs;
use std::path::Path;

use crate::id::ProcessKey;
use crate::oci::sealed::SealedRef;

use super::contract::{self, Kind, LAUNCH_CGROUP, LAUNCH_ERROR, SEALED_RUNTIME};

/// The command line of a unit that starts the process `key`; `program` is this program.
pub fn command_line(program: &Path, kind: Kind, key: &ProcessKey) -> Vec<String> {
    let program = program.to_string_lossy().into_owned();
    std::iter::once(program).chain(contract::arguments(kind, key)).collect()
}

/// The unit's environment: the copy of the OCI runtime, and the cgroup in which the runtime works.
pub fn environment(copy: Option<&SealedRef>, cgroup: Option<&Path>) -> Vec<String> {
    let copy = copy.map(|copy| format!("{SEALED_RUNTIME}={copy}"));
    let cgroup = cgroup.map(|cgroup| format!("{LAUNCH_CGROUP}={}", cgroup.display()));
    copy.into_iter().chain(cgroup).collect()
}

/// Why `launch` could not start a container, if it left a reason in the task's directory.
pub fn failure(dir: &Path) -> Option<String> {
    fs::read_to_string(dir.join(LAUNCH_ERROR)).ok()
}
