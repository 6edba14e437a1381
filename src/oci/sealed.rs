//! Copies of the OCI runtime's binary in memory, sealed against writing.
//!
//! Inside a container, runc 1.0 and 1.1 run from a sealed copy of themselves, so that the container can't write to the
//! host's binary through `/proc/self/exe` (CVE-2019-5736). They make a copy of about 10 MB at every create and exec,
//! unless they already run from one: a memfd with exactly four seals. A copy that all containers share saves a fifth of
//! the time of an exec. The copy is in huge pages, which saves another eighth of the CPU time of `runc exec`.
//!
//! The seals protect the content, but not the inode. The root user of a container that runs `/proc/self/exe` could `chmod`
//! the copy through `/proc/PID/exe`, and creates and execs of other containers would fail. So the copy is also immutable
//! (`FS_IOC_SETFLAGS`, Linux 6.0 for memfds): without CAP_LINUX_IMMUTABLE on the host, nobody can change its mode, owner,
//! times, attributes and size. If a copy can't be made immutable, there is none, and runc makes its own copies.
//!
//! The daemon holds the copies and `launch` runs them. If a copy is not as expected, the binary itself is run.

use std::collections::HashMap;
use std::fmt;
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};

use crate::sys;

use super::profiles;
use super::runtime::is_elf;

/// A copy that was not used for this time is dropped, to free its memory.
pub const IDLE_LIMIT: Duration = Duration::from_secs(60);

/// The name of the copy in `/proc/PID/exe`: that of the copies that runc makes of itself (`CLONED_BINARY` in runc's cloned_binary.c).
/// Programs that report executed memory files know this name.
const NAME: &str = "runc_cloned:/proc/self/exe";

/// The largest binary that is copied, in bytes. No runc is larger.
const MAX_BYTES: u64 = 64 << 20;

/// `MFD_EXEC` (Linux 6.3): makes the memfd executable if `vm.memfd_noexec` is set.
const MFD_EXEC: u32 = 0x10;

/// Refers to a copy: a descriptor of the daemon, and the identity of its file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SealedRef {
    pid: u32,
    fd: i32,
    device: u64,
    inode: u64,
}

impl fmt::Display for SealedRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}:{}:{}", self.pid, self.fd, self.device, self.inode)
    }
}

impl FromStr for SealedRef {
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

impl SealedRef {
    /// Opens the copy. `None` if it is another file: the daemon may have ended, and another process may have its pid.
    pub fn open(&self) -> Option<File> {
        let file = File::open(format!("/proc/{}/fd/{}", self.pid, self.fd)).ok()?;
        let found = file.metadata().ok()?;
        let meant = (found.dev(), found.ino()) == (self.device, self.inode);
        (meant && is_safe(&file)).then_some(file)
    }
}

/// A path under which this process can run an open file.
pub fn path_of(file: &File) -> PathBuf {
    PathBuf::from(format!("/proc/self/fd/{}", file.as_raw_fd()))
}

/// Identifies the content of a binary.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct FileIdentity {
    device: u64,
    inode: u64,
    bytes: u64,
    changed: (i64, i64),
}

impl FileIdentity {
    fn of(binary: &Path) -> io::Result<Self> {
        let found = std::fs::metadata(binary)?;
        let changed = (found.mtime(), found.mtime_nsec());
        Ok(Self { device: found.dev(), inode: found.ino(), bytes: found.len(), changed })
    }
}

/// The copy of a binary, or the knowledge that a copy can't be made.
struct CachedCopy {
    of: FileIdentity,
    /// Made at its first use.
    copy: OnceLock<Option<Copy>>,
    used: Mutex<Instant>,
}

/// A copy that the daemon holds.
struct Copy {
    file: File,
    reference: SealedRef,
    /// The mode of the new copy. If it loses its `x`, nobody can run the copy.
    mode: u32,
}

impl Copy {
    /// True if the copy is unchanged. Only a container with full access to the host can change it.
    fn is_intact(&self) -> bool {
        self.file.metadata().is_ok_and(|found| found.mode() == self.mode) && is_safe(&self.file)
    }
}

