//! What halts the daemon although its service has not failed: it is frozen, stopped by a signal, or not started.

use crate::unit::name::{DAEMON_SERVICE, DAEMON_SLICE, DAEMON_SOCKET, WAKE_SERVICE};
use crate::unit::policy;

use super::Check;
use crate::probe::{self, Properties, property, property_number};
use crate::view::{self, Survey};

const NAME: &str = "daemon";

/// The facts about it. What is not known is taken for harmless.
#[derive(Debug, Default)]
pub struct Facts {
    slice: Properties,
    socket: Properties,
    /// Whether a signal has stopped its process (SIGSTOP).
    is_stopped_by_signal: bool,
    /// The conditions and assertions in the drop-ins of its service, each with its file.
    conditions: Option<String>,
    /// How many containers run while the daemon does not, and nothing waits for calls in its place.
    unserved: usize,
}

pub(super) fn collect(service: Option<&Properties>) -> Facts {
    let Some(service) = service else { return Facts::default() };
    let pid = pid(service);
    Facts {
        slice: probe::show_one(DAEMON_SLICE).unwrap_or_default(),
        socket: probe::show_one(DAEMON_SOCKET).unwrap_or_default(),
        is_stopped_by_signal: pid
            .and_then(|pid| probe::file(format!("/proc/{pid}/stat")).ok())
            .is_some_and(|stat| is_stopped(&stat)),
        conditions: policy::conditions_of(DAEMON_SERVICE),
        unserved: if is_inactive(service) { unserved() } else { 0 },
    }
}

fn pid(service: &Properties) -> Option<u64> {
    property_number(service, "MainPID").filter(|pid| *pid > 0)
}

fn is_inactive(unit: &Properties) -> bool {
    property(unit, "ActiveState").is_none_or(|state| state == "inactive")
}

/// The state follows the name of the program, which is in parentheses and may contain any character (proc_pid_stat(5)).
fn is_stopped(stat: &str) -> bool {
    stat.rsplit_once(')').is_some_and(|(_, fields)| fields.trim_start().starts_with('T'))
}

fn unserved() -> usize {
    let wake = probe::show_one(WAKE_SERVICE);
    if !wake.is_ok_and(|wake| is_inactive(&wake)) {
        return 0;
    }
    let rows = view::rows(&Survey::collect());
    rows.iter().filter(|row| row.pid.is_some() && !row.is_given_up).count()
}

/// What halts the daemon.
pub(super) fn check(facts: &Facts, service: &Properties) -> Option<Check> {
    frozen(facts, service).or_else(|| not_started(facts, service))
}

fn frozen(facts: &Facts, service: &Properties) -> Option<Check> {
    let state = |unit| property(unit, "FreezerState").unwrap_or("running");
    let is_frozen = state(service) == "frozen";
    let is_slice_frozen = state(&facts.slice) == "frozen" || state(service) == "frozen-by-parent";
    let (found, advice) = match (is_frozen, is_slice_frozen, pid(service)) {
        // "Cannot start frozen unit"; and systemd thaws only units that are active.
        (true, _, None) => (
            format!(
                "the daemon has ended while {DAEMON_SERVICE} was frozen; systemd can't start this service any more"
            ),
            "reboot the machine: nothing else thaws a service without a process".to_owned(),
        ),
        (false, true, None) => (
            format!("{DAEMON_SLICE} is frozen, so the daemon can't start"),
            format!("systemctl thaw {DAEMON_SLICE} && systemctl start {DAEMON_SERVICE}"),
        ),
        (true, true, Some(_)) => (
            format!("{DAEMON_SLICE} and {DAEMON_SERVICE} are frozen, so the daemon answers no calls"),
            format!("systemctl thaw {DAEMON_SLICE} {DAEMON_SERVICE}"),
        ),
        (true, false, Some(_)) => (
            format!("{DAEMON_SERVICE} is frozen, so the daemon answers no calls"),
            format!("systemctl thaw {DAEMON_SERVICE}"),
        ),
        (false, true, Some(_)) => (
            format!("{DAEMON_SLICE} is frozen, so the daemon answers no calls"),
            format!("systemctl thaw {DAEMON_SLICE}"),
        ),
        (false, false, Some(pid)) if facts.is_stopped_by_signal => (
            format!("a signal has stopped the daemon (process {pid}), so it answers no calls"),
            format!("kill -CONT {pid}"),
        ),
        (false, false, _) => return None,
    };
    Some(Check::error(NAME, found, advice))
}

