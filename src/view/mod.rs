//! Tasks as systemd and the records show them, for people: `ps`, `inspect` and the checks of `doctor`.
//!
//! Every user may read what systemd knows. Only root can read the records, which also have the phase, and tasks
//! whose unit does not exist any more. Nothing here calls the daemon or containerd.

mod details;
mod table;

pub use details::{details, details_json};
pub use table::{table, table_json};

use std::path::PathBuf;

use crate::config::STATE_DIR;
use crate::id::SHORT_ID;
use crate::probe::{self, Known, Properties, Unknown, property, property_number};
use crate::store::{Error, Store};
use crate::task::Task;
use crate::unit::name::PREFIX;
use crate::unit::properties::CONTAINER_TYPE;

/// The properties of a unit that are read.
const PROPERTIES: [&str; 18] = [
    "Id",
    "Type",
    "Description",
    "LogExtraFields",
    "LoadState",
    "ActiveState",
    "SubState",
    "Result",
    "FreezerState",
    "MainPID",
    "ExecMainCode",
    "ExecMainStatus",
    "MemoryCurrent",
    "TasksCurrent",
    "CPUUsageNSec",
    "ControlGroup",
    "ActiveEnterTimestampMonotonic",
    "Slice",
];

/// Words for the state of a task, the same as those for the phase in its record.
const RUNNING: &str = "running";
const PAUSED: &str = "paused";
const STOPPED: &str = "stopped";

/// A record on disk: its path and its content.
pub type Recorded = (PathBuf, Result<Task, String>);

/// All units and records that this user may read.
#[derive(Debug)]
pub struct Survey {
    /// The units of containers.
    pub units: Known<Vec<Properties>>,
    pub records: Known<Vec<Recorded>>,
    /// The clock of systemd's time stamps, in microseconds.
    pub now_usec: u64,
}

impl Survey {
    /// Reads the units and records of this machine.
    pub fn collect() -> Self {
        let pattern = format!("{PREFIX}*.service");
        let units = probe::show(&pattern, &PROPERTIES).map(|mut units| {
            units.retain(is_container);
            units
        });
        Self { units, records: records(&Store::new(STATE_DIR)), now_usec: now_usec() }
    }
}

pub fn records(store: &Store) -> Known<Vec<Recorded>> {
    let found = store.look().map_err(unknown)?;
    let read = |(path, found): (PathBuf, Result<crate::store::Found, Error>)| {
        (path, found.map(|found| found.task).map_err(|error| error.to_string()))
    };
    Ok(found.into_iter().map(read).collect())
}

/// Why a store can't be read.
pub fn unknown(error: Error) -> Unknown {
    match error {
        Error::Io(error) if error.io().kind() == std::io::ErrorKind::PermissionDenied => {
            Unknown::Forbidden(error.path().to_string_lossy().into_owned())
        }
        error => Unknown::Failed(error.to_string()),
    }
}

fn now_usec() -> u64 {
    let now = nix::time::clock_gettime(nix::time::ClockId::CLOCK_MONOTONIC);
    now.map_or(0, |now| {
        u64::try_from(now.tv_sec()).unwrap_or(0) * 1_000_000 + now.tv_nsec().unsigned_abs() / 1000
    })
}

/// True for the unit of a container that this program has made. A logger's unit has the same journal fields, but another type. An
/// exec's unit has no such fields. Their names do not tell them apart: each of them can end in a hash.
fn is_container(unit: &Properties) -> bool {
    field(unit, "CONTAINER_ID").is_some() && property(unit, "Type") == Some(CONTAINER_TYPE)
}

/// A journal field of a unit.
pub fn field<'a>(unit: &'a Properties, name: &str) -> Option<&'a str> {
    let words = property(unit, "LogExtraFields")?.split_whitespace();
    words.filter_map(|word| word.split_once('=')).find(|(field, _)| *field == name).map(|(_, value)| value)
}

/// A unit's name as people type it in a shell: systemd writes a dash in a namespace or an id as `\x2d`.
pub fn in_shell(unit: &str) -> String {
    unit.replace('\\', "\\\\")
}

/// The facts about a task that this user may read.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Row {
    /// containerd's namespace.
    pub namespace: String,
    pub id: String,
    /// The name that people gave the container.
    pub name: String,
    pub unit: String,
    /// `namespace/name` of its pod.
    pub pod: Option<String>,
    /// Its image, if the client has named it.
    pub image: Option<String>,
    /// The word for its phase.
    pub state: String,
    /// The exit status of its init process.
    pub exit_status: Option<u32>,
    /// Its init process.
    pub pid: Option<u32>,
    /// Its memory, in bytes.
    pub memory: Option<u64>,
    /// The time since the start of its unit, in seconds.
    pub age_sec: Option<u64>,
    /// No client has it any more: containerd has given it up, or its Create has failed. The daemon removes it.
    pub is_given_up: bool,
}

