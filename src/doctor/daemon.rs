//! The daemon's health: restarts, descriptors, operations that hang.

use std::path::Path;

use crate::cgroup;
use crate::config::{CRASHES, CREATE_LIMIT, RUNTIME_LIMIT};
use crate::launch;
use crate::sys;
use crate::unit::name::{DAEMON_SERVICE, PREFIX};
use crate::unit::policy;

use super::{Check, halt};
use crate::probe::{self, Known, Properties, property, property_number};
use crate::view;

/// From this number of restarts on, `doctor` warns: administrators do not restart the daemon this often.
const MANY_RESTARTS: u64 = 20;

/// After this number of starts, a daemon that was started within [`JUST_STARTED_SEC`] ends each time.
const MANY_STARTS: u64 = 10;
const JUST_STARTED_SEC: u64 = 3;

/// The part of the descriptor store, or of the daemon's own descriptors, that may be in use.
const MOST_PERCENT: u64 = 90;

/// The longest time that a command of the OCI runtime takes before the daemon kills it.
const OPERATION_SEC: u64 = RUNTIME_LIMIT.as_secs() + 30;
const CREATE_SEC: u64 = CREATE_LIMIT.as_secs() + 30;

/// The facts about the daemon.
#[derive(Debug)]
pub struct Facts {
    service: Known<Properties>,
    /// Open descriptors of the daemon, and its limit.
    descriptors: Known<(u64, u64)>,
    /// Whether its program was replaced since it started.
    is_replaced: Known<bool>,
    /// The running commands of the OCI runtime, and running `launch` processes: pid, name, age in seconds.
    commands: Vec<(u32, String, u64)>,
    /// Jobs of systemd for containers: unit, kind, state.
    jobs: Known<Vec<(String, String, String)>>,
    /// Whether something has crashed the daemon since the boot.
    has_crashed: Known<bool>,
    /// The age of its process in seconds.
    age_sec: Option<u64>,
    /// What the drop-ins of its service set.
    settings: Option<String>,
    halt: halt::Facts,
}

pub(super) fn collect() -> Facts {
    let service = probe::show_one(DAEMON_SERVICE);
    let pid = service.as_ref().ok().and_then(|unit| property_number(unit, "MainPID")).filter(|pid| *pid > 0);
    let group = service.as_ref().ok().and_then(|unit| property(unit, "ControlGroup")).map(Path::new);
    let commands = group.map(|group| commands(&launch::cgroup::beside(group))).unwrap_or_default();
    Facts {
        descriptors: pid.map_or(Ok((0, u64::MAX)), descriptors),
        is_replaced: pid.map_or(Ok(false), is_replaced),
        commands,
        jobs: probe::systemctl(&["list-jobs", "--no-legend", "--plain", "--full"]).map(|text| jobs(&text)),
        has_crashed: probe::file(CRASHES).map(|text| text.bytes().any(|byte| byte != 0)),
        age_sec: pid.and_then(|pid| age_sec(u32::try_from(pid).ok()?)),
        settings: policy::settings_of_daemon(),
        halt: halt::collect(service.as_ref().ok()),
        service,
    }
}

fn descriptors(pid: u64) -> Known<(u64, u64)> {
    let open = probe::names(format!("/proc/{pid}/fd"))?.len() as u64;
    let limits = probe::file(format!("/proc/{pid}/limits"))?;
    let soft = limits.lines().find_map(|line| line.strip_prefix("Max open files")?.split_whitespace().next());
    Ok((open, soft.and_then(|word| word.parse().ok()).unwrap_or(u64::MAX)))
}

fn is_replaced(pid: u64) -> Known<bool> {
    let link = std::fs::read_link(format!("/proc/{pid}/exe"));
    let link = link.map_err(|_| probe::Unknown::Forbidden(format!("/proc/{pid}/exe")))?;
    Ok(link.to_string_lossy().ends_with(" (deleted)"))
}

/// The processes in a cgroup and below it.
fn commands(group: &Path) -> Vec<(u32, String, u64)> {
    let describe = |pid: u32| {
        let name = probe::file(format!("/proc/{pid}/comm")).ok()?.trim().to_owned();
        let is_command = !sys::guard::is_name_of_guard(&name);
        is_command.then_some((pid, name, age_sec(pid)?))
    };
    let pids = cgroup::processes::processes(group).unwrap_or_default();
    pids.into_iter().filter_map(describe).collect()
}

fn age_sec(pid: u32) -> Option<u64> {
    let ticks = sys::tree::started(pid)?;
    let per_second = nix::unistd::sysconf(nix::unistd::SysconfVar::CLK_TCK).ok()??;
    let uptime = probe::file("/proc/uptime").ok()?;
    let uptime: f64 = uptime.split_whitespace().next()?.parse().ok()?;
    Some((uptime as u64).saturating_sub(ticks / u64::try_from(per_second).ok()?.max(1)))
}

