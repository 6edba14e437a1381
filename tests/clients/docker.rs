//! Docker on the test machine: its daemon with one of a few configurations, its command line and its API.

use std::fs;
use std::io::Write;
use std::path::Path;
use std::process::{Command, Stdio};

use serde_json::{Value, json};

use crate::common::leaks::{self, Traces};
use crate::common::node::{Node, OUR_RUNTIME, runtime_under_test, unique};
use crate::common::process::{self, Outcome};
use crate::common::pty::Pty;
use crate::common::{image, systemd, wait};
use crate::disturbed::{Disturbance, Warm};
use crate::http::{Answer, Connection};

/// The name of the test image in Docker.
pub const IMAGE: &str = "testbed/busybox";

const SERVICE: &str = "docker.service";
const SOCKET: &str = "/run/docker.sock";
const CONFIGURATION: &str = "/etc/docker/daemon.json";

/// Seconds after which a command of Docker counts as hanging.
const LIMIT: &str = "120";

/// The configuration of Docker's daemon that a test needs.
#[derive(Clone, Copy, Default)]
pub struct Settings {
    /// The runtime under test is also the default one.
    pub by_default: bool,
    /// Containers continue while Docker's daemon is down.
    pub live_restore: bool,
}

/// Docker with a daemon that runs. On drop, every container is removed, and nothing may be left behind.
pub struct Docker {
    runtime: String,
    disturbance: Disturbance,
    before: Traces,
    _claim: Node,
}

impl Docker {
    pub fn new() -> Docker {
        Docker::with(Settings::default())
    }

    pub fn with(settings: Settings) -> Docker {
        let claim = Node::exclusive();
        if configure(settings) {
            load_image();
            WARM.forget();
        }
        WARM.up(warm_up);
        let before = Traces::take();
        let disturbance = Disturbance::begin();
        Docker { runtime: runtime_under_test(), disturbance, before, _claim: claim }
    }

    /// Runs `docker ARGUMENT…` to its end.
    pub fn run(&self, args: &[&str]) -> Outcome {
        docker(args)
    }

    /// Runs `docker ARGUMENT…`, which has to succeed; returns what it prints, without the last newline.
    pub fn ok(&self, args: &[&str]) -> String {
        succeed(args)
    }

    /// Runs `docker ARGUMENT…` with these bytes on its stdin.
    pub fn fed(&self, args: &[&str], input: &[u8]) -> Outcome {
        let mut child = command(args)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("run docker");
        let mut stdin = child.stdin.take().expect("stdin is piped");
        let input = input.to_vec();
        let feeder = std::thread::spawn(move || stdin.write_all(&input));
        let output = child.wait_with_output().expect("wait for docker");
        // A program that does not read its stdin may have ended already.
        let _ = feeder.join().expect("the feeder does not panic");
        Outcome {
            code: output.status.code(),
            stdout: output.stdout,
            stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
        }
    }

    /// Runs `docker ARGUMENT…` in a terminal, as a person does.
    pub fn in_terminal(&self, args: &[&str]) -> Pty {
        Pty::run(&[&["timeout", "--foreground", LIMIT, "docker"], args].concat(), 90, 30)
    }

