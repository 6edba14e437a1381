//! The options of a mount: which are flags of mount(2), which need mount(8), and how they fit into one page.

use std::path::PathBuf;

use nix::mount::MsFlags;

use crate::task::request::Mount;

use super::idmap::{self, Maps};
use super::mount_error::Error;

/// True for a file system in user space. Its daemon runs in the cgroup of the process that mounts it, and does not end
/// when the mount is removed together with a mount namespace.
pub fn leaves_a_daemon(item: &Mount) -> bool {
    item.kind.starts_with("fuse.") || item.kind.starts_with("fuse3.")
}

/// An option with a map, and the map in the kernel's format.
type Named<'a> = Option<(&'a String, String)>;

/// The options of a mount, as mount(2) expects them.
pub struct Parsed {
    /// The options that are flags.
    pub flags: MsFlags,
    /// All other options.
    pub data: Vec<String>,
    /// True if mount(8) is needed.
    pub helper: bool,
    /// The maps of the ids of the mount, if the mount has any.
    pub maps: Option<Maps>,
}

/// Divides the options of a mount into flags and data.
///
/// # Errors
/// [`Error::Option`]
pub fn parse(item: &Mount) -> Result<Parsed, Error> {
    let mut parsed =
        Parsed { flags: MsFlags::empty(), data: Vec::new(), helper: leaves_a_daemon(item), maps: None };
    let (mut uids, mut gids) = (None, None);
    if item.kind == "bind" {
        parsed.flags |= MsFlags::MS_BIND;
    }
    for option in &item.options {
        let unsupported = || Error::Option { option: option.clone(), kind: item.kind.clone() };
        if option.starts_with("X-containerd.") {
            return Err(unsupported());
        }
        let map = |text: &str| idmap::parse(text).map(|map| (option, map)).ok_or_else(unsupported);
        if let Some(text) = option.strip_prefix("uidmap=") {
            uids = Some(map(text)?);
            continue;
        }
        if let Some(text) = option.strip_prefix("gidmap=") {
            gids = Some(map(text)?);
            continue;
        }
        match flag(option) {
            Some((flag, true)) => parsed.flags |= flag,
            Some((flag, false)) => parsed.flags.remove(flag),
            None if option == "loop" => parsed.helper = true,
            None if option == "defaults" => {}
            None => parsed.data.push(option.clone()),
        }
    }
    parsed.maps = maps(item, &parsed, uids, gids)?;
    Ok(parsed)
}

/// The maps of user and group ids. A mount must have both or none, and can't have them if it needs a mount helper.
fn maps(item: &Mount, parsed: &Parsed, uids: Named<'_>, gids: Named<'_>) -> Result<Option<Maps>, Error> {
    let is_possible = !parsed.helper && (item.kind == "overlay" || parsed.flags.contains(MsFlags::MS_BIND));
    match (uids, gids) {
        (None, None) => Ok(None),
        (Some((_, uids)), Some((_, gids))) if is_possible => Ok(Some(Maps { uids, gids })),
        (Some((option, _)), _) | (_, Some((option, _))) => {
            Err(Error::Option { option: option.clone(), kind: item.kind.clone() })
        }
    }
}

/// The flags of an option, and whether the option sets or clears them (mount(8)).
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

/// Shortens the options of an overlay: makes its layers relative to their common parent directory. Returns that directory,
/// to which the caller must change.
pub fn shorten(data: &mut [String]) -> Option<PathBuf> {
    const LOWER: &str = "lowerdir=";
    let option = data.iter_mut().find(|option| option.starts_with(LOWER))?;
    // A backslash may precede a colon that is part of a name (kernel, overlayfs.rst).
    if option.contains('\\') {
        return None;
    }
    let layers: Vec<PathBuf> = option[LOWER.len()..].split(':').map(PathBuf::from).collect();
    // An empty name introduces data-only layers, and a relative name has no common parent with others.
    if !layers.iter().all(|layer| layer.is_absolute()) {
        return None;
    }
    let mut home = layers.first()?.parent()?.to_owned();
    while !layers.iter().all(|layer| layer.starts_with(&home)) {
        home = home.parent()?.to_owned();
    }
    let relative = layers.iter().map(|layer| {
        let path = layer.strip_prefix(&home).ok()?.to_string_lossy();
        Some(if path.is_empty() { ".".to_owned() } else { path.into_owned() })
    });
    *option = format!("{LOWER}{}", relative.collect::<Option<Vec<_>>>()?.join(":"));
    Some(home)
}

#[cfg(test)]
mod tests {
    use super::*;

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

    fn with(kind: &str, options: &[&str]) -> Mount {
        Mount {
            kind: kind.to_owned(),
            options: options.iter().map(|option| (*option).to_owned()).collect(),
            ..Mount::default()
        }
    }

    #[test]
    fn an_option_that_can_not_be_carried_out_is_named() {
        for (kind, options, named) in [
            ("overlay", &["uidmap=0:1:2"][..], "uidmap=0:1:2"),
            ("overlay", &["gidmap=0:1:2"], "gidmap=0:1:2"),
            ("overlay", &["uidmap=0:1", "gidmap=0:1:2"], "uidmap=0:1"),
            ("ext4", &["loop", "uidmap=0:1:2", "gidmap=0:1:2"], "uidmap=0:1:2"),
            ("tmpfs", &["uidmap=0:1:2", "gidmap=0:1:2"], "uidmap=0:1:2"),
            ("overlay", &["X-containerd.x=1"], "X-containerd.x=1"),
        ] {
            let refused = parse(&with(kind, options)).map(drop).unwrap_err().to_string();
            assert!(refused.contains(named), "{refused}");
        }
    }

    #[test]
    fn ids_are_mapped_for_overlays_and_bind_mounts() {
        for (kind, first) in [("overlay", "lowerdir=/a"), ("bind", "rbind"), ("", "bind")] {
            let parsed = parse(&with(kind, &[first, "uidmap=0:1:2", "gidmap=0:3:4"])).unwrap();
            let maps = Maps { uids: "0 1 2\n".to_owned(), gids: "0 3 4\n".to_owned() };
            assert_eq!(parsed.maps, Some(maps), "{kind}");
        }
    }

    #[test]
    fn a_layer_keeps_its_place_under_a_short_name() {
        let mut data = ["lowerdir=/s/1/fs:/s/1".to_owned()];
        assert_eq!(shorten(&mut data), Some(PathBuf::from("/s/1")));
        assert_eq!(data, ["lowerdir=fs:."]);
        for odd in ["lowerdir=s/1::/s/2", "lowerdir=s/1:s/2"] {
            let mut data = [odd.to_owned()];
            assert_eq!(shorten(&mut data), None);
            assert_eq!(data, [odd]);
        }
        // One layer, with a colon in its name.
        let mut data = [r"lowerdir=/s/1\:/s/2".to_owned()];
        assert_eq!(shorten(&mut data), None);
        assert_eq!(data, [r"lowerdir=/s/1\:/s/2"]);
    }

    #[test]
    fn long_overlays_get_short_names() {
        let mut data = vec!["lowerdir=/s/1/fs:/s/2/fs:/s/30/fs".to_owned(), "upperdir=/s/4/fs".to_owned()];
        assert_eq!(shorten(&mut data), Some(PathBuf::from("/s")));
        assert_eq!(data, ["lowerdir=1/fs:2/fs:30/fs", "upperdir=/s/4/fs"]);
    }
}
