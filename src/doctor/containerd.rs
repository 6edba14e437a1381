//! containerd, this program in its `PATH`, and how it is configured.

use std::path::{Path, PathBuf};

use crate::oci::options::find;
use crate::unit::name::DAEMON;

use super::configuration::{CONFIG, RANCHER};
use super::running::{Running, Search, numbers};
use super::{Check, bus, configuration, running};
use crate::probe::{self, Known, Properties};

/// The oldest containerd that is tested.
const OLDEST_CONTAINERD: (u32, u32) = (1, 6);

/// Where a containerd listens: its own service, k3s and RKE2, Docker, MicroK8s.
const SOCKETS: [&str; 4] = [
    "/run/containerd/containerd.sock",
    "/run/k3s/containerd/containerd.sock",
    "/run/docker/containerd/containerd.sock",
    "/var/snap/microk8s/common/run/containerd.sock",
];

/// The facts about containerd, Docker and the OCI runtimes.
#[derive(Debug)]
pub struct Facts {
    version: Known<String>,
    service: Known<Properties>,
    /// The containerds that run.
    running: Vec<Running>,
    /// The sockets that exist.
    sockets: Vec<&'static str>,
    search: Search,
    /// Where containerd finds this program.
    shim: Option<PathBuf>,
    configuration: configuration::Facts,
}

pub(super) fn collect() -> Facts {
    let service = probe::show_one("containerd.service");
    let running = running::collect();
    let search = running::search(&running, service.as_ref().ok());
    let named = running.iter().filter_map(|each| each.config.clone());
    let mains = [CONFIG].into_iter().chain(RANCHER).map(PathBuf::from).chain(named).collect();
    Facts {
        version: version(&search.path),
        service,
        running,
        sockets: SOCKETS.into_iter().filter(|socket| Path::new(socket).exists()).collect(),
        shim: search.path.split(':').map(|dir| Path::new(dir).join(DAEMON)).find(|path| path.is_file()),
        configuration: configuration::collect(mains, &search.path),
        search,
    }
}

/// The version of the containerd in this user's `PATH`, or else in that of a containerd.
fn version(path: &str) -> Known<String> {
    match probe::output("containerd", &["--version"]) {
        Err(unknown) if unknown.is_absent() => match find("containerd", path) {
            Some(program) => probe::output(&program.to_string_lossy(), &["--version"]),
            None => Err(unknown),
        },
        known => known,
    }
}

pub(super) fn checks(facts: &Facts, bus: &bus::Facts) -> Vec<Check> {
    let configured = configuration::checks(&facts.configuration, &facts.search, bus.types.as_deref());
    [vec![containerd(facts), installation(facts)], configured].concat()
}

fn containerd(facts: &Facts) -> Check {
    const NAME: &str = "containerd";
    let version = match &facts.version {
        Ok(text) => text.split_whitespace().nth(2).unwrap_or_default().trim_start_matches('v'),
        Err(unknown) if unknown.is_absent() => return elsewhere(facts),
        Err(unknown) => return Check::unknown(NAME, unknown),
    };
    let state = |unit: &Properties| probe::property(unit, "ActiveState").unwrap_or("inactive").to_owned();
    if numbers(version).is_some_and(|found| found < OLDEST_CONTAINERD) {
        let (major, minor) = OLDEST_CONTAINERD;
        return Check::error(
            NAME,
            format!("containerd {version} is too old"),
            format!("upgrade it to {major}.{minor} or newer"),
        );
    }
    let runs = !facts.running.is_empty() || !facts.sockets.is_empty();
    match &facts.service {
        // Docker and k3s have a containerd of their own.
        Ok(unit) if state(unit) != "active" && !runs => Check::warning(
            NAME,
            format!("containerd {version} is installed, containerd.service is {}", state(unit)),
            "systemctl start containerd, if nothing else starts it",
        ),
        _ => Check::ok(NAME, format!("containerd {version}")),
    }
}

/// A containerd that is in no known `PATH`, such as that of k3s for a user who may not read the environment of k3s.
fn elsewhere(facts: &Facts) -> Check {
    const NAME: &str = "containerd";
    let kubernetes = facts.configuration.files.iter().find(|(path, text)| {
        RANCHER.iter().any(|of| path == Path::new(of))
            && text.as_ref().err().is_none_or(|why| !why.is_absent())
    });
    match (&facts.running[..], &facts.sockets[..], kubernetes) {
        ([first, ..], ..) => {
            Check::ok(NAME, format!("a containerd of another program runs (process {})", first.pid))
        }
        ([], [first, ..], _) => Check::ok(NAME, format!("a containerd of another program has {first}")),
        ([], [], Some((path, _))) => Check::warning(
            NAME,
            format!("no containerd runs, but there is {}", path.display()),
            "start k3s or RKE2, if this machine is a node",
        ),
        ([], [], None) => Check::error(
            NAME,
            "containerd is not in this user's PATH, and none runs",
            "install it: apt install containerd, or dnf install containerd",
        ),
    }
}

