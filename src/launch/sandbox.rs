//! The rootfs of a sandbox: the first process and two mountpoints, in a file system that exists in the sandbox only.
//!
//! It is not on the disk of the node, so nothing has to be removed, and no pod can reach the program of another pod.

use std::fs::{self, Permissions};
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use nix::mount::{MsFlags, mount};

use crate::config::SANDBOX_ROOT;
use crate::oci::pod;

use super::error::{Error, system};

/// The program `src/sandbox_init`; empty on an architecture that it does not know.
static INIT: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/sandbox_init"));

/// Whether there is a program for sandboxes on this architecture.
pub fn is_possible() -> bool {
    !INIT.is_empty()
}

/// Makes the rootfs. The caller has a mount namespace of its own.
pub(super) fn make_root() -> Result<(), Error> {
    let root = Path::new(SANDBOX_ROOT);
    make_dir(root).map_err(io("make the mountpoint of the rootfs"))?;
    // /run may be mounted with `noexec`.
    let flags = MsFlags::MS_NODEV | MsFlags::MS_NOSUID;
    mount(Some("sandbox"), root, Some("tmpfs"), flags, Some("mode=0755,size=64k,nr_inodes=16"))
        .map_err(system("mount the rootfs of the sandbox"))?;
    for name in ["proc", "dev"] {
        make_dir(&root.join(name)).map_err(io("make a mountpoint in the rootfs"))?;
    }
    let program = root.join(pod::INIT.trim_start_matches('/'));
    fs::write(&program, INIT).and_then(|()| for_all(&program)).map_err(io("write the program of the sandbox"))
}

fn make_dir(path: &Path) -> io::Result<()> {
    match fs::create_dir(path) {
        Err(error)
            if error.kind() == io::ErrorKind::AlreadyExists && fs::symlink_metadata(path)?.is_dir() => {}
        made => made?,
    }
    for_all(path)
}

/// Lets every user read and execute the file, whatever the umask is: the first process of a pod with a user namespace is not
/// root on the host.
fn for_all(path: &Path) -> io::Result<()> {
    fs::set_permissions(path, Permissions::from_mode(0o755))
}

fn io(action: &'static str) -> impl FnOnce(io::Error) -> Error {
    move |source| Error::System { action, source }
}
