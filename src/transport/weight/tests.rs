use std::collections::HashMap;

use containerd_shim_protos::api::{CreateTaskRequest, ExecProcessRequest, Mount, WaitRequest};
use containerd_shim_protos::sandbox_api::{CreateSandboxRequest, UpdateSandboxRequest};
use protobuf::well_known_types::any::Any;
use protobuf::{Message, MessageField};
use ttrpc::proto::MESSAGE_TYPE_REQUEST;

use super::super::frame::frame;
use super::*;
use crate::api::messages::cri::{
    DNSConfig, IDMapping, LinuxPodSandboxConfig, LinuxSandboxSecurityContext, NamespaceOption,
    PodSandboxConfig, UserNamespace,
};

fn request(method: &str, payload: Vec<u8>) -> ttrpc::Request {
    let (service, method) = ("containerd.task.v3.Task".to_owned(), method.to_owned());
    ttrpc::Request { service, method, payload, ..ttrpc::Request::default() }
}

fn framed(rest: &[u8]) -> Frame {
    Frame { bytes: frame(1, MESSAGE_TYPE_REQUEST, rest) }
}

fn weighed(request: &ttrpc::Request) -> Result<u64, TooComplex> {
    weigh(&framed(&request.write_to_bytes().unwrap()))
}

fn of(method: &str, message: &impl Message) -> Result<u64, TooComplex> {
    weighed(&request(method, message.write_to_bytes().unwrap()))
}

fn any(value: Vec<u8>) -> MessageField<Any> {
    MessageField::some(Any { type_url: "x".to_owned(), value, ..Any::default() })
}

/// Fields that no message has, with different numbers.
fn unknown(count: u32) -> Vec<u8> {
    let mut message = Any::default();
    (0..count).for_each(|number| message.special_fields.mut_unknown_fields().add_varint(1000 + number, 1));
    message.write_to_bytes().unwrap()
}

#[test]
fn usual_requests_weigh_little() {
    let mut wait = request("Wait", WaitRequest::default().write_to_bytes().unwrap());
    let pair = |key: &str| ttrpc::proto::KeyValue {
        key: key.to_owned(),
        value: "7".repeat(100),
        ..ttrpc::proto::KeyValue::default()
    };
    wait.metadata = ["containerd-namespace-ttrpc", "traceparent", "tracestate", "baggage"].map(pair).to_vec();
    assert!(weighed(&wait).unwrap() < 3 << 10);
    let mount = Mount { options: vec!["lowerdir=/x".to_owned(); 10], ..Mount::default() };
    let create = CreateTaskRequest { rootfs: vec![mount; 500], ..CreateTaskRequest::default() };
    assert!(of("Create", &create).unwrap() < 1 << 20, "more mounts than any runtime makes");
    let json = format!("{{\"env\":[{}\"\"]}}", "\"a\",".repeat(900_000)).into_bytes();
    let exec = ExecProcessRequest { spec: any(json.clone()), ..ExecProcessRequest::default() };
    assert!(of("Exec", &exec).unwrap() < json.len() as u64 + 2000, "a spec is no list of fields");
}

#[test]
fn a_request_with_too_much_metadata_is_refused() {
    let with = |count: usize, length: usize| {
        let entry = ttrpc::proto::KeyValue { value: "v".repeat(length), ..ttrpc::proto::KeyValue::default() };
        weighed(&ttrpc::Request { metadata: vec![entry; count], ..request("Wait", Vec::new()) })
    };
    assert!(with(MOST_METADATA, 1000).is_ok());
    assert_eq!(with(MOST_METADATA + 1, 0), Err(TooComplex::Metadata));
    assert_eq!(with(2, MOST_METADATA_BYTES / 2), Err(TooComplex::MetadataBytes));
    // ttrpc makes two million objects of this one.
    assert_eq!(weigh(&framed(&[0x2a, 0].repeat(2 << 20))), Err(TooComplex::Metadata));
}

