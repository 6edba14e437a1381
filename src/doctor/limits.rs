//! Limits of the kernel, and space for records.

use std::os::unix::fs::MetadataExt;
use std::path::Path;

use nix::sys::statvfs::{FsFlags, statvfs};

use crate::config::STATE_DIR;

use super::Check;
use crate::probe::{self, Known, Unknown};

/// `LimitNOFILE=` of the daemon's service.
const DESCRIPTORS: u64 = 1_048_576;

/// If less than this is free, the next container may fail.
const FULL_BYTES: u64 = 1 << 20;
const FULL_INODES: u64 = 100;

/// If less than this is free, `doctor` warns.
const LOW_BYTES: u64 = 32 << 20;
const LOW_PERCENT: u64 = 5;

/// The facts about limits and free space.
#[derive(Debug)]
pub struct Facts {
    space: Vec<(&'static str, Known<Space>)>,
    /// What is wrong with the directory of all records.
    state: Option<&'static str>,
    /// `fs.nr_open`
    most_descriptors: Known<u64>,
    /// `fs.file-max`, and how many files are open.
    files: Known<(u64, u64)>,
    /// `fs.inotify.max_user_instances`
    inotify: Known<u64>,
    /// `fs.inotify.max_user_watches`
    watches: Known<u64>,
    /// `kernel.pid_max` or `kernel.threads-max`, and how many threads there are.
    threads: Known<(u64, u64)>,
    /// `kernel.keys.root_maxkeys`
    keys: Known<u64>,
}

/// Room on a file system.
#[derive(Clone, Debug)]
struct Space {
    bytes: u64,
    free_bytes: u64,
    inodes: u64,
    free_inodes: u64,
    /// The file system's device number.
    device: u64,
}

pub(super) fn collect() -> Facts {
    let mut space: Vec<_> = ["/run", STATE_DIR, "/var/lib/containerd"].map(|path| (path, space(path))).into();
    // The records may be on a file system of their own.
    space.dedup_by_key(|(path, space)| space.as_ref().map_or(path.len() as u64, |space| space.device));
    Facts {
        space,
        state: unusable(Path::new(STATE_DIR)),
        most_descriptors: probe::number("/proc/sys/fs/nr_open"),
        files: files(),
        inotify: probe::number("/proc/sys/fs/inotify/max_user_instances"),
        watches: probe::number("/proc/sys/fs/inotify/max_user_watches"),
        threads: threads(),
        keys: probe::number("/proc/sys/kernel/keys/root_maxkeys"),
    }
}

/// Why the daemon can't keep files in a directory. One that does not exist is made.
fn unusable(dir: &Path) -> Option<&'static str> {
    if std::fs::symlink_metadata(dir).is_ok() && !dir.is_dir() {
        return Some("is no directory");
    }
    let is_read_only = statvfs(dir).is_ok_and(|found| found.flags().contains(FsFlags::ST_RDONLY));
    is_read_only.then_some("is on a read-only file system")
}

fn space(path: &str) -> Known<Space> {
    let found = statvfs(path).map_err(|errno| match errno {
        nix::errno::Errno::ENOENT => Unknown::Absent(path.to_owned()),
        nix::errno::Errno::EACCES => Unknown::Forbidden(path.to_owned()),
        errno => Unknown::Failed(format!("{path}: {errno}")),
    })?;
    let size = found.fragment_size();
    Ok(Space {
        bytes: found.blocks() * size,
        free_bytes: found.blocks_available() * size,
        inodes: found.files(),
        free_inodes: found.files_available(),
        device: std::fs::metadata(path).map_or(0, |metadata| metadata.dev()),
    })
}

fn files() -> Known<(u64, u64)> {
    let open = probe::file("/proc/sys/fs/file-nr")?;
    let open = open.split_whitespace().next().and_then(|word| word.parse().ok()).unwrap_or(0);
    Ok((probe::number("/proc/sys/fs/file-max")?, open))
}

