//! Records of tasks, and units and events without a task.

use std::path::PathBuf;
use std::time::{SystemTime, UNIX_EPOCH};

use crate::config::STATE_DIR;
use crate::store::Store;
use crate::task::Task;
use crate::unit::{bus_config, refs};
use crate::view::{self, Recorded, Survey, unknown};

use super::Check;
use crate::probe::{Known, Properties, property};

/// The longest time for which a containerd may be down, in seconds. If an event has waited for longer, `doctor` assumes that
/// no containerd will accept it.
const LATE_SEC: u64 = 600;

/// The most faults of a kind that get a line each.
const MOST_LINES: usize = 20;

/// Where docs/restarts.md puts the limit of match rules, and its value there.
const MATCH_RULES_FILE: &str = "/etc/dbus-1/system.d/match-rules.conf";
const SUGGESTED_MATCH_RULES: u32 = 65536;

/// The facts about records.
#[derive(Debug)]
pub struct Facts {
    records: Known<Vec<Recorded>>,
    set_aside: Vec<PathBuf>,
    /// Tasks that were deleted and owe events: when the oldest event happened, in seconds since 1970.
    owing: Vec<u64>,
    /// How many units of containers are loaded.
    units: Known<usize>,
    /// Those of them that no task has, and whether each has ended.
    lost: Vec<(String, bool)>,
    /// How many units the daemon may reference with the bus's configuration.
    referenced_at_most: usize,
    now_sec: u64,
}

pub(super) fn collect() -> Facts {
    let survey = Survey::collect();
    let store = Store::new(STATE_DIR);
    let owed = store.load_owed().map_err(unknown).unwrap_or_default();
    let oldest = |task: Task| task.outbox.first().map(|event| event.at_usec / 1_000_000);
    let lost = lost(&survey, Survey::collect);
    Facts {
        records: survey.records,
        set_aside: store.set_aside_records().unwrap_or_default(),
        owing: owed.into_iter().filter_map(|(_, task)| task.ok().and_then(oldest)).collect(),
        units: survey.units.map(|units| units.len()),
        lost,
        referenced_at_most: refs::limit(bus_config::match_rules()),
        now_sec: SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |now| now.as_secs()),
    }
}

/// The units that no task has, and whether each has ended. A task that is deleted or made while a survey reads units and records
/// is in one half of it, so these units are looked at again.
fn lost(survey: &Survey, again: impl FnOnce() -> Survey) -> Vec<(String, bool)> {
    let first = without_a_task(survey);
    if first.is_empty() {
        return first;
    }
    let is_lost_before = |unit: &String| first.iter().any(|(known, _)| known == unit);
    without_a_task(&again()).into_iter().filter(|(unit, _)| is_lost_before(unit)).collect()
}

fn without_a_task(survey: &Survey) -> Vec<(String, bool)> {
    let (Ok(units), Ok(records)) = (&survey.units, &survey.records) else {
        return Vec::new();
    };
    let tasks: Vec<&Task> = records.iter().filter_map(|(_, task)| task.as_ref().ok()).collect();
    // If a record can't be read, its unit seems to belong to no task, but may be needed.
    if tasks.len() < records.len() {
        return Vec::new();
    }
    let name = |unit: &Properties| property(unit, "Id").unwrap_or_default().to_owned();
    let has_ended = |unit: &Properties| matches!(property(unit, "ActiveState"), Some("failed" | "inactive"));
    let is_known = |unit: &str| tasks.iter().any(|task| task.unit().as_str() == unit);
    let units = units.iter().map(|unit| (name(unit), has_ended(unit)));
    units.filter(|(unit, _)| !is_known(unit)).collect()
}

pub(super) fn checks(facts: &Facts) -> Vec<Check> {
    let records = match &facts.records {
        Ok(records) => records,
        Err(unknown) => return vec![Check::unknown("records", unknown)],
    };
    let mut checks = readable(facts, records);
    checks.push(events(facts, records));
    match &facts.units {
        Ok(units) => {
            checks.extend(leftovers(records, &facts.lost));
            checks.push(references(facts.referenced_at_most, *units));
        }
        Err(unknown) => checks.push(Check::unknown("leftovers", unknown)),
    }
    checks
}

