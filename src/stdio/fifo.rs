//! FIFOs of clients and of the daemon.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::poll::{PollFd, PollFlags};
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};
use nix::sys::stat::Mode;

use crate::fault::{self, Point};
use crate::path_error::{PathError, io_error};
use crate::sys::interrupt::Interrupt;
use crate::sys::poll;

use super::uri::Kind;

/// What can go wrong with a FIFO or a file of a stream.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A system call failed.
    #[error("stdio: {0}")]
    Io(#[from] PathError),
    /// No client opened the FIFO for reading.
    #[error("stdio: nobody opened {path} for reading within {:.0} s", .limit.as_secs_f64())]
    NoReader {
        /// The FIFO.
        path: PathBuf,
        /// The time limit.
        limit: Duration,
    },
    /// Nobody needs the FIFO any more.
    #[error("stdio: {path} is not needed any more, because its process was given up")]
    Interrupted {
        /// The FIFO.
        path: PathBuf,
    },
}

/// The kind of the file at a path.
pub fn kind(path: &Path) -> Kind {
    match std::fs::metadata(path).map(|found| found.file_type()) {
        Ok(found) if found.is_fifo() => Kind::Fifo,
        Ok(found) if found.is_file() => Kind::File,
        Ok(found) if found.is_char_device() => Kind::Device,
        Ok(_) => Kind::Other,
        Err(_) => Kind::Missing,
    }
}

/// Makes a FIFO with mode 0600.
///
/// # Errors
/// [`Error::Io`]
pub fn make(path: &Path) -> Result<(), Error> {
    Ok(nix::unistd::mkfifo(path, Mode::S_IRUSR | Mode::S_IWUSR).map_err(io_error("create FIFO", path))?)
}

/// Opens a client's output FIFO for a container, once a client has it open for reading.
///
/// It is opened for reading and writing, so that it always has a reader: when the client detaches, the container gets
/// neither EPIPE nor SIGPIPE, and its output waits for the next client. The wait for the first reader keeps the output of
/// a container that ends at once.
///
/// # Errors
/// [`Error::NoReader`] after `limit`, [`Error::Interrupted`], or the FIFO can't be opened.
pub fn open_output(path: &Path, limit: Duration, interrupt: &Interrupt) -> Result<File, Error> {
    let writer = match open_to_reader(path)? {
        Some(writer) => writer,
        None => wait_for_reader(path, limit, interrupt)?,
    };
    let both = open_both(path)?;
    drop(writer);
    fault::point(Point::StreamOpened);
    Ok(both)
}

/// Opens a FIFO for reading and writing, which never waits.
///
/// # Errors
/// [`Error::Io`]
pub fn open_both(path: &Path) -> Result<File, Error> {
    Ok(OpenOptions::new().read(true).write(true).open(path).map_err(io_error("open", path))?)
}

/// Opens a FIFO for writing only, or for both if nobody has it open for reading. Never waits.
///
/// # Errors
/// [`Error::Io`]
pub fn open_writer(path: &Path) -> Result<File, Error> {
    match open_to_reader(path)? {
        Some(writer) => with_mode(writer, OFlag::empty(), path),
        None => open_both(path),
    }
}

/// Opens a FIFO for writing only, in non-blocking mode. `None` if nobody has it open for reading.
fn open_to_reader(path: &Path) -> Result<Option<File>, Error> {
    match OpenOptions::new().write(true).custom_flags(OFlag::O_NONBLOCK.bits()).open(path) {
        Ok(writer) => Ok(Some(writer)),
        Err(error) if error.raw_os_error() == Some(Errno::ENXIO as i32) => Ok(None),
        Err(error) => Err(io_error("open", path)(error).into()),
    }
}

/// As [`open_both`], with non-blocking reads and writes.
///
/// # Errors
/// [`Error::Io`]
pub fn open_both_nonblocking(path: &Path) -> Result<File, Error> {
    with_mode(open_both(path)?, OFlag::O_NONBLOCK, path)
}

/// As [`open_output`], with non-blocking writes.
///
/// # Errors
/// As [`open_output`].
pub fn open_output_nonblocking(path: &Path, limit: Duration, interrupt: &Interrupt) -> Result<File, Error> {
    with_mode(open_output(path, limit, interrupt)?, OFlag::O_NONBLOCK, path)
}

/// Sets whether reads and writes wait: [`OFlag::O_NONBLOCK`], or nothing.
fn with_mode(file: File, mode: OFlag, path: &Path) -> Result<File, Error> {
    fcntl(&file, FcntlArg::F_SETFL(mode)).map_err(io_error("set the mode of", path))?;
    Ok(file)
}

/// Opens a FIFO for reading, without waiting for a writer.
///
/// # Errors
/// [`Error::Io`]
pub fn open_reader(path: &Path) -> Result<File, Error> {
    let opened = OpenOptions::new().read(true).custom_flags(OFlag::O_NONBLOCK.bits()).open(path);
    Ok(opened.map_err(io_error("open", path))?)
}

