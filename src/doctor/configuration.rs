//! How containerd and Docker are configured: the runtimes with our type, their options, and the OCI runtimes that these name.

use std::collections::{BTreeMap, VecDeque};
use std::path::{Path, PathBuf};

use crate::id::Namespace;
use crate::oci::options::{Error, Options, one_line};
use crate::probe::{self, Known, Unknown};
use crate::task::request::{Property, PropertySource};
use crate::unit::annotation::{self, Extension, Types};
use crate::unit::name::DAEMON;

use super::Check;
use super::running::{Search, numbers};

const RUNTIME: &str = "io.containerd.systemd.v1";
pub(super) const CONFIG: &str = "/etc/containerd/config.toml";
const DOCKER: &str = "/etc/docker/daemon.json";

/// What k3s and RKE2 write for their containerd.
pub(super) const RANCHER: [&str; 2] = [
    "/var/lib/rancher/k3s/agent/etc/containerd/config.toml",
    "/var/lib/rancher/rke2/agent/etc/containerd/config.toml",
];

/// `containerd config default` of 2.2 and later writes a file that imports this directory. containerd reads the directory only if
/// its file exists and imports it (cmd/containerd/command/main.go, cmd/containerd/server/config/config.go).
const DROP_INS: &str = "/etc/containerd/conf.d";

/// The CRI plugin's table in a file of version 2, and in one of version 3 or later.
const CRI_2: &str = "io.containerd.grpc.v1.cri";
const CRI_3: &str = "io.containerd.cri.v1.runtime";

/// The oldest runc that is tested.
const OLDEST_RUNC: (u32, u32) = (1, 1);

/// The most files that a file and its imports are.
const MOST_FILES: usize = 200;

/// The facts about the configuration.
#[derive(Debug)]
pub struct Facts {
    /// The files that containerd reads.
    pub(super) files: Vec<(PathBuf, Known<String>)>,
    /// Drop-ins that no file imports.
    pub(super) stray: Vec<(PathBuf, Known<String>)>,
    pub(super) docker: Known<String>,
    /// The options in the files that `ConfigPath` names.
    pub(super) named: BTreeMap<PathBuf, Known<Result<Options, String>>>,
    /// The OCI runtime of each place with options. Clients that name no options have no place.
    pub(super) runtimes: Vec<(Option<String>, Resolved)>,
}

/// What options lead to: the OCI runtime, and what its `--version` says.
type Resolved = Result<(PathBuf, Known<String>), Error>;

/// `mains`: the files that containerds begin with.
pub(super) fn collect(mains: Vec<PathBuf>, path: &str) -> Facts {
    let files = with_imports(mains);
    let stray = matching(&Path::new(DROP_INS).join("*.toml"));
    let stray = stray.into_iter().filter(|path| !files.iter().any(|(known, _)| known == path));
    let stray = stray.map(|path| (path.clone(), probe::file(path))).collect();
    let (named, runtimes) = (BTreeMap::new(), Vec::new());
    let mut facts = Facts { files, stray, docker: probe::file(DOCKER), named, runtimes };
    let named = places(&facts).into_iter().filter_map(|place| match place.options {
        Source::File(path) => Some((path.clone(), from_file(&path))),
        Source::Table(_) => None,
    });
    facts.named = named.collect();
    let known =
        configured(&facts).into_iter().filter_map(|(place, options)| Some((place, options.ok()?.ok()?)));
    let all =
        [(None, Options::default())].into_iter().chain(known.map(|(place, options)| (Some(place), options)));
    facts.runtimes = all.map(|(place, options)| (place, resolve(&options, path))).collect();
    facts
}

/// The files with those that they import, as containerd finds them.
fn with_imports(mains: Vec<PathBuf>) -> Vec<(PathBuf, Known<String>)> {
    let (mut files, mut pending): (Vec<(PathBuf, Known<String>)>, VecDeque<PathBuf>) = (vec![], mains.into());
    while let Some(path) = pending.pop_front().filter(|_| files.len() < MOST_FILES) {
        if files.iter().any(|(known, _)| *known == path) {
            continue;
        }
        let text = probe::file(&path);
        let table = text.as_ref().ok().and_then(|text| text.parse::<toml::Table>().ok());
        let imports = table.and_then(|table| table.get("imports")?.as_array().cloned()).unwrap_or_default();
        let dir = path.parent().unwrap_or(Path::new("/"));
        for import in imports.iter().filter_map(toml::Value::as_str) {
            pending.extend(matching(&dir.join(import)));
        }
        files.push((path, text));
    }
    files
}

