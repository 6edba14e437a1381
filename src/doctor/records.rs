//! Records of tasks, and units and events without a task.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use crate::config::STATE_DIR;
use crate::id::{Namespace, TaskKey};
use crate::oci::options::DEFAULT_ROOT;
use crate::store::Store;
use crate::task::Task;
use crate::unit::name::{PREFIX, candidates};
use crate::unit::{bus_config, refs};
use crate::view::{self, Recorded, Survey, unknown};

use super::{Check, MOST_LINES, bundles};
use crate::probe::{Known, Properties, property};

/// The longest time for which a containerd may be down, in seconds. If an event has waited for longer, `doctor` assumes that
/// no containerd will accept it.
const LATE_SEC: u64 = 600;

/// Where docs/restarts.md puts the limit of match rules, and its value there.
const MATCH_RULES_FILE: &str = "/etc/dbus-1/system.d/match-rules.conf";
const SUGGESTED_MATCH_RULES: u32 = 65536;

/// The facts about records.
#[derive(Debug)]
pub struct Facts {
    records: Known<Vec<Recorded>>,
    /// The loaded units of the records that can't be read, by the path of the record.
    units_of_unreadable: BTreeMap<PathBuf, String>,
    set_aside: Vec<PathBuf>,
    bundles: bundles::Facts,
    /// Tasks that were deleted and owe events: when the oldest event happened, in seconds since 1970.
    owing: Vec<u64>,
    /// How many units of containers are loaded.
    units: Known<usize>,
    /// Those of them that no task has, and whether each has ended.
    lost: Vec<(String, bool)>,
    /// The commands that remove what the OCI runtime has stored of those containers, by the names of the units.
    deletions: BTreeMap<String, String>,
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
        units_of_unreadable: units_of_unreadable(&survey),
        deletions: deletions(&survey, &lost, Path::new(DEFAULT_ROOT)),
        bundles: bundles::collect(survey.records.as_deref().unwrap_or_default()),
        records: survey.records,
        set_aside: store.set_aside_records().unwrap_or_default(),
        owing: owed.into_iter().filter_map(|(_, task)| task.ok().and_then(oldest)).collect(),
        units: survey.units.map(|units| units.len()),
        lost,
        referenced_at_most: refs::limit(bus_config::match_rules()),
        now_sec: SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |now| now.as_secs()),
    }
}

/// The task of a record, by the path of the record. `None` for the directory of a namespace.
fn key_of(record: &Path) -> Option<TaskKey> {
    let mut names = record.strip_prefix(STATE_DIR).ok()?.iter().map(|name| name.to_str());
    let (namespace, word) = (names.next()??, names.next()??);
    TaskKey::from_word(Namespace::new(namespace).ok()?, word).ok()
}

