use serde_json::json;

use super::*;

fn parse(value: &Value) -> Result<Resources, Error> {
    Resources::parse(value.to_string().as_bytes())
}

fn check(value: &Value) -> Result<(), Error> {
    parse(value)?.check()
}

fn assert_accepted(values: &[Value]) {
    for value in values {
        assert!(check(value).is_ok(), "{value}: {:?}", check(value));
    }
}

/// Each is refused with an error that names the field and the value.
fn assert_refused(cases: &[(Value, &str, &str)]) {
    for (value, field, shown) in cases {
        let text = check(value).expect_err(&value.to_string()).to_string();
        let named = text.starts_with(&format!("linux.resources.{field} "));
        assert!(named && text.ends_with(&format!("but is {shown}")), "{value}: {text}");
    }
}

#[test]
fn resources_without_limits_are_accepted() {
    assert_accepted(&[
        json!({}),
        json!(null),
        json!({"memory": null, "cpu": null, "pids": null, "blockIO": null, "devices": null, "unified": null}),
        json!({"memory": {"limit": null, "future": "x"}, "cpu": {}, "hugepageLimits": [], "later": [1, {}]}),
    ]);
    assert_eq!(parse(&json!({})).unwrap(), Resources::default());
}

#[test]
fn invalid_json_is_an_error() {
    for text in ["", "{", "\"x", "{\"memory\":}"] {
        assert!(matches!(Resources::parse(text.as_bytes()), Err(Error::Malformed(_))), "{text:?}");
    }
}

#[test]
fn a_value_of_the_wrong_type_is_named() {
    assert_refused(&[
        (json!({"memory": {"limit": "64m"}}), "memory.limit", "\"64m\""),
        (json!({"memory": {"limit": 1.5}}), "memory.limit", "1.5"),
        (json!({"memory": 7}), "memory", "7"),
        (json!({"cpu": {"shares": -1}}), "cpu.shares", "-1"),
        (json!({"cpu": {"cpus": 1}}), "cpu.cpus", "1"),
        (json!({"cpu": {"quota": 1_u64 << 63}}), "cpu.quota", "9223372036854775808"),
        (json!({"blockIO": {"weight": 65536}}), "blockIO.weight", "65536"),
        (json!({"devices": {}}), "devices", "{}"),
        (json!({"devices": [{"access": "r"}, {"allow": 1}]}), "devices[1].allow", "1"),
        (json!({"unified": {"memory.high": 5}}), "unified.memory.high", "5"),
    ]);
}

