//! Docker's API without its command line, as other programs use it.

use std::io::Write;

use serde_json::{Value, json};

use crate::common::stdio::Reader;
use crate::docker::{Docker, IMAGE};

/// The headers with which a client asks for a stream of bytes.
const UPGRADE: [(&str, &str); 2] = [("Connection", "Upgrade"), ("Upgrade", "tcp")];

impl Docker {
    /// Creates a container; returns its id.
    fn create(&self, command: &[&str], more: Value) -> String {
        let mut body = json!({ "Image": IMAGE, "Cmd": command, "HostConfig": { "Runtime": self.runtime() } });
        for (key, value) in more.as_object().expect("an object") {
            body[key] = value.clone();
        }
        let made = self.api("POST", "/containers/create", Some(&body)).json();
        made["Id"].as_str().unwrap_or_else(|| panic!("no id in {made}")).to_string()
    }

    fn post(&self, path: &str, body: Option<&Value>) {
        let answer = self.api("POST", path, body);
        assert!(answer.is_success(), "{path}: {} {}", answer.status, answer.text());
    }
}

/// Splits Docker's stream of frames into stdout and stderr.
fn split(mut frames: &[u8]) -> (String, String) {
    let mut streams = [Vec::new(), Vec::new()];
    while let Some((head, rest)) = frames.split_first_chunk::<8>() {
        let length = u32::from_be_bytes([head[4], head[5], head[6], head[7]]) as usize;
        let (text, rest) = rest.split_at(length);
        streams[usize::from(head[0] == 2)].extend_from_slice(text);
        frames = rest;
    }
    streams.map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).into()
}

fn attached(read: &mut Reader) -> (String, String) {
    split(&read.rest())
}

#[test]
fn the_api_creates_attaches_starts_waits_and_removes() {
    let docker = Docker::new();
    let container = docker.create(
        &["sh", "-c", "cat; echo error >&2; exit 15"],
        json!({ "OpenStdin": true, "StdinOnce": true, "AttachStdin": true }),
    );
    let path = format!("/containers/{container}/attach?stream=1&stdin=1&stdout=1&stderr=1");
    let (mut write, mut read) = docker.connection().upgrade("POST", &path, &UPGRADE, None);
    docker.post(&format!("/containers/{container}/start"), None);
    write.write_all(b"to its stdin\n").expect("write to the container");
    nix::sys::socket::shutdown(std::os::fd::AsRawFd::as_raw_fd(&write), nix::sys::socket::Shutdown::Write)
        .expect("end the container's stdin");
    assert_eq!(attached(&mut read), ("to its stdin\n".to_string(), "error\n".to_string()));
    let waited = docker.api("POST", &format!("/containers/{container}/wait"), None).json();
    assert_eq!(waited["StatusCode"], 15);
    let shown = docker.api("GET", &format!("/containers/{container}/json"), None).json();
    assert_eq!((&shown["State"]["Status"], &shown["State"]["ExitCode"]), (&json!("exited"), &json!(15)));
    let logs = docker.api("GET", &format!("/containers/{container}/logs?stdout=1&stderr=1"), None);
    assert_eq!(split(&logs.body), ("to its stdin\n".to_string(), "error\n".to_string()));
    let removed = docker.api("DELETE", &format!("/containers/{container}"), None);
    assert_eq!(removed.status, 204, "{}", removed.text());
}

#[test]
fn the_api_runs_an_exec_in_a_terminal_of_a_size() {
    let docker = Docker::new();
    let container = docker.sleeping(&[]);
    let body = json!({
        "Cmd": ["sh", "-c", "while [ \"$(stty size)\" != '33 77' ]; do usleep 20000; done; echo resized; read word; exit $word"],
        "Tty": true, "AttachStdin": true, "AttachStdout": true, "AttachStderr": true,
    });
    let made = docker.api("POST", &format!("/containers/{container}/exec"), Some(&body)).json();
    let exec = made["Id"].as_str().expect("an exec has an id").to_string();
    let start = json!({ "Detach": false, "Tty": true, "ConsoleSize": [20, 40] });
    let path = format!("/exec/{exec}/start");
    let (mut write, mut read) = docker.connection().upgrade("POST", &path, &UPGRADE, Some(&start));
    // Docker refuses a resize until the exec runs.
    crate::common::wait::until_true("the exec is resized", || {
        docker.api("POST", &format!("/exec/{exec}/resize?h=33&w=77"), None).is_success()
    });
    read.until(|bytes| bytes.windows(7).any(|word| word == b"resized"));
    write.write_all(b"16\n").expect("write to the exec");
    read.rest();
    let shown = docker.api("GET", &format!("/exec/{exec}/json"), None).json();
    assert_eq!((&shown["Running"], &shown["ExitCode"]), (&json!(false), &json!(16)));
}

#[test]
fn the_api_reports_the_error_of_a_start() {
    let docker = Docker::new();
    let container = docker.create(&["/there/is/no/such/program"], json!({}));
    let answer = docker.api("POST", &format!("/containers/{container}/start"), None);
    assert_eq!(answer.status, 400, "{}", answer.text());
    assert!(answer.text().contains("no such file or directory"), "{}", answer.text());
    let shown = docker.api("GET", &format!("/containers/{container}/json"), None).json();
    assert_eq!((&shown["State"]["Status"], &shown["State"]["ExitCode"]), (&json!("created"), &json!(127)));
}

#[test]
fn the_api_pauses_and_updates() {
    let docker = Docker::new();
    let container = docker.sleeping(&[]);
    let state = || docker.api("GET", &format!("/containers/{container}/json"), None).json();
    docker.post(&format!("/containers/{container}/pause"), None);
    assert_eq!(state()["State"]["Paused"], true);
    docker.post(&format!("/containers/{container}/unpause"), None);
    let policy = json!({ "RestartPolicy": { "Name": "on-failure", "MaximumRetryCount": 3 } });
    docker.post(&format!("/containers/{container}/update"), Some(&policy));
    let now = state();
    assert_eq!(now["State"]["Paused"], false);
    assert_eq!(now["HostConfig"]["RestartPolicy"]["Name"], "on-failure");
    docker.post(&format!("/containers/{container}/kill?signal=KILL"), None);
    docker.until(&container, "{{.State.Status}} {{.State.ExitCode}}", "exited 137");
}
