//! Runs the fuzz targets on generated inputs that are nearly valid. If a target compares the shim with a model, such inputs
//! find more faults than random bytes do.
//!
//! Every run has the same inputs. `PROPTEST_RNG_SEED` selects other inputs, and `PROPTEST_CASES` sets their number.

use proptest::collection::vec;
use proptest::prelude::*;
use proptest::sample::select;
use proptest::test_runner::RngSeed;

use crate::id::{Namespace, Owner, TaskId, TaskKey};
use crate::oci::resources::DeviceRule;
use crate::oci::{bundle, process, resources};
use crate::task::Task;
use crate::task::lifecycle::Exit;
use crate::task::limits::{Attribute, Limits};
use crate::task::outbox::TaskEvent;

use super::{bus, client, disk, go, mounts, rules, streams};

fn config(cases: u32) -> ProptestConfig {
    let usual = ProptestConfig { failure_persistence: None, ..ProptestConfig::default() };
    let is_asked = |name| std::env::var_os(name).is_some();
    ProptestConfig {
        cases: if is_asked("PROPTEST_CASES") { usual.cases } else { cases },
        rng_seed: if is_asked("PROPTEST_RNG_SEED") { usual.rng_seed } else { RngSeed::Fixed(1) },
        ..usual
    }
}

fn identifier() -> impl Strategy<Value = String> {
    prop_oneof![
        "[a-z0-9]([._-]?[a-zA-Z0-9]){0,5}",
        "[a-z0-9]([._-][a-z0-9]){30,37}",
        "[a-z]{70,76}",
        "[ab]{12}",
        "[ab]{12}0{52}",
        "[ab]{12}0{4}[01]{48}",
    ]
}

fn task() -> impl Strategy<Value = TaskKey> {
    let owner = select(vec!["", "0123456789abcdef", "ffffffffffffffff"]);
    (owner, identifier(), identifier()).prop_map(|(owner, namespace, id)| TaskKey {
        owner: Owner::new(owner).unwrap(),
        namespace: Namespace::new(namespace).unwrap(),
        id: TaskId::new(id).unwrap(),
    })
}

/// The names of a second task. It shares some names with the first task.
fn two_tasks() -> impl Strategy<Value = (TaskKey, TaskKey)> {
    (task(), task(), 0..8_u8).prop_map(|(one, other, same)| {
        let namespace = if same & 1 == 0 { &other } else { &one }.namespace.clone();
        let id = if same & 2 == 0 { &other } else { &one }.id.clone();
        let owner = if same & 4 == 0 { &other } else { &one }.owner.clone();
        (one, TaskKey { owner, namespace, id })
    })
}

fn device_rule() -> impl Strategy<Value = DeviceRule> {
    let number =
        || prop_oneof![Just(None), (-2..12_i64).prop_map(Some), select(vec![136, 200, 4095]).prop_map(Some)];
    let kind = select(vec!["b", "c", "c", "c", "a", ""]).prop_map(str::to_owned);
    let access = select(vec!["r", "w", "m", "rw", "rwm", "mr", "x"]).prop_map(str::to_owned);
    (prop::bool::weighted(0.8), kind, number(), number(), access)
        .prop_map(|(allow, kind, major, minor, access)| DeviceRule { allow, kind, major, minor, access })
}

