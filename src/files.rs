//! Files in directories of others, such as a bundle: a FIFO there must not make the daemon wait for a writer, a file
//! without an end must not fill its memory, and a symlink must not lead it to another file.

use std::fs::{self, DirBuilder, File};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::path::{Component, Path};
use std::sync::mpsc;
use std::time::Duration;

use nix::fcntl::{Flock, FlockArg, OFlag};

/// True for an absolute path without `..`.
pub fn is_plain(path: &Path) -> bool {
    path.is_absolute() && path.components().all(|part| part != Component::ParentDir)
}

/// Makes a directory, and those above it, if they do not exist. Tries again if one of them is removed between two steps: tasks
/// that end remove directories that they leave empty.
///
/// # Errors
/// A directory can't be made, or something else has its name.
pub fn make_dir(dir: &Path, mode: u32) -> io::Result<()> {
    const TRIES: u32 = 100;
    let mut tries = 0;
    loop {
        tries += 1;
        match DirBuilder::new().recursive(true).mode(mode).create(dir) {
            Err(e) if was_removed(&e) && tries < TRIES => {}
            result => return result,
        }
    }
}

/// True if a directory above was removed before the step that needed it, or after it was found to exist.
fn was_removed(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::AlreadyExists)
}

/// Reads a regular file of at most `limit` bytes. Follows symlinks.
///
/// # Errors
/// The file is not a regular file ([`io::ErrorKind::InvalidInput`]), it is larger than `limit`
/// ([`io::ErrorKind::FileTooLarge`]), or it cannot be read.
pub fn read_regular(path: &Path, limit: u64) -> io::Result<Vec<u8>> {
    // Without O_NONBLOCK, the open of a FIFO waits for a writer, and that of some devices for hardware.
    let flags = OFlag::O_NONBLOCK | OFlag::O_NOCTTY;
    let file = File::options().read(true).custom_flags(flags.bits()).open(path)?;
    if !file.metadata()?.is_file() {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "it is not a regular file"));
    }
    let mut bytes = Vec::new();
    file.take(limit.saturating_add(1)).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > limit {
        return Err(io::ErrorKind::FileTooLarge.into());
    }
    Ok(bytes)
}

/// Replaces a file in one step, by way of the name `new` in the same directory. The file gets `mode`, whatever the
/// umask is. What has either of the two names, which can be anything but a directory, is not opened.
///
/// # Errors
/// The file cannot be written; the old one stays.
pub fn replace(path: &Path, new: &Path, mode: u32, bytes: &[u8]) -> io::Result<()> {
    match fs::remove_file(new) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    // No other user may read the file before it has its mode: a spec can hold secrets.
    let mut file = File::options().write(true).create_new(true).mode(0o600).open(new)?;
    file.write_all(bytes)?;
    file.set_permissions(fs::Permissions::from_mode(mode))?;
    fs::rename(new, path)
}

/// Only the owner may open it.
const PRIVATE: u32 = 0o600;

/// Takes the lock of a file that only its owner can open, and makes the file if it does not exist. `None` if another
/// process holds the lock for all of `limit`; then a thread continues to wait for the lock, and releases it.
///
/// # Errors
/// The file can't be opened or locked.
pub fn lock(path: &Path, limit: Duration) -> io::Result<Option<Flock<File>>> {
    let mut options = File::options();
    // Who can open a file can lock it, also if that is for reading only.
    let file = options.write(true).create(true).truncate(false).mode(PRIVATE).open(path)?;
    // An earlier version made the file readable for everybody.
    file.set_permissions(fs::Permissions::from_mode(PRIVATE))?;
    let (done, locked) = mpsc::channel();
    let wait = move || {
        // Fails after the time limit.
        let _ = done.send(Flock::lock(file, FlockArg::LockExclusive).map_err(|(_, errno)| errno));
    };
    std::thread::Builder::new().spawn(wait)?;
    match locked.recv_timeout(limit) {
        Ok(locked) => Ok(Some(locked?)),
        Err(_) => Ok(None),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sys::stat::Mode;
    use std::os::unix::fs::symlink;

    #[test]
    fn only_regular_files_of_a_limited_size_are_read() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name| dir.path().join(name);
        fs::write(path("file"), b"12345").unwrap();
        nix::unistd::mkfifo(&path("fifo"), Mode::S_IRWXU).unwrap();
        symlink(path("file"), path("link")).unwrap();
        assert_eq!(read_regular(&path("file"), 5).unwrap(), b"12345");
        assert_eq!(read_regular(&path("link"), 5).unwrap(), b"12345");
        let kind = |path: &Path, limit| read_regular(path, limit).unwrap_err().kind();
        assert_eq!(kind(&path("file"), 4), io::ErrorKind::FileTooLarge);
        for no_file in [path("fifo").as_path(), dir.path(), Path::new("/dev/zero")] {
            assert_eq!(kind(no_file, 5), io::ErrorKind::InvalidInput, "{}", no_file.display());
        }
    }

    #[test]
    fn a_lock_that_somebody_holds_is_waited_for_with_a_limit() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("lock");
        fs::write(&path, "").unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).unwrap();
        // Any user could open it for reading.
        let holder = Flock::lock(File::open(&path).unwrap(), FlockArg::LockExclusive).unwrap();
        assert!(lock(&path, Duration::from_millis(20)).unwrap().is_none());
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o7777, PRIVATE);
        drop(holder);
        let held = lock(&path, Duration::from_secs(60)).unwrap();
        assert!(held.is_some());
        let other = File::open(&path).unwrap();
        assert!(Flock::lock(other, FlockArg::LockExclusiveNonblock).is_err(), "it is held");
    }

    #[test]
    fn no_other_user_can_open_a_file_before_it_is_complete() {
        let dir = tempfile::tempdir().unwrap();
        let (path, new) = (dir.path().join("file"), dir.path().join("new"));
        // The file stays in the state in which it is when its mode can't be set any more: nothing can be renamed to a directory.
        fs::create_dir_all(path.join("in the way")).unwrap();
        replace(&path, &new, 0o600, b"secret").unwrap_err();
        assert_eq!(fs::metadata(&new).unwrap().permissions().mode() & 0o7777, 0o600);
    }

    #[test]
    fn an_existing_path_is_replaced_by_a_new_file_and_not_opened() {
        let dir = tempfile::tempdir().unwrap();
        let (path, new, other) = (dir.path().join("file"), dir.path().join("new"), dir.path().join("other"));
        fs::write(&other, b"other").unwrap();
        symlink(&other, &new).unwrap();
        nix::unistd::mkfifo(&path, Mode::S_IRWXU).unwrap();
        replace(&path, &new, 0o644, b"text").unwrap();
        assert_eq!(read_regular(&path, 10).unwrap(), b"text");
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o7777, 0o644);
        assert_eq!(read_regular(&other, 10).unwrap(), b"other");
        assert!(!new.exists());
    }
}
