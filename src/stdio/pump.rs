//! Copies a FIFO of ours to a file, in the daemon.

use std::fs::{DirBuilder, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::Path;

use tokio::io::AsyncReadExt;
use tokio::net::unix::pipe;

use super::fifo::{Error, error};

/// What is read at once: the size of a pipe.
const CHUNK: usize = 64 << 10;

/// Opens a file for appending; with `create` it and its directories are made.
///
/// # Errors
/// [`Error::Io`]
pub fn open_file(path: &Path, create: bool) -> Result<File, Error> {
    if let (true, Some(parent)) = (create, path.parent()) {
        DirBuilder::new().recursive(true).mode(0o755).create(parent).map_err(error("create", parent))?;
    }
    let mut options = OpenOptions::new();
    options.append(true).create(create).mode(0o644).open(path).map_err(error("open", path))
}

/// Copies until every writer is gone and nothing is left.
///
/// The container has to hold the FIFO when this begins: a FIFO without a writer looks as if it had
/// ended. The file is written on a thread for blocking work, a chunk at a time: a slow disk holds up
/// this container's output, and only that.
///
/// # Errors
/// The FIFO can't be read, or the file can't be written.
pub async fn copy(fifo: File, mut file: File) -> io::Result<()> {
    let mut fifo = pipe::Receiver::from_file(fifo)?;
    let mut buffer = vec![0; CHUNK];
    loop {
        let length = fifo.read(&mut buffer).await?;
        if length == 0 {
            return Ok(());
        }
        let written = tokio::task::spawn_blocking(move || {
            let result = file.write_all(&buffer[..length]);
            (file, buffer, result)
        });
        let result;
        (file, buffer, result) = written.await.map_err(io::Error::other)?;
        result?;
    }
}
