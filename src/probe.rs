//! Reads facts about the machine: files, the output of programs with a time limit, and systemctl's answers about units.

use std::collections::BTreeMap;
use std::io::{self, Read};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::Receiver;
use std::time::Duration;

use crate::files;
use crate::sys;

/// How long a program may take to answer.
const LIMIT: Duration = Duration::from_secs(10);

/// How long a program may take to end after SIGKILL.
const DEATH_LIMIT: Duration = Duration::from_secs(1);

/// The most that is read of a file or from a program, in bytes.
const MOST_BYTES: u64 = 16 << 20;

/// Why a fact is not known.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Unknown {
    /// There is no such file or program.
    #[error("{0} does not exist")]
    Absent(String),
    /// This user may not read it.
    #[error("{0} can't be read by this user")]
    Forbidden(String),
    /// A program does not answer in time.
    #[error("{0} does not answer within {sec} s", sec = .1.as_secs())]
    Late(String, Duration),
    /// systemctl was not asked, because it has not answered before.
    #[error("systemd does not answer")]
    Silent,
    /// Another error.
    #[error("{0}")]
    Failed(String),
}

impl Unknown {
    /// What the user can do to find out.
    pub fn advice(&self) -> &'static str {
        match self {
            Self::Forbidden(_) => "run doctor as root",
            Self::Absent(_) | Self::Late(..) | Self::Silent | Self::Failed(_) => "",
        }
    }

    /// There is no such file or program.
    pub fn is_absent(&self) -> bool {
        matches!(self, Self::Absent(_))
    }

    /// The reason of an error of a file or a program.
    pub fn of(what: &str, error: &io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::NotFound => Self::Absent(what.to_owned()),
            io::ErrorKind::PermissionDenied => Self::Forbidden(what.to_owned()),
            _ => Self::Failed(format!("{what}: {error}")),
        }
    }
}

/// A fact, or why it is not known.
pub type Known<T> = Result<T, Unknown>;

/// The text of a file. Invalid bytes are replaced.
pub fn file(path: impl AsRef<Path>) -> Known<String> {
    let path = path.as_ref();
    let bytes = files::read_regular(path, MOST_BYTES);
    let bytes = bytes.map_err(|error| Unknown::of(&path.to_string_lossy(), &error))?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

/// The number that a file consists of.
pub fn number(path: impl AsRef<Path>) -> Known<u64> {
    let text = file(&path)?;
    let path = path.as_ref().display();
    text.trim().parse().map_err(|_| Unknown::Failed(format!("{path} has no number: {:?}", text.trim())))
}

/// The names in a directory.
pub fn names(path: impl AsRef<Path>) -> Known<Vec<String>> {
    let path = path.as_ref();
    let listing = std::fs::read_dir(path).map_err(|error| Unknown::of(&path.to_string_lossy(), &error))?;
    Ok(listing.filter_map(|entry| entry.ok()?.file_name().into_string().ok()).collect())
}

/// What `look` finds, which may wait for a disk. If the time limit is over, its thread continues to wait.
pub fn answer<T: Send + 'static>(what: &str, look: impl FnOnce() -> T + Send + 'static) -> Known<T> {
    answer_within(LIMIT, what, look)
}

fn answer_within<T: Send + 'static>(
    limit: Duration,
    what: &str,
    look: impl FnOnce() -> T + Send + 'static,
) -> Known<T> {
    let (sender, receiver) = std::sync::mpsc::channel();
    // The receiver was dropped if the look took too long.
    let work = move || drop(sender.send(look()));
    let no_thread = |error| Unknown::Failed(format!("{what}: no thread can be made to look at it: {error}"));
    std::thread::Builder::new().spawn(work).map_err(no_thread)?;
    receiver.recv_timeout(limit).map_err(|_| Unknown::Late(what.to_owned(), limit))
}

