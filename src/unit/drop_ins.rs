//! Drop-ins as systemd reads them: which files of a directory count (systemd.unit(5)), and what their lines mean
//! (systemd.syntax(7)).

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use crate::files;

/// No drop-in and no file of a unit is larger.
pub(super) const MAX_BYTES: u64 = 1 << 20;

/// The drop-ins in a directory, in no order. None if the directory can't be read.
pub(super) fn in_dir(dir: &Path) -> impl Iterator<Item = PathBuf> + use<> {
    let items = fs::read_dir(dir).into_iter().flatten().flatten().map(|item| item.path());
    items.filter(|path| path.extension().is_some_and(|end| end == "conf"))
}

/// The text of a drop-in, or of the file of a unit.
///
/// # Errors
/// It can't be read, or is no regular file: one that is masked is a link to `/dev/null`.
pub(super) fn read(path: &Path) -> io::Result<Vec<u8>> {
    files::read_regular(path, MAX_BYTES)
}

/// What a line of a drop-in is.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Kind {
    /// It does not end a line that continues.
    Comment,
    /// It begins a setting, a section, or is empty.
    First,
    /// It continues the line before it, which ends with a backslash.
    Continuation,
}

/// The lines of a drop-in, each with its end.
pub(super) fn lines(text: &[u8]) -> impl Iterator<Item = (Kind, &[u8])> {
    let mut continues = false;
    text.split_inclusive(|byte| *byte == b'\n').map(move |line| {
        let content = line.trim_ascii();
        if content.starts_with(b"#") || content.starts_with(b";") {
            return (Kind::Comment, line);
        }
        let kind = if continues { Kind::Continuation } else { Kind::First };
        continues = is_continued(content);
        (kind, line)
    })
}

/// A backslash that another one escapes continues nothing.
fn is_continued(content: &[u8]) -> bool {
    content.iter().rev().take_while(|byte| **byte == b'\\').count() % 2 == 1
}

/// The settings of a drop-in, name and value, in their order.
pub(super) fn settings(text: &[u8]) -> Vec<(String, String)> {
    let mut whole: Vec<Vec<u8>> = Vec::new();
    for (kind, line) in lines(text).filter(|(kind, _)| *kind != Kind::Comment) {
        let content = line.trim_ascii();
        let content = if is_continued(content) {
            [content.strip_suffix(b"\\").unwrap_or(content), b" "].concat()
        } else {
            content.to_vec()
        };
        match whole.last_mut().filter(|_| kind == Kind::Continuation) {
            Some(last) => last.extend(content),
            None => whole.push(content),
        }
    }
    whole.iter().filter_map(|line| setting(line)).collect()
}

/// The name and the value that a line sets.
pub(super) fn setting(line: &[u8]) -> Option<(String, String)> {
    let line = String::from_utf8_lossy(line);
    let (name, value) = line.split_once('=')?;
    Some((name.trim().to_owned(), value.trim().to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_are_read_as_systemd_reads_them() {
        let text = "[Service]\n Type = simple \n#Nice=1\n; Nice=2\nSystemCallFilter=a \\\n# comment\n  b=c\nUMask=0\n\
            Description=ends with \\\\\nRestart=no\nNice=5 \\";
        let expected = [
            ("Type", "simple"),
            ("SystemCallFilter", "a  b=c"),
            ("UMask", "0"),
            ("Description", "ends with \\\\"),
            ("Restart", "no"),
            ("Nice", "5"),
        ];
        assert_eq!(
            settings(text.as_bytes()),
            expected.map(|(name, value)| (name.to_owned(), value.to_owned()))
        );
    }
}
