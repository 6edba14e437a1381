//! Work on files whose disk may not answer: files that a client has named, and files of OCI runtimes.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::id::ProcessKey;

use super::{Error, WaitsFor, waiting};

/// Runs work on files whose disk may not answer. Each process has at most one thread for such work: the thread exists as long as
/// the disk does not answer.
#[derive(Clone, Debug)]
pub struct SlowFiles {
    /// The processes that have a thread now, and since when.
    begun: Arc<Mutex<HashMap<ProcessKey, Instant>>>,
    /// How long a call waits for the disk.
    limit: Duration,
}

impl SlowFiles {
    /// `limit` is how long a call waits for the disk.
    pub fn new(limit: Duration) -> Self {
        Self { begun: Arc::default(), limit }
    }

    fn all(&self) -> MutexGuard<'_, HashMap<ProcessKey, Instant>> {
        lock(&self.begun)
    }

    /// As if a thread worked on files of this process until the result is dropped.
    #[cfg(test)]
    pub(crate) fn occupy(&self, process: &ProcessKey) -> impl Drop + use<> {
        self.begin(process).unwrap()
    }

    /// # Errors
    /// Another thread works on the files of this process: [`Error::FilesBusy`], or [`Error::FilesDoNotAnswer`] if it has for longer
    /// than the limit.
    fn begin(&self, process: &ProcessKey) -> Result<Turn, Error> {
        let mut all = self.all();
        match all.get(process) {
            Some(since) if since.elapsed() >= self.limit => {
                Err(Error::FilesDoNotAnswer { process: process.clone() })
            }
            Some(_) => Err(Error::FilesBusy { process: process.clone() }),
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
    /// [`Error::FilesDoNotAnswer`], [`Error::FilesBusy`], or too many threads wait for such a disk.
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

    /// As [`Self::run`], for work whose effect has to be undone if the call fails. If the work ends after the call has failed, its
    /// thread calls `undo` with the result. Until then, all other work on files of this process is refused.
    ///
    /// # Errors
    /// As [`Self::run`].
    pub(crate) async fn run_or_undo<T: Send + 'static>(
        &self,
        waits_for: WaitsFor,
        process: &ProcessKey,
        work: impl FnOnce() -> T + Send + 'static,
        undo: impl FnOnce(T) + Send + 'static,
    ) -> Result<T, Error> {
        let awaited = Awaited::default();
        let outcome = awaited.outcome.clone();
        let done = self.run(waits_for, process, move || {
            let result = work();
            if let Some(unclaimed) = lock(&outcome).end(result) {
                undo(unclaimed);
            }
        });
        let ran = done.await;
        match (awaited.give_up(), ran) {
            // The work may end at the same moment as the wait for it.
            (Some(result), _) => Ok(result),
            (None, Err(error)) => Err(error),
            (None, Ok(())) => Err(Error::Stopping),
        }
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

/// The result of work that a call may no longer wait for.
enum Outcome<T> {
    /// The call waits.
    Awaited,
    /// The work has ended, and the call has not taken the result yet.
    Done(T),
    /// The call does not wait any more.
    GivenUp,
}

impl<T> Outcome<T> {
    /// The work has ended. Returns the result if nobody waits for it.
    fn end(&mut self, result: T) -> Option<T> {
        match self {
            Self::GivenUp => Some(result),
            Self::Awaited | Self::Done(_) => {
                *self = Self::Done(result);
                None
            }
        }
    }
}

/// A call that waits for an [`Outcome`]. If the call is dropped, it does not wait any more.
struct Awaited<T> {
    outcome: Arc<Mutex<Outcome<T>>>,
}

impl<T> Default for Awaited<T> {
    fn default() -> Self {
        Self { outcome: Arc::new(Mutex::new(Outcome::Awaited)) }
    }
}

impl<T> Awaited<T> {
    /// Ends the wait. Returns the result if the work has ended.
    fn give_up(&self) -> Option<T> {
        match std::mem::replace(&mut *lock(&self.outcome), Outcome::GivenUp) {
            Outcome::Done(result) => Some(result),
            Outcome::Awaited | Outcome::GivenUp => None,
        }
    }
}

impl<T> Drop for Awaited<T> {
    fn drop(&mut self) {
        drop(self.give_up());
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// While this exists, no other thread works on the files of the process.
struct Turn {
    files: SlowFiles,
    process: ProcessKey,
}

impl Drop for Turn {
    fn drop(&mut self) {
        self.files.all().remove(&self.process);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;
    use crate::config;
    use crate::id::{Namespace, TaskKey};

    #[test]
    fn one_thread_looks_at_the_files_of_a_process() {
        let process = TaskKey::from_word(Namespace::new("default").unwrap(), "web").unwrap().init();
        let files = SlowFiles::new(config::FILES_LIMIT);
        let turn = files.begin(&process).unwrap();
        assert!(matches!(files.begin(&process), Err(Error::FilesBusy { .. })));
        let long_ago = Instant::now().checked_sub(config::FILES_LIMIT).unwrap();
        files.all().insert(process.clone(), long_ago);
        assert!(matches!(files.begin(&process), Err(Error::FilesDoNotAnswer { .. })));
        drop(turn);
        assert!(files.begin(&process).is_ok());
    }

    #[tokio::test]
    async fn work_that_ends_after_its_call_has_failed_is_undone() {
        let process = TaskKey::from_word(Namespace::new("default").unwrap(), "web").unwrap().init();
        let files = SlowFiles::new(Duration::from_millis(20));
        let (answer, disk) = mpsc::channel();
        let (undone, undoes) = mpsc::channel();
        let work = move || disk.recv().unwrap();
        let undo = move |result: u8| undone.send(result).unwrap();
        let late = files.run_or_undo(WaitsFor::Disk, &process, work, undo).await;
        assert!(matches!(late, Err(Error::FilesDoNotAnswer { .. })), "{late:?}");
        answer.send(7).unwrap();
        assert_eq!(undoes.recv(), Ok(7));

        let in_time = SlowFiles::new(config::FILES_LIMIT);
        let done = in_time.run_or_undo(WaitsFor::Disk, &process, || 8, |_| unreachable!()).await;
        assert_eq!(done.ok(), Some(8));
    }
}