/// What a program writes to standard output.
pub fn output(program: &str, arguments: &[&str]) -> Known<String> {
    output_within(LIMIT, program, arguments)
}

fn output_within(limit: Duration, program: &str, arguments: &[&str]) -> Known<String> {
    let mut command = Command::new(program);
    command.args(arguments).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command.env("LC_ALL", "C").env("SYSTEMD_COLORS", "0").env("SYSTEMD_PAGER", "");
    let mut child = command.spawn().map_err(|error| Unknown::of(program, &error))?;
    let no_thread =
        |error| Unknown::Failed(format!("{program}: no thread can be made to read its output: {error}"));
    let ended = readers(&mut child).map_err(no_thread).and_then(|readers| {
        if ends(child.id(), limit) { Ok(readers) } else { Err(Unknown::Late(program.to_owned(), limit)) }
    });
    let readers = ended.inspect_err(|_| kill(&mut child))?;
    let status = child.wait().map_err(|error| Unknown::of(program, &error))?;
    let [stdout, said] = readers.map(|reader| reader.recv_timeout(limit).unwrap_or_default());
    if status.success() {
        return Ok(stdout);
    }
    Err(match said.lines().next() {
        Some(line) => Unknown::Failed(format!("{program}: {line}")),
        None => Unknown::Failed(format!("{program} failed with {status}")),
    })
}

/// Kills a program, and waits for its end. A program that waits for a disk may not end: it is left alone after a moment.
fn kill(child: &mut Child) {
    // Fails if the program has ended in the meantime.
    let _ = child.kill();
    if ends(child.id(), DEATH_LIMIT) {
        let _ = child.wait();
    }
}

/// Begins to read the standard output and the standard error of a program.
fn readers(child: &mut Child) -> io::Result<[Receiver<String>; 2]> {
    let (stdout, stderr) = (child.stdout.take(), child.stderr.take());
    Ok([reader(stdout)?, reader(stderr)?])
}

/// The receiver gets nothing if there is nothing to read from.
fn reader(from: Option<impl Read + Send + 'static>) -> io::Result<Receiver<String>> {
    let (sender, receiver) = std::sync::mpsc::channel();
    let Some(from) = from else { return Ok(receiver) };
    let read = move || {
        let mut bytes = Vec::new();
        // What was read before an error counts.
        let _ = from.take(MOST_BYTES).read_to_end(&mut bytes);
        // The receiver was dropped if the work took too long.
        let _ = sender.send(String::from_utf8_lossy(&bytes).into_owned());
    };
    std::thread::Builder::new().spawn(read)?;
    Ok(receiver)
}

fn ends(pid: u32, limit: Duration) -> bool {
    let Ok(process) = sys::pidfd_open(pid) else {
        return false;
    };
    sys::ends_within(&process, limit) == Ok(true)
}

/// What is asked through a program that waits for it. If it does not answer once, it is not asked again: each question would
/// take as long.
struct Asked(AtomicBool);

impl Asked {
    const fn new() -> Self {
        Self(AtomicBool::new(false))
    }

    fn ask(&self, limit: Duration, program: &str, arguments: &[&str]) -> Known<String> {
        if self.0.load(Ordering::Relaxed) {
            return Err(Unknown::Silent);
        }
        let answer = output_within(limit, program, arguments);
        if matches!(answer, Err(Unknown::Late(..))) {
            self.0.store(true, Ordering::Relaxed);
        }
        answer
    }
}

static SYSTEMD: Asked = Asked::new();

/// What systemctl writes. After systemd has not answered in time, this is [`Unknown::Silent`] at once.
pub fn systemctl(arguments: &[&str]) -> Known<String> {
    SYSTEMD.ask(LIMIT, "systemctl", arguments)
}

/// Properties of a unit, by name.
pub type Properties = BTreeMap<String, String>;

