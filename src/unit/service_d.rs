//! Drop-ins for all services of the machine (`service.d/`, systemd.unit(5)) that restrict what runs in a service.
//!
//! Such a drop-in overrides the properties that a transient unit was asked for, and binds the OCI runtime: under
//! `RestrictNamespaces=yes` it can't create any container. The flag `privileged` of a command (`ExecStart=+…`) lifts these
//! restrictions, but also those of a drop-in for the containers of one namespace, which the administrator wants. So it is
//! used only where there is no other way.

use std::fs::{self, File};
use std::io;
use std::iter;
use std::path::{Path, PathBuf};

use zbus::Variant;

use crate::files;

/// Where drop-ins can be (systemd.unit(5), "System Unit Search Path").
const SEARCH_PATH: [&str; 9] = [
    "/etc/systemd/system.control",
    "/run/systemd/system.control",
    "/etc/systemd/system",
    "/etc/systemd/system.attached",
    "/run/systemd/system",
    "/run/systemd/system.attached",
    "/usr/local/lib/systemd/system",
    "/usr/lib/systemd/system",
    "/lib/systemd/system",
];

/// The beginnings of the settings that the flag lifts (systemd.exec(5)).
const RESTRICTIONS: [&str; 34] = [
    "AmbientCapabilities",
    "AppArmorProfile",
    "BindPaths",
    "BindReadOnlyPaths",
    "CapabilityBoundingSet",
    "DynamicUser",
    "ExecPaths",
    "Group",
    "InaccessiblePaths",
    "Limit",
    "LockPersonality",
    "MemoryDenyWriteExecute",
    "MountAPIVFS",
    "MountFlags",
    "NoExecPaths",
    "NoNewPrivileges",
    "PAMName",
    "Private",
    "ProcSubset",
    "Protect",
    "ReadOnlyPaths",
    "ReadWritePaths",
    "RemoveIPC",
    "RestrictAddressFamilies",
    "RestrictNamespaces",
    "RestrictRealtime",
    "RestrictSUIDSGID",
    "SELinuxContext",
    "SecureBits",
    "SmackProcessLabel",
    "SupplementaryGroups",
    "SystemCall",
    "TemporaryFileSystem",
    "User",
];

/// The command of a service with flags, over D-Bus.
pub(super) const WITH_FLAGS: &str = "ExecStartEx";

/// No drop-in and no file of a transient unit is larger.
const MAX_BYTES: u64 = 1 << 20;

/// True if a drop-in for all services restricts what runs in them.
pub(super) fn restricts() -> bool {
    SEARCH_PATH.iter().flat_map(|dir| drop_ins(&Path::new(dir).join("service.d"))).any(|file| {
        // A masked file is a link to /dev/null, which is no regular file.
        let text = files::read_regular(&file, MAX_BYTES).unwrap_or_default();
        has_restriction(&String::from_utf8_lossy(&text))
    })
}

fn drop_ins(dir: &Path) -> Vec<PathBuf> {
    let items = fs::read_dir(dir).into_iter().flatten().flatten().map(|item| item.path());
    items.filter(|path| path.extension().is_some_and(|end| end == "conf")).collect()
}

fn has_restriction(text: &str) -> bool {
    // A line that continues the one before it can look like a setting. Lifting too much breaks nothing.
    let names =
        text.lines().filter_map(|line| line.trim_start().split_once('=')).map(|(name, _)| name.trim_end());
    let mut names = names.filter(|name| !name.starts_with(['#', ';']));
    names.any(|name| RESTRICTIONS.iter().any(|begin| name.starts_with(begin)))
}

/// The properties, with a command that has all privileges.
pub(super) fn unrestricted<'a>(properties: &[(&'a str, Variant<'a>)]) -> Vec<(&'a str, Variant<'a>)> {
    properties
        .iter()
        .map(|(name, value)| lift(name, value).unwrap_or_else(|| (name, value.clone())))
        .collect()
}

/// The same command as `ExecStartEx`, which takes flags. `None` for another property.
fn lift<'a>(name: &str, value: &Variant<'a>) -> Option<(&'static str, Variant<'a>)> {
    let commands: Vec<(String, Vec<String>, bool)> =
        (name == "ExecStart").then(|| value.clone().try_into().ok()).flatten()?;
    let with_flags = commands.into_iter().map(|(path, arguments, ignores_failure)| {
        let ignore = ignores_failure.then(|| "ignore-failure".to_owned());
        let flags: Vec<String> = iter::once("privileged".to_owned()).chain(ignore).collect();
        (path, arguments, flags)
    });
    Some((WITH_FLAGS, with_flags.collect::<Vec<_>>().into()))
}

