//! Requests around the largest size of a ttrpc message (4 MiB).

use containerd_shim_protos::api::{StateRequest, StateResponse};
use containerd_shim_protos::protobuf::Message;

use crate::bad_input::{frame, rpc};
use crate::common::daemon;
use crate::common::node::{NAMESPACE, Node, unique};
use crate::common::spec::Spec;
use crate::common::task::Io;
use crate::crash_connections::{REQUEST, Raw};

const LARGEST: usize = 4 << 20;

/// Every method of the Task API. The first field of each request is the id of the task.
const METHODS: [&str; 17] = [
    "State",
    "Create",
    "Start",
    "Delete",
    "Pids",
    "Pause",
    "Resume",
    "Checkpoint",
    "Kill",
    "Exec",
    "ResizePty",
    "CloseIO",
    "Update",
    "Wait",
    "Stats",
    "Connect",
    "Shutdown",
];

/// A request about a task, with an unknown field as padding, so that the frame's body has this size.
fn of_size(stream: u32, method: &str, id: &str, size: usize) -> Vec<u8> {
    let message = StateRequest { id: id.to_string(), ..Default::default() }.write_to_bytes().expect("encode");
    let body = |padding: usize| {
        let mut message = message.clone();
        // Field 100, with a length before its bytes.
        message.extend([0xa2, 0x06]);
        let mut rest = padding;
        while rest > 0x7f {
            message.push((rest & 0x7f) as u8 | 0x80);
            rest >>= 7;
        }
        message.push(rest as u8);
        message.resize(message.len() + padding, b'x');
        rpc("v2", method, NAMESPACE, message).write_to_bytes().expect("encode a request")
    };
    // The lengths take equally many bytes for both paddings.
    let rough = size - 1024;
    let body = body(rough + size - body(rough).len());
    assert_eq!(body.len(), size);
    frame(stream, REQUEST, body.len() as u32, &body)
}

#[test]
fn every_request_up_to_the_largest_size_is_served_and_the_next_larger_one_refused() {
    needs!(OurShim);
    let node = Node::exclusive();
    let container = node.container("sizes", Spec::sleeping()).started(&Io::default());
    let pid = container.pid();
    let mut raw = Raw::new();
    let mut streams = (1..).step_by(2);
    let unknown = unique("unknown");
    for method in METHODS {
        let mut code = |size: usize| {
            let stream = streams.next().expect("a stream");
            raw.send(&of_size(stream, method, &unknown, size));
            let (answered, response) = raw.answer();
            assert_eq!(answered, stream, "{method}");
            response.status().code
        };
        let usual = code(100_000);
        assert_ne!(usual, ttrpc::Code::RESOURCE_EXHAUSTED.into(), "{method}");
        for (size, expected) in [
            (LARGEST - 1, usual),
            (LARGEST, usual),
            (LARGEST + 1, ttrpc::Code::RESOURCE_EXHAUSTED.into()),
            (100_000, usual),
        ] {
            assert_eq!(code(size), expected, "{method} of {size} bytes");
        }
    }
    let stream = streams.next().expect("a stream");
    raw.send(&of_size(stream, "State", &container.id, LARGEST));
    let (_, response) = raw.answer();
    let state = StateResponse::parse_from_bytes(&response.payload).expect("a state");
    assert_eq!(state.pid, pid);
}

#[test]
fn a_request_of_the_largest_size_outlives_the_daemon() {
    needs!(OurShim);
    let node = Node::exclusive();
    let container = node.container("largest", Spec::sleeping()).started(&Io::default());
    let mut raw = Raw::new();
    for (number, size) in [LARGEST - 30, LARGEST - 1, LARGEST].into_iter().enumerate() {
        let stream = 2 * number as u32 + 1;
        // Wait is still unanswered when the daemon ends.
        raw.send(&of_size(stream, "Wait", &container.id, size));
        raw.send(&of_size(stream + 100, "State", &container.id, 2000));
        assert_eq!(raw.answer().0, stream + 100, "all of the first request has been read");
        daemon::killed();
    }
    container.kill(9).expect("kill");
    for _ in 0..3 {
        let (stream, response) = raw.answer();
        assert_eq!(response.status().code, ttrpc::Code::OK.into(), "stream {stream}: {response}");
    }
}

#[test]
fn a_request_of_millions_of_parts_is_refused_and_crashes_no_daemon() {
    needs!(OurShim);
    let node = Node::exclusive();
    let container = node.container("parts", Spec::sleeping()).started(&Io::default());
    let wait = rpc(
        "v2",
        "Wait",
        NAMESPACE,
        StateRequest { id: container.id.clone(), ..Default::default() }.write_to_bytes().expect("encode"),
    );
    let mut body = wait.write_to_bytes().expect("encode a request");
    // Entries of metadata without content: ttrpc would need some 180 MB for each request until the container ends.
    let entries = (LARGEST - body.len()) / 2;
    body.extend([0x2a, 0].repeat(entries));
    let mut raw = Raw::new();
    for stream in (1..).step_by(2).take(20) {
        raw.send(&frame(stream, REQUEST, body.len() as u32, &body));
        let (answered, response) = raw.answer();
        assert_eq!((answered, response.status().code), (stream, ttrpc::Code::RESOURCE_EXHAUSTED.into()));
    }
    raw.send(&of_size(101, "State", &container.id, 2000));
    let (_, response) = raw.answer();
    assert_eq!(response.status().code, ttrpc::Code::OK.into(), "{response}");
}
