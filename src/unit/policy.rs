//! What the drop-ins of an administrator ask of the units of containers and execs (pure, but for the files that it reads).
//!
//! The drop-ins for a namespace hold without exception, unlike those for all services ([`service_d`]). Some settings break
//! what they hold for: this module finds them, so that an error can name the setting and its file.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};

use super::search_path::{self, Directories};
use super::{annotation, drop_ins, name, service_d};

/// How many settings an error names.
const MOST_NAMED: usize = 8;

/// The types of service as which systemd starts the daemon and knows its process.
const TYPES_OF_DAEMON: [&str; 5] = ["notify", "notify-reload", "exec", "simple", "idle"];

/// A setting of a drop-in.
#[derive(Clone, Debug, PartialEq)]
struct Setting {
    name: String,
    value: String,
    file: PathBuf,
}

impl fmt::Display for Setting {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}={} in {}", self.name, self.value, self.file.display())
    }
}

/// What a setting breaks.
#[derive(Clone, Copy, PartialEq)]
enum Effect {
    NotCreated,
    NotDeleted,
    Stopped,
    NoExec,
}

impl Effect {
    fn text(self) -> &'static str {
        match self {
            Self::NotCreated => "no container can be created",
            Self::NotDeleted => "no container can be deleted",
            Self::Stopped => "systemd stops every container at once",
            Self::NoExec => "no exec can be started",
        }
    }

    /// Whether the unit, of a container or of an exec, should not be started.
    fn concerns(self, unit: &str) -> bool {
        // Only the name of an exec's unit has a colon.
        match self {
            Self::NotCreated => true,
            Self::NotDeleted | Self::Stopped => !unit.contains(':'),
            Self::NoExec => unit.contains(':'),
        }
    }
}

/// The setting with which a unit of a container or of an exec can't work, with its file, and what happens.
pub(super) fn conflict(search_path: &Directories, unit: &str) -> Option<String> {
    let is_meant = unit.starts_with(name::PREFIX) && unit != name::DAEMON_SERVICE && !unit.contains("::");
    if !is_meant || !unit.ends_with(service_d::SERVICE) {
        return None;
    }
    last_of_each(settings_in(search_path, unit)).values().find_map(|setting| {
        let effect = effect(&setting.name, &setting.value).filter(|effect| effect.concerns(unit))?;
        Some(format!("{setting}: {}", effect.text()))
    })
}

/// The settings by their names. The last of several values counts.
fn last_of_each(settings: Vec<Setting>) -> BTreeMap<String, Setting> {
    settings.into_iter().map(|setting| (setting.name.clone(), setting)).collect()
}

/// Whether a drop-in of a service, or one for all services, has a setting that also holds for the output that the daemon copies to
/// the journal ([`is_of_journal`]).
pub(super) fn sets_journal(search_path: &Directories, unit: &str) -> bool {
    let for_all = search_path.drop_ins_for(service_d::SERVICE.trim_start_matches('.'));
    let for_all = for_all.flat_map(|file| settings_of(&file));
    settings_in(search_path, unit).into_iter().chain(for_all).any(|setting| is_of_journal(&setting.name))
}

/// Whether a setting or a property holds for output that the daemon copies to the journal: `LogRateLimitIntervalSec=`,
/// `LogRateLimitBurst=` or `LogExtraFields=`.
pub fn is_of_journal(name: &str) -> bool {
    name.starts_with("LogRateLimit") || name == "LogExtraFields"
}

/// The settings in the drop-ins of a unit that restrict the OCI runtime, or end it, each with its file. `None` if there are
/// none.
pub(super) fn restrictions(unit: &str) -> Option<String> {
    let settings = settings_in(&Directories::open_all(), unit);
    named(settings.iter().filter(|setting| service_d::breaks_containers(&setting.name)))
}

/// The settings of drop-ins, each with its file. `None` if there are none.
pub(super) fn settings_of_all<'f>(files: impl Iterator<Item = &'f PathBuf>) -> Option<String> {
    let settings: Vec<_> = files.flat_map(|file| settings_of(file)).collect();
    named(settings.iter())
}

/// The settings in the drop-ins of a unit that name one of the units in a message of systemd.
pub(super) fn naming_a_unit_of(unit: &str, message: &str) -> Option<String> {
    let units: BTreeSet<&str> = message.split_whitespace().map(|word| word.trim_end_matches('.')).collect();
    let settings = settings_in(&Directories::open_all(), unit);
    named(settings.iter().filter(|setting| setting.value.split_whitespace().any(|word| units.contains(word))))
}

fn named<'s>(settings: impl Iterator<Item = &'s Setting>) -> Option<String> {
    let all: Vec<_> = settings.map(Setting::to_string).take(MOST_NAMED).collect();
    (!all.is_empty()).then(|| all.join(", "))
}

