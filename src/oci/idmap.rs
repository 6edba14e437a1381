//! Mounts of a rootfs with mapped ids: a container in a user namespace sees the files of its image as its own, and the files
//! on the disk stay as they are (mount_setattr(2)).
//!
//! An overlay accepts mapped layers, but is not mapped itself: containerd makes the container's root the owner of the upper
//! directory.

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, setns, unshare};
use rustix::fs::CWD;
use rustix::mount::{MoveMountFlags, OpenTreeFlags, move_mount, open_tree};

use crate::sys::{mount_attributes, user_namespace};

/// The maps of a mount, as in `/proc/PID/uid_map` (user_namespaces(7)).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Maps {
    /// The map of user ids.
    pub uids: String,
    /// The map of group ids.
    pub gids: String,
}

/// Reads a map of containerd: `CONTAINER:HOST:COUNT`, several with commas in between.
pub fn parse(text: &str) -> Option<String> {
    let line = |range: &str| {
        let numbers: Vec<u32> = range.split(':').map(|number| number.parse().ok()).collect::<Option<_>>()?;
        let [container, host, count] = numbers[..] else { return None };
        Some(format!("{container} {host} {count}\n"))
    };
    text.split(',').map(line).collect()
}

/// The prefix of an overlay's option with its layers.
const LOWER: &str = "lowerdir=";

/// Mounts a directory with mapped ids at `place`.
pub fn bind(source: &Path, place: &impl AsFd, maps: &Maps, recursive: bool) -> io::Result<()> {
    let namespace = user_namespace::make(&maps.uids, &maps.gids)?;
    attach(&mapped(source, &namespace, recursive)?, place)
}

/// Mounts an overlay with mapped layers at `place`. `options` are those of the overlay.
///
/// The mapped layers need mountpoints. These are in a mount namespace of their own, so the kernel removes them even if this
/// process is killed. Only for a process with one thread. Changes the working directory to `/`.
pub fn overlay(
    rootfs: &Path,
    place: &impl AsFd,
    maps: &Maps,
    flags: MsFlags,
    options: &[String],
) -> io::Result<()> {
    let namespace = user_namespace::make(&maps.uids, &maps.gids)?;
    let own = File::open("/proc/thread-self/ns/mnt")?;
    unshare(CloneFlags::CLONE_NEWNS)?;
    let made = overlay_in_stage(rootfs, &namespace, flags, options);
    setns(&own, CloneFlags::CLONE_NEWNS)?;
    std::env::set_current_dir("/")?;
    attach(&made?, place)
}

/// Uses the rootfs as the place for the mountpoints. No other process sees what is mounted there.
fn overlay_in_stage(
    rootfs: &Path,
    namespace: &OwnedFd,
    flags: MsFlags,
    options: &[String],
) -> io::Result<OwnedFd> {
    mount(None::<&str>, "/", None::<&str>, MsFlags::MS_REC | MsFlags::MS_PRIVATE, None::<&str>)?;
    mount(Some("layers"), rootfs, Some("tmpfs"), MsFlags::empty(), Some("mode=0700"))?;
    std::env::set_current_dir(rootfs)?;
    let mut data = Vec::new();
    for option in options {
        let Some(layers) = option.strip_prefix(LOWER) else {
            data.push(option.clone());
            continue;
        };
        let mut names = Vec::new();
        for (number, layer) in split_layers(layers).iter().enumerate() {
            let name = number.to_string();
            fs::create_dir(&name)?;
            let layer = mapped(Path::new(layer), namespace, false)?;
            move_mount(&layer, "", CWD, &name, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)?;
            names.push(name);
        }
        data.push(format!("{LOWER}{}", names.join(":")));
    }
    fs::create_dir("merged")?;
    mount(Some("overlay"), "merged", Some("overlay"), flags, Some(data.join(",").as_str()))?;
    Ok(open_tree(CWD, "merged", OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC)?)
}

/// The layers of an overlay. A backslash may precede a character that is part of a name (kernel, overlayfs.rst).
pub fn split_layers(text: &str) -> Vec<String> {
    let (mut layers, mut layer) = (Vec::new(), String::new());
    let mut rest = text.chars();
    while let Some(next) = rest.next() {
        match next {
            '\\' => layer.extend(rest.next()),
            ':' => layers.push(std::mem::take(&mut layer)),
            other => layer.push(other),
        }
    }
    layers.push(layer);
    layers
}

/// Makes a mount of the directory with mapped ids. The mount is not attached to a path yet.
fn mapped(directory: &Path, namespace: &OwnedFd, recursive: bool) -> io::Result<OwnedFd> {
    let below = if recursive { OpenTreeFlags::AT_RECURSIVE } else { OpenTreeFlags::empty() };
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC | below;
    let tree = open_tree(CWD, directory, flags)?;
    mount_attributes::map_ids(&tree, namespace)?;
    Ok(tree)
}

fn attach(tree: &OwnedFd, place: &impl AsFd) -> io::Result<()> {
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH;
    Ok(move_mount(tree, "", place, "", flags)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn maps_are_read() {
        assert_eq!(parse("0:100000:65536").as_deref(), Some("0 100000 65536\n"));
        assert_eq!(parse("0:1:2,5:6:7").as_deref(), Some("0 1 2\n5 6 7\n"));
        for wrong in ["", "0", "0:1", "0:1:2:3", "0:1:x", "0:1:-1", "0:1:2,", "0:1:4294967296"] {
            assert_eq!(parse(wrong), None, "{wrong:?}");
        }
    }

    #[test]
    fn layers_are_told_apart() {
        assert_eq!(split_layers("/a:/b"), ["/a", "/b"]);
        assert_eq!(split_layers(r"/a\:b:/c"), ["/a:b", "/c"]);
    }
}
