//! Many connections outlive the daemon, with frames that are in transit when the daemon ends.

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;

use containerd_shim_protos::api::{ExecProcessRequest, StateRequest, StateResponse};
use containerd_shim_protos::protobuf::Message;
use containerd_shim_protos::protobuf::well_known_types::any::Any;
use nix::sys::resource::{Resource, getrlimit, setrlimit};

use crate::bad_input::{frame, rpc};
use crate::common::daemon;
use crate::common::disturb::Disturbance;
use crate::common::node::{NAMESPACE, Node, number, unique};
use crate::common::shim::{self, Shim};
use crate::common::spec::Spec;
use crate::common::task::Io;
use crate::common::wait;

/// The type of a frame that is a request.
pub const REQUEST: u8 = 1;

/// Length, stream, type and flags.
const HEAD: usize = 10;

#[test]
fn many_connections_outlive_the_daemon() {
    needs!(OurShim);
    let node = Node::exclusive();
    let (_, most) = getrlimit(Resource::RLIMIT_NOFILE).expect("the limit of descriptors");
    setrlimit(Resource::RLIMIT_NOFILE, most, most).expect("raise the limit of descriptors");
    let container = node.container("asked", Spec::sleeping()).started(&Io::default());
    let pid = container.pid();
    let path = shim::socket();
    let ask = |shim: &Shim| -> StateResponse {
        let request = StateRequest { id: container.id.clone(), ..Default::default() };
        shim.call(async |client, context| client.state(context, &request).await).expect("state")
    };
    // Two descriptors of a connection are one entry of the store. Some empty entries stay for later use.
    let before = daemon::stored();
    let count = number("E2E_CONNECTIONS", 200, 100);
    let shims: Vec<Shim> = (0..count).map(|_| Shim::at(&node, &path)).collect();
    shims.iter().for_each(|shim| assert_eq!(ask(shim).pid, pid));
    for disturbance in [Disturbance::Kill, Disturbance::Restart, Disturbance::Kill] {
        disturbance.pass(&node);
        shims.iter().for_each(|shim| assert_eq!(ask(shim).pid, pid, "after a {}", disturbance.name()));
    }
    // They include entries that were empty before.
    assert!(daemon::stored() >= count, "systemd keeps {} descriptors", daemon::stored());
    drop(shims);
    wait::until_true("closed connections are not kept", || daemon::stored() <= before + IDLE);
    assert_eq!(container.exec_sh("exit 6").exit_status(), 6);
}

/// How many empty entries of the descriptor store the daemon keeps (`MAX_IDLE`, `SPARE`).
const IDLE: usize = 64 + 4;

/// A connection of which the test sees every byte.
pub struct Raw(UnixStream);

impl Raw {
    pub fn new() -> Raw {
        let stream = UnixStream::connect(shim::socket()).expect("connect");
        stream.set_read_timeout(Some(wait::LIMIT)).expect("set a limit");
        Raw(stream)
    }

    pub fn send(&mut self, bytes: &[u8]) {
        self.0.write_all(bytes).expect("send");
    }

    /// The next answer and its stream.
    pub fn answer(&mut self) -> (u32, ttrpc::proto::Response) {
        let mut head = [0; HEAD];
        self.0.read_exact(&mut head).expect("the head of an answer");
        let number = |at: usize| u32::from_be_bytes(head[at..at + 4].try_into().expect("four bytes"));
        let mut body = vec![0; number(0) as usize];
        self.0.read_exact(&mut body).expect("the body of an answer");
        (number(4), ttrpc::proto::Response::parse_from_bytes(&body).expect("an answer is a response"))
    }
}

fn request(stream: u32, method: &str, message: &impl Message) -> Vec<u8> {
    let body = rpc("v2", method, NAMESPACE, message.write_to_bytes().expect("encode")).write_to_bytes();
    let body = body.expect("encode a request");
    frame(stream, REQUEST, body.len() as u32, &body)
}

