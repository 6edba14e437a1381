//! Work on files that a client has named: they may be on a disk that does not answer.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::id::ProcessKey;

use super::{Error, Shim, waiting};

/// The processes whose files a thread checks or opens now, and since when. Each process has one such thread at most: the
/// thread lasts for as long as the disk does not answer.
#[derive(Debug)]
pub(crate) struct Looking {
    begun: Mutex<HashMap<ProcessKey, Instant>>,
    limit: Option<Duration>,
}

impl Looking {
    /// `limit` is how long a call waits for the disk. Where the clock is simulated, there is none: such a clock jumps over
    /// any limit while a thread works.
    pub(crate) fn new(limit: Option<Duration>) -> Self {
        Self { begun: Mutex::default(), limit }
    }

    fn all(&self) -> MutexGuard<'_, HashMap<ProcessKey, Instant>> {
        self.begun.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// # Errors
    /// Another thread works on the files of this process.
    fn begin(self: &Arc<Self>, process: &ProcessKey) -> Result<Turn, Error> {
        let mut all = self.all();
        match all.get(process) {
            Some(since) if self.limit.is_some_and(|limit| since.elapsed() >= limit) => {
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
        let Some(limit) = self.files.limit else {
            return done.await;
        };
        let late = |_| Error::FilesDoNotAnswer { process: process.clone() };
        tokio::time::timeout(limit, done).await.map_err(late)?
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config;
    use crate::id::{Namespace, TaskKey};

    #[test]
    fn one_thread_looks_at_the_files_of_a_process() {
        let task = TaskKey::from_word(Namespace::new("default").unwrap(), "web").unwrap();
        let process = ProcessKey { task, exec: None };
        let looking = Arc::new(Looking::new(Some(config::FILES_LIMIT)));
        let turn = looking.begin(&process).unwrap();
        assert!(matches!(looking.begin(&process), Err(Error::Exists { .. })));
        let long_ago = Instant::now().checked_sub(config::FILES_LIMIT).unwrap();
        looking.all().insert(process.clone(), long_ago);
        assert!(matches!(looking.begin(&process), Err(Error::FilesDoNotAnswer { .. })));
        drop(turn);
        assert!(looking.begin(&process).is_ok());
    }
}
