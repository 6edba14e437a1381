//! Calls that no client of today makes: bytes that are no message, messages of other kinds, and numbers at their limits. Each gets
//! an answer, and nothing else is affected.

use containerd_shim_protos::api::{
    CheckpointTaskRequest, CloseIORequest, CreateTaskRequest, DeleteRequest, ExecProcessRequest, KillRequest,
    ResizePtyRequest, StartRequest, StateRequest, UpdateTaskRequest, WaitRequest,
};
use containerd_shim_protos::protobuf::well_known_types::any::Any;
use serde_json::json;
use ttrpc::Code;

use crate::bad_input::rpc;
use crate::common::bystander::Bystander;
use crate::common::container::Container;
use crate::common::node::{NAMESPACE, Node, unique};
use crate::common::shim::{Bundle, Refusal, Shim};
use crate::common::spec::Spec;
use crate::common::task::Io;

const TASK_METHODS: [&str; 16] = [
    "Create",
    "Start",
    "Delete",
    "Exec",
    "ResizePty",
    "State",
    "Pids",
    "Pause",
    "Resume",
    "Kill",
    "CloseIO",
    "Checkpoint",
    "Update",
    "Wait",
    "Stats",
    "Connect",
];

const SANDBOX_METHODS: [&str; 9] = [
    "CreateSandbox",
    "StartSandbox",
    "Platform",
    "StopSandbox",
    "WaitSandbox",
    "SandboxStatus",
    "PingSandbox",
    "ShutdownSandbox",
    "SandboxMetrics",
];

fn any(type_url: &str, value: &[u8]) -> Any {
    Any { type_url: type_url.to_string(), value: value.to_vec(), ..Default::default() }
}

/// Bytes that are no message, or another one.
fn payloads() -> Vec<Vec<u8>> {
    // A field of bytes: number, kind, length, content.
    let text = |field: u8, text: &[u8]| {
        let mut bytes = vec![field << 3 | 2, u8::try_from(text.len()).unwrap_or(127)];
        bytes.extend(text);
        bytes
    };
    // Groups inside of groups, which no longer exist, and messages inside of messages.
    let nested = (0..60_000_u32).fold(Vec::new(), |mut bytes, _| {
        bytes.push(0x0b);
        bytes
    });
    vec![
        Vec::new(),
        vec![0xff; 64],
        vec![0x0a, 0xff, 0xff, 0xff, 0xff, 0x0f],
        vec![0x0a, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x01],
        vec![0x08; 1000],
        nested,
        text(1, &[0xff, 0xfe]),
        text(1, b"../../etc"),
        [text(1, b"a"), text(1, b"b"), text(2, &[0xc3, 0x28])].concat(),
        [text(1, b"none"), vec![0x18, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x01]].concat(),
        [text(1, b"none"), text(15, &[0; 120])].concat().repeat(5000),
    ]
}

#[test]
fn bytes_that_are_no_message_get_an_error() {
    needs!(OurShim);
    let node = Node::exclusive();
    let bystander = Bystander::new(&node);
    let shim = Shim::connect(&node);
    let services = TASK_METHODS.iter().map(|method| ("containerd.task.v3.Task", *method));
    let services = services
        .chain(SANDBOX_METHODS.iter().map(|method| ("containerd.runtime.sandbox.v1.Sandbox", *method)));
    let others = [
        ("containerd.task.v9.Task", "Create"),
        ("", ""),
        ("containerd.task.v3.Task", "No\nSuch"),
        ("a/b", "../c"),
    ];
    for (service, method) in services.chain(others) {
        for payload in payloads() {
            let begun = format!("{service}/{method} {:?}", &payload[..payload.len().min(12)]);
            let mut request = rpc("v3", method, NAMESPACE, payload);
            request.service = service.to_string();
            match shim.request(request) {
                Ok(answer) => {
                    let code = answer
                        .status
                        .as_ref()
                        .map(|status| status.code.enum_value().unwrap_or(Code::UNKNOWN));
                    // What can be answered without a task.
                    let is_known =
                        ["Connect", "Platform", "PingSandbox", "ShutdownSandbox"].contains(&method);
                    assert!(is_known || code.is_some_and(|code| code != Code::OK), "{begun}: {answer:?}");
                }
                Err((code, text)) => {
                    assert!(
                        code != Code::OK && text.len() < 20_000,
                        "{begun}: {code:?} {} bytes",
                        text.len()
                    );
                }
            }
        }
    }
    drop(shim);
    bystander.assert_all_untouched("bytes that are no message");
}

