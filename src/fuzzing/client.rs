//! Fuzz targets for what clients of containerd send.

use std::path::Path;

use containerd_shim_protos::api::{CreateTaskRequest, ExecProcessRequest};
use protobuf::Message;
use protobuf::well_known_types::any::Any;

use crate::api::messages::BootstrapParams;
use crate::api::{self, convert};
use crate::cgroup::cgroups_path;
use crate::cli::arguments;
use crate::id::{ExecId, Namespace, TaskId, TaskKey, UnitName, is_long_hex};
use crate::oci::bundle::Spec;
use crate::oci::resources::{self, Resources};
use crate::oci::{pod, process, signal};
use crate::stdio::uri::{self, Kind, Role};
use crate::task::request::{Log, Stdio};
use crate::transport::frame::{Assembler, Frame};
use crate::transport::weight;
use crate::unit::name;

use super::properties::metadata;
use super::{first_line, go};

/// Target: the command line with which containerd runs the shim.
pub(super) fn arguments(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    let words: Vec<_> = text.split('\n').map(str::to_owned).collect();
    let _ = arguments::parse(&words);
}

/// Target: `linux.cgroupsPath`. A path that is accepted stays below the root of the hierarchy.
pub(super) fn cgroups_path(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    let Some((namespace, id)) = names("k8s.io", "web") else { return };
    match cgroups_path::parse(text, &namespace, &id) {
        Ok(cgroups_path::Requested::Literal(path)) => {
            let climbs = path.components().any(|part| part.as_os_str() == "..");
            assert!(path.is_absolute() && !climbs, "{}", path.display());
        }
        Ok(cgroups_path::Requested::Slice { slice, child }) => {
            assert!(slice.ends_with(".slice") && !slice.contains('/'), "{slice}");
            assert!(!child.is_empty() && !child.contains('/') && child != "." && child != "..", "{child}");
        }
        Ok(cgroups_path::Requested::Default) | Err(_) => {}
    }
}

/// Target: the configuration of a pod in CreateSandbox. On every kind of node, the spec of the sandbox can be read.
pub(super) fn pod(data: &[u8]) {
    let options =
        Any { type_url: "runtime.v1.PodSandboxConfig".to_owned(), value: data.to_vec(), ..Any::default() };
    let Ok(Some(configured)) = api::pod::pod(Some(&options)) else { return };
    let strict = pod::Node {
        selinux: true,
        apparmor: true,
        user_namespace: Some("/x".into()),
        ..pod::Node::default()
    };
    for node in [pod::Node::default(), strict] {
        let spec = pod::spec("web", Some(&configured), "", &node);
        assert_eq!(spec["process"]["args"], serde_json::json!([pod::INIT]), "the program is the shim's");
        assert_eq!(spec["process"]["capabilities"], serde_json::json!({}));
        let text = spec.to_string();
        let read = Spec::parse(text.as_bytes()).unwrap_or_else(|error| panic!("{text}: {error}"));
        // An empty annotation counts as absent.
        let name = Some(configured.name.as_str()).filter(|name| !name.is_empty());
        assert_eq!(read.annotation("io.kubernetes.cri.sandbox-name"), name);
        cgroups_path(read.cgroups_path().as_bytes());
        metadata(text.as_bytes());
    }
}

/// Target: a stream of ttrpc frames that arrives in pieces. The first bytes are the sizes of the pieces. The sizes do not
/// change the result.
pub(super) fn frame(data: &[u8]) {
    let Some((&count, rest)) = data.split_first() else { return };
    let Some((sizes, stream)) = rest.split_at_checked(usize::from(count % 8)) else { return };
    let frames = |found: Vec<(u64, Frame)>| found.into_iter().map(|(_, frame)| frame).collect::<Vec<_>>();
    let refused = |assembler: &mut Assembler| {
        assembler.take_refused().into_iter().map(|(_, too_long)| too_long).collect::<Vec<_>>()
    };
    let mut whole = Assembler::default();
    let expected = frames(whole.push(stream));
    let mut assembler = Assembler::default();
    let mut found = Vec::new();
    let (mut left, mut sizes) = (stream, sizes.iter().cycle());
    while !left.is_empty() {
        let size = sizes.next().map_or(left.len(), |size| usize::from(*size).max(1)).min(left.len());
        let (piece, after) = left.split_at(size);
        left = after;
        found.extend(frames(assembler.push(piece)));
    }
    assert_eq!(found, expected);
    assert_eq!(refused(&mut assembler), refused(&mut whole));
    assert_eq!(assembler.pending(), whole.pending());
    for frame in found {
        if let Ok(weight) = weight::weigh(&frame) {
            // Every entry has been counted.
            let entries = frame.request().unwrap_or_default().metadata.len();
            assert!(entries <= weight::MOST_METADATA);
            assert!(weight >= frame.bytes.len() as u64 + entries as u64 * weight::FIELD_WEIGHT);
        }
        let _ = (frame.stream(), frame.replayed());
    }
}

/// Target: the names of a namespace, a task and an exec. The names of their units are valid and distinct, and can be read
/// back. With three more lines, the target also compares the names of two tasks.
pub(super) fn name(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    // The name of any D-Bus object.
    if let Some(unit) = name::from_object_path(text) {
        assert_eq!(name::from_object_path(&name::object_path(unit.as_str())), Some(unit));
    }
    let parts: Vec<_> = text.split('\n').collect();
    let task = |parts: &[&str]| match *parts {
        [namespace, id, exec] => {
            names(namespace, id).map(|(namespace, id)| (TaskKey::usual(namespace, id), exec.to_owned()))
        }
        _ => None,
    };
    let Some((one, exec)) = task(parts.get(..3).unwrap_or_default()) else { return };
    check_names(&one, &exec);
    if let Some((other, _)) = task(parts.get(3..).unwrap_or_default()) {
        check_distinct(&one, &other);
    }
}

