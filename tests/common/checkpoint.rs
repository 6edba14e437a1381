//! Checkpoints in tests: a container that prints its state, and the options of a checkpoint.

use std::fs;
use std::os::unix::fs::PermissionsExt;

use containerd_shim_protos::api::CheckpointTaskRequest;
use containerd_shim_protos::shim::oci::CheckpointOptions;
use prost_types::Any;
use protobuf::Message;

use super::container::Container;
use super::shim::{Refusal, Shim, over_ttrpc};

/// Counts on both streams, and exits with 7 on SIGTERM.
pub const COUNTING: &str =
    "i=0; trap 'exit 7' TERM; while :; do i=$((i+1)); echo $i; echo e$i >&2; sleep 0.1; done";

const OCI_OPTIONS: &str = "containerd.runc.v1.CheckpointOptions";

/// Options of a checkpoint, as clients send them.
pub fn options(change: impl FnOnce(&mut CheckpointOptions)) -> Any {
    let mut options = CheckpointOptions::new();
    change(&mut options);
    Any { type_url: OCI_OPTIONS.to_string(), value: options.write_to_bytes().expect("encode") }
}

/// The number in the last line of the output that is complete.
pub fn last(output: &[u8]) -> u32 {
    let text = String::from_utf8_lossy(output);
    let last = text.lines().rfind(|line| !line.is_empty()).unwrap_or_default();
    let number = last.trim().trim_start_matches('e').to_string();
    number.parse().unwrap_or_else(|_| panic!("{text:?} ends in a number"))
}

/// Removes the images that containerd unpacks for a restore and does not remove itself.
pub fn remove_unpacked() {
    for entry in fs::read_dir("/tmp").expect("/tmp").flatten() {
        if entry.file_name().to_string_lossy().starts_with("ctrd-checkpoint") {
            fs::remove_dir_all(entry.path()).expect("remove images");
        }
    }
}

/// Calls the shim itself for a checkpoint: containerd does not pass an image path on to this runtime.
pub fn take(
    shim: &Shim<'_>,
    container: &Container,
    images: &str,
    change: impl FnOnce(&mut CheckpointOptions),
) -> Result<(), Refusal> {
    let mut request = CheckpointTaskRequest::new();
    request.id.clone_from(&container.id);
    request.path = images.to_string();
    request.options = Some(over_ttrpc(options(change))).into();
    shim.call(async |client, context| client.checkpoint(context, &request).await).map(drop)
}

/// Replaces criu with another program, until it is dropped.
pub struct Criu;

impl Criu {
    const PATH: &str = "/usr/sbin/criu";
    const KEPT: &str = "/usr/sbin/criu.kept";

    /// Replaces criu with this script, or with no program.
    pub fn replaced(script: Option<&str>) -> Self {
        fs::rename(Self::PATH, Self::KEPT).expect("move criu");
        let replaced = Self;
        if let Some(script) = script {
            fs::write(Self::PATH, script).expect("write a script");
            fs::set_permissions(Self::PATH, fs::Permissions::from_mode(0o755)).expect("make it executable");
        }
        replaced
    }
}

impl Drop for Criu {
    fn drop(&mut self) {
        // If the removal fails, the next test fails.
        let _ = fs::rename(Self::KEPT, Self::PATH);
    }
}
