//! The reason of a failure in the log of the OCI runtime.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::Path;

use serde::Deserialize;

/// How many bytes of the log's end are searched for the reason of a failure.
const LOG_TAIL_BYTES: u64 = 64 << 10;
/// How many log entries are searched.
const MOST_LOG_ENTRIES: usize = 200;

/// The last error in a log. `None` if it has none.
pub(super) fn last_error(log: &Path) -> Option<String> {
    let mut file = File::open(log).ok()?;
    let length = file.metadata().ok()?.len();
    file.seek(SeekFrom::Start(length.saturating_sub(LOG_TAIL_BYTES))).ok()?;
    let mut text = Vec::new();
    file.take(LOG_TAIL_BYTES).read_to_end(&mut text).ok()?;
    last_error_in(&text)
}

/// The last error in the end of a log of JSON objects, which have one line each (runc, crun 1.21) or several (crun 1.28).
/// If the log has earlier errors, the first of them follows: the last error of runc may say only that a process of runc ended,
/// and the first error says why.
pub fn last_error_in(text: &[u8]) -> Option<String> {
    #[derive(Deserialize)]
    struct Line {
        level: String,
        msg: String,
    }
    let text = String::from_utf8_lossy(text);
    let begins = text.match_indices('{').filter(|(at, _)| *at == 0 || text[..*at].ends_with('\n')).rev();
    // The limit is for a file that is not the log of an OCI runtime.
    let lines = begins.take(MOST_LOG_ENTRIES).filter_map(|(at, _)| {
        serde_json::Deserializer::from_str(&text[at..]).into_iter::<Line>().next()?.ok()
    });
    let mut errors = lines.filter(|line| matches!(line.level.as_str(), "error" | "fatal" | "panic"));
    // The message about a hook ends with the output of the hook, and clients write more text behind it.
    let last = errors.next()?.msg.trim_end().to_owned();
    Some(match errors.last() {
        Some(first) => format!("{last} (the first error was: {})", first.msg.trim_end()),
        None => last,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    #[test]
    fn the_last_error_of_the_log_is_the_reason() {
        let dir = tempfile::tempdir().unwrap();
        let log = dir.path().join("create.log");
        let text = concat!(
            "{\"level\":\"warning\",\"msg\":\"a\",\"time\":\"t\"}\n",
            "{\"level\":\"error\",\"msg\":\"first\",\"time\":\"t\"}\n",
            "not json\n",
            "{\"level\":\"error\",\"msg\":\"exec: \\\"nope\\\": executable file not found in $PATH\"}\n",
        );
        fs::write(&log, text).unwrap();
        assert_eq!(
            last_error(&log).unwrap(),
            "exec: \"nope\": executable file not found in $PATH (the first error was: first)"
        );
        fs::write(&log, "{\n  \"msg\": \"over {two} lines\",\n  \"level\": \"error\"\n}").unwrap();
        assert_eq!(last_error(&log).unwrap(), "over {two} lines");
        fs::write(&log, r#"{"level":"error","msg":"exit status 1, stderr: no\nhook \n"}"#).unwrap();
        assert_eq!(last_error(&log).unwrap(), "exit status 1, stderr: no\nhook");
        assert_eq!(last_error(&dir.path().join("none.log")), None);
    }
}
