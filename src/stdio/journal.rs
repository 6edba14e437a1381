//! Writes lines to the journal for the unit of a container.
//!
//! Uses journald's native protocol: a datagram per line, with fields as `NAME\n`, length, bytes, `\n`
//! (systemd.io/JOURNAL_NATIVE_PROTOCOL). From a root process, `OBJECT_SYSTEMD_UNIT` assigns the line to that unit for
//! `journalctl -u`, even after the unit's process has ended.
//!
//! A journal that accepts no lines delays the container only for a short time. Lines that it did not accept are counted,
//! and the journal gets a message with their number once it accepts lines again.

use std::fs::OpenOptions;
use std::io::{self, Write};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use nix::errno::Errno;
use nix::sys::socket::{setsockopt, sockopt};
use tokio::net::UnixDatagram;

use crate::telemetry::journal::{MESSAGE_DROPPED, SOCKET, push_field};

use super::journal_policy::{Admission, JournalPolicy, Missing};

/// The longest line. Longer ones are split, as journald does with its own streams (`LineMax=`).
const LINE_MAX: usize = 48 << 10;
/// The shortest part of a split line, if the kernel only accepts small datagrams.
const LINE_MIN: usize = 1 << 10;

/// The buffer size that systemd's own programs set (log.c). A line fits, whatever the system's default is.
const SEND_BUFFER: usize = 8 << 20;

/// `LOG_INFO`, which systemd uses for the output of services.
const PRIORITY_OUTPUT: &str = "6";
/// `LOG_WARNING`
const PRIORITY_MISSING: &str = "4";

/// How long a write waits for a journald that is busy or restarts. After that, no write waits until journald has accepted
/// a line again.
const PATIENCE: Duration = Duration::from_secs(1);

/// As [`PATIENCE`], if the journal is the only place for the output of a container.
const PATIENCE_ALONE: Duration = Duration::from_secs(10);

/// A stream of lines. An incomplete line waits for its end.
#[derive(Debug)]
pub struct Lines {
    socket: Option<UnixDatagram>,
    /// The fields of every line, encoded.
    head: Box<[u8]>,
    partial: Vec<u8>,
    /// The file with the incomplete line, for the next daemon.
    kept: PathBuf,
    /// True if the file has all of the incomplete line.
    is_kept: bool,
    policy: Arc<JournalPolicy>,
    /// Lines that journald did not accept, and that were not reported yet.
    unsent: Missing,
    line_max: usize,
    patience: Duration,
}

/// Why a line did not reach journald.
enum Undelivered {
    /// The kernel accepts no datagram of this size.
    TooLong,
    Unreachable,
}

