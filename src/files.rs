//! Files in directories of others, such as a bundle: a FIFO there must not make the daemon wait for a writer, a file
//! without an end must not fill its memory, and a symlink must not lead it to another file.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Component, Path};

use nix::fcntl::OFlag;

/// True for an absolute path without `..`.
pub fn is_plain(path: &Path) -> bool {
    path.is_absolute() && path.components().all(|part| part != Component::ParentDir)
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