fn installation(facts: &Facts) -> Check {
    const NAME: &str = "installation";
    match (&facts.shim, &facts.search.guessed) {
        (Some(path), _) => Check::ok(NAME, format!("containerd finds {}", path.display())),
        (None, Some(unknown)) => Check::unknown(NAME, unknown),
        (None, None) => {
            let found = format!("{DAEMON} is not in containerd's PATH, {}", facts.search.path);
            Check::error(NAME, found, "install the program into one of these directories")
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Status, only_fault};
    use super::*;
    use crate::probe::Unknown;
    use std::collections::BTreeMap;

    fn absent() -> Known<String> {
        Err(Unknown::Absent("x".to_owned()))
    }

    fn healthy() -> Facts {
        let runc = (PathBuf::from("/usr/sbin/runc"), Ok("runc version 1.1.15+ds1\ncommit: 1".to_owned()));
        Facts {
            version: Ok("containerd github.com/containerd/containerd 1.7.24~ds1 1.7.24".to_owned()),
            service: Ok(probe::properties(&[("ActiveState", "active")])),
            running: vec![],
            sockets: vec![SOCKETS[0]],
            search: Search { path: "/usr/bin".to_owned(), guessed: None },
            shim: Some(PathBuf::from("/usr/bin/containerd-shim-systemd-v1")),
            configuration: configuration::Facts {
                files: vec![(PathBuf::from(CONFIG), absent())],
                stray: vec![],
                docker: absent(),
                named: BTreeMap::new(),
                runtimes: vec![(None, Ok(runc))],
            },
        }
    }

    fn all(facts: &Facts) -> Vec<Check> {
        checks(
            facts,
            &bus::Facts { version: Ok("257".to_owned()), refused: None, limits: vec![], types: None },
        )
    }

    /// The one check that is not OK.
    fn fault(facts: &Facts) -> Check {
        only_fault(all(facts))
    }

    #[test]
    fn a_usual_installation_is_ok() {
        assert!(all(&healthy()).iter().all(|check| check.status == Status::Ok), "{:?}", all(&healthy()));
    }

    #[test]
    fn no_containerd_and_an_old_one_are_found() {
        let check = fault(&Facts { version: absent(), sockets: vec![], ..healthy() });
        assert_eq!((check.name, check.status), ("containerd", Status::Error));
        let old = Ok("containerd github.com/containerd/containerd v1.4.13~ds1 1.4.13".to_owned());
        assert!(fault(&Facts { version: old, ..healthy() }).found.contains("1.4.13"));
    }

    #[test]
    fn a_containerd_that_does_not_run_is_a_warning() {
        let service = || Ok(probe::properties(&[("ActiveState", "inactive")]));
        let check = fault(&Facts { service: service(), sockets: vec![], ..healthy() });
        assert_eq!((check.name, check.status), ("containerd", Status::Warning));
        let running = vec![Running { pid: 7, path: Ok("/bin".to_owned()), config: None }];
        let facts = Facts { service: service(), sockets: vec![], running, ..healthy() };
        assert!(all(&facts).iter().all(|check| check.status == Status::Ok));
    }

    #[test]
    fn the_containerd_of_k3s_is_a_containerd() {
        let service = Ok(probe::properties(&[("LoadState", "not-found")]));
        let k3s =
            || Facts { version: absent(), service: service.clone(), sockets: vec![SOCKETS[1]], ..healthy() };
        assert!(all(&k3s()).iter().all(|check| check.status == Status::Ok), "{:?}", all(&k3s()));
        let forbidden = || Unknown::Forbidden("/proc/7/environ".to_owned());
        let running = vec![Running { pid: 7, path: Err(forbidden()), config: None }];
        let facts = Facts { sockets: vec![], running, ..k3s() };
        assert!(all(&facts)[0].found.contains("process 7"), "{:?}", all(&facts));
        // While k3s is stopped, only its configuration is there.
        let mut facts = Facts { sockets: vec![], ..k3s() };
        facts.configuration.files.push((PathBuf::from(RANCHER[0]), Err(forbidden())));
        let check = &all(&facts)[0];
        assert_eq!(check.status, Status::Warning);
        assert!(check.found.contains(RANCHER[0]), "{check:?}");
    }

    #[test]
    fn a_program_that_containerd_does_not_find_is_reported() {
        let check = fault(&Facts { shim: None, ..healthy() });
        assert!(check.found.contains("/usr/bin") && check.name == "installation", "{check:?}");
    }

    #[test]
    fn nothing_is_claimed_about_directories_that_are_guessed() {
        let guessed = Some(Unknown::Forbidden("/proc/7/environ".to_owned()));
        let search = Search { guessed, ..healthy().search };
        let check = fault(&Facts { shim: None, search, ..healthy() });
        assert_eq!((check.name, check.status), ("installation", Status::Unknown));
    }
}
