//! What the OCI runtime can do, as its command `features` prints it, for containerd and its clients.

use std::io::{self, Read, Seek};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use nix::sys::prctl::set_child_subreaper;

use crate::sys::bounded::{self, CommandEnd};
use crate::sys::bounded_file::bounded_file;

/// How long the runtime may take. The runtime only prints constants. dockerd and CRI wait for them while they start.
const LIMIT: Duration = Duration::from_secs(5);

/// How much the runtime may print, in bytes. runc prints some 10 KB.
const MAX_BYTES: u32 = 1 << 20;

/// Why the features are not known.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The runtime can't be run.
    #[error("can't run {} features: {source}", .binary.display())]
    Spawn {
        /// The runtime.
        binary: PathBuf,
        #[source]
        source: io::Error,
    },
    /// The runtime was killed, because it took too long or because this process received SIGTERM.
    #[error("{} features did not end within {} s and was killed", .binary.display(), LIMIT.as_secs())]
    Killed {
        /// The runtime.
        binary: PathBuf,
    },
    /// The runtime failed: it is older than the command, or it printed more than it may.
    #[error("{} features failed: {status}", .binary.display())]
    Failed {
        /// The runtime.
        binary: PathBuf,
        /// The exit status of the process.
        status: String,
    },
    /// What the runtime printed is not JSON.
    #[error("{} features printed something that is not JSON", .binary.display())]
    NotJson {
        /// The runtime.
        binary: PathBuf,
    },
}

/// The features of an OCI runtime, in its own JSON. Blocks for [`LIMIT`] at most. Only for a process that has no other
/// children: if the runtime takes too long, all children are killed.
///
/// # Errors
/// [`Error`]
pub fn read(binary: PathBuf) -> Result<Vec<u8>, Error> {
    let ran = run(&binary);
    match ran {
        Err(source) => Err(Error::Spawn { binary, source }),
        Ok((CommandEnd::TimedOut | CommandEnd::Terminated, _)) => Err(Error::Killed { binary }),
        Ok((CommandEnd::Exited(status), _)) if !status.success() => {
            Err(Error::Failed { binary, status: status.to_string() })
        }
        Ok((CommandEnd::Exited(_), printed)) => {
            match serde_json::from_slice::<serde::de::IgnoredAny>(&printed) {
                Ok(_) => Ok(printed),
                Err(_) => Err(Error::NotJson { binary }),
            }
        }
    }
}

fn run(binary: &Path) -> io::Result<(CommandEnd, Vec<u8>)> {
    // So this process can kill what the runtime starts, even if it becomes a daemon.
    set_child_subreaper(true)?;
    let mut output = bounded_file("features", MAX_BYTES)?;
    let mut command = Command::new(binary);
    command.arg("features").stdin(Stdio::null()).stdout(output.try_clone()?).stderr(Stdio::null());
    let end = bounded::run(&mut command, LIMIT)?;
    // The file has its full size from the start. The position, which the runtime shares, is the end of what it printed.
    let end_of_output = output.stream_position()?.min(MAX_BYTES.into());
    output.rewind()?;
    let mut printed = Vec::new();
    output.take(end_of_output).read_to_end(&mut printed)?;
    Ok((end, printed))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn runtime(script: &str) -> (tempfile::TempDir, PathBuf) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("runtime");
        crate::oci::write_script(&path, script);
        (dir, path)
    }

    #[test]
    fn output_that_a_runtime_prints_in_pieces_is_read_whole() {
        let (_dir, binary) =
            runtime("[ \"$*\" = features ] && echo '{\"ociVersionMin\":' && echo '\"1.0.0\"}'");
        assert_eq!(read(binary).unwrap(), b"{\"ociVersionMin\":\n\"1.0.0\"}\n");
    }

    #[test]
    fn a_runtime_that_prints_for_ever_is_stopped() {
        let (_dir, binary) = runtime("exec yes '{}'");
        let error = read(binary).unwrap_err();
        assert!(matches!(error, Error::Failed { .. }), "{error}");
    }

    #[test]
    fn a_runtime_without_features_and_one_that_prints_something_else_are_different_errors() {
        let (_dir, binary) = runtime("echo 'No help topic for features'; exit 3");
        let error = read(binary).unwrap_err();
        assert!(error.to_string().ends_with("features failed: exit status: 3"), "{error}");
        let (_dir, binary) = runtime("echo hello");
        assert!(matches!(read(binary).unwrap_err(), Error::NotJson { .. }));
        let missing = read(PathBuf::from("/no/such/runtime")).unwrap_err();
        assert!(matches!(missing, Error::Spawn { .. }), "{missing}");
    }
}
