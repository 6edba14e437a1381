//! The error of an action on a file, as every module that works on files reports it.

use std::io;
use std::path::{Path, PathBuf};

/// An action on a file that failed.
#[derive(Debug, thiserror::Error)]
#[error("can't {action} {path}: {source}")]
pub struct PathError {
    /// The action, as in "open" or "set the mode of".
    action: &'static str,
    /// The file or directory.
    path: PathBuf,
    /// The error of the system call.
    #[source]
    source: io::Error,
}

impl PathError {
    /// The file or directory.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The error of the system call.
    pub fn io(&self) -> &io::Error {
        &self.source
    }
}

/// Makes a [`PathError`] of the error of a system call, for `map_err`.
pub fn io_error<E: Into<io::Error>>(
    action: &'static str,
    path: &Path,
) -> impl FnOnce(E) -> PathError + use<E> {
    let path = path.to_owned();
    move |error| PathError { action, path, source: error.into() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::errno::Errno;

    #[test]
    fn an_error_names_the_action_the_file_and_the_reason() {
        let error = io_error("open", Path::new("/run/x"))(Errno::ENOENT);
        assert_eq!(error.to_string(), "can't open /run/x: No such file or directory (os error 2)");
        assert_eq!(error.io().kind(), io::ErrorKind::NotFound);
    }
}
