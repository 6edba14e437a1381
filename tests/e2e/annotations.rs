//! Properties of a container's unit that a client or an administrator requests, and the devices that the spec allows:
//! `systemctl show` shows them, and impossible ones are refused.

use std::collections::HashMap;
use std::fs;
use std::path::Path;

use containerd_client::tonic::Code::FailedPrecondition;
use prost::Message as _;
use prost_types::Any;
use serde_json::json;
use ttrpc::Code;

use crate::common::container::Container;
use crate::common::leaks::{self, Traces};
use crate::common::node::{Node, unique};
use crate::common::shim::{Bundle, Shim, WithFaults};
use crate::common::spec::Spec;
use crate::common::stdio::Fifos;
use crate::common::task::Io;
use crate::common::{daemon, process, systemd};
use crate::runtime_options::GenericOptions;

const PREFIX: &str = "org.systemd.property.";
const STOP_SIGNAL: &str = "io.containerd.image.config.stop-signal";

fn asking(spec: Spec, properties: &[(&str, &str)]) -> Spec {
    properties.iter().fold(spec, |spec, (name, value)| spec.annotation(&format!("{PREFIX}{name}"), value))
}

fn shown(container: &Container, name: &str) -> String {
    systemd::property(&systemd::unit_of(container), name)
}

/// The words of a property that is a list.
fn words(container: &Container, name: &str) -> Vec<String> {
    shown(container, name).split_whitespace().map(str::to_string).collect()
}

/// The message with this runtime's own options.
#[derive(Clone, PartialEq, prost::Message)]
struct OurOptions {
    #[prost(map = "string, string", tag = "8")]
    properties: HashMap<String, String>,
}

/// Runtime options in TOML, as people write them.
fn options(body: &str) -> Any {
    GenericOptions { config_body: body.to_string(), ..Default::default() }.to_any()
}

#[test]
fn annotations_set_properties_of_the_unit() {
    needs!(OurShim);
    let node = Node::shared();
    let asked = [
        ("After", "['e2e-before.service', 'e2e-too.service']"),
        ("TimeoutStopSec", "0.25"),
        ("KillSignal", "2"),
        ("RuntimeMaxUSec", "uint64 3600000000"),
        ("Description", "\"it's ours\""),
        ("MemoryHigh", "@t 1073741824"),
    ];
    let container = node.container("asked", asking(Spec::sleeping(), &asked)).started(&Io::default());
    let after = words(&container, "After");
    for unit in ["e2e-before.service", "e2e-too.service", systemd::ORDER_SLICE] {
        assert!(after.iter().any(|after| after == unit), "{unit} is not in {after:?}");
    }
    assert_eq!(shown(&container, "TimeoutStopUSec"), "250ms");
    assert_eq!(shown(&container, "KillSignal"), "2");
    assert_eq!(shown(&container, "RuntimeMaxUSec"), "1h");
    assert_eq!(shown(&container, "Description"), "it's ours");
    assert_eq!(shown(&container, "MemoryHigh"), "1073741824");
    container.kill(9).expect("kill");
    assert_eq!(container.exit_status(), 137);
    container.delete().expect("delete");
}

#[test]
fn options_set_what_annotations_may_not_and_can_allow_annotations() {
    needs!(OurShim);
    let node = Node::shared();
    let wants = [("Wants", "['e2e-wanted.target']"), ("IODeviceWeight", "[('/dev/null', uint64 50)]")];
    let body: String = wants.iter().map(|(name, value)| format!("{name} = \"{value}\"\n")).collect();
    let of_options =
        node.container("options", Spec::sleeping()).options(options(&format!("[Properties]\n{body}")));
    let container = of_options.started(&Io::default());
    assert_eq!(shown(&container, "Wants"), "e2e-wanted.target");

    let spec = asking(Spec::sleeping(), &wants);
    let refusal = node.container("refused", spec.clone()).make().create(&Io::default()).expect_err("Wants");
    assert!(refusal.message().contains("AnnotationProperties"), "{refusal}");
    let let_them = options("AnnotationProperties = [\"Wants\", \"IODeviceWeight\"]");
    let container = node.container("let", spec).options(let_them).started(&Io::default());
    assert_eq!(shown(&container, "Wants"), "e2e-wanted.target");
}

