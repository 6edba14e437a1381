//! The limits in the configuration of the system bus (dbus-daemon(1), "CONFIGURATION FILE").

use std::fs;
use std::path::{Path, PathBuf};

use crate::files;

/// No file is larger.
const MAX_BYTES: u64 = 1 << 20;

/// The largest number of match rules of a connection, if a file sets it. Blocks.
pub fn match_rules() -> Option<u64> {
    let all = limits().into_iter();
    all.filter(|(_, name, _)| name == "max_match_rules_per_connection").map(|(_, _, value)| value).next_back()
}

/// The limits that the files set: file, name, value, in the order in which dbus-daemon reads the files. A later value replaces an
/// earlier one.
pub fn limits() -> Vec<(PathBuf, String, u64)> {
    let mut files = Vec::new();
    for place in ["/usr/share/dbus-1", "/etc/dbus-1"] {
        files.push(Path::new(place).join("system.conf"));
        let fragments = fs::read_dir(Path::new(place).join("system.d")).into_iter().flatten().flatten();
        let fragments = fragments.map(|entry| entry.path());
        files.extend(fragments.filter(|path| path.extension().is_some_and(|end| end == "conf")));
    }
    files.push(PathBuf::from("/etc/dbus-1/system-local.conf"));
    let parse = |path: PathBuf| {
        let limits =
            limits_in(&String::from_utf8_lossy(&files::read_regular(&path, MAX_BYTES).unwrap_or_default()));
        limits.into_iter().map(move |(name, value)| (path.clone(), name, value))
    };
    files.into_iter().flat_map(parse).collect()
}

/// The `<limit name="…">…</limit>` elements of a file of dbus-daemon's configuration, without those in comments.
pub fn limits_in(text: &str) -> Vec<(String, u64)> {
    let mut plain = String::new();
    for (index, part) in text.split("<!--").enumerate() {
        plain += if index == 0 { part } else { part.split_once("-->").map_or("", |(_, rest)| rest) };
    }
    let limit = |element: &str| {
        let (attributes, rest) = element.split_once('>')?;
        let name = attributes.split(['"', '\'']).nth(1)?;
        Some((name.to_owned(), rest.split_once('<')?.0.trim().parse().ok()?))
    };
    plain.split("<limit").skip(1).filter_map(limit).collect()
}