/// Each kind of content that a field for any message can have, except the one that is expected.
fn anys() -> Vec<Any> {
    const SPEC: &str = "types.containerd.io/opencontainers/runtime-spec/1/Process";
    const RESOURCES: &str = "types.containerd.io/opencontainers/runtime-spec/1/LinuxResources";
    let huge = vec![b'x'; 3 << 20];
    let toml = |body: &str| {
        let mut value = vec![0x1a, u8::try_from(body.len()).expect("a short body")];
        value.extend(body.as_bytes());
        any("runtimeoptions.v1.Options", &value)
    };
    let kinds = [
        "",
        "a",
        "runtimeoptions.v1.Options",
        "containerd.runc.v1.Options",
        "containerd.runc.v1.CheckpointOptions",
        "containerd.linux.runc.CreateOptions",
        SPEC,
        RESOURCES,
        "type.googleapis.com/google.protobuf.Any",
        "../\n\0",
    ];
    let contents: [&[u8]; 6] = [b"", b"{}", b"[]", &[0xff; 16], b"{\"a\":", &huge];
    let mixed = kinds.iter().flat_map(|kind| contents.iter().map(|content| any(kind, content)));
    let bodies = [
        "x",
        "[[",
        "BinaryName = 7",
        "BinaryName = \"a/b\"",
        "RuntimeTimeoutSec = -1",
        "Log = \"x\"",
        "Properties = 3",
        "Root = \"..\"",
        "\0",
        "a.b.c.d.e = {}",
    ];
    mixed.chain(bodies.iter().map(|body| toml(body))).chain([any(&"t".repeat(1 << 20), b"")]).collect()
}

fn call<T>(what: &str, answer: Result<T, Refusal>) -> bool {
    match answer {
        Ok(_) => {
            println!("{what}: done");
            true
        }
        Err((code, text)) => {
            println!("{what}: {code:?} {}", text.chars().take(160).collect::<String>());
            assert!(text.len() < 20_000, "{what}: {} bytes", text.len());
            false
        }
    }
}

fn begun(any: &Any) -> String {
    let content: String = String::from_utf8_lossy(&any.value).chars().take(20).collect();
    format!("{:.60?} {content:?}", any.type_url)
}

#[test]
fn a_message_of_another_kind_is_refused_or_ignored() {
    needs!(OurShim);
    let node = Node::exclusive();
    let bystander = Bystander::new(&node);
    let container = node.container("anys", Spec::sleeping()).started(&Io::default());
    let shim = Shim::connect(&node);
    let id = container.id.clone();
    for content in anys() {
        let what = begun(&content);
        let bundle = Bundle::new("anys");
        // Its rootfs is empty: it is never created.
        let create =
            CreateTaskRequest { options: Some(content.clone()).into(), ..bundle.request(&unique("anys")) };
        assert!(!call(&format!("Create {what}"), shim.create(create)));
        let exec_id = unique("anys");
        let exec = ExecProcessRequest {
            id: id.clone(),
            exec_id: exec_id.clone(),
            spec: Some(content.clone()).into(),
            ..Default::default()
        };
        if call(&format!("Exec {what}"), shim.call(async |client, context| client.exec(context, &exec).await))
        {
            let start = StartRequest { id: id.clone(), exec_id: exec_id.clone(), ..Default::default() };
            call("  Start", shim.call(async |client, context| client.start(context, &start).await));
            let delete = DeleteRequest { id: id.clone(), exec_id, ..Default::default() };
            shim.call(async |client, context| client.delete(context, &delete).await).expect("delete");
        }
        let update = UpdateTaskRequest {
            id: id.clone(),
            resources: Some(content.clone()).into(),
            ..Default::default()
        };
        call(
            &format!("Update {what}"),
            shim.call(async |client, context| client.update(context, &update).await),
        );
        let checkpoint = CheckpointTaskRequest {
            id: id.clone(),
            path: "/run/e2e-none/../x\n".to_string(),
            options: Some(content).into(),
            ..Default::default()
        };
        assert!(!call(
            &format!("Checkpoint {what}"),
            shim.call(async |client, context| client.checkpoint(context, &checkpoint).await)
        ));
    }
    assert_eq!(container.exec_sh("exit 5").exit_status(), 5);
    container.end();
    drop((shim, container));
    bystander.assert_all_untouched("messages of another kind");
}

