//! The daemon's units: masked, stale, overridden.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use crate::unit::name::{DAEMON_SERVICE, DAEMON_SLICE, DAEMON_SOCKET, ORDER_SLICE};

use super::Check;
use crate::probe::{self, Known, Properties, property};
use crate::unit::policy;
use crate::unit::search_path::TRANSIENT;

/// The properties of the daemon's service on which its promises depend, and their good values.
const NEEDED: [(&str, &[&str]); 7] = [
    // Otherwise `systemctl stop` of the service, which is safe by the documents, loses the connections of all containers.
    ("FileDescriptorStorePreserve", &["yes"]),
    ("Restart", &["always"]),
    ("KillMode", &["process"]),
    ("NotifyAccess", &["main", "all"]),
    ("PrivateMounts", &["no"]),
    ("PrivateNetwork", &["no"]),
    ("RootDirectory", &[""]),
];

/// Properties of the daemon's service that drop-ins for all services can change to a harmful value, and their good values.
/// When the next container starts, the daemon makes a copy of such a drop-in without them (unit::service_d).
const HARMFUL: [(&str, &str); 8] = [
    ("ExitType", "main"),
    ("PAMName", ""),
    ("RefuseManualStart", "no"),
    ("RefuseManualStop", "no"),
    ("RuntimeMaxUSec", "infinity"),
    ("StopWhenUnneeded", "no"),
    ("Type", "notify"),
    ("UnsetEnvironment", ""),
];

/// The smallest usable size of the descriptor store. A smaller one holds the descriptors of too few containers.
const DESCRIPTORS: u64 = 1000;

