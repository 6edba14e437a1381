//! Invalid requests: each gets the right status code and a helpful message, and changes nothing. The daemon continues to
//! serve.

use std::fs;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use containerd_shim_protos::api::{
    ConnectRequest, DeleteRequest, KillRequest, PidsRequest, ShutdownRequest, StartRequest, StateRequest,
    WaitRequest,
};
use containerd_shim_protos::protobuf::Message;
use nix::fcntl::{OFlag, openat};
use nix::sys::stat::{Mode, mkdirat};
use nix::unistd::{UnlinkatFlags, mkfifo, unlinkat};
use ttrpc::Code;

use crate::common::leaks::{self, Traces};
use crate::common::node::{NAMESPACE, Node, unique};
use crate::common::shim::{self, Bundle, Refusal, Shim};
use crate::common::spec::Spec;
use crate::common::stdio::Scratch;
use crate::common::task::Io;
use crate::common::{cgroup, daemon, process};
use crate::runtime_options::GenericOptions;

/// Asserts that the daemon answers, and that it has no such task.
fn assert_serves(shim: &Shim) {
    let (code, text) = state(shim, "nobody").expect_err("state of nobody");
    assert_eq!(code, Code::NOT_FOUND, "{text}");
}

fn state(shim: &Shim, id: &str) -> Result<(), Refusal> {
    let request = StateRequest { id: id.to_string(), ..Default::default() };
    shim.call(async |client, context| client.state(context, &request).await).map(drop)
}

#[test]
fn an_id_with_forbidden_characters_is_an_invalid_argument() {
    needs!(OurShim);
    let node = Node::exclusive();
    let shim = Shim::connect(&node);
    let before = Traces::take();
    let long = "x".repeat(300);
    let bundle = Bundle::new("id");
    for id in ["", "a/b", "..", "../../etc", "/", ".", "a\0b", "-x", "a b", "a:b", "ü", "a\nb", &long] {
        let (code, text) = shim.create(bundle.request(id)).expect_err(id);
        assert_eq!(code, Code::INVALID_ARGUMENT, "{id:?}: {text}");
    }
    assert_serves(&shim);
    leaks::assert_none("ids that are no names", &before);
}

#[test]
fn a_namespace_with_forbidden_characters_is_an_invalid_argument() {
    needs!(OurShim);
    let node = Node::shared();
    let shim = Shim::connect(&node);
    let id = unique("namespace");
    for namespace in ["", "../x", "a/b", "a\0b", &"x".repeat(300)] {
        let bundle = Bundle::new("namespace");
        let payload = bundle.request(&id).write_to_bytes().expect("encode a Create");
        let (code, text) = shim.request(rpc("v3", "Create", namespace, payload)).expect_err(namespace);
        assert_eq!(code, Code::INVALID_ARGUMENT, "{namespace:?}: {text}");
    }
    assert_serves(&shim);
}

#[test]
fn a_bundle_with_a_fifo_or_device_as_a_file_is_refused_at_once() {
    needs!(OurShim);
    let node = Node::shared();
    let shim = Shim::connect(&node);
    // A read of a FIFO or of a device would never end.
    type Make = fn(&Path);
    let no_files: [(&str, Make); 3] = [
        ("a FIFO", |path| mkfifo(path, Mode::S_IRWXU).expect("make a FIFO")),
        ("a link to a device", |path| symlink("/dev/zero", path).expect("make a symlink")),
        ("a directory", |path| fs::create_dir(path).expect("make a directory")),
    ];
    for name in ["config.json", "containerd-shim-systemd.json"] {
        for (what, make) in no_files {
            let bundle = Bundle::new("odd");
            let path = Path::new(bundle.path()).join(name);
            let _ = fs::remove_file(&path);
            make(&path);
            let (_, text) = shim.create(bundle.request(&unique("odd"))).expect_err(what);
            assert!(text.contains(name) && text.contains("not a regular file"), "{what}: {text}");
        }
    }
    assert_serves(&shim);
}

#[test]
fn a_fifo_or_device_as_the_options_file_is_refused_at_once() {
    needs!(OurShim);
    let node = Node::shared();
    let scratch = Scratch::new("options");
    let fifo = scratch.join("fifo");
    mkfifo(&fifo, Mode::S_IRWXU).expect("make a FIFO");
    for path in [fifo.as_path(), Path::new("/dev/zero")] {
        let path = path.display().to_string();
        let options = GenericOptions { config_path: path.clone(), ..Default::default() }.to_any();
        let container = node.container("options", Spec::sleeping()).options(options).make();
        let refusal = container.create(&Io::default()).expect_err(&path);
        assert!(refusal.message().contains(&path), "{refusal}");
    }
}