/// The files that a pattern matches. Only `*` in the last element is supported.
fn matching(pattern: &Path) -> Vec<PathBuf> {
    let (Some(dir), Some(name)) = (pattern.parent(), pattern.file_name().and_then(|name| name.to_str()))
    else {
        return Vec::new();
    };
    let (start, end) = name.split_once('*').unwrap_or((name, ""));
    let fits = |found: &String| match name.contains('*') {
        true => found.len() >= start.len() + end.len() && found.starts_with(start) && found.ends_with(end),
        false => found == name,
    };
    let mut found: Vec<String> = probe::names(dir).unwrap_or_default().into_iter().filter(fits).collect();
    found.sort();
    found.into_iter().map(|name| dir.join(name)).collect()
}

fn from_file(path: &Path) -> Known<Result<Options, String>> {
    match Options::from_file(path) {
        Err(Error::File(error)) if error.io().kind() == std::io::ErrorKind::PermissionDenied => {
            Err(Unknown::Forbidden(path.to_string_lossy().into_owned()))
        }
        read => Ok(read.map_err(|error| error.to_string())),
    }
}

fn resolve(options: &Options, path: &str) -> Resolved {
    let namespace =
        Namespace::new("default").map_err(|error| Error::malformed("default", error.to_string()))?;
    let runtime = options.resolve(&namespace, path)?;
    let version = probe::output(&runtime.binary.to_string_lossy(), &["--version"]);
    Ok((runtime.binary, version))
}

/// A runtime with our type in a configuration.
struct Place {
    /// Its file and its name there.
    name: String,
    options: Source,
}

enum Source {
    /// `options` in the configuration itself.
    Table(toml::Table),
    /// The file that `ConfigPath` names. containerd does not pass on the options beside it.
    File(PathBuf),
}

fn places(facts: &Facts) -> Vec<Place> {
    let mut found = Vec::new();
    for (path, text) in facts.files.iter().chain(&facts.stray) {
        let Some(table) = text.as_ref().ok().and_then(|text| text.parse::<toml::Table>().ok()) else {
            continue;
        };
        for (name, runtime) in [CRI_2, CRI_3].iter().flat_map(|plugin| cri_runtimes(&table, plugin)) {
            if is_ours(runtime) {
                let options =
                    runtime.get("options").and_then(toml::Value::as_table).cloned().unwrap_or_default();
                let name = format!("{} (runtime {name})", path.display());
                found.push(Place { name, options: source(options) });
            }
        }
    }
    found.extend(docker_runtimes(&facts.docker));
    found
}

