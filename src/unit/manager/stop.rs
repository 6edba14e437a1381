//! Stopping units, and what has to be done before a name can be used again.

use std::io;
use std::path::Path;

use async_trait::async_trait;
use tokio::sync::oneshot;

use crate::id::UnitName;
use crate::unit::error::{Error, call_error};
use crate::unit::search_path::TRANSIENT;
use crate::unit::systemd::{Changes, Stops, is_under_way};

use super::{Manager, STOP};

const NO_SUCH_JOB: &str = "org.freedesktop.systemd1.NoSuchJob";
/// The result of a job that can't stop a frozen unit (256).
const FROZEN: &str = "frozen";

/// A unit that is not loaded needs nothing to be done.
fn unless_unloaded(done: Result<(), Error>) -> Result<(), Error> {
    match done {
        Err(Error::NotLoaded { .. }) => Ok(()),
        done => done,
    }
}

#[async_trait]
impl Stops for Manager {
    async fn stop(&self, unit: &UnitName) -> Result<(), Error> {
        self.stop_accepted(unit, oneshot::channel().0).await
    }

    async fn stop_accepted(&self, unit: &UnitName, accepted: oneshot::Sender<()>) -> Result<(), Error> {
        match self.stop_as(unit, "replace", Some(accepted)).await {
            // systemd 256 and later do not stop a frozen unit: the job ends with this result.
            Err(Error::Job { result, .. }) if result == FROZEN => {
                self.thaw(unit).await?;
                self.stop_as(unit, "replace", None).await
            }
            stopped => stopped,
        }
    }

    async fn stop_without_waiting(&self, unit: &UnitName) -> Result<(), Error> {
        let job =
            self.bus.call(|manager| async move { manager.stop_unit(unit.as_str(), "replace").await }).await;
        unless_unloaded(job.map(drop).map_err(|error| call_error(STOP, unit, error)))
    }

    async fn cancel_start_job_of(&self, unit: &UnitName) -> Result<(), Error> {
        let Some((id, path)) = self.unit_state(unit).await?.and_then(|state| state.job) else {
            return Ok(());
        };
        if self.job_type_at(unit, &path).await?.is_some_and(|kind| kind != "start") {
            return Ok(());
        }
        match self.bus.call(|manager| async move { manager.cancel_job(id).await }).await {
            Err(zbus::Error::MethodError(name, ..)) if name.as_str() == NO_SUCH_JOB => Ok(()),
            cancelled => cancelled.map_err(|error| call_error("cancel the job of", unit, error)),
        }
    }

    async fn kill_all(&self, unit: &UnitName, signal: i32) -> Result<(), Error> {
        // The call is not repeated, because systemd may have sent the signal already.
        let killed = async { self.bus.manager().await?.kill_unit(unit.as_str(), "all", signal).await };
        unless_unloaded(killed.await.map_err(|error| call_error("kill", unit, error)))
    }

    async fn reset_failed(&self, unit: &UnitName) -> Result<(), Error> {
        let reset =
            self.bus.call(|manager| async move { manager.reset_failed_unit(unit.as_str()).await }).await;
        unless_unloaded(reset.map_err(|error| call_error("reset", unit, error)))
    }

    async fn free_name(&self, unit: &UnitName) -> Result<bool, Error> {
        let state = self.unit_state(unit).await?;
        if state.is_some_and(|state| is_under_way(&state.active)) {
            return Ok(false);
        }
        // StartTransientUnit takes no name that has a file (unit.c, `unit_is_pristine`, 252 to 262). After a reload without the
        // file, systemd knows the name only.
        let file = Path::new(TRANSIENT).join(unit.as_str());
        if let Err(error) = tokio::fs::remove_file(&file).await {
            if error.kind() != io::ErrorKind::NotFound {
                tracing::warn!(%unit, %error, "can't remove {}: {error}", file.display());
            }
            return Ok(false);
        }
        self.reload().await.map_err(|error| call_error("free the name of", unit, error))?;
        Ok(true)
    }
}

impl Manager {
    /// Stops a unit with a job of this mode, and waits until the unit is stopped.
    pub(super) async fn stop_as(
        &self,
        unit: &UnitName,
        mode: &str,
        accepted: Option<oneshot::Sender<()>>,
    ) -> Result<(), Error> {
        let waiter = self.jobs.wait_for(unit);
        let job = self.bus.call(|manager| async move { manager.stop_unit(unit.as_str(), mode).await }).await;
        match job.map_err(|error| call_error(STOP, unit, error)) {
            Ok(job) => {
                // Not every caller receives this.
                let _ = accepted.map(|accepted| accepted.send(()));
                self.wait_for_job(STOP, waiter, Some(job)).await
            }
            Err(error) => unless_unloaded(Err(error)),
        }
    }

    /// Makes systemd forget a unit that is lost ([`Self::lost_state`]).
    ///
    /// # Errors
    /// A refusal, or [`Error::Job`].
    pub async fn forget_lost(&self, unit: &UnitName) -> Result<(), Error> {
        // A transient unit of that name that systemd refused has left a file, and systemd refuses to stop the unit.
        self.free_name(unit).await?;
        self.stop(unit).await?;
        self.reset_failed(unit).await
    }
}
