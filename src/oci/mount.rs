//! Mounts and unmounts the rootfs.
//!
//! [`mount_all`] changes the working directory. It is for `launch`, a process with one thread that becomes the OCI runtime
//! afterwards.

use std::fs;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path, PathBuf};
use std::process::{Command, Stdio};

use nix::errno::Errno;
use nix::fcntl::{OFlag, OpenHow, ResolveFlag, open, openat2};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::stat::Mode;

use crate::task::request::Mount;

use super::idmap;
use super::mount_options::{Parsed, parse, shorten};

pub use super::mount_error::Error;

/// mount(2) accepts one page of options, in bytes.
const PAGE: usize = 4096;

/// Mounts all `mounts` on `rootfs`, in their order. If one fails, the others are unmounted again.
///
/// # Errors
/// The first mount that failed.
pub fn mount_all(rootfs: &Path, mounts: &[Mount]) -> Result<(), Error> {
    for item in mounts {
        let mounted = mount_one(item, rootfs);
        if let Err(error) = mounted {
            // The first error is the one to report.
            let _ = unmount_all(rootfs);
            return Err(error);
        }
    }
    Ok(())
}

/// Unmounts `path` and everything below it in this process's mount namespace. Directories above `path` may be symlinks, as
/// in `/var/run`; `path` itself may not.
///
/// A mount is removed with everything that is mounted below it. Mountpoints below `path` are only looked up if `path` is
/// not a mountpoint itself, and without following symlinks: a container may own the directories in between.
///
/// # Errors
/// A mount can't be removed.
pub fn unmount_all(path: &Path) -> Result<(), Error> {
    let path = &as_mounted(path);
    let failed = |path: &Path| {
        let path = path.to_owned();
        move |errno| Error::Unmount { path, errno }
    };
    // Mounts at the same path cover each other.
    for _ in mountpoints(path)?.iter().filter(|point| *point == path) {
        detach(path, MntFlags::UMOUNT_NOFOLLOW).map_err(failed(path))?;
    }
    // The table is in the order of mounting, so the last mount is on top.
    for point in mountpoints(path)?.iter().rev() {
        let Ok(below) = point.strip_prefix(path) else { continue };
        let detached =
            open_beneath(path, below, ResolveFlag::RESOLVE_NO_SYMLINKS | ResolveFlag::RESOLVE_NO_MAGICLINKS)
                .and_then(|mounted| detach(&path_of(&mounted), MntFlags::empty()));
        detached.map_err(failed(point))?;
    }
    Ok(())
}

/// The path in the form that mountinfo shows: without symlinks above the last component.
fn as_mounted(path: &Path) -> PathBuf {
    let parent = path.parent().and_then(|parent| parent.canonicalize().ok());
    // Nothing is mounted at a path that does not exist.
    parent.zip(path.file_name()).map_or_else(|| path.to_owned(), |(parent, name)| parent.join(name))
}

/// The mountpoints at `path` and below it, in the order of mounting.
fn mountpoints(path: &Path) -> Result<Vec<PathBuf>, Error> {
    let table = fs::read("/proc/thread-self/mountinfo").map_err(Error::Mountinfo)?;
    let points = table.split(|byte| *byte == b'\n').filter_map(mountpoint);
    Ok(points.filter(|point| point.starts_with(path)).collect())
}

/// Removes a mount and everything below it. Processes that use it keep access to it.
fn detach(path: &Path, flags: MntFlags) -> Result<(), Errno> {
    match umount2(path, flags | MntFlags::MNT_DETACH) {
        Err(Errno::EINVAL | Errno::ENOENT) => Ok(()),
        result => result,
    }
}

/// Opens a path below a directory with `O_PATH`.
fn open_beneath(dir: &Path, below: &Path, resolve: ResolveFlag) -> Result<OwnedFd, Errno> {
    let place = OFlag::O_PATH | OFlag::O_CLOEXEC;
    let dir = open(dir, place | OFlag::O_DIRECTORY, Mode::empty())?;
    let below = if below.as_os_str().is_empty() { Path::new(".") } else { below };
    openat2(&dir, below, OpenHow::new().flags(place).resolve(resolve))
}

/// A path that leads to the open file, even if it is renamed or replaced.
fn path_of(fd: &OwnedFd) -> PathBuf {
    PathBuf::from(format!("/proc/thread-self/fd/{}", fd.as_raw_fd()))
}