#[test]
fn fields_count_wherever_the_decoder_makes_objects_of_them() {
    let many = MOST_FIELDS as u32;
    let texts = vec![String::new(); MOST_FIELDS];
    let mut rest = request("Wait", Vec::new()).write_to_bytes().unwrap();
    rest.extend(unknown(many));
    assert_eq!(weigh(&framed(&rest)), Err(TooComplex::Fields), "in the request");
    let mut entry = ttrpc::proto::KeyValue::default();
    entry.merge_from_bytes(&unknown(many)).unwrap();
    let broad = ttrpc::Request { metadata: vec![entry], ..request("Wait", Vec::new()) };
    assert_eq!(weighed(&broad), Err(TooComplex::Fields), "in the metadata");
    assert_eq!(weighed(&request("Wait", unknown(many))), Err(TooComplex::Fields), "in the payload");
    let mount = Mount { options: texts.clone(), ..Mount::default() };
    let create = CreateTaskRequest { rootfs: vec![mount.clone()], ..CreateTaskRequest::default() };
    assert_eq!(of("Create", &create), Err(TooComplex::Fields), "in a mount");
    let create = CreateTaskRequest { options: any(unknown(many)), ..CreateTaskRequest::default() };
    assert_eq!(of("Create", &create), Err(TooComplex::Fields), "in the options");
    let sandbox = CreateSandboxRequest { rootfs: vec![mount], ..CreateSandboxRequest::default() };
    assert_eq!(of("CreateSandbox", &sandbox), Err(TooComplex::Fields), "in a mount of a sandbox");
    let annotations: HashMap<_, _> =
        (0..MOST_FIELDS).map(|number| (number.to_string(), String::new())).collect();
    let update = UpdateSandboxRequest { annotations, ..UpdateSandboxRequest::default() };
    assert_eq!(of("UpdateSandbox", &update), Err(TooComplex::Fields), "in annotations");
    let dns = DNSConfig { servers: texts, ..DNSConfig::default() };
    let ids = vec![IDMapping::default(); MOST_FIELDS];
    let user = UserNamespace { uids: ids, ..UserNamespace::default() };
    let options = NamespaceOption { userns_options: MessageField::some(user), ..NamespaceOption::default() };
    let security = LinuxSandboxSecurityContext {
        namespace_options: MessageField::some(options),
        ..LinuxSandboxSecurityContext::default()
    };
    let linux = LinuxPodSandboxConfig {
        security_context: MessageField::some(security),
        ..LinuxPodSandboxConfig::default()
    };
    for pod in [
        PodSandboxConfig { dns_config: MessageField::some(dns), ..PodSandboxConfig::default() },
        PodSandboxConfig { linux: MessageField::some(linux), ..PodSandboxConfig::default() },
    ] {
        let options = any(pod.write_to_bytes().unwrap());
        let sandbox = CreateSandboxRequest { options, ..CreateSandboxRequest::default() };
        assert_eq!(of("CreateSandbox", &sandbox), Err(TooComplex::Fields), "in the configuration of a pod");
    }
}

#[test]
fn the_last_method_and_payload_count_and_a_broken_request_counts_up_to_where_it_is_broken() {
    let mount = Mount { options: vec![String::new(); MOST_FIELDS], ..Mount::default() };
    let create = CreateTaskRequest { rootfs: vec![mount], ..CreateTaskRequest::default() };
    let mut rest = request("Create", Vec::new()).write_to_bytes().unwrap();
    rest.extend(request("Wait", create.write_to_bytes().unwrap()).write_to_bytes().unwrap());
    assert!(weigh(&framed(&rest)).is_ok());
    rest.extend(
        ttrpc::Request { method: "Create".to_owned(), ..Default::default() }.write_to_bytes().unwrap(),
    );
    assert_eq!(weigh(&framed(&rest)), Err(TooComplex::Fields));
    let broken = [[8, 1].repeat(100), vec![7; 100]].concat();
    assert_eq!(weigh(&framed(&broken)), Ok(broken.len() as u64 + HEADER as u64 + 100 * FIELD_WEIGHT));
}

/// The decoder takes what there is of a message for the whole message.
#[test]
fn fields_of_a_message_that_is_cut_off_are_counted() {
    // The fifth field, metadata, announces a length of 21 bits, then one of 56 bits.
    for length in [&[0xff, 0xff, 0x7f][..], &[0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x7f]] {
        let cut_off = |count| [&[5 << 3 | 2], length, &unknown(count)].concat();
        assert_eq!(ttrpc::Request::parse_from_bytes(&cut_off(3)).unwrap().metadata.len(), 1);
        assert!(weigh(&framed(&cut_off(3))).unwrap() > 4 * FIELD_WEIGHT);
        assert_eq!(weigh(&framed(&cut_off(10_000))), Err(TooComplex::Fields));
    }
}
