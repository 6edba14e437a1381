//! containerd, how it and Docker are configured, and the OCI runtime.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use crate::id::Namespace;
use crate::oci::options::{Error, Options, one_line};
use crate::path_error::io_error;
use crate::unit::name::DAEMON;

use super::Check;
use crate::probe::{self, Known, Properties, Unknown};

const RUNTIME: &str = "io.containerd.systemd.v1";
const CONFIG: &str = "/etc/containerd/config.toml";
const DOCKER: &str = "/etc/docker/daemon.json";

/// The `PATH` of systemd's services, which is used if that of containerd can't be read.
const USUAL_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// The name of the CRI plugin's table in containerd's configuration, by the version of the file.
const CRI: [(i64, &str); 2] = [(2, "io.containerd.grpc.v1.cri"), (3, "io.containerd.cri.v1.runtime")];

/// The oldest containerd and runc that are tested.
const OLDEST_CONTAINERD: (u32, u32) = (1, 6);
const OLDEST_RUNC: (u32, u32) = (1, 1);

/// The facts about containerd, Docker and the OCI runtimes.
#[derive(Debug)]
pub struct Facts {
    version: Known<String>,
    service: Known<Properties>,
    socket: bool,
    path: String,
    /// Where containerd finds this program.
    shim: Option<PathBuf>,
    config: Vec<(PathBuf, Known<String>)>,
    docker: Known<String>,
    /// The contents of files that Docker's configuration names.
    named: BTreeMap<PathBuf, Known<String>>,
    /// The OCI runtimes that the options name, and what `--version` says.
    runtimes: BTreeMap<String, Result<(PathBuf, Known<String>), String>>,
}

pub(super) fn collect() -> Facts {
    let service = probe::show_one("containerd.service");
    let pid = service.as_ref().ok().and_then(|unit| probe::property_number(unit, "MainPID"));
    let path = path_of(pid.filter(|pid| *pid > 0), service.as_ref().ok());
    let config = configuration();
    let docker = probe::file(DOCKER);
    let named: BTreeMap<PathBuf, Known<String>> = docker_runtimes(&docker)
        .filter_map(|(_, file)| file)
        .map(|path| (path.clone(), probe::file(path)))
        .collect();
    let mut facts = Facts {
        version: probe::output("containerd", &["--version"]),
        service,
        socket: Path::new("/run/containerd/containerd.sock").exists(),
        shim: path.split(':').map(|dir| Path::new(dir).join(DAEMON)).find(|path| path.is_file()),
        path,
        config,
        docker,
        named,
        runtimes: BTreeMap::new(),
    };
    let mut all = vec![Options::default()];
    all.extend(configured(&facts).into_iter().filter_map(|(_, options)| options.ok()));
    facts.runtimes = all.iter().map(|options| (name_of(options), version_of(options, &facts.path))).collect();
    facts
}

/// containerd's `PATH`.
fn path_of(pid: Option<u64>, service: Option<&Properties>) -> String {
    let own = pid.and_then(|pid| probe::file(format!("/proc/{pid}/environ")).ok());
    let own =
        own.and_then(|text| text.split('\0').find_map(|word| word.strip_prefix("PATH=").map(str::to_owned)));
    let set = service.and_then(|unit| probe::property(unit, "Environment"));
    let set = set.and_then(|text| text.split_whitespace().find_map(|word| word.strip_prefix("PATH=")));
    own.or_else(|| set.map(str::to_owned)).unwrap_or_else(|| USUAL_PATH.to_owned())
}

/// containerd's configuration with the files that it imports.
fn configuration() -> Vec<(PathBuf, Known<String>)> {
    let main = PathBuf::from(CONFIG);
    let text = probe::file(&main);
    let imports = text.as_ref().ok().and_then(|text| text.parse::<toml::Table>().ok());
    let imports =
        imports.and_then(|table| Some(table.get("imports")?.as_array()?.clone())).unwrap_or_default();
    let mut files = vec![(main, text)];
    for import in imports.iter().filter_map(toml::Value::as_str) {
        let import = Path::new("/etc/containerd").join(import);
        // A pattern. Only `*` in the last element is supported.
        let (Some(dir), Some(name)) = (import.parent(), import.file_name().and_then(|name| name.to_str()))
        else {
            continue;
        };
        let (start, end) = name.split_once('*').unwrap_or((name, ""));
        let fits = |found: &String| match name.contains('*') {
            true => {
                found.len() >= start.len() + end.len() && found.starts_with(start) && found.ends_with(end)
            }
            false => found == name,
        };
        let found = probe::names(dir).unwrap_or_default().into_iter().filter(fits);
        files.extend(found.map(|name| dir.join(name)).map(|path| (path.clone(), probe::file(path))));
    }
    files
}

