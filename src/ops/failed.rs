//! What a replayed Create or Start gets that has failed before: the same error, and not another attempt. If the daemon were
//! killed repeatedly, the attempts would never end; and the client would get another error than the one that says what is wrong.

use std::path::PathBuf;

use crate::id::ProcessKey;
use crate::services::{Delivery, Error, WaitsFor, waiting_in_any_thread};
use crate::store::failures::{Attempt, Failure};
use crate::suspect;

use super::Shim;

impl Shim {
    /// Notes why a Create or a Start has failed, before the task loses what shows that the operation was begun. `dir` is made anew
    /// for each attempt: the bundle for a Create, the directory of the process for a Start.
    pub(super) async fn note_failure(&self, process: &ProcessKey, dir: PathBuf, error: &Error) {
        if let Error::Stopping = error {
            // The next daemon carries the operation out.
            return;
        }
        self.note_failure_of(process, dir, suspect::request(), error).await;
    }

    /// As [`Self::note_failure`], by another call than the one that fails.
    pub(super) async fn note_failure_of_any_call(&self, process: &ProcessKey, dir: PathBuf, error: &Error) {
        self.note_failure_of(process, dir, None, error).await;
    }

    async fn note_failure_of(&self, process: &ProcessKey, dir: PathBuf, call: Option<u64>, error: &Error) {
        let failure = self.failure(error);
        let noted = match self.attempt(process, dir, call).await {
            Ok(Some(attempt)) => self.failures.note(process, attempt, failure).map_err(Error::from),
            // The attempt ended before it had made the directory.
            Ok(None) => Ok(()),
            Err(error) => Err(error),
        };
        if let Err(error) = noted {
            tracing::warn!(%process, %error, "{process}: if the daemon ends now, the failed operation is begun once more: {error}");
        }
    }

    /// The reply to an operation that has failed, for a note.
    pub(super) fn failure(&self, error: &Error) -> Failure {
        Failure { code: (self.code)(error), text: error.to_string() }
    }

    /// Fails if this is the replay of an operation that has failed. `dir`: as for [`Self::note_failure`].
    pub(super) async fn check_failure(
        &self,
        process: &ProcessKey,
        dir: PathBuf,
        delivery: Delivery,
    ) -> Result<(), Error> {
        if delivery == Delivery::Replayed
            && let Some(Failure { code, text }) = self.noted_failure(process, dir).await
        {
            return Err(Error::Earlier { code, text });
        }
        // An earlier call has failed. This one is about to begin.
        self.failures.forget(process);
        Ok(())
    }

    /// Why this attempt to create or to start a process has failed, if an earlier daemon has noted it. `dir`: as for
    /// [`Self::note_failure`].
    pub(crate) async fn noted_failure(&self, process: &ProcessKey, dir: PathBuf) -> Option<Failure> {
        let attempt = self.attempt(process, dir, suspect::request()).await.unwrap_or_else(|error| {
            tracing::warn!(%process, %error, "{process}: can't find out whether its operation has failed before: {error}");
            None
        });
        self.failures.find(process, attempt?)
    }

    /// The bundle may be on a disk that does not answer. A thread that works on other files of the process may wait for another
    /// disk, so this does not wait for that thread.
    async fn attempt(
        &self,
        process: &ProcessKey,
        dir: PathBuf,
        call: Option<u64>,
    ) -> Result<Option<Attempt>, Error> {
        let look = move || Attempt::of(&dir, call);
        self.files.in_time(process, waiting_in_any_thread(WaitsFor::Disk, &process.task, look)).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::simulation::harness::{Step, World};

    #[test]
    fn a_failure_is_noted_while_the_disk_of_other_files_of_the_process_does_not_answer() {
        let world = World::new("failed-busy");
        world.take(&[Step::Create], Delivery::First).unwrap().unwrap();
        let init = world.init();
        let replayed = world.live(move |shim| async move {
            let _disk = shim.files.occupy(&init);
            let dir = shim.store.process_dir(&init);
            let error = Error::Launch("no such program".to_owned());
            shim.note_failure(&init, dir.clone(), &error).await;
            shim.check_failure(&init, dir, Delivery::Replayed).await
        });
        let error = replayed.unwrap().unwrap_err();
        assert!(matches!(&error, Error::Earlier { text, .. } if text == "no such program"), "{error}");
    }
}
