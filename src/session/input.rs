//! The client's FIFO for input, which is the stdin of a process without a terminal.

use std::fs::{File, OpenOptions};
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;
use std::time::Duration;

use nix::fcntl::OFlag;
use tokio::sync::oneshot;
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;

use crate::id::ProcessKey;
use crate::path_error::io_error;
use crate::stdio::{fifo, threads};

/// How long after the end of the input the process may have to wait at first, when it opens its stdin again.
const FIRST_PAUSE: Duration = Duration::from_millis(5);
/// The same, when the input has ended long ago.
const LONGEST_PAUSE: Duration = Duration::from_secs(1);

/// The writing end of a client's FIFO: without it the process would see end of file whenever a client goes away.
#[derive(Debug)]
pub(super) struct InputWriter {
    writer: File,
    /// Gets the writer when the input has ended.
    ended: Option<oneshot::Sender<File>>,
}

impl InputWriter {
    /// The input of a terminal, which the daemon reads itself.
    pub(super) fn of_terminal(writer: File) -> Self {
        Self { writer, ended: None }
    }

    /// The input of a process that reads the FIFO itself, and can open it again until `process_ended` or `stop` resolves.
    pub(super) fn of_process(
        key: &ProcessKey,
        writer: File,
        process_ended: impl Future<Output = ()> + Send + 'static,
        stop: CancellationToken,
    ) -> Self {
        let (ended, input_ended) = oneshot::channel();
        let (task, key) = (&key.task, key.clone());
        threads::spawn(task, async move {
            let released = async {
                let Ok(writer) = input_ended.await else { return };
                if let Err(error) = Box::pin(release_openers(writer)).await {
                    tracing::warn!(process = %key, %error, "{key}: a process that opens its stdin again may wait for ever: {error}");
                }
            };
            tokio::select! {
                () = released => {}
                () = process_ended => {}
                () = stop.cancelled() => {}
            }
        });
        Self { writer, ended: Some(ended) }
    }

    /// Closes the writing end: the process gets end of file once it has read everything and no client has the FIFO open.
    pub(super) fn close(self) {
        let unsent = match self.ended {
            Some(ended) => ended.send(self.writer).err(),
            None => Some(self.writer),
        };
        threads::discard(unsent);
    }
}

/// Closes the writing end, and lets a process that opens the FIFO from then on read what is left and the end of file.
///
/// open(2) of a FIFO for reading waits for a writer, unlike that of the nameless pipe of containerd-shim-runc-v2: a program that
/// opens `/dev/stdin` after the client has closed the input would wait for ever. The open returns once somebody opens the FIFO
/// for writing (fifo(7)), also if this writer is gone at once. No event reports an open that waits, so this opens a writer
/// again and again.
async fn release_openers(writer: File) -> Result<(), fifo::Error> {
    let by_number = |file: &File| PathBuf::from(format!("/proc/self/fd/{}", file.as_raw_fd()));
    let path = by_number(&writer);
    // Neither a reader nor a writer, and the same FIFO whatever becomes of its name.
    let handle = OpenOptions::new().read(true).custom_flags(OFlag::O_PATH.bits()).open(&path);
    let handle = handle.map_err(io_error("open", &path))?;
    drop(writer);
    let mut pause = FIRST_PAUSE;
    loop {
        sleep(pause).await;
        drop(fifo::open_both(&by_number(&handle))?);
        pause = (pause * 2).min(LONGEST_PAUSE);
    }
}