/// The lines of `systemctl list-jobs`: number, unit, kind, state.
fn jobs(text: &str) -> Vec<(String, String, String)> {
    let job = |line: &str| {
        let mut words = line.split_whitespace().skip(1).map(str::to_owned);
        Some((words.next()?, words.next()?, words.next()?))
    };
    text.lines().filter_map(job).filter(|(unit, ..)| unit.starts_with(PREFIX)).collect()
}

pub(super) fn checks(facts: &Facts) -> Vec<Check> {
    let service = match &facts.service {
        Ok(service) => service,
        Err(unknown) => return vec![Check::unknown("daemon", unknown)],
    };
    let mut checks = vec![halt::check(&facts.halt, service).unwrap_or_else(|| state(facts, service))];
    checks.extend(halt::socket(&facts.halt, service));
    checks.extend([crashes(facts), store(service)]);
    checks.push(match &facts.descriptors {
        Err(unknown) => Check::unknown("daemon-files", unknown),
        Ok((open, most)) if *open > most / 100 * MOST_PERCENT => {
            let advice = format!("systemctl restart {DAEMON_SERVICE}, and report what happened before");
            Check::warning(
                "daemon-files",
                format!("the daemon has {open} of {most} descriptors open"),
                advice,
            )
        }
        Ok((open, _)) => Check::ok("daemon-files", format!("the daemon has {open} descriptors open")),
    });
    checks.extend(operations(facts));
    checks
}

fn state(facts: &Facts, service: &Properties) -> Check {
    const NAME: &str = "daemon";
    let active = property(service, "ActiveState").unwrap_or("inactive");
    let restarts = property_number(service, "NRestarts").unwrap_or(0);
    let journal = format!("journalctl -u {DAEMON_SERVICE} says why");
    match active {
        "active" if facts.is_replaced == Ok(true) => Check::warning(
            NAME,
            "the program of the daemon was replaced since the daemon started",
            format!("systemctl restart {DAEMON_SERVICE}: safe with containers running"),
        ),
        "active" if restarts >= MANY_RESTARTS => {
            Check::warning(NAME, format!("systemd has restarted the daemon {restarts} times"), journal)
        }
        "active" => Check::ok(NAME, format!("the daemon runs; restarts: {restarts}")),
        "activating" if restarts >= MANY_STARTS && facts.age_sec.is_none_or(|age| age < JUST_STARTED_SEC) => {
            failing(facts, &format!("the daemon can't start; systemd has tried it {restarts} times"), journal)
        }
        "activating" => {
            Check::warning(NAME, format!("the daemon is starting; restarts: {restarts}"), journal)
        }
        "failed" => {
            let result = property(service, "Result").unwrap_or("failed");
            failing(facts, &format!("the daemon has failed: {result}"), journal)
        }
        _ => Check::ok(NAME, "the daemon does not run; the next container starts it"),
    }
}

/// A drop-in is a frequent reason.
fn failing(facts: &Facts, found: &str, journal: String) -> Check {
    match &facts.settings {
        None => Check::error("daemon", found, journal),
        Some(settings) => Check::error(
            "daemon",
            format!("{found}; its drop-ins set {settings}"),
            format!("{journal}; after a change of a drop-in, run systemctl daemon-reload"),
        ),
    }
}

fn crashes(facts: &Facts) -> Check {
    const NAME: &str = "crashes";
    match &facts.has_crashed {
        Ok(true) => {
            let advice = format!("journalctl -u {DAEMON_SERVICE} names the request or record: report it");
            Check::warning(NAME, "something has crashed the daemon since the machine was booted", advice)
        }
        Err(unknown) if !unknown.is_absent() => Check::unknown(NAME, unknown),
        _ => Check::ok(NAME, "none"),
    }
}

fn store(service: &Properties) -> Check {
    const NAME: &str = "store";
    let [used, most] = ["NFileDescriptorStore", "FileDescriptorStoreMax"]
        .map(|name| property_number(service, name).unwrap_or(0));
    let found = format!("{used} of {most} descriptors are in the descriptor store");
    if most > 0 && used > most / 100 * MOST_PERCENT {
        Check::warning(NAME, found, "delete containers and execs that have ended")
    } else {
        Check::ok(NAME, found)
    }
}

fn operations(facts: &Facts) -> Vec<Check> {
    const NAME: &str = "operations";
    let mut checks = Vec::new();
    for (pid, name, age) in &facts.commands {
        let most = if name.starts_with("containerd-shim") { CREATE_SEC } else { OPERATION_SEC };
        if *age > most {
            let found = format!("{name} (process {pid}) has been working for {age} s");
            let advice =
                format!("see what it waits for: cat /proc/{pid}/stack; kill -9 {pid} makes the call fail");
            checks.push(Check::warning(NAME, found, advice));
        }
    }
    match &facts.jobs {
        Err(unknown) => checks.push(Check::unknown(NAME, unknown)),
        Ok(jobs) => {
            checks.extend(jobs.iter().filter(|(.., state)| state == "waiting").map(|(unit, kind, _)| {
                let found = format!("systemd's {kind} job of {unit} waits for another unit");
                Check::warning(
                    NAME,
                    found,
                    format!("systemctl list-jobs --after, systemctl show -p After {}", view::in_shell(unit)),
                )
            }))
        }
    }
    if checks.is_empty() {
        checks.push(Check::ok(NAME, format!("{} under way, none hangs", facts.commands.len())));
    }
    checks
}

