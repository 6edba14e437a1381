//! The bundles of tasks: what containerd needs at its next start to find its containers again.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::io;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};

use crate::files;
use crate::id::TaskKey;
use crate::probe::{self, Known, Unknown};
use crate::task::Task;
use crate::unit::name::DAEMON;
use crate::view::Recorded;

use super::{Check, MOST_LINES};

/// The file in a bundle in which containerd keeps the path of the program that it started for the container. If there is no such
/// program when containerd starts, containerd forgets the container (core/runtime/v2/shim_load.go).
const PROGRAM_FILE: &str = "shim-binary-path";

/// The longest path, in bytes.
const MAX_PATH: u64 = 4096;

const NAME: &str = "bundles";

/// What is wrong with a bundle.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Fault {
    /// It does not exist.
    Missing,
    /// The program that it names does not exist.
    NoProgram(PathBuf),
}

/// A bundle in which something is wrong.
#[derive(Debug)]
struct Broken {
    key: TaskKey,
    bundle: PathBuf,
    fault: Fault,
}

/// The facts about bundles.
#[derive(Debug, Default)]
pub(super) struct Facts {
    broken: Vec<Broken>,
    /// Why some bundles could not be looked at.
    unknown: Option<Unknown>,
    /// The path of this program.
    program: Option<PathBuf>,
}

pub(super) fn collect(records: &[Recorded]) -> Facts {
    let mut facts = Facts { program: std::env::current_exe().ok(), ..Facts::default() };
    let tasks = records.iter().filter_map(|(path, task)| Some((path, task.as_ref().ok()?)));
    // containerd does not look for the others any more.
    for (record, task) in tasks.filter(|(_, task)| !task.given_up && !task.is_leftover) {
        let bundle = task.request.bundle.clone();
        let what = format!("the bundle {}", bundle.display());
        // A disk may not answer.
        match probe::answer(&what, move || fault(&bundle)).and_then(|known| known) {
            Ok(Some(Fault::Missing)) if !is_needed(task, record) => {}
            Ok(Some(fault)) => {
                let (key, bundle) = (task.key.clone(), task.request.bundle.clone());
                facts.broken.push(Broken { key, bundle, fault });
            }
            Ok(None) => {}
            Err(unknown) => {
                let is_late = matches!(unknown, Unknown::Late(..));
                facts.unknown = Some(unknown);
                // Each further bundle on the same disk would take as long.
                if is_late {
                    break;
                }
            }
        }
    }
    facts
}

/// False if nobody needs the bundle any more. A task that was deleted after its record was read has no record now: containerd
/// removes the bundle after that.
fn is_needed(task: &Task, record: &Path) -> bool {
    task.init.exit().is_none() && record.exists()
}

fn fault(bundle: &Path) -> Known<Option<Fault>> {
    let is_missing = |path: &Path| matches!(path.try_exists(), Ok(false));
    let file = bundle.join(PROGRAM_FILE);
    match files::read_regular(&file, MAX_PATH) {
        Ok(bytes) => {
            let program = PathBuf::from(OsString::from_vec(bytes));
            let is_fault = program.is_absolute() && is_missing(&program);
            Ok(is_fault.then_some(Fault::NoProgram(program)))
        }
        // containerd 1.5 did not write the file, and containerd writes none for the second container of a pod.
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            Ok(is_missing(bundle).then_some(Fault::Missing))
        }
        Err(error) => Err(Unknown::of(&file.to_string_lossy(), &error)),
    }
}

