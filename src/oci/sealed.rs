//! Copies of the OCI runtime's binary in memory, sealed against writing.
//!
//! runc runs from a sealed copy of itself inside of a container, so that the container can't write to
//! the binary of the host through `/proc/self/exe` (CVE-2019-5736). It makes one anew at every create
//! and exec, some 10 MB, unless it already runs from one (runc 1.0 and later). One copy that all of
//! them share saves a fifth of an exec's time.
//!
//! The daemon holds the copies and `launch` runs them; if anything is not as expected, the binary
//! itself is run, as it would have been anyway.

use std::collections::HashMap;
use std::fmt;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};

use super::runtime::is_elf;

/// A copy that nobody has used for so long is given up: it is memory.
pub const IDLE_LIMIT: Duration = Duration::from_secs(60);

/// Larger than any runc.
const MAX_BYTES: u64 = 64 << 20;

/// `MFD_EXEC` (Linux 6.3): says that it is to be run, where `vm.memfd_noexec` asks for that.
const MFD_EXEC: u32 = 0x10;

/// Where a copy is: a descriptor of the daemon, and what identifies the file behind it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    pid: u32,
    fd: i32,
    device: u64,
    inode: u64,
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}:{}:{}", self.pid, self.fd, self.device, self.inode)
    }
}

impl FromStr for Place {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        let parts: Vec<&str> = text.split(':').collect();
        let [pid, fd, device, inode] = parts[..] else {
            return Err(());
        };
        Ok(Self {
            pid: pid.parse().map_err(drop)?,
            fd: fd.parse().map_err(drop)?,
            device: device.parse().map_err(drop)?,
            inode: inode.parse().map_err(drop)?,
        })
    }
}

impl Place {
    /// Opens the copy. Nothing if it is not the one that was meant: the daemon may be gone, and
    /// another may have its number.
    pub fn open(&self) -> Option<File> {
        let file = File::open(format!("/proc/{}/fd/{}", self.pid, self.fd)).ok()?;
        let found = file.metadata().ok()?;
        let meant = (found.dev(), found.ino()) == (self.device, self.inode);
        (meant && is_sealed(&file)).then_some(file)
    }
}

/// The path under which this process can run a file that it has open.
pub fn path_of(file: &File) -> PathBuf {
    PathBuf::from(format!("/proc/self/fd/{}", file.as_raw_fd()))
}

/// What tells a binary from the one that was there before.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Identity {
    device: u64,
    inode: u64,
    bytes: u64,
    changed: (i64, i64),
}

impl Identity {
    fn of(binary: &Path) -> io::Result<Self> {
        let found = std::fs::metadata(binary)?;
        let changed = (found.mtime(), found.mtime_nsec());
        Ok(Self { device: found.dev(), inode: found.ino(), bytes: found.len(), changed })
    }
}

/// A copy, or that there can be none.
struct Kept {
    of: Identity,
    copy: Option<(OwnedFd, Place)>,
    used: Instant,
}

/// The copies that the daemon holds.
#[derive(Default)]
pub struct Copies {
    kept: Mutex<HashMap<PathBuf, Kept>>,
}

impl Copies {
    fn kept(&self) -> MutexGuard<'_, HashMap<PathBuf, Kept>> {
        // A panic ends the process, so there is no poison to respect.
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The copy of a binary, made if there is none of its present content. Nothing for a binary that
    /// has no use for it. Blocks.
    pub fn place(&self, binary: &Path) -> Option<Place> {
        if !is_wanted(binary) {
            return None;
        }
        let of = Identity::of(binary).ok()?;
        let mut kept = self.kept();
        if let Some(found) = kept.get_mut(binary).filter(|found| found.of == of) {
            found.used = Instant::now();
            return found.copy.as_ref().map(|(_, place)| place.clone());
        }
        let copy = make(binary)
            .inspect_err(|error| {
                tracing::debug!(%error, "{} is run as it is, it can't be copied: {error}", binary.display());
            })
            .ok();
        let place = copy.as_ref().map(|(_, place)| place.clone());
        kept.insert(binary.to_owned(), Kept { of, copy, used: Instant::now() });
        place
    }

    /// Gives up what has not been used for [`IDLE_LIMIT`].
    pub fn sweep(&self) {
        self.kept().retain(|_, kept| kept.used.elapsed() < IDLE_LIMIT);
    }
}

/// Others don't look for it. Under SELinux the copy would not have the binary's label, and containers
/// not their domain.
fn is_wanted(binary: &Path) -> bool {
    binary.file_name().is_some_and(|name| name == "runc") && !Path::new("/sys/fs/selinux/enforce").exists()
}

fn make(binary: &Path) -> io::Result<(OwnedFd, Place)> {
    if !is_elf(binary) {
        // The interpreter of a script could not open it: the descriptor is closed on exec.
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "it is a script"));
    }
    let mut source = File::open(binary)?;
    if source.metadata()?.len() > MAX_BYTES {
        return Err(io::ErrorKind::FileTooLarge.into());
    }
    let flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING;
    let memfd = memfd_create("runc", flags | MFdFlags::from_bits_retain(MFD_EXEC))
        .or_else(|_| memfd_create("runc", flags))?;
    let mut copy = File::from(memfd);
    io::copy(&mut source, &mut copy)?;
    copy.set_permissions(std::fs::Permissions::from_mode(0o755))?;
    fcntl(&copy, FcntlArg::F_ADD_SEALS(seals()))?;
    let found = copy.metadata()?;
    let place =
        Place { pid: std::process::id(), fd: copy.as_raw_fd(), device: found.dev(), inode: found.ino() };
    Ok((copy.into(), place))
}

/// Exactly those that runc wants to see.
fn seals() -> SealFlag {
    SealFlag::F_SEAL_SEAL | SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_WRITE
}

fn is_sealed(file: &File) -> bool {
    fcntl(file, FcntlArg::F_GET_SEALS).is_ok_and(|found| found == seals().bits())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_copy_has_the_content_and_can_not_be_written() {
        let (memfd, place) = make(Path::new("/bin/true")).unwrap();
        let place: Place = place.to_string().parse().unwrap();
        let opened = place.open().unwrap();
        assert_eq!(std::fs::read(path_of(&opened)).unwrap(), std::fs::read("/bin/true").unwrap());
        assert!(nix::unistd::write(&memfd, b"x").is_err());
        assert!(std::process::Command::new(path_of(&opened)).status().unwrap().success());
    }

    #[test]
    fn another_file_under_the_same_number_is_not_taken_for_it() {
        let (memfd, place) = make(Path::new("/bin/true")).unwrap();
        assert_eq!(Place { inode: place.inode + 1, ..place.clone() }.open().map(drop), None);
        drop(memfd);
        assert_eq!("1:2".parse::<Place>(), Err(()));
    }

    #[test]
    fn only_runc_is_copied() {
        assert_eq!(Copies::default().place(Path::new("/bin/true")), None);
    }
}
