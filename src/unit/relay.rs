//! Notifications from a container to systemd (sd_notify(3)), which the daemon relays.
//!
//! A container never gets systemd's own socket: from a sender that is root, systemd accepts any process of the machine as
//! the unit's main process, and would kill that process with the container. The daemon relays only what concerns the
//! container's own unit, as a message of the unit's main process (unix(7), `SCM_CREDENTIALS`).

use std::io;
use std::time::{Duration, Instant};

use tokio::net::UnixDatagram;

use crate::text;

use super::notify;

/// The longest message that systemd accepts, in bytes (`NOTIFY_BUFFER_MAX`).
pub const MESSAGE_MAX: usize = 4096;

/// The longest status that is relayed, in bytes: one line for people to read.
const STATUS_MAX: usize = 256;

/// The part of a container's notification that is relayed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Notification {
    /// Lines that are relayed unchanged.
    lines: Vec<String>,
    /// The extension of its time limit that the container requests, in microseconds.
    pub extend_usec: Option<u64>,
}

impl Notification {
    /// Reads a message. Drops what a container may not decide: the main process, descriptors to keep, the watchdog's
    /// interval, errors of the bus, and everything that later versions of systemd add.
    pub fn read(message: &[u8]) -> Self {
        let mut said = Self::default();
        let Ok(text) = std::str::from_utf8(message) else {
            return said;
        };
        for line in text.lines() {
            match line.split_once('=') {
                Some(("READY" | "STOPPING" | "RELOADING" | "WATCHDOG", "1")) => {
                    said.lines.push(line.to_owned())
                }
                Some((name @ "MONOTONIC_USEC", value)) => {
                    said.lines.extend(value.parse::<u64>().map(|usec| format!("{name}={usec}")));
                }
                Some((name @ "STATUS", value)) => said.lines.push(format!("{name}={}", one_line(value))),
                Some(("EXTEND_TIMEOUT_USEC", value)) => said.extend_usec = value.parse().ok(),
                Some(_) | None => {}
            }
        }
        said
    }

    /// The message for systemd, or `None` if nothing is left to relay. `extend_usec` is the part of the requested time that
    /// the container gets.
    pub fn text(&self, extend_usec: Option<u64>) -> Option<String> {
        let extended = extend_usec.map(|usec| format!("EXTEND_TIMEOUT_USEC={usec}"));
        let lines: Vec<&str> = self.lines.iter().chain(&extended).map(String::as_str).collect();
        (!lines.is_empty()).then(|| lines.join("\n"))
    }
}

/// The text without characters that have no place in a line ([`text::is_unfit`]), shortened to [`STATUS_MAX`] bytes.
fn one_line(status: &str) -> String {
    let mut line = String::new();
    for c in status.chars().map(|c| if text::is_unfit(c) { ' ' } else { c }) {
        if line.len() + c.len_utf8() > STATUS_MAX {
            break;
        }
        line.push(c);
    }
    line
}

/// How far a container may extend the time that the administrator sets: to twice that time.
#[derive(Clone, Copy, Debug, Default)]
pub struct TimeExtension {
    began: Option<Instant>,
}

impl TimeExtension {
    /// The time that a container gets if it asks for `asked_usec`. `limit_usec` is `TimeoutStopUSec` of its unit.
    ///
    /// The time runs from the first request. A new period begins after twice the limit, when a stop that was extended
    /// before is over.
    pub fn grant(&mut self, asked_usec: u64, limit_usec: u64, now: Instant) -> Option<u64> {
        let limit = Duration::from_micros(limit_usec);
        let mut elapsed = self.began.map_or(Duration::MAX, |began| now.duration_since(began));
        if elapsed >= limit.saturating_mul(2) {
            self.began = Some(now);
            elapsed = Duration::ZERO;
        }
        let left = limit_usec.saturating_sub(u64::try_from(elapsed.as_micros()).unwrap_or(u64::MAX));
        Some(asked_usec.min(left)).filter(|usec| *usec > 0)
    }
}

/// Sends the messages to systemd.
#[derive(Debug)]
pub struct Relay {
    /// `None` if systemd did not start this process.
    socket: Option<UnixDatagram>,
}

impl Relay {
    /// Connects to the systemd that started this process.
    pub fn new() -> Self {
        Self {
            socket: Self::connect().unwrap_or_else(|error| {
                tracing::error!(%error, "can't connect to systemd's notify socket, so notifications of containers are lost: {error}");
                None
            }),
        }
    }