fn threads() -> Known<(u64, u64)> {
    let most = probe::number("/proc/sys/kernel/pid_max")?.min(probe::number("/proc/sys/kernel/threads-max")?);
    // The fourth word is `running/all`.
    let load = probe::file("/proc/loadavg")?;
    let all = load.split_whitespace().nth(3).and_then(|word| word.split_once('/')?.1.parse().ok());
    Ok((most, all.unwrap_or(0)))
}

pub(super) fn checks(facts: &Facts) -> Vec<Check> {
    let mut checks: Vec<Check> =
        facts.space.iter().filter_map(|(path, space)| room(path, space.as_ref())).collect();
    checks.extend(state(facts));
    checks.push(at_least("descriptors", "fs.nr_open", &facts.most_descriptors, DESCRIPTORS));
    checks.push(left("files", "fs.file-max", &facts.files));
    checks.push(at_least("inotify", "fs.inotify.max_user_instances", &facts.inotify, 128));
    // The daemon has three for each container. Those of other programs of root count, too.
    checks.push(at_least("inotify", "fs.inotify.max_user_watches", &facts.watches, 16_384));
    checks.push(left("threads", "kernel.pid_max and kernel.threads-max", &facts.threads));
    // runc makes a keyring for each container.
    checks.push(at_least("keys", "kernel.keys.root_maxkeys", &facts.keys, 10_000));
    checks
}

/// The checks about the directory of all records alone.
pub(super) fn checks_of_state_dir(facts: &Facts) -> Vec<Check> {
    let space = facts.space.iter().filter(|(path, _)| *path == STATE_DIR);
    space.filter_map(|(path, space)| room(path, space.as_ref())).chain(state(facts)).collect()
}

fn state(facts: &Facts) -> Option<Check> {
    let advice =
        "without this directory no container starts: remove it or mount it read-write, whichever applies";
    Some(Check::error("records", format!("{STATE_DIR} {}", facts.state?), advice))
}

fn room(path: &str, space: Result<&Space, &Unknown>) -> Option<Check> {
    const NAME: &str = "space";
    let space = match space {
        Ok(space) => space,
        Err(unknown) if unknown.is_absent() => return None,
        Err(unknown) => return Some(Check::unknown(NAME, unknown)),
    };
    let inodes = match space.inodes {
        // btrfs and some other file systems do not count inodes.
        0 => String::new(),
        _ => format!(" and {} of {} inodes", space.free_inodes, space.inodes),
    };
    let found = format!("{path} has {} of {} MiB{inodes} left", space.free_bytes >> 20, space.bytes >> 20);
    let lacks =
        |bytes: u64, inodes: u64| space.free_bytes < bytes || space.inodes > 0 && space.free_inodes < inodes;
    let advice = match path {
        "/run" | STATE_DIR => "find what fills it (du -xh), or make it larger (mount -o remount,size=…)",
        _ => "remove images and snapshots that nothing uses, or make the file system larger",
    };
    let few = LOW_BYTES.min(space.bytes / 100 * LOW_PERCENT);
    Some(if lacks(FULL_BYTES, FULL_INODES) {
        Check::error(NAME, found, advice)
    } else if lacks(few, space.inodes / 100 * LOW_PERCENT) {
        Check::warning(NAME, found, advice)
    } else {
        Check::ok(NAME, found)
    })
}

fn at_least(name: &'static str, sysctl: &str, value: &Known<u64>, least: u64) -> Check {
    match value {
        Err(unknown) => Check::unknown(name, unknown),
        Ok(value) if *value < least => {
            let advice = format!(
                "write \"{sysctl} = {least}\" into /etc/sysctl.d/containers.conf, then sysctl --system"
            );
            Check::warning(name, format!("{sysctl} is {value}"), advice)
        }
        Ok(value) => Check::ok(name, format!("{sysctl} is {value}")),
    }
}