/// The mountpoint in a line of mountinfo, with its octal escapes resolved (proc_pid_mountinfo(5)).
pub fn mountpoint(line: &[u8]) -> Option<PathBuf> {
    let field = line.split(|byte| *byte == b' ').nth(4)?;
    let mut path = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((&byte, tail)) = rest.split_first() {
        let escaped = (byte == b'\\').then(|| tail.get(..3)).flatten();
        let code = escaped.and_then(|digits| u8::from_str_radix(std::str::from_utf8(digits).ok()?, 8).ok());
        path.push(code.unwrap_or(byte));
        rest = if code.is_some() { &tail[3..] } else { tail };
    }
    Some(PathBuf::from(std::ffi::OsStr::from_bytes(&path)))
}

/// Opens the mountpoint of a mount. Symlinks are followed as in the container, whose root is the rootfs: a directory in
/// between may be writable for another container.
fn target(rootfs: &Path, target: &str) -> Result<OwnedFd, Error> {
    let relative = Path::new(target.trim_start_matches('/'));
    if relative.components().any(|part| !matches!(part, Component::Normal(_) | Component::CurDir)) {
        return Err(Error::Target { target: target.to_owned() });
    }
    open_beneath(rootfs, relative, ResolveFlag::RESOLVE_IN_ROOT).map_err(|errno| Error::NoTarget {
        target: target.to_owned(),
        rootfs: rootfs.to_owned(),
        errno: errno.into(),
    })
}

fn mount_one(item: &Mount, rootfs: &Path) -> Result<(), Error> {
    let failed = |errno: io::Error| Error::Mount {
        kind: item.kind.clone(),
        source_name: item.source.clone(),
        target: rootfs.join(item.target.trim_start_matches('/')),
        errno,
    };
    let place = target(rootfs, &item.target)?;
    let Parsed { mut flags, mut data, helper, maps } = parse(item)?;
    if helper {
        // The helper needs a path that does not lead through /proc/self, which differs for the helper.
        return mount_with_helper(item, &fs::read_link(path_of(&place)).map_err(failed)?);
    }
    let bind = flags.contains(MsFlags::MS_BIND);
    if bind {
        data.clear();
    }
    let remount_read_only = bind && flags.contains(MsFlags::MS_RDONLY);
    flags.remove(if remount_read_only { MsFlags::MS_RDONLY } else { MsFlags::empty() });
    match &maps {
        Some(maps) if bind => {
            idmap::bind(Path::new(&item.source), &place, maps, flags.contains(MsFlags::MS_REC))
                .map_err(failed)?;
        }
        Some(maps) => idmap::overlay(rootfs, &place, maps, flags, &data).map_err(failed)?,
        None => mount_by_call(item, &place, flags, data, failed)?,
    }
    if remount_read_only {
        let flags = flags | MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY;
        // Opens the new mount. `place` is the directory that it covers.
        let mounted = target(rootfs, &item.target)?;
        mount(None::<&str>, &path_of(&mounted), None::<&str>, flags, None::<&str>).map_err(|errno| {
            let _ = detach(&path_of(&mounted), MntFlags::empty());
            failed(errno.into())
        })?;
    }
    Ok(())
}

/// Mounts with mount(2).
fn mount_by_call(
    item: &Mount,
    place: &OwnedFd,
    flags: MsFlags,
    mut data: Vec<String>,
    failed: impl Fn(io::Error) -> Error,
) -> Result<(), Error> {
    let mut text = data.join(",");
    let home = if text.len() >= PAGE - 512 { shorten(&mut data) } else { None };
    if let Some(dir) = &home {
        std::env::set_current_dir(dir).map_err(&failed)?;
        text = data.join(",");
    }
    if text.len() >= PAGE {
        return Err(Error::TooLong { length: text.len() });
    }
    let (source, kind) = (Some(item.source.as_str()), Some(item.kind.as_str()));
    mount(source, &path_of(place), kind, flags, Some(text.as_str())).map_err(|errno| failed(errno.into()))?;
    if home.is_some() {
        // Can't fail: "/" always exists.
        let _ = std::env::set_current_dir("/");
    }
    Ok(())
}

