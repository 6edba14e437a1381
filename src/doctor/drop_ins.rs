//! Drop-ins for namespaces that restrict the OCI runtime, so that perhaps no container starts there.

use std::path::{Path, PathBuf};

use crate::probe;
use crate::unit::name::PREFIX;

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

/// The drop-ins with such settings, and the settings.
pub(super) fn restricting() -> Vec<(PathBuf, Vec<String>)> {
    let search_path = probe::systemctl(&["show", "--property=UnitPath"]).unwrap_or_default();
    let dirs = search_path.trim().strip_prefix("UnitPath=").unwrap_or_default().split_whitespace();
    dirs.flat_map(|dir| restricting_in(Path::new(dir))).collect()
}

fn restricting_in(dir: &Path) -> Vec<(PathBuf, Vec<String>)> {
    let is_of_namespace = |name: &String| name.starts_with(PREFIX) && name.ends_with("-.service.d");
    let names = |dir: &Path| {
        let mut names = probe::names(dir).unwrap_or_default();
        names.sort();
        names
    };
    let dirs = names(dir).into_iter().filter(is_of_namespace).map(|name| dir.join(name));
    let files = dirs.flat_map(|dir| names(&dir).into_iter().map(move |name| dir.join(name)));
    let files = files.filter(|path| path.extension().is_some_and(|end| end == "conf"));
    let found = files.filter_map(|path| {
        let settings = settings(&probe::file(&path).ok()?);
        (!settings.is_empty()).then_some((path, settings))
    });
    found.collect()
}

/// The restricting settings in the text of a drop-in.
fn settings(text: &str) -> Vec<String> {
    let lines = text.lines().map(str::trim).filter(|line| !line.starts_with(['#', ';']));
    let found = lines.filter_map(|line| line.split_once('=')).filter_map(|(name, value)| {
        let (name, value) = (name.trim(), value.trim());
        restricts(name, value).then(|| format!("{name}={value}"))
    });
    found.collect()
}

fn restricts(name: &str, value: &str) -> bool {
    let is_meant = RESTRICTING.iter().any(|pattern| match pattern.strip_suffix('*') {
        Some(start) => name.starts_with(start),
        None => name == *pattern,
    });
    let is_off = ["", "no", "n", "false", "f", "off", "0"].contains(&value.to_ascii_lowercase().as_str());
    // An empty set has no capability.
    is_meant && (!is_off || name == "CapabilityBoundingSet")
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

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
        let found = restricting_in(dir.path());
        assert_eq!(
            found,
            [(dir.path().join("containerd-default-.service.d/a.conf"), settings.map(str::to_owned).to_vec())]
        );
    }
}
