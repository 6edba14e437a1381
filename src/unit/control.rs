//! Calls that change a unit which is there.

use std::io;
use std::path::Path;

use crate::id::UnitName;

use super::error::{Error, call_error};
use super::properties::Properties;
use super::proxy::{Manager, STOP, persist};

/// Where systemd writes the files of transient units.
const TRANSIENT_DIR: &str = "/run/systemd/transient";

const NO_SUCH_JOB: &str = "org.freedesktop.systemd1.NoSuchJob";
/// A job's result (256).
const FROZEN: &str = "frozen";

impl Manager {
    /// Stops a unit and waits until it is down. A unit that is not loaded is down.
    ///
    /// # Errors
    /// A refusal, or [`Error::Job`].
    pub async fn stop(&self, unit: &UnitName) -> Result<(), Error> {
        match self.try_to_stop(unit).await {
            // From systemd 256 on a frozen unit is not stopped, and the job says so.
            Err(Error::Job { result, .. }) if result == FROZEN => {
                self.thaw(unit).await?;
                self.try_to_stop(unit).await
            }
            stopped => stopped,
        }
    }

    async fn try_to_stop(&self, unit: &UnitName) -> Result<(), Error> {
        let waiter = self.jobs.wait_for(unit);
        let job = persist!(self, proxy, proxy.stop_unit(unit.as_str(), "replace"));
        match job.map_err(|error| call_error(STOP, unit, error)) {
            Ok(job) => self.ended(STOP, waiter, Some(job)).await,
            Err(Error::NotLoaded { .. }) => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// Freezes all processes of a unit; resolves when they are.
    ///
    /// # Errors
    /// A refusal: the unit is not active, or has a job.
    pub async fn freeze(&self, unit: &UnitName) -> Result<(), Error> {
        let frozen = persist!(self, proxy, proxy.freeze_unit(unit.as_str()));
        frozen.map_err(|error| call_error("freeze", unit, error))
    }

    /// Lets the processes of a unit go on. One that is not frozen, or not loaded, is fine.
    ///
    /// # Errors
    /// A refusal: its slice is frozen (257).
    pub async fn thaw(&self, unit: &UnitName) -> Result<(), Error> {
        let thawed = persist!(self, proxy, proxy.thaw_unit(unit.as_str()));
        match thawed.map_err(|error| call_error("thaw", unit, error)) {
            Err(Error::NotLoaded { .. }) => Ok(()),
            thawed => thawed,
        }
    }

    /// Sets properties of a unit that runs; resolves when its cgroup shows them. The unit's file of a
    /// transient unit goes with it, and so do they.
    ///
    /// A frozen unit's cgroup stays as it is until it is thawed (256, 257).
    ///
    /// # Errors
    /// A refusal, which names the property.
    pub async fn set_properties(&self, unit: &UnitName, properties: &Properties) -> Result<(), Error> {
        let set = persist!(self, proxy, proxy.set_unit_properties(unit.as_str(), true, &properties.0));
        set.map_err(|error| call_error("set properties of", unit, error))?;
        // The cgroup is written after the reply, and before systemd takes the next call (manager_loop, 252 to
        // 262).
        self.systemd().await.map(drop)
    }

    /// Asks for a unit to be stopped, and does not wait for it.
    ///
    /// # Errors
    /// A refusal.
    pub async fn stop_without_waiting(&self, unit: &UnitName) -> Result<(), Error> {
        match persist!(self, proxy, proxy.stop_unit(unit.as_str(), "replace")) {
            Ok(_) => Ok(()),
            Err(error) => match call_error("stop", unit, error) {
                Error::NotLoaded { .. } => Ok(()),
                error => Err(error),
            },
        }
    }

    /// Stops a slice and nothing else, if `is_free` still says so when no unit is being started: systemd removes
    /// the cgroups below a slice that it stops, also that of a container which is being created.
    ///
    /// # Errors
    /// A refusal, or [`Error::Job`].
    pub async fn stop_alone_if(&self, slice: &UnitName, is_free: impl FnOnce() -> bool) -> Result<(), Error> {
        let _alone = self.slices.write().await;
        if !is_free() {
            return Ok(());
        }
        let waiter = self.jobs.wait_for(slice);
        let job = persist!(self, proxy, proxy.stop_unit(slice.as_str(), "ignore-dependencies"));
        match job.map_err(|error| call_error(STOP, slice, error)) {
            Ok(job) => self.ended(STOP, waiter, Some(job)).await,
            Err(Error::NotLoaded { .. }) => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// Makes systemd forget the job that a unit has, if it has one. The unit stays as it is.
    ///
    /// # Errors
    /// A refusal.
    pub async fn forget_job(&self, unit: &UnitName) -> Result<(), Error> {
        let Some((id, _)) = self.unit_state(unit).await?.and_then(|state| state.job) else {
            return Ok(());
        };
        match persist!(self, proxy, proxy.cancel_job(id)) {
            Err(zbus::Error::MethodError(name, ..)) if name.as_str() == NO_SUCH_JOB => Ok(()),
            cancelled => cancelled.map_err(|error| call_error("cancel the job of", unit, error)),
        }
    }

    /// Forgets that a unit has failed. A unit that is not loaded needs no such thing.
    ///
    /// # Errors
    /// A refusal.
    pub async fn reset_failed(&self, unit: &UnitName) -> Result<(), Error> {
        match persist!(self, proxy, proxy.reset_failed_unit(unit.as_str())) {
            Ok(()) => Ok(()),
            Err(error) => match call_error("reset", unit, error) {
                Error::NotLoaded { .. } => Ok(()),
                error => Err(error),
            },
        }
    }

    /// Frees the name of a transient unit that has ended and that systemd can't unload, because another unit
    /// names it (`After=`, `Wants=`): removes the unit's file and reloads systemd, which then knows the name
    /// only. StartTransientUnit takes no name that has a file (unit.c, `unit_is_pristine`, 252 to 262).
    ///
    /// Returns false for a unit that runs or that has a file elsewhere: it belongs to somebody else.
    ///
    /// # Errors
    /// A refusal.
    pub async fn free_name(&self, unit: &UnitName) -> Result<bool, Error> {
        let state = self.unit_state(unit).await?;
        if state.is_some_and(|state| !matches!(state.active.as_str(), "inactive" | "failed")) {
            return Ok(false);
        }
        let file = Path::new(TRANSIENT_DIR).join(unit.as_str());
        if let Err(error) = tokio::fs::remove_file(&file).await {
            if error.kind() != io::ErrorKind::NotFound {
                tracing::warn!(%unit, %error, "can't remove {}: {error}", file.display());
            }
            return Ok(false);
        }
        let reloaded = persist!(self, proxy, proxy.reload());
        reloaded.map_err(|error| call_error("free the name of", unit, error))?;
        Ok(true)
    }

    /// Sends a signal to every process of a unit. A unit that is not loaded has none.
    ///
    /// # Errors
    /// A refusal.
    pub async fn kill_all(&self, unit: &UnitName, signal: i32) -> Result<(), Error> {
        match self.proxy().await?.kill_unit(unit.as_str(), "all", signal).await {
            Ok(()) => Ok(()),
            Err(error) => match call_error("kill", unit, error) {
                Error::NotLoaded { .. } => Ok(()),
                error => Err(error),
            },
        }
    }
}