/// The conditions and assertions in the drop-ins of a unit, each with its file. `None` if there are none.
pub fn conditions_of(unit: &str) -> Option<String> {
    let settings = settings_in(&Directories::open_all(), unit);
    named(
        settings.iter().filter(|setting| ["Condition", "Assert"].iter().any(|b| setting.name.starts_with(b))),
    )
}

/// The drop-ins for namespaces that break the containers there: path, setting, and what happens.
pub fn harmful_for_namespaces() -> Vec<(PathBuf, String, &'static str)> {
    let settings = settings_for_namespaces(&search_path::ALL).into_iter();
    let found = settings.filter_map(|setting| {
        let effect = effect(&setting.name, &setting.value)?;
        Some((setting.file, format!("{}={}", setting.name, setting.value), effect.text()))
    });
    found.collect()
}

/// The drop-ins for namespaces that restrict the OCI runtime, so that perhaps no container starts there, and their settings.
pub fn restricting_for_namespaces() -> BTreeMap<PathBuf, Vec<String>> {
    restricting_in(&search_path::ALL)
}

fn restricting_in(dirs: &[impl AsRef<Path>]) -> BTreeMap<PathBuf, Vec<String>> {
    let mut found: BTreeMap<PathBuf, Vec<String>> = BTreeMap::new();
    for Setting { name, value, file } in settings_for_namespaces(dirs) {
        if restricts(&name, &value) {
            found.entry(file).or_default().push(format!("{name}={value}"));
        }
    }
    found
}

/// Settings that restrict a process, or keep it from being started. A `*` stands for any end of the name.
const RESTRICTING: [&str; 21] = [
    "AmbientCapabilities",
    "Assert*",
    "BindPaths",
    "BindReadOnlyPaths",
    "CapabilityBoundingSet",
    "Condition*",
    "DynamicUser",
    "ExecCondition",
    "ExecStartPre",
    "Group",
    "InaccessiblePaths",
    "MemoryDenyWriteExecute",
    "NoNewPrivileges",
    "Private*",
    "Protect*",
    "ReadOnlyPaths",
    "Restrict*",
    "Root*",
    "SystemCall*",
    "TemporaryFileSystem",
    "User",
];

fn restricts(name: &str, value: &str) -> bool {
    let is_meant = RESTRICTING.iter().any(|pattern| annotation::matches(pattern, name));
    // An empty set has no capability.
    is_meant && (!is_off(value) || name == "CapabilityBoundingSet")
}

/// The settings in the drop-ins for namespaces in these directories of units.
fn settings_for_namespaces(dirs: &[impl AsRef<Path>]) -> Vec<Setting> {
    let dirs = dirs.iter().flat_map(|dir| fs::read_dir(dir).into_iter().flatten().flatten());
    let dirs = dirs.filter(|dir| {
        let name = dir.file_name().to_string_lossy().into_owned();
        name.starts_with(name::PREFIX) && name.ends_with("-.service.d")
    });
    let files: BTreeSet<PathBuf> = dirs.flat_map(|dir| drop_ins::in_dir(&dir.path())).collect();
    files.iter().flat_map(|file| settings_of(file)).collect()
}

/// The drop-ins of the daemon's service with which systemd does not start it: path, setting, and what happens. systemd does not
/// show them if the service is transient, as it does not load the service then.
pub fn harmful_for_daemon() -> Vec<(PathBuf, String, &'static str)> {
    harmful_for_daemon_in(&Directories::open_all())
}

fn harmful_for_daemon_in(search_path: &Directories) -> Vec<(PathBuf, String, &'static str)> {
    let settings = last_of_each(settings_in(search_path, name::DAEMON_SERVICE)).into_values();
    let harmful = settings.filter(|set| set.name == "Type" && !TYPES_OF_DAEMON.contains(&set.value.as_str()));
    harmful.map(|set| (set.file, format!("{}={}", set.name, set.value), "the daemon can't start")).collect()
}

/// The settings in the drop-ins of the daemon's service, each with its file. `None` if there are none. Some of those that can hold
/// secrets are left out.
pub fn settings_of_daemon() -> Option<String> {
    let settings = settings_in(&Directories::open_all(), name::DAEMON_SERVICE);
    let may_be_secret = |name: &str| name.contains("Environment") || name.contains("Credential");
    named(settings.iter().filter(|setting| !may_be_secret(&setting.name)))
}