#[test]
fn a_signed_integer_can_be_minus_zero() {
    let text =
        r#"{"pids":{"limit":-0},"memory":{"limit":-0},"cpu":{"quota":-0},"devices":[{"major":-0}],"x":-0}"#;
    let read = Resources::parse(text.as_bytes()).unwrap();
    assert_eq!((read.pids_limit, read.memory.limit, read.cpu.quota), (Some(0), Some(0), Some(0)));
    let written =
        r#"{"pids":{"limit":0},"memory":{"limit":0},"cpu":{"quota":0},"devices":[{"major":0}],"x":-0}"#;
    assert_eq!(canonical(text.as_bytes()).unwrap(), written);
    // Go refuses these.
    for (text, field) in [
        (r#"{"pids":{"limit":-0.0}}"#, "pids.limit"),
        (r#"{"pids":{"limit":-0e0}}"#, "pids.limit"),
        (r#"{"cpu":{"shares":-0}}"#, "cpu.shares"),
    ] {
        let refused = Resources::parse(text.as_bytes()).unwrap_err().to_string();
        assert!(refused.contains(field), "{refused}");
    }
}

#[test]
fn memory_limits_are_unset_unlimited_or_bytes() {
    for field in ["limit", "reservation"] {
        for bytes in [-1, 0, 1, i64::MAX] {
            assert_accepted(&[json!({"memory": {field: bytes}})]);
        }
        let name = format!("memory.{field}");
        assert_refused(&[
            (json!({"memory": {field: -2}}), &name, "-2"),
            (json!({"memory": {field: i64::MIN}}), &name, "-9223372036854775808"),
        ]);
    }
}

#[test]
fn swap_is_memory_and_swap_together() {
    assert_accepted(&[
        json!({"memory": {"limit": 100, "swap": 100}}),
        json!({"memory": {"limit": 100, "swap": 101}}),
        json!({"memory": {"limit": 100, "swap": -1}}),
        json!({"memory": {"limit": 100, "swap": 0}}),
        json!({"memory": {"limit": -1, "swap": 5}}),
        json!({"memory": {"swap": -1}}),
        json!({"memory": {"swap": 0}}),
    ]);
    assert_refused(&[
        (json!({"memory": {"limit": 100, "swap": 99}}), "memory.swap", "99"),
        (json!({"memory": {"swap": 100}}), "memory.swap", "100"),
        (json!({"memory": {"limit": 0, "swap": 100}}), "memory.swap", "100"),
        (json!({"memory": {"limit": 100, "swap": -2}}), "memory.swap", "-2"),
    ]);
}

#[test]
fn any_shares_are_brought_into_range_by_runc() {
    for shares in [0, 1, 2, 1024, 262_144, u64::MAX] {
        assert_accepted(&[json!({"cpu": {"shares": shares}})]);
    }
}

#[test]
fn a_quota_is_a_millisecond_or_more() {
    for quota in [i64::MIN, -1, 0, 1000, 1_000_000_000] {
        assert_accepted(&[json!({"cpu": {"quota": quota}})]);
    }
    assert_refused(&[
        (json!({"cpu": {"quota": 1}}), "cpu.quota", "1"),
        (json!({"cpu": {"quota": 999}}), "cpu.quota", "999"),
    ]);
}

#[test]
fn a_period_is_from_a_millisecond_to_a_second() {
    for period in [0, 1000, 100_000, 1_000_000] {
        assert_accepted(&[json!({"cpu": {"period": period}})]);
    }
    assert_refused(&[
        (json!({"cpu": {"period": 999}}), "cpu.period", "999"),
        (json!({"cpu": {"period": 1_000_001}}), "cpu.period", "1000001"),
    ]);
}

#[test]
fn a_burst_fits_into_the_quota() {
    assert_accepted(&[
        json!({"cpu": {"quota": 20_000, "burst": 20_000}}),
        json!({"cpu": {"quota": -1, "burst": 20_000}}),
        json!({"cpu": {"burst": 20_000}}),
    ]);
    assert_refused(&[(json!({"cpu": {"quota": 20_000, "burst": 20_001}}), "cpu.burst", "20001")]);
}

#[test]
fn idle_is_off_or_on() {
    assert_accepted(&[json!({"cpu": {"idle": 0}}), json!({"cpu": {"idle": 1}})]);
    assert_refused(&[
        (json!({"cpu": {"idle": 2}}), "cpu.idle", "2"),
        (json!({"cpu": {"idle": -1}}), "cpu.idle", "-1"),
    ]);
}

#[test]
fn fields_of_cgroup_v1_are_ignored() {
    assert_accepted(&[
        json!({"cpu": {"realtimeRuntime": 950_000, "realtimePeriod": 1}}),
        json!({"memory": {"kernel": -7, "kernelTCP": -7, "swappiness": 1000, "disableOOMKiller": true}}),
        json!({"blockIO": {"leafWeight": 7, "weightDevice": [{"major": -1, "minor": 0, "weight": 5000}]}}),
        json!({"network": {"classID": 1, "priorities": [{"name": "eth0", "priority": 500}]}}),
    ]);
}

#[test]
fn processors_and_memory_nodes_are_lists() {
    for field in ["cpus", "mems"] {
        assert_accepted(&[json!({"cpu": {field: "0-1"}}), json!({"cpu": {field: ""}})]);
        let name = format!("cpu.{field}");
        assert_refused(&[(json!({"cpu": {field: "zero"}}), &name, "\"zero\"")]);
    }
}

#[test]
fn any_number_of_tasks_may_be_asked_for() {
    for limit in [-2, -1, 0, 1, i64::MAX] {
        assert_accepted(&[json!({"pids": {"limit": limit}})]);
    }
}

#[test]
fn a_block_io_weight_is_at_most_1000() {
    for weight in [0, 1, 10, 1000] {
        assert_accepted(&[json!({"blockIO": {"weight": weight}})]);
    }
    assert_refused(&[(json!({"blockIO": {"weight": 1001}}), "blockIO.weight", "1001")]);
}

#[test]
fn a_throttle_has_a_device_and_a_rate() {
    for list in THROTTLES {
        assert_accepted(&[json!({"blockIO": {list: [{"major": 8, "minor": 0, "rate": 1}]}})]);
        let field = |part: &str| format!("blockIO.{list}[1].{part}");
        let second = |item: Value| json!({"blockIO": {list: [{"major": 8, "minor": 0, "rate": 1}, item]}});
        assert_refused(&[
            (second(json!({"major": 8, "minor": 0, "rate": 0})), &field("rate"), "0"),
            (second(json!({"major": -1, "minor": 0, "rate": 9})), &field("major"), "-1"),
            (second(json!({"major": 8, "minor": 1_u64 << 32, "rate": 9})), &field("minor"), "4294967296"),
        ]);
    }
}

#[test]
fn huge_pages_have_sizes_as_the_kernel_writes_them() {
    for size in ["64KB", "2MB", "1GB", "512MB"] {
        assert_accepted(&[json!({"hugepageLimits": [{"pageSize": size, "limit": 0}]})]);
    }
    for size in ["", "2M", "2mb", "MB", "02MB", "2 MB", "../2MB"] {
        let limits = json!({"hugepageLimits": [{"pageSize": size, "limit": 0}]});
        assert_refused(&[(limits, "hugepageLimits[0].pageSize", &format!("{size:?}"))]);
    }
}

#[test]
fn unified_keys_are_names_of_files() {
    for key in ["memory.high", "cgroup.max.descendants", "hugetlb.2MB.max", "misc.max", "cpu.pressure"] {
        assert_accepted(&[json!({"unified": {key: "1"}})]);
    }
    for key in ["cgroup.procs", "cgroup.threads", "", "memory", "a/memory.high", "..", "memory.", ".high"] {
        assert_refused(&[(json!({"unified": {key: "1"}}), "unified", &format!("{key:?}"))]);
    }
}

#[test]
fn device_rules_have_a_type_and_some_access() {
    assert_accepted(&[
        json!({"devices": [{"allow": false, "access": "rwm"}]}),
        json!({"devices": [{"allow": true, "type": "c", "major": 1, "minor": 3, "access": "rwm"}]}),
        json!({"devices": [{"allow": true, "type": "b", "major": -1, "minor": -1, "access": "m"}]}),
        json!({"devices": [{"allow": true, "type": "a", "major": 1_u64 << 40, "access": "r"}]}),
        // runc skips letters that it does not know.
        json!({"devices": [{"allow": true, "type": "c", "access": "x"}]}),
    ]);
    assert_refused(&[
        (json!({"devices": [{"allow": true, "type": "c"}]}), "devices[0].access", "empty"),
        (json!({"devices": [{"type": "p", "access": "r"}]}), "devices[0].type", "\"p\""),
        (
            json!({"devices": [{"type": "c", "major": 1_u64 << 32, "access": "r"}]}),
            "devices[0].major",
            "4294967296",
        ),
        (
            json!({"devices": [{"type": "b", "minor": 1_u64 << 32, "access": "r"}]}),
            "devices[0].minor",
            "4294967296",
        ),
    ]);
}

#[test]
fn the_last_of_two_fields_of_one_name_counts() {
    let resources = Resources::parse(br#"{"pids":{"limit":1},"pids":{"limit":2}}"#).unwrap();
    assert_eq!(resources.pids_limit, Some(2));
}

fn missing(value: &Value, available: &str) -> Option<(String, String)> {
    let checked = parse(value).unwrap().check_controllers(available);
    assert!(matches!(checked, Ok(()) | Err(Error::NoController { .. })), "{value}: {checked:?}");
    match checked {
        Err(Error::NoController { field, controller }) => Some((field, controller)),
        _ => None,
    }
}

#[test]
fn a_controller_that_is_missing_is_named_with_the_field_that_needs_it() {
    let cases = [
        (json!({"memory": {"limit": 1}}), "memory.limit", "memory"),
        (json!({"memory": {"limit": -1}}), "memory.limit", "memory"),
        (json!({"memory": {"reservation": 1}}), "memory.reservation", "memory"),
        (json!({"cpu": {"shares": 1024}}), "cpu.shares", "cpu"),
        (json!({"cpu": {"quota": -1}}), "cpu.quota", "cpu"),
        (json!({"cpu": {"period": 1000}}), "cpu.period", "cpu"),
        (json!({"cpu": {"cpus": "0"}}), "cpu.cpus", "cpuset"),
        (json!({"cpu": {"mems": "0"}}), "cpu.mems", "cpuset"),
        (json!({"pids": {"limit": 1}}), "pids.limit", "pids"),
        (json!({"blockIO": {"weight": 10}}), "blockIO.weight", "io"),
        (
            json!({"blockIO": {"throttleReadIOPSDevice": [{"rate": 1}]}}),
            "blockIO.throttleReadIOPSDevice[0]",
            "io",
        ),
        (json!({"hugepageLimits": [{"pageSize": "2MB"}]}), "hugepageLimits", "hugetlb"),
        (json!({"rdma": {"mlx5_1": {"hcaHandles": 3}}}), "rdma", "rdma"),
        (json!({"unified": {"memory.high": "1"}}), "unified[\"memory.high\"]", "memory"),
    ];
    for (value, field, controller) in cases {
        let found = missing(&value, "perf_event other\n");
        assert_eq!(found, Some((format!("linux.resources.{field}"), controller.to_owned())), "{value}");
        assert_eq!(missing(&value, "cpuset cpu io memory hugetlb pids rdma misc\n"), None, "{value}");
    }
}

#[test]
fn limits_that_runc_applies_without_a_controller_need_none() {
    for value in [
        json!({}),
        json!({"memory": {"limit": 0, "reservation": 0, "swap": -1}}),
        json!({"cpu": {"shares": 0, "quota": 0, "period": 0, "cpus": "", "burst": 0, "idle": 1}}),
        json!({"pids": {"limit": 0}}),
        json!({"pids": {"limit": -1}}),
        json!({"blockIO": {"weight": 0}}),
        json!({"devices": [{"allow": false, "access": "rwm"}]}),
        json!({"unified": {"cgroup.max.depth": "1", "memory.pressure": "some 150000 1000000"}}),
    ] {
        assert_eq!(missing(&value, ""), None, "{value}");
    }
}
