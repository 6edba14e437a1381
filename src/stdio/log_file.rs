//! A client's log file (`file://`), or a device that the client names. A thread of its own writes it: a disk that hangs only
//! blocks the output of this process.

use std::collections::HashMap;
use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, LazyLock, Mutex, MutexGuard, OnceLock, PoisonError, mpsc};
use std::time::Duration;

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use tokio::sync::oneshot;

use crate::files;
use crate::path_error::io_error;
use crate::suspect;

use super::fifo::Error;

/// A thread without work ends after this time.
const IDLE: Duration = Duration::from_secs(2);
/// A thread that could not be started is tried again after this time.
const RETRY: Duration = Duration::from_millis(500);
/// The stack size of a thread, in bytes. Opening and writing need little.
const STACK: usize = 128 << 10;

/// The largest number of threads that wait for a disk after their process has ended. No log file is opened while there are
/// this many.
const MOST_LEFT_BEHIND: usize = 256;

/// The largest number of such threads of one container. No log file of this container is opened while there are this many.
const MOST_OF_OWNER: usize = 32;

/// The threads that wait for a disk after their process has ended, by the container of the process.
static LEFT_BEHIND: LazyLock<Mutex<HashMap<Arc<str>, usize>>> = LazyLock::new(Mutex::default);

fn left_behind() -> MutexGuard<'static, HashMap<Arc<str>, usize>> {
    LEFT_BEHIND.lock().unwrap_or_else(PoisonError::into_inner)
}

/// True if a container may open a log file.
fn has_room(owner: &str) -> bool {
    let all = left_behind();
    all.get(owner).is_none_or(|own| *own < MOST_OF_OWNER) && all.values().sum::<usize>() < MOST_LEFT_BEHIND
}

/// A client's log file. Bytes that can't be written (full disk) are dropped and counted. Later output is written once the
/// file accepts it.
#[derive(Debug)]
pub struct LogFile {
    target: Arc<Target>,
    /// The channel to the writing thread, if there is one. A piece is sent when the previous piece is written.
    writer: Option<mpsc::Sender<Piece>>,
    /// The piece that the thread is writing. It records whether this value was dropped meanwhile.
    pending: Option<Arc<Pending>>,
    missing: usize,
    /// The container of the process.
    owner: Arc<str>,
}

/// The file, opened once.
#[derive(Debug)]
struct Target {
    path: PathBuf,
    create: bool,
    file: OnceLock<File>,
}

/// Bytes to be written.
struct Piece {
    bytes: Arc<[u8]>,
    done: oneshot::Sender<Written>,
    /// Held until the piece is written.
    _pending: Arc<Pending>,
}

/// The number of bytes written, and the error if not all were.
type Written = (usize, Option<io::Error>);

impl LogFile {
    /// Opens a file of a container for appending. With `create`, creates it and its directories. Waits for the disk.
    ///
    /// # Errors
    /// [`Error::Io`], also if too many threads wait for a disk.
    pub fn open(path: &Path, create: bool, owner: &Arc<str>) -> Result<Self, Error> {
        if !has_room(owner) {
            let many =
                "too many log files of ended processes are still being written: a disk does not answer";
            return Err(io_error("open", path)(io::Error::new(io::ErrorKind::ResourceBusy, many)).into());
        }
        let file = Self::later(path, create, owner);
        file.target.file()?;
        Ok(file)
    }

    /// As [`Self::open`], but opens the file with the first write, so that this call does not wait for the disk.
    pub fn later(path: &Path, create: bool, owner: &Arc<str>) -> Self {
        let target = Target { path: path.to_owned(), create, file: OnceLock::new() };
        Self { target: Arc::new(target), writer: None, pending: None, missing: 0, owner: owner.clone() }
    }

    /// Writes at the end of the file. Returns when the bytes are written, or can't be.
    pub async fn write(&mut self, bytes: &[u8]) {
        let (written, failure) = self.write_some(bytes.into()).await;
        let path = self.target.path.display();
        if written > 0 && self.missing > 0 {
            tracing::warn!("writing output to {path} again; {} bytes are missing there", self.missing);
            self.missing = 0;
        }
        if let Some(error) = failure {
            if self.missing == 0 {
                tracing::error!(%error, "output is missing in {path} from here on: {error}");
            }
            self.missing += bytes.len() - written;
        }
    }