#[test]
fn a_large_request_survives_an_end_in_the_middle_of_it() {
    needs!(OurShim);
    let node = Node::exclusive();
    let container = node.container("large", Spec::sleeping()).started(&Io::default());
    // More than the socket's buffer; a single variable can't have more than 128 KiB.
    let spec = (0..14).fold(Spec::sh("[ ${#LARGE13} = 100000 ] && exit 11"), |spec, number| {
        spec.env(&format!("LARGE{number}={}", "x".repeat(100_000)))
    });
    let mut raw = Raw::new();
    for (stream, cuts) in
        [(1, vec![5]), (3, vec![HEAD]), (5, vec![700_000]), (7, vec![200_000, 400_000, 1_300_000])]
    {
        let id = unique("large");
        let process = spec.process_to_any();
        let message = ExecProcessRequest {
            id: container.id.clone(),
            exec_id: id.clone(),
            spec: Some(Any { type_url: process.type_url, value: process.value, ..Any::default() }).into(),
            ..Default::default()
        };
        let frame = request(stream, "Exec", &message);
        assert!(frame.len() > 1_400_000);
        let mut sent = 0;
        for cut in cuts {
            raw.send(&frame[sent..cut]);
            sent = cut;
            daemon::killed();
        }
        raw.send(&frame[sent..]);
        let (answered, response) = raw.answer();
        assert_eq!((answered, response.status().code), (stream, ttrpc::Code::OK.into()), "{response}");
        let exec = container.process(&id);
        exec.start().expect("start");
        assert_eq!(exec.exit_status(), 11);
        exec.delete().expect("delete");
    }
}

#[test]
fn a_request_that_is_too_long_gets_an_error_and_the_connection_continues() {
    needs!(OurShim);
    let node = Node::exclusive();
    let container = node.container("long", Spec::sleeping()).started(&Io::default());
    let pid = container.pid();
    let state = StateRequest { id: container.id.clone(), ..Default::default() };
    let mut raw = Raw::new();
    let long = frame(0, REQUEST, (4 << 20) + 1, &vec![7; (4 << 20) + 1]);
    for (stream, cuts) in
        [(1, vec![]), (5, vec![HEAD]), (9, vec![3, 100_000]), (13, vec![1_000_000, 4_000_000])]
    {
        let mut long = long.clone();
        long[4..8].copy_from_slice(&u32::to_be_bytes(stream));
        let mut sent = 0;
        for cut in cuts {
            raw.send(&long[sent..cut]);
            sent = cut;
            daemon::killed();
        }
        raw.send(&long[sent..]);
        raw.send(&request(stream + 2, "State", &state));
        let (answered, response) = raw.answer();
        let code = ttrpc::Code::RESOURCE_EXHAUSTED;
        assert_eq!((answered, response.status().code), (stream, code.into()), "{response}");
        let (answered, response) = raw.answer();
        assert_eq!(answered, stream + 2);
        assert_eq!(StateResponse::parse_from_bytes(&response.payload).expect("a state").pid, pid);
    }
}

#[test]
fn responses_that_the_client_reads_late_come_whole_and_once() {
    needs!(OurShim);
    let node = Node::exclusive();
    let container = node.container("answers", Spec::sleeping()).started(&Io::default());
    let pid = container.pid();
    let mut raw = Raw::new();
    let state = StateRequest { id: container.id.clone(), ..Default::default() };
    // Together they exceed the socket's buffer: some wait in the daemon, and one is sent in part.
    let streams: Vec<u32> = (0..2000).map(|number| 2 * number + 1).collect();
    let mut writer = raw.0.try_clone().expect("one more end of the connection");
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for stream in &streams {
                writer.write_all(&request(*stream, "State", &state)).expect("send");
            }
        });
        let mut answers: BTreeMap<u32, u32> = BTreeMap::new();
        for number in 0..streams.len() {
            if number % 100 == 0 {
                daemon::killed();
            }
            let (stream, response) = raw.answer();
            assert_eq!(response.status().code, ttrpc::Code::OK.into(), "{response}");
            let told = StateResponse::parse_from_bytes(&response.payload).expect("a state");
            assert_eq!((told.pid, told.id.as_str()), (pid, container.id.as_str()));
            *answers.entry(stream).or_default() += 1;
        }
        assert!(answers.keys().eq(&streams) && answers.values().all(|count| *count == 1));
    });
}