/// Properties of all units that a pattern matches. A pattern with a wildcard only matches loaded units.
pub fn show(pattern: &str, properties: &[&str]) -> Known<Vec<Properties>> {
    let wanted = format!("--property={}", properties.join(","));
    systemctl(&["show", "--all", &wanted, "--", pattern]).map(|text| parse_show(&text))
}

pub fn show_one(unit: &str) -> Known<Properties> {
    let text = systemctl(&["show", "--all", "--", unit])?;
    Ok(parse_show(&text).into_iter().next().unwrap_or_default())
}

/// The output of `systemctl show`: `NAME=VALUE` lines, and an empty line between two units.
pub fn parse_show(text: &str) -> Vec<Properties> {
    let blocks = text.split("\n\n");
    let properties = |block: &str| -> Properties {
        let pairs = block.lines().filter_map(|line| line.split_once('='));
        pairs.map(|(name, value)| (name.to_owned(), value.to_owned())).collect()
    };
    blocks.map(properties).filter(|unit| !unit.is_empty()).collect()
}

/// A property that is set.
pub fn property<'a>(unit: &'a Properties, name: &str) -> Option<&'a str> {
    unit.get(name).map(String::as_str).filter(|value| !value.is_empty() && *value != "[not set]")
}

/// A property that is a number and set.
pub fn property_number(unit: &Properties, name: &str) -> Option<u64> {
    property(unit, name)?.parse().ok()
}

/// Facts for the tests of checks.
#[cfg(test)]
pub fn properties(pairs: &[(&str, &str)]) -> Properties {
    pairs.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn units_are_read_from_systemctls_output() {
        let units = parse_show(
            "Id=a.service\nEnvironment=A=B\nDropInPaths=\n\nId=b.service\nMemoryCurrent=[not set]\n",
        );
        assert_eq!(units.len(), 2);
        assert_eq!(property(&units[0], "Environment"), Some("A=B"));
        assert_eq!(property(&units[0], "DropInPaths"), None);
        assert_eq!(property_number(&units[1], "MemoryCurrent"), None);
        assert!(parse_show("\n").is_empty());
    }

    #[test]
    fn a_program_says_why_it_failed() {
        assert_eq!(output("sh", &["-c", "echo out"]), Ok("out\n".to_owned()));
        let failed = output("sh", &["-c", "echo why >&2; exit 3"]);
        assert_eq!(failed, Err(Unknown::Failed("sh: why".to_owned())));
        assert_eq!(output("/no/such/program", &[]), Err(Unknown::Absent("/no/such/program".to_owned())));
    }

    #[test]
    fn what_does_not_answer_is_asked_once() {
        let (asked, limit) = (Asked::new(), Duration::from_millis(20));
        assert_eq!(
            asked.ask(LIMIT, "sh", &["-c", "exit 3"]).unwrap_err().to_string(),
            "sh failed with exit status: 3"
        );
        assert_eq!(asked.ask(LIMIT, "echo", &["out"]), Ok("out\n".to_owned()));
        assert_eq!(asked.ask(limit, "sleep", &["1000"]), Err(Unknown::Late("sleep".to_owned(), limit)));
        let silent = asked.ask(LIMIT, "echo", &["out"]).unwrap_err();
        assert_eq!((silent.to_string().as_str(), silent.advice()), ("systemd does not answer", ""));
    }

    #[test]
    fn a_look_that_takes_too_long_is_given_up() {
        assert_eq!(answer("disk", || 5), Ok(5));
        let (_held, never) = std::sync::mpsc::channel::<()>();
        let (limit, look) = (Duration::from_millis(20), move || never.recv().is_ok());
        assert_eq!(answer_within(limit, "disk", look), Err(Unknown::Late("disk".to_owned(), limit)));
    }

    #[test]
    fn a_file_without_a_number_is_named() {
        assert!(number("/proc/version").unwrap_err().to_string().contains("/proc/version"));
        assert!(number("/no/such/file").unwrap_err().is_absent());
    }
}
