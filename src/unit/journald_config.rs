//! The rate limit in the configuration of journald (journald.conf(5), `RateLimitIntervalSec=`, `RateLimitBurst=`).

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use super::drop_ins;

/// Where journald looks for its configuration: the first directory wins (systemd 252 to 262; some look in fewer).
const DIRECTORIES: [&str; 4] = ["/etc/systemd", "/run/systemd", "/usr/local/lib/systemd", "/usr/lib/systemd"];

/// The rate limit of each unit that sets none of its own. `None`: journald's built-in value.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct RateLimit {
    /// The interval in microseconds; 0 for no limit.
    pub(super) interval_usec: Option<u64>,
    /// The number of lines; 0 for no limit.
    pub(super) burst: Option<u32>,
}

impl RateLimit {
    /// Reads the configuration. Blocks.
    pub(super) fn read() -> Self {
        Self::read_from(&DIRECTORIES.map(Path::new))
    }

    fn read_from(dirs: &[&Path]) -> Self {
        let main = dirs.iter().map(|dir| dir.join("journald.conf")).find(|file| file.exists());
        // Of several drop-ins of the same name, only that of the first directory counts. They are read by name.
        let mut more = BTreeMap::new();
        for file in dirs.iter().flat_map(|dir| drop_ins::in_dir(&dir.join("journald.conf.d"))) {
            file.file_name().map(ToOwned::to_owned).map(|name| more.entry(name).or_insert(file));
        }
        let mut found = Self::default();
        for file in main.into_iter().chain(more.into_values()) {
            found.apply(&file);
        }
        found
    }

    fn apply(&mut self, file: &PathBuf) {
        for (name, value) in drop_ins::settings(&drop_ins::read(file).unwrap_or_default()) {
            match name.as_str() {
                // The second name is the one of old versions, which all versions still read.
                "RateLimitIntervalSec" | "RateLimitInterval" => {
                    self.interval_usec = microseconds(&value).or(self.interval_usec);
                }
                "RateLimitBurst" => self.burst = value.parse().ok().or(self.burst),
                _ => {}
            }
        }
    }
}

/// A time span in the form of systemd.time(7), in microseconds. A number without a unit is in seconds.
fn microseconds(text: &str) -> Option<u64> {
    if text == "infinity" {
        return Some(u64::MAX);
    }
    let (mut total, mut rest) = (0.0, text.trim());
    if rest.is_empty() {
        return None;
    }
    while !rest.is_empty() {
        let end = rest.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(rest.len());
        let (number, after) = rest.split_at(end);
        let after = after.trim_start();
        let end = after.find(|c: char| c.is_ascii_digit() || c.is_whitespace()).unwrap_or(after.len());
        let (unit, after) = after.split_at(end);
        total += number.parse::<f64>().ok()? * length_of(unit)?;
        rest = after.trim_start();
    }
    // A larger number becomes the largest one.
    Some(total as u64)
}

/// The length of a unit of time, in microseconds.
fn length_of(unit: &str) -> Option<f64> {
    const SECOND: f64 = 1e6;
    Some(match unit {
        "us" | "usec" | "µs" | "μs" => 1.0,
        "ms" | "msec" => 1e3,
        "" | "s" | "sec" | "second" | "seconds" => SECOND,
        "m" | "min" | "minute" | "minutes" => 60.0 * SECOND,
        "h" | "hr" | "hour" | "hours" => 3600.0 * SECOND,
        "d" | "day" | "days" => 86_400.0 * SECOND,
        "w" | "week" | "weeks" => 7.0 * 86_400.0 * SECOND,
        "M" | "month" | "months" => 30.44 * 86_400.0 * SECOND,
        "y" | "year" | "years" => 365.25 * 86_400.0 * SECOND,
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    #[test]
    fn time_spans_are_those_of_systemd() {
        for (text, expected) in [
            ("30s", Some(30_000_000)),
            ("30", Some(30_000_000)),
            ("0", Some(0)),
            ("1min 30s", Some(90_000_000)),
            ("2min1.5sec", Some(121_500_000)),
            ("5 ms", Some(5_000)),
            ("1h", Some(3_600_000_000)),
            ("infinity", Some(u64::MAX)),
            ("", None),
            ("soon", None),
            ("5 apples", None),
        ] {
            assert_eq!(microseconds(text), expected, "{text}");
        }
    }

    #[test]
    fn the_last_value_of_the_files_that_journald_reads_counts() {
        let root = tempfile::tempdir().unwrap();
        let dirs = ["etc", "run", "usr"].map(|dir| root.path().join(dir));
        let write = |dir: usize, name: &str, text: &str| {
            let path = dirs[dir].join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        };
        let read = || RateLimit::read_from(&dirs.each_ref().map(PathBuf::as_path));
        let limit = |interval_usec, burst| RateLimit { interval_usec, burst };
        assert_eq!(read(), limit(None, None));
        write(2, "journald.conf", "[Journal]\n#RateLimitBurst=1\nRateLimitBurst=5\n");
        assert_eq!(read(), limit(None, Some(5)));
        // Only the first of the main files is read.
        write(0, "journald.conf", "[Journal]\nRateLimitIntervalSec=1min\n");
        assert_eq!(read(), limit(Some(60_000_000), None));
        write(2, "journald.conf.d/50.conf", "[Journal]\nRateLimitBurst=0\n");
        write(1, "journald.conf.d/10.conf", "[Journal]\nRateLimitBurst=7\n");
        assert_eq!(read(), limit(Some(60_000_000), Some(0)));
        write(0, "journald.conf.d/50.conf", "[Journal]\nRateLimitInterval=2\nRateLimitBurst=many\n");
        assert_eq!(read(), limit(Some(2_000_000), Some(7)));
    }
}