fn not_started(facts: &Facts, service: &Properties) -> Option<Check> {
    let start = format!("systemctl start {DAEMON_SERVICE}");
    if property(service, "SubState") == Some("auto-restart-queued") && property(service, "Job").is_none() {
        let found = "systemd was about to restart the daemon, and has lost the job for it";
        return Some(Check::error(NAME, found, start));
    }
    if !is_inactive(service) {
        return None;
    }
    let is_unmet = |result, timestamp| {
        // Without a time stamp, systemd has not looked at them since the boot.
        property(service, result) == Some("no")
            && property_number(service, timestamp).is_some_and(|at| at > 0)
    };
    let unmet = [
        ("a condition", "ConditionResult", "ConditionTimestampMonotonic"),
        ("an assertion", "AssertResult", "AssertTimestampMonotonic"),
    ];
    if let Some((kind, ..)) = unmet.iter().find(|(_, result, timestamp)| is_unmet(result, timestamp)) {
        let by = match (&facts.conditions, property(service, "DropInPaths")) {
            (Some(conditions), _) => format!("; its drop-ins set {conditions}"),
            (None, Some(paths)) => format!("; its drop-ins are {paths}"),
            (None, None) => String::new(),
        };
        let found =
            format!("systemd does not start the daemon, because {kind} of {DAEMON_SERVICE} is not met{by}");
        let advice = format!("remove the setting, then systemctl daemon-reload && {start}");
        return Some(Check::error(NAME, found, advice));
    }
    (facts.unserved > 0).then(|| {
        let found = format!(
            "the daemon does not run, and containerd's calls for the {} containers that run do not start it",
            facts.unserved
        );
        Check::error(NAME, found, start)
    })
}

