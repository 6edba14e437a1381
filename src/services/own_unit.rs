//! Whether a unit is that of a process of ours: somebody else may have a unit of that name.

use std::path::PathBuf;

use crate::id::{ProcessKey, UnitName};
use crate::launch::contract::{self, LAUNCHED, UnitKind};
use crate::task::lifecycle::Lifecycle;
use crate::task::process::Process;
use crate::unit;
use crate::unit::systemd::Systemd;

/// A name of a unit for which the daemon asks, or has asked: that of a process, or that of the logger of a process.
///
/// If systemd refuses the request, or has not received it yet, another unit may have the name.
#[derive(Debug)]
pub struct OwnUnit {
    name: UnitName,
    kind: UnitKind,
    process: ProcessKey,
    evidence: Evidence,
}

/// What shows that systemd has accepted the request for the unit.
#[derive(Debug)]
enum Evidence {
    /// The process has run.
    Process,
    /// The file that `launch` makes in the unit, if it exists.
    Launched(PathBuf),
    /// Only the unit itself.
    None,
}

impl OwnUnit {
    /// The unit of a process whose files are in `dir`. `has_run`: the record has a pid of the process.
    pub fn of(process: ProcessKey, name: UnitName, dir: PathBuf, has_run: bool) -> Self {
        let kind = if process.exec.is_some() { UnitKind::Exec } else { UnitKind::Container };
        let evidence = if has_run { Evidence::Process } else { Evidence::Launched(dir.join(LAUNCHED)) };
        Self { name, kind, process, evidence }
    }

    /// The unit of a process in a record.
    pub fn recorded(key: ProcessKey, process: &Process<impl Lifecycle + ?Sized>, dir: PathBuf) -> Self {
        Self::of(key, process.unit.clone(), dir, process.pid().is_some())
    }

    /// The unit of the logger of a process in a record. `None` if the process has no logger.
    pub fn recorded_logger(key: ProcessKey, process: &Process<impl Lifecycle + ?Sized>) -> Option<Self> {
        let logger = process.logger.clone()?;
        Some(Self::of_logger(key, logger, process.pid().is_some()))
    }

    /// The unit of the logger of a process. `has_run`: as for [`Self::of`].
    pub fn of_logger(process: ProcessKey, name: UnitName, has_run: bool) -> Self {
        let evidence = if has_run { Evidence::Process } else { Evidence::None };
        Self { name, kind: UnitKind::Logger, process, evidence }
    }

    /// The name.
    pub fn name(&self) -> &UnitName {
        &self.name
    }

    /// True if the daemon has asked for the unit that has the name. False if there is no such unit. systemd is asked only if
    /// nothing else shows it.
    ///
    /// # Errors
    /// systemd can't be reached.
    pub async fn is_own(&self, manager: &dyn Systemd) -> Result<bool, unit::error::Error> {
        match &self.evidence {
            Evidence::Process => return Ok(true),
            Evidence::Launched(file) if file.exists() => return Ok(true),
            Evidence::Launched(_) | Evidence::None => {}
        }
        manager.has_command(&self.name, &contract::arguments(self.kind.into(), &self.process)).await
    }
}
