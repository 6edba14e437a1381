//! systemd, the kernel and cgroups.

use std::path::Path;

use crate::cgroup;
use crate::config::OLDEST_SYSTEMD;
use crate::sys;
use crate::unit::properties::SystemdVersion;

use super::{Check, bus};
use crate::probe::{self, Known, Properties, property};

/// The controllers without which limits of containers have no effect.
const CONTROLLERS: [&str; 5] = ["cpu", "cpuset", "io", "memory", "pids"];

const JOURNALD: [&str; 2] = ["systemd-journald.service", "systemd-journald.socket"];

/// The facts about the host.
#[derive(Debug)]
pub struct Facts {
    is_init: bool,
    version: Known<String>,
    release: String,
    has_pidfd: bool,
    has_cgroup_kill: bool,
    is_unified: bool,
    controllers: Known<String>,
    /// Its service, and the socket that starts it.
    journald: [Known<Properties>; 2],
}

pub(super) fn collect() -> Facts {
    let release = nix::sys::utsname::uname().map(|uname| uname.release().to_string_lossy().into_owned());
    let scope = cgroup::dir(Path::new("/init.scope"));
    Facts {
        is_init: Path::new("/run/systemd/system").is_dir(),
        version: probe::output("systemctl", &["--version"]),
        release: release.unwrap_or_default(),
        has_pidfd: sys::pidfd_open(std::process::id()).is_ok(),
        // Without cgroup v2 or without systemd, there is no such cgroup, and other checks report that.
        has_cgroup_kill: !scope.is_dir() || scope.join("cgroup.kill").exists(),
        is_unified: cgroup::is_unified(),
        controllers: probe::file("/sys/fs/cgroup/cgroup.controllers"),
        journald: JOURNALD.map(probe::show_one),
    }
}

pub(super) fn checks(facts: &Facts, bus: &bus::Facts) -> Vec<Check> {
    let mut checks = vec![systemd(facts, bus), kernel(facts), hierarchy(facts)];
    // cgroup v1 has no such file.
    checks.extend(facts.is_unified.then(|| controllers(facts)));
    checks.push(journal(facts));
    checks
}

fn journal(facts: &Facts) -> Check {
    const NAME: &str = "journal";
    let units = match &facts.journald {
        [Ok(service), Ok(socket)] => [service, socket],
        [Err(unknown), _] | [_, Err(unknown)] => return Check::unknown(NAME, unknown),
    };
    let is_up = |unit: &Properties| matches!(property(unit, "ActiveState"), Some("active" | "activating"));
    if units.into_iter().any(is_up) {
        Check::ok(NAME, "systemd-journald runs")
    } else {
        let found =
            "systemd-journald does not run, so the daemon's log and the output of containers are lost";
        Check::warning(NAME, found, format!("systemctl start {}", JOURNALD.join(" ")))
    }
}

fn systemd(facts: &Facts, bus: &bus::Facts) -> Check {
    const NAME: &str = "systemd";
    if !facts.is_init {
        let advice = "run containerd on a machine, in a VM or in a container that systemd has booted";
        return Check::error(NAME, "systemd is not the init system here", advice);
    }
    // The version that runs is the one that matters: the package may have been upgraded after the boot.
    let version = match (&bus.version, &facts.version) {
        (Ok(version), _) => version,
        (Err(_), Ok(text)) => text.split_whitespace().nth(1).unwrap_or_default(),
        (Err(_), Err(unknown)) => return Check::unknown(NAME, unknown),
    };
    let Some(systemd) = SystemdVersion::parse(version) else {
        return Check::warning(
            NAME,
            format!("the version of systemd is {version:?}"),
            format!("check that it is {OLDEST_SYSTEMD} or newer"),
        );
    };
    let number = systemd.number();
    if !systemd.supported() {
        return Check::error(
            NAME,
            format!("systemd {number} is too old"),
            format!("upgrade the distribution: systemd {OLDEST_SYSTEMD} or newer is needed"),
        );
    }
    if !systemd.has_fd_store_preserve() {
        // A stop of the daemon closes its connections.
        return Check::ok(
            NAME,
            format!(
                "systemd {number}; restart the daemon if you have to, but do not stop it while containers run"
            ),
        );
    }
    Check::ok(NAME, format!("systemd {number} is the init system"))
}

fn kernel(facts: &Facts) -> Check {
    const NAME: &str = "kernel";
    if !facts.has_cgroup_kill {
        let found = format!(
            "Linux {} has no cgroup.kill, without which a whole container can't be killed",
            facts.release
        );
        Check::error(NAME, found, "boot Linux 5.14 or newer")
    } else if !facts.has_pidfd {
        let found = format!("Linux {} has no pidfd_open(2), or a filter forbids it", facts.release);
        Check::error(NAME, found, "allow pidfd_open(2) where this machine is confined")
    } else {
        Check::ok(NAME, format!("Linux {}", facts.release))
    }
}

