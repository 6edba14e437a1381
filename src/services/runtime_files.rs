//! Work on the files of OCI runtimes: their state of the containers (option `Root`), and their programs. They may be on a disk
//! that does not answer.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::time::Duration;

use crate::id::TaskKey;
use crate::oci::state::State;
use crate::task::Task;

use super::files::SlowFiles;
use super::{Error, WaitsFor, blocking};

/// Runs work on the files of OCI runtimes. Each task has at most one thread for the state of its container, and one for the program
/// of its process. They are other threads than those for the files of its client: a bundle on a dead disk delays no work on the
/// state.
#[derive(Clone, Debug)]
pub struct RuntimeFiles {
    states: SlowFiles,
    programs: SlowFiles,
}

impl RuntimeFiles {
    /// `limit` is how long a call waits for the disk.
    pub fn new(limit: Duration) -> Self {
        Self { states: SlowFiles::new(limit), programs: SlowFiles::new(limit) }
    }

    /// As if a thread waited for the disks of a task's OCI runtime until the result is dropped.
    #[cfg(test)]
    pub(crate) fn occupy(&self, task: &TaskKey) -> impl Sized + use<> {
        (self.states.occupy(&task.init()), self.programs.occupy(&task.init()))
    }

    /// Works on the state that the OCI runtime has of a task. As the work may end long after the call has failed, it must have no
    /// effect that has to be undone.
    ///
    /// # Errors
    /// [`Error::FilesDoNotAnswer`], or too many threads wait for such a disk.
    pub(crate) async fn state<T: Send + 'static>(
        &self,
        task: &Task,
        work: impl FnOnce(&State) -> T + Clone + Send + 'static,
    ) -> Result<T, Error> {
        let state = State::of(&task.runtime, &task.key.id);
        run(&self.states, &task.key, move || work(&state)).await
    }

    /// The program file that a process of a task runs: device and inode. `None` if there is no such process.
    ///
    /// # Errors
    /// As [`Self::state`].
    pub(crate) async fn program_of(&self, task: &TaskKey, pid: u32) -> Result<Option<(u64, u64)>, Error> {
        let program = move || {
            let file = fs::metadata(format!("/proc/{pid}/exe")).ok()?;
            Some((file.dev(), file.ino()))
        };
        run(&self.programs, task, program).await
    }
}

async fn run<T: Send + 'static>(
    files: &SlowFiles,
    task: &TaskKey,
    work: impl FnOnce() -> T + Clone + Send + 'static,
) -> Result<T, Error> {
    let process = task.init();
    match files.run(WaitsFor::Disk, &process, work.clone()).await {
        // Delete works also then.
        Err(Error::NoThread(_)) => files.in_time(&process, blocking(work)).await,
        // The thread of a call that was cancelled waits for the same disk.
        Err(Error::FilesBusy { .. }) => Err(Error::FilesDoNotAnswer { process }),
        done => done,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::id::Namespace;

    #[tokio::test]
    async fn files_that_do_not_answer_are_an_error_and_do_not_delay_others() {
        let [dead, other] =
            ["dead", "other"].map(|id| TaskKey::from_word(Namespace::new("default").unwrap(), id).unwrap());
        let files = RuntimeFiles::new(Duration::from_millis(20));
        let (answer, disk) = std::sync::mpsc::channel::<()>();
        let disk = std::sync::Arc::new(std::sync::Mutex::new(disk));
        let hangs = move || disk.lock().unwrap().recv();
        let late = run(&files.states, &dead, hangs).await;
        assert!(matches!(late, Err(Error::FilesDoNotAnswer { .. })), "{late:?}");
        for again in [run(&files.states, &dead, || 7).await, run(&files.states, &dead, || 7).await] {
            assert!(matches!(again, Err(Error::FilesDoNotAnswer { .. })), "{again:?}");
        }
        assert_eq!(run(&files.states, &other, || 7).await.unwrap(), 7);
        assert!(files.program_of(&dead, std::process::id()).await.unwrap().is_some());
        drop(answer);
        while run(&files.states, &dead, || 7).await.is_err() {
            tokio::task::yield_now().await;
        }
    }
}