/// The loaded units of the records that can't be read. A unit of another task may have one of the names that the task's unit may
/// have.
fn units_of_unreadable(survey: &Survey) -> BTreeMap<PathBuf, String> {
    let (Ok(units), Ok(records)) = (&survey.units, &survey.records) else {
        return BTreeMap::new();
    };
    let is_of_other = |unit: &str| {
        let mut tasks = records.iter().filter_map(|(_, task)| task.as_ref().ok());
        tasks.any(|task| task.unit().as_str() == unit)
    };
    let unit_of = |key: &TaskKey| {
        let has = |unit: &&Properties, name: &str| {
            property(unit, "Id") == Some(name) && view::field(unit, "CONTAINER_ID") == Some(key.id.as_str())
        };
        let mut names = candidates(key).map(|name| name.to_string());
        names.find(|name| units.iter().any(|unit| has(&unit, name)) && !is_of_other(name))
    };
    let unreadable = records.iter().filter(|(_, task)| task.is_err());
    unreadable.filter_map(|(path, _)| Some((path.clone(), unit_of(&key_of(path)?)?))).collect()
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

/// What the OCI runtime has stored of a container keeps its id from being used again. Neither the unit nor a record names
/// another state directory of the OCI runtime than the usual one.
fn deletions(survey: &Survey, lost: &[(String, bool)], root: &Path) -> BTreeMap<String, String> {
    let units = survey.units.as_deref().unwrap_or_default();
    let deletion = |(name, _): &(String, bool)| {
        let unit = units.iter().find(|unit| property(unit, "Id") == Some(name))?;
        let [namespace, id] =
            ["CONTAINER_NAMESPACE", "CONTAINER_ID"].map(|field| view::field(unit, field).unwrap_or_default());
        let key = TaskKey::from_word(Namespace::new(namespace).ok()?, id).ok()?;
        let root = root.join(namespace);
        let has = |file: &str| root.join(key.id.as_str()).join(file).exists();
        let runtime = if has("status") { "crun" } else { "runc" };
        let is_stored = has("status") || has("state.json");
        let command = format!("{runtime} --root {} delete --force {}", root.display(), key.id);
        is_stored.then(|| (name.clone(), command))
    };
    lost.iter().filter_map(deletion).collect()
}

pub(super) fn checks(facts: &Facts) -> Vec<Check> {
    let mut checks = match &facts.records {
        Ok(records) => of_records(facts, records),
        // Those who may not read records know nothing of these either.
        Err(unknown) => {
            ["records", "bundles", "events", LEFTOVERS].map(|name| Check::unknown(name, unknown)).to_vec()
        }
    };
    checks.push(match &facts.units {
        Ok(units) => references(facts.referenced_at_most, *units),
        Err(unknown) => Check::unknown(REFERENCES, unknown),
    });
    checks
}

fn of_records(facts: &Facts, records: &[Recorded]) -> Vec<Check> {
    let mut checks = readable(facts, records);
    checks.extend(bundles::checks(&facts.bundles));
    checks.push(events(facts, records));
    match &facts.units {
        Ok(_) => checks.extend(leftovers(facts, records)),
        Err(unknown) => checks.push(Check::unknown(LEFTOVERS, unknown)),
    }
    checks
}

const REFERENCES: &str = "references";
const LEFTOVERS: &str = "leftovers";

/// Compares the number of containers with the number of references, each of which costs systemd a match rule on the bus.
fn references(limit: usize, containers: usize) -> Check {
    if containers <= limit {
        let found = format!(
            "{containers} containers; up to {limit} keep their exit code if their unit is stopped while the daemon is down"
        );
        return Check::ok(REFERENCES, found);
    }
    let found = format!(
        "{containers} containers, of which {limit} keep their exit code if somebody stops their unit while the daemon is down"
    );
    let advice = format!(
        "set max_match_rules_per_connection in {MATCH_RULES_FILE} to {SUGGESTED_MATCH_RULES}, run systemctl reload dbus and systemctl restart containerd-shim-systemd-v1"
    );
    Check::warning(REFERENCES, found, advice)
}

fn readable(facts: &Facts, records: &[Recorded]) -> Vec<Check> {
    const NAME: &str = "records";
    let unreadable = records.iter().filter_map(|(path, task)| {
        let reason = task.as_ref().err()?.clone();
        Some(Check::error(NAME, reason, remedy(path, facts.units_of_unreadable.get(path))))
    });
    let set_aside = facts.set_aside.iter().map(|path| {
        let found = format!("{} crashed the daemon twice; the daemon no longer reads it", path.display());
        Check::error(NAME, found, "report it, then delete its container and the file")
    });
    let checks: Vec<Check> = unreadable.chain(set_aside).take(MOST_LINES).collect();
    match checks.is_empty() {
        true => vec![Check::ok(NAME, format!("{} can be read", records.len()))],
        false => checks,
    }
}

/// What to do about a record that can't be read, with the loaded unit of its task. Nobody can delete the task through containerd:
/// the daemon does not know it.
fn remedy(record: &Path, unit: Option<&String>) -> String {
    let Some(key) = key_of(record) else {
        return format!("look at {} as root", record.display());
    };
    let dir = record.parent().unwrap_or(record).display();
    let stop = match unit {
        Some(unit) => format!("stop its unit (systemctl stop {})", view::in_shell(unit)),
        None => format!(
            "stop its unit, if one runs (systemctl show -p Id -p LogExtraFields '{PREFIX}*.service' shows CONTAINER_ID={})",
            key.id
        ),
    };
    format!(
        "if a newer version of this program wrote it, start that version; else {stop}, then remove the directory {dir}"
    )
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

fn leftovers(facts: &Facts, records: &[Recorded]) -> Vec<Check> {
    const NAME: &str = LEFTOVERS;
    const SEE_LOG: &str =
        "journalctl -u containerd-shim-systemd-v1 says why; the daemon tries again every few minutes";
    let tasks: Vec<&Task> = records.iter().filter_map(|(_, task)| task.as_ref().ok()).collect();
    let lost = facts.lost.iter().map(|(unit, has_ended)| {
        let found = format!("no task has the unit {unit}");
        let then = facts.deletions.get(unit).map(|command| format!(", then {command}")).unwrap_or_default();
        let unit = view::in_shell(unit);
        let advice = match has_ended {
            true => format!("systemctl reset-failed {unit}{then}"),
            false => {
                format!("if it is not of a container that you need: systemctl stop {unit}{then}")
            }
        };
        Check::warning(NAME, found, advice)
    });
    let failed = tasks.iter().filter(|task| task.is_leftover).map(|task| {
        let found =
            format!("the Create of {} has failed, and something of it could not be removed", task.key);
        Check::warning(NAME, found, SEE_LOG)
    });
    let given_up = tasks.iter().filter(|task| task.given_up && !task.is_leftover).map(|task| {
        let found = format!("containerd has given up {}, which the daemon has not removed yet", task.key);
        Check::warning(NAME, found, SEE_LOG)
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
            units_of_unreadable: BTreeMap::new(),
            set_aside: vec![],
            bundles: bundles::Facts::default(),
            owing: vec![],
            units: Ok(0),
            lost: vec![],
            deletions: BTreeMap::new(),
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
    fn the_remedy_for_a_record_that_can_not_be_read_works() {
        let path = PathBuf::from(STATE_DIR).join("a-b/web/record.json");
        let unit = |id: &str| {
            let fields = format!("CONTAINER_ID={id} CONTAINER_NAMESPACE=a-b");
            properties(&[("Id", r"containerd-a\x2db-web.service"), ("LogExtraFields", &fields)])
        };
        let survey = |unit| Survey {
            units: Ok(vec![unit]),
            records: Ok(vec![(path.clone(), Err("version 9".to_owned()))]),
            now_usec: 0,
        };
        let found = units_of_unreadable(&survey(unit("web")));
        let facts = Facts { records: survey(unit("web")).records, units_of_unreadable: found, ..healthy() };
        let advice = fault(&facts).advice;
        let stop = r"systemctl stop containerd-a\\x2db-web.service), then remove the directory";
        assert!(advice.ends_with(&format!("{stop} {STATE_DIR}/a-b/web")), "{advice}");
        assert!(units_of_unreadable(&survey(unit("other"))).is_empty());
        let advice = fault(&Facts { units_of_unreadable: BTreeMap::new(), ..facts }).advice;
        assert!(advice.contains("CONTAINER_ID=web"), "{advice}");
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

    #[test]
    fn what_the_oci_runtime_has_stored_of_a_lost_container_is_removed_too() {
        let root = tempfile::tempdir().unwrap();
        let name = "containerd-default-web.service";
        let fields = "CONTAINER_ID=web CONTAINER_NAMESPACE=default";
        let unit = properties(&[("Id", name), ("LogExtraFields", fields)]);
        let survey = Survey { units: Ok(vec![unit]), records: Ok(vec![]), now_usec: 0 };
        for (file, runtime) in
            [(None, None), (Some("state.json"), Some("runc")), (Some("status"), Some("crun"))]
        {
            let dir = root.path().join("default/web");
            std::fs::create_dir_all(&dir).unwrap();
            file.iter().for_each(|file| std::fs::write(dir.join(file), "").unwrap());
            let command = runtime
                .map(|name| format!("{name} --root {}/default delete --force web", root.path().display()));
            for has_ended in [true, false] {
                let lost = vec![(name.to_owned(), has_ended)];
                let deletions = deletions(&survey, &lost, root.path());
                let check = fault(&Facts { units: Ok(1), lost, deletions, ..healthy() });
                let then =
                    command.as_ref().map_or(name.to_owned(), |command| format!("{name}, then {command}"));
                assert!(check.advice.ends_with(&then), "{check:?}");
            }
        }
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
        let checks = checks(&Facts { records, ..healthy() });
        let unknown = checks.iter().filter(|check| check.status == Status::Unknown).map(|check| check.name);
        assert_eq!(unknown.collect::<Vec<_>>(), ["records", "bundles", "events", "leftovers"]);
        // Every user may count units.
        assert_eq!(checks.last().map(|check| (check.name, check.status)), Some(("references", Status::Ok)));
    }
}
