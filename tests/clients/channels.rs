//! The streams of an exec or an attach in CRI: channels in the frames of a WebSocket.

use std::fs::File;
use std::io::Write;

use serde_json::Value;

use crate::common::stdio::Reader;
use crate::http::Connection;

/// The protocol of Kubernetes in which the first byte of a message is the number of its channel.
const PROTOCOL: &str = "v4.channel.k8s.io";

const STDIN: u8 = 0;
const STDOUT: u8 = 1;
const STDERR: u8 = 2;
const STATUS: u8 = 3;
const RESIZE: u8 = 4;

/// WebSocket: a whole message of bytes, and the bit that says that the payload is masked.
const BINARY: u8 = 0x82;
const MASKED: u8 = 0x80;
/// Longer messages have another form of header, which the tests do not need to send.
const LONGEST: usize = 125;

pub struct Channels {
    write: File,
    read: Reader,
    /// Bytes that have arrived, and that do not form a whole frame yet.
    pending: Vec<u8>,
    stdout: Vec<u8>,
    stderr: Vec<u8>,
    status: Option<Value>,
}

/// The output of a process, and its exit code.
#[derive(Debug, PartialEq)]
pub struct Ended {
    pub stdout: String,
    pub stderr: String,
    pub code: i64,
}

impl Channels {
    /// Connects to the address that containerd has given.
    pub fn open(url: &str) -> Channels {
        let rest = url.strip_prefix("http://").unwrap_or_else(|| panic!("no http: {url}"));
        let (address, path) = rest.split_once('/').unwrap_or_else(|| panic!("no path: {url}"));
        let headers = [
            ("Connection", "Upgrade"),
            ("Upgrade", "websocket"),
            ("Sec-WebSocket-Version", "13"),
            ("Sec-WebSocket-Key", "YSB0ZXN0IG9mIGEgc2hpbQ=="),
            ("Sec-WebSocket-Protocol", PROTOCOL),
        ];
        let (write, read) = Connection::to_tcp(address).upgrade("GET", &format!("/{path}"), &headers, None);
        Channels { write, read, pending: Vec::new(), stdout: Vec::new(), stderr: Vec::new(), status: None }
    }

    pub fn enter(&mut self, text: &str) {
        self.send(STDIN, text.as_bytes());
    }

    pub fn resize(&mut self, width: u32, height: u32) {
        self.send(RESIZE, format!("{{\"Width\":{width},\"Height\":{height}}}").as_bytes());
    }

    /// Waits until stdout contains the text.
    pub fn until(&mut self, text: &str) {
        while !String::from_utf8_lossy(&self.stdout).contains(text) {
            assert!(self.status.is_none(), "ended without {text:?}: {:?}", self.text());
            self.receive();
        }
    }

    /// Waits for the end of the process.
    pub fn ended(mut self) -> Ended {
        loop {
            if let Some(status) = &self.status {
                let code = code_of(status);
                let (stdout, stderr) = self.text();
                return Ended { stdout, stderr, code };
            }
            self.receive();
        }
    }

    fn text(&self) -> (String, String) {
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        (text(&self.stdout), text(&self.stderr))
    }

    fn send(&mut self, channel: u8, payload: &[u8]) {
        let length = payload.len() + 1;
        assert!(length <= LONGEST, "{length} bytes");
        // A mask of zeros leaves the payload as it is.
        let mut frame = vec![BINARY, MASKED | length as u8, 0, 0, 0, 0, channel];
        frame.extend_from_slice(payload);
        self.write.write_all(&frame).expect("write to a WebSocket");
    }

    /// Waits for one more frame.
    fn receive(&mut self) {
        loop {
            if let Some((payload, rest)) = first_frame(&self.pending) {
                let (payload, rest) = (payload.to_vec(), rest.to_vec());
                self.pending = rest;
                return self.take(&payload);
            }
            let more = self.read.until(|bytes| !bytes.is_empty());
            self.pending.extend(more);
        }
    }

    fn take(&mut self, payload: &[u8]) {
        match payload.split_first() {
            Some((&STDOUT, text)) => self.stdout.extend_from_slice(text),
            Some((&STDERR, text)) => self.stderr.extend_from_slice(text),
            Some((&STATUS, text)) if !text.is_empty() => {
                let status = serde_json::from_slice(text);
                self.status = Some(status.unwrap_or_else(|error| panic!("status {text:?}: {error}")));
            }
            _ => {}
        }
    }
}

/// The payload of the first frame, and what follows it. A server does not mask.
fn first_frame(bytes: &[u8]) -> Option<(&[u8], &[u8])> {
    let (head, rest) = bytes.split_first_chunk::<2>()?;
    let (length, rest) = match head[1] {
        126 => {
            rest.split_first_chunk().map(|(length, rest)| (u64::from(u16::from_be_bytes(*length)), rest))?
        }
        127 => rest.split_first_chunk().map(|(length, rest)| (u64::from_be_bytes(*length), rest))?,
        length => (u64::from(length), rest),
    };
    rest.split_at_checked(usize::try_from(length).expect("a frame fits into memory"))
}

/// The exit code in Kubernetes' report about a process.
fn code_of(status: &Value) -> i64 {
    if status["status"] == "Success" {
        return 0;
    }
    let causes = status["details"]["causes"].as_array().map(Vec::as_slice).unwrap_or_default();
    let code = causes.iter().find(|cause| cause["reason"] == "ExitCode");
    let code = code.and_then(|cause| cause["message"].as_str()?.parse().ok());
    code.unwrap_or_else(|| panic!("no exit code in {status}"))
}