impl Row {
    /// The id as people write it.
    pub fn short_id(&self) -> &str {
        if crate::id::is_long_hex(&self.id) { &self.id[..SHORT_ID] } else { &self.id }
    }
}

/// The tasks, sorted by namespace and id.
pub fn rows(survey: &Survey) -> Vec<Row> {
    let units = survey.units.as_deref().unwrap_or_default();
    let mut rows: Vec<Row> = units.iter().map(|unit| of_unit(unit, survey.now_usec)).collect();
    let tasks = survey.records.iter().flatten().filter_map(|(_, task)| task.as_ref().ok());
    for task in tasks {
        let unit = task.unit().as_str();
        match rows.iter_mut().find(|row| row.unit == unit) {
            Some(row) => with_record(row, task),
            None => {
                let mut row = of_record(task);
                phase(&mut row, task);
                rows.push(row);
            }
        }
    }
    rows.sort_by(|one, other| {
        (&one.namespace, &one.id, &one.unit).cmp(&(&other.namespace, &other.id, &other.unit))
    });
    rows
}

fn of_unit(unit: &Properties, now_usec: u64) -> Row {
    let text = |name| field(unit, name).map(str::to_owned);
    let active = property(unit, "ActiveState").unwrap_or_default();
    let has_ended = matches!(
        (active, property(unit, "SubState")),
        ("active", Some("exited")) | ("failed" | "inactive", _)
    );
    let state = match (active, property(unit, "FreezerState")) {
        _ if has_ended => STOPPED,
        ("active", Some("frozen" | "frozen-by-parent")) => PAUSED,
        ("active", _) => RUNNING,
        ("activating", _) => "creating",
        (other, _) => other,
    };
    let number = |name| property_number(unit, name);
    let status = number("ExecMainStatus").and_then(|status| u32::try_from(status).ok());
    let start = number("ActiveEnterTimestampMonotonic").filter(|start| *start > 0);
    Row {
        namespace: text("CONTAINER_NAMESPACE").unwrap_or_default(),
        id: text("CONTAINER_ID").unwrap_or_default(),
        name: text("CONTAINER_NAME").unwrap_or_default(),
        unit: property(unit, "Id").unwrap_or_default().to_owned(),
        pod: pod(text("POD_NAMESPACE"), text("POD_NAME")),
        image: text("CONTAINER_IMAGE"),
        state: state.to_owned(),
        // Code 1 is an exit, 2 and 3 a death by a signal: CLD_EXITED, CLD_KILLED, CLD_DUMPED. Without a process it is 0.
        exit_status: status.filter(|_| has_ended).and_then(|status| match number("ExecMainCode")? {
            1 => Some(status),
            2 | 3 => Some(128 + status),
            _ => None,
        }),
        pid: number("MainPID").and_then(|pid| u32::try_from(pid).ok()).filter(|pid| *pid > 0),
        memory: number("MemoryCurrent"),
        age_sec: start.map(|start| now_usec.saturating_sub(start) / 1_000_000),
        is_given_up: false,
    }
}

fn of_record(task: &Task) -> Row {
    let text =
        |name: &str| task.fields.iter().find(|(field, _)| field == name).map(|(_, value)| value.clone());
    Row {
        namespace: task.key.namespace.to_string(),
        id: task.key.id.to_string(),
        name: text("CONTAINER_NAME").unwrap_or_default(),
        unit: task.unit().to_string(),
        pod: pod(text("POD_NAMESPACE"), text("POD_NAME")),
        image: text("CONTAINER_IMAGE"),
        ..Row::default()
    }
}

fn pod(namespace: Option<String>, name: Option<String>) -> Option<String> {
    Some(format!("{}/{}", namespace.unwrap_or_default(), name?))
}

/// Completes what systemd knows of a task by its record. While the daemon is down, nobody records that the process ends or is
/// frozen: then systemd is right.
fn with_record(row: &mut Row, task: &Task) {
    let word = task.init.word();
    let has_ended_since = row.state == STOPPED && word != STOPPED;
    let is_frozen_since = row.state == PAUSED && word == RUNNING;
    if has_ended_since || is_frozen_since {
        row.is_given_up = is_given_up(task);
    } else {
        phase(row, task);
    }
}

/// The phase as the record has it.
fn phase(row: &mut Row, task: &Task) {
    row.state = task.init.word().to_owned();
    row.exit_status = task.init.exit().map(|exit| exit.status);
    row.pid = task.init.pid().filter(|_| task.init.is_alive());
    row.is_given_up = is_given_up(task);
}

