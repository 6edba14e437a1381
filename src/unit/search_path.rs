//! The directories with unit files and drop-ins (systemd.unit(5), "System Unit Search Path").

use std::path::Path;

use crate::id::UnitName;

/// All directories, those that win first.
pub(super) const ALL: [&str; 13] = [
    "/etc/systemd/system.control",
    "/run/systemd/system.control",
    TRANSIENT,
    "/run/systemd/generator.early",
    "/etc/systemd/system",
    "/etc/systemd/system.attached",
    RUNTIME,
    "/run/systemd/system.attached",
    "/run/systemd/generator",
    "/usr/local/lib/systemd/system",
    "/usr/lib/systemd/system",
    "/lib/systemd/system",
    "/run/systemd/generator.late",
];

/// Files that exist until the next boot.
pub(super) const RUNTIME: &str = "/run/systemd/system";

/// Files of transient units.
const TRANSIENT: &str = "/run/systemd/transient";

/// Whether somebody has written a unit of this name, or masked it. systemd starts no transient unit of such a name.
pub fn has_file(unit: &UnitName) -> bool {
    has_file_in(&ALL, unit)
}

/// Whether systemd has the file of a transient unit: it removes the file when it unloads the unit.
pub fn has_transient_file(unit: &UnitName) -> bool {
    Path::new(TRANSIENT).join(unit.as_str()).exists()
}

fn has_file_in(dirs: &[&str], unit: &UnitName) -> bool {
    let mut dirs = dirs.iter().filter(|dir| **dir != TRANSIENT);
    // A mask is a link to /dev/null.
    dirs.any(|dir| Path::new(dir).join(unit.as_str()).symlink_metadata().is_ok())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    #[test]
    fn files_and_masks_take_a_name() {
        let (first, second) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let dirs = [first.path().to_str().unwrap(), second.path().to_str().unwrap()];
        let unit = UnitName::new("containerd-default-web.service").unwrap();
        fs::create_dir(first.path().join(format!("{unit}.d"))).unwrap();
        assert!(!has_file_in(&dirs, &unit));
        let path = second.path().join(unit.as_str());
        fs::write(&path, "").unwrap();
        assert!(has_file_in(&dirs, &unit));
        fs::remove_file(&path).unwrap();
        std::os::unix::fs::symlink("/dev/null", &path).unwrap();
        assert!(has_file_in(&dirs, &unit));
    }
}
