//! Calls our shim directly, without containerd: its binary, and the daemon over ttrpc.

use std::fs;
use std::io::Write;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use containerd_shim_protos::api::{ConnectRequest, CreateTaskRequest, CreateTaskResponse};
use containerd_shim_protos::protobuf::well_known_types::any::Any;
use containerd_shim_protos::sandbox_async::SandboxClient;
use containerd_shim_protos::shim_async::TaskClient;
use ttrpc::Code;
use ttrpc::asynchronous::Client;
use ttrpc::context::Context;

use super::node::{CONTAINERD_SOCKET, NAMESPACE, Node, unique};
use super::process::{self, Outcome};
use super::spec::Spec;
use super::stdio::Scratch;
use super::systemd::{DAEMON_SERVICE, DAEMON_SOCKET};
use super::{daemon, wait};

pub const BINARY: &str = "/usr/local/bin/containerd-shim-systemd-v1";

/// A restore in an emulated guest on a busy machine takes half a minute.
const CALL_LIMIT: Duration = Duration::from_secs(120);

/// The code and the text of an error.
pub type Refusal = (Code, String);

/// A connection to the daemon. containerd has one for each bundle.
pub struct Shim<'n> {
    node: &'n Node,
    client: Client,
}

impl<'n> Shim<'n> {
    /// Connects to the address that `start` prints, as containerd does. When this returns, the daemon has accepted the
    /// connection and keeps it.
    pub fn connect(node: &'n Node) -> Shim<'n> {
        let shim = Shim::at(node, &socket());
        let nobody = ConnectRequest { id: unique("nobody"), ..Default::default() };
        shim.call(async |client, context| client.connect(context, &nobody).await)
            .expect("Connect, which needs no task");
        shim
    }

    /// Connects to a socket by its path.
    pub fn at(node: &'n Node, path: &str) -> Shim<'n> {
        let address = format!("unix://{path}");
        let client = node
            .block_on(Client::connect(&address))
            .unwrap_or_else(|error| panic!("connect to {address}: {error}"));
        Shim { node, client }
    }

    /// One call of the Task service in the tests' namespace.
    pub fn call<T>(
        &self,
        method: impl AsyncFnOnce(TaskClient, Context) -> ttrpc::Result<T>,
    ) -> Result<T, Refusal> {
        self.node.block_on(method(TaskClient::new(self.client.clone()), context())).map_err(refusal)
    }

    /// One call of the Sandbox service in the tests' namespace.
    pub fn call_sandbox<T>(
        &self,
        method: impl AsyncFnOnce(SandboxClient, Context) -> ttrpc::Result<T>,
    ) -> Result<T, Refusal> {
        self.node.block_on(method(SandboxClient::new(self.client.clone()), context())).map_err(refusal)
    }

    pub fn create(&self, request: CreateTaskRequest) -> Result<CreateTaskResponse, Refusal> {
        self.call(async |client, context| client.create(context, &request).await)
    }

    /// The raw client, for requests that no generated client would make.
    pub fn request(&self, request: ttrpc::proto::Request) -> Result<ttrpc::proto::Response, Refusal> {
        self.node.block_on(self.client.request(request)).map_err(refusal)
    }
}

/// A call in the tests' namespace, with a time limit.
fn context() -> Context {
    let mut context = ttrpc::context::with_duration(CALL_LIMIT);
    context.add("containerd-namespace-ttrpc".to_string(), NAMESPACE.to_string());
    context
}

/// The same message for a request over ttrpc.
pub fn over_ttrpc(any: prost_types::Any) -> Any {
    Any { type_url: any.type_url, value: any.value, ..Default::default() }
}

fn refusal(error: ttrpc::Error) -> Refusal {
    match error {
        ttrpc::Error::RpcStatus(status) => {
            (status.code.enum_value().unwrap_or(Code::UNKNOWN), status.message)
        }
        other => panic!("not an answer but a broken call: {other:?}"),
    }
}

/// The path of the daemon's socket, from `start`, which also starts the daemon.
pub fn socket() -> String {
    let outcome = start(&Bundle::new("socket"), "socket", &[], &[]);
    assert_eq!(outcome.code, Some(0), "start: {}", outcome.stderr);
    let address = outcome.text();
    address.trim().strip_prefix("unix://").unwrap_or_else(|| panic!("start: {address}")).to_string()
}

/// Runs the binary's `start` as containerd does, with additional environment variables and with input on stdin.
pub fn start(bundle: &Bundle, id: &str, environment: &[(&str, &str)], stdin: &[u8]) -> Outcome {
    with_stdin(action(bundle, id, &[]).arg("start").envs(environment.iter().copied()), stdin)
}

/// Runs the binary's `delete` as containerd does.
pub fn delete(bundle: &Bundle, id: &str) -> Outcome {
    delete_by(bundle, bundle.path(), id)
}

/// As [`delete`], with another path to the bundle.
pub fn delete_by(bundle: &Bundle, path: &str, id: &str) -> Outcome {
    with_stdin(action(bundle, id, &["-bundle", path]).arg("delete"), &[])
}

/// The command that containerd runs in a bundle, with flags and environment, but without the verb.
fn action(bundle: &Bundle, id: &str, more: &[&str]) -> Command {
    let mut command = Command::new(BINARY);
    command
        .args(["-namespace", NAMESPACE, "-address", CONTAINERD_SOCKET])
        .args(["-publish-binary", "/usr/bin/containerd", "-id", id])
        .args(more)
        .current_dir(bundle.path())
        .env("TTRPC_ADDRESS", format!("{CONTAINERD_SOCKET}.ttrpc"))
        .env("GOMAXPROCS", "2");
    command
}

/// Runs a command with these bytes on its stdin, and waits for its end.
pub fn with_stdin(command: &mut Command, stdin: &[u8]) -> Outcome {
    let command = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap_or_else(|error| panic!("run {command:?}: {error}"));
    // A program that does not read its stdin may have ended already.
    let _ = child.stdin.take().expect("stdin is piped").write_all(stdin);
    let output = child.wait_with_output().expect("wait for the binary");
    Outcome {
        code: output.status.code(),
        stdout: output.stdout,
        stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
    }
}

/// systemctl's exit code for a unit that is not loaded.
const NOT_LOADED: i32 = 5;

/// Stops the daemon and its socket, as on a machine where nothing has used the runtime yet.
pub fn stop_daemon() {
    for unit in [DAEMON_SOCKET, DAEMON_SERVICE] {
        // The units may never have been started.
        let stopped = process::run("systemctl", &["stop", unit]);
        assert!(stopped.code == Some(0) || stopped.code == Some(NOT_LOADED), "{unit}: {}", stopped.stderr);
    }
}

/// A test build of the shim, with fault points.
const FAULTS_BINARY: &str = "/usr/local/lib/testbed/containerd-shim-systemd-v1";

/// Where the installed binary is kept during the test, and the temporary name of a copy before its rename.
const KEPT: &str = "/usr/local/bin/containerd-shim-systemd-v1.kept";
const NEW: &str = "/usr/local/bin/containerd-shim-systemd-v1.new";

/// The names of the fault points; empty without a test build.
pub fn points() -> Vec<String> {
    if !Path::new(FAULTS_BINARY).exists() {
        return Vec::new();
    }
    let outcome = process::run(FAULTS_BINARY, &["faults"]);
    let names = outcome.text().lines().map(str::to_string).collect();
    if outcome.code == Some(0) { names } else { Vec::new() }
}

/// Replaces the installed binary with the test build, until it is dropped.
pub struct WithFaults;

impl WithFaults {
    pub fn install() -> WithFaults {
        socket();
        fs::copy(BINARY, KEPT).expect("keep the binary");
        let with_faults = WithFaults;
        fs::copy(FAULTS_BINARY, NEW).expect("copy the test build");
        fs::rename(NEW, BINARY).expect("replace the binary");
        daemon::systemctl("restart");
        wait::until("the test build serves", daemon::serving);
        with_faults
    }
}

impl Drop for WithFaults {
    fn drop(&mut self) {
        // Errors of this clean-up show in the next test.
        let _ = fs::rename(KEPT, BINARY);
        process::run("systemctl", &["restart", DAEMON_SERVICE]);
    }
}

/// A bundle that a test creates itself, for calls that do not come from containerd.
pub struct Bundle {
    scratch: Scratch,
}

impl Bundle {
    pub fn new(name: &str) -> Bundle {
        Bundle::at(Scratch::new(name))
    }

    /// A bundle where a plugin of the containerd with this directory keeps it.
    pub fn of(containerd: &Scratch, plugin: &str, id: &str) -> Bundle {
        let path = containerd.join(plugin).join(NAMESPACE).join(id);
        fs::create_dir_all(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        Bundle::at(Scratch { path })
    }

    fn at(scratch: Scratch) -> Bundle {
        std::fs::create_dir(scratch.join("rootfs")).expect("make a rootfs directory");
        let bundle = Bundle { scratch };
        bundle.write_config(&Spec::sleeping().to_json());
        bundle
    }

    pub fn write_config(&self, bytes: &[u8]) {
        std::fs::write(self.scratch.join("config.json"), bytes).expect("write config.json");
    }

    pub fn remove_config(&self) {
        std::fs::remove_file(self.scratch.join("config.json")).expect("remove config.json");
    }

    pub fn path(&self) -> &str {
        self.scratch.as_str()
    }

    /// The text of a file in the bundle; empty if the file does not exist.
    pub fn read(&self, name: &str) -> String {
        self.scratch.read(name)
    }

    /// A Create request for this bundle.
    pub fn request(&self, id: &str) -> CreateTaskRequest {
        CreateTaskRequest { id: id.to_string(), bundle: self.path().to_string(), ..Default::default() }
    }
}