/// What a setting breaks for the units of containers or of execs.
fn effect(name: &str, value: &str) -> Option<Effect> {
    let is_off = is_off(value);
    match name {
        "Type" | "PAMName" | "PIDFile" | "RefuseManualStart" | "PrivatePIDs" if !is_off => {
            Some(Effect::NotCreated)
        }
        // systemd would run another command, in place of `launch` or after it.
        "ExecStart" => Some(Effect::NotCreated),
        "ExitType" if value != "main" => Some(Effect::NotCreated),
        // systemd loads no service of Type=oneshot, which execs are, with these values.
        "Restart" if ["always", "on-success"].contains(&value) => Some(Effect::NoExec),
        "UnsetEnvironment" if value.split_whitespace().any(|word| word == "NOTIFY_SOCKET") => {
            Some(Effect::NoExec)
        }
        "RefuseManualStop" if !is_off => Some(Effect::NotDeleted),
        "StopWhenUnneeded" if !is_off => Some(Effect::Stopped),
        _ => None,
    }
}

/// True if a value switches a setting off, or is empty.
fn is_off(value: &str) -> bool {
    ["", "no", "n", "false", "f", "off", "0"].contains(&value.to_ascii_lowercase().as_str())
}

/// The settings of all drop-ins that hold for a unit, in the order in which systemd applies them. Copies are left out.
fn settings_in(search_path: &Directories, unit: &str) -> Vec<Setting> {
    let stem = unit.strip_suffix(service_d::SERVICE).unwrap_or(unit);
    let prefixes = stem.match_indices('-').rev().filter_map(|(dash, _)| stem.get(..=dash));
    let mut in_force = BTreeMap::new();
    // systemd reads only one of several drop-ins of the same name: the one that is most specific to the unit.
    for level in [stem].into_iter().chain(prefixes) {
        for file in search_path.drop_ins_for(&format!("{level}{}", service_d::SERVICE)) {
            file.file_name().map(ToOwned::to_owned).map(|name| in_force.entry(name).or_insert(file));
        }
    }
    in_force.values().flat_map(|file| settings_of(file)).collect()
}

