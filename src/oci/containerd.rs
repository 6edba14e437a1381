//! Which containerd a bundle belongs to, and what `start` and the daemon leave in the bundle for each other and for
//! containerd.

use std::io;
use std::path::Path;

use crate::files;
use crate::id::{Namespace, Owner, TaskId};
use crate::path_error::io_error;
use crate::task::request::Containerd;

use super::bundle::{Error, read_config, read_in_turn};

/// The containerd that a bundle belongs to, whatever path leads to the bundle.
pub fn owner(bundle: &Path, namespace: &Namespace, id: &TaskId) -> Owner {
    // The bundle may be removed already, but the directory of all bundles exists.
    let resolved = bundle.ancestors().take(3).find_map(|there| {
        let rest = bundle.strip_prefix(there).ok()?;
        Some(there.canonicalize().ok()?.join(rest))
    });
    Owner::of_bundle(resolved.as_deref().unwrap_or(bundle), namespace, id)
}

/// Whether a path is that of the bundle in the usual containerd's directories, without a look at the disk.
pub fn is_in_usual_place(bundle: &Path, namespace: &Namespace, id: &TaskId) -> bool {
    bundle.ends_with(Path::new(namespace.as_str()).join(id.as_str()))
        && Owner::of_bundle(bundle, namespace, id).is_usual()
}

/// Written by `start` for the daemon, which reads it at Create. containerd removes it with the bundle.
const START: &str = "containerd-shim-systemd.json";

/// Records in the bundle which containerd called.
///
/// # Errors
/// [`Error::Io`]
pub fn write_containerd(bundle: &Path, containerd: &Containerd) -> Result<(), Error> {
    let path = bundle.join(START);
    let text =
        serde_json::to_vec(containerd).map_err(|source| Error::Malformed { path: path.clone(), source })?;
    let new = bundle.join(".containerd-shim-systemd.json.new");
    Ok(files::replace(&path, &new, 0o600, &text).map_err(io_error("replace", &path))?)
}

/// Written by `start` for CreateSandbox, whose request has no options of the runtime: the message that `start` got.
const OPTIONS: &str = "containerd-shim-systemd.options";

/// Writes the runtime's options into the bundle.
///
/// # Errors
/// [`Error::Io`]
pub fn write_options(bundle: &Path, options: &[u8]) -> Result<(), Error> {
    let path = bundle.join(OPTIONS);
    let new = bundle.join(".containerd-shim-systemd.options.new");
    Ok(files::replace(&path, &new, 0o600, options).map_err(io_error("replace", &path))?)
}

/// The runtime's options that `start` got; empty if it got none.
///
/// # Errors
/// The file can't be read.
pub fn read_options(bundle: &Path) -> Result<Vec<u8>, Error> {
    match read_config(&bundle.join(OPTIONS)) {
        Err(Error::Io(error)) if error.io().kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        read => read,
    }
}

/// Writes the daemon's address into the bundle. containerd 1.6 and 1.7 find the daemon by this file after a restart.
///
/// # Errors
/// [`Error::Io`]
pub fn write_address(bundle: &Path, address: &str) -> Result<(), Error> {
    let path = bundle.join("address");
    let new = bundle.join(".address.new");
    Ok(files::replace(&path, &new, 0o644, address.as_bytes()).map_err(io_error("replace", &path))?)
}

/// The containerd that `start` recorded in the bundle. `None` for a container of a pod that is not its first:
/// containerd does not call `start` for it.
///
/// # Errors
/// The file can't be read.
pub fn read_containerd(bundle: &Path) -> Result<Option<Containerd>, Error> {
    let path = bundle.join(START);
    match read_in_turn(&path) {
        Ok((text, _turn)) => {
            serde_json::from_slice(&text).map(Some).map_err(|source| Error::Malformed { path, source })
        }
        Err(Error::Io(error)) if error.io().kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}