/// A process by its ids: init, an exec that runs, one that has ended, one that is deleted, one that never was, and odd ids.
fn processes(container: &Container, names: [&str; 3]) -> Vec<(String, String)> {
    let of = |exec: &str| (container.id.clone(), exec.to_string());
    let mut all = vec![of("")];
    all.extend(names.map(of));
    all.extend([of("none"), of("../x"), of(&"x".repeat(76)), of(&"x".repeat(5000)), of("a\0"), of("a:b")]);
    all.extend([
        ("none".to_string(), String::new()),
        (String::new(), String::new()),
        (String::new(), "none".to_string()),
    ]);
    all
}

#[test]
fn numbers_at_their_limits_and_processes_that_are_gone_get_an_answer() {
    needs!(OurShim);
    let node = Node::exclusive();
    let bystander = Bystander::new(&node);
    // Ignores every signal that can be ignored.
    let ignoring =
        "i=1; while [ $i -le 64 ]; do trap '' $i 2>/dev/null; i=$((i+1)); done; while :; do sleep 1000; done";
    let container = node.container("numbers", Spec::sh(ignoring)).started(&Io::default());
    let running = container.exec(Spec::sh(ignoring)).started(&Io::default());
    let ended = container.exec_sh("exit 0");
    ended.wait().expect("wait");
    let deleted = container.exec_sh("exit 0");
    deleted.wait().expect("wait");
    deleted.delete().expect("delete");
    let shim = Shim::connect(&node);
    for (id, exec_id) in processes(&container, [&running.id, &ended.id, &deleted.id]) {
        let what = format!("{id:.12?} {exec_id:.12?}");
        for signal in [0, 33, 34, 64, 65, 1000, 1 << 31, u32::MAX, u32::MAX - 8] {
            for all in [false, true] {
                let kill = KillRequest {
                    id: id.clone(),
                    exec_id: exec_id.clone(),
                    signal,
                    all,
                    ..Default::default()
                };
                call(
                    &format!("Kill {what} {signal} {all}"),
                    shim.call(async |client, context| client.kill(context, &kill).await),
                );
            }
        }
        for size in [0, 1, 65_535, 65_536, u32::MAX] {
            let resize = ResizePtyRequest {
                id: id.clone(),
                exec_id: exec_id.clone(),
                width: size,
                height: u32::MAX - size,
                ..Default::default()
            };
            call(
                &format!("Resize {what} {size}"),
                shim.call(async |client, context| client.resize_pty(context, &resize).await),
            );
        }
        for stdin in [true, false, true] {
            let close =
                CloseIORequest { id: id.clone(), exec_id: exec_id.clone(), stdin, ..Default::default() };
            call(
                &format!("CloseIO {what} {stdin}"),
                shim.call(async |client, context| client.close_io(context, &close).await),
            );
        }
        let state = StateRequest { id: id.clone(), exec_id: exec_id.clone(), ..Default::default() };
        let is_there = call(
            &format!("State {what}"),
            shim.call(async |client, context| client.state(context, &state).await),
        );
        let start = StartRequest { id: id.clone(), exec_id: exec_id.clone(), ..Default::default() };
        assert!(!call(
            &format!("Start {what}"),
            shim.call(async |client, context| client.start(context, &start).await)
        ));
        if !is_there {
            let wait = WaitRequest { id: id.clone(), exec_id: exec_id.clone(), ..Default::default() };
            assert!(!call(
                &format!("Wait {what}"),
                shim.call(async |client, context| client.wait(context, &wait).await)
            ));
            let delete = DeleteRequest { id: id.clone(), exec_id: exec_id.clone(), ..Default::default() };
            assert!(!call(
                &format!("Delete {what}"),
                shim.call(async |client, context| client.delete(context, &delete).await)
            ));
        }
    }
    // A real-time signal has ended it.
    assert_eq!(running.exit_status(), 128 + 33);
    ended.delete().expect("delete");
    assert_eq!(container.exec_sh("exit 5").exit_status(), 5);
    container.end();
    drop((running, ended, deleted, shim, container));
    bystander.assert_all_untouched("numbers at their limits");
}

