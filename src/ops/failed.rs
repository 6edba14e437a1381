//! What a replayed Create or Start gets that has failed before: the same error, and not another attempt. If the daemon were
//! killed repeatedly, the attempts would never end; and the client would get another error than the one that says what is wrong.

use std::path::PathBuf;

use crate::id::ProcessKey;
use crate::services::{Delivery, Error, WaitsFor};
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
        let Some(attempt) = self.attempt(process, dir).await else {
            return;
        };
        let failure = self.failure(error);
        if let Err(error) = self.failures.note(process, attempt, failure) {
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
        let attempt = self.attempt(process, dir).await?;
        self.failures.find(process, attempt)
    }

    async fn attempt(&self, process: &ProcessKey, dir: PathBuf) -> Option<Attempt> {
        // The bundle may be on a disk that does not answer.
        let call = suspect::request();
        self.files.run(WaitsFor::Bundle, process, move || Attempt::of(&dir, call)).await.ok().flatten()
    }
}