#[test]
fn files_of_a_bundle_with_the_names_of_the_shims_own_files_are_replaced() {
    needs!(OurShim);
    let node = Node::shared();
    let shim = Shim::connect(&node);
    let bundle = Bundle::new("in-the-way");
    let in_the_way = Path::new(bundle.path()).join(".config.json.new");
    mkfifo(&in_the_way, Mode::S_IRWXU).expect("make a FIFO");
    // The rootfs is empty, so the OCI runtime fails when it looks for the program.
    let (_, text) = shim.create(bundle.request(&unique("in-the-way"))).expect_err("an empty rootfs");
    assert!(text.contains("/bin/sleep"), "{text}");
    assert!(!in_the_way.exists());
}

#[test]
fn a_bundle_that_cant_be_used_is_named() {
    needs!(OurShim);
    let node = Node::shared();
    let shim = Shim::connect(&node);

    let bundle = Bundle::new("gone");
    let mut request = bundle.request(&unique("gone"));
    request.bundle = "/no/such/bundle".to_string();
    refused(&shim, request, &[Code::INVALID_ARGUMENT, Code::NOT_FOUND], "/no/such/bundle");

    let bundle = Bundle::new("relative");
    let mut request = bundle.request(&unique("relative"));
    request.bundle = "relative".to_string();
    refused(&shim, request, &[Code::INVALID_ARGUMENT, Code::NOT_FOUND], "relative");

    let bundle = Bundle::new("no-config");
    bundle.remove_config();
    refused(
        &shim,
        bundle.request(&unique("no-config")),
        &[Code::INVALID_ARGUMENT, Code::NOT_FOUND],
        "config.json",
    );

    let huge = format!("{{\"ociVersion\": \"1.1.0\", \"hostname\": \"{}\"}}", "x".repeat(20 << 20));
    let deep = "[".repeat(1 << 20);
    let cases: [(&str, &[u8]); 6] = [
        ("broken", b"{\"ociVersion\": "),
        ("empty", b""),
        ("a list", b"[]"),
        ("not text", &[0xff, 0xfe, 0, 1]),
        ("huge", huge.as_bytes()),
        ("deep", deep.as_bytes()),
    ];
    let answers = cases.map(|(what, config)| {
        let bundle = Bundle::new("config");
        bundle.write_config(config);
        let (code, text) = shim.create(bundle.request(&unique("config"))).expect_err(what);
        (what, code, text)
    });
    let wrong = answers
        .iter()
        .filter(|(_, code, text)| *code != Code::INVALID_ARGUMENT || !text.contains("config.json"));
    assert_eq!(wrong.collect::<Vec<_>>(), Vec::<&(&str, Code, String)>::new());
    assert_serves(&shim);
}

#[test]
fn a_malformed_cgroups_path_is_an_invalid_argument() {
    needs!(OurShim);
    let node = Node::shared();
    let shim = Shim::connect(&node);
    for path in ["a:b", "a:b:c:d", "not-a-slice:prefix:id"] {
        let bundle = Bundle::new("cgroup");
        bundle.write_config(&Spec::sleeping().cgroups_path(path).to_json());
        refused(&shim, bundle.request(&unique("cgroup")), &[Code::INVALID_ARGUMENT], path);
    }
}

#[test]
fn stdio_that_cant_be_used_is_named() {
    needs!(OurShim);
    let node = Node::shared();
    let shim = Shim::connect(&node);
    for stdout in ["/run", "/no/such/fifo", "strange:///scheme", "binary:///no/such/logger"] {
        let bundle = Bundle::new("stdio");
        let mut request = bundle.request(&unique("stdio"));
        request.stdout = stdout.to_string();
        let (_code, text) = shim.create(request).expect_err(stdout);
        let part = stdout.trim_start_matches("binary://");
        assert!(text.contains(part), "{part} is not in: {text}");
    }
    assert_serves(&shim);
}

#[test]
fn a_second_create_of_a_live_id_already_exists() {
    needs!(OurShim);
    let node = Node::shared();
    let container = node.container("twice", Spec::sleeping()).started(&Io::default());
    let shim = Shim::connect(&node);
    let bundle = Bundle::new("twice");
    let (code, text) = shim.create(bundle.request(&container.id)).expect_err("create again");
    assert_eq!(code, Code::ALREADY_EXISTS, "{text}");
    assert_eq!(container.pids().expect("pids"), [container.pid()], "the live one is as before");
}

