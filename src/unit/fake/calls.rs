//! The calls of systemd, as the fake answers them.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use tokio::sync::oneshot;

use crate::cgroup::fake as cgroup;
use crate::id::UnitName;
use crate::unit::annotation::{Additions, Types};
use crate::unit::error::Error;
use crate::unit::job::StartJob;
use crate::unit::main_process::MainProcess;
use crate::unit::properties::Properties;
use crate::unit::systemd::{
    Changes, Details, JournalSettings, Obstacles, Queries, References, Slices, Starting, Starts, Stops,
    Usage, is_under_way,
};

use super::{FakeSystemd, Sleeper, Unit, error};

#[async_trait]
impl Starts for FakeSystemd {
    async fn start_transient(&self, unit: &UnitName, _: &Properties) -> Result<(), Error> {
        self.call("start", unit).await?;
        self.begin(unit, false).map(drop)
    }

    async fn begin_transient(&self, unit: &UnitName, _: &Properties) -> Result<StartJob, Error> {
        self.call("start", unit).await?;
        self.begin(unit, false)
    }

    async fn begin_referenced(
        &self,
        unit: &UnitName,
        _: &Properties,
        _: &Additions,
    ) -> Result<StartJob, Error> {
        self.call("start", unit).await?;
        self.begin(unit, true)
    }

    async fn wait_for_start_job(&self, job: StartJob) -> Result<(), Error> {
        let unit = job.waiter.unit().clone();
        // The start of a oneshot service lasts as long as its process.
        while self.with(&unit, |unit| unit.active) == Some("activating") {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        self.wait_for_earlier_start_job(&unit).await
    }

    async fn wait_for_earlier_start_job(&self, unit: &UnitName) -> Result<(), Error> {
        self.call("wait for", unit).await?;
        match self.with(unit, |unit| unit.active) {
            Some("active") => Ok(()),
            state => {
                let result = state.unwrap_or("not loaded").to_owned();
                Err(Error::Job { verb: "start", unit: unit.to_string(), result })
            }
        }
    }
}

#[async_trait]
impl Stops for FakeSystemd {
    async fn stop(&self, unit: &UnitName) -> Result<(), Error> {
        self.call("stop", unit).await?;
        self.programs.stop(unit);
        self.stop_now(unit);
        Ok(())
    }

    async fn stop_accepted(&self, unit: &UnitName, accepted: oneshot::Sender<()>) -> Result<(), Error> {
        self.stop(unit).await?;
        // Not every caller receives this.
        let _ = accepted.send(());
        let slow = self.state().slow_stops.clone();
        if let Some(slow) = slow {
            slow.notified().await;
        }
        Ok(())
    }

    async fn stop_without_waiting(&self, unit: &UnitName) -> Result<(), Error> {
        self.call("stop", unit).await?;
        self.programs.stop(unit);
        self.stop_now(unit);
        Ok(())
    }

    async fn cancel_start_job_of(&self, unit: &UnitName) -> Result<(), Error> {
        self.call("cancel the job of", unit).await
    }

    async fn kill_all(&self, unit: &UnitName, _: i32) -> Result<(), Error> {
        self.call("kill", unit).await?;
        self.with(unit, |unit| unit.child.as_mut().map(Sleeper::kill));
        Ok(())
    }

    async fn reset_failed(&self, unit: &UnitName) -> Result<(), Error> {
        self.call("reset", unit).await?;
        self.with(unit, |unit| {
            if unit.active == "failed" {
                unit.active = "inactive";
            }
        });
        self.state().units.retain(|_, unit| !unit.is_collected());
        Ok(())
    }

    async fn free_name(&self, unit: &UnitName) -> Result<bool, Error> {
        self.call("free the name of", unit).await?;
        Ok(false)
    }
}

#[async_trait]
impl Changes for FakeSystemd {
    async fn freeze(&self, unit: &UnitName) -> Result<(), Error> {
        self.call("freeze", unit).await?;
        self.with(unit, |unit| set_frozen(unit, true));
        Ok(())
    }

    async fn thaw(&self, unit: &UnitName) -> Result<(), Error> {
        self.call("thaw", unit).await?;
        self.with(unit, |unit| set_frozen(unit, false));
        Ok(())
    }

    async fn set_properties(&self, unit: &UnitName, _: &Properties) -> Result<(), Error> {
        self.call("set properties of", unit).await?;
        self.state().limited.push(unit.to_string());
        Ok(())
    }
}

#[async_trait]
impl Queries for FakeSystemd {
    async fn running_units(&self) -> Result<HashSet<UnitName>, Error> {
        let reached = self.effects.reach("list units".to_owned()).await;
        reached.map_err(|failure| error("list", "units", failure))?;
        let state = self.state();
        let living = state.units.iter().filter(|(_, unit)| unit.child.is_some());
        Ok(living.map(|(name, _)| name.clone()).collect())
    }

