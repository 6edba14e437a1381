//! Work on files that a client has named: they may be on a disk that does not answer.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::id::ProcessKey;

use super::{Error, WaitsFor, waiting};

/// Runs work on files that clients have named. Each process has at most one thread for such work: the thread exists as long as
/// the disk does not answer.
#[derive(Clone, Debug)]
pub struct ClientFiles {
    /// The processes that have a thread now, and since when.
    begun: Arc<Mutex<HashMap<ProcessKey, Instant>>>,
    /// How long a call waits for the disk.
    limit: Duration,
}

impl ClientFiles {
    /// `limit` is how long a call waits for the disk.
    pub fn new(limit: Duration) -> Self {
        Self { begun: Arc::default(), limit }
    }

    fn all(&self) -> MutexGuard<'_, HashMap<ProcessKey, Instant>> {
        self.begun.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// # Errors
    /// Another thread works on the files of this process.
    fn begin(&self, process: &ProcessKey) -> Result<Turn, Error> {
        let mut all = self.all();
        match all.get(process) {
            Some(since) if since.elapsed() >= self.limit => {
                Err(Error::FilesDoNotAnswer { process: process.clone() })
            }
            Some(_) => Err(match process.exec.clone() {
                Some(exec) => Error::ExecExists { exec: exec.to_string() },
                None => Error::Exists { key: process.task.clone() },
            }),
            None => {
                all.insert(process.clone(), Instant::now());
                Ok(Turn { files: self.clone(), process: process.clone() })
            }
        }
    }

    /// Runs work on files of a process in a thread of its own, with a time limit. The work must have no effect that
    /// has to be undone: it may end long after the call has failed.
    ///
    /// # Errors
    /// [`Error::FilesDoNotAnswer`], or another thread works on these files, or too many threads wait for such a disk.
    pub(crate) async fn run<T: Send + 'static>(
        &self,
        waits_for: WaitsFor,
        process: &ProcessKey,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T, Error> {
        let turn = self.begin(process)?;
        let done = waiting(waits_for, &process.task, move || {
            let _turn = turn;
            work()
        });
        self.in_time(process, done).await
    }

    /// Waits for a thread that works on files of a process, with a time limit.
    ///
    /// # Errors
    /// [`Error::FilesDoNotAnswer`]
    pub(crate) async fn in_time<T>(
        &self,
        process: &ProcessKey,
        done: impl Future<Output = Result<T, Error>>,
    ) -> Result<T, Error> {
        let late = |_| Error::FilesDoNotAnswer { process: process.clone() };
        tokio::time::timeout(self.limit, done).await.map_err(late)?
    }
}

/// While this exists, no other thread works on the files of the process.
struct Turn {
    files: ClientFiles,
    process: ProcessKey,
}

impl Drop for Turn {
    fn drop(&mut self) {
        self.files.all().remove(&self.process);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config;
    use crate::id::{Namespace, TaskKey};

    #[test]
    fn one_thread_looks_at_the_files_of_a_process() {
        let process = TaskKey::from_word(Namespace::new("default").unwrap(), "web").unwrap().init();
        let files = ClientFiles::new(config::FILES_LIMIT);
        let turn = files.begin(&process).unwrap();
        assert!(matches!(files.begin(&process), Err(Error::Exists { .. })));
        let long_ago = Instant::now().checked_sub(config::FILES_LIMIT).unwrap();
        files.all().insert(process.clone(), long_ago);
        assert!(matches!(files.begin(&process), Err(Error::FilesDoNotAnswer { .. })));
        drop(turn);
        assert!(files.begin(&process).is_ok());
    }
}