fn hierarchy(facts: &Facts) -> Check {
    const NAME: &str = "cgroup";
    if facts.is_unified {
        Check::ok(NAME, "cgroup v2 is mounted at /sys/fs/cgroup")
    } else {
        let advice = "boot with systemd.unified_cgroup_hierarchy=1 on the kernel's command line";
        Check::error(NAME, "/sys/fs/cgroup is not cgroup v2", advice)
    }
}

fn controllers(facts: &Facts) -> Check {
    const NAME: &str = "controllers";
    let present = match &facts.controllers {
        Ok(present) => present,
        Err(unknown) => return Check::unknown(NAME, unknown),
    };
    let present: Vec<&str> = present.split_whitespace().collect();
    let missing: Vec<&str> = CONTROLLERS.into_iter().filter(|name| !present.contains(name)).collect();
    if missing.is_empty() {
        Check::ok(NAME, CONTROLLERS.join(", "))
    } else {
        let found = format!(
            "cgroup v2 lacks {}: limits of containers that need them fail or have no effect",
            missing.join(", ")
        );
        let advice =
            "remove cgroup_disable= from the kernel's command line, and mount no cgroup v1 hierarchy";
        Check::warning(NAME, found, advice)
    }
}

#[cfg(test)]
mod tests {
    use super::super::Status;
    use super::*;
    use crate::probe::{Unknown, properties};

    fn healthy() -> Facts {
        Facts {
            is_init: true,
            version: Ok("systemd 257 (257.9-1)\n+PAM".to_owned()),
            release: "6.12.0".to_owned(),
            has_pidfd: true,
            has_cgroup_kill: true,
            is_unified: true,
            controllers: Ok("cpuset cpu io memory hugetlb pids\n".to_owned()),
            journald: ["active", "active"].map(unit),
        }
    }

    fn unit(state: &str) -> Known<Properties> {
        Ok(properties(&[("ActiveState", state)]))
    }

    fn silent() -> bus::Facts {
        bus::Facts { version: Err("no answer".to_owned()), refused: None, limits: Vec::new(), types: None }
    }

    fn found(facts: &Facts, bus: &bus::Facts) -> Vec<(&'static str, Status)> {
        checks(facts, bus).iter().map(|check| (check.name, check.status)).collect()
    }

    fn all_but(name: &'static str, status: Status) -> Vec<(&'static str, Status)> {
        let names = ["systemd", "kernel", "cgroup", "controllers", "journal"];
        names.into_iter().map(|each| (each, if each == name { status } else { Status::Ok })).collect()
    }

    #[test]
    fn a_healthy_host_has_nothing_to_do() {
        assert_eq!(found(&healthy(), &silent()), all_but("", Status::Ok));
    }

    #[test]
    fn an_old_systemd_is_found_by_what_runs() {
        let bus = bus::Facts { version: Ok("v251.4".to_owned()), ..silent() };
        assert_eq!(found(&healthy(), &bus), all_but("systemd", Status::Error));
        let facts = Facts { version: Ok("systemd 249 (249.11)".to_owned()), ..healthy() };
        assert_eq!(found(&facts, &silent()), all_but("systemd", Status::Error));
        let check = &checks(&facts, &silent())[0];
        assert!(check.found.contains("249") && check.advice.contains("252"), "{check:?}");
    }

    #[test]
    fn a_machine_without_systemd_is_reported() {
        let facts =
            Facts { is_init: false, version: Err(Unknown::Absent("systemctl".to_owned())), ..healthy() };
        assert_eq!(found(&facts, &silent()), all_but("systemd", Status::Error));
    }

    #[test]
    fn cgroup_v1_and_missing_controllers_are_found() {
        let facts = Facts { is_unified: false, ..healthy() };
        let mut expected = all_but("cgroup", Status::Error);
        expected.retain(|(name, _)| *name != "controllers");
        assert_eq!(found(&facts, &silent()), expected);
        let facts = Facts { controllers: Ok("cpu memory".to_owned()), ..healthy() };
        assert_eq!(found(&facts, &silent()), all_but("controllers", Status::Warning));
        assert!(checks(&facts, &silent())[3].found.contains("cpuset, io, pids"));
    }

    #[test]
    fn a_machine_without_a_journal_is_reported() {
        let with = |service, socket| Facts { journald: [service, socket].map(unit), ..healthy() };
        // The socket starts the service.
        assert_eq!(found(&with("inactive", "active"), &silent()), all_but("", Status::Ok));
        assert_eq!(found(&with("inactive", "inactive"), &silent()), all_but("journal", Status::Warning));
    }

    #[test]
    fn an_old_kernel_is_found() {
        for facts in [Facts { has_pidfd: false, ..healthy() }, Facts { has_cgroup_kill: false, ..healthy() }]
        {
            assert_eq!(found(&facts, &silent()), all_but("kernel", Status::Error));
        }
    }
}