/// The facts about the daemon's units.
#[derive(Debug)]
pub struct Facts {
    service: Known<Properties>,
    socket: Known<Properties>,
    slice: Known<Properties>,
    /// The slice that keeps the order of stops at shutdown.
    order: Known<Properties>,
    /// Files that units name and that do not exist.
    missing: Vec<PathBuf>,
    /// Drop-ins for namespaces that break containers, and those of the daemon that break it: path, setting, and what happens.
    harmful: Vec<(PathBuf, String, &'static str)>,
    /// Drop-ins for namespaces that restrict the OCI runtime, and their settings.
    restricting: BTreeMap<PathBuf, Vec<String>>,
}

pub(super) fn collect() -> Facts {
    let mut facts = collect_of_daemon();
    facts.harmful.extend(policy::harmful_for_namespaces());
    facts.restricting = policy::restricting_for_namespaces();
    facts
}

/// The facts without those about the units of containers.
pub(super) fn collect_of_daemon() -> Facts {
    let [service, socket, slice, order] =
        [DAEMON_SERVICE, DAEMON_SOCKET, DAEMON_SLICE, ORDER_SLICE].map(probe::show_one);
    let missing = service.iter().filter_map(program).filter(|path| !path.exists()).collect();
    let harmful = policy::harmful_for_daemon();
    Facts { service, socket, slice, order, missing, harmful, restricting: BTreeMap::new() }
}

/// The program in `ExecStart={ path=… ; argv[]=… }`.
fn program(service: &Properties) -> Option<PathBuf> {
    let command = property(service, "ExecStart")?;
    let path = command.split_once("path=")?.1.split_once(" ;")?.0;
    Some(Path::new(path).to_owned())
}

pub(super) fn checks(facts: &Facts) -> Vec<Check> {
    const NAME: &str = "units";
    let known = [&facts.service, &facts.socket, &facts.slice, &facts.order].map(Result::as_ref);
    let (service, socket, slice, order) = match known {
        [Ok(service), Ok(socket), Ok(slice), Ok(order)] => (service, socket, slice, order),
        [Err(unknown), ..] | [_, Err(unknown), ..] | [.., Err(unknown), _] | [.., Err(unknown)] => {
            return vec![Check::unknown(NAME, unknown)];
        }
    };
    let units =
        [(DAEMON_SERVICE, service), (DAEMON_SOCKET, socket), (DAEMON_SLICE, slice), (ORDER_SLICE, order)];
    // Some of these are the reason of what follows.
    let harmful = facts.harmful.iter().map(|(path, setting, effect)| {
        let found = format!("{} sets {setting}: {effect}", path.display());
        let advice = format!("remove {setting} from {}, then systemctl daemon-reload", path.display());
        Check::error(NAME, found, advice)
    });
    let loading = units.iter().flat_map(|(name, unit)| loading(name, unit));
    let mut checks: Vec<Check> = harmful.chain(loading).collect();
    for path in &facts.missing {
        let found = format!("{DAEMON_SERVICE} runs {}, which does not exist", path.display());
        checks.push(Check::error(NAME, found, "install the program again, or systemctl daemon-reload"));
    }
    checks.extend(overridden(service));
    let is_active = |unit| property(unit, "ActiveState") == Some("active");
    if is_active(service) && !is_active(order) {
        let found = format!(
            "{ORDER_SLICE} is not active, so at shutdown systemd may stop containerd before the containers"
        );
        checks.push(Check::warning(NAME, found, format!("systemctl restart {DAEMON_SERVICE}")));
    }
    checks.extend(for_all_services(service));
    checks.extend(facts.restricting.iter().filter_map(|(path, settings)| restricting(facts, path, settings)));
    if checks.is_empty() {
        let is_installed = property(service, "LoadState") == Some("loaded");
        // systemd keeps the property Transient of a unit that a package has taken over, until the next boot.
        let is_transient =
            property(service, "FragmentPath").is_some_and(|path| Path::new(path).starts_with(TRANSIENT));
        let is_listening = property(socket, "ActiveState") == Some("active");
        let found = match (is_installed, is_transient) {
            (false, _) => "not installed: the first container starts transient ones",
            (true, true) => "transient",
            (true, false) if is_listening => "installed, and the socket listens",
            (true, false) => "installed; the first container starts the socket",
        };
        checks.push(Check::ok(NAME, found));
    }
    let drop_ins: Vec<&str> = units
        .iter()
        .filter_map(|(_, unit)| property(unit, "DropInPaths"))
        .flat_map(str::split_whitespace)
        .collect();
    checks.push(match drop_ins.is_empty() {
        true => Check::ok("drop-ins", "none"),
        false => Check::ok("drop-ins", drop_ins.join(", ")),
    });
    checks
}

fn loading(name: &str, unit: &Properties) -> Vec<Check> {
    const NAME: &str = "units";
    let mut checks = Vec::new();
    match property(unit, "LoadState") {
        Some("masked") => {
            let advice = format!("systemctl unmask {name}");
            checks.push(Check::error(NAME, format!("{name} is masked"), advice));
        }
        Some("bad-setting" | "error") => {
            let reason = property(unit, "LoadError").unwrap_or("a setting is wrong");
            let advice = format!("systemd-analyze verify {name}");
            checks.push(Check::error(NAME, format!("{name} can't be loaded: {reason}"), advice));
        }
        _ => {}
    }
    if property(unit, "NeedDaemonReload") == Some("yes") {
        let found = format!("the files of {name} have changed since systemd read them");
        checks.push(Check::warning(NAME, found, "systemctl daemon-reload"));
    }
    if let Some(path) = property(unit, "FragmentPath")
        && path.starts_with("/etc/")
        && property(unit, "LoadState") != Some("masked")
    {
        let found = format!("{path} takes the place of the packaged unit");
        let advice = format!("remove it, and put changes into drop-ins: systemctl edit {name}");
        checks.push(Check::warning(NAME, found, advice));
    }
    checks
}

fn overridden(service: &Properties) -> Vec<Check> {
    const NAME: &str = "units";
    if property(service, "LoadState") != Some("loaded") {
        return Vec::new();
    }
    let by = match property(service, "DropInPaths") {
        Some(paths) => format!("look into {paths}"),
        None => "use the unit of this version".to_owned(),
    };
    let mut checks = Vec::new();
    for (name, wanted) in NEEDED {
        // Without the property, this systemd does not have the feature that would do harm.
        let Some(value) = service.get(name) else { continue };
        if !wanted.contains(&value.as_str()) {
            let found =
                format!("{DAEMON_SERVICE} has {name}={value}, and the daemon needs {name}={}", wanted[0]);
            checks.push(Check::error(NAME, found, by.clone()));
        }
    }
    let number = |name| probe::property_number(service, name);
    if let Some(most) = number("FileDescriptorStoreMax").filter(|most| *most < DESCRIPTORS) {
        let found = format!(
            "{DAEMON_SERVICE} has FileDescriptorStoreMax={most}: too few for its connections and streams"
        );
        checks.push(Check::error(NAME, found, by.clone()));
    }
    for name in ["MemoryMax", "MemoryHigh"] {
        if let Some(bytes) = number(name).filter(|bytes| *bytes < 64 << 20) {
            let found =
                format!("{DAEMON_SERVICE} has {name}={bytes}: with many containers the daemon needs more");
            checks.push(Check::warning(NAME, found, by.clone()));
        }
    }
    checks
}

/// Drop-ins for all services that the daemon is not protected from yet. Its service shows what they set.
fn for_all_services(service: &Properties) -> Vec<Check> {
    let paths = property(service, "DropInPaths").unwrap_or_default();
    let files: Vec<&str> = paths.split_whitespace().filter(|path| path.contains("/service.d/")).collect();
    if files.is_empty() {
        return Vec::new();
    }
    let check = |(name, wanted): &(&str, &str)| {
        // A property that this systemd does not have needs no change.
        let value = service.get(*name).filter(|value| value != wanted)?;
        let found = format!(
            "a drop-in for all services sets {name}={value}, which harms the daemon until the next container starts"
        );
        let advice = format!(
            "start a container, or remove the setting from {} and systemctl daemon-reload",
            files.join(" ")
        );
        Some(Check::warning("units", found, advice))
    };
    HARMFUL.iter().filter_map(check).collect()
}

/// A drop-in for a namespace with settings that restrict the OCI runtime. Another check may name some of them.
fn restricting(facts: &Facts, path: &Path, settings: &[String]) -> Option<Check> {
    let is_named = |setting: &&String| {
        !facts.harmful.iter().any(|(harmful, name, _)| harmful == path && name == *setting)
    };
    let settings: Vec<&str> = settings.iter().filter(is_named).map(String::as_str).collect();
    if settings.is_empty() {
        return None;
    }
    let found =
        format!("{} sets {}: containers of the namespace may not start", path.display(), settings.join(", "));
    let advice = "if containers can't be created, remove these settings, then systemctl daemon-reload";
    Some(Check::warning("units", found, advice))
}

#[cfg(test)]
mod tests {
    use super::super::{Status, only_fault};
    use super::*;
    use crate::probe::{Unknown, properties};