#[test]
fn calls_for_unknown_ids_are_not_found() {
    needs!(OurShim);
    let node = Node::shared();
    let shim = Shim::connect(&node);
    let id = unique("unknown");
    let start = StartRequest { id: id.clone(), ..Default::default() };
    let delete = DeleteRequest { id: id.clone(), ..Default::default() };
    let kill = KillRequest { id: id.clone(), signal: 9, ..Default::default() };
    let pids = PidsRequest { id: id.clone(), ..Default::default() };
    let wait = WaitRequest { id: id.clone(), ..Default::default() };
    let refusals = [
        ("State", state(&shim, &id)),
        ("Start", shim.call(async |client, context| client.start(context, &start).await).map(drop)),
        ("Delete", shim.call(async |client, context| client.delete(context, &delete).await).map(drop)),
        ("Kill", shim.call(async |client, context| client.kill(context, &kill).await).map(drop)),
        ("Pids", shim.call(async |client, context| client.pids(context, &pids).await).map(drop)),
        ("Wait", shim.call(async |client, context| client.wait(context, &wait).await).map(drop)),
    ];
    for (call, refusal) in refusals {
        let (code, text) = refusal.expect_err(call);
        assert_eq!(code, Code::NOT_FOUND, "{call}: {text}");
    }
    // These two never fail: containerd also calls them before a task exists and after its end.
    let connect = ConnectRequest { id: id.clone(), ..Default::default() };
    let connected =
        shim.call(async |client, context| client.connect(context, &connect).await).expect("Connect");
    assert_eq!(connected.task_pid, 0);
    let shutdown = ShutdownRequest { id, ..Default::default() };
    shim.call(async |client, context| client.shutdown(context, &shutdown).await).expect("Shutdown");
}

#[test]
fn both_versions_of_the_task_api_are_served() {
    needs!(OurShim);
    let node = Node::shared();
    let container = node.container("versions", Spec::sleeping()).started(&Io::default());
    let shim = Shim::connect(&node);
    for version in ["v2", "v3"] {
        let payload = StateRequest { id: container.id.clone(), ..Default::default() }.write_to_bytes();
        let request = rpc(version, "State", NAMESPACE, payload.expect("encode a State"));
        let answer = shim.request(request).unwrap_or_else(|refusal| panic!("{version}: {refusal:?}"));
        let state =
            containerd_shim_protos::api::StateResponse::parse_from_bytes(&answer.payload).expect("a State");
        assert_eq!(state.pid, container.pid(), "{version}");
    }
    let (code, _) = shim.request(rpc("v3", "Frobnicate", NAMESPACE, Vec::new())).expect_err("no such method");
    assert!([Code::UNIMPLEMENTED, Code::NOT_FOUND].contains(&code), "{code:?}");
    let (code, _) =
        shim.request(rpc("v3", "State", NAMESPACE, vec![0xff; 10])).expect_err("no State request");
    assert!([Code::INVALID_ARGUMENT, Code::UNKNOWN, Code::INTERNAL].contains(&code), "{code:?}");
    assert_serves(&shim);
}