/// Mounts with mount(8): loop devices and FUSE need more than a system call.
fn mount_with_helper(item: &Mount, target: &Path) -> Result<(), Error> {
    let helper = "mount";
    let failed = |reason: String| Error::Helper { helper, kind: item.kind.clone(), reason };
    // `direct-io` is for the loop device: containerd takes it out of the file system's options, too. mount(8) cannot set it.
    let options: Vec<_> =
        item.options.iter().map(String::as_str).filter(|option| *option != "direct-io").collect();
    let output = Command::new(helper)
        .args(["-t", &item.kind, "-o", &options.join(","), "--", &item.source])
        .arg(target)
        .stdin(Stdio::null())
        .output()
        .map_err(|error| failed(error.to_string()))?;
    if output.status.success() {
        return Ok(());
    }
    Err(failed(String::from_utf8_lossy(&output.stderr).trim().to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use tempfile::TempDir;

    #[test]
    fn a_mount_is_found_by_a_path_with_symlinks() {
        let scratch = tempfile::tempdir().unwrap();
        let dir = scratch.path();
        fs::create_dir_all(dir.join("real/rootfs")).unwrap();
        std::os::unix::fs::symlink("real", dir.join("link")).unwrap();
        let real = dir.canonicalize().unwrap().join("real/rootfs");
        assert_eq!(as_mounted(&dir.join("link/rootfs")), real);
        // A symlink at the path itself is not followed.
        fs::remove_dir(&real).unwrap();
        std::os::unix::fs::symlink("/proc", &real).unwrap();
        assert_eq!(as_mounted(&dir.join("link/rootfs")), real);
        assert_eq!(as_mounted(Path::new("/no/such/rootfs")), Path::new("/no/such/rootfs"));
    }

    fn scratch() -> TempDir {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir_all(dir.path().join("rootfs/inside")).unwrap();
        dir
    }

    #[test]
    fn a_target_stays_in_the_rootfs_whatever_symlinks_are_in_it() {
        let scratch = scratch();
        let dir = scratch.path();
        let rootfs = dir.join("rootfs");
        let leads_to = |name: &str| fs::read_link(path_of(&target(&rootfs, name).unwrap())).unwrap();
        assert_eq!(leads_to(""), rootfs);
        assert_eq!(leads_to("/inside"), rootfs.join("inside"));
        std::os::unix::fs::symlink("/", rootfs.join("root")).unwrap();
        std::os::unix::fs::symlink("../../..", rootfs.join("up")).unwrap();
        assert_eq!(leads_to("root/inside"), rootfs.join("inside"));
        assert_eq!(leads_to("up"), rootfs);
        std::os::unix::fs::symlink("/nowhere", rootfs.join("dangling")).unwrap();
        assert!(matches!(target(&rootfs, "dangling"), Err(Error::NoTarget { .. })));
        assert!(matches!(target(&rootfs, "../x"), Err(Error::Target { .. })));
    }

    /// Runs in a thread with its own mount namespace. Does nothing if that is not allowed.
    fn in_own_mount_namespace(work: impl FnOnce() + Send + 'static) {
        use nix::sched::{CloneFlags, unshare};
        let ran = std::thread::spawn(|| {
            if unshare(CloneFlags::CLONE_NEWNS).is_err() {
                assert!(!nix::unistd::geteuid().is_root(), "root can make a mount namespace");
                return;
            }
            mount(None::<&str>, "/", None::<&str>, MsFlags::MS_REC | MsFlags::MS_PRIVATE, None::<&str>)
                .unwrap();
            work();
        });
        ran.join().unwrap();
    }

    fn tmpfs(at: &Path) {
        fs::create_dir_all(at).unwrap();
        mount(Some("none"), at, Some("tmpfs"), MsFlags::empty(), None::<&str>).unwrap();
    }

    fn points(below: &Path) -> Vec<PathBuf> {
        mountpoints(below).unwrap()
    }

    #[test]
    fn mounts_at_and_below_a_path_are_unmounted() {
        in_own_mount_namespace(|| {
            let scratch = scratch();
            let dir = scratch.path();
            let rootfs = dir.join("rootfs");
            for at in [rootfs.clone(), rootfs.clone(), rootfs.join("a"), rootfs.join("a/b c")] {
                tmpfs(&at);
            }
            tmpfs(&dir.join("rootfs-of-another"));
            unmount_all(&rootfs).unwrap();
            assert_eq!(points(dir), [dir.join("rootfs-of-another")]);
            // Mounts below a path that is not a mountpoint.
            for at in [rootfs.join("a"), rootfs.join("a"), rootfs.join("a/b")] {
                tmpfs(&at);
            }
            unmount_all(&rootfs).unwrap();
            assert_eq!(points(dir), [dir.join("rootfs-of-another")]);
        });
    }

    #[test]
    fn a_symlink_in_place_of_a_directory_leads_to_no_other_mount() {
        in_own_mount_namespace(|| {
            let scratch = scratch();
            let dir = scratch.path();
            let (rootfs, other) = (dir.join("rootfs"), dir.join("other"));
            tmpfs(&other.join("m"));
            std::os::unix::fs::symlink(&other, rootfs.join("a")).unwrap();
            let place = open_beneath(&rootfs, Path::new("a/m"), ResolveFlag::RESOLVE_NO_SYMLINKS);
            assert_eq!(place.map(drop), Err(Errno::ELOOP));
            unmount_all(&rootfs).unwrap();
            assert_eq!(points(dir), [other.join("m")]);
        });
    }

    #[test]
    fn a_read_only_bind_mount_is_read_only() {
        in_own_mount_namespace(|| {
            let scratch = scratch();
            let dir = scratch.path();
            let rootfs = dir.join("rootfs");
            let item = |target: &str, options: &[&str]| Mount {
                kind: "bind".to_owned(),
                source: dir.to_string_lossy().into_owned(),
                target: target.to_owned(),
                options: options.iter().map(|option| (*option).to_owned()).collect(),
            };
            mount_all(&rootfs, &[item("", &["bind"]), item("rootfs/inside", &["bind", "ro"])]).unwrap();
            fs::write(rootfs.join("file"), "").unwrap();
            let refused = fs::write(rootfs.join("rootfs/inside/file"), "").unwrap_err();
            assert_eq!(refused.kind(), io::ErrorKind::ReadOnlyFilesystem);
            unmount_all(&rootfs).unwrap();
            assert!(points(dir).is_empty());
        });
    }

    /// Files of the image belong to the container's root, and those on the disk stay as they are.
    #[test]
    fn the_ids_of_an_overlay_and_of_a_bind_mount_are_mapped() {
        use std::os::unix::fs::MetadataExt;
        let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap();
        let mut numbers = release.split('.').map(|number| number.parse::<u32>().unwrap_or_default());
        if (numbers.next(), numbers.next()) < (Some(6), Some(3)) {
            // A tmpfs can't be mapped.
            return;
        }
        in_own_mount_namespace(|| {
            let scratch = scratch();
            // Whatever file system the test runs on: this one can be mapped.
            tmpfs(scratch.path());
            let dir = scratch.path();
            let names = ["rootfs", "a", "b:c", "upper", "work"];
            names.iter().for_each(|name| fs::create_dir(dir.join(name)).unwrap());
            fs::write(dir.join("a/file"), "one").unwrap();
            fs::write(dir.join("b:c/other"), "two").unwrap();
            let option = |name: &str, path: &str| format!("{name}={}/{path}", dir.display());
            let maps = ["uidmap=0:100000:65536".to_owned(), "gidmap=0:200000:65536".to_owned()];
            let layers = format!("{}:{}/b\\:c", option("lowerdir", "a"), dir.display());
            let overlay = Mount {
                kind: "overlay".to_owned(),
                options: [layers, option("upperdir", "upper"), option("workdir", "work")]
                    .into_iter()
                    .chain(maps.clone())
                    .collect(),
                ..Mount::default()
            };
            let bind = Mount {
                kind: "bind".to_owned(),
                source: dir.join("a").to_string_lossy().into_owned(),
                options: ["rbind".to_owned(), "ro".to_owned()].into_iter().chain(maps).collect(),
                ..Mount::default()
            };
            let rootfs = dir.join("rootfs");
            let owner = |path: &Path| fs::metadata(path).map(|found| (found.uid(), found.gid())).unwrap();
            for (item, files) in [(overlay, &["file", "other"][..]), (bind, &["file"])] {
                mount_all(&rootfs, &[item]).unwrap();
                for file in files {
                    assert_eq!(owner(&rootfs.join(file)), (100_000, 200_000), "{file}");
                }
                assert_eq!(points(&rootfs).len(), 1);
                unmount_all(&rootfs).unwrap();
            }
            assert_eq!(owner(&dir.join("a/file")), (0, 0));
            assert_eq!(points(dir), [dir]);
        });
    }

    #[test]
    fn mountpoints_are_unescaped() {
        let line = br"36 35 98:0 /mnt1 /a\040b\134c rw - ext3 /dev/root rw";
        assert_eq!(mountpoint(line), Some(PathBuf::from(r"/a b\c")));
    }
}
