//! The errors of mounts and unmounts.

use std::io;
use std::path::PathBuf;

use nix::errno::Errno;

/// Why a mount or unmount failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The kernel refused a mount.
    #[error("failed to mount rootfs component: {kind} from {source_name} on {target}: {errno}")]
    Mount {
        /// File system type.
        kind: String,
        /// The source of the mount.
        source_name: String,
        /// The mountpoint.
        target: PathBuf,
        errno: io::Error,
    },
    /// An option is not supported.
    #[error("failed to mount rootfs component: option {option:?} of {kind} is not supported")]
    Option {
        option: String,
        /// File system type.
        kind: String,
    },
    /// `target` is outside of the rootfs.
    #[error("failed to mount rootfs component: target {target:?} is not a path below the rootfs")]
    Target {
        /// The text of the client.
        target: String,
    },
    /// `target` does not exist.
    #[error("failed to mount rootfs component: target {target:?} in {rootfs}: {errno}")]
    NoTarget {
        /// The text of the client.
        target: String,
        rootfs: PathBuf,
        errno: io::Error,
    },
    /// The options do not fit into a page, even with short names.
    #[error("failed to mount rootfs component: mount options of {length} bytes are too long")]
    TooLong {
        /// Their length.
        length: usize,
    },
    /// The mount helper failed.
    #[error("failed to mount rootfs component: {helper} for {kind}: {reason}")]
    Helper {
        /// The program.
        helper: &'static str,
        /// File system type.
        kind: String,
        /// Its error message.
        reason: String,
    },
    /// The kernel refused to unmount.
    #[error("failed rootfs umount: {path}: {errno}")]
    Unmount {
        /// The mountpoint.
        path: PathBuf,
        /// The error.
        errno: Errno,
    },
    /// The list of mounts can't be read.
    #[error("failed rootfs umount: can't read /proc/thread-self/mountinfo: {0}")]
    Mountinfo(#[source] io::Error),
}
