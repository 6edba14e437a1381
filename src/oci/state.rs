//! The directory in which the OCI runtime keeps its state of a container, below the option `Root`.
//!
//! `Root` may be on a disk that does not answer. So every method here may wait without end, and none may be called by a thread of
//! the async runtime.

use std::fs;
use std::io;
use std::path::PathBuf;

use crate::files;
use crate::id::TaskId;
use crate::task::request::Runtime;

/// What the daemon does with the state of a container that the OCI runtime could not delete.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Leftover {
    /// It stays.
    Keep,
    /// It stays if the runtime can read it.
    KeepReadable,
    /// The daemon removes it, which frees the id.
    Remove,
}

/// The directory with the runtime's state of one container.
#[derive(Clone, Debug)]
pub struct State {
    dir: PathBuf,
}

impl State {
    /// The state of the container of this id. An id has no slash and is not `..`.
    pub fn of(runtime: &Runtime, id: &TaskId) -> Self {
        Self { dir: runtime.root.join(id.as_str()) }
    }

    /// True if the runtime has state of this container.
    pub fn exists(&self) -> bool {
        self.dir.exists()
    }

    /// True if the container was created and waits for `start`: the FIFO that the init of runc and crun waits on exists.
    pub fn waits_for_start(&self) -> bool {
        self.start_fifo().exists()
    }

    /// Removes the FIFO that the container waited on, if a killed `runc start` could not.
    pub fn mark_started(&self) {
        // It is no error if it does not exist.
        let _ = fs::remove_file(self.start_fifo());
    }

    fn start_fifo(&self) -> PathBuf {
        self.dir.join("exec.fifo")
    }

    /// Whether a runtime can read its own state of a container. A file that is not JSON was cut off: the disk was full, or
    /// the runtime was killed.
    fn is_readable(&self) -> bool {
        const MAX_BYTES: u64 = 16 << 20;
        // The state files of runc and its relatives, and of crun.
        ["state.json", "status"].iter().any(|name| {
            files::read_regular(&self.dir.join(name), MAX_BYTES)
                .is_ok_and(|text| serde_json::from_slice::<serde::de::IgnoredAny>(&text).is_ok())
        })
    }

    /// Does with the state what the failed `delete` leaves to do. True if the state does not exist any more.
    ///
    /// # Errors
    /// It can't be removed.
    pub fn clear(&self, leftover: Leftover) -> io::Result<bool> {
        let stays = match leftover {
            Leftover::Keep => true,
            Leftover::KeepReadable => self.is_readable(),
            Leftover::Remove => false,
        };
        if stays {
            return Ok(false);
        }
        match fs::remove_dir_all(&self.dir) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                Err(io::Error::new(error.kind(), format!("remove {}: {error}", self.dir.display())))
            }
            _ => Ok(true),
        }
    }
}
