//! The directories with unit files and drop-ins (systemd.unit(5), "System Unit Search Path").

use std::fs::{File, OpenOptions};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use nix::fcntl::OFlag;
use rustix::fs::{AtFlags, statat};

use crate::id::UnitName;

use super::drop_ins;

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
pub const TRANSIENT: &str = "/run/systemd/transient";

/// Those of the directories that exist, open.
///
/// A start of a unit looks for drop-ins under some eighty paths, of which usually none exists. An open directory is most of the
/// way to each of its paths.
pub(super) struct Directories(Vec<(PathBuf, File)>);

impl Directories {
    /// Opens all directories.
    pub(super) fn open_all() -> Self {
        Self::open(ALL.map(Path::new))
    }

    /// Opens directories, those that win first.
    pub(super) fn open<P: Into<PathBuf>>(dirs: impl IntoIterator<Item = P>) -> Self {
        let flags = (OFlag::O_PATH | OFlag::O_DIRECTORY).bits();
        let open = |path: PathBuf| {
            let dir = OpenOptions::new().read(true).custom_flags(flags).open(&path).ok()?;
            Some((path, dir))
        };
        Self(dirs.into_iter().map(Into::into).filter_map(open).collect())
    }

    /// The drop-ins in the directories NAME`.d`, those that win first.
    pub(super) fn drop_ins_for(&self, name: &str) -> impl Iterator<Item = PathBuf> + use<'_> {
        let name = format!("{name}.d");
        let having = self.0.iter().filter_map(move |(path, dir)| {
            // A directory that can't be looked at is listed, and found to be empty.
            let is_missing =
                statat(dir, &*name, AtFlags::empty()).is_err_and(|e| e == rustix::io::Errno::NOENT);
            (!is_missing).then(|| path.join(&name))
        });
        having.flat_map(|dir| drop_ins::in_dir(&dir))
    }
}

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