impl Lines {
    /// Makes a stream of lines for `unit`, with `fields` and `identifier`. The file `kept` holds an incomplete line, possibly
    /// of an earlier daemon.
    pub fn new<'a>(
        unit: &'a str,
        identifier: &'a str,
        fields: impl IntoIterator<Item = (&'a str, &'a str)>,
        kept: PathBuf,
        policy: Arc<JournalPolicy>,
    ) -> Self {
        let head = head(unit, identifier, fields).into_boxed_slice();
        let (partial, is_kept) = match std::fs::read(&kept) {
            Ok(partial) => (partial, true),
            Err(error) => (Vec::new(), error.kind() == io::ErrorKind::NotFound),
        };
        let (unsent, line_max) = (Missing::default(), LINE_MAX);
        Self { socket: None, head, partial, kept, is_kept, policy, unsent, line_max, patience: PATIENCE }
    }

    /// The same stream for output that goes nowhere else.
    pub fn alone(self) -> Self {
        Self { patience: PATIENCE_ALONE, ..self }
    }

    /// A stream of lines to the other end of this socket.
    #[cfg(test)]
    pub(super) fn connected(socket: UnixDatagram, kept: PathBuf, policy: Arc<JournalPolicy>) -> Self {
        let lines = Self::new("u.service", "id", [("CONTAINER_ID", "web")], kept, policy);
        Self { socket: Some(socket), ..lines }
    }

    /// Writes output: sends complete lines.
    pub async fn write(&mut self, bytes: &[u8]) {
        let (before, mut rest) = (self.partial.len(), bytes);
        while let Some(end) = memchr::memchr(b'\n', rest) {
            self.partial.extend_from_slice(&rest[..end]);
            rest = &rest[end + 1..];
            self.flush().await;
        }
        self.partial.extend_from_slice(rest);
        self.split(LINE_MAX).await;
        if before == 0 && self.partial.is_empty() {
            return;
        }
        let has_only_grown = self.partial.len() == before + bytes.len();
        let kept = if has_only_grown && self.is_kept { self.keep_more(bytes) } else { self.keep_partial() };
        self.is_kept = kept.is_ok();
        if let Err(error) = kept {
            // The line is only lost if the daemon ends before the end of the line.
            let path = self.kept.display();
            tracing::debug!(%error, "can't save an incomplete line in {path}: {error}");
        }
    }

    /// Saves the incomplete line. The file is on a tmpfs, so this only uses memory.
    fn keep_partial(&self) -> io::Result<()> {
        let new = self.kept.with_extension("new");
        std::fs::write(&new, &self.partial)?;
        std::fs::rename(&new, &self.kept)
    }

    /// Saves more of the incomplete line. Output without line ends would otherwise cost as much as many times its length.
    fn keep_more(&self, bytes: &[u8]) -> io::Result<()> {
        OpenOptions::new().append(true).create(true).open(&self.kept)?.write_all(bytes)
    }

    /// Sends the incomplete line, and reports missing lines.
    pub async fn finish(&mut self) {
        if !self.partial.is_empty() {
            self.flush().await;
            // Otherwise the next daemon would send it again.
            self.is_kept = self.keep_partial().is_ok();
        }
        let dropped = self.policy.take_dropped();
        self.say_dropped(dropped).await;
        if !self.unsent.is_nothing() && !self.say_unsent().await {
            let Missing { lines, bytes } = self.unsent;
            tracing::error!(
                lines,
                bytes,
                "{lines} lines ({bytes} bytes) of output were not written to the journal, which can't be reached"
            );
        }
    }

    async fn flush(&mut self) {
        self.split(LINE_MAX).await;
        let mut line = std::mem::take(&mut self.partial);
        // Terminals end lines with \r\n.
        if line.last() == Some(&b'\r') {
            line.pop();
        }
        self.send(&line).await;
        line.clear();
        self.partial = line;
    }

    /// True if lines are dropped at the moment, because they exceed the limit.
    pub fn is_over_limit(&self) -> bool {
        self.policy.is_exhausted()
    }

    /// Counts output as dropped that was not read, and the incomplete line before it.
    pub fn skip(&mut self, bytes: usize) {
        let partial = std::mem::take(&mut self.partial);
        self.policy.drop_bytes(partial.len() + bytes);
        if !partial.is_empty() {
            self.is_kept = self.keep_partial().is_ok();
        }
    }

    async fn split(&mut self, limit: usize) {
        while self.partial.len() > limit {
            let rest = self.partial.split_off(limit);
            let line = std::mem::replace(&mut self.partial, rest);
            self.send(&line).await;
        }
    }

    async fn send(&mut self, line: &[u8]) {
        match self.policy.admit(line.len()) {
            Admission::Dropped => return,
            Admission::Passes(dropped) => self.say_dropped(dropped).await,
        }
        if !self.unsent.is_nothing() && !self.say_unsent().await {
            return self.unsent.add(line.len());
        }
        let mut rest = line;
        loop {
            let (piece, after) = rest.split_at(rest.len().min(self.line_max));
            match self.deliver(PRIORITY_OUTPUT, &[], piece, self.patience).await {
                Ok(()) if after.is_empty() => return,
                Ok(()) => rest = after,
                Err(Undelivered::TooLong) if self.line_max > LINE_MIN => self.line_max /= 2,
                Err(Undelivered::TooLong | Undelivered::Unreachable) => return self.unsent.add(rest.len()),
            }
        }
    }

    /// Reports lines that the rate limit dropped.
    async fn say_dropped(&mut self, dropped: Missing) {
        let Missing { lines, bytes } = dropped;
        let text = format!(
            "{bytes} bytes ({lines} lines or more) are missing here: the container writes faster than the rate limit or journald allows"
        );
        if !dropped.is_nothing() && !self.say(dropped, &text).await {
            self.unsent.lines = self.unsent.lines.saturating_add(lines);
            self.unsent.bytes = self.unsent.bytes.saturating_add(bytes);
        }
    }

    /// Reports lines that journald did not accept. Returns false if it still accepts none.
    async fn say_unsent(&mut self) -> bool {
        let Missing { lines, bytes } = self.unsent;
        let text =
            format!("{lines} lines ({bytes} bytes) are missing here: the journal could not be reached");
        let said = self.say(self.unsent, &text).await;
        if said {
            self.unsent = Missing::default();
        }
        said
    }

    async fn say(&mut self, missing: Missing, text: &str) -> bool {
        let number = missing.lines.to_string();
        let fields = [("MESSAGE_ID", MESSAGE_DROPPED), ("N_DROPPED", number.as_str())];
        let patience = if self.unsent.is_nothing() { PATIENCE } else { Duration::ZERO };
        self.deliver(PRIORITY_MISSING, &fields, text.as_bytes(), patience).await.is_ok()
    }

    async fn deliver(
        &mut self,
        priority: &str,
        fields: &[(&str, &str)],
        message: &[u8],
        patience: Duration,
    ) -> Result<(), Undelivered> {
        let mut datagram = datagram(&self.head, priority, fields, message);
        datagram.extend_from_slice(&self.policy.fields());
        for _ in 0..2 {
            let socket = match self.socket.as_ref() {
                Some(socket) => socket,
                None => match connect() {
                    Ok(new) => self.socket.insert(new),
                    Err(_) => continue,
                },
            };
            let sent = match socket.try_send(&datagram) {
                Err(e) if e.kind() == io::ErrorKind::WouldBlock && !patience.is_zero() => {
                    let sending = tokio::time::timeout(patience, socket.send(&datagram));
                    sending.await.unwrap_or_else(|_| Err(io::ErrorKind::WouldBlock.into()))
                }
                sent => sent,
            };
            match sent {
                Ok(_) => return Ok(()),
                // journald is busy. A new connection would not help.
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Err(Undelivered::Unreachable),
                Err(e) if e.raw_os_error() == Some(Errno::EMSGSIZE as i32) => {
                    return Err(Undelivered::TooLong);
                }
                // The second try uses a new connection: journald may have created its socket again.
                Err(_) => self.socket = None,
            }
        }
        Err(Undelivered::Unreachable)
    }
}