#[test]
fn no_name_or_annotation_reaches_a_units_file_as_a_line_or_field_of_its_own() {
    needs!(OurShim);
    let node = Node::exclusive();
    let spec =
        Spec::sleeping().annotation("nerdctl/name", "x OBJECT_SYSTEMD_UNIT=ssh.service %H\n[Service]\\");
    let container = node.container("lines", spec).started(&Io::default());
    process::succeed("systemctl", &["daemon-reload"]);
    let unit = systemd::unit_of(&container);
    assert_eq!(shown(&container, "SyslogIdentifier"), "x_OBJECT_SYSTEMD_UNIT=ssh.service_%H[Service]");
    let fields = shown(&container, "LogExtraFields");
    assert!(fields.contains(&format!("CONTAINER_ID={}", container.id)), "{fields}");
    assert!(!fields.split([' ', '\n']).any(|field| field.starts_with("OBJECT_")), "{fields}");

    let injected = r#""web\n[Service]\nExecStopPost=/bin/touch /run/e2e-injected""#;
    let spec = asking(Spec::sleeping(), &[("Description", injected)]);
    let refusal = node.container("lines", spec).make().create(&Io::default()).expect_err("a line break");
    assert!(refusal.message().contains("org.systemd.property.Description: "), "{refusal}");
    assert_eq!(systemd::property(&unit, "ExecStopPost"), "");
}

#[test]
fn a_value_that_d_bus_can_not_carry_is_refused_and_the_daemon_lives() {
    needs!(OurShim);
    let node = Node::exclusive();
    let shim = Shim::connect(&node);
    let before = daemon::serving();
    let numbers = vec!["1"; 300].join(",");
    for (name, value) in [
        ("Foo", format!("({numbers})")),
        ("After", format!("({numbers})")),
        ("Description", format!("signature '{}'", "i".repeat(300))),
        ("Description", format!("'{}'", "x".repeat(100_000))),
        ("After", format!("{}{}", "[".repeat(5000), "]".repeat(5000))),
    ] {
        let bundle = Bundle::new("annotation");
        bundle.write_config(&asking(Spec::sleeping(), &[(name, &value)]).to_json());
        let (code, text) = shim.create(bundle.request(&unique("annotation"))).expect_err(name);
        assert_eq!(code, Code::INVALID_ARGUMENT, "{name}: {text}");
    }
    assert_eq!(daemon::serving(), before, "the daemon was started again");
}

#[test]
fn runcs_own_example_works_and_exit_codes_stay() {
    let node = Node::shared();
    let asked = [("TimeoutStopUSec", "uint64 123456789"), ("CollectMode", "'inactive-or-failed'")];
    let container = node.container("example", asking(Spec::sh("exit 23"), &asked)).started(&Io::default());
    assert_eq!(container.exit_status(), 23);
    assert_eq!(container.state().expect("state").exit_status, 23);
    assert_eq!(container.delete().expect("delete").exit_status, 23);
}

#[test]
fn a_property_that_cant_be_set_is_an_invalid_argument_that_names_it() {
    needs!(OurShim);
    let node = Node::exclusive();
    let shim = Shim::connect(&node);
    // After this container, the daemon has everything that it makes for its first container.
    node.container("first", Spec::sleeping()).created(&Io::default()).delete().expect("delete");
    let before = Traces::take();
    let cases = [
        // Values and names that are not valid.
        ("After", "['x.service'", "at character 13"),
        ("After", "x.service", "quotes"),
        ("St0p", "5", "letters"),
        ("TimeoutStopSec", "'5s'", "seconds"),
        // Wrong types.
        ("TimeoutStopUSec", "5", "write uint64 5"),
        ("After", "'x.service'", "write ['x.service']"),
        ("KillSignal", "'SIGTERM'", "a number of type int32"),
        // Properties that systemd does not know, or values that it refuses.
        ("NoSuchProperty", "true", "AnnotationProperties"),
        ("KillSignal", "999", "does not end"),
        ("OOMPolicy", "'bogus'", "bogus"),
        ("After", "['no unit name']", "names of services"),
        ("Id", "'x.service'", "letters"),
        // Properties on which the promises of the shim depend.
        ("ExecStart", "[('/bin/true', ['true'], false)]", "can't be set"),
        ("Type", "'oneshot'", "can't be set"),
        ("RemainAfterExit", "false", "can't be set"),
        ("Slice", "'system.slice'", "linux.cgroupsPath"),
        ("KillMode", "'process'", "can't be set"),
        ("User", "'nobody'", "can't be set"),
        ("RootDirectory", "'/srv'", "can't be set"),
        ("StandardOutput", "'null'", "can't be set"),
        ("RestartSec", "1", "can't be set"),
    ];
    for (name, value, part) in cases {
        let bundle = Bundle::new("annotation");
        bundle.write_config(&asking(Spec::sleeping(), &[(name, value)]).to_json());
        let (code, text) = shim.create(bundle.request(&unique("annotation"))).expect_err(name);
        assert_eq!(code, Code::INVALID_ARGUMENT, "{name}={value}: {text}");
        assert!(text.contains(&format!("{PREFIX}{name}")) && text.contains(part), "{name}={value}: {text}");
    }
    leaks::assert_none("properties that are refused", &before);
}