/// What containerd makes of an `options` table.
fn source(options: toml::Table) -> Source {
    let path = options.iter().find(|(name, _)| name.eq_ignore_ascii_case("ConfigPath"));
    match path.and_then(|(_, path)| path.as_str()).filter(|path| !path.is_empty()) {
        Some(path) => Source::File(PathBuf::from(path)),
        None => Source::Table(options),
    }
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

fn is_ours(runtime: &toml::Value) -> bool {
    runtime.get("runtime_type").and_then(toml::Value::as_str) == Some(RUNTIME)
}

/// Docker's names for this runtime. Docker passes on no other option than the path of a file.
fn docker_runtimes(text: &Known<String>) -> Vec<Place> {
    let config = text.as_ref().ok().and_then(|text| serde_json::from_str::<serde_json::Value>(text).ok());
    let runtimes =
        config.and_then(|config| Some(config.get("runtimes")?.as_object()?.clone())).unwrap_or_default();
    let ours = runtimes.into_iter().filter(|(_, runtime)| runtime["runtimeType"] == RUNTIME);
    let place = |(name, runtime): (String, serde_json::Value)| {
        let options = runtime["options"].as_object().into_iter().flatten();
        let mut path = options.filter(|(name, _)| name.eq_ignore_ascii_case("ConfigPath"));
        let path = path.next().and_then(|(_, path)| path.as_str()).filter(|path| !path.is_empty());
        let options =
            path.map_or(Source::Table(toml::Table::new()), |path| Source::File(PathBuf::from(path)));
        Place { name: format!("{DOCKER} (runtime {name})"), options }
    };
    ours.map(place).collect()
}

/// Each place with its options, as the shim reads them.
fn configured(facts: &Facts) -> Vec<(String, Known<Result<Options, String>>)> {
    let read = |Place { name, options }: Place| {
        let options = match options {
            Source::Table(table) => Ok(Options::from_table(table).map_err(|error| one_line(&error))),
            Source::File(path) => {
                facts.named.get(&path).cloned().unwrap_or(Err(Unknown::Absent(name.clone())))
            }
        };
        (name, options)
    };
    places(facts).into_iter().map(read).collect()
}

/// Checks the properties that options set, as the shim does when it creates a container. Returns the names in
/// `AnnotationProperties` that are no properties: the shim accepts them.
fn check_properties(options: &Options, types: Option<&Types>) -> Result<Vec<String>, annotation::Error> {
    let extension = Extension::new(&options.annotation_properties)?;
    let asked = options.properties.iter().map(|(name, value)| Property {
        source: PropertySource::Options,
        name: name.clone(),
        value: value.clone(),
    });
    let checked = annotation::check(asked, &extension)?;
    let Some(types) = types else { return Ok(Vec::new()) };
    types.check(&checked.properties)?;
    Ok(extension.unknown(types).map(str::to_owned).collect())
}

/// `types`: those of the properties of systemd's services, if they are known.
pub(super) fn checks(facts: &Facts, search: &Search, types: Option<&Types>) -> Vec<Check> {
    [configurations(facts, types), oci_runtimes(facts, search)].concat()
}

const NAME: &str = "configuration";

fn wrong(place: &str, reason: &str) -> Check {
    let advice = format!("correct it (see {DAEMON}(5)), then {}", restart(Path::new(place)));
    Check::error(NAME, format!("{place}: {reason}"), advice)
}

fn no_property(place: &str, name: &str) -> Check {
    let found = format!("{place}: AnnotationProperties, {name:?}: systemd has no such property of a service");
    let advice = format!(
        "correct the name (`systemctl show --all containerd.service` has them all), then {}",
        restart(Path::new(place))
    );
    Check::warning(NAME, found, advice)
}

fn configurations(facts: &Facts, types: Option<&Types>) -> Vec<Check> {
    let mut checks = Vec::new();
    for (path, text) in &facts.files {
        match text {
            Err(unknown) if unknown.is_absent() => {}
            Err(unknown) => checks.push(Check::unknown(NAME, unknown)),
            Ok(text) => match text.parse::<toml::Table>() {
                Err(error) => {
                    let found = format!("{} is not TOML: {}", path.display(), one_line(&error));
                    checks.push(Check::error(NAME, found, format!("correct it, then {}", restart(path))));
                }
                Ok(table) => checks.extend(misplaced(path, &table)),
            },
        }
    }
    checks.extend(facts.stray.iter().filter_map(|(path, text)| stray(path, text.as_deref().ok()?)));
    if let Ok(text) = &facts.docker
        && let Err(error) = serde_json::from_str::<serde_json::Value>(text)
    {
        let advice = format!("correct it, then {}", restart(Path::new(DOCKER)));
        checks.push(Check::error(NAME, format!("{DOCKER} is not JSON: {error}"), advice));
    }
    let mut good = Vec::new();
    for (place, options) in configured(facts) {
        match options {
            Err(unknown) => checks.push(Check::unknown(NAME, &unknown)),
            Ok(Err(reason)) => checks.push(wrong(&place, &reason)),
            Ok(Ok(options)) => match check_properties(&options, types) {
                Err(error) => checks.push(wrong(&place, &error.to_string())),
                Ok(unknown) if unknown.is_empty() => good.push(place),
                Ok(unknown) => checks.extend(unknown.iter().map(|name| no_property(&place, name))),
            },
        }
    }
    for (place, found) in &facts.runtimes {
        match (place, found) {
            (_, Ok(_) | Err(Error::NoBinary { .. })) => {}
            (place, Err(error)) => {
                checks.push(wrong(place.as_deref().unwrap_or("the default options"), &error.to_string()));
            }
        }
    }
    if checks.is_empty() {
        let found = match good.is_empty() {
            true => format!("no CRI or Docker runtime has the type {RUNTIME}; clients have to name it"),
            false => good.join(", "),
        };
        checks.push(Check::ok(NAME, found));
    }
    checks
}

/// How the client reads its file again. k3s and RKE2 write it themselves. A runtime may follow the path of the file.
fn restart(file: &Path) -> &'static str {
    if file.starts_with("/var/lib/rancher") {
        "restart k3s or RKE2, which writes this file from its template"
    } else if file.to_string_lossy().starts_with(DOCKER) {
        "systemctl restart docker"
    } else {
        "systemctl restart containerd"
    }
}

