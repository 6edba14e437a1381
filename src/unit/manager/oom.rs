//! How many processes of a unit the kernel has killed because memory ran out, by the journal. The journal knows it even after the
//! unit's cgroup was removed.

use std::io;
use std::process::Stdio;

use tokio::io::{AsyncRead, AsyncReadExt};
use tokio::process::Command;

use crate::unit::error::Error;

/// systemd's message about processes that the kernel killed because memory ran out (sd-messages.h,
/// SD_MESSAGE_UNIT_OUT_OF_MEMORY). systemd checks for them whenever a process of the unit ends, before it handles that
/// end (manager.c, 252 to 262).
const MESSAGE_ID: &str = "fe6faa94e7774663a0da52717891d8ef";

/// Only messages that PID 1 itself has sent: any user can send a message with any `MESSAGE_ID` and `INVOCATION_ID`.
/// journald has the pid from the kernel.
const OF_SYSTEMD: &str = "_PID=1";

/// The query shows the last 1,000 messages at most, each as one line of 33 bytes.
const MOST_MESSAGES: &str = "--lines=1000";
const ONE_LINE_EACH: &str = "--output-fields=MESSAGE_ID";

/// The most that is read of what a program prints.
const MOST_BYTES: u64 = 64 << 10;

/// How many times the kernel has killed processes of a unit because memory ran out, by the journal. `invocation`: the invocation id
/// of the unit.
///
/// # Errors
/// The journal can't be read.
pub(super) async fn kills_in_journal(invocation: &[u8]) -> Result<u64, Error> {
    let invocation: String = invocation.iter().map(|byte| format!("{byte:02x}")).collect();
    // After this, the journal contains what systemd has sent to it.
    output_of("journalctl", &["--sync"]).await?;
    let (message, invocation) = (format!("MESSAGE_ID={MESSAGE_ID}"), format!("INVOCATION_ID={invocation}"));
    let form = ["--quiet", "--no-pager", "--output=cat", ONE_LINE_EACH, MOST_MESSAGES];
    let query = [&form[..], &[OF_SYSTEMD, &message, &invocation]].concat();
    Ok(output_of("journalctl", &query).await?.lines().count() as u64)
}

/// Runs a program to its end, and returns what it prints.
async fn output_of(program: &str, args: &[&str]) -> Result<String, Error> {
    let failed = |reason: String| Error::Journal { reason };
    let unread = |error: io::Error| failed(error.to_string());
    let mut command = Command::new(program);
    command.args(args).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.kill_on_drop(true).spawn().map_err(unread)?;
    let (printed, said) = (read(child.stdout.take()), read(child.stderr.take()));
    let (printed, said) = tokio::try_join!(printed, said).map_err(unread)?;
    if printed.len() as u64 > MOST_BYTES {
        return Err(failed(format!("it prints more than {MOST_BYTES} bytes")));
    }
    // A program that says more than what was read ends when it says the rest: its pipe is closed.
    if !child.wait().await.map_err(unread)?.success() {
        return Err(failed(String::from_utf8_lossy(&said).trim().to_owned()));
    }
    String::from_utf8(printed).map_err(|error| failed(error.to_string()))
}

/// Reads a stream to its end, or one byte more than [`MOST_BYTES`].
async fn read(stream: Option<impl AsyncRead + Unpin>) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    if let Some(stream) = stream {
        stream.take(MOST_BYTES + 1).read_to_end(&mut bytes).await?;
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    async fn shell(script: &str) -> Result<String, Error> {
        tokio::time::timeout(Duration::from_secs(60), output_of("sh", &["-c", script])).await.unwrap()
    }

    #[tokio::test]
    async fn a_program_that_prints_for_ever_is_an_error() {
        let error = shell("exec yes").await.unwrap_err();
        assert!(error.to_string().contains("more than 65536 bytes"), "{error}");
    }

    #[tokio::test]
    async fn a_program_that_fails_says_why_for_a_limited_time() {
        assert_eq!(shell("echo out; echo all is well >&2").await.unwrap(), "out\n");
        assert_eq!(shell("echo why >&2; exit 3").await.unwrap_err().to_string(), "journalctl: why");
        let error = shell("exec >&-; exec yes why >&2").await.unwrap_err().to_string();
        assert!(error.starts_with("journalctl: why") && error.len() < 70_000, "{} bytes", error.len());
    }
}