/// The content of the files of a cgroup as the kernel shows it.
fn limits() -> impl Strategy<Value = Limits> {
    let number = || prop_oneof![Just("max".to_owned()), (0..u64::MAX).prop_map(|number| number.to_string())];
    let quota =
        prop_oneof![Just("max".to_owned()), (1_000..18_000_000_000_u64).prop_map(|quota| quota.to_string())];
    let set = vec(any::<bool>(), 0..70).prop_map(|bits| {
        let mut bytes = vec![0_u8; bits.len().div_ceil(8)];
        for (bit, _) in bits.iter().enumerate().filter(|(_, is_set)| **is_set) {
            bytes[bit / 8] |= 1 << (bit % 8);
        }
        rules::ranges(&bytes)
    });
    let plain = vec(number(), 6);
    (plain, 1..10_000_u32, any::<bool>(), quota, 1_000..=1_000_000_u32, set, 1..=1000_u32, devices_limits())
        .prop_map(|(plain, weight, is_idle, quota, period, set, io_weight, io_max)| {
            let names = [
                Attribute::MemoryMin,
                Attribute::MemoryLow,
                Attribute::MemoryHigh,
                Attribute::MemoryMax,
                Attribute::MemorySwapMax,
                Attribute::Pids,
            ];
            let idle = if is_idle {
                (Attribute::CpuIdle, "1".to_owned())
            } else {
                (Attribute::CpuWeight, weight.to_string())
            };
            let others = [
                idle,
                (Attribute::CpuMax, format!("{quota} {period}")),
                (Attribute::Cpus, set),
                (Attribute::IoWeight, format!("default {io_weight}")),
                (Attribute::IoMax, io_max),
            ];
            names.into_iter().zip(plain).chain(others).collect()
        })
}

/// `io.max`, as the kernel shows it.
fn devices_limits() -> impl Strategy<Value = String> {
    let limit = || prop_oneof![Just("max".to_owned()), (1..u64::MAX).prop_map(|limit| limit.to_string())];
    let device = (select(vec!["8:0", "8:16", "253:0"]), limit(), limit(), limit(), limit());
    vec(device, 0..4).prop_map(|devices| {
        let devices: std::collections::BTreeMap<_, _> = devices
            .into_iter()
            .map(|(device, a, b, c, d)| (device, format!("rbps={a} wbps={b} riops={c} wiops={d}")))
            .filter(|(_, limits)| limits != "rbps=max wbps=max riops=max wiops=max")
            .collect();
        let lines: Vec<_> =
            devices.into_iter().map(|(device, limits)| format!("{device} {limits}")).collect();
        lines.join("\n")
    })
}

/// JSON whose names equal or resemble the names of the fields that the shim reads.
fn json() -> impl Strategy<Value = String> {
    let names = vec![
        "linux",
        "Linux",
        "LINU\\u0058",
        "li\u{17f}t",
        "cgroupsPath",
        "CgroupsPath",
        "cgroup\u{17f}Path",
        "resources",
        "memory",
        "limit",
        "Limit",
        "pids",
        "devices",
        "type",
        "annotations",
        "ANNOTATIONS",
        "a",
        "process",
        "env",
        "args",
        "Args",
        "terminal",
        "hooks",
        "prestart",
        "mounts",
        "options",
        "hostname",
        "hostName",
        "unified",
        "rdma",
        "namespaces",
    ];
    let leaf = select(vec![
        "null",
        "1",
        "-0",
        "1e999",
        "true",
        "\"x\"",
        "\"\\ud800\"",
        "\"\\\\\"",
        "\"shared\"",
        "[]",
        "{}",
    ]);
    leaf.prop_map(str::to_owned).prop_recursive(5, 60, 6, move |inner| {
        let member =
            (select(names.clone()), inner.clone()).prop_map(|(name, value)| format!("\"{name}\":{value}"));
        prop_oneof![
            4 => vec(member, 0..6).prop_map(|members| format!("{{{}}}", members.join(","))),
            1 => vec(inner, 0..3).prop_map(|elements| format!("[{}]", elements.join(","))),
        ]
    })
}

fn event() -> impl Strategy<Value = TaskEvent> {
    let exit = (any::<u32>(), any::<u64>()).prop_map(|(status, at_usec)| Exit { status, at_usec });
    (0..6_u8, any::<u32>(), exit).prop_map(|(kind, pid, exit)| match kind {
        0 => TaskEvent::Created { pid: Some(pid) },
        1 => TaskEvent::Paused,
        2 => TaskEvent::Resumed,
        3 => TaskEvent::OutOfMemory,
        4 => TaskEvent::Exited { pid, exit },
        _ => TaskEvent::Deleted { pid: Some(pid), exit },
    })
}