    fn service(more: &[(&str, &str)]) -> Properties {
        let usual = [
            ("LoadState", "loaded"),
            ("FragmentPath", "/usr/lib/systemd/system/containerd-shim-systemd-v1.service"),
            ("Restart", "always"),
            ("Type", "notify"),
            ("KillMode", "process"),
            ("NotifyAccess", "main"),
            ("RootDirectory", ""),
            ("FileDescriptorStoreMax", "12000"),
            ("FileDescriptorStorePreserve", "yes"),
            ("MemoryMax", "infinity"),
        ];
        let mut unit = properties(&usual);
        unit.extend(properties(more));
        unit
    }

    fn facts(more: &[(&str, &str)]) -> Facts {
        let loaded = properties(&[("LoadState", "loaded"), ("ActiveState", "active")]);
        Facts {
            service: Ok(service(more)),
            socket: Ok(loaded.clone()),
            slice: Ok(loaded.clone()),
            order: Ok(loaded),
            missing: vec![],
            harmful: vec![],
            restricting: BTreeMap::new(),
        }
    }

    #[test]
    fn a_daemon_without_the_slice_that_keeps_the_order_of_stops_is_found() {
        let stopped = || Ok(properties(&[("LoadState", "loaded"), ("ActiveState", "inactive")]));
        let check = fault(&Facts { order: stopped(), ..facts(&[("ActiveState", "active")]) });
        assert_eq!(check.status, Status::Warning);
        assert!(check.found.starts_with(ORDER_SLICE), "{check:?}");
        // It is started with the daemon.
        assert_eq!(checks(&Facts { order: stopped(), ..facts(&[]) })[0].status, Status::Ok);
    }

    fn fault(facts: &Facts) -> Check {
        only_fault(checks(facts))
    }

    #[test]
    fn packaged_and_transient_units_are_ok() {
        assert_eq!(checks(&facts(&[]))[0].found, "installed, and the socket listens");
        let transient = ("FragmentPath", "/run/systemd/transient/containerd-shim-systemd-v1.service");
        assert_eq!(checks(&facts(&[transient]))[0].found, "transient");
        // A package has taken it over.
        assert_eq!(checks(&facts(&[("Transient", "yes")]))[0].found, "installed, and the socket listens");
        let absent = Ok(properties(&[("LoadState", "not-found")]));
        let facts = Facts { service: absent.clone(), socket: absent.clone(), slice: absent, ..facts(&[]) };
        assert!(checks(&facts).iter().all(|check| check.status == Status::Ok));
        assert!(checks(&facts)[0].found.starts_with("not installed"));
    }