    async fn write_some(&mut self, bytes: Arc<[u8]>) -> Written {
        loop {
            let (done, written) = oneshot::channel();
            let pending = Arc::new(Pending::default());
            self.pending = Some(pending.clone());
            if let Err(error) = self.hand_over(Piece { bytes: bytes.clone(), done, _pending: pending }) {
                if error.kind() != io::ErrorKind::WouldBlock {
                    return (0, Some(error));
                }
                // The system allows no further thread now: the output waits in its pipe until it does.
                tokio::time::sleep(RETRY).await;
                continue;
            }
            match written.await {
                Ok(written) => {
                    self.pending = None;
                    return written;
                }
                // The thread ended before it received the piece.
                Err(_) => self.writer = None,
            }
        }
    }

    fn hand_over(&mut self, piece: Piece) -> io::Result<()> {
        let piece = match &self.writer {
            Some(writer) => match writer.send(piece) {
                Ok(()) => return Ok(()),
                Err(mpsc::SendError(piece)) => piece,
            },
            None => piece,
        };
        let (writer, pieces) = mpsc::channel();
        // Can't fail: the receiver exists until the thread takes it.
        let _ = writer.send(piece);
        let target = self.target.clone();
        let work = suspect::inherit_fn(move || {
            while let Ok(Piece { bytes, done, _pending }) = pieces.recv_timeout(IDLE) {
                // The pump may have been stopped meanwhile.
                let _ = done.send(target.write(&bytes));
            }
        });
        std::thread::Builder::new().name("log-file".to_owned()).stack_size(STACK).spawn(work)?;
        self.writer = Some(writer);
        Ok(())
    }
}

impl Drop for LogFile {
    fn drop(&mut self) {
        // The thread holds the other reference.
        if let Some(pending) = self.pending.take() {
            pending.leave_behind(&self.owner);
        }
    }
}

/// A piece that a thread is writing.
#[derive(Debug, Default)]
struct Pending {
    is_left_behind: OnceLock<LeftBehind>,
}

impl Pending {
    /// Counts the thread in [`LEFT_BEHIND`] as long as it holds this.
    fn leave_behind(self: Arc<Self>, owner: &Arc<str>) {
        self.is_left_behind.get_or_init(|| LeftBehind::new(owner));
    }
}

#[derive(Debug)]
struct LeftBehind(Arc<str>);

impl LeftBehind {
    fn new(owner: &Arc<str>) -> Self {
        *left_behind().entry(owner.clone()).or_default() += 1;
        Self(owner.clone())
    }
}

impl Drop for LeftBehind {
    fn drop(&mut self) {
        let mut all = left_behind();
        if let Some(own) = all.get_mut(&self.0) {
            *own -= 1;
            all.retain(|_, own| *own > 0);
        }
    }
}

impl Target {
    fn file(&self) -> Result<&File, Error> {
        if let Some(file) = self.file.get() {
            return Ok(file);
        }
        if let (true, Some(parent)) = (self.create, self.path.parent()) {
            files::make_dir(parent, 0o755).map_err(io_error("create", parent))?;
        }
        let mut options = OpenOptions::new();
        // Does not wait for a FIFO that replaced the file since its kind was checked.
        let flags = OFlag::O_NONBLOCK | OFlag::O_NOCTTY;
        let options = options.append(true).create(self.create).mode(0o644).custom_flags(flags.bits());
        let file = options.open(&self.path).map_err(io_error("open", &self.path))?;
        // Output waits for a terminal that accepts none at the moment.
        if file.metadata().map_err(io_error("open", &self.path))?.file_type().is_char_device() {
            fcntl(&file, FcntlArg::F_SETFL(OFlag::O_APPEND))
                .map_err(io_error("set the mode of", &self.path))?;
        }
        Ok(self.file.get_or_init(|| file))
    }