/// A socket that has failed starts no daemon.
pub(super) fn socket(facts: &Facts, service: &Properties) -> Option<Check> {
    let socket = &facts.socket;
    if property(socket, "ActiveState") != Some("failed") || property(socket, "LoadState") != Some("loaded") {
        return None;
    }
    let result = property(socket, "Result").unwrap_or("failed");
    // systemd starts no socket while its service runs.
    let advice = match is_inactive(service) || property(service, "ActiveState") == Some("failed") {
        true => format!(
            "correct what keeps the daemon from starting, then systemctl reset-failed {DAEMON_SOCKET} && systemctl start {DAEMON_SOCKET} {DAEMON_SERVICE}"
        ),
        false => {
            // Before systemd 254, a stop of the daemon closes its connections.
            let first = match property(service, "FileDescriptorStorePreserve") {
                Some("yes") => "",
                _ => "end all containers, because containerd loses its connections to them; then ",
            };
            format!(
                "{first}systemctl stop {DAEMON_SERVICE} && systemctl start {DAEMON_SOCKET} {DAEMON_SERVICE}"
            )
        }
    };
    Some(Check::error(NAME, format!("{DAEMON_SOCKET} has failed: {result}"), advice))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::probe::properties;

    fn facts() -> Facts {
        Facts::default()
    }

    /// What is found and what is advised about a daemon with these properties of its service.
    fn said(facts: &Facts, service: &[(&str, &str)]) -> Option<String> {
        check(facts, &properties(service)).map(|check| format!("{}: {}", check.found, check.advice))
    }

    #[test]
    fn a_frozen_daemon_is_thawed_with_what_is_frozen() {
        let frozen_slice = || Facts { slice: properties(&[("FreezerState", "frozen")]), ..facts() };
        for (facts, freezer, advice) in [
            (facts(), "frozen", format!("thaw {DAEMON_SERVICE}")),
            (frozen_slice(), "running", format!("thaw {DAEMON_SLICE}")),
            (frozen_slice(), "frozen-by-parent", format!("thaw {DAEMON_SLICE}")),
            (frozen_slice(), "frozen", format!("thaw {DAEMON_SLICE} {DAEMON_SERVICE}")),
        ] {
            let said =
                said(&facts, &[("ActiveState", "active"), ("MainPID", "7"), ("FreezerState", freezer)]);
            assert!(said.as_ref().is_some_and(|said| said.ends_with(&advice)), "{said:?}");
        }
        let running = [("ActiveState", "active"), ("MainPID", "7"), ("FreezerState", "running")];
        assert_eq!(said(&facts(), &running), None);
    }

    #[test]
    fn a_daemon_that_has_ended_while_it_was_frozen_needs_a_reboot() {
        for active in ["inactive", "failed", "activating"] {
            let said =
                said(&facts(), &[("ActiveState", active), ("MainPID", "0"), ("FreezerState", "frozen")]);
            assert!(said.as_ref().is_some_and(|said| said.contains("reboot")), "{said:?}");
        }
        let slice = properties(&[("FreezerState", "frozen")]);
        let said =
            said(&Facts { slice, ..facts() }, &[("ActiveState", "activating"), ("MainPID", "0")]).unwrap();
        let advice = format!("systemctl thaw {DAEMON_SLICE} && systemctl start {DAEMON_SERVICE}");
        assert!(said.ends_with(&advice), "{said}");
    }

    #[test]
    fn a_daemon_that_a_signal_has_stopped_is_found() {
        assert!(is_stopped("7 (a) S 1) T 1 7"));
        assert!(!is_stopped("7 (a) T 1) S 1 7") && !is_stopped(""));
        let service = [("ActiveState", "active"), ("MainPID", "7")];
        let stopped = said(&Facts { is_stopped_by_signal: true, ..facts() }, &service).unwrap();
        assert!(stopped.ends_with("kill -CONT 7"), "{stopped}");
    }

    #[test]
    fn a_condition_that_is_not_met_is_named_with_its_file() {
        let conditions = Some("ConditionPathExists=/x in /etc/a.conf".to_owned());
        let facts = Facts { conditions, unserved: 1, ..facts() };
        for (result, timestamp, kind) in [
            ("ConditionResult", "ConditionTimestampMonotonic", "a condition"),
            ("AssertResult", "AssertTimestampMonotonic", "an assertion"),
        ] {
            let service = [("ActiveState", "inactive"), (result, "no"), (timestamp, "9")];
            let said = said(&facts, &service).unwrap();
            assert!(said.contains(kind) && said.contains("ConditionPathExists=/x in /etc/a.conf"), "{said}");
        }
        // The conditions were met at the start of a daemon that runs.
        let active =
            [("ActiveState", "active"), ("ConditionResult", "no"), ("ConditionTimestampMonotonic", "9")];
        assert_eq!(said(&facts, &active), None);
    }

    #[test]
    fn a_daemon_that_nothing_starts_is_found() {
        let start = format!(": systemctl start {DAEMON_SERVICE}");
        let unserved = said(&Facts { unserved: 3, ..facts() }, &[("ActiveState", "inactive")]).unwrap();
        assert!(unserved.contains("3 containers") && unserved.ends_with(&start), "{unserved}");
        assert_eq!(said(&facts(), &[("ActiveState", "inactive")]), None);
        let queued = [("ActiveState", "activating"), ("SubState", "auto-restart-queued")];
        assert!(said(&facts(), &queued).is_some_and(|said| said.ends_with(&start)));
        assert_eq!(said(&facts(), &[&queued[..], &[("Job", "12")]].concat()), None);
    }

    #[test]
    fn a_socket_that_has_failed_is_found() {
        let unit = |active| {
            properties(&[("LoadState", "loaded"), ("ActiveState", active), ("Result", "trigger-limit-hit")])
        };
        let with = |active, service: &[(&str, &str)]| {
            socket(&Facts { socket: unit(active), ..facts() }, &properties(service))
        };
        let of = |active, service| with(active, &[("ActiveState", service)]);
        let check = of("failed", "inactive").unwrap();
        assert!(
            check.found.ends_with("trigger-limit-hit") && check.advice.contains("reset-failed"),
            "{check:?}"
        );
        let keeps = [("ActiveState", "active"), ("FileDescriptorStorePreserve", "yes")];
        let stop = format!("systemctl stop {DAEMON_SERVICE}");
        assert!(with("failed", &keeps).unwrap().advice.starts_with(&stop));
        let loses = of("failed", "active").unwrap().advice;
        assert!(loses.starts_with("end all containers") && loses.contains(&stop), "{loses}");
        assert_eq!(of("active", "active"), None);
    }
}