fn is_given_up(task: &Task) -> bool {
    task.given_up || task.is_leftover
}

/// The tasks whose id begins with `word`, and those with this name. If the id or unit of some tasks is exactly `word`, only
/// those. `word` can also be `NAMESPACE/ID`.
pub fn find<'a>(rows: &'a [Row], namespace: Option<&str>, word: &str) -> Vec<&'a Row> {
    let found = find_in(rows, namespace, word);
    match word.split_once('/') {
        // No id has a slash, but a name may have one.
        Some((of, id)) if found.is_empty() && namespace.is_none_or(|name| name == of) => {
            find_in(rows, Some(of), id)
        }
        _ => found,
    }
}

fn find_in<'a>(rows: &'a [Row], namespace: Option<&str>, word: &str) -> Vec<&'a Row> {
    let rows: Vec<&Row> =
        rows.iter().filter(|row| namespace.is_none_or(|name| row.namespace == name)).collect();
    let names =
        |row: &Row| [row.id.clone(), row.unit.clone(), row.unit.trim_end_matches(".service").to_owned()];
    let exact: Vec<&Row> =
        rows.iter().filter(|row| names(row).iter().any(|name| name == word)).copied().collect();
    if !exact.is_empty() {
        return exact;
    }
    rows.into_iter().filter(|row| row.id.starts_with(word) || row.name == word).collect()
}

#[cfg(test)]
mod tests {
    use std::path::Path;
    use std::time::Duration;

    use super::*;
    use crate::id::{ExecId, Namespace, TaskKey, UnitName};
    use crate::task::lifecycle::{Container, Exit};
    use crate::task::phase::Phase;
    use crate::unit::name;
    use crate::unit::properties::{self, UnitMetadata};

    fn unit(more: &[(&str, &str)]) -> Properties {
        let mut unit = probe::properties(&[
            ("Id", "containerd-default-web.service"),
            ("Type", "forking"),
            ("LogExtraFields", "CONTAINER_ID=web CONTAINER_NAMESPACE=default CONTAINER_NAME=shop"),
            ("ActiveState", "active"),
            ("SubState", "running"),
            ("MainPID", "125"),
            ("ActiveEnterTimestampMonotonic", "5000000"),
        ]);
        unit.extend(probe::properties(more));
        unit
    }

    #[test]
    fn without_root_a_task_is_described_by_its_unit() {
        let row = of_unit(&unit(&[("MemoryCurrent", "1048576")]), 65_000_000);
        assert_eq!((row.id.as_str(), row.name.as_str(), row.state.as_str()), ("web", "shop", "running"));
        assert_eq!((row.pid, row.memory, row.age_sec), (Some(125), Some(1 << 20), Some(60)));
        assert_eq!(of_unit(&unit(&[("FreezerState", "frozen")]), 0).state, "paused");
        let ended =
            [("SubState", "exited"), ("ExecMainCode", "1"), ("ExecMainStatus", "3"), ("MainPID", "0")];
        let row = of_unit(&unit(&ended), 0);
        assert_eq!((row.state.as_str(), row.exit_status, row.pid), ("stopped", Some(3), None));
        let killed = [("ActiveState", "failed"), ("ExecMainCode", "2"), ("ExecMainStatus", "9")];
        assert_eq!(of_unit(&unit(&killed), 0).exit_status, Some(137));
    }

    #[test]
    fn a_task_that_no_client_has_is_marked() {
        let task: Task = serde_json::from_slice(include_bytes!("../../fuzz/corpus/record/task")).unwrap();
        let with = |change: fn(&mut Task)| {
            let mut task = task.clone();
            change(&mut task);
            let records = Ok(vec![(PathBuf::from("/run/x"), Ok(task))]);
            rows(&Survey { units: Ok(vec![]), records, now_usec: 0 })[0].is_given_up
        };
        assert!(!with(|_| {}) && with(Task::give_up) && with(|task| task.is_leftover = true));
    }

