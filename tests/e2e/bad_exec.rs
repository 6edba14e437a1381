//! Invalid requests for execs: each gets the right status code and a helpful message, and leaves no exec.

use containerd_shim_protos::api::{ExecProcessRequest, StartRequest, StateRequest};
use containerd_shim_protos::protobuf::well_known_types::any::Any;
use ttrpc::Code;

use crate::common::container::Container;
use crate::common::node::{Node, unique};
use crate::common::shim::{Refusal, Shim};
use crate::common::spec::Spec;
use crate::common::task::Io;

const PROCESS: &str = "types.containerd.io/opencontainers/runtime-spec/1/Process";

fn any(type_url: &str, value: &[u8]) -> Any {
    Any { type_url: type_url.to_string(), value: value.to_vec(), ..Default::default() }
}

/// A valid request, which the tests change.
fn request(container: &Container) -> ExecProcessRequest {
    let process = Spec::sleeping().process_to_any();
    ExecProcessRequest {
        id: container.id.clone(),
        exec_id: unique("bad"),
        spec: Some(any(PROCESS, &process.value)).into(),
        ..Default::default()
    }
}

fn exec(shim: &Shim, request: &ExecProcessRequest) -> Result<(), Refusal> {
    shim.call(async |client, context| client.exec(context, request).await).map(drop)
}

fn start(shim: &Shim, request: &ExecProcessRequest) -> Result<(), Refusal> {
    let (id, exec_id) = (request.id.clone(), request.exec_id.clone());
    let start = StartRequest { id, exec_id, ..Default::default() };
    shim.call(async |client, context| client.start(context, &start).await).map(drop)
}

/// Asserts that the exec does not exist.
fn assert_unknown(shim: &Shim, request: &ExecProcessRequest) {
    let (id, exec_id) = (request.id.clone(), request.exec_id.clone());
    let state = StateRequest { id, exec_id, ..Default::default() };
    let (code, text) =
        shim.call(async |client, context| client.state(context, &state).await).map(drop).expect_err("state");
    assert!([Code::NOT_FOUND, Code::INVALID_ARGUMENT].contains(&code), "{code:?} {text}");
}

#[test]
fn an_exec_id_with_forbidden_characters_is_an_invalid_argument() {
    needs!(OurShim);
    let node = Node::shared();
    let container = node.container("bad", Spec::sleeping()).started(&Io::default());
    let shim = Shim::connect(&node);
    let long = "x".repeat(300);
    // An empty id means the init process.
    for id in ["", "a/b", "..", "../../etc", "/", ".", "a\0b", "-x", "a b", "a:b", ":log", "ü", "a\nb", &long]
    {
        let request = ExecProcessRequest { exec_id: id.to_string(), ..request(&container) };
        let (code, text) = exec(&shim, &request).expect_err(id);
        assert_eq!(code, Code::INVALID_ARGUMENT, "{id:?}: {text}");
    }
    assert_eq!(container.pids().expect("pids"), [container.pid()]);
}

#[test]
fn a_process_that_cant_be_read_is_an_invalid_argument() {
    needs!(OurShim);
    let node = Node::shared();
    let container = node.container("bad", Spec::sleeping()).started(&Io::default());
    let shim = Shim::connect(&node);
    let deep = "[".repeat(1 << 20);
    let cases = [
        ("none", None),
        ("empty", Some(any(PROCESS, b""))),
        ("cut off", Some(any(PROCESS, b"{\"args\": ["))),
        ("a list", Some(any(PROCESS, b"[]"))),
        ("a number", Some(any(PROCESS, b"7"))),
        ("not text", Some(any(PROCESS, &[0xff, 0xfe, 0, 1]))),
        ("deep", Some(any(PROCESS, deep.as_bytes()))),
        ("args of another kind", Some(any(PROCESS, b"{\"args\": 7, \"cwd\": \"/\"}"))),
    ];
    let answers = cases.map(|(what, spec)| {
        let request = ExecProcessRequest { spec: spec.into(), ..request(&container) };
        // Exec has to refuse a spec that can't be read: Start would have nothing to start.
        let refusal = exec(&shim, &request).expect_err(what);
        assert_unknown(&shim, &request);
        (what, refusal)
    });
    let wrong: Vec<_> = answers.iter().filter(|(_, (code, _))| *code != Code::INVALID_ARGUMENT).collect();
    assert_eq!(wrong, Vec::<&(&str, Refusal)>::new());
    exec(&shim, &request(&container)).expect("a good one");
}

#[test]
fn a_process_that_the_runtime_refuses_fails_the_start() {
    needs!(OurShim);
    let node = Node::shared();
    let container = node.container("bad", Spec::sleeping()).started(&Io::default());
    let shim = Shim::connect(&node);
    let cases: [(&str, &[u8]); 3] = [
        ("no args", b"{\"args\": [], \"cwd\": \"/\"}"),
        ("a relative directory", b"{\"args\": [\"true\"], \"cwd\": \"tmp\"}"),
        ("a directory that is not there", b"{\"args\": [\"true\"], \"cwd\": \"/no/such/directory\"}"),
    ];
    for (what, process) in cases {
        let request = ExecProcessRequest { spec: Some(any(PROCESS, process)).into(), ..request(&container) };
        // Exec may refuse it as well.
        let (_code, text) = exec(&shim, &request).and_then(|()| start(&shim, &request)).expect_err(what);
        assert!(!text.is_empty(), "{what}");
    }
    assert_eq!(container.pids().expect("pids"), [container.pid()]);
}

#[test]
fn stdio_that_cant_be_used_is_named() {
    needs!(OurShim);
    let node = Node::shared();
    let container = node.container("bad", Spec::sleeping()).started(&Io::default());
    let shim = Shim::connect(&node);
    for stdout in ["/run", "/no/such/fifo", "strange:///scheme", "binary:///no/such/logger"] {
        for terminal in [false, true] {
            let request = ExecProcessRequest { stdout: stdout.to_string(), terminal, ..request(&container) };
            let refusal = exec(&shim, &request).and_then(|()| start(&shim, &request));
            let (_code, text) = refusal.expect_err(stdout);
            let part = stdout.trim_start_matches("binary://");
            assert!(text.contains(part), "{part} is not in: {text}");
        }
    }
    assert_eq!(container.pids().expect("pids"), [container.pid()]);
}