#[test]
fn a_unit_that_is_needed_and_missing_is_named() {
    needs!(OurShim);
    let node = Node::exclusive();
    let before = Traces::take();
    let body = "[Properties]\nRequires = \"['e2e-missing.service']\"";
    let container = node.container("needed", Spec::sleeping()).options(options(body)).make();
    let refusal = container.create(&Io::default()).expect_err("a missing unit");
    assert_eq!(refusal.code(), FailedPrecondition, "{refusal}");
    assert!(refusal.message().contains("e2e-missing.service"), "{refusal}");
    drop(container);
    leaks::assert_none("a unit that needs a missing one", &before);
}

#[test]
fn options_set_properties_and_annotations_override_the_ones_they_may() {
    needs!(OurShim);
    let node = Node::shared();
    let body = "[Properties]\nTimeoutStopSec = \"5\"\nAfter = \"['e2e-option.service']\"\n\
                ManagedOOMMemoryPressure = \"'kill'\"\n";
    let spec = asking(Spec::sleeping(), &[("TimeoutStopUSec", "uint64 9000000")]);
    let container = node.container("options", spec.clone()).options(options(body)).started(&Io::default());
    assert_eq!(shown(&container, "TimeoutStopUSec"), "5s");
    let lets = format!("AnnotationProperties = [\"TimeoutStopSec\"]\n{body}");
    let container = node.container("options", spec).options(options(&lets)).started(&Io::default());
    assert_eq!(shown(&container, "TimeoutStopUSec"), "9s");
    assert_eq!(shown(&container, "ManagedOOMMemoryPressure"), "kill");
    assert!(words(&container, "After").contains(&"e2e-option.service".to_string()));

    let properties = [("TimeoutStopSec".to_string(), "6".to_string())].into();
    let value = OurOptions { properties }.encode_to_vec();
    let ours = Any { type_url: "containerd.systemd.v1.Options".to_string(), value };
    let container = node.container("options", Spec::sleeping()).options(ours).started(&Io::default());
    assert_eq!(shown(&container, "TimeoutStopUSec"), "6s");

    for (name, value, part) in [
        ("DeviceAllow", "['/dev/null rw']", "a(ss)"),
        ("NoSuchProperty", "true", "no property NoSuchProperty"),
        ("KillSignal", "999", "999"),
        ("ManagedOOMSwap", "'bogus'", "systemd refused"),
        ("After", "['no unit name']", "no unit name"),
        ("Id", "'x.service'", "Id"),
    ] {
        let bad = options(&format!("[Properties]\n{name} = \"{value}\""));
        let container = node.container("options", Spec::sleeping()).options(bad).make();
        let refusal = container.create(&Io::default()).expect_err(name);
        assert!(refusal.message().contains(part) && refusal.message().contains(name), "{refusal}");
    }
    let bad =
        GenericOptions { config_body: "[Properties]\nType = \"'exec'\"".to_string(), ..Default::default() };
    let container = node.container("options", Spec::sleeping()).options(bad.to_any()).make();
    let refusal = container.create(&Io::default()).expect_err("a denied property");
    assert!(refusal.message().contains("runtime option Properties.Type: "), "{refusal}");
}

#[test]
fn an_images_stop_signal_is_what_systemctl_stop_sends() {
    needs!(OurShim);
    let node = Node::shared();
    let script = "trap 'exit 33' QUIT; echo ready; sleep 100000 & wait";
    let fifos = Fifos::new("stop-signal");
    let (mut stdout, _stderr) = (fifos.stdout(), fifos.stderr());
    let spec = Spec::sh(script).annotation(STOP_SIGNAL, "SIGQUIT");
    let container = node.container("stop-signal", spec).started(&fifos.output());
    stdout.until(|bytes| bytes == b"ready\n");
    assert_eq!(shown(&container, "KillSignal"), "3");
    process::succeed("systemctl", &["stop", &systemd::unit_of(&container)]);
    assert_eq!(container.exit_status(), 33);

    let spec = asking(Spec::sleeping().annotation(STOP_SIGNAL, "SIGRTMIN+3"), &[("KillSignal", "1")]);
    let container = node.container("stop-signal", spec).started(&Io::default());
    assert_eq!(shown(&container, "KillSignal"), "1", "what is asked for by name wins");

    let spec = Spec::sleeping().annotation(STOP_SIGNAL, "SIGFOO");
    let container = node.container("stop-signal", spec).started(&Io::default());
    assert_eq!(shown(&container, "KillSignal"), "15", "no signal has this name");
}

