//! Attributes of detached mounts (mount_setattr(2), Linux 5.12).

use std::os::fd::{AsFd, AsRawFd};

use nix::errno::Errno;
use nix::libc;

/// `MOUNT_ATTR_RDONLY`
const READ_ONLY: u64 = 0x0000_0001;

/// `MOUNT_ATTR_IDMAP`
const IDMAP: u64 = 0x0010_0000;

/// `struct mount_attr`
#[repr(C)]
#[derive(Default)]
struct Attributes {
    set: u64,
    clear: u64,
    propagation: u64,
    user_namespace: u64,
}

/// Maps the ids of a detached mount, and of everything below it, as the user namespace does.
///
/// # Errors
/// `EINVAL`: the file system has no such mounts. `ENOSYS`: the kernel is older than 5.12.
pub fn map_ids(mount: &impl AsFd, user_namespace: &impl AsFd) -> Result<(), Errno> {
    let namespace = user_namespace.as_fd().as_raw_fd();
    let user_namespace = u64::try_from(namespace).map_err(|_| Errno::EBADF)?;
    set(mount, Attributes { set: IDMAP, user_namespace, ..Attributes::default() })
}

/// Makes a detached mount read-only. Devices can still be written to, but nobody can change their modes, owners and times
/// through the mount.
///
/// # Errors
/// `ENOSYS`: the kernel is older than 5.12.
pub fn make_read_only(mount: &impl AsFd) -> Result<(), Errno> {
    set(mount, Attributes { set: READ_ONLY, ..Attributes::default() })
}

fn set(mount: &impl AsFd, attributes: Attributes) -> Result<(), Errno> {
    // SAFETY: the descriptors are open for as long as they are borrowed; the kernel reads an empty path and as many bytes of the
    // attributes as requested.
    let set = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            mount.as_fd().as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH | libc::AT_RECURSIVE,
            &raw const attributes,
            size_of::<Attributes>(),
        )
    };
    Errno::result(set).map(drop)
}
