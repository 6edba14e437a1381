//! The rootfs: mounting what containerd asks for, and taking it away again.
//!
//! [`mount_all`] is for `launch`, a process of one thread that becomes the OCI runtime afterwards: it
//! may change its working directory.

use std::fs;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path, PathBuf};
use std::process::{Command, Stdio};

use nix::errno::Errno;
use nix::mount::{MntFlags, MsFlags, mount, umount2};

use crate::task::request::Mount;

/// mount(2) takes one page of options.
const PAGE: usize = 4096;

/// What can go wrong with mounts.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The kernel refused a mount.
    #[error("failed to mount rootfs component: {kind} from {source_name} on {target}: {errno}")]
    Mount {
        /// File system type.
        kind: String,
        /// What was mounted.
        source_name: String,
        /// Where.
        target: PathBuf,
        /// Why not.
        errno: io::Error,
    },
    /// An option that we can't carry out.
    #[error("failed to mount rootfs component: option {option:?} of {kind} is not supported")]
    Option {
        /// The option.
        option: String,
        /// File system type.
        kind: String,
    },
    /// `target` leads out of the rootfs.
    #[error("failed to mount rootfs component: target {target:?} is not a path below the rootfs")]
    Target {
        /// As given.
        target: String,
    },
    /// The options don't fit into a page, also with short names.
    #[error("failed to mount rootfs component: mount options of {length} bytes are too long")]
    TooLong {
        /// Their length.
        length: usize,
    },
    /// The mount helper failed.
    #[error("failed to mount rootfs component: {helper} for {kind}: {reason}")]
    Helper {
        /// The program.
        helper: &'static str,
        /// File system type.
        kind: String,
        /// What it said.
        reason: String,
    },
    /// The kernel refused to unmount.
    #[error("failed rootfs umount: {path}: {errno}")]
    Unmount {
        /// The mountpoint.
        path: PathBuf,
        /// Why not.
        errno: Errno,
    },
    /// The list of mounts can't be read.
    #[error("failed rootfs umount: read /proc/self/mountinfo: {0}")]
    Mountinfo(#[source] io::Error),
}

/// Mounts everything on `rootfs`, parents first. What was mounted is unmounted again on failure.
///
/// # Errors
/// The first mount that failed.
pub fn mount_all(rootfs: &Path, mounts: &[Mount]) -> Result<(), Error> {
    for item in mounts {
        let mounted = target(rootfs, &item.target).and_then(|target| mount_one(item, &target));
        if let Err(error) = mounted {
            // The first error is the one to report.
            let _ = unmount_all(rootfs);
            return Err(error);
        }
    }
    Ok(())
}

/// Unmounts `path` and everything below it in this process's mount namespace, deepest first. Symlinks may lead to
/// it, as in `/var/run`; itself it is none.
///
/// # Errors
/// A mount that can't be taken away.
pub fn unmount_all(path: &Path) -> Result<(), Error> {
    let path = &as_mounted(path);
    let table = fs::read("/proc/self/mountinfo").map_err(Error::Mountinfo)?;
    let mut mountpoints: Vec<PathBuf> = table
        .split(|byte| *byte == b'\n')
        .filter_map(mountpoint)
        .filter(|point| point.starts_with(path))
        .collect();
    // The table is in the order of mounting: the last one lies on top.
    mountpoints.reverse();
    for point in mountpoints {
        let unmounted = match umount2(&point, MntFlags::UMOUNT_NOFOLLOW) {
            // Something still looks at it; it goes when that does.
            Err(Errno::EBUSY) => umount2(&point, MntFlags::UMOUNT_NOFOLLOW | MntFlags::MNT_DETACH),
            result => result,
        };
        match unmounted {
            Ok(()) | Err(Errno::EINVAL | Errno::ENOENT) => {}
            Err(errno) => return Err(Error::Unmount { path: point, errno }),
        }
    }
    Ok(())
}

/// The path as mountinfo has it.
fn as_mounted(path: &Path) -> PathBuf {
    let parent = path.parent().and_then(|parent| parent.canonicalize().ok());
    // Where nothing is, nothing is mounted.
    parent.zip(path.file_name()).map_or_else(|| path.to_owned(), |(parent, name)| parent.join(name))
}

