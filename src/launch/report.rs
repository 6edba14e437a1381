//! The report of `launch` about an exec's start: a file with the outcome, and a FIFO as doorbell.

use std::fs::OpenOptions;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use crate::store::{self, files};

use super::contract::{OUTCOME, Outcome};
use super::pipes::DOORBELL;

/// Writes the outcome to the exec's directory in one step, and rings the doorbell.
///
/// # Errors
/// The file can't be written.
pub fn write(dir: &Path, outcome: &Outcome) -> Result<(), store::Error> {
    let path = dir.join(OUTCOME);
    let text =
        serde_json::to_vec(outcome).map_err(|source| store::Error::NotJson { path: path.clone(), source })?;
    files::replace(&path, &path.with_extension("json.new"), &text)?;
    // Fails if the daemon does not run. The next daemon finds the file.
    let _ = OpenOptions::new().write(true).custom_flags(nix::libc::O_NONBLOCK).open(dir.join(DOORBELL));
    Ok(())
}

/// Reads the outcome, once `launch` has written it.
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
