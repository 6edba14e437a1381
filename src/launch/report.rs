//! How `launch` reports the outcome of an exec's start to the daemon: a file, and a FIFO that rings.

use std::fs::OpenOptions;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use crate::store::{self, files};

use super::contract::{OUTCOME, Outcome};
use super::pipes::DOORBELL;

/// Leaves the outcome in the exec's directory, in one step, and rings.
///
/// # Errors
/// The file can't be written.
pub fn write(dir: &Path, outcome: &Outcome) -> Result<(), store::Error> {
    let path = dir.join(OUTCOME);
    let text = serde_json::to_vec(outcome)
        .map_err(|source| store::Error::Malformed { path: path.clone(), source })?;
    files::replace(&path, &path.with_extension("json.new"), &text)?;
    // A daemon that is not running finds the file when it starts.
    let _ = OpenOptions::new().write(true).custom_flags(nix::libc::O_NONBLOCK).open(dir.join(DOORBELL));
    Ok(())
}

/// The outcome, once `launch` has left it.
///
/// # Errors
/// The file can't be read.
pub fn read(dir: &Path) -> Result<Option<Outcome>, store::Error> {
    let path = dir.join(OUTCOME);
    let Some(text) = files::read(&path)? else {
        return Ok(None);
    };
    serde_json::from_slice(&text).map(Some).map_err(|source| store::Error::Malformed { path, source })
}
