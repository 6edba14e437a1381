//! Records of tasks, and units and events without a task.

use std::path::PathBuf;
use std::time::{SystemTime, UNIX_EPOCH};

use crate::config::STATE_DIR;
use crate::store::Store;
use crate::task::Task;
use crate::view::{Recorded, Survey, unknown};

use super::Check;
use crate::probe::{Known, property};

/// The longest time for which a containerd may be down, in seconds. If an event has waited for longer, `doctor` assumes that
/// no containerd will accept it.
const LATE_SEC: u64 = 600;

/// The most faults of a kind that get a line each.
const MOST_LINES: usize = 20;

/// The facts about records.
#[derive(Debug)]
pub struct Facts {
    records: Known<Vec<Recorded>>,
    set_aside: Vec<PathBuf>,
    /// Tasks that were deleted and owe events: when the oldest event happened, in seconds since 1970.
    owing: Vec<u64>,
    /// The units of containers that are loaded, and whether each has ended.
    units: Known<Vec<(String, bool)>>,
    now_sec: u64,
}

pub(super) fn collect() -> Facts {
    let survey = Survey::collect();
    let store = Store::new(STATE_DIR);
    let owed = store.load_owed().map_err(unknown).unwrap_or_default();
    let oldest = |task: Task| task.outbox.first().map(|event| event.at_usec / 1_000_000);
    let units = survey.units.map(|units| {
        let name = |unit| property(unit, "Id").unwrap_or_default().to_owned();
        let has_ended = |unit| matches!(property(unit, "ActiveState"), Some("failed" | "inactive"));
        units.iter().map(|unit| (name(unit), has_ended(unit))).collect()
    });
    Facts {
        records: survey.records,
        set_aside: store.set_aside_records().unwrap_or_default(),
        owing: owed.into_iter().filter_map(|(_, task)| task.ok().and_then(oldest)).collect(),
        units,
        now_sec: SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |now| now.as_secs()),
    }
}

pub(super) fn checks(facts: &Facts) -> Vec<Check> {
    let records = match &facts.records {
        Ok(records) => records,
        Err(unknown) => return vec![Check::unknown("records", unknown)],
    };
    let mut checks = readable(facts, records);
    checks.push(events(facts, records));
    match &facts.units {
        Ok(units) => checks.extend(leftovers(records, units)),
        Err(unknown) => checks.push(Check::unknown("leftovers", unknown)),
    }
    checks
}

fn readable(facts: &Facts, records: &[Recorded]) -> Vec<Check> {
    const NAME: &str = "records";
    let unreadable = records.iter().filter_map(|(_, task)| task.as_ref().err()).map(|reason| {
        let advice = "delete its container, or start the version of this program that wrote it";
        Check::error(NAME, reason.clone(), advice)
    });
    let set_aside = facts.set_aside.iter().map(|path| {
        let found = format!("{} has crashed the daemon, which leaves it alone", path.display());
        Check::error(NAME, found, "report it, then delete its container and the file")
    });
    let checks: Vec<Check> = unreadable.chain(set_aside).take(MOST_LINES).collect();
    match checks.is_empty() {
        true => vec![Check::ok(NAME, format!("{} can be read", records.len()))],
        false => checks,
    }
}

fn events(facts: &Facts, records: &[Recorded]) -> Check {
    const NAME: &str = "events";
    let tasks = records.iter().filter_map(|(_, task)| task.as_ref().ok());
    let owed = tasks.filter_map(|task| task.outbox.first()).map(|event| event.at_usec / 1_000_000);
    let owed: Vec<u64> = owed.chain(facts.owing.iter().copied()).collect();
    let late = owed.iter().filter(|at| facts.now_sec.saturating_sub(**at) > LATE_SEC).count();
    if late > 0 {
        let found = format!("containerd has not taken the events of {late} tasks for more than {LATE_SEC} s");
        return Check::warning(NAME, found, "check that each containerd that made them runs");
    }
    Check::ok(NAME, format!("{} tasks have events that containerd has not taken yet", owed.len()))
}

fn leftovers(records: &[Recorded], units: &[(String, bool)]) -> Vec<Check> {
    const NAME: &str = "leftovers";
    let tasks: Vec<&Task> = records.iter().filter_map(|(_, task)| task.as_ref().ok()).collect();
    // If a record can't be read, its unit seems to belong to no task, but may be needed.
    let is_known = |unit: &str| tasks.iter().any(|task| task.unit().as_str() == unit);
    let all_are_readable = tasks.len() == records.len();
    let lost =
        units.iter().filter(|(unit, _)| all_are_readable && !is_known(unit)).map(|(unit, has_ended)| {
            let found = format!("no task has the unit {unit}");
            let advice = match has_ended {
                true => format!("systemctl reset-failed {unit}"),
                false => format!("systemctl stop {unit}, if it is not of a container that you need"),
            };
            Check::warning(NAME, found, advice)
        });
    let failed = tasks.iter().filter(|task| task.is_leftover).map(|task| {
        let found =
            format!("the Create of {} has failed, and something of it could not be removed", task.key);
        let advice =
            "journalctl -u containerd-shim-systemd-v1 says what; the daemon tries again when it starts";
        Check::warning(NAME, found, advice)
    });
    let checks: Vec<Check> = lost.chain(failed).take(MOST_LINES).collect();
    if checks.is_empty() { vec![Check::ok(NAME, "none")] } else { checks }
}

#[cfg(test)]
mod tests {
    use super::super::{Status, only_fault};
    use super::*;
    use crate::probe::Unknown;

    fn healthy() -> Facts {
        Facts { records: Ok(vec![]), set_aside: vec![], owing: vec![], units: Ok(vec![]), now_sec: 10_000 }
    }

    fn fault(facts: &Facts) -> Check {
        only_fault(checks(facts))
    }

    #[test]
    fn a_machine_without_tasks_is_ok() {
        assert!(checks(&healthy()).iter().all(|check| check.status == Status::Ok));
    }

    #[test]
    fn records_that_can_not_be_used_are_named() {
        let reason = "record /run/x has version 9, this program reads up to 2".to_owned();
        let facts = Facts { records: Ok(vec![(PathBuf::from("/run/x"), Err(reason))]), ..healthy() };
        assert_eq!((fault(&facts).name, fault(&facts).status), ("records", Status::Error));
        let facts = Facts { set_aside: vec![PathBuf::from("/run/.crashed/a.json")], ..healthy() };
        assert!(fault(&facts).found.contains("/run/.crashed/a.json"));
    }

    #[test]
    fn a_unit_without_a_task_is_left_over_and_an_event_can_be_late() {
        let unit = "containerd-default-web.service".to_owned();
        let check = fault(&Facts { units: Ok(vec![(unit.clone(), true)]), ..healthy() });
        assert_eq!(check.advice, format!("systemctl reset-failed {unit}"));
        assert_eq!(fault(&Facts { owing: vec![9_990, 100], ..healthy() }).name, "events");
    }

    #[test]
    fn a_user_who_may_not_read_records_gets_a_message() {
        let records = Err(Unknown::Forbidden(STATE_DIR.to_owned()));
        assert_eq!(fault(&Facts { records, ..healthy() }).status, Status::Unknown);
    }
}
