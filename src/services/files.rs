//! Work on files that a client has named: they may be on a disk that does not answer.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use crate::config;
use crate::id::ProcessKey;

use super::{Error, Shim, waiting};

/// The processes whose files a thread checks or opens now, and since when. Each process has one such thread at most: the
/// thread lasts for as long as the disk does not answer.
#[derive(Debug, Default)]
pub(crate) struct Looking(Mutex<HashMap<ProcessKey, Instant>>);

impl Looking {
    fn all(&self) -> MutexGuard<'_, HashMap<ProcessKey, Instant>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// # Errors
    /// Another thread works on the files of this process.
    fn begin(self: &Arc<Self>, process: &ProcessKey) -> Result<Turn, Error> {
        let mut all = self.all();
        match all.get(process) {
            Some(since) if since.elapsed() >= config::FILES_LIMIT => {
                Err(Error::FilesDoNotAnswer { process: process.clone() })
            }
            Some(_) => Err(match process.exec.clone() {
                Some(exec) => Error::ExecExists { exec: exec.to_string() },
                None => Error::Exists { key: process.task.clone() },
            }),
            None => {
                all.insert(process.clone(), Instant::now());
                Ok(Turn { looking: self.clone(), process: process.clone() })
            }
        }
    }
}

/// While this exists, no other thread works on the files of the process.
struct Turn {
    looking: Arc<Looking>,
    process: ProcessKey,
}

impl Drop for Turn {
    fn drop(&mut self) {
        self.looking.all().remove(&self.process);
    }
}

impl Shim {
    /// Runs work on files of a process in a thread of its own, with a time limit. The work must have no effect that
    /// has to be undone: it may end long after the call has failed.
    ///
    /// # Errors
    /// [`Error::FilesDoNotAnswer`], or another thread works on these files.
    pub(crate) async fn on_files<T: Send + 'static>(
        &self,
        process: &ProcessKey,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T, Error> {
        let turn = self.files.begin(process)?;
        let done = waiting(move || {
            let _turn = turn;
            work()
        });
        // The paused clock of unit tests jumps over any limit while a thread works.
        if cfg!(test) {
            return done.await;
        }
        let late = |_| Error::FilesDoNotAnswer { process: process.clone() };
        tokio::time::timeout(config::FILES_LIMIT, done).await.map_err(late)?
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::id::{Namespace, TaskKey};

    #[test]
    fn one_thread_looks_at_the_files_of_a_process() {
        let task = TaskKey::from_word(Namespace::new("default").unwrap(), "web").unwrap();
        let process = ProcessKey { task, exec: None };
        let looking = Arc::new(Looking::default());
        let turn = looking.begin(&process).unwrap();
        assert!(matches!(looking.begin(&process), Err(Error::Exists { .. })));
        let long_ago = Instant::now().checked_sub(config::FILES_LIMIT).unwrap();
        looking.all().insert(process.clone(), long_ago);
        assert!(matches!(looking.begin(&process), Err(Error::FilesDoNotAnswer { .. })));
        drop(turn);
        assert!(looking.begin(&process).is_ok());
    }
}