/// Warns if less than a tenth of a shared resource is free.
fn left(name: &'static str, sysctl: &str, numbers: &Known<(u64, u64)>) -> Check {
    match numbers {
        Err(unknown) => Check::unknown(name, unknown),
        Ok((most, used)) if *used > most / 10 * 9 => {
            let advice = format!("find who uses them, or raise {sysctl} in /etc/sysctl.d/containers.conf");
            Check::warning(name, format!("{used} of {most} are in use"), advice)
        }
        Ok((most, used)) => Check::ok(name, format!("{used} of {most} are in use")),
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Status, only_fault};
    use super::*;

    fn run(free_bytes: u64, free_inodes: u64) -> (&'static str, Known<Space>) {
        ("/run", Ok(Space { bytes: 2 << 30, free_bytes, inodes: 800_000, free_inodes, device: 1 }))
    }

    fn healthy() -> Facts {
        Facts {
            space: vec![run(1 << 30, 700_000), ("/var/lib/containerd", Err(Unknown::Absent("x".to_owned())))],
            state: None,
            most_descriptors: Ok(1 << 30),
            files: Ok((u64::MAX / 2, 3000)),
            inotify: Ok(128),
            watches: Ok(16_384),
            threads: Ok((32_768, 300)),
            keys: Ok(1_000_000),
        }
    }

    fn fault(facts: &Facts) -> Check {
        only_fault(checks(facts))
    }

    #[test]
    fn a_machine_with_room_is_ok() {
        assert!(
            checks(&healthy()).iter().all(|check| check.status == Status::Ok),
            "{:?}",
            checks(&healthy())
        );
    }

    #[test]
    fn a_full_disk_is_an_error_and_one_that_is_nearly_full_a_warning() {
        for (space, status) in [
            (run(1000, 700_000), Status::Error),
            (run(1 << 30, 5), Status::Error),
            (run(20 << 20, 700_000), Status::Warning),
            (run(1 << 30, 30_000), Status::Warning),
        ] {
            let check = fault(&Facts { space: vec![space], ..healthy() });
            assert_eq!((check.name, check.status), ("space", status), "{check:?}");
            assert!(check.found.contains("/run") && check.advice.contains("du -xh"), "{check:?}");
        }
    }

    #[test]
    fn a_directory_of_records_that_cant_be_written_is_an_error() {
        let dir = tempfile::tempdir().unwrap();
        let (file, link) = (dir.path().join("file"), dir.path().join("link"));
        std::fs::write(&file, "").unwrap();
        std::os::unix::fs::symlink("/absent", &link).unwrap();
        assert_eq!([&file, &link].map(|path| unusable(path)), [Some("is no directory"); 2]);
        assert_eq!([dir.path(), Path::new("/absent")].map(unusable), [None; 2]);
        let check = fault(&Facts { state: unusable(&file), ..healthy() });
        assert!(check.status == Status::Error && check.found.contains(STATE_DIR), "{check:?}");
    }

    #[test]
    fn a_file_system_without_a_number_of_inodes_is_not_full() {
        let space = Space { bytes: 1 << 40, free_bytes: 1 << 39, inodes: 0, free_inodes: 0, device: 2 };
        let checks = checks(&Facts { space: vec![("/var/lib/containerd", Ok(space))], ..healthy() });
        assert_eq!(checks[0].status, Status::Ok);
    }

    #[test]
    fn limits_that_are_too_low_say_how_to_raise_them() {
        let check = fault(&Facts { most_descriptors: Ok(4096), ..healthy() });
        assert!(check.advice.contains("fs.nr_open = 1048576"), "{check:?}");
        assert_eq!(fault(&Facts { inotify: Ok(8), ..healthy() }).name, "inotify");
        let found = fault(&Facts { watches: Ok(8192), ..healthy() });
        assert!(found.found.contains("max_user_watches"), "{}", found.found);
        assert_eq!(fault(&Facts { threads: Ok((1000, 950)), ..healthy() }).name, "threads");
        assert_eq!(fault(&Facts { files: Ok((1000, 999)), ..healthy() }).name, "files");
    }
}