/// The settings of a drop-in. None if it is a copy or can't be read.
fn settings_of(file: &Path) -> Vec<Setting> {
    if service_d::is_copy(file) {
        return Vec::new();
    }
    let settings = drop_ins::settings(&drop_ins::read(file).unwrap_or_default()).into_iter();
    settings.map(|(name, value)| Setting { name, value, file: file.to_owned() }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Directories of units, those that win first.
    struct Units(tempfile::TempDir);

    impl Units {
        fn write(&self, path: &str, text: &str) {
            let path = self.0.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }

        fn conflict(&self, unit: &str) -> Option<String> {
            let root = format!("{}/", self.0.path().display());
            let dirs = Directories::open(["etc", "run", "usr"].map(|dir| self.0.path().join(dir)));
            conflict(&dirs, unit).map(|text| text.replace(&root, ""))
        }
    }

    const CONTAINER: &str = "containerd-default-my-web.service";
    const EXEC: &str = "containerd-default-my-web:probe.service";

    fn units() -> Units {
        Units(tempfile::tempdir().unwrap())
    }

    #[test]
    fn a_setting_with_which_no_container_works_is_named_with_its_file() {
        for level in
            ["containerd-", "containerd-default-", "containerd-default-my-", "containerd-default-my-web"]
        {
            let units = units();
            units.write(&format!("run/{level}.service.d/x.conf"), "[Service]\nNice=1\nType = simple\n");
            let expected =
                format!("Type=simple in run/{level}.service.d/x.conf: no container can be created");
            assert_eq!(units.conflict(CONTAINER), Some(expected));
        }
    }

    #[test]
    fn other_units_have_no_conflict() {
        let units = units();
        units.write("run/containerd-.service.d/x.conf", "[Service]\nType=simple\n");
        units.write("run/containerd-other-.service.d/x.conf", "[Unit]\nRefuseManualStart=yes\n");
        for unit in
            [name::DAEMON_SERVICE, "containerd-default-my-web::log.service", "containerd-default.slice"]
        {
            assert_eq!(units.conflict(unit), None, "{unit}");
        }
        let found = units.conflict("containerd-other-web.service").unwrap();
        assert!(found.starts_with("RefuseManualStart=yes in "), "{found}");
    }

    #[test]
    fn a_type_with_which_the_daemon_cant_start_is_found() {
        for (files, expected) in [
            (
                &[("run/containerd-shim-systemd-v1.service.d/x.conf", "Type=oneshot")][..],
                Some("Type=oneshot"),
            ),
            (&[("etc/containerd-.service.d/x.conf", "Type=forking")], Some("Type=forking")),
            (&[("etc/containerd-default-.service.d/x.conf", "Type=forking")], None),
            (&[("run/containerd-shim-systemd-v1.service.d/x.conf", "Type=simple")], None),
            (
                &[
                    ("run/containerd-shim-systemd-v1.service.d/x.conf", "Type=oneshot"),
                    ("run/containerd-shim-systemd-v1.service.d/y.conf", "Type=notify"),
                ],
                None,
            ),
        ] {
            let units = units();
            files.iter().for_each(|(file, text)| units.write(file, text));
            let dirs = Directories::open(["etc", "run", "usr"].map(|dir| units.0.path().join(dir)));
            let found = harmful_for_daemon_in(&dirs);
            assert_eq!(found.iter().map(|(_, setting, _)| setting.as_str()).next(), expected, "{files:?}");
        }
    }

    #[test]
    fn a_setting_concerns_containers_or_execs() {
        for (setting, container, exec) in [
            ("Restart=always", false, true),
            ("Restart=on-failure", false, false),
            ("UnsetEnvironment=A NOTIFY_SOCKET", false, true),
            ("RefuseManualStop=1", true, false),
            ("StopWhenUnneeded=yes", true, false),
            ("StopWhenUnneeded=no", false, false),
            ("ExitType=cgroup", true, true),
            ("ExitType=main", false, false),
            ("ExecStart=", true, true),
            ("ExecStart=\nExecStart=/bin/true", true, true),
            ("ExecStartPre=/bin/true", false, false),
            ("PIDFile=/run/web.pid", true, true),
            ("PAMName=", false, false),
            ("PrivatePIDs=yes", true, true),
            ("NoNewPrivileges=yes", false, false),
            ("#Type=simple", false, false),
        ] {
            let units = units();
            units.write("etc/containerd-default-.service.d/x.conf", setting);
            assert_eq!(units.conflict(CONTAINER).is_some(), container, "{setting}");
            assert_eq!(units.conflict(EXEC).is_some(), exec, "{setting}");
        }
    }

    #[test]
    fn settings_about_the_journal_are_found_in_all_drop_ins_of_the_unit() {
        for (file, text, is_found) in [
            ("containerd-default-.service.d", "[Service]\nLogExtraFields=A=b\n", true),
            ("service.d", "[Service]\nLogRateLimitBurst = 5\n", true),
            ("service.d", "[Service]\nLogRateLimitIntervalSec=1min\n", true),
            ("containerd-other-.service.d", "[Service]\nLogExtraFields=A=b\n", false),
            ("containerd-default-.service.d", "[Service]\nLogLevelMax=info\n", false),
        ] {
            let units = units();
            units.write(&format!("etc/{file}/x.conf"), text);
            let dirs = Directories::open([units.0.path().join("etc")]);
            assert_eq!(sets_journal(&dirs, CONTAINER), is_found, "{file}: {text}");
        }
    }

    #[test]
    fn only_the_drop_ins_that_systemd_reads_count_and_the_last_value() {
        let units = units();
        units.write("usr/containerd-default-.service.d/x.conf", "Type=simple");
        units.write("etc/containerd-default-.service.d/x.conf", "Nice=1");
        assert_eq!(units.conflict(CONTAINER), None);
        units.write("etc/containerd-.service.d/y.conf", "Type=simple");
        assert!(units.conflict(CONTAINER).is_some());
        units.write("usr/containerd-default-my-.service.d/y.conf", "Nice=1");
        assert_eq!(units.conflict(CONTAINER), None);
        units.write("run/containerd-default-.service.d/a.conf", "RefuseManualStop=yes");
        assert!(units.conflict(CONTAINER).is_some());
        units.write("run/containerd-.service.d/b.conf", "RefuseManualStop=no");
        assert_eq!(units.conflict(CONTAINER), None);
    }

    #[test]
    fn restricting_settings_of_namespaces_are_found() {
        let dir = tempfile::tempdir().unwrap();
        let write = |path: &str, text: &str| {
            let path = dir.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        };
        let text = "[Service]\n# Group=x\n User = nobody\nNice=5\nRootDirectory=/srv\nCapabilityBoundingSet=\n\
                    PrivateTmp=no\nMemoryHigh=2G\n";
        write("containerd-default-.service.d/a.conf", text);
        write("containerd-default-.service.d/b.conf", "[Service]\nTimeoutStopSec=30\nProtectHome=\n");
        write("containerd-default-.service.d/c.txt", text);
        write("containerd-default-web.service.d/a.conf", text);
        write("service.d/a.conf", text);
        let settings = ["User=nobody", "RootDirectory=/srv", "CapabilityBoundingSet="];
        let found = restricting_in(&[dir.path()]);
        assert_eq!(
            found,
            [(dir.path().join("containerd-default-.service.d/a.conf"), settings.map(str::to_owned).to_vec())]
                .into()
        );
    }
}