#[test]
fn an_absurd_update_changes_nothing_else() {
    needs!(OurShim);
    let node = Node::exclusive();
    let bystander = Bystander::new(&node);
    let container = node.container("absurd", Spec::sleeping()).started(&Io::default());
    let numbers = [
        json!(i64::MIN),
        json!(-1),
        json!(0),
        json!(1),
        json!(i64::MAX),
        json!(u64::MAX),
        json!(1e300),
        json!("1"),
        json!(null),
        json!([]),
    ];
    let fields = [
        ("memory", "limit"),
        ("memory", "swap"),
        ("memory", "reservation"),
        ("memory", "kernel"),
        ("memory", "swappiness"),
        ("cpu", "shares"),
        ("cpu", "quota"),
        ("cpu", "period"),
        ("cpu", "burst"),
        ("cpu", "idle"),
        ("cpu", "realtimeRuntime"),
        ("cpu", "cpus"),
        ("cpu", "mems"),
        ("pids", "limit"),
        ("blockIO", "weight"),
        ("blockIO", "leafWeight"),
        ("network", "classID"),
    ];
    let mut cases = Vec::new();
    for (group, field) in fields {
        cases.extend(numbers.iter().map(|number| json!({group: {field: number}})));
    }
    let texts = ["", " ", ",", "0-", "-1", "0-4294967296", "999999", "0\n1", "0-9999999999999999999", "all"];
    cases.extend(
        texts.iter().flat_map(|text| [json!({"cpu": {"cpus": text}}), json!({"cpu": {"mems": text}})]),
    );
    cases.extend([
        json!({"cpu": {"cpus": "0,".repeat(100_000)}}),
        json!({"unified": {"memory.max": "0\n1"}}),
        json!({"unified": {"cgroup.procs": "1"}}),
        json!({"unified": {"cgroup.threads": "1"}}),
        json!({"unified": {"cgroup.freeze": "1"}}),
        json!({"unified": {"cgroup.freeze": "0"}}),
        json!({"unified": {"cgroup.type": "threaded"}}),
        json!({"unified": {"cgroup.subtree_control": "-memory"}}),
        json!({"unified": {"../../cgroup.kill": "1", "": "", "a\0b": "c", "/": "d"}}),
        json!({"unified": {"x".repeat(1 << 20): "y"}}),
        json!({"devices": vec![json!({"allow": false}); 10_000]}),
        json!({"devices": [{"allow": false, "type": "a", "major": -1, "minor": -1, "access": "rwm"}]}),
        json!({"blockIO": {"weightDevice": [{"major": i64::MAX, "minor": -1, "weight": 5}]}}),
        json!({"blockIO": {"throttleReadBpsDevice": vec![json!({"major": 8, "minor": 0, "rate": u64::MAX}); 10_000]}}),
        json!({"hugepageLimits": [{"pageSize": "../x", "limit": 1}, {"pageSize": "2MB", "limit": u64::MAX}]}),
        json!({"rdma": {"../x": {"hcaHandles": u32::MAX}}}),
        json!({"network": {"priorities": [{"name": "../x", "priority": u32::MAX}]}}),
        json!([]), json!(7), json!({"memory": []}),
        // Ends it.
        json!({"unified": {"cgroup.kill": "1"}}),
    ]);
    for case in &cases {
        let what: String = case.to_string().chars().take(100).collect();
        match container.update(case) {
            Ok(()) => println!("{what}: done"),
            Err(refusal) => {
                println!(
                    "{what}: {:?} {}",
                    refusal.code(),
                    refusal.message().chars().take(160).collect::<String>()
                );
                assert!(refusal.message().len() < 20_000, "{what}: {} bytes", refusal.message().len());
            }
        }
    }
    assert_eq!(container.exit_status(), 137);
    container.end();
    drop(container);
    bystander.assert_all_untouched("absurd updates");
}