#[test]
fn a_create_that_the_next_daemon_completes_sets_the_properties_too() {
    needs!(OurShim, Faults);
    let node = Node::exclusive();
    let _build = WithFaults::install();
    const REQUEST: &str = "/run/containerd-shim-systemd-v1.fault";
    fs::write(REQUEST, "create.recorded").expect("ask for a fault");
    let options = GenericOptions {
        config_body: "[Properties]\nTimeoutStopSec = \"11\"\n".to_string(),
        ..Default::default()
    };
    let spec = asking(Spec::sleeping(), &[("KillSignal", "10")]);
    let container = node.container("goes-on", spec).options(options.to_any()).started(&Io::default());
    assert!(!Path::new(REQUEST).exists(), "the daemon did not end");
    assert_eq!(shown(&container, "TimeoutStopUSec"), "11s");
    assert_eq!(shown(&container, "KillSignal"), "10");
    assert_eq!(shown(&container, "DevicePolicy"), "strict");
}

#[test]
fn the_devices_that_the_spec_allows_are_shown_and_work() {
    needs!(OurShim);
    let node = Node::shared();
    let devices = json!({"devices": [
        {"allow": false, "access": "rwm"},
        {"allow": true, "type": "c", "major": 1, "minor": 3, "access": "rw"},
        {"allow": true, "type": "c", "major": 10, "minor": 229, "access": "rw"},
        {"allow": true, "type": "b", "major": 8, "access": "r"},
    ]});
    let script = "cat /dev/null && head -c 1 /dev/zero >/dev/null && head -c 1 /dev/urandom >/dev/null && \
                  ! cat /dev/zero >/dev/full && exit 41; exit 1";
    let container = node.container("devices", Spec::sh(script).resources(devices)).created(&Io::default());
    assert_eq!(shown(&container, "DevicePolicy"), "strict");
    let allowed = shown(&container, "DeviceAllow");
    let allowed: Vec<&str> = allowed.lines().collect();
    for line in [
        "/dev/char/1:3 rwm",
        "/dev/char/10:229 rw",
        "block-8 r",
        "char-* m",
        "char-136 rwm",
        "/dev/char/5:2 rwm",
    ] {
        assert!(allowed.contains(&line), "{line} is not in {allowed:?}");
    }
    container.start().expect("start");
    assert_eq!(container.exit_status(), 41);
}

#[test]
fn a_container_with_a_terminal_can_use_the_devices_of_terminals() {
    needs!(OurShim);
    let node = Node::shared();
    let fifos = Fifos::new("tty");
    let mut output = fifos.stdout();
    let spec = Spec::sh("[ -t 0 ] && echo hello >/dev/tty; exit 5").terminal();
    let container = node.container("tty", spec).started(&fifos.terminal());
    assert_eq!(shown(&container, "DevicePolicy"), "strict");
    output.until(|bytes| bytes.ends_with(b"hello\r\n"));
    assert_eq!(container.exit_status(), 5);
}

#[test]
fn systemds_device_filter_is_off_where_it_could_be_stricter_than_the_spec() {
    needs!(OurShim);
    let node = Node::shared();
    let all = json!({"devices": [{"allow": true, "access": "rwm"}]});
    let by_minor = json!({"devices": [{"allow": true, "type": "c", "minor": 3, "access": "rwm"}]});
    let specs = [
        ("all devices", Spec::sleeping().resources(all)),
        ("a minor number of all majors", Spec::sleeping().resources(by_minor)),
        ("hooks", Spec::sleeping().hook("createRuntime", "/bin/true")),
    ];
    for (what, spec) in specs {
        let container = node.container("open", spec).started(&Io::default());
        assert_eq!(shown(&container, "DevicePolicy"), "auto", "{what}");
        assert_eq!(shown(&container, "DeviceAllow"), "", "{what}");
    }
}
