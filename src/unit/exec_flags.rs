//! Commands of services with flags (`ExecStart=+…`, systemd.service(5)).
//!
//! The daemon's own service has a command with the flag `privileged`, which lifts what drop-ins for all services restrict.

use std::fs::{self, File};
use std::io;
use std::iter;
use std::path::Path;

use zbus::Variant;

use crate::files;

use super::drop_ins;

/// The command of a service with flags, over D-Bus.
pub(super) const WITH_FLAGS: &str = "ExecStartEx";

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
/// nothing if the file needs no correction, or if the unit was unloaded.
///
/// # Errors
/// The file can't be replaced.
pub(super) fn correct_file(dir: &Path, unit: &str) -> io::Result<()> {
    let path = dir.join(unit);
    let Ok(text) = drop_ins::read(&path).map(|text| String::from_utf8_lossy(&text).into_owned()) else {
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
