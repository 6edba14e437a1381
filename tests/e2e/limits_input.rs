//! Impossible limits and slices: each gets the right code and a text that names the mistake, and leaves nothing
//! behind. Values that runc accepts are accepted.

use serde_json::{Value, json};
use ttrpc::Code;

use crate::common::leaks::{self, Traces};
use crate::common::node::{Need, Node, unique};
use crate::common::shim::{Bundle, Shim};
use crate::common::spec::Spec;
use crate::common::systemd::{self, Masked};
use crate::common::task::Io;

/// Creates a container with an invalid spec, and returns the error.
fn refusal(shim: &Shim, spec: &Spec) -> (Code, String) {
    let bundle = Bundle::new("limits");
    bundle.write_config(&spec.to_json());
    shim.create(bundle.request(&unique("limits"))).expect_err("an invalid spec")
}

/// Asserts that each is refused with this code and a text that begins with the field, and leaves nothing behind.
fn assert_refused(code: Code, cases: &[(Value, &str)]) {
    let node = Node::exclusive();
    let shim = Shim::connect(&node);
    let before = Traces::take();
    for (resources, field) in cases {
        let (got, text) = refusal(&shim, &Spec::sleeping().resources(resources.clone()));
        assert_eq!(got, code, "{resources}: {text}");
        assert!(text.starts_with(&format!("linux.resources.{field} ")), "{resources}: {text}");
    }
    leaks::assert_none("invalid limits", &before);
}

/// Values that no kernel and no runc accepts, each with the field that the error has to name.
fn impossible() -> Vec<(Value, &'static str)> {
    vec![
        (json!({"memory": {"limit": -2}}), "memory.limit"),
        (json!({"memory": {"limit": "64m"}}), "memory.limit"),
        (json!({"memory": {"reservation": -5}}), "memory.reservation"),
        (json!({"memory": {"swap": 1 << 30}}), "memory.swap"),
        (json!({"memory": {"limit": 1 << 30, "swap": 1 << 20}}), "memory.swap"),
        (json!({"cpu": {"shares": -1}}), "cpu.shares"),
        (json!({"cpu": {"quota": 500}}), "cpu.quota"),
        (json!({"cpu": {"period": 999}}), "cpu.period"),
        (json!({"cpu": {"period": 2_000_000}}), "cpu.period"),
        (json!({"cpu": {"cpus": "3-1"}}), "cpu.cpus"),
        (json!({"cpu": {"cpus": "0-1:1"}}), "cpu.cpus"),
        (json!({"cpu": {"mems": "zero"}}), "cpu.mems"),
        (json!({"pids": {"limit": "many"}}), "pids.limit"),
        (json!({"blockIO": {"weight": 1001}}), "blockIO.weight"),
        (
            json!({"blockIO": {"throttleWriteBpsDevice": [{"major": 8, "minor": 0, "rate": 0}]}}),
            "blockIO.throttleWriteBpsDevice[0].rate",
        ),
        (json!({"hugepageLimits": [{"pageSize": "2 megabytes", "limit": 0}]}), "hugepageLimits[0].pageSize"),
        (json!({"unified": {"../cgroup.procs": "0"}}), "unified"),
        (json!({"unified": {"memory": "0"}}), "unified"),
        (json!({"devices": [{"allow": true, "type": "p", "access": "r"}]}), "devices[0].type"),
        (json!({"devices": [{"allow": true, "type": "c"}]}), "devices[0].access"),
        (
            json!({"devices": [{"allow": true, "type": "c", "major": 1_u64 << 32, "access": "r"}]}),
            "devices[0].major",
        ),
    ]
}

#[test]
fn a_limit_that_the_kernel_refuses_is_named() {
    needs!(OurShim);
    let mut cases = impossible();
    // runc 1.1 does not know these two.
    cases.push((json!({"cpu": {"quota": 10_000, "burst": 10_001}}), "cpu.burst"));
    cases.push((json!({"cpu": {"idle": 2}}), "cpu.idle"));
    assert_refused(Code::INVALID_ARGUMENT, &cases);
}

