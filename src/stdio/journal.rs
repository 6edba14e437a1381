//! Lines to the journal, in the name of a container's unit.
//!
//! journald's native protocol: a datagram per line, fields as `NAME\n`, length, bytes, `\n`
//! (systemd.io/JOURNAL_NATIVE_PROTOCOL). `OBJECT_SYSTEMD_UNIT` from a root process files the line
//! under that unit for `journalctl -u`, also when its process is gone.

use std::io;
use std::path::PathBuf;

use tokio::net::UnixDatagram;

const SOCKET: &str = "/run/systemd/journal/socket";

/// A longer line is split, as journald does it with its own streams (`LineMax=`).
const LINE_MAX: usize = 48 << 10;

/// `LOG_INFO`, as systemd gives it to what services print.
const PRIORITY: &str = "6";

/// A stream of lines. What has no end of line yet waits for it.
#[derive(Debug)]
pub struct Lines {
    socket: Option<UnixDatagram>,
    /// The fields of every line, encoded.
    head: Vec<u8>,
    partial: Vec<u8>,
    /// Where the unfinished line is kept, for the next daemon.
    kept: PathBuf,
}

impl Lines {
    /// A stream whose lines belong to `unit`, carry `fields`, and are shown with `identifier`. A line
    /// that is not finished is kept in a file, where an earlier daemon may have left one.
    pub fn new<'a>(
        unit: &'a str,
        identifier: &'a str,
        fields: impl IntoIterator<Item = (&'a str, &'a str)>,
        kept: PathBuf,
    ) -> Self {
        let ours = [("OBJECT_SYSTEMD_UNIT", unit), ("SYSLOG_IDENTIFIER", identifier), ("PRIORITY", PRIORITY)];
        let mut head = Vec::new();
        for (name, value) in ours.into_iter().chain(fields) {
            push_field(&mut head, name, value.as_bytes());
        }
        let partial = std::fs::read(&kept).unwrap_or_default();
        Self { socket: None, head, partial, kept }
    }

    /// Takes output in; complete lines leave. Waits while journald is busy.
    ///
    /// # Errors
    /// journald can't be reached; the lines are lost.
    pub async fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        let (had_partial, mut rest) = (!self.partial.is_empty(), bytes);
        while let Some(end) = rest.iter().position(|byte| *byte == b'\n') {
            self.partial.extend_from_slice(&rest[..end]);
            rest = &rest[end + 1..];
            self.flush().await?;
        }
        self.partial.extend_from_slice(rest);
        self.split(LINE_MAX).await?;
        if had_partial || !self.partial.is_empty() { self.keep_partial() } else { Ok(()) }
    }

    /// On a tmpfs: memory only.
    fn keep_partial(&self) -> io::Result<()> {
        let new = self.kept.with_extension("new");
        std::fs::write(&new, &self.partial)?;
        std::fs::rename(&new, &self.kept)
    }

    /// Sends what has no end of line.
    ///
    /// # Errors
    /// As [`Self::write`].
    pub async fn finish(&mut self) -> io::Result<()> {
        if self.partial.is_empty() { Ok(()) } else { self.flush().await }
    }

    async fn flush(&mut self) -> io::Result<()> {
        self.split(LINE_MAX).await?;
        let mut line = std::mem::take(&mut self.partial);
        // Terminals end their lines with both.
        if line.last() == Some(&b'\r') {
            line.pop();
        }
        let sent = self.send(&line).await;
        line.clear();
        self.partial = line;
        sent
    }

    async fn split(&mut self, limit: usize) -> io::Result<()> {
        while self.partial.len() > limit {
            let rest = self.partial.split_off(limit);
            let line = std::mem::replace(&mut self.partial, rest);
            self.send(&line).await?;
        }
        Ok(())
    }

    async fn send(&mut self, line: &[u8]) -> io::Result<()> {
        let mut datagram = self.head.clone();
        push_field(&mut datagram, "MESSAGE", line);
        let socket = match self.socket.take() {
            Some(socket) => socket,
            None => connect()?,
        };
        if socket.send(&datagram).await.is_ok() {
            self.socket = Some(socket);
            return Ok(());
        }
        // journald's socket has been made anew.
        let socket = connect()?;
        socket.send(&datagram).await?;
        self.socket = Some(socket);
        Ok(())
    }
}

fn connect() -> io::Result<UnixDatagram> {
    let socket = UnixDatagram::unbound()?;
    socket.connect(SOCKET)?;
    Ok(socket)
}

fn push_field(datagram: &mut Vec<u8>, name: &str, value: &[u8]) {
    datagram.extend_from_slice(name.as_bytes());
    datagram.push(b'\n');
    datagram.extend_from_slice(&(value.len() as u64).to_le_bytes());
    datagram.extend_from_slice(value);
    datagram.push(b'\n');
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A stream whose other end is at hand.
    fn lines() -> (Lines, UnixDatagram) {
        let (here, there) = UnixDatagram::pair().unwrap();
        let kept = std::env::temp_dir().join(format!("journal-test-{}", std::process::id()));
        let mut lines = Lines::new("u.service", "id", [("CONTAINER_ID", "web")], kept.join("partial"));
        // Each test has its own: what is kept of one must not begin another's first line.
        lines.partial.clear();
        std::fs::create_dir_all(kept).unwrap();
        lines.socket = Some(here);
        (lines, there)
    }

    async fn received(journald: &UnixDatagram) -> Vec<u8> {
        let mut datagram = vec![0; 1 << 20];
        let length = journald.recv(&mut datagram).await.unwrap();
        datagram.truncate(length);
        let at = datagram.windows(8).position(|part| part == b"MESSAGE\n").unwrap();
        datagram[at + 16..length - 1].to_vec()
    }

    #[tokio::test]
    async fn a_line_is_sent_when_it_ends() {
        let (mut lines, journald) = lines();
        lines.write(b"one\ntw").await.unwrap();
        lines.write(b"o\r\n\nthree").await.unwrap();
        lines.finish().await.unwrap();
        for line in ["one", "two", "", "three"] {
            assert_eq!(received(&journald).await, line.as_bytes());
        }
    }

    #[tokio::test]
    async fn a_long_line_is_split_and_nothing_is_lost() {
        let (mut lines, journald) = lines();
        let long: Vec<u8> =
            (0..LINE_MAX * 2 + 7).map(|i| if i % 251 == 10 { 0 } else { (i % 251) as u8 }).collect();
        lines.write(&long).await.unwrap();
        lines.write(b"\n").await.unwrap();
        let mut back = Vec::new();
        for _ in 0..3 {
            back.extend(received(&journald).await);
        }
        assert_eq!(back, long);
    }

    #[test]
    fn fields_are_length_prefixed_so_that_any_value_is_safe() {
        let lines = Lines::new("u.service", "id", [("F", "a\nOBJECT_SYSTEMD_UNIT=other")], PathBuf::new());
        let text = String::from_utf8_lossy(&lines.head).into_owned();
        assert!(text.starts_with("OBJECT_SYSTEMD_UNIT\n\u{9}\0\0\0\0\0\0\0u.service\n"), "{text:?}");
    }
}
