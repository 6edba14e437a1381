//! The command `doctor`: checks of this machine.
//!
//! Each group of checks has a file with a type for its facts and two functions: `collect` reads the facts from the machine,
//! and `checks` judges them. `checks` is pure, so tests can give it the facts of any machine. A fact that this user may not
//! read is [`Unknown`], and its check says so. `doctor` does not need the daemon, changes nothing and starts no unit.

mod bundles;
mod bus;
mod configuration;
mod containerd;
mod daemon;
mod halt;
mod host;
mod limits;
mod records;
mod report;
mod running;
mod units;

pub use report::{json, text};

use crate::probe::Unknown;

/// The most faults of a kind that get a line each.
const MOST_LINES: usize = 20;

/// How a check ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Status {
    /// There is nothing to do.
    Ok,
    /// This user may not read the fact, or the fact does not exist.
    Unknown,
    /// Containers run, but something does not work, or will fail soon.
    Warning,
    /// Containers can't be started, or the daemon does not serve them.
    Error,
}

impl Status {
    /// The word for it, in a report.
    pub fn word(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Unknown => "unknown",
            Self::Warning => "warning",
            Self::Error => "error",
        }
    }
}

/// The result of a check: one line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Check {
    /// What was checked: one word, the same in every version.
    pub name: &'static str,
    /// How it ended.
    pub status: Status,
    /// What was found.
    pub found: String,
    /// What to do; empty if there is nothing to do.
    pub advice: String,
}

impl Check {
    fn ok(name: &'static str, found: impl Into<String>) -> Self {
        Self { name, status: Status::Ok, found: found.into(), advice: String::new() }
    }

    fn warning(name: &'static str, found: impl Into<String>, advice: impl Into<String>) -> Self {
        Self { name, status: Status::Warning, found: found.into(), advice: advice.into() }
    }

    fn error(name: &'static str, found: impl Into<String>, advice: impl Into<String>) -> Self {
        Self { name, status: Status::Error, found: found.into(), advice: advice.into() }
    }

    fn unknown(name: &'static str, why: &Unknown) -> Self {
        let (found, advice) = (why.to_string(), why.advice().to_owned());
        Self { name, status: Status::Unknown, found, advice }
    }
}

/// The facts about this machine.
#[derive(Debug)]
pub struct Facts {
    host: host::Facts,
    bus: bus::Facts,
    containerd: containerd::Facts,
    limits: limits::Facts,
    units: units::Facts,
    daemon: daemon::Facts,
    records: records::Facts,
}

impl Facts {
    /// Reads the facts from this machine. Waits some seconds for each program that does not answer.
    pub async fn collect() -> Self {
        let bus = bus::collect().await;
        let containerd = containerd::collect();
        Self {
            host: host::collect(),
            bus,
            containerd,
            limits: limits::collect(),
            units: units::collect(),
            daemon: daemon::collect(),
            records: records::collect(),
        }
    }
}

/// All checks. First come the checks of what all others depend on.
pub fn examine(facts: &Facts) -> Vec<Check> {
    [
        host::checks(&facts.host, &facts.bus),
        bus::checks(&facts.bus),
        containerd::checks(&facts.containerd, &facts.bus),
        limits::checks(&facts.limits),
        units::checks(&facts.units),
        daemon::checks(&facts.daemon),
        records::checks(&facts.records),
    ]
    .concat()
}

/// What keeps the daemon from serving calls, and what to do: the first error that the checks about the daemon find.
pub fn fault_of_daemon() -> Option<String> {
    let checks = [
        units::checks(&units::collect_of_daemon()),
        limits::checks_of_state_dir(&limits::collect()),
        daemon::checks(&daemon::collect()),
    ]
    .concat();
    let fault = checks.into_iter().find(|check| check.status == Status::Error)?;
    Some(format!("{}: {}", fault.found, fault.advice))
}

/// The one check that is not OK, for the tests of checks.
#[cfg(test)]
fn only_fault(checks: Vec<Check>) -> Check {
    let mut faults: Vec<Check> = checks.into_iter().filter(|check| check.status != Status::Ok).collect();
    assert_eq!(faults.len(), 1, "{faults:?}");
    faults.remove(0)
}