/// The frames of a connection, with a few broken frames between them.
fn frames() -> impl Strategy<Value = Vec<u8>> {
    let frame = (vec(any::<u8>(), 0..40), 0..4_u32, 0..4_u8, prop::bool::weighted(0.95)).prop_map(
        |(data, stream, kind, is_whole)| {
            let length = if is_whole { data.len() as u32 } else { u32::MAX };
            let mut frame = Vec::new();
            frame.extend(length.to_be_bytes());
            frame.extend(stream.to_be_bytes());
            frame.extend([kind, 0]);
            frame.extend(data);
            frame
        },
    );
    (vec(1..20_u8, 0..7), vec(frame, 0..6)).prop_map(|(sizes, frames)| {
        let count = [u8::try_from(sizes.len()).unwrap()];
        count.into_iter().chain(sizes).chain(frames.into_iter().flatten()).collect()
    })
}

proptest! {
    #![proptest_config(config(300))]

    #[test]
    fn units_have_names_of_their_own((one, other) in two_tasks(), exec in identifier()) {
        client::check_names(&one, &exec);
        client::check_distinct(&one, &other);
    }

    #[test]
    fn processors_are_read_as_by_the_kernel(list in "([0-9]{1,2}|N|all|[-,:/ \n\u{b}]|-[0-9]|:1/[0-9]){0,8}") {
        rules::check_processors(&list);
    }

    #[test]
    fn limits_come_back_from_systemd(limits in limits()) {
        let found = rules::check_limits(&limits);
        assert_eq!(&found, &crate::unit::limits::of_unit(&limits));
        // A quota in whole percents, rounded up.
        let quota = Limits::default_of(Attribute::CpuMax).attributes();
        assert_eq!(found.except(&quota), limits.except(&quota));
    }

    #[test]
    fn limits_of_devices_are_replaced(had in devices_limits(), wanted in devices_limits()) {
        rules::check_devices_limits(&had, &wanted);
    }

    #[test]
    fn mountpoints_come_back_from_the_kernel(path in vec(prop_oneof![1..=255_u8, select(b" \\#\n\t01".to_vec())], 1..30)) {
        mounts::mountinfo(&path);
    }

    #[test]
    fn layers_keep_their_places(layers in vec("(/[ab.]{1,2}){1,3}([\\\\]?[:,])?", 1..6), others in "(index=off|lowerdir=/x|upperdir=/a)?") {
        mounts::check_short_names(&[others, format!("lowerdir={}", layers.join(":"))]);
    }

    #[test]
    fn json_is_read_as_by_runc(text in json()) {
        for shape in [bundle::SHAPE, process::SHAPE, resources::SHAPE] {
            let _ = go::check(text.as_bytes(), &shape);
        }
    }

    #[test]
    fn pieces_of_a_stream_do_not_matter(data in frames()) {
        client::frame(&data);
    }

    #[test]
    fn only_signals_of_systemd_are_believed(choices in vec(0..6_u8, 8), text in "([0-9]{0,3}|containerd-a-b.service|:1.9)(\n([0-9]{0,3}|done)){0,6}") {
        bus::message(&[choices, text.into_bytes()].concat());
    }

    #[test]
    fn containers_notify_only_for_themselves(lines in vec(("(READY|STATUS|MAINPID|RELOADING|MONOTONIC_USEC|EXTEND_TIMEOUT_USEC|FDSTORE|X)?=?", "(1|\\PC{0,20}|x{250}\\PC{5}|\\r?|[0-9]{1,20})"), 0..20)) {
        let lines: Vec<_> = lines.into_iter().map(|(name, value)| name + &value).collect();
        streams::notify(lines.join("\n").as_bytes());
    }
}

proptest! {
    // These targets are slower, so they get fewer inputs.
    #![proptest_config(config(60))]

    #[test]
    fn the_unit_allows_what_runc_allows(all in vec(device_rule(), 0..6)) {
        rules::check_devices(&all);
    }

    #[test]
    fn a_saved_record_can_be_loaded(key in task(), events in vec((event(), any::<u64>()), 0..200), name in "\\PC{0,40}") {
        let mut task: Task = serde_json::from_slice(include_bytes!("../../fuzz/corpus/record/task")).unwrap();
        task.key = key;
        task.init.description.clone_from(&name);
        task.init.stdio.stdin = name;
        events.into_iter().for_each(|(event, at)| task.outbox.push(event, at));
        disk::check_record(&task);
    }
}
