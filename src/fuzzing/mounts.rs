//! Fuzz targets for mounts that a client requests, and for the kernel's list of mounts.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use crate::oci::{mount, mount_options};
use crate::task::request::Mount;

/// Target: a mount. The first line is its type, and each other line is an option.
pub(super) fn options(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    let mut lines = text.split('\n').map(str::to_owned);
    let kind = lines.next().unwrap_or_default();
    let item = Mount { kind, options: lines.collect(), ..Mount::default() };
    let Ok(parsed) = mount_options::parse(&item) else { return };
    for option in &parsed.data {
        assert!(item.options.contains(option), "{option:?} was not asked for");
    }
    check_short_names(&parsed.data);
}

/// Checks that shortened options name the same layers, and that the other options are unchanged.
pub(super) fn check_short_names(data: &[String]) {
    let mut short = data.to_vec();
    let Some(home) = mount_options::shorten(&mut short) else {
        assert_eq!(short, data);
        return;
    };
    let is_layers = |option: &&String| option.starts_with("lowerdir=");
    let first = data.iter().position(|option| is_layers(&option));
    for (at, (before, after)) in data.iter().zip(&short).enumerate() {
        if Some(at) != first {
            assert_eq!(before, after);
            continue;
        }
        let before: Vec<PathBuf> = layers(before).iter().map(|layer| plain(layer)).collect();
        let after: Vec<PathBuf> = layers(after).iter().map(|layer| plain(&home.join(layer))).collect();
        assert_eq!(after, before, "{data:?} in {home:?}");
    }
    assert_eq!(short.len(), data.len());
}

/// The layers of an overlay as the kernel reads them (fs/overlayfs): a backslash escapes the next character. An empty text
/// is not the name of a layer.
fn layers(option: &str) -> Vec<PathBuf> {
    let (mut all, mut layer) = (Vec::new(), String::new());
    let mut chars = option.strip_prefix("lowerdir=").unwrap_or(option).chars();
    while let Some(c) = chars.next() {
        match c {
            '\\' => layer.extend(chars.next()),
            ':' => all.push(std::mem::take(&mut layer)),
            c => layer.push(c),
        }
    }
    all.push(layer);
    assert!(all.iter().all(|layer| !layer.is_empty()), "{option:?} has an empty layer");
    all.into_iter().map(PathBuf::from).collect()
}

/// A path without components that do not change its meaning.
fn plain(path: &Path) -> PathBuf {
    path.components().filter(|part| *part != std::path::Component::CurDir).collect()
}

/// Target: a line of mountinfo, and a mountpoint that the kernel writes into such a line.
pub(super) fn mountinfo(data: &[u8]) {
    let _ = mount::mountpoint(data);
    if !data.is_empty() && !data.contains(&0) {
        let mut line = b"36 35 98:0 /mnt1 ".to_vec();
        for byte in data {
            // fs/proc_namespace.c, `show_mountinfo` and `mangle`
            match byte {
                b' ' | b'\t' | b'\n' | b'\\' | b'#' => line.extend(format!("\\{byte:03o}").bytes()),
                byte => line.push(*byte),
            }
        }
        line.extend(b" rw,noatime master:1 - ext3 /dev/root rw,errors=continue");
        let found = mount::mountpoint(&line);
        assert_eq!(found.as_deref(), Some(Path::new(OsStr::from_bytes(data))));
    }
}