/// Checks the names of a task's units.
pub(super) fn check_names(task: &TaskKey, exec: &str) {
    let slice = name::namespace_slice(&task.namespace);
    assert!(slice.is_ok_and(|slice| slice.as_str().len() <= 255));
    let word = task.word();
    assert_eq!(TaskKey::from_word(task.namespace.clone(), &word).as_ref(), Ok(task));
    let units: Vec<_> = name::candidates(task).collect();
    for (at, unit) in units.iter().enumerate() {
        assert!(!units.iter().skip(at + 1).any(|other| other == unit), "{unit} twice");
        assert!(unit.as_str().len() <= 255 && unit.as_str().ends_with(".service"), "{unit}");
        assert_eq!(name::from_object_path(&name::object_path(unit.as_str())), Some(unit.clone()));
        let Ok(exec) = ExecId::new(exec) else { continue };
        for exec in name::exec_candidates(unit, &exec) {
            assert!(exec.as_str().len() <= 255 && exec != *unit, "{exec}");
            let logger = name::logger(&exec);
            assert!(logger.is_ok_and(|logger| logger != exec && logger != *unit));
        }
    }
}

/// Two tasks share a candidate for a name only if both have another candidate. Only the beginning of an id of 64 digits can
/// be such a name.
pub(super) fn check_distinct(one: &TaskKey, other: &TaskKey) {
    if one == other {
        return;
    }
    let names = |task: &TaskKey| name::candidates(task).collect::<Vec<_>>();
    let (one_names, other_names) = (names(one), names(other));
    let is_shared = |name: &UnitName| other_names.contains(name);
    if one.namespace != other.namespace {
        assert!(!one_names.iter().any(is_shared), "{one_names:?} and {other_names:?}");
    }
    if !is_long_hex(one.id.as_str()) && !is_long_hex(other.id.as_str()) && one.owner == other.owner {
        assert!(!one_names.iter().any(is_shared), "{one_names:?} and {other_names:?}");
    }
    if let (Some(one), Some(other)) = (one_names.last(), other_names.last()) {
        assert!(one != other && !is_shared(one) && !one_names.contains(other), "{one} and {other}");
        let paths = [one, other].map(|unit| name::object_path(unit.as_str()));
        assert_ne!(paths.first(), paths.last());
    }
}

/// Target: runtime options. The input is the type of the message, and the message.
pub(super) fn options(data: &[u8]) {
    let Some((type_url, value)) = first_line(data) else { return };
    let any = Any { type_url: type_url.to_owned(), value: value.to_vec(), ..Any::default() };
    // The fuzzer does not read files that the options name.
    if let Ok(source) = convert::options(Some(&any))
        && !source.is_file()
        && let Ok(options) = source.read()
        && let Ok(namespace) = Namespace::new("default")
        && let Ok(runtime) = options.resolve(&namespace, "/bin:/usr/bin")
    {
        assert!(runtime.binary.is_absolute() && runtime.root.is_absolute());
    }
}

/// Target: the process spec of an exec.
pub(super) fn process(data: &[u8]) {
    let _ = go::check(data, &process::SHAPE);
    for terminal in [false, true] {
        let _ = process::ProcessSpec::read(data, terminal);
    }
}

/// Target: messages of containerd.
pub(super) fn request(data: &[u8]) {
    let Ok(namespace) = Namespace::new("default") else { return };
    if let Ok(request) = CreateTaskRequest::parse_from_bytes(data) {
        let _ = convert::create(namespace.clone(), request);
    }
    if let Ok(request) = ExecProcessRequest::parse_from_bytes(data) {
        let _ = convert::exec(namespace, request);
    }
    let _ = BootstrapParams::parse_from_bytes(data);
}

/// Target: `linux.resources`.
pub(super) fn resources(data: &[u8]) {
    let _ = go::check(data, &resources::SHAPE);
    if let Ok(resources) = Resources::parse(data)
        && resources.check().is_ok()
    {
        let _ = resources.needs().count();
        let _ = resources.check_controllers("cpu memory pids");
    }
}

/// Target: the stop signal of an image.
pub(super) fn signal(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    if let Ok(signal) = signal::parse(text) {
        assert!((1..=64).contains(&signal), "{text:?} is signal {signal}");
    }
}

/// Target: the stdio strings of a process, each on a line of its own.
pub(super) fn stdio(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    let parts: Vec<_> = text.split('\n').map(str::to_owned).collect();
    let [stdin, stdout, stderr] = &parts[..] else { return };
    for (terminal, role) in [(false, Role::Init), (true, Role::Init), (false, Role::Exec), (true, Role::Exec)]
    {
        let stdio = Stdio { stdin: stdin.clone(), stdout: stdout.clone(), stderr: stderr.clone(), terminal };
        for kind in [Kind::Fifo, Kind::File, Kind::Device] {
            let wiring = uri::wiring(&stdio, Log::Auto, role, |_: &Path| kind);
            if let Ok(logger) = wiring.map(|wiring| wiring.logger) {
                assert!(logger.is_none_or(|logger| logger.program.is_absolute()));
            }
        }
    }
}

fn names(namespace: &str, id: &str) -> Option<(Namespace, TaskId)> {
    Some((Namespace::new(namespace).ok()?, TaskId::new(id).ok()?))
}