/// Corrects the file that systemd has written for a transient unit with such a command. systemd 252 names the command
/// `ExecStartEx=`, which it can't read when it reloads (257 names it `ExecStart=`; the versions between were not tried). Does
/// nothing if the file needs no correction, or the unit is gone.
///
/// # Errors
/// The file can't be replaced.
pub(super) fn correct_file(dir: &Path, unit: &str) -> io::Result<()> {
    let path = dir.join(unit);
    let Ok(text) =
        files::read_regular(&path, MAX_BYTES).map(|text| String::from_utf8_lossy(&text).into_owned())
    else {
        return Ok(());
    };
    let wrong = "\nExecStartEx=";
    if !text.contains(wrong) {
        return Ok(());
    }
    // With a later time, systemd would say that the file has changed.
    let written = fs::metadata(&path)?.modified()?;
    let new = dir.join(format!(".{unit}.new"));
    files::replace(&path, &new, 0o644, text.replace(wrong, "\nExecStart=").as_bytes())?;
    File::options().write(true).open(&path)?.set_modified(written)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_that_systemd_could_not_read_again_is_corrected() {
        let dir = tempfile::tempdir().unwrap();
        let unit = "containerd-default-web.service";
        correct_file(dir.path(), unit).unwrap();
        let path = dir.path().join(unit);
        let good = "[Service]\nExecStart=\nExecStart=+\"/bin/shim\" \"launch\"\n";
        for written in [good, "[Service]\nExecStartEx=\nExecStartEx=+\"/bin/shim\" \"launch\"\n"] {
            fs::write(&path, written).unwrap();
            let before = fs::metadata(&path).unwrap().modified().unwrap();
            correct_file(dir.path(), unit).unwrap();
            assert_eq!(fs::read_to_string(&path).unwrap(), good);
            assert_eq!(fs::metadata(&path).unwrap().modified().unwrap(), before);
        }
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[test]
    fn settings_that_restrict_a_process_are_found() {
        for text in [
            "[Service]\nPrivateDevices=yes\n",
            "[Service]\n  NoNewPrivileges = yes",
            "[Unit]\nAfter=x.service\n\n[Service]\nRestart=no\nLimitNOFILE=100\n",
            "[Service]\nUser=nobody",
        ] {
            assert!(has_restriction(text), "{text}");
        }
    }

    #[test]
    fn other_settings_are_no_restriction() {
        for text in [
            "",
            "[Service]\nTimeoutStopFailureMode=abort\n",
            "[Service]\n#PrivateDevices=yes\n; User=nobody\n",
            "[Unit]\nOnFailure=alert@%n.service\n[Service]\nRestart=on-failure\nMemoryMax=1G\nUMask=0077\n",
        ] {
            assert!(!has_restriction(text), "{text}");
        }
    }

    #[test]
    fn only_drop_ins_of_a_directory_count() {
        let dir = tempfile::tempdir().unwrap();
        for name in ["a.conf", "b.conf.bak", "c"] {
            fs::write(dir.path().join(name), "").unwrap();
        }
        assert_eq!(drop_ins(dir.path()), [dir.path().join("a.conf")]);
        assert!(drop_ins(&dir.path().join("absent")).is_empty());
    }

    #[test]
    fn a_command_keeps_its_arguments_and_flags() {
        let command = vec!["/bin/shim".to_owned(), "launch".to_owned()];
        let list = |fails: bool| {
            let start: Variant<'_> = vec![("/bin/shim".to_owned(), command.clone(), !fails)].into();
            unrestricted(&[("Type", "oneshot".into()), ("ExecStart", start)])
        };
        let expected = |flags: &[&str]| -> Variant<'static> {
            let flags: Vec<String> = flags.iter().map(|flag| (*flag).to_owned()).collect();
            vec![("/bin/shim".to_owned(), command.clone(), flags)].into()
        };
        assert_eq!(list(true), [("Type", "oneshot".into()), ("ExecStartEx", expected(&["privileged"]))]);
        assert_eq!(list(false)[1], ("ExecStartEx", expected(&["privileged", "ignore-failure"])));
    }
}