    #[test]
    fn what_happens_while_the_daemon_is_down_is_known_from_systemd() {
        let mut task: Task = serde_json::from_slice(include_bytes!("../../fuzz/corpus/record/task")).unwrap();
        let container =
            Container { pid: 125, cgroup: "containerd-default.slice".into(), limits: None, oom_kills: 0 };
        let exit = Exit { status: 4, at_usec: 1 };
        let stopped = Phase::Stopped { container: container.clone(), exit, never_started: false };
        let ended: &[_] = &[
            ("ActiveState", "failed"),
            ("SubState", "failed"),
            ("ExecMainCode", "1"),
            ("ExecMainStatus", "3"),
            ("MainPID", "0"),
        ];
        let frozen: &[_] = &[("FreezerState", "frozen")];
        let running = || Phase::Running { container: container.clone() };
        let paused = Phase::Paused { container: container.clone() };
        let created = Phase::Created { container: container.clone(), program: None };
        for (unit_is, phase, state, exit_status, pid) in [
            (ended, running(), "stopped", Some(3), None),
            (ended, stopped.clone(), "stopped", Some(4), None),
            (frozen, running(), "paused", None, Some(125)),
            (frozen, created.clone(), "created", None, Some(125)),
            (&[], running(), "running", None, Some(125)),
            (&[], created, "created", None, Some(125)),
            // The client may have paused the pod, which is a slice.
            (&[], paused, "paused", None, Some(125)),
            (&[], stopped, "stopped", Some(4), None),
        ] {
            task.init.phase = phase;
            let mut unit = unit(unit_is);
            unit.insert("Id".to_owned(), task.unit().to_string());
            let records = Ok(vec![(PathBuf::from("/run/x"), Ok(task.clone()))]);
            let survey = Survey { units: Ok(vec![unit]), records, now_usec: 0 };
            let [row] = rows(&survey).try_into().unwrap();
            assert_eq!((row.state.as_str(), row.exit_status, row.pid), (state, exit_status, pid), "{task:?}");
        }
    }

    #[test]
    fn units_of_execs_loggers_and_other_programs_are_not_listed() {
        let (namespace, id) = (format!("{}a", "a-".repeat(37)), "b".repeat(76));
        let key = TaskKey::from_word(Namespace::new(namespace).unwrap(), &id).unwrap();
        let container = name::candidates(&key).next().unwrap();
        let exec =
            name::exec_candidates(&container, &ExecId::new("0123456789abcdef").unwrap()).next().unwrap();
        // Each of these ends in 16 hex digits.
        let (logger, of_exec) = (name::logger(&container).unwrap(), name::logger(&exec).unwrap());
        let metadata = UnitMetadata {
            description: "",
            identifier: "",
            fields: &[("CONTAINER_ID".to_owned(), id)],
            slice: &container,
            sandbox: None,
        };
        let listed = |name: &UnitName, made: &properties::Properties| {
            assert!(
                name.as_str().trim_end_matches(".service").rsplit(':').next().unwrap().len() == 16,
                "{name}"
            );
            let of = |wanted| {
                made.all().iter().find(|(name, _)| *name == wanted).map(|(_, value)| value.to_string())
            };
            let (type_of, has_fields) = (of("Type").unwrap(), of("LogExtraFields").is_some());
            let fields = if has_fields { "CONTAINER_ID=a" } else { "" };
            is_container(&unit(&[
                ("Id", name.as_str()),
                ("Type", type_of.trim_matches(['"', '\''])),
                ("LogExtraFields", fields),
            ]))
        };
        let limit = Duration::from_secs(1);
        let made =
            properties::container(&metadata, &[], &[], Path::new("/pid"), Path::new("/l"), limit, false);
        assert!(listed(&container, &made), "{made:?}");
        assert!(!listed(&exec, &properties::exec("", &container, &[], &[], Path::new("/l"))));
        for name in [&logger, &of_exec] {
            assert!(!listed(name, &properties::logger(&metadata, &[])));
        }
        assert!(!is_container(&unit(&[("LogExtraFields", "")])));
    }

    #[test]
    fn a_task_is_found_by_the_beginning_of_its_id() {
        let row = |namespace: &str, id: &str| Row {
            namespace: namespace.to_owned(),
            id: id.to_owned(),
            name: "shop".to_owned(),
            unit: format!("containerd-{namespace}-{id}.service"),
            ..Row::default()
        };
        let rows = [row("default", "web"), row("default", "web-2"), row("moby", "web")];
        let ids = |namespace, word| {
            find(&rows, namespace, word).iter().map(|row| row.unit.clone()).collect::<Vec<_>>()
        };
        assert_eq!(ids(Some("default"), "web"), ["containerd-default-web.service"]);
        assert_eq!(ids(None, "web").len(), 2);
        assert_eq!(ids(Some("default"), "we").len(), 2);
        assert_eq!(ids(None, "containerd-moby-web.service"), ["containerd-moby-web.service"]);
        assert_eq!(ids(Some("moby"), "shop").len(), 1);
        assert!(ids(None, "x").is_empty());
        assert_eq!(ids(None, "default/web"), ["containerd-default-web.service"]);
        assert_eq!(ids(None, "moby/we"), ["containerd-moby-web.service"]);
        assert!(ids(Some("default"), "moby/web").is_empty() && ids(None, "web/default").is_empty());
    }
}