/// A drop-in with a runtime for us that containerd does not read.
fn stray(path: &Path, text: &str) -> Option<Check> {
    let table = text.parse::<toml::Table>().ok()?;
    let mut runtimes = [CRI_2, CRI_3].iter().flat_map(|plugin| cri_runtimes(&table, plugin));
    let (name, _) = runtimes.find(|(_, runtime)| is_ours(runtime))?;
    let found = format!("{} (runtime {name}) is in no imports of {CONFIG}", path.display());
    let advice = format!(
        "write imports = [\"{DROP_INS}/*.toml\"] at the top of that file, where `containerd config default` of 2.2 and newer has it; if the file has a list of imports, add the path to that list; {}",
        restart(path)
    );
    Some(Check::warning(NAME, found, advice))
}

/// Runtimes in a table that containerd does not read, and runtimes whose type resembles ours.
fn misplaced(path: &Path, table: &toml::Table) -> Vec<Check> {
    let version = table.get("version").and_then(toml::Value::as_integer).unwrap_or(1);
    let mut checks = Vec::new();
    for (plugin, oldest, fits) in [(CRI_2, 2, version == 2), (CRI_3, 3, version >= 3)] {
        for (name, runtime) in cri_runtimes(table, plugin) {
            let kind = runtime.get("runtime_type").and_then(toml::Value::as_str).unwrap_or_default();
            let place = format!("{} (runtime {name})", path.display());
            if kind == RUNTIME && !fits {
                let found =
                    format!("{place} is in the table {plugin:?}, but the file has version = {version}");
                let advice = match version {
                    ..2 => format!("set version = {oldest} at the top of the file"),
                    2 => format!("use the table {CRI_2:?}"),
                    3.. => format!("use the table {CRI_3:?}"),
                };
                checks.push(Check::error(NAME, found, advice));
            } else if kind != RUNTIME && kind.contains("systemd") {
                let found = format!("{place} has the runtime_type {kind:?}");
                let advice = format!("write {RUNTIME:?}, if this runtime is meant");
                checks.push(Check::warning(NAME, found, advice));
            }
        }
    }
    checks
}

fn oci_runtimes(facts: &Facts, search: &Search) -> Vec<Check> {
    let some_work = facts.runtimes.iter().any(|(place, found)| place.is_some() && found.is_ok());
    let mut checks: Vec<Check> = Vec::new();
    for (place, found) in &facts.runtimes {
        let check = match found {
            Ok((path, version)) => oci_runtime(path, version),
            Err(error @ Error::NoBinary { .. }) => missing(place.as_deref(), error, search, some_work),
            // It is a mistake in the configuration.
            Err(_) => continue,
        };
        if !checks.contains(&check) {
            checks.push(check);
        }
    }
    checks
}

const OCI_RUNTIME: &str = "oci-runtime";

fn missing(place: Option<&str>, error: &Error, search: &Search, some_work: bool) -> Check {
    let advice = "install it, or name another one with the option BinaryName";
    match (place, &search.guessed) {
        (_, Some(unknown)) => Check::unknown(OCI_RUNTIME, unknown),
        (Some(place), None) => Check::error(OCI_RUNTIME, format!("{place}: {error}"), advice),
        (None, None) if some_work => Check::warning(
            OCI_RUNTIME,
            format!("{error}: clients that name no options can't start containers"),
            advice,
        ),
        (None, None) => Check::error(OCI_RUNTIME, error.to_string(), advice),
    }
}

fn oci_runtime(path: &Path, version: &Known<String>) -> Check {
    let text = match version {
        Ok(text) => text,
        Err(error) => {
            let found = format!("{} --version fails: {error}", path.display());
            let advice = "install it again, or name another one with the option BinaryName";
            return Check::error(OCI_RUNTIME, found, advice);
        }
    };
    let text = text.lines().next().unwrap_or_default();
    let number = text.split_whitespace().find_map(numbers);
    if text.starts_with("runc") && number.is_some_and(|number| number < OLDEST_RUNC) {
        let (major, minor) = OLDEST_RUNC;
        let found = format!("{text} ({}) is old", path.display());
        return Check::warning(OCI_RUNTIME, found, format!("upgrade it to {major}.{minor} or newer"));
    }
    Check::ok(OCI_RUNTIME, format!("{text} ({})", path.display()))
}

#[cfg(test)]
mod tests;