/// Values that work with the stock shim must not be refused.
#[test]
fn a_limit_that_we_refuse_fails_under_every_shim() {
    needs!(Controllers);
    let node = Node::shared();
    for (resources, _) in impossible() {
        let container = node.container("impossible", Spec::sleeping().resources(resources.clone())).make();
        assert!(container.create(&Io::default()).is_err(), "{resources}");
    }
}

#[test]
fn a_limit_whose_controller_is_missing_is_named_with_it() {
    needs!(OurShim);
    let mut cases = vec![(json!({"unified": {"e2e.max": "1"}}), "unified[\"e2e.max\"]")];
    if Need::Controllers.missing().is_some() {
        cases.extend([
            (json!({"memory": {"limit": 1 << 30}}), "memory.limit"),
            (json!({"cpu": {"shares": 1024}}), "cpu.shares"),
            (json!({"pids": {"limit": 100}}), "pids.limit"),
        ]);
    }
    assert_refused(Code::FAILED_PRECONDITION, &cases);
}

#[test]
fn limits_that_runc_accepts_are_accepted() {
    let node = Node::shared();
    let resources = json!({
        "memory": {"limit": 0, "kernel": -7, "kernelTCP": -7, "swappiness": 60, "disableOOMKiller": false},
        "cpu": {"shares": 0, "quota": 0, "period": 0, "cpus": "", "realtimeRuntime": 1, "realtimePeriod": 1},
        "pids": {"limit": 0},
        "blockIO": {"weight": 0, "leafWeight": 1, "weightDevice": []},
        "devices": [
            {"allow": false, "access": "rwm"},
            {"allow": true, "type": "c", "major": 10, "minor": 229, "access": "rx"},
        ],
        "network": {},
        "unified": {"cgroup.max.descendants": "max"},
        "future": {"limit": "unknown"},
    });
    let spec = Spec::sh("cat /dev/null && exit 21").resources(resources);
    let container = node.container("taken", spec).started(&Io::default());
    assert_eq!(container.exit_status(), 21);
}

#[test]
fn a_masked_slice_is_named() {
    needs!(OurShim);
    let node = Node::exclusive();
    let shim = Shim::connect(&node);
    let _masked = Masked::new("e2emasked.slice");
    // The daemon keeps what it makes for its first container.
    node.container("warm", Spec::sleeping()).started(&Io::default()).end();
    let before = Traces::take();
    for slice in ["e2emasked.slice", "e2emasked-below.slice"] {
        let (code, text) = refusal(&shim, &Spec::sleeping().cgroups_path(&format!("{slice}:e2e:masked")));
        assert_eq!(code, Code::FAILED_PRECONDITION, "{slice}: {text}");
        assert!(text.contains("e2emasked.slice is masked"), "{slice}: {text}");
    }
    leaks::assert_none("masked slices", &before);
}

#[test]
fn an_impossible_slice_is_named() {
    needs!(OurShim);
    let node = Node::exclusive();
    let shim = Shim::connect(&node);
    // The daemon keeps what it makes for its first container.
    node.container("warm", Spec::sleeping()).started(&Io::default()).end();
    let before = Traces::take();
    let long = format!("{}.slice", "x".repeat(260));
    for slice in ["a--b.slice", "-a.slice", "a-.slice", "a/b.slice", ".slice", "no-slice.service", &long] {
        let (code, text) = refusal(&shim, &Spec::sleeping().cgroups_path(&format!("{slice}:e2e:x")));
        assert_eq!(code, Code::INVALID_ARGUMENT, "{slice}: {text}");
        assert!(text.contains(&slice[..slice.len().min(80)]), "{slice}: {text}");
    }
    leaks::assert_none("slices that can't be", &before);
}

#[test]
fn a_slice_that_does_not_exist_yet_is_made() {
    needs!(OurShim);
    let node = Node::shared();
    let slice = "e2emade-below.slice";
    assert!(systemd::list_units("e2emade*").is_empty());
    let spec = Spec::sleeping().cgroups_path(&format!("{slice}:e2e:made"));
    let container = node.container("made", spec).started(&Io::default());
    assert_eq!(systemd::property(&systemd::unit_of(&container), "Slice"), slice);
    for made in ["e2emade.slice", slice] {
        assert!(systemd::is_active(made), "{made}");
    }
}