/// Compares the number of containers with the number of references, each of which costs systemd a match rule on the bus.
fn references(limit: usize, containers: usize) -> Check {
    const NAME: &str = "references";
    if containers <= limit {
        return Check::ok(NAME, format!("{containers} of up to {limit} units of containers"));
    }
    let found = format!(
        "{containers} containers, of which {limit} keep their exit code if somebody stops their unit while the daemon is down"
    );
    let advice = format!(
        "set max_match_rules_per_connection in {MATCH_RULES_FILE} to {SUGGESTED_MATCH_RULES}, run systemctl reload dbus and systemctl restart containerd-shim-systemd-v1"
    );
    Check::warning(NAME, found, advice)
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

fn leftovers(records: &[Recorded], lost: &[(String, bool)]) -> Vec<Check> {
    const NAME: &str = "leftovers";
    let tasks: Vec<&Task> = records.iter().filter_map(|(_, task)| task.as_ref().ok()).collect();
    let lost = lost.iter().map(|(unit, has_ended)| {
        let found = format!("no task has the unit {unit}");
        let unit = view::in_shell(unit);
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
    let given_up = tasks.iter().filter(|task| task.muted && !task.is_leftover).map(|task| {
        let found = format!("containerd has given up {}, which the daemon has not removed yet", task.key);
        let advice =
            "journalctl -u containerd-shim-systemd-v1 says why; the daemon tries again every few minutes";
        Check::warning(NAME, found, advice)
    });
    let checks: Vec<Check> = lost.chain(failed).chain(given_up).take(MOST_LINES).collect();
    if checks.is_empty() { vec![Check::ok(NAME, "none")] } else { checks }
}

#[cfg(test)]
mod tests {
    use super::super::{Status, only_fault};
    use super::*;
    use crate::probe::{Unknown, properties};

    fn healthy() -> Facts {
        Facts {
            records: Ok(vec![]),
            set_aside: vec![],
            owing: vec![],
            units: Ok(0),
            lost: vec![],
            referenced_at_most: 400,
            now_sec: 10_000,
        }
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
        let unit = r"containerd-a\x2db-web.service".to_owned();
        let check = fault(&Facts { units: Ok(1), lost: vec![(unit.clone(), true)], ..healthy() });
        assert!(check.found.contains(&unit), "{}", check.found);
        // A shell removes one of two backslashes.
        assert_eq!(check.advice, r"systemctl reset-failed containerd-a\\x2db-web.service");
        assert_eq!(fault(&Facts { owing: vec![9_990, 100], ..healthy() }).name, "events");
    }

    fn survey(units: &[&str], tasks: &[&Task]) -> Survey {
        let unit = |name: &&str| properties(&[("Id", name), ("ActiveState", "active")]);
        let record = |task: &&Task| (PathBuf::from("/run/x"), Ok((*task).clone()));
        Survey {
            units: Ok(units.iter().map(unit).collect()),
            records: Ok(tasks.iter().map(record).collect()),
            now_usec: 0,
        }
    }

    #[test]
    fn a_task_that_is_deleted_or_made_during_a_survey_leaves_nothing_over() {
        let task: Task = serde_json::from_slice(include_bytes!("../../fuzz/corpus/record/task")).unwrap();
        let (own, other) = (task.unit().as_str(), "containerd-default-web.service");
        let lost = |first: Survey, second: Survey| lost(&first, || second);
        assert!(lost(survey(&[own], &[]), survey(&[], &[])).is_empty());
        assert!(lost(survey(&[own], &[]), survey(&[own], &[&task])).is_empty());
        // This one was lost after the first survey at the earliest.
        assert!(lost(survey(&[own], &[&task]), survey(&[own], &[])).is_empty());
        let seen = || survey(&[own, other], &[&task]);
        assert_eq!(lost(seen(), seen()), [(other.to_owned(), false)]);
    }

    #[test]
    fn no_unit_is_lost_while_a_record_can_not_be_read() {
        let mut survey = survey(&["containerd-default-web.service"], &[]);
        survey.records = Ok(vec![(PathBuf::from("/run/x"), Err("version 9".to_owned()))]);
        assert!(without_a_task(&survey).is_empty());
    }

    #[test]
    fn a_task_that_was_given_up_is_named() {
        let mut task: Task = serde_json::from_slice(include_bytes!("../../fuzz/corpus/record/task")).unwrap();
        task.give_up();
        let records = Ok(vec![(PathBuf::from("/run/x"), Ok(task))]);
        let check = fault(&Facts { records, units: Ok(1), ..healthy() });
        assert_eq!(check.name, "leftovers");
        assert!(check.found.contains("given up"), "{}", check.found);
    }

    #[test]
    fn more_containers_than_references_are_a_warning() {
        assert_eq!(references(400, 400).status, Status::Ok);
        let check = references(400, 401);
        assert_eq!((check.name, check.status), ("references", Status::Warning));
        assert!(check.advice.contains("max_match_rules_per_connection"));
    }

    #[test]
    fn a_user_who_may_not_read_records_gets_a_message() {
        let records = Err(Unknown::Forbidden(STATE_DIR.to_owned()));
        assert_eq!(fault(&Facts { records, ..healthy() }).status, Status::Unknown);
    }
}
