//! Device rules that an agent on the node changes in a container's cgroup, as agents for GPUs and VMs do.

use serde_json::json;

use crate::common::container::Container;
use crate::common::node::Node;
use crate::common::spec::Spec;
use crate::common::task::Io;
use crate::common::{bpf, cgroup, process, systemd};
use crate::runtime_options::GenericOptions;

/// A container that may use only the usual devices, with these options of the runtime.
fn container<'n>(node: &'n Node, options: &str) -> Container<'n> {
    let rules = json!({"devices": [{"allow": false, "access": "rwm"}]});
    let spec = Spec::sleeping().resources(rules);
    let options = GenericOptions { config_body: options.to_string(), ..Default::default() };
    node.container("agent", spec).options(options.to_any()).started(&Io::default())
}

/// Whether a process of the container can open a device: the kernel's log, for writing.
fn opens_device(container: &Container) -> bool {
    container.exec_sh("[ -c /log ] || mknod /log c 1 11 || exit 2; : >/log").exit_status() == 0
}

#[test]
fn an_agents_device_rules_take_effect_where_the_unit_has_none() {
    needs!(OurShim);
    let node = Node::shared();
    let open = container(&node, "[Properties]\nDevicePolicy = \"'auto'\"\nDeviceAllow = \"@a(ss) []\"\n");
    assert!(!opens_device(&open));
    assert_ne!(bpf::allow_all_devices(&cgroup::of(open.pid())), 0);
    assert!(opens_device(&open));
    // A reload lets systemd apply the rules of units once more.
    process::succeed("systemctl", &["daemon-reload"]);
    assert!(opens_device(&open));
}

#[test]
fn the_units_device_rules_hold_whatever_an_agent_does() {
    needs!(OurShim);
    let node = Node::shared();
    let strict = container(&node, "");
    assert_ne!(bpf::allow_all_devices(&cgroup::of(strict.pid())), 0);
    assert!(!opens_device(&strict));
}

/// systemctl changes the filter of the unit only, as under containerd-shim-runc-v2 with units.
#[test]
fn an_agent_that_opens_the_unit_and_the_cgroup_opens_a_device() {
    needs!(OurShim);
    let node = Node::shared();
    let strict = container(&node, "");
    let unit = systemd::unit_of(&strict);
    process::succeed("systemctl", &["set-property", "--runtime", &unit, "DeviceAllow=/dev/char/1:11 rwm"]);
    assert!(!opens_device(&strict));
    assert_ne!(bpf::allow_all_devices(&cgroup::of(strict.pid())), 0);
    assert!(opens_device(&strict));
    process::succeed("systemctl", &["daemon-reload"]);
    assert!(opens_device(&strict));
}