    /// The arguments of `docker run` with the runtime under test.
    pub fn run_arguments<'a>(&'a self, options: &[&'a str], command: &[&'a str]) -> Vec<&'a str> {
        [&["run", "--runtime", &self.runtime], options, &[IMAGE], command].concat()
    }

    /// `docker run --rm` to its end.
    pub fn run_once(&self, options: &[&str], command: &[&str]) -> Outcome {
        self.run(&self.run_arguments(&[&["--rm"], options].concat(), command))
    }

    /// A container that runs a command in the background, by its id.
    pub fn background(&self, options: &[&str], command: &[&str]) -> String {
        self.ok(&self.run_arguments(&[&["--detach"], options].concat(), command))
    }

    /// A container in the background that sleeps, and ends at SIGTERM.
    pub fn sleeping(&self, options: &[&str]) -> String {
        self.background(&[&["--init"], options].concat(), &["sleep", "100000"])
    }

    /// One value of `docker inspect`, by its Go template.
    pub fn inspect(&self, container: &str, template: &str) -> String {
        self.ok(&["inspect", "--format", template, container])
    }

    pub fn pid(&self, container: &str) -> u32 {
        let pid = self.inspect(container, "{{.State.Pid}}");
        let pid = pid.parse().unwrap_or_else(|error| panic!("pid {pid:?}: {error}"));
        assert_ne!(pid, 0, "{container} does not run");
        pid
    }

    /// Waits until `docker inspect` shows a value.
    pub fn until(&self, container: &str, template: &str, wanted: &str) {
        let mut seen = String::new();
        let found = wait::within(wait::LIMIT, || {
            seen = self.inspect(container, template);
            (seen == wanted).then_some(())
        });
        assert!(found.is_some(), "{template} of {container} is {seen:?}, not {wanted:?}");
    }

    /// Waits until the logs of a container contain a text; returns them.
    pub fn logs_with(&self, container: &str, text: &str) -> String {
        let mut seen = String::new();
        let found = wait::within(wait::LIMIT, || {
            seen = self.ok(&["logs", container]);
            seen.contains(text).then_some(())
        });
        assert!(found.is_some(), "the logs of {container} have no {text:?}: {seen:?}");
        seen
    }

    /// One request to Docker's API.
    pub fn api(&self, method: &str, path: &str, body: Option<&Value>) -> Answer {
        Connection::to_unix(SOCKET).call(method, path, body)
    }

    /// A connection to Docker's API.
    pub fn connection(&self) -> Connection {
        Connection::to_unix(SOCKET)
    }

    /// Restarts Docker's daemon.
    pub fn restart(&self) {
        forget_starts();
        process::succeed("systemctl", &["restart", SERVICE]);
    }

    /// Sends SIGKILL to Docker's daemon, and calls `meanwhile` before the next daemon starts.
    pub fn killed(&self, meanwhile: impl FnOnce()) {
        process::succeed("systemctl", &["kill", "--signal=KILL", "--kill-whom=main", SERVICE]);
        wait::until_true("the killed dockerd is gone", || systemd::property(SERVICE, "MainPID") == "0");
        meanwhile();
        forget_starts();
        process::succeed("systemctl", &["restart", SERVICE]);
    }

    /// The unit of a container under our runtime.
    pub fn unit(&self, container: &str) -> String {
        format!("containerd-moby-{}.service", &container[..12])
    }

    pub fn runtime(&self) -> &str {
        &self.runtime
    }

    /// Whether the runtime under test is ours.
    pub fn is_ours(&self) -> bool {
        self.runtime == OUR_RUNTIME
    }
}

impl Drop for Docker {
    fn drop(&mut self) {
        self.disturbance.end();
        let containers = docker(&["ps", "--all", "--quiet", "--no-trunc"]).text();
        let ids: Vec<&str> = containers.split_whitespace().collect();
        if !ids.is_empty() {
            let removed = docker(&[&["rm", "--force", "--volumes"], ids.as_slice()].concat());
            assert!(removed.code == Some(0) || std::thread::panicking(), "{removed:?}");
        }
        if !std::thread::panicking() {
            leaks::assert_none("containers of Docker", &self.before);
        }
    }
}

/// A name for a container or a volume.
pub fn name(of: &str) -> String {
    unique(of)
}

fn command(args: &[&str]) -> Command {
    let mut command = Command::new("timeout");
    command.args(["--kill-after=5", LIMIT, "docker"]).args(args);
    command
}

fn docker(args: &[&str]) -> Outcome {
    process::outcome(command(args).stdin(Stdio::null()))
}

fn succeed(args: &[&str]) -> String {
    let outcome = docker(args);
    assert_eq!(outcome.code, Some(0), "docker {args:?}: {}", outcome.stderr);
    outcome.text().trim_end_matches('\n').to_string()
}

/// systemd stops restarting a service that starts too often: reset its counter.
fn forget_starts() {
    process::run("systemctl", &["reset-failed", "docker.service", "docker.socket"]);
}

/// Starts Docker's daemon with a configuration, unless it runs with it already. Returns whether it started.
fn configure(settings: Settings) -> bool {
    let mut configuration = json!({
        "live-restore": settings.live_restore,
        "shutdown-timeout": 5,
        "runtimes": { "named": { "runtimeType": runtime_under_test() } },
    });
    if settings.by_default {
        configuration["default-runtime"] = json!("named");
    }
    let text = configuration.to_string();
    if fs::read_to_string(CONFIGURATION).is_ok_and(|now| now == text) && systemd::is_active(SERVICE) {
        return false;
    }
    let directory = Path::new(CONFIGURATION).parent().expect("a file has a directory");
    fs::create_dir_all(directory).expect("make Docker's directory");
    fs::write(CONFIGURATION, text).expect("write Docker's configuration");
    forget_starts();
    process::succeed("systemctl", &["restart", SERVICE]);
    true
}

/// Loads the test image into Docker, whose archives have another format than containerd's.
fn load_image() {
    if docker(&["image", "inspect", IMAGE]).code == Some(0) {
        return;
    }
    let archive = "/var/tmp/busybox-for-docker.tar";
    process::succeed("ctr", &["image", "export", archive, image::IMAGE]);
    succeed(&["load", "--input", archive]);
    let _ = fs::remove_file(archive);
}

/// The first container of a dockerd makes objects that stay, such as our daemon and the mount of a directory.
static WARM: Warm = Warm::new();

fn warm_up() {
    succeed(&["run", "--rm", "--runtime", &runtime_under_test(), IMAGE, "true"]);
}