    fn write(&self, bytes: &[u8]) -> Written {
        let mut file = match self.file() {
            Ok(file) => file,
            Err(error) => return (0, Some(io::Error::other(error))),
        };
        let mut written = 0;
        while let Some(rest) = bytes.get(written..).filter(|rest| !rest.is_empty()) {
            match file.write(rest) {
                Ok(0) => return (written, Some(io::ErrorKind::WriteZero.into())),
                Ok(more) => written += more,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return (written, Some(error)),
            }
        }
        (written, None)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::stdio::fifo;
    use crate::sys;
    use std::io::Read;
    use std::os::fd::AsFd;

    use nix::poll::{PollFd, PollFlags};

    fn owner(name: &str) -> Arc<str> {
        Arc::from(name)
    }

    #[tokio::test]
    async fn pieces_are_written_in_order_also_by_a_second_thread() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a/b/log");
        let mut file = LogFile::open(&path, true, &owner("web")).unwrap();
        file.write(b"one ").await;
        // As if the thread had ended after its idle time.
        file.writer = Some(mpsc::channel().0);
        file.write(b"two ").await;
        file.write(b"three").await;
        assert_eq!(std::fs::read(&path).unwrap(), b"one two three");
    }

    #[tokio::test]
    async fn a_file_that_can_not_be_opened_at_first_is_opened_later() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        let mut file = LogFile::later(&path, false, &owner("web"));
        file.write(b"lost").await;
        assert_eq!(file.missing, 4);
        std::fs::write(&path, b"").unwrap();
        file.write(b"kept").await;
        assert_eq!((file.missing, std::fs::read(&path).unwrap()), (0, b"kept".to_vec()));
    }

    /// A file whose writes never return, as on a dead disk: a full FIFO.
    fn dead(path: &Path, of: &str) -> (LogFile, File) {
        fifo::make(path).unwrap();
        let both = fifo::open_both(path).unwrap();
        let file = LogFile::later(path, false, &owner(of));
        file.target.file.set(both.try_clone().unwrap()).unwrap();
        (file, both)
    }

    #[test]
    fn files_that_never_answer_delay_neither_another_file_nor_the_shared_threads() {
        let dir = tempfile::tempdir().unwrap();
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .max_blocking_threads(1)
            .enable_all()
            .build()
            .unwrap();
        let alive = dir.path().join("alive");
        runtime.block_on(async {
            let mut ends = Vec::new();
            let mut writes = Vec::new();
            for number in 0..70 {
                let (mut file, end) =
                    dead(&dir.path().join(format!("dead{number}")), &format!("dead{}", number % 2));
                ends.push(end);
                writes.push(tokio::spawn(async move { file.write(&[0; 1 << 17]).await }));
            }
            for end in &ends {
                let mut begun = [PollFd::new(end.as_fd(), PollFlags::POLLIN)];
                assert!(sys::poll(&mut begun, Duration::from_secs(60)).unwrap());
            }
            let mut file = LogFile::open(&alive, true, &owner("alive")).unwrap();
            file.write(b"alive").await;
            assert_eq!(tokio::task::spawn_blocking(|| 7).await.unwrap(), 7);
            // Their processes are deleted: the threads are counted until the disk answers.
            for write in writes {
                write.abort();
                assert!(write.await.unwrap_err().is_cancelled());
            }
            assert_eq!(["dead0", "dead1"].map(|name| left_behind()[name]), [35, 35]);
            // Each container has more than it may have, and that is its own affair.
            let refused = LogFile::open(&alive, true, &owner("dead0")).unwrap_err().to_string();
            assert!(refused.contains("a disk does not answer"), "{refused}");
            LogFile::open(&alive, true, &owner("alive")).unwrap();
            for end in &mut ends {
                end.read_exact(&mut [0; 1 << 17]).unwrap();
            }
            while left_behind().keys().any(|name| name.starts_with("dead")) {
                tokio::task::yield_now().await;
            }
        });
        assert_eq!(std::fs::read(&alive).unwrap(), b"alive");
        runtime.shutdown_background();
    }
}