    /// Sends to another socket than systemd's.
    #[cfg(test)]
    pub fn to(path: &std::path::Path) -> Self {
        let socket = UnixDatagram::unbound().and_then(|socket| socket.connect(path).map(|()| socket));
        Self { socket: Some(socket.unwrap()) }
    }

    fn connect() -> io::Result<Option<UnixDatagram>> {
        let Some(socket) = notify::connect()? else {
            return Ok(None);
        };
        socket.set_nonblocking(true)?;
        UnixDatagram::from_std(socket).map(Some)
    }

    /// Sends a message to systemd in the name of a process of its unit. Waits while systemd is busy, and sends nothing
    /// if the process has ended meanwhile (`lives`): another process may get its pid.
    ///
    /// # Errors
    /// The process does not exist, or systemd can't be reached.
    pub async fn tell(&self, text: &str, process: u32, lives: impl Fn() -> bool) -> io::Result<()> {
        let Some(socket) = &self.socket else {
            return Ok(());
        };
        let send = || if lives() { crate::sys::send_as(socket, text, process) } else { Ok(()) };
        socket.async_io(tokio::io::Interest::WRITABLE, send).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn passed(message: &[u8]) -> Option<String> {
        Notification::read(message).text(None)
    }

    #[test]
    fn allowed_notifications_are_passed_on() {
        let text = "READY=1\nSTATUS=3 clients\nWATCHDOG=1";
        assert_eq!(passed(text.as_bytes()).as_deref(), Some(text));
        let text = "RELOADING=1\nMONOTONIC_USEC=17";
        assert_eq!(passed(text.as_bytes()).as_deref(), Some(text));
        assert_eq!(passed(b"STOPPING=1\n").as_deref(), Some("STOPPING=1"));
    }

    #[test]
    fn forbidden_notifications_are_dropped() {
        for line in [
            "MAINPID=1",
            "MAINPIDFD=1",
            "MAINPIDFDID=1",
            "FDSTORE=1",
            "FDSTOREREMOVE=1",
            "FDNAME=x",
            "FDPOLL=0",
            "WATCHDOG=trigger",
            "WATCHDOG_USEC=1",
            "BUSERROR=x",
            "VARLINKERROR=x",
            "ERRNO=1",
            "EXIT_STATUS=1",
            "NOTIFYACCESS=all",
            "BARRIER=1",
            "RESTART_RESET=1",
            "X_ANYTHING=1",
            "READY=0",
            "ready=1",
            " READY=1",
            "MONOTONIC_USEC=-1",
            "EXTEND_TIMEOUT_USEC=x",
            "",
        ] {
            assert_eq!(passed(line.as_bytes()), None, "{line}");
            let with_more = format!("{line}\nSTATUS=x\n{line}");
            assert_eq!(passed(with_more.as_bytes()).as_deref(), Some("STATUS=x"), "{line}");
        }
        assert_eq!(passed(b"STATUS=\xff"), None);
    }

    #[test]
    fn a_status_is_one_readable_line() {
        assert_eq!(passed(b"STATUS=a\x1b[31m\0b\x07\rc").as_deref(), Some("STATUS=a [31m b  c"));
        let hidden = "STATUS=a\u{2028}b\u{202e}c\u{85}d\u{200b}e";
        assert_eq!(passed(hidden.as_bytes()).as_deref(), Some("STATUS=a b c d e"));
        let long = format!("STATUS={}", "\u{fc}".repeat(4000));
        let text = passed(long.as_bytes()).unwrap();
        assert_eq!(text, format!("STATUS={}", "\u{fc}".repeat(STATUS_MAX / 2)));
    }

    #[test]
    fn a_stop_takes_no_more_than_twice_its_time() {
        let (limit, second) = (10_000_000, 1_000_000);
        let begun = Instant::now();
        let at = |seconds| begun + Duration::from_secs(seconds);
        let mut extension = TimeExtension::default();
        assert_eq!(extension.grant(4 * second, limit, at(0)), Some(4 * second));
        assert_eq!(extension.grant(u64::MAX, limit, at(3)), Some(7 * second));
        assert_eq!(extension.grant(second, limit, at(10)), None);
        assert_eq!(extension.grant(second, limit, at(19)), None);
        assert_eq!(extension.grant(second, limit, at(20)), Some(second));
        assert_eq!(TimeExtension::default().grant(5, u64::MAX, at(0)), Some(5));
        assert_eq!(TimeExtension::default().grant(5, 0, at(0)), None);
    }
}
