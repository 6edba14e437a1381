//! A minimal HTTP client: one request per connection, and connections that become streams of bytes.

use std::fs::File;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;

use serde_json::Value;

use crate::common::stdio::Reader;
use crate::common::wait;

/// The response to a request.
#[derive(Debug)]
pub struct Answer {
    pub status: u16,
    pub body: Vec<u8>,
}

impl Answer {
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }

    /// The body of a successful response.
    pub fn json(&self) -> Value {
        assert!(self.is_success(), "status {}: {}", self.status, self.text());
        serde_json::from_slice(&self.body).unwrap_or_else(|error| panic!("{}: {error}", self.text()))
    }

    pub fn is_success(&self) -> bool {
        (200..300).contains(&self.status)
    }
}

/// A connection that has carried no request yet.
pub struct Connection(File);

impl Connection {
    pub fn to_unix(path: &str) -> Connection {
        let stream = UnixStream::connect(path).unwrap_or_else(|error| panic!("connect to {path}: {error}"));
        stream.set_read_timeout(Some(wait::LIMIT)).expect("a time limit for reads");
        Connection(File::from(OwnedFd::from(stream)))
    }

    pub fn to_tcp(address: &str) -> Connection {
        let stream =
            TcpStream::connect(address).unwrap_or_else(|error| panic!("connect to {address}: {error}"));
        stream.set_read_timeout(Some(wait::LIMIT)).expect("a time limit for reads");
        Connection(File::from(OwnedFd::from(stream)))
    }

    /// Sends a request and reads the whole response.
    pub fn call(self, method: &str, path: &str, body: Option<&Value>) -> Answer {
        // In version 1.0 the end of the connection is the end of the body.
        let (status, file) = self.request(&format!("{method} {path} HTTP/1.0"), &[], body);
        Answer { status, body: Reader::of(file, path).rest() }
    }

    /// Sends a request that turns the connection into a stream; returns its two directions.
    pub fn upgrade(
        self,
        method: &str,
        path: &str,
        headers: &[(&str, &str)],
        body: Option<&Value>,
    ) -> (File, Reader) {
        let (status, file) = self.request(&format!("{method} {path} HTTP/1.1"), headers, body);
        let write = file.try_clone().expect("one more descriptor of a connection");
        let mut read = Reader::of(file, path);
        if status != 101 {
            panic!("{method} {path}: status {status}: {}", read.text());
        }
        (write, read)
    }

    /// Sends a request; returns the status of the response, and the connection at its body.
    fn request(mut self, line: &str, headers: &[(&str, &str)], body: Option<&Value>) -> (u16, File) {
        let body = body.map(Value::to_string).unwrap_or_default();
        let mut request = format!("{line}\r\nHost: test\r\nContent-Length: {}\r\n", body.len());
        if !body.is_empty() {
            request += "Content-Type: application/json\r\n";
        }
        for (name, value) in headers {
            request += &format!("{name}: {value}\r\n");
        }
        request += "\r\n";
        request += &body;
        self.0.write_all(request.as_bytes()).unwrap_or_else(|error| panic!("{line}: {error}"));
        // This reads byte by byte, because the bytes after the head belong to the body.
        let mut head = Vec::new();
        let mut byte = [0];
        while !head.ends_with(b"\r\n\r\n") {
            self.0.read_exact(&mut byte).unwrap_or_else(|error| panic!("{line}: read the response: {error}"));
            head.push(byte[0]);
        }
        let head = String::from_utf8_lossy(&head);
        let status = head.split(' ').nth(1).and_then(|status| status.parse().ok());
        (status.unwrap_or_else(|| panic!("{line}: no status in {head:?}")), self.0)
    }
}