/// Opens a FIFO for a program that expects a pipe: without waiting for a writer, but blocking reads.
///
/// # Errors
/// [`Error::Io`]
pub fn open_blocking_reader(path: &Path) -> Result<File, Error> {
    with_mode(open_reader(path)?, OFlag::empty(), path)
}

/// Waits for the first reader, and opens the writing end.
///
/// Without a writer, a reader's open does not return, and inotify(7) reports only opens that have returned. So this opens
/// the writing end first, which needs a reader: the FIFO is opened for both for a moment. While no one else reads, poll(2)
/// reports an error for the writing end.
fn wait_for_reader(path: &Path, limit: Duration, interrupt: &Interrupt) -> Result<File, Error> {
    let deadline = Instant::now() + limit;
    let both = open_both(path)?;
    let mut options = OpenOptions::new();
    let writer = options.write(true).custom_flags(OFlag::O_NONBLOCK.bits()).open(path);
    let writer = writer.map_err(io_error("open", path))?;
    let opens = opens_of(path);
    drop(both);
    // Without a descriptor for it, the interrupt is polled.
    let event = interrupt.event().ok();
    while !has_reader(&writer).map_err(io_error("poll", path))? {
        if interrupt.is_set() {
            return Err(Error::Interrupted { path: path.to_owned() });
        }
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(Error::NoReader { path: path.to_owned(), limit });
        }
        let events = opens.iter().map(AsFd::as_fd).chain(event);
        let mut fds: Vec<_> = events.map(|event| PollFd::new(event, PollFlags::POLLIN)).collect();
        // Without an inotify instance, the FIFO is polled.
        let has_both = opens.is_some() && event.is_some();
        let pause = if has_both { left } else { left.min(WITHOUT_INOTIFY) };
        if poll(&mut fds, pause).map_err(io_error("wait for a reader of", path))? && !interrupt.is_set() {
            // A reader has opened the FIFO, and may have closed it again.
            break;
        }
    }
    Ok(writer)
}

/// The polling interval if no inotify instance or no descriptor is available.
const WITHOUT_INOTIFY: Duration = Duration::from_millis(20);

/// Becomes readable when a process opens the file from now on.
fn opens_of(path: &Path) -> Option<Inotify> {
    let inotify = Inotify::init(InitFlags::IN_CLOEXEC | InitFlags::IN_NONBLOCK).ok()?;
    inotify.add_watch(path, AddWatchFlags::IN_OPEN).ok()?;
    Some(inotify)
}

fn has_reader(writer: &File) -> io::Result<bool> {
    let mut fds = [PollFd::new(writer.as_fd(), PollFlags::empty())];
    poll(&mut fds, Duration::ZERO)?;
    Ok(!fds[0].revents().is_some_and(|found| found.contains(PollFlags::POLLERR)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};
    use tempfile::TempDir;

    /// A FIFO, and the directory that it is in.
    fn scratch() -> (TempDir, PathBuf) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("fifo");
        make(&path).unwrap();
        (dir, path)
    }

    #[test]
    fn a_writer_sees_the_end_of_its_readers_and_is_its_own_reader_if_there_is_none() {
        let (_dir, path) = scratch();
        open_writer(&path).unwrap().write_all(b"kept").unwrap();
        let reader = open_reader(&path).unwrap();
        let mut writer = open_writer(&path).unwrap();
        assert_eq!(fcntl(&writer, FcntlArg::F_GETFL).unwrap() & OFlag::O_NONBLOCK.bits(), 0);
        writer.write_all(b"read").unwrap();
        drop(reader);
        assert_eq!(writer.write_all(b"lost").unwrap_err().kind(), io::ErrorKind::BrokenPipe);
    }

    #[test]
    fn opening_a_fifo_without_a_reader_fails_after_a_limit() {
        let (_dir, path) = scratch();
        let error = open_output(&path, Duration::from_millis(20), &Interrupt::default()).unwrap_err();
        assert!(matches!(error, Error::NoReader { .. }), "{error}");
        let limit = Duration::from_nanos(29_999_994_739);
        let text = Error::NoReader { path: "/a".into(), limit }.to_string();
        assert!(text.ends_with("for reading within 30 s"), "{text}");
    }

    #[test]
    fn opening_a_fifo_waits_for_a_reader_that_comes_later() {
        let (_dir, path) = scratch();
        let reader = path.clone();
        let waiting = std::thread::spawn(move || {
            open_output(&path, Duration::from_secs(30), &Interrupt::default()).map(drop)
        });
        // The open returns once the other thread has the writing end.
        let mut options = OpenOptions::new();
        let _opened = options.read(true).open(&reader).unwrap();
        waiting.join().unwrap().unwrap();
    }

    #[test]
    fn written_bytes_stay_in_a_fifo_for_the_next_reader() {
        let (_dir, path) = scratch();
        let first = open_reader(&path).unwrap();
        let mut output = open_output(&path, Duration::from_secs(5), &Interrupt::default()).unwrap();
        drop(first);
        output.write_all(b"still here").unwrap();
        let mut second = open_blocking_reader(&path).unwrap();
        drop(output);
        let mut text = String::new();
        second.read_to_string(&mut text).unwrap();
        assert_eq!(text, "still here");
    }
}
