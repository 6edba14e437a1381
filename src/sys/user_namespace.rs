//! User namespaces: makes one for its mapping of ids, and finds the one that owns another namespace.

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};

use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::libc;
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::waitpid;
use nix::unistd::{ForkResult, Pid, fork, pipe2, read};

/// `NS_GET_USERNS` of ioctl_nsfs(2), `_IO(0xb7, 1)`.
const GET_OWNER: libc::c_ulong = 0xb701;

/// Makes a user namespace without processes. The maps are as in `/proc/PID/uid_map` (user_namespaces(7)).
///
/// # Errors
/// The node allows no more user namespaces, or the kernel refuses a map.
pub fn make(uids: &str, gids: &str) -> io::Result<OwnedFd> {
    // No child of another thread may keep an end of these open.
    let (made, is_made) = pipe2(OFlag::O_CLOEXEC)?;
    let (is_over, over) = pipe2(OFlag::O_CLOEXEC)?;
    // SAFETY: what the child does is safe after fork(2), see below.
    let child = match unsafe { fork() }? {
        ForkResult::Parent { child } => child,
        // SAFETY: only system calls, on descriptors that the child has a copy of and on its own stack; it does not return.
        ForkResult::Child => unsafe {
            libc::close(over.as_raw_fd());
            libc::close(made.as_raw_fd());
            let status = libc::unshare(libc::CLONE_NEWUSER);
            let error = if status == 0 { 0 } else { *libc::__errno_location() };
            let error = u8::try_from(error).unwrap_or(u8::MAX);
            libc::write(is_made.as_raw_fd(), (&raw const error).cast(), 1);
            let mut byte = 0_u8;
            // Returns if the parent has ended.
            libc::read(is_over.as_raw_fd(), (&raw mut byte).cast(), 1);
            libc::_exit(0)
        },
    };
    drop(is_made);
    let opened = open_of(child, &made, uids, gids);
    // The child is not needed any more. How it ends does not matter.
    let _ = kill(child, Signal::SIGKILL);
    let _ = waitpid(child, None);
    drop(over);
    opened
}

/// The namespace of the child, once the child has made it, with its maps.
fn open_of(child: Pid, made: &OwnedFd, uids: &str, gids: &str) -> io::Result<OwnedFd> {
    let mut error = [0];
    match read(made, &mut error)? {
        1 if error == [0] => {}
        1 => return Err(io::Error::from_raw_os_error(error[0].into())),
        _ => return Err(Errno::ECHILD.into()),
    }
    for (map, ids) in [("uid_map", uids), ("gid_map", gids)] {
        fs::write(format!("/proc/{child}/{map}"), ids)?;
    }
    Ok(File::open(format!("/proc/{child}/ns/user"))?.into())
}

/// The user namespace that owns a namespace.
///
/// # Errors
/// It is no namespace, or its owner is outside of this process's user namespace.
pub fn owner(namespace: &impl AsFd) -> Result<OwnedFd, Errno> {
    // SAFETY: the descriptor is open for as long as it is borrowed, and the call takes no argument.
    let found = Errno::result(unsafe { libc::ioctl(namespace.as_fd().as_raw_fd(), GET_OWNER as _) })?;
    // SAFETY: the kernel has opened it for this call.
    Ok(unsafe { OwnedFd::from_raw_fd(found) })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;
    use std::os::unix::fs::MetadataExt;

    fn is_root() -> bool {
        nix::unistd::geteuid().is_root()
    }

    #[test]
    fn a_namespace_has_its_maps_and_its_owner() {
        if !is_root() {
            return;
        }
        let namespace = make("0 100000 10\n", "0 200000 10\n5000 300000 1\n").unwrap();
        let inode = |file: &File| file.metadata().unwrap().ino();
        let namespace = File::from(namespace);
        let own = File::open("/proc/self/ns/user").unwrap();
        assert_ne!(inode(&namespace), inode(&own));
        let of_network = owner(&File::open("/proc/self/ns/net").unwrap()).map(File::from);
        assert!(of_network.is_ok_and(|owner| inode(&owner) == inode(&own)));
        let mut text = String::new();
        assert!(File::open("/proc/self/uid_map").unwrap().read_to_string(&mut text).is_ok());
    }

    #[test]
    fn a_map_that_the_kernel_refuses_is_an_error() {
        if is_root() {
            assert!(make("0 100000 0\n", "0 200000 10\n").is_err());
        }
    }

    #[test]
    fn what_is_no_namespace_has_no_owner() {
        assert!(owner(&File::open("/dev/null").unwrap()).is_err());
    }
}
