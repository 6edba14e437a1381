//! The resources that a unit has used, even after its cgroup was removed, and the settings that only systemd knows.

use std::collections::HashMap;
use std::sync::Arc;

use async_trait::async_trait;

use crate::id::UnitName;
use crate::unit::annotation::Types;
use crate::unit::bus::{SERVICE_INTERFACE, UNIT_INTERFACE};
use crate::unit::error::Error;
use crate::unit::search_path::Directories;
use crate::unit::systemd::{Details, JournalSettings, Usage};
use crate::unit::{name, policy};

use super::start::of_files;
use super::{Manager, oom};

#[async_trait]
impl Details for Manager {
    async fn usage(&self, unit: &UnitName) -> Result<Usage, Error> {
        let number = async |name| {
            let number = self.property::<u64>(unit, SERVICE_INTERFACE, name).await?;
            // systemd reports the maximum for a resource that it does not account.
            Ok::<u64, Error>(number.filter(|number| *number != u64::MAX).unwrap_or_default())
        };
        Ok(Usage { cpu_usec: number("CPUUsageNSec").await? / 1000, memory_peak: number("MemoryPeak").await? })
    }

    async fn oom_kills(&self, unit: &UnitName) -> Result<u64, Error> {
        if let Some(kills) = self.property::<u64>(unit, SERVICE_INTERFACE, "OOMKills").await? {
            return Ok(kills);
        }
        let invocation = self.property::<Vec<u8>>(unit, UNIT_INTERFACE, "InvocationID").await?;
        oom::kills_in_journal(&invocation.unwrap_or_default()).await
    }

    async fn stop_limit(&self, unit: &UnitName) -> Result<u64, Error> {
        Ok(self.property(unit, SERVICE_INTERFACE, "TimeoutStopUSec").await?.unwrap_or_default())
    }

    async fn journal_settings(&self, unit: &UnitName, is_given: bool) -> Result<JournalSettings, Error> {
        let look = |unit: &str| policy::sets_journal(&Directories::open_all(), unit).then_some(());
        if !is_given && of_files(unit, look).await.is_none() {
            return Ok(JournalSettings::default());
        }
        let interval = self.property(unit, SERVICE_INTERFACE, "LogRateLimitIntervalUSec").await?;
        let burst = self.property(unit, SERVICE_INTERFACE, "LogRateLimitBurst").await?;
        let fields = self.property(unit, SERVICE_INTERFACE, "LogExtraFields").await?;
        Ok(JournalSettings {
            interval_usec: interval.unwrap_or_default(),
            burst: burst.unwrap_or_default(),
            fields: fields.unwrap_or_default(),
        })
    }

    async fn property_types(&self) -> Result<Arc<Types>, Error> {
        let types = self.types.get_or_try_init(async || {
            // The daemon's own unit is always loaded.
            let unit = name::daemon_service();
            let mut types = HashMap::new();
            for interface in [UNIT_INTERFACE, SERVICE_INTERFACE] {
                let all = self.get_all(&unit, interface).await?;
                let all = all.into_iter();
                types.extend(all.map(|(name, value)| (name, value.value_signature().to_string())));
            }
            Ok(Arc::new(Types(types)))
        });
        types.await.cloned()
    }
}