impl CachedCopy {
    fn new(of: FileIdentity) -> Self {
        Self { of, copy: OnceLock::new(), used: Mutex::new(Instant::now()) }
    }

    fn used(&self) -> MutexGuard<'_, Instant> {
        self.used.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn is_spoiled(&self) -> bool {
        matches!(self.copy.get(), Some(Some(copy)) if !copy.is_intact())
    }
}

/// The copies that the daemon holds.
#[derive(Default)]
pub struct Copies {
    cached: Mutex<HashMap<PathBuf, Arc<CachedCopy>>>,
}

impl Copies {
    fn cached(&self) -> MutexGuard<'_, HashMap<PathBuf, Arc<CachedCopy>>> {
        // A panic ends the process, so no other thread can see a poisoned lock.
        self.cached.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The copy of a binary that needs one ([`is_wanted`]). Makes one if there is none of the current content. `None` if there
    /// can be none. Blocks.
    pub fn copy_of(&self, binary: &Path) -> Option<SealedRef> {
        let cached = self.cached_copy_of(binary)?;
        *cached.used() = Instant::now();
        // The map is not locked meanwhile, because this copies megabytes.
        let copy = cached.copy.get_or_init(|| {
            let made = make(binary).inspect_err(|error| {
                tracing::info!(%error, "can't make a safe copy of {}, so it is run directly: {error}", binary.display());
            });
            made.ok()
        });
        copy.as_ref().map(|copy| copy.reference.clone())
    }

    fn cached_copy_of(&self, binary: &Path) -> Option<Arc<CachedCopy>> {
        let of = FileIdentity::of(binary).ok()?;
        let mut cached = self.cached();
        if let Some(found) = cached.get(binary).filter(|found| found.of == of) {
            if !found.is_spoiled() {
                return Some(found.clone());
            }
            tracing::warn!("the shared copy of {} was modified: making a new one", binary.display());
        }
        let fresh = Arc::new(CachedCopy::new(of));
        cached.insert(binary.to_owned(), fresh.clone());
        Some(fresh)
    }

    /// Drops the copies that were not used for [`IDLE_LIMIT`].
    pub fn sweep(&self) {
        self.cached().retain(|_, cached| cached.used().elapsed() < IDLE_LIMIT);
    }
}

/// True for runc, which is the only runtime that uses a copy, unless SELinux is active: the copy would not have the
/// binary's label, and containers would not get their domain.
pub fn is_wanted(binary: &Path) -> bool {
    binary.file_name().is_some_and(|name| name == "runc") && !profiles::selinux_is_active()
}

fn make(binary: &Path) -> io::Result<Copy> {
    if !is_elf(binary) {
        // The interpreter of a script could not open the copy: its descriptor is closed on exec.
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "it is a script"));
    }
    let mut source = File::open(binary)?;
    if source.metadata()?.len() > MAX_BYTES {
        return Err(io::ErrorKind::FileTooLarge.into());
    }
    let flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING;
    let memfd = memfd_create(NAME, flags | MFdFlags::from_bits_retain(MFD_EXEC))
        .or_else(|_| memfd_create(NAME, flags))?;
    let mut copy = File::from(memfd);
    io::copy(&mut source, &mut copy)?;
    copy.set_permissions(std::fs::Permissions::from_mode(0o755))?;
    fcntl(&copy, FcntlArg::F_ADD_SEALS(seals()))?;
    sys::set_immutable(&copy)?;
    use_huge_pages(copy.try_clone()?);
    let found = copy.metadata()?;
    let reference =
        SealedRef { pid: std::process::id(), fd: copy.as_raw_fd(), device: found.dev(), inode: found.ino() };
    Ok(Copy { file: copy, reference, mode: found.mode() })
}