fn connect() -> io::Result<UnixDatagram> {
    let socket = UnixDatagram::unbound()?;
    // With a smaller buffer, long lines are split.
    let _ = setsockopt(&socket, sockopt::SndBufForce, &SEND_BUFFER);
    socket.connect(SOCKET)?;
    Ok(socket)
}

/// The encoded fields of all lines of a stream.
pub fn head<'a>(
    unit: &'a str,
    identifier: &'a str,
    fields: impl IntoIterator<Item = (&'a str, &'a str)>,
) -> Vec<u8> {
    let ours = [("OBJECT_SYSTEMD_UNIT", unit), ("SYSLOG_IDENTIFIER", identifier)];
    let mut head = Vec::new();
    for (name, value) in ours.into_iter().chain(fields) {
        push_field(&mut head, name, value.as_bytes());
    }
    head
}

/// Fields in the form `NAME=value`, encoded. Those that are not in this form, and those whose name is among `but`, are left out.
pub fn more_fields(fields: &[Vec<u8>], but: &[&str]) -> Vec<u8> {
    let mut encoded = Vec::new();
    for field in fields {
        let Some((name, value)) = memchr::memchr(b'=', field).map(|end| field.split_at(end)) else {
            continue;
        };
        if let (Ok(name), [b'=', value @ ..]) = (str::from_utf8(name), value)
            && !but.contains(&name)
        {
            push_field(&mut encoded, name, value);
        }
    }
    encoded
}