#[cfg(test)]
mod tests {
    use super::super::{Status, only_fault};
    use super::*;
    use crate::probe::{Unknown, properties};

    fn facts(more: &[(&str, &str)]) -> Facts {
        let mut service = properties(&[
            ("ActiveState", "active"),
            ("NRestarts", "1"),
            ("NFileDescriptorStore", "30"),
            ("FileDescriptorStoreMax", "12000"),
        ]);
        service.extend(properties(more));
        Facts {
            service: Ok(service),
            descriptors: Ok((40, 1 << 20)),
            is_replaced: Ok(false),
            commands: vec![(7, "runc".to_owned(), 3)],
            jobs: Ok(vec![]),
            has_crashed: Err(Unknown::Absent(CRASHES.to_owned())),
            age_sec: Some(60),
            settings: None,
            halt: halt::Facts::default(),
        }
    }

    fn fault(facts: &Facts) -> Check {
        only_fault(checks(facts))
    }

    #[test]
    fn a_daemon_that_runs_or_sleeps_is_ok() {
        assert!(checks(&facts(&[])).iter().all(|check| check.status == Status::Ok));
        assert!(
            checks(&facts(&[("ActiveState", "inactive")])).iter().all(|check| check.status == Status::Ok)
        );
    }

    #[test]
    fn failures_restarts_and_a_replaced_program_are_found() {
        assert_eq!(
            fault(&facts(&[("ActiveState", "failed"), ("Result", "exit-code")])).status,
            Status::Error
        );
        assert!(fault(&facts(&[("NRestarts", "900")])).found.contains("900"));
        let activating = || facts(&[("ActiveState", "activating"), ("NRestarts", "900")]);
        // It may have been killed often, and recover now.
        assert_eq!(fault(&activating()).status, Status::Warning);
        for age_sec in [None, Some(0)] {
            let settings = Some("ExecStartPre=false in /etc/x.conf".to_owned());
            let failing = fault(&Facts { age_sec, settings, ..activating() });
            assert_eq!(failing.status, Status::Error, "{failing:?}");
            assert!(failing.found.ends_with("900 times; its drop-ins set ExecStartPre=false in /etc/x.conf"));
            assert!(failing.advice.contains("journalctl") && failing.advice.contains("daemon-reload"));
        }
        assert!(fault(&Facts { is_replaced: Ok(true), ..facts(&[]) }).advice.contains("restart"));
        assert_eq!(fault(&Facts { has_crashed: Ok(true), ..facts(&[]) }).name, "crashes");
    }

    #[test]
    fn a_daemon_that_is_halted_is_not_reported_as_running() {
        let check = fault(&facts(&[("FreezerState", "frozen"), ("MainPID", "7")]));
        assert_eq!((check.name, check.status), ("daemon", Status::Error));
        let unmet = [("ActiveState", "inactive"), ("ConditionResult", "no")];
        assert_eq!(
            fault(&facts(&[&unmet[..], &[("ConditionTimestampMonotonic", "5")]].concat())).status,
            Status::Error
        );
        // systemd has not looked at the conditions of a service that was never started.
        assert!(checks(&facts(&unmet)).iter().all(|check| check.status == Status::Ok));
    }

    #[test]
    fn full_stores_are_found() {
        assert_eq!(fault(&facts(&[("NFileDescriptorStore", "11999")])).name, "store");
        assert_eq!(fault(&Facts { descriptors: Ok((1000, 1024)), ..facts(&[]) }).name, "daemon-files");
    }

    #[test]
    fn an_operation_that_hangs_is_named() {
        let commands = vec![(8, "runc".to_owned(), 500), (9, "containerd-shim".to_owned(), 500)];
        let check = fault(&Facts { commands, ..facts(&[]) });
        assert!(check.found.contains("runc (process 8)"), "{check:?}");
        let text = "12 containerd-default-web.service start waiting\n13 other.service start waiting\n";
        let check = fault(&Facts { jobs: Ok(jobs(text)), ..facts(&[]) });
        assert!(check.found.contains("containerd-default-web.service"), "{check:?}");
        let text = "12 containerd-a\\x2db-web.service start waiting\n";
        let check = fault(&Facts { jobs: Ok(jobs(text)), ..facts(&[]) });
        assert!(check.advice.ends_with(r"After containerd-a\\x2db-web.service"), "{check:?}");
    }

    #[test]
    fn a_user_who_may_not_read_the_state_gets_a_message() {
        let forbidden = Err(Unknown::Forbidden("/proc/1/fd".to_owned()));
        let check = fault(&Facts { descriptors: forbidden, ..facts(&[]) });
        assert_eq!((check.status, check.advice.as_str()), (Status::Unknown, "run doctor as root"));
    }

    #[test]
    fn the_age_of_a_process_is_known() {
        assert!(age_sec(std::process::id()).is_some_and(|age| age < 100_000));
    }
}