pub(super) fn checks(facts: &Facts) -> Vec<Check> {
    let mut programs: BTreeMap<&Path, usize> = BTreeMap::new();
    for broken in &facts.broken {
        if let Fault::NoProgram(program) = &broken.fault {
            *programs.entry(program).or_default() += 1;
        }
    }
    let own = facts.program.as_deref().unwrap_or(Path::new(DAEMON)).display();
    let programs = programs.into_iter().map(|(program, count)| {
        let containers = if count == 1 { "container" } else { "containers" };
        let found = format!(
            "containerd forgets {count} {containers} at its next start, because {} is missing",
            program.display()
        );
        let dir = program.parent().unwrap_or(program).display();
        let program = program.display();
        let advice =
            format!("make {program} a symlink to this program: mkdir -p {dir} && ln -sf {own} {program}");
        Check::error(NAME, found, advice)
    });
    let missing = facts.broken.iter().filter(|broken| broken.fault == Fault::Missing).map(|broken| {
        let (key, bundle) = (&broken.key, broken.bundle.display());
        let found = format!("containerd has forgotten {key}: its bundle {bundle} is missing");
        let (namespace, id) = (&key.namespace, &key.id);
        let advice = format!(
            "end it with {DAEMON} -namespace {namespace} -id {id} -bundle {bundle} delete >/dev/null"
        );
        Check::warning(NAME, found, advice)
    });
    let unknown = facts.unknown.iter().map(|unknown| Check::unknown(NAME, unknown));
    let checks: Vec<Check> = programs.chain(missing).take(MOST_LINES).chain(unknown).collect();
    if checks.is_empty() {
        vec![Check::ok(NAME, "containerd finds all containers at its next start")]
    } else {
        checks
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Status, only_fault};
    use super::*;
    use std::fs;

    fn task(bundle: &Path) -> Task {
        let mut task: Task = serde_json::from_slice(include_bytes!("../../fuzz/corpus/record/task")).unwrap();
        task.request.bundle = bundle.to_owned();
        task
    }

    /// The checks of two tasks with this bundle, whose record exists.
    fn checks_of(bundle: &Path, change: impl Fn(&mut Task)) -> Vec<Check> {
        let mut task = task(bundle);
        change(&mut task);
        let record = PathBuf::from("/proc/self/stat");
        let records = [(record.clone(), Ok(task.clone())), (record, Ok(task))];
        checks(&Facts { program: Some("/usr/bin/own".into()), ..collect(&records) })
    }

    #[test]
    fn a_missing_program_is_named_once() {
        let dir = tempfile::tempdir().unwrap();
        let (file, program) = (dir.path().join(PROGRAM_FILE), dir.path().join("bin/shim"));
        let none = checks_of(dir.path(), |_| {});
        assert_eq!(none[0].status, Status::Ok, "without the file, containerd searches the program");
        fs::write(&file, program.to_str().unwrap()).unwrap();
        let check = only_fault(checks_of(dir.path(), |_| {}));
        let program = program.display();
        assert_eq!(check.status, Status::Error);
        assert_eq!(
            check.found,
            format!("containerd forgets 2 containers at its next start, because {program} is missing")
        );
        assert!(check.advice.ends_with(&format!("ln -sf /usr/bin/own {program}")), "{check:?}");
        assert_eq!(checks_of(dir.path(), Task::give_up)[0].status, Status::Ok);
        // A path without its end is none.
        fs::write(&file, "x".repeat(5000)).unwrap();
        assert_eq!(only_fault(checks_of(dir.path(), |_| {})).status, Status::Unknown);
        fs::write(&file, "/proc/self/exe").unwrap();
        assert_eq!(checks_of(dir.path(), |_| {})[0].status, Status::Ok);
    }

    #[test]
    fn a_container_without_its_bundle_is_named() {
        let bundle = Path::new("/no/such/bundle");
        let all = checks_of(bundle, |_| {});
        assert_eq!((all.len(), all[0].status), (2, Status::Warning));
        assert!(all[0].found.starts_with("containerd has forgotten default/web"), "{all:?}");
        let command = "containerd-shim-systemd-v1 -namespace default -id web -bundle /no/such/bundle delete";
        assert!(all[0].advice.contains(command), "{all:?}");
        assert_eq!(checks_of(bundle, |task| task.is_leftover = true)[0].status, Status::Ok);
    }

    #[test]
    fn a_task_that_was_deleted_meanwhile_needs_no_bundle() {
        let records = [(PathBuf::from("/no/such/record"), Ok(task(Path::new("/no/such/bundle"))))];
        assert!(collect(&records).broken.is_empty());
    }

    #[test]
    fn a_bundle_on_a_disk_that_does_not_answer_is_unknown() {
        let unknown = Some(Unknown::Late("the bundle /x".to_owned(), std::time::Duration::from_secs(10)));
        let check = only_fault(checks(&Facts { unknown, ..Facts::default() }));
        assert_eq!(check.found, "the bundle /x does not answer within 10 s");
    }
}