/// A line as a datagram for journald.
pub fn datagram(head: &[u8], priority: &str, fields: &[(&str, &str)], message: &[u8]) -> Vec<u8> {
    let mut datagram = head.to_vec();
    push_field(&mut datagram, "PRIORITY", priority.as_bytes());
    for (name, value) in fields {
        push_field(&mut datagram, name, value.as_bytes());
    }
    push_field(&mut datagram, "MESSAGE", message);
    datagram
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A stream, its other end, and the directory of its incomplete line.
    fn lines() -> (Lines, UnixDatagram, tempfile::TempDir) {
        let (here, there) = UnixDatagram::pair().unwrap();
        let dir = tempfile::tempdir().unwrap();
        let lines = Lines::connected(here, dir.path().join("partial"), Arc::default());
        (lines, there, dir)
    }

    async fn received(journald: &UnixDatagram) -> Vec<u8> {
        let mut datagram = vec![0; 1 << 20];
        let length = tokio::time::timeout(PATIENCE, journald.recv(&mut datagram)).await.unwrap().unwrap();
        datagram.truncate(length);
        let at = datagram.windows(8).position(|part| part == b"MESSAGE\n").unwrap();
        datagram[at + 16..length - 1].to_vec()
    }

    #[tokio::test]
    async fn a_line_is_sent_when_it_ends() {
        let (mut lines, journald, _dir) = lines();
        lines.write(b"one\ntw").await;
        lines.write(b"o\r\n\nthree").await;
        lines.finish().await;
        for line in ["one", "two", "", "three"] {
            assert_eq!(received(&journald).await, line.as_bytes());
        }
    }

    #[tokio::test]
    async fn a_long_line_is_split_and_nothing_is_lost() {
        let (mut lines, journald, _dir) = lines();
        let long: Vec<u8> =
            (0..LINE_MAX * 2 + 7).map(|i| if i % 251 == 10 { 0 } else { (i % 251) as u8 }).collect();
        lines.write(&long).await;
        lines.write(b"\n").await;
        let mut back = Vec::new();
        for _ in 0..3 {
            back.extend(received(&journald).await);
        }
        assert_eq!(back, long);
    }

    #[tokio::test]
    async fn the_file_has_the_whole_incomplete_line_after_each_write() {
        let dir = tempfile::tempdir().unwrap();
        let (kept, (here, _journald)) = (dir.path().join("partial"), UnixDatagram::pair().unwrap());
        let mut lines = Lines::connected(here, kept.clone(), Arc::default());
        let long = vec![b'x'; 4096];
        let pieces = [b"be".as_slice(), b"gin", b"ning", b"\nrest", b"\n", b"\nnext"];
        for piece in pieces.into_iter().chain([long.as_slice(); 30]) {
            lines.write(piece).await;
            assert_eq!(std::fs::read(&kept).unwrap(), lines.partial, "after {} bytes", piece.len());
        }
        let next = Lines::new("u.service", "id", [], kept, Arc::default());
        assert_eq!(next.partial, lines.partial);
    }

    #[tokio::test]
    async fn the_next_daemon_does_not_send_the_last_line_again() {
        let (mut lines, journald, dir) = lines();
        lines.write(b"no end of line").await;
        lines.finish().await;
        assert_eq!(received(&journald).await, b"no end of line");
        let next = Lines::new("u.service", "id", [], dir.path().join("partial"), Arc::default());
        assert!(next.partial.is_empty());
    }

    /// As if its file system had been full.
    #[tokio::test]
    async fn a_line_that_could_not_be_saved_is_saved_whole_with_its_next_part() {
        let dir = tempfile::tempdir().unwrap();
        let (kept, (here, _journald)) = (dir.path().join("later/partial"), UnixDatagram::pair().unwrap());
        let mut lines = Lines::connected(here, kept.clone(), Arc::default());
        lines.write(b"first").await;
        std::fs::create_dir(dir.path().join("later")).unwrap();
        lines.write(b" second").await;
        assert_eq!(std::fs::read(&kept).unwrap(), b"first second");
    }

    #[tokio::test]
    async fn each_line_has_the_fields_of_the_unit_that_the_stream_does_not_have() {
        let (mut lines, journald, _dir) = lines();
        let fields =
            ["CONTAINER_ID=web", "SITE=a=b", "BINARY=\u{1}\n", "none"].map(|field| field.as_bytes().to_vec());
        lines.policy.set_fields(more_fields(&fields, &["CONTAINER_ID"]));
        lines.write(b"hello\n").await;
        let mut expected = b"hello\n".to_vec();
        for (name, value) in [("SITE", "a=b"), ("BINARY", "\u{1}\n")] {
            push_field(&mut expected, name, value.as_bytes());
        }
        expected.pop();
        assert_eq!(received(&journald).await, expected);
    }

    #[test]
    fn fields_are_length_prefixed_so_that_any_value_is_safe() {
        let lines = Lines::new(
            "u.service",
            "id",
            [("F", "a\nOBJECT_SYSTEMD_UNIT=other")],
            PathBuf::new(),
            Arc::default(),
        );
        let text = String::from_utf8_lossy(&lines.head).into_owned();
        assert!(text.starts_with("OBJECT_SYSTEMD_UNIT\n\u{9}\0\0\0\0\0\0\0u.service\n"), "{text:?}");
    }

    /// The next message, or the next report about missing lines.
    async fn said(journald: &UnixDatagram) -> String {
        String::from_utf8(received(journald).await).unwrap()
    }

    #[tokio::test]
    async fn lines_that_the_rate_limit_drops_are_counted_in_the_journal() {
        let (mut lines, journald, _dir) = lines();
        lines.policy.set(3_600_000_000, 2);
        lines.write(b"one\ntwo\nthree\nfour\n").await;
        lines.finish().await;
        assert_eq!((said(&journald).await.as_str(), said(&journald).await.as_str()), ("one", "two"));
        assert_eq!(
            said(&journald).await,
            "9 bytes (2 lines or more) are missing here: the container writes faster than the rate limit or journald allows"
        );
    }

    #[tokio::test(start_paused = true)]
    async fn a_full_journal_delays_once_and_later_gets_the_number_of_missing_lines() {
        let (mut lines, journald, _dir) = lines();
        while lines.socket.as_ref().unwrap().try_send(b"MESSAGE\n").is_ok() {}
        let begun = tokio::time::Instant::now();
        for _ in 0..50 {
            lines.write(b"lost\n").await;
        }
        assert!(begun.elapsed() <= PATIENCE * 2, "{:?}", begun.elapsed());
        let mut datagram = [0; 64];
        while tokio::time::timeout(PATIENCE, journald.recv(&mut datagram)).await.is_ok() {}
        lines.write(b"back\n").await;
        let missing = "50 lines (200 bytes) are missing here: the journal could not be reached";
        assert_eq!((said(&journald).await.as_str(), said(&journald).await.as_str()), (missing, "back"));
    }
}