    async fn active_state(&self, unit: &UnitName) -> Result<Option<String>, Error> {
        self.call("read", unit).await?;
        if self.state().hidden.take_if(|hidden| hidden == unit).is_some() {
            return Ok(None);
        }
        Ok(self.with(unit, |unit| unit.active.to_owned()))
    }

    async fn is_taken(&self, unit: &UnitName) -> Result<bool, Error> {
        if self.with(unit, |_| ()).is_none() {
            return Ok(false);
        }
        Ok(self.active_state(unit).await?.is_some_and(|state| is_under_way(&state)))
    }

    async fn has_command(&self, unit: &UnitName, _: &[String]) -> Result<bool, Error> {
        self.call("read", unit).await?;
        Ok(self.with(unit, |unit| !unit.is_foreign) == Some(true))
    }

    async fn starting(&self, unit: &UnitName) -> Result<Starting, Error> {
        self.call("read", unit).await?;
        Ok(match self.with(unit, |unit| unit.active) {
            None => Starting::NotBegun,
            Some("activating") => Starting::UnderWay,
            Some(_) => Starting::Over,
        })
    }

    async fn has_timed_out(&self, _: &UnitName) -> bool {
        false
    }

    async fn main_process(&self, unit: &UnitName) -> Result<Option<MainProcess>, Error> {
        self.call("read", unit).await?;
        Ok(self.with(unit, |unit| unit.main))
    }

    async fn ended_process(&self, unit: &UnitName) -> Result<Option<MainProcess>, Error> {
        self.main_process(unit).await
    }

    async fn unhandled_ends(&self, unit: &UnitName) -> Vec<MainProcess> {
        self.state().observations.unhandled_ends(unit)
    }
}

#[async_trait]
impl Details for FakeSystemd {
    async fn usage(&self, unit: &UnitName) -> Result<Usage, Error> {
        self.call("read", unit).await?;
        Ok(Usage::default())
    }

    async fn oom_kills(&self, unit: &UnitName) -> Result<u64, Error> {
        self.call("read", unit).await?;
        let (kills, time) = {
            let state = self.state();
            (state.oom_kills, state.oom_kills_take)
        };
        if !time.is_zero() {
            tokio::time::sleep(time).await;
        }
        match kills {
            Some(kills) => Ok(kills),
            None => std::future::pending().await,
        }
    }

    async fn stop_limit(&self, unit: &UnitName) -> Result<u64, Error> {
        self.call("read", unit).await?;
        Ok(10_000_000)
    }

    async fn journal_settings(&self, _: &UnitName, _: bool) -> Result<JournalSettings, Error> {
        Ok(JournalSettings::default())
    }

    async fn property_types(&self) -> Result<Arc<Types>, Error> {
        Ok(Arc::new(Types(Default::default())))
    }
}

#[async_trait]
impl Obstacles for FakeSystemd {
    async fn obstacle(&self, _: &UnitName) -> Option<String> {
        None
    }

    async fn restrictions(&self, _: &UnitName) -> Option<String> {
        None
    }
}

#[async_trait]
impl Slices for FakeSystemd {
    async fn active_slices(&self) -> Result<Vec<UnitName>, Error> {
        let reached = self.effects.reach("list slices".to_owned()).await;
        reached.map_err(|failure| error("list", "slices", failure))?;
        Ok(self.state().slices.iter().cloned().collect())
    }

    async fn stop_alone_if(
        &self,
        slice: &UnitName,
        is_free: &(dyn Fn() -> bool + Send + Sync),
    ) -> Result<(), Error> {
        if is_free() {
            self.call("stop", slice).await?;
            let mut state = self.state();
            state.slices.remove(slice);
            state.stopped_slices.push(slice.to_string());
        }
        Ok(())
    }

    async fn keep_order(&self) -> Result<(), Error> {
        self.state().orders += 1;
        Ok(())
    }
}

#[async_trait]
impl References for FakeSystemd {
    async fn reference(&self, unit: &UnitName) -> Result<(), Error> {
        if self.state().answers_no_references {
            return Err(Error::no_answer());
        }
        self.with(unit, |unit| unit.is_referenced = true);
        Ok(())
    }

    async fn release(&self, unit: &UnitName) {
        let _ = self.call("release", unit).await;
        self.with(unit, |unit| unit.is_referenced = false);
        self.state().units.retain(|_, unit| !unit.is_collected());
    }

    async fn make_room_for_references(&self, _: usize) {
        // There is always room.
    }

    async fn forget_earlier_references(&self) {
        self.state().forgotten += 1;
    }
}

fn set_frozen(unit: &Unit, frozen: bool) {
    if let Some(place) = &unit.cgroup {
        cgroup::set_frozen(place, frozen);
    }
}