fn name_of(options: &Options) -> String {
    if options.binary_name.is_empty() { "runc".to_owned() } else { options.binary_name.clone() }
}

fn version_of(options: &Options, path: &str) -> Result<(PathBuf, Known<String>), String> {
    let namespace = Namespace::new("default").map_err(|error| error.to_string())?;
    match options.resolve(&namespace, path) {
        Ok(runtime) => {
            let version = probe::output(&runtime.binary.to_string_lossy(), &["--version"]);
            Ok((runtime.binary, version))
        }
        Err(error) => Err(error.to_string()),
    }
}

pub(super) fn checks(facts: &Facts) -> Vec<Check> {
    let mut checks = vec![containerd(facts), installation(facts)];
    checks.extend(configurations(facts));
    checks.extend(facts.runtimes.iter().map(|(name, found)| oci_runtime(name, found.as_ref())));
    checks
}

fn containerd(facts: &Facts) -> Check {
    const NAME: &str = "containerd";
    let version = match &facts.version {
        Ok(text) => text.split_whitespace().nth(2).unwrap_or_default().trim_start_matches('v'),
        Err(unknown) if unknown.is_absent() => {
            let found = "containerd is not in this user's PATH".to_owned();
            return Check::error(
                NAME,
                found,
                "install it: apt install containerd, or dnf install containerd",
            );
        }
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
    match &facts.service {
        // Docker and k3s have a containerd of their own.
        Ok(unit) if state(unit) != "active" && !facts.socket => Check::warning(
            NAME,
            format!("containerd {version} is installed, containerd.service is {}", state(unit)),
            "systemctl start containerd, if nothing else starts it",
        ),
        _ => Check::ok(NAME, format!("containerd {version}")),
    }
}

/// `1.7.24~ds1` is (1, 7).
fn numbers(version: &str) -> Option<(u32, u32)> {
    let mut parts = version.split(|c: char| !c.is_ascii_digit());
    Some((parts.next()?.parse().ok()?, parts.next()?.parse().ok()?))
}

fn installation(facts: &Facts) -> Check {
    const NAME: &str = "installation";
    match &facts.shim {
        Some(path) => Check::ok(NAME, format!("containerd finds {}", path.display())),
        None => {
            let found = format!("{DAEMON} is not in containerd's PATH, {}", facts.path);
            Check::error(NAME, found, "install the program into one of these directories")
        }
    }
}

/// Each runtime with our type in a configuration: its place in the file, and its options.
fn configured(facts: &Facts) -> Vec<(String, Result<Options, Error>)> {
    let mut found = Vec::new();
    for (path, text) in &facts.config {
        let Some(table) = text.as_ref().ok().and_then(|text| text.parse::<toml::Table>().ok()) else {
            continue;
        };
        for (_, plugin) in CRI {
            for (name, runtime) in cri_runtimes(&table, plugin) {
                if runtime.get("runtime_type").and_then(toml::Value::as_str) != Some(RUNTIME) {
                    continue;
                }
                let place = format!("{} (runtime {name})", path.display());
                let options = match runtime.get("options") {
                    Some(options) => {
                        options.clone().try_into().map_err(|error| Error::malformed(&place, one_line(&error)))
                    }
                    None => Ok(Options::default()),
                };
                found.push((place, options));
            }
        }
    }
    for (name, file) in docker_runtimes(&facts.docker) {
        let place = format!("{DOCKER} (runtime {name})");
        let options = match file {
            None => Ok(Options::default()),
            Some(path) => match facts.named.get(&path) {
                Some(Ok(text)) => Options::from_toml(text, &path.to_string_lossy()),
                _ => Err(Error::File(io_error("read", &path)(std::io::ErrorKind::NotFound))),
            },
        };
        found.push((place, options));
    }
    found
}

fn cri_runtimes<'a>(table: &'a toml::Table, plugin: &str) -> Vec<(&'a String, &'a toml::Value)> {
    let runtimes = table
        .get("plugins")
        .and_then(|plugins| plugins.get(plugin))
        .and_then(|cri| cri.get("containerd"))
        .and_then(|containerd| containerd.get("runtimes"))
        .and_then(toml::Value::as_table);
    runtimes.map(|runtimes| runtimes.iter().collect()).unwrap_or_default()
}

/// Docker's names for this runtime, each with the file of its options.
fn docker_runtimes(text: &Known<String>) -> impl Iterator<Item = (String, Option<PathBuf>)> + use<> {
    let config = text.as_ref().ok().and_then(|text| serde_json::from_str::<serde_json::Value>(text).ok());
    let runtimes =
        config.and_then(|config| Some(config.get("runtimes")?.as_object()?.clone())).unwrap_or_default();
    runtimes
        .into_iter()
        .filter(|(_, runtime)| runtime["runtimeType"] == RUNTIME)
        .map(|(name, runtime)| (name, runtime["options"]["ConfigPath"].as_str().map(PathBuf::from)))
}

