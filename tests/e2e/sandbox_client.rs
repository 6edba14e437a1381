//! The calls that the Go client of containerd 2 makes for a sandbox (`client/sandbox.go`), in the order in which its users call
//! `NewSandbox`, `LoadSandbox` and the methods of a sandbox.

use std::collections::HashMap;

use containerd_client::services::v1::sandbox::store_client::StoreClient;
use containerd_client::services::v1::sandbox::{StoreGetRequest, StoreListRequest, StoreUpdateRequest};
use containerd_client::tonic::{Code, Status};
use containerd_client::types::Sandbox as Stored;
use prost_types::Any;

use crate::common::leaks::{self, Traces};
use crate::common::node::{NAMESPACE, Node, request};
use crate::common::sandbox::{NOT_READY, READY, Sandbox};
use crate::common::spec::Spec;
use crate::common::stdio::Fifos;
use crate::common::task::Io;
use crate::common::{process, systemd};

fn get(node: &Node, id: &str) -> Result<Stored, Status> {
    let message = StoreGetRequest { sandbox_id: id.to_string() };
    let answer = node.call(StoreClient::new(node.channel()).get(request(NAMESPACE, message)))?;
    Ok(answer.sandbox.expect("a sandbox"))
}

fn listed(node: &Node, filter: &str) -> Vec<String> {
    let message = StoreListRequest { filters: vec![filter.to_string()] };
    let answer = node.call(StoreClient::new(node.channel()).list(request(NAMESPACE, message))).expect("list");
    answer.list.into_iter().map(|sandbox| sandbox.sandbox_id).collect()
}

/// `LoadSandbox`: the metadata, if the sandbox is alive.
fn load(node: &Node, sandbox: &Sandbox) -> Result<(Stored, u32), Status> {
    let stored = get(node, &sandbox.id)?;
    Ok((stored, sandbox.try_status()?.pid))
}

#[test]
fn the_client_of_containerd_can_make_every_call_for_a_sandbox() {
    needs!(OurShim, Sandboxes);
    let node = Node::exclusive();
    drop(Sandbox::run(&node, "warm-up"));
    drop(node.container("warm", Spec::sleeping()).started(&Io::default()));
    let before = Traces::take();

    // NewSandbox and Create.
    let sandbox = Sandbox::unmade(&node, "client");
    assert_eq!(load(&node, &sandbox).expect_err("not yet").code(), Code::NotFound);
    sandbox.try_create(None, None).expect("create");
    assert_eq!(sandbox.try_create(None, None).expect_err("it exists").code(), Code::AlreadyExists);
    // Labels and extensions, by which clients find their sandboxes.
    let mut stored = get(&node, &sandbox.id).expect("get");
    let note = Any { type_url: "example.com/note".to_string(), value: b"{}".to_vec() };
    stored.labels = HashMap::from([("owner".to_string(), sandbox.id.clone())]);
    stored.extensions = HashMap::from([("note".to_string(), note.clone())]);
    let fields = ["labels", "extensions"].map(str::to_string).to_vec();
    let update = StoreUpdateRequest { sandbox: Some(stored), fields };
    node.call(StoreClient::new(node.channel()).update(request(NAMESPACE, update))).expect("update");
    let stored = get(&node, &sandbox.id).expect("get");
    assert_eq!((&stored.labels["owner"], &stored.extensions["note"]), (&sandbox.id, &note));
    assert_eq!(listed(&node, &format!("labels.owner=={}", sandbox.id)), [sandbox.id.as_str()]);

    // Start, Status, LoadSandbox, Metrics. containerd 2.1 does not offer Platform to clients (`sandbox_odd.rs` calls it).
    let pid = sandbox.start();
    let (loaded, loaded_pid) = load(&node, &sandbox).expect("load");
    assert_eq!((loaded.sandbox_id, loaded_pid), (sandbox.id.clone(), pid));
    assert_eq!(loaded.runtime.expect("a runtime").name, node.runtime);
    assert_eq!(sandbox.status().state, READY);
    assert_eq!(sandbox.metrics().id, sandbox.id);

    // NewContainer in the sandbox: it joins the namespaces of the first process.
    let fifos = Fifos::new("inside");
    let (mut stdout, _stderr) = (fifos.stdout(), fifos.stderr());
    let spec = ["network", "ipc", "uts", "pid"].iter().fold(
        Spec::sh("readlink /proc/self/ns/net; exit 5"),
        |spec, kind| {
            let file = if *kind == "network" { "net" } else { kind };
            spec.in_namespace_of(kind, &format!("/proc/{pid}/ns/{file}"))
        },
    );
    let inside = node.container("inside", spec.without_hostname()).sandbox(&sandbox.id).started(&fifos.io());
    assert_eq!(inside.exit_status(), 5);
    let network = stdout.text();
    assert_eq!(network.trim(), process::namespace(pid, "net"));
    inside.delete().expect("delete");
    drop(inside);

    // Wait, Stop, Shutdown.
    let waiter = sandbox.wait();
    sandbox.stop();
    assert_eq!(sandbox.waited(waiter), 0);
    assert_eq!(sandbox.status().state, NOT_READY);
    sandbox.shut_down();
    sandbox.try_forget().expect("delete from the store");
    assert_eq!(load(&node, &sandbox).expect_err("it is gone").code(), Code::NotFound);
    // The client accepts that another one was faster.
    if let Err(error) = sandbox.try_shut_down() {
        assert_eq!(error.code(), Code::NotFound, "{error}");
    }
    assert!(!systemd::is_active(&sandbox.unit()));
    drop((sandbox, fifos, stdout));
    leaks::assert_none("a sandbox of the client", &before);
}