/// Moves a copy to huge pages. No call waits for it: on a machine whose free memory is in small pieces, the kernel makes room
/// first. A copy that stays where it is works, too.
fn use_huge_pages(copy: File) {
    let moving = move || {
        if let Err(error) = sys::use_huge_pages(&copy) {
            tracing::debug!(%error, "a copy of the OCI runtime is not in huge pages, so execs cost more: {error}");
        }
    };
    let thread = std::thread::Builder::new().name("huge pages".to_owned()).stack_size(128 << 10);
    if let Err(error) = thread.spawn(moving) {
        tracing::debug!(%error, "can't move a copy of the OCI runtime to huge pages: {error}");
    }
}

/// The seals that runc checks for.
fn seals() -> SealFlag {
    SealFlag::F_SEAL_SEAL | SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_WRITE
}

/// True if neither the content nor the inode can be changed.
fn is_safe(file: &File) -> bool {
    let is_sealed = fcntl(file, FcntlArg::F_GET_SEALS).is_ok_and(|found| found == seals().bits());
    is_sealed && sys::is_immutable(file).unwrap_or(false)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;

    /// Makes a copy, which needs root and Linux 6.0.
    fn made() -> Option<Copy> {
        make(Path::new("/bin/true")).ok().or_else(|| {
            assert!(!nix::unistd::geteuid().is_root(), "root can make a copy");
            None
        })
    }

    #[test]
    fn a_copy_has_the_content_and_can_not_be_written() {
        let Some(copy) = made() else { return };
        let reference: SealedRef = copy.reference.to_string().parse().unwrap();
        let opened = reference.open().unwrap();
        assert_eq!(std::fs::read(path_of(&opened)).unwrap(), std::fs::read("/bin/true").unwrap());
        assert!(nix::unistd::write(&copy.file, b"x").is_err());
        assert!(Command::new(path_of(&opened)).status().unwrap().success());
        assert!(copy.is_intact());
    }

    #[test]
    fn a_copy_can_not_be_changed_through_a_path_to_it() {
        let Some(copy) = made() else { return };
        let path = path_of(&copy.file);
        let tries: [(&str, io::Result<()>); 5] = [
            ("mode", std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o000))),
            ("owner", std::os::unix::fs::chown(&path, Some(1), Some(1))),
            (
                "times",
                File::open(&path).and_then(|file| file.set_modified(std::time::SystemTime::UNIX_EPOCH)),
            ),
            ("content", File::options().write(true).open(&path).map(drop)),
            ("size", nix::unistd::truncate(&path, 0).map_err(io::Error::from)),
        ];
        for (what, tried) in tries {
            assert!(tried.is_err(), "its {what}");
        }
        assert!(copy.is_intact());
    }

    #[test]
    fn a_copy_that_was_changed_is_made_again() {
        let Some(copy) = made() else { return };
        let (copies, binary) = (Copies::default(), Path::new("/bin/true"));
        let cached = CachedCopy::new(FileIdentity::of(binary).unwrap());
        let spoiled = copy.reference.clone();
        cached.copy.set(Some(copy)).ok().unwrap();
        copies.cached().insert(binary.to_owned(), Arc::new(cached));
        let held = copies.cached_copy_of(binary).unwrap();
        assert!(held.copy.get().is_some(), "an intact one is used");
        // A container with CAP_LINUX_IMMUTABLE on the host can do this.
        sys::set_flags(&held.copy.get().unwrap().as_ref().unwrap().file, 0).unwrap();
        assert!(spoiled.open().is_none(), "launch does not run it");
        assert!(copies.cached_copy_of(binary).unwrap().copy.get().is_none(), "it is to be made again");
    }

    #[test]
    fn another_file_under_the_same_number_is_not_taken_for_it() {
        let Some(Copy { file, reference, .. }) = made() else { return };
        assert_eq!(SealedRef { inode: reference.inode + 1, ..reference.clone() }.open().map(drop), None);
        drop(file);
        assert_eq!("1:2".parse::<SealedRef>(), Err(()));
    }

    #[test]
    fn only_runc_is_copied() {
        assert!(!is_wanted(Path::new("/bin/true")));
    }
}