fn configurations(facts: &Facts) -> Vec<Check> {
    const NAME: &str = "configuration";
    let mut checks = Vec::new();
    for (path, text) in &facts.config {
        match text {
            Err(unknown) if unknown.is_absent() => {}
            Err(unknown) => checks.push(Check::unknown(NAME, unknown)),
            Ok(text) => match text.parse::<toml::Table>() {
                Err(error) => {
                    let found = format!("{} is not TOML: {}", path.display(), one_line(&error));
                    checks.push(Check::error(NAME, found, "correct it, then systemctl restart containerd"));
                }
                Ok(table) => checks.extend(misplaced(path, &table)),
            },
        }
    }
    if let Ok(text) = &facts.docker
        && let Err(error) = serde_json::from_str::<serde_json::Value>(text)
    {
        let advice = "correct it, then systemctl restart docker";
        checks.push(Check::error(NAME, format!("{DOCKER} is not JSON: {error}"), advice));
    }
    let mut places = Vec::new();
    for (place, options) in configured(facts) {
        let found = match options {
            Err(error) => error.to_string(),
            Ok(_) => {
                places.push(place);
                continue;
            }
        };
        let found = if found.contains(&place) { found } else { format!("{place}: {found}") };
        checks.push(Check::error(NAME, found, "correct it (see docs/options.md), then restart the client"));
    }
    if checks.is_empty() {
        let found = match places.is_empty() {
            true => format!("no CRI or Docker runtime has the type {RUNTIME}; clients have to name it"),
            false => places.join(", "),
        };
        checks.push(Check::ok(NAME, found));
    }
    checks
}

/// Runtimes in a table that containerd does not read, and runtimes whose type resembles ours.
fn misplaced(path: &Path, table: &toml::Table) -> Vec<Check> {
    const NAME: &str = "configuration";
    let version = table.get("version").and_then(toml::Value::as_integer).unwrap_or(1);
    let mut checks = Vec::new();
    for (wanted, plugin) in CRI {
        for (name, runtime) in cri_runtimes(table, plugin) {
            let kind = runtime.get("runtime_type").and_then(toml::Value::as_str).unwrap_or_default();
            let place = format!("{} (runtime {name})", path.display());
            if kind == RUNTIME && version != wanted {
                let found =
                    format!("{place} is in the table {plugin:?}, but the file has version = {version}");
                let right = CRI.iter().find(|(each, _)| *each == version).map_or("", |(_, plugin)| plugin);
                let advice = match right {
                    "" => format!("set version = {wanted} at the top of the file"),
                    right => format!("use the table {right:?}"),
                };
                checks.push(Check::error(NAME, found, advice));
            } else if kind != RUNTIME && kind.contains("systemd") {
                let found = format!("{place} has the runtime_type {kind:?}");
                checks.push(Check::warning(
                    NAME,
                    found,
                    format!("write {RUNTIME:?}, if this runtime is meant"),
                ));
            }
        }
    }
    checks
}

fn oci_runtime(name: &str, found: Result<&(PathBuf, Known<String>), &String>) -> Check {
    const NAME: &str = "oci-runtime";
    let (path, version) = match found {
        Ok(found) => found,
        Err(reason) => {
            return Check::error(
                NAME,
                reason.clone(),
                "install it, or name another one with the option BinaryName",
            );
        }
    };
    let text = match version {
        Ok(text) => text.lines().next().unwrap_or_default(),
        Err(Unknown::Absent(_) | Unknown::Forbidden(_)) | Err(Unknown::Failed(_)) => {
            let found = format!("{} --version fails", path.display());
            return Check::error(
                NAME,
                found,
                "install it again, or name another one with the option BinaryName",
            );
        }
    };
    let number = text.split_whitespace().find_map(numbers);
    if text.starts_with("runc") && number.is_some_and(|number| number < OLDEST_RUNC) {
        let (major, minor) = OLDEST_RUNC;
        return Check::warning(
            NAME,
            format!("{text} is old"),
            format!("upgrade {name} to {major}.{minor} or newer"),
        );
    }
    Check::ok(NAME, format!("{text} ({})", path.display()))
}

#[cfg(test)]
mod tests {
    use super::super::{Status, only_fault};
    use super::*;

    fn absent() -> Known<String> {
        Err(Unknown::Absent("x".to_owned()))
    }

    fn healthy() -> Facts {
        let runc = (PathBuf::from("/usr/sbin/runc"), Ok("runc version 1.1.15+ds1\ncommit: 1".to_owned()));
        Facts {
            version: Ok("containerd github.com/containerd/containerd 1.7.24~ds1 1.7.24".to_owned()),
            service: Ok(probe::properties(&[("ActiveState", "active")])),
            socket: true,
            path: "/usr/bin".to_owned(),
            shim: Some(PathBuf::from("/usr/bin/containerd-shim-systemd-v1")),
            config: vec![(PathBuf::from(CONFIG), absent())],
            docker: absent(),
            named: BTreeMap::new(),
            runtimes: [("runc".to_owned(), Ok(runc))].into(),
        }
    }