    #[test]
    fn a_masked_unit_is_found() {
        let path = "/etc/systemd/system/containerd-shim-systemd-v1.socket";
        let masked = Ok(properties(&[("LoadState", "masked"), ("FragmentPath", path)]));
        let check = fault(&Facts { socket: masked, ..facts(&[]) });
        assert_eq!(check.status, Status::Error);
        assert_eq!(check.advice, format!("systemctl unmask {DAEMON_SOCKET}"));
        assert!(fault(&facts(&[("LoadState", "masked")])).found.contains(DAEMON_SERVICE));
    }

    #[test]
    fn stale_replaced_and_broken_units_are_found() {
        assert_eq!(fault(&facts(&[("NeedDaemonReload", "yes")])).advice, "systemctl daemon-reload");
        let replaced =
            fault(&facts(&[("FragmentPath", "/etc/systemd/system/containerd-shim-systemd-v1.service")]));
        assert_eq!(replaced.status, Status::Warning);
        assert!(fault(&facts(&[("LoadState", "bad-setting")])).advice.contains("verify"));
        let missing = vec![PathBuf::from("/usr/bin/gone")];
        assert!(fault(&Facts { missing, ..facts(&[]) }).found.contains("/usr/bin/gone"));
    }

    #[test]
    fn a_drop_in_that_breaks_the_daemon_is_named() {
        let drop_in = ("DropInPaths", "/etc/systemd/system/service.d/all.conf");
        for (name, value) in [
            ("Restart", "no"),
            ("KillMode", "control-group"),
            ("FileDescriptorStoreMax", "0"),
            ("FileDescriptorStorePreserve", "no"),
            ("FileDescriptorStorePreserve", "restart"),
            ("PrivateNetwork", "yes"),
            ("RootDirectory", "/jail"),
        ] {
            let check = fault(&facts(&[drop_in, (name, value)]));
            assert!(check.found.contains(name) && check.advice.contains("all.conf"), "{check:?}");
            assert_eq!(check.status, Status::Error);
        }
        assert_eq!(fault(&facts(&[drop_in, ("MemoryMax", "1048576")])).status, Status::Warning);
    }

    #[test]
    fn a_drop_in_that_breaks_containers_is_named() {
        let own = ("DropInPaths", "/etc/systemd/system/containerd-shim-systemd-v1.service.d/a.conf");
        let all = ("DropInPaths", "/etc/systemd/system/service.d/all.conf");
        let check = fault(&facts(&[all, ("Type", "simple")]));
        assert!(check.found.contains("Type=simple") && check.advice.contains("all.conf"), "{check:?}");
        assert!(for_all_services(&service(&[own, ("RefuseManualStop", "yes")])).is_empty());
        for harmless in [("PrivateDevices", "yes"), ("RuntimeMaxUSec", "infinity"), ("PAMName", "")] {
            assert!(for_all_services(&service(&[all, harmless])).is_empty(), "{harmless:?}");
        }
        let harmful = (PathBuf::from("/etc/x.conf"), "Type=simple".to_owned(), "no container can be created");
        let check = fault(&Facts { harmful: vec![harmful], ..facts(&[]) });
        assert_eq!(check.found, "/etc/x.conf sets Type=simple: no container can be created");
        assert!(check.advice.contains("remove Type=simple from /etc/x.conf"), "{check:?}");
    }

    #[test]
    fn a_drop_in_that_restricts_containers_is_named_once() {
        let path = PathBuf::from("/etc/x.conf");
        let settings = ["User=nobody", "PrivatePIDs=yes"].map(str::to_owned).to_vec();
        let with =
            |harmful| Facts { restricting: [(path.clone(), settings.clone())].into(), harmful, ..facts(&[]) };
        let check = fault(&with(vec![]));
        assert_eq!(check.status, Status::Warning);
        assert!(check.found.starts_with("/etc/x.conf sets User=nobody, PrivatePIDs=yes: "), "{check:?}");
        let found = checks(&with(vec![(path.clone(), settings[1].clone(), "no container can be created")]));
        let warning = found.iter().find(|check| check.status == Status::Warning).unwrap();
        assert!(warning.found.starts_with("/etc/x.conf sets User=nobody: "), "{found:?}");
    }

    #[test]
    fn the_program_of_a_unit_is_read() {
        let command = "{ path=/usr/bin/x ; argv[]=/usr/bin/x serve ; ignore_errors=no ; status=0/0 }";
        assert_eq!(program(&properties(&[("ExecStart", command)])), Some(PathBuf::from("/usr/bin/x")));
    }

    #[test]
    fn without_systemctl_nothing_is_claimed() {
        let unknown = Err(Unknown::Absent("systemctl".to_owned()));
        assert_eq!(checks(&Facts { service: unknown, ..facts(&[]) })[0].status, Status::Unknown);
    }
}