/// The mountpoint of a line of mountinfo, its octal escapes resolved (proc_pid_mountinfo(5)).
fn mountpoint(line: &[u8]) -> Option<PathBuf> {
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

/// Joins without leaving the rootfs; a symlink on the way is refused by the check for `..` in what
/// containerd sends and by the kernel's own lookup below a mount that containerd made.
fn target(rootfs: &Path, target: &str) -> Result<PathBuf, Error> {
    let relative = Path::new(target.trim_start_matches('/'));
    if relative.components().any(|part| !matches!(part, Component::Normal(_) | Component::CurDir)) {
        return Err(Error::Target { target: target.to_owned() });
    }
    let joined = if target.is_empty() { rootfs.to_owned() } else { rootfs.join(relative) };
    let resolved = joined.canonicalize().unwrap_or_else(|_| joined.clone());
    let real_rootfs = rootfs.canonicalize().unwrap_or_else(|_| rootfs.to_owned());
    if !resolved.starts_with(&real_rootfs) && !resolved.starts_with(rootfs) {
        return Err(Error::Target { target: target.to_owned() });
    }
    Ok(joined)
}

fn mount_one(item: &Mount, target: &Path) -> Result<(), Error> {
    let failed = |errno: Errno| Error::Mount {
        kind: item.kind.clone(),
        source_name: item.source.clone(),
        target: target.to_owned(),
        errno: errno.into(),
    };
    let Parsed { mut flags, mut data, helper } = parse(item)?;
    if helper {
        return mount_with_helper(item, target);
    }
    let bind = flags.contains(MsFlags::MS_BIND);
    if bind {
        data.clear();
    }
    let remount_read_only = bind && flags.contains(MsFlags::MS_RDONLY);
    flags.remove(if remount_read_only { MsFlags::MS_RDONLY } else { MsFlags::empty() });
    let mut text = data.join(",");
    let home = if text.len() >= PAGE - 512 { shorten(&mut data) } else { None };
    if let Some(dir) = &home {
        std::env::set_current_dir(dir).map_err(|errno| Error::Mount {
            kind: item.kind.clone(),
            source_name: item.source.clone(),
            target: target.to_owned(),
            errno,
        })?;
        text = data.join(",");
    }
    if text.len() >= PAGE {
        return Err(Error::TooLong { length: text.len() });
    }
    mount(Some(item.source.as_str()), target, Some(item.kind.as_str()), flags, Some(text.as_str()))
        .map_err(failed)?;
    if home.is_some() {
        // The way back can't fail: "/" is always there.
        let _ = std::env::set_current_dir("/");
    }
    if remount_read_only {
        let flags = flags | MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY;
        mount(None::<&str>, target, None::<&str>, flags, None::<&str>).map_err(|errno| {
            let _ = umount2(target, MntFlags::MNT_DETACH);
            failed(errno)
        })?;
    }
    Ok(())
}

/// A file system in user space: its daemon lives on in the cgroup of whoever mounts it, and nothing ends it when its
/// mount goes with a mount namespace.
pub fn leaves_a_daemon(item: &Mount) -> bool {
    item.kind.starts_with("fuse.") || item.kind.starts_with("fuse3.")
}

struct Parsed {
    flags: MsFlags,
    data: Vec<String>,
    /// mount(8) knows how to do it.
    helper: bool,
}

fn parse(item: &Mount) -> Result<Parsed, Error> {
    let mut parsed = Parsed { flags: MsFlags::empty(), data: Vec::new(), helper: leaves_a_daemon(item) };
    if item.kind == "bind" {
        parsed.flags |= MsFlags::MS_BIND;
    }
    for option in &item.options {
        let unsupported = ["uidmap=", "gidmap=", "X-containerd."];
        if unsupported.iter().any(|prefix| option.starts_with(prefix)) {
            return Err(Error::Option { option: option.clone(), kind: item.kind.clone() });
        }
        match flag(option) {
            Some((flag, true)) => parsed.flags |= flag,
            Some((flag, false)) => parsed.flags.remove(flag),
            None if option == "loop" => parsed.helper = true,
            None if option == "defaults" => {}
            None => parsed.data.push(option.clone()),
        }
    }
    Ok(parsed)
}

/// Mount flags by name, and whether the name sets or clears them (mount(8)).
fn flag(option: &str) -> Option<(MsFlags, bool)> {
    Some(match option {
        "async" => (MsFlags::MS_SYNCHRONOUS, false),
        "atime" => (MsFlags::MS_NOATIME, false),
        "bind" => (MsFlags::MS_BIND, true),
        "dev" => (MsFlags::MS_NODEV, false),
        "diratime" => (MsFlags::MS_NODIRATIME, false),
        "dirsync" => (MsFlags::MS_DIRSYNC, true),
        "exec" => (MsFlags::MS_NOEXEC, false),
        "mand" => (MsFlags::MS_MANDLOCK, true),
        "noatime" => (MsFlags::MS_NOATIME, true),
        "nodev" => (MsFlags::MS_NODEV, true),
        "nodiratime" => (MsFlags::MS_NODIRATIME, true),
        "noexec" => (MsFlags::MS_NOEXEC, true),
        "nomand" => (MsFlags::MS_MANDLOCK, false),
        "norelatime" => (MsFlags::MS_RELATIME, false),
        "nostrictatime" => (MsFlags::MS_STRICTATIME, false),
        "nosuid" => (MsFlags::MS_NOSUID, true),
        "rbind" => (MsFlags::MS_BIND.union(MsFlags::MS_REC), true),
        "relatime" => (MsFlags::MS_RELATIME, true),
        "remount" => (MsFlags::MS_REMOUNT, true),
        "ro" => (MsFlags::MS_RDONLY, true),
        "rw" => (MsFlags::MS_RDONLY, false),
        "strictatime" => (MsFlags::MS_STRICTATIME, true),
        "suid" => (MsFlags::MS_NOSUID, false),
        "sync" => (MsFlags::MS_SYNCHRONOUS, true),
        _ => return None,
    })
}

/// Loop devices and FUSE need more than a system call.
fn mount_with_helper(item: &Mount, target: &Path) -> Result<(), Error> {
    let helper = "mount";
    let failed = |reason: String| Error::Helper { helper, kind: item.kind.clone(), reason };
    let output = Command::new(helper)
        .args(["-t", &item.kind, "-o", &item.options.join(","), "--", &item.source])
        .arg(target)
        .stdin(Stdio::null())
        .output()
        .map_err(|error| failed(error.to_string()))?;
    if output.status.success() {
        return Ok(());
    }
    Err(failed(String::from_utf8_lossy(&output.stderr).trim().to_owned()))
}

/// Makes an overlay's options shorter: layers by names relative to the directory that they share,
/// which is returned for the caller to change to.
fn shorten(data: &mut [String]) -> Option<PathBuf> {
    const LOWER: &str = "lowerdir=";
    let option = data.iter_mut().find(|option| option.starts_with(LOWER))?;
    let layers: Vec<PathBuf> = option[LOWER.len()..].split(':').map(PathBuf::from).collect();
    let mut home = layers.first()?.parent()?.to_owned();
    while !layers.iter().all(|layer| layer.starts_with(&home)) {
        home = home.parent()?.to_owned();
    }
    let relative =
        layers.iter().map(|layer| layer.strip_prefix(&home).map(|path| path.to_string_lossy().into_owned()));
    let relative: Result<Vec<String>, _> = relative.collect();
    *option = format!("{LOWER}{}", relative.ok()?.join(":"));
    Some(home)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mount_is_found_by_a_path_with_symlinks() {
        let dir = std::env::temp_dir().join(format!("mount-test-{}", std::process::id()));
        let _ = fs::remove_dir_all(&dir);
        fs::create_dir_all(dir.join("real/rootfs")).unwrap();
        std::os::unix::fs::symlink("real", dir.join("link")).unwrap();
        let real = dir.canonicalize().unwrap().join("real/rootfs");
        assert_eq!(as_mounted(&dir.join("link/rootfs")), real);
        // Not where a symlink in its place leads to: that is not ours.
        fs::remove_dir(&real).unwrap();
        std::os::unix::fs::symlink("/proc", &real).unwrap();
        assert_eq!(as_mounted(&dir.join("link/rootfs")), real);
        assert_eq!(as_mounted(Path::new("/no/such/rootfs")), Path::new("/no/such/rootfs"));
        fs::remove_dir_all(dir).unwrap();
    }

    #[test]
    fn flags_and_data_are_told_apart() {
        let item = Mount {
            kind: "overlay".to_owned(),
            options: ["ro", "nosuid", "suid", "lowerdir=/a:/b", "index=off"].map(str::to_owned).to_vec(),
            ..Mount::default()
        };
        let parsed = parse(&item).unwrap();
        assert_eq!(parsed.flags, MsFlags::MS_RDONLY);
        assert_eq!(parsed.data, ["lowerdir=/a:/b", "index=off"]);
    }

    #[test]
    fn an_option_that_can_not_be_carried_out_is_named() {
        let item = Mount {
            kind: "overlay".to_owned(),
            options: vec!["uidmap=0:1:2".to_owned()],
            ..Mount::default()
        };
        assert!(parse(&item).is_err_and(|error| error.to_string().contains("uidmap=0:1:2")));
    }

    #[test]
    fn long_overlays_get_short_names() {
        let mut data = vec!["lowerdir=/s/1/fs:/s/2/fs:/s/30/fs".to_owned(), "upperdir=/s/4/fs".to_owned()];
        assert_eq!(shorten(&mut data), Some(PathBuf::from("/s")));
        assert_eq!(data, ["lowerdir=1/fs:2/fs:30/fs", "upperdir=/s/4/fs"]);
    }

    #[test]
    fn a_target_stays_below_the_rootfs() {
        let rootfs = Path::new("/nowhere/rootfs");
        assert_eq!(target(rootfs, "").unwrap(), rootfs);
        assert_eq!(target(rootfs, "/a/b").unwrap(), rootfs.join("a/b"));
        assert!(target(rootfs, "../x").is_err());
    }

    #[test]
    fn mountpoints_are_unescaped() {
        let line = br"36 35 98:0 /mnt1 /a\040b\134c rw - ext3 /dev/root rw";
        assert_eq!(mountpoint(line), Some(PathBuf::from(r"/a b\c")));
    }
}