#[test]
fn garbage_on_the_socket_harms_nobody_else() {
    needs!(OurShim);
    let node = Node::shared();
    let bystander = Shim::connect(&node);
    assert_serves(&bystander);
    let socket = shim::socket();
    let garbage: Vec<u8> =
        (0..100_000_u32).map(|number| (number.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    let half = frame(1, 1, 100, b"half a frame");
    let oversized = frame(1, 1, 100 << 20, &[0; 1 << 16]);
    let strange_type = frame(1, 77, 4, b"abcd");
    let no_request = frame(1, 1, 4, &[0xff; 4]);
    for bytes in [&garbage, &half, &oversized, &strange_type, &no_request, &Vec::new()] {
        let mut stream = UnixStream::connect(&socket).expect("connect");
        stream.set_read_timeout(Some(Duration::from_millis(300))).expect("limit reads");
        // The daemon may close the connection during the write, or wait for the rest. Both are correct.
        let _ = stream.write_all(bytes);
        let _ = stream.read(&mut [0; 4096]);
        drop(stream);
        assert_serves(&bystander);
        assert_serves(&Shim::connect(&node));
    }
}

#[test]
fn many_idle_connections_harm_nobody() {
    needs!(OurShim);
    let node = Node::shared();
    let socket = shim::socket();
    let idle: Vec<_> = (0..200).map(|_| UnixStream::connect(&socket).expect("connect")).collect();
    assert_serves(&Shim::connect(&node));
    drop(idle);
}

#[test]
fn another_user_is_refused() {
    needs!(OurShim);
    let node = Node::exclusive();
    let shim = Shim::connect(&node);
    let socket = shim::socket();
    let path = Path::new(&socket);
    let _open = [Opened::new(path.parent().expect("a directory"), 0o755), Opened::new(path, 0o666)];
    let payload = StateRequest { id: "nobody".to_string(), ..Default::default() }.write_to_bytes();
    let request = rpc("v3", "State", NAMESPACE, payload.expect("encode a State"));
    let body = request.write_to_bytes().expect("encode a request");
    let hex: String =
        frame(1, 1, body.len() as u32, &body).iter().map(|byte| format!("{byte:02x}")).collect();
    // Returns the response to a valid request.
    let client = "use IO::Socket::UNIX; $SIG{PIPE} = 'IGNORE'; \
        my $s = IO::Socket::UNIX->new(Peer => $ARGV[0]) or do { print 'no connection'; exit }; \
        syswrite $s, pack('H*', $ARGV[1]); print sysread($s, my $b, 4096) ? 'answered' : 'closed'";
    let as_root = process::succeed("perl", &["-e", client, &socket, &hex]);
    assert_eq!(as_root, "answered");
    let other = ["--reuid=1000", "--regid=1000", "--clear-groups", "perl", "-e", client, &socket, &hex];
    assert_eq!(process::succeed("setpriv", &other), "closed");
    assert_serves(&shim);
}

/// A path with another mode, until it is dropped.
struct Opened<'p> {
    path: &'p Path,
    mode: u32,
}

impl<'p> Opened<'p> {
    fn new(path: &'p Path, mode: u32) -> Opened<'p> {
        let before = fs::metadata(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).expect("open a path to all");
        Opened { path, mode: before.permissions().mode() }
    }
}

impl Drop for Opened<'_> {
    fn drop(&mut self) {
        let _ = fs::set_permissions(self.path, fs::Permissions::from_mode(self.mode)); // the mode was there before
    }
}

fn refused(
    shim: &Shim,
    request: containerd_shim_protos::api::CreateTaskRequest,
    codes: &[Code],
    named: &str,
) {
    let (code, text) = shim.create(request).expect_err(named);
    assert!(codes.contains(&code), "{named}: {code:?} {text}");
    assert!(text.contains(named), "{named} is not in: {text}");
}

/// A request of the Task service, encoded by the test.
pub fn rpc(version: &str, method: &str, namespace: &str, payload: Vec<u8>) -> ttrpc::proto::Request {
    let mut pair = ttrpc::proto::KeyValue::new();
    pair.key = "containerd-namespace-ttrpc".to_string();
    pair.value = namespace.to_string();
    let mut request = ttrpc::proto::Request::new();
    request.service = format!("containerd.task.{version}.Task");
    request.method = method.to_string();
    request.timeout_nano = 10_000_000_000;
    request.metadata = vec![pair];
    request.payload = payload;
    request
}

/// A ttrpc frame: length, stream, type (1 is a request), flags, and a body that may not have that length.
pub fn frame(stream: u32, kind: u8, length: u32, body: &[u8]) -> Vec<u8> {
    let mut frame = Vec::new();
    frame.extend(length.to_be_bytes());
    frame.extend(stream.to_be_bytes());
    frame.extend([kind, 0]);
    frame.extend(body);
    frame
}

/// Nested cgroups, as a container with a writable cgroup can make them. They are removed on drop. Each is opened
/// relative to its parent, because the path of the innermost one is longer than the kernel allows.
struct Nested {
    innermost: OwnedFd,
    depth: usize,
}

impl Nested {
    const NAME: &str = "deeper";

    fn new(top: &Path, depth: usize) -> Nested {
        let top = fs::File::open(top).expect("open a cgroup");
        let mut nested = Nested { innermost: top.into(), depth: 0 };
        while nested.depth < depth {
            mkdirat(&nested.innermost, Self::NAME, Mode::S_IRWXU).expect("make a cgroup");
            nested.innermost = open_below(&nested.innermost, Self::NAME);
            nested.depth += 1;
        }
        nested
    }
}

fn open_below(at: &OwnedFd, name: &str) -> OwnedFd {
    openat(at, name, OFlag::O_DIRECTORY, Mode::empty()).expect("open a cgroup")
}

impl Drop for Nested {
    fn drop(&mut self) {
        for _ in 0..self.depth {
            self.innermost = open_below(&self.innermost, "..");
            unlinkat(&self.innermost, Self::NAME, UnlinkatFlags::RemoveDir).expect("remove a cgroup");
        }
    }
}

#[test]
fn deeply_nested_cgroups_of_a_container_do_no_harm() {
    needs!(OurShim);
    let node = Node::exclusive();
    // The cgroups of a container in its unit have limits.
    let path = format!("/{}", unique("nested"));
    let container = node.container("nested", Spec::sleeping().cgroups_path(&path)).started(&Io::default());
    let nested = Nested::new(&cgroup::of(container.pid()), 2200);
    let restarts = daemon::restarts();
    assert_eq!(container.pids().expect("pids"), [container.pid()]);
    container.kill_all(nix::libc::SIGWINCH as u32).expect("a signal to all");
    assert_eq!(daemon::restarts(), restarts);
    drop(nested);
    container.end();
}