    fn with(config: &str) -> Facts {
        Facts { config: vec![(PathBuf::from(CONFIG), Ok(config.to_owned()))], ..healthy() }
    }

    /// The one check that is not OK.
    fn fault(facts: &Facts) -> Check {
        only_fault(checks(facts))
    }

    const V2: &str = "version = 2\n[plugins.\"io.containerd.grpc.v1.cri\".containerd.runtimes.systemd]\n";

    #[test]
    fn a_usual_installation_is_ok() {
        assert!(
            checks(&healthy()).iter().all(|check| check.status == Status::Ok),
            "{:?}",
            checks(&healthy())
        );
        let facts = with(&format!("{V2}runtime_type = \"{RUNTIME}\"\noptions.BinaryName = \"crun\""));
        assert!(checks(&facts)[2].found.contains("runtime systemd"), "{:?}", checks(&facts));
    }

    #[test]
    fn no_containerd_and_an_old_one_are_found() {
        let check = fault(&Facts { version: absent(), ..healthy() });
        assert_eq!((check.name, check.status), ("containerd", Status::Error));
        let old = Ok("containerd github.com/containerd/containerd v1.4.13~ds1 1.4.13".to_owned());
        assert!(fault(&Facts { version: old, ..healthy() }).found.contains("1.4.13"));
    }

    #[test]
    fn a_program_that_containerd_does_not_find_is_reported() {
        let check = fault(&Facts { shim: None, ..healthy() });
        assert!(check.found.contains("/usr/bin") && check.name == "installation", "{check:?}");
    }

    #[test]
    fn no_runc_and_a_broken_one_are_found() {
        let missing = Err("the OCI runtime \"runc\" is not an executable file in /bin".to_owned());
        let check = fault(&Facts { runtimes: [("runc".to_owned(), missing)].into(), ..healthy() });
        assert_eq!((check.name, check.status), ("oci-runtime", Status::Error));
        let broken = Ok((PathBuf::from("/usr/sbin/runc"), Err(Unknown::Failed("exec format".to_owned()))));
        assert!(
            fault(&Facts { runtimes: [("runc".to_owned(), broken)].into(), ..healthy() })
                .found
                .contains("fails")
        );
        let old = Ok((PathBuf::from("/usr/sbin/runc"), Ok("runc version 1.0.2".to_owned())));
        let check = fault(&Facts { runtimes: [("runc".to_owned(), old)].into(), ..healthy() });
        assert_eq!(check.status, Status::Warning);
    }

    #[test]
    fn a_wrong_option_is_named_with_its_place() {
        let check = fault(&with(&format!("{V2}runtime_type = \"{RUNTIME}\"\noptions.BinaryNmae = \"crun\"")));
        assert_eq!((check.name, check.status), ("configuration", Status::Error));
        assert!(check.found.contains("BinaryNmae") && check.found.contains(CONFIG), "{check:?}");
        let check = fault(&with(&format!("{V2}runtime_type = \"{RUNTIME}\"\noptions.IoUid = \"me\"")));
        assert!(check.found.contains("options"), "{check:?}");
    }

    #[test]
    fn a_file_that_is_not_toml_and_a_table_of_another_version_are_found() {
        assert!(fault(&with("version = = 2")).found.contains("is not TOML"));
        let text = V2.replace("version = 2", "version = 3");
        let check = fault(&with(&format!("{text}runtime_type = \"{RUNTIME}\"")));
        assert!(check.advice.contains("io.containerd.cri.v1.runtime"), "{check:?}");
        let check = fault(&with(&format!("{V2}runtime_type = \"io.containerd.systemd.v2\"")));
        assert_eq!(check.status, Status::Warning);
    }

    #[test]
    fn dockers_runtimes_are_checked_too() {
        let docker = Ok(format!(
            "{{\"runtimes\": {{\"s\": {{\"runtimeType\": \"{RUNTIME}\", \"options\": {{\"ConfigPath\": \"/etc/o\"}}}}}}}}"
        ));
        let named = [(PathBuf::from("/etc/o"), Ok("Lgo = \"tee\"".to_owned()))].into();
        let check = fault(&Facts { docker: docker.clone(), named, ..healthy() });
        assert!(check.found.contains("Lgo") && check.found.contains("/etc/o"), "{check:?}");
        let check = fault(&Facts { docker, ..healthy() });
        assert!(check.found.contains("/etc/o"), "{check:?}");
        assert!(fault(&Facts { docker: Ok("{".to_owned()), ..healthy() }).found.contains("daemon.json"));
    }
}
