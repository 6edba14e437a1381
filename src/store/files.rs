//! Operations on the store's files and directories.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;

use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, OFlag, RenameFlags, renameat2};
use rustix::fs::{FlockOperation, flock};

use crate::effects;
use crate::fault::{self, Point};
use crate::files;
use crate::path_error::io_error;

use super::Error;

/// The largest file that is read or written.
pub(super) const MAX_BYTES: usize = 64 << 20;

/// How often a reader opens a file again that was replaced before the reader had locked it.
const MAX_OPENS: u32 = 100;

/// A tmpfs allocates space in pages of this size, in bytes.
const PAGE: usize = 4096;

/// Removes a directory. Returns false if it did not exist.
pub(super) fn remove_dir(dir: &Path) -> Result<bool, Error> {
    match effects::disk(dir).and_then(|()| fs::remove_dir_all(dir)) {
        Ok(()) => Ok(true),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(e) => Err(io_error("remove", dir)(e).into()),
    }
}

pub(super) fn make_dir(dir: &Path) -> io::Result<()> {
    effects::disk(dir)?;
    files::make_dir(dir, 0o700)
}

/// Opens a file in the directory of all records, for reading and writing. Creates both if they do not exist.
pub(super) fn open_in_root(root: &Path, name: &str) -> Result<File, Error> {
    files::make_dir(root, 0o700).map_err(io_error("create", root))?;
    let path = root.join(name);
    let mut options = OpenOptions::new();
    let file = options.read(true).write(true).create(true).truncate(false).mode(0o600).open(&path);
    Ok(file.map_err(io_error("open", &path))?)
}

/// The names in a directory, none if it does not exist or something else has its name.
pub(super) fn entries(dir: &Path) -> Result<Vec<String>, Error> {
    let listing = match fs::read_dir(dir) {
        Ok(listing) => listing,
        Err(e) if matches!(e.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => {
            return Ok(Vec::new());
        }
        Err(e) => return Err(io_error("list", dir)(e).into()),
    };
    Ok(listing.filter_map(|entry| entry.ok()?.file_name().into_string().ok()).collect())
}

/// Reads a file of the store that [`replace`] writes. `None` if it does not exist.
///
/// # Errors
/// [`Error::Io`], [`Error::TooLarge`]
pub fn read(path: &Path) -> Result<Option<Vec<u8>>, Error> {
    open(path)?.map(|file| content(file, path)).transpose()
}

/// Reads a file that [`replace_by_turns`] writes, possibly another process at the same time. `None` if it does not exist.
///
/// Never waits for a lock: the guard of a killed daemon keeps the locks of that daemon for up to 30 s.
///
/// # Errors
/// As [`read`].
pub(super) fn read_by_turns(path: &Path) -> Result<Option<Vec<u8>>, Error> {
    for _ in 0..MAX_OPENS {
        let Some(file) = open(path)? else {
            return Ok(None);
        };
        if is_kept(&file, path).map_err(io_error("lock", path))? {
            return content(file, path).map(Some);
        }
    }
    // A daemon of an earlier version kept the lock while it put the file at its path. If it was killed then, nobody writes the
    // file.
    read(path)
}

/// Locks a file, so that nobody overwrites it. False if it is being overwritten or another file has its path by now, so that it
/// may have been overwritten before.
fn is_kept(file: &File, path: &Path) -> io::Result<bool> {
    match flock(file, FlockOperation::NonBlockingLockShared) {
        Err(rustix::io::Errno::INTR | rustix::io::Errno::WOULDBLOCK) => return Ok(false),
        locked => locked?,
    }
    let own = file.metadata()?;
    match fs::metadata(path) {
        Ok(found) => Ok((found.dev(), found.ino()) == (own.dev(), own.ino())),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(e) => Err(e),
    }
}

fn open(path: &Path) -> Result<Option<File>, Error> {
    // Somebody may have put a FIFO there: without O_NONBLOCK, this would wait for its writer.
    match OpenOptions::new().read(true).custom_flags(OFlag::O_NONBLOCK.bits()).open(path) {
        Ok(file) => Ok(Some(file)),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(io_error("open", path)(e).into()),
    }
}

fn content(file: File, path: &Path) -> Result<Vec<u8>, Error> {
    // The last page is padded.
    let limit = MAX_BYTES + PAGE;
    let length = file.metadata().map_or(0, |found| found.len()).min(limit as u64);
    let mut text = Vec::with_capacity(length as usize + 1);
    file.take(limit as u64 + 1).read_to_end(&mut text).map_err(io_error("read", path))?;
    if text.len() > limit {
        return Err(Error::TooLarge { path: path.to_owned(), limit: MAX_BYTES });
    }
    Ok(text)
}

/// Replaces a file in one step by a second file, and keeps the old file to be overwritten the next time. A record that
/// needs no more pages than before therefore needs no new space: an exit can be recorded when `/run` is full.
///
/// A reader locks the file that it reads. If the old file still has a reader, the new version goes to a new file. The file is
/// unlocked before it gets its path: if the daemon is killed, its guard keeps the lock, and the next daemon has to read the
/// record.
pub(super) fn replace_by_turns(path: &Path, other: &Path, mut text: Vec<u8>) -> Result<(), Error> {
    let mut options = OpenOptions::new();
    let options = options.write(true).create(true).truncate(false).mode(0o600);
    let opened = effects::disk(other).and_then(|()| options.open(other));
    let mut file = opened.map_err(io_error("create", other))?;
    if flock(&file, FlockOperation::NonBlockingLockExclusive).is_err() {
        fs::remove_file(other).map_err(io_error("remove", other))?;
        file = options.open(other).map_err(io_error("create", other))?;
    }
    let length = file.metadata().map_err(io_error("look at", other))?.len();
    // Padding after a record is ignored. The rest of an older, longer record would not be.
    text.resize(text.len().next_multiple_of(PAGE), b'\n');
    file.write_all(&text).map_err(io_error("write", other))?;
    if length > text.len() as u64 {
        file.set_len(text.len() as u64).map_err(io_error("shorten", other))?;
    }
    fault::point(Point::RecordWritten);
    flock(&file, FlockOperation::Unlock).map_err(io_error("unlock", other))?;
    match renameat2(AT_FDCWD, other, AT_FDCWD, path, RenameFlags::RENAME_EXCHANGE) {
        Ok(()) => {}
        // The file does not exist yet, or the file system can't exchange files.
        Err(Errno::ENOENT | Errno::EINVAL | Errno::ENOSYS) => {
            fs::rename(other, path).map_err(io_error("replace", path))?;
        }
        Err(errno) => return Err(io_error("replace", path)(errno).into()),
    }
    // Until here, `file` is open.
    fault::point(Point::RecordReplaced);
    drop(file);
    Ok(())
}

/// Replaces a file in one step: writes the file `new` and renames it.
///
/// # Errors
/// [`Error::Io`]
pub fn replace(path: &Path, new: &Path, text: &[u8]) -> Result<(), Error> {
    effects::disk(new).map_err(io_error("create", new))?;
    let mut file = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(new)
        .map_err(io_error("create", new))?;
    file.write_all(text).map_err(io_error("write", new))?;
    Ok(fs::rename(new, path).map_err(io_error("replace", path))?)
}
