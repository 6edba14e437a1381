//! Statistics: each field has the value of the kernel's file in the container's cgroup, and is a field that the stock
//! shim reports.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use containerd_shim_protos::api::StatsRequest;
use containerd_shim_protos::cgroups_v2::metrics::Metrics;
use containerd_shim_protos::protobuf::reflect::ReflectValueRef;
use containerd_shim_protos::protobuf::{Message, MessageDyn};
use serde_json::json;
use ttrpc::Code;

use crate::common::container::Container;
use crate::common::node::{Node, OUR_RUNTIME, STOCK_RUNTIME};
use crate::common::process;
use crate::common::shim::Shim;
use crate::common::spec::Spec;
use crate::common::stdio::Fifos;
use crate::common::systemd;
use crate::common::task::{Io, SIGKILL};
use crate::common::wait;

const TYPE_URL: &str = "io.containerd.cgroups.v2.Metrics";

/// The limits: the same under every runtime.
const LIMITS: [&str; 4] = ["pids.limit", "memory.usage_limit", "memory.swap_limit", "rdma.limit["];

/// Fields that depend on the order of the tests, on the moment or on the machine: the stock shim may report one that
/// ours does not. Every other number that is not zero in the answer of the stock shim is not zero in ours.
const ACCIDENTAL: [&str; 21] = [
    ".psi.",
    "io.usage[",
    "memory.file_mapped",
    "memory.file_dirty",
    "memory.file_writeback",
    "memory.active_file",
    "memory.unevictable",
    "memory.anon_thp",
    "memory.pgmajfault",
    "memory.workingset_refault",
    "memory.workingset_activate",
    "memory.workingset_nodereclaim",
    "memory.pgrefill",
    "memory.pgscan",
    "memory.pgsteal",
    "memory.pgactivate",
    "memory.pgdeactivate",
    "memory.pglazyfree",
    "memory.pglazyfreed",
    "memory.thp_fault_alloc",
    "memory.thp_collapse_alloc",
];

/// Keys that are fields of the message by the same name.
const CPU_STAT: [&str; 8] = [
    "usage_usec",
    "user_usec",
    "system_usec",
    "nr_periods",
    "nr_throttled",
    "throttled_usec",
    "nr_bursts",
    "burst_usec",
];
const MEMORY_STAT: [&str; 31] = [
    "anon",
    "file",
    "kernel_stack",
    "slab",
    "sock",
    "shmem",
    "file_mapped",
    "file_dirty",
    "file_writeback",
    "anon_thp",
    "inactive_anon",
    "active_anon",
    "inactive_file",
    "active_file",
    "unevictable",
    "slab_reclaimable",
    "slab_unreclaimable",
    "pgfault",
    "pgmajfault",
    "workingset_refault",
    "workingset_activate",
    "workingset_nodereclaim",
    "pgrefill",
    "pgscan",
    "pgsteal",
    "pgactivate",
    "pgdeactivate",
    "pglazyfree",
    "pglazyfreed",
    "thp_fault_alloc",
    "thp_collapse_alloc",
];
const MEMORY_EVENTS: [&str; 6] = ["low", "high", "max", "oom", "oom_kill", "oom_group_kill"];
const BLOCK_DEVICE: [&str; 4] = ["rbytes", "wbytes", "rios", "wios"];

/// Files that hold one number.
const FILES: [(&str, &str); 8] = [
    ("pids.current", "pids.current"),
    ("pids.limit", "pids.max"),
    ("memory.usage", "memory.current"),
    ("memory.usage_limit", "memory.max"),
    ("memory.max_usage", "memory.peak"),
    ("memory.swap_usage", "memory.swap.current"),
    ("memory.swap_limit", "memory.swap.max"),
    ("memory.swap_max_usage", "memory.swap.peak"),
];

/// A message as a map from the paths of its fields to their values. The expected message has the same form.
#[derive(Debug, Default)]
struct Flat {
    /// The messages in this message.
    parts: BTreeSet<String>,
    /// Averages in hundredths.
    numbers: BTreeMap<String, u64>,
}

impl Flat {
    fn of_message(metrics: &Metrics) -> Flat {
        let mut flat = Flat::default();
        flat.add("", metrics);
        flat
    }

    /// Adds all fields of a message, also those that are zero. Names and numbers of devices go into paths.
    fn add(&mut self, path: &str, message: &dyn MessageDyn) {
        for field in message.descriptor_dyn().fields() {
            let path = format!("{path}{}", field.name());
            if field.is_repeated() {
                for item in field.get_repeated(message) {
                    let ReflectValueRef::Message(item) = item else { panic!("{path} is of messages") };
                    self.add(&format!("{path}[{}].", name_of(&*item)), &*item);
                }
                continue;
            }
            match field.get_singular_field_or_default(message) {
                ReflectValueRef::U32(number) => self.set(path, number.into()),
                ReflectValueRef::U64(number) => self.set(path, number),
                ReflectValueRef::F64(average) => self.set(path, hundredths(average)),
                ReflectValueRef::String(_) => {}
                ReflectValueRef::Message(inner) => {
                    if field.has_field(message) {
                        self.add(&format!("{path}."), &*inner);
                        self.parts.insert(path);
                    }
                }
                other => panic!("{path} is {other}"),
            }
        }
    }

    /// The expected message, from the cgroup's files.
    fn of_cgroup(dir: &Path) -> Flat {
        let files = Files(dir);
        let mut flat = Flat::default();
        flat.parts.extend(["pids", "cpu", "memory", "rdma", "io"].map(str::to_string));
        for (path, file) in FILES {
            flat.set(path, number(&files.text(file)));
        }
        flat.keyed("cpu", &CPU_STAT, &files.text("cpu.stat"));
        flat.keyed("memory", &MEMORY_STAT, &files.text("memory.stat"));
        // A container's unit has the same limit, and reaches it first.
        let is_in_unit =
            dir.parent().is_some_and(|parent| parent.extension().is_some_and(|end| end == "service"));
        let events = files.text(if is_in_unit { "../memory.events" } else { "memory.events" });
        if !events.is_empty() {
            flat.parts.insert("memory_events".to_string());
            flat.keyed("memory_events", &MEMORY_EVENTS, &events);
        }
        for part in ["cpu", "memory", "io"] {
            flat.pressure(part, &files);
        }
        for line in files.text("io.stat").lines().filter(|line| line.contains('=')) {
            let (device, numbers) = line.split_once(' ').expect("a device and its numbers");
            let path = format!("io.usage[{device}]");
            let (major, minor) = device.split_once(':').expect("a device's number");
            flat.set(format!("{path}.major"), number(major));
            flat.set(format!("{path}.minor"), number(minor));
            flat.keyed(&path, &BLOCK_DEVICE, &numbers.replace(' ', "\n").replace('=', " "));
        }
        for (list, file) in [("rdma.current", "rdma.current"), ("rdma.limit", "rdma.max")] {
            for line in files.text(file).lines() {
                let (device, numbers) = line.split_once(' ').expect("a device and its numbers");
                for pair in numbers.split_whitespace() {
                    let (name, count) = pair.split_once('=').expect("a name and its number");
                    let count = number(count).min(u32::MAX.into());
                    flat.set(format!("{list}[{device}].{name}s"), count);
                }
            }
        }
        for size in page_sizes() {
            let path = format!("hugetlb[{size}]");
            flat.set(format!("{path}.current"), number(&files.text(&format!("hugetlb.{size}.current"))));
            flat.set(format!("{path}.max"), number(&files.text(&format!("hugetlb.{size}.max"))));
            let events = files.text(&format!("hugetlb.{size}.events"));
            flat.set(format!("{path}.failcnt"), value(&events, "max"));
        }
        flat
    }

    fn set(&mut self, path: impl Into<String>, number: u64) {
        self.numbers.insert(path.into(), number);
    }

    fn keyed(&mut self, path: &str, keys: &[&str], text: &str) {
        for key in keys {
            self.set(format!("{path}.{key}"), value(text, key));
        }
    }

    fn pressure(&mut self, part: &str, files: &Files) {
        let Some(text) = files.read(&format!("{part}.pressure")) else { return };
        self.parts.insert(format!("{part}.psi"));
        for line in text.lines() {
            let (who, numbers) = line.split_once(' ').expect("who waits, and how long");
            let path = format!("{part}.psi.{who}");
            for pair in numbers.split(' ') {
                let (name, value) = pair.split_once('=').expect("a name and its value");
                let is_total = name == "total";
                let value = if is_total { number(value) } else { hundredths(value.parse().expect(name)) };
                self.set(format!("{path}.{name}"), value);
            }
            self.parts.insert(path);
        }
    }

    fn paths(&self) -> BTreeSet<&String> {
        self.numbers.keys().collect()
    }

    /// The fields whose values are not between those before and those after.
    fn faults(&self, before: &Flat, after: &Flat) -> Vec<String> {
        if (&self.parts, self.paths()) != (&before.parts, before.paths()) {
            return vec![format!("fields differ: {:?}, {:?}", self.parts, before.parts)];
        }
        let wrong = |(path, number): (&String, &u64)| {
            let (first, second) = (before.numbers[path], *after.numbers.get(path)?);
            let range = first.min(second)..=first.max(second);
            (!range.contains(number)).then(|| format!("{path} is {number}, not in {range:?}"))
        };
        self.numbers.iter().filter_map(wrong).collect()
    }

    fn number(&self, path: &str) -> u64 {
        *self.numbers.get(path).unwrap_or_else(|| panic!("no {path}"))
    }
}

/// The key of an item in a list: a device or a page size.
fn name_of(item: &dyn MessageDyn) -> String {
    let fields = item.descriptor_dyn();
    let text = |name| Some(fields.field_by_name(name)?.get_singular_field_or_default(item).to_string());
    match text("device").or_else(|| text("pagesize")) {
        Some(name) => name.trim_matches('"').to_string(),
        None => format!("{}:{}", text("major").expect("a number"), text("minor").expect("a number")),
    }
}

struct Files<'d>(&'d Path);

impl Files<'_> {
    fn read(&self, name: &str) -> Option<String> {
        fs::read_to_string(self.0.join(name)).ok()
    }

    fn text(&self, name: &str) -> String {
        self.read(name).unwrap_or_default()
    }
}

/// The number in a file; 0 where there is no such file.
fn number(text: &str) -> u64 {
    match text.trim() {
        "" => 0,
        "max" => u64::MAX,
        digits => digits.parse().unwrap_or_else(|error| panic!("{digits:?}: {error}")),
    }
}

/// The value of a key; 0 where there is no such key.
fn value(text: &str, key: &str) -> u64 {
    let found = text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(' '));
    number(found.unwrap_or_default())
}

fn hundredths(average: f64) -> u64 {
    (average * 100.0).round() as u64
}

/// The sizes of huge pages of the kernel, as they are in the names of a cgroup's files.
fn page_sizes() -> Vec<String> {
    let Ok(entries) = fs::read_dir("/sys/kernel/mm/hugepages") else { return Vec::new() };
    let names = entries.map(|entry| entry.expect("an entry").file_name().into_string().expect("a name"));
    names
        .map(|name| match name.as_str() {
            "hugepages-64kB" => "64KB".to_string(),
            "hugepages-2048kB" => "2MB".to_string(),
            "hugepages-32768kB" => "32MB".to_string(),
            "hugepages-1048576kB" => "1GB".to_string(),
            other => panic!("{other} is a new size"),
        })
        .collect()
}

fn cgroup_of(container: &Container) -> PathBuf {
    let path = format!("/proc/{}/cgroup", container.pid());
    let text = fs::read_to_string(&path).unwrap_or_else(|error| panic!("{path}: {error}"));
    let cgroup = text.lines().find_map(|line| line.strip_prefix("0::/")).expect("cgroup v2");
    Path::new("/sys/fs/cgroup").join(cgroup)
}

fn metrics(container: &Container) -> Metrics {
    let any = container.metrics().unwrap_or_else(|| panic!("no metrics of {}", container.id));
    assert_eq!(any.type_url, TYPE_URL);
    Metrics::parse_from_bytes(&any.value).expect("the message of the type")
}

fn flat(container: &Container) -> Flat {
    Flat::of_message(&metrics(container))
}

/// A container that has used some of each resource, and sleeps now.
fn worked<'n>(node: &'n Node, runtime: &str) -> Container<'n> {
    let script = "i=0; while [ $i -lt 20000 ]; do i=$((i+1)); done
        dd if=/dev/zero of=/dev/shm/a bs=64k count=16; dd if=/dev/zero of=/b bs=64k count=16
        cat /b >/dev/null; sleep 100000 & echo ready; wait";
    let fifos = Fifos::new("worked");
    let (mut stdout, _stderr) = (fifos.stdout(), fifos.stderr());
    let container = node.container("worked", Spec::sh(script)).runtime(runtime).started(&fifos.output());
    stdout.until(|bytes| bytes == b"ready\n");
    container
}

#[test]
fn every_field_is_as_in_the_cgroups_files() {
    needs!(OurShim);
    let node = Node::shared();
    for container in
        [worked(&node, OUR_RUNTIME), node.container("idle", Spec::sleeping()).started(&Io::default())]
    {
        let dir = cgroup_of(&container);
        assert!(dir.join("cpu.stat").exists(), "{dir:?} is a cgroup");
        let mut faults = Vec::new();
        // The kernel adds up the counts of its processors late.
        let fits = wait::within(wait::LIMIT, || {
            let before = Flat::of_cgroup(&dir);
            let found = flat(&container);
            faults = found.faults(&before, &Flat::of_cgroup(&dir));
            faults.is_empty().then_some(())
        });
        assert!(fits.is_some(), "{}: {faults:#?}", container.id);
    }
}

#[test]
fn statistics_have_every_field_of_the_stock_shim() {
    needs!(OurShim);
    let node = Node::shared();
    let [ours, stock] = [OUR_RUNTIME, STOCK_RUNTIME].map(|runtime| flat(&worked(&node, runtime)));
    // An older stock shim does not report pressure.
    let newer = |part: &&String| !part.contains("psi");
    let (our_parts, stock_parts) = (ours.parts.iter().filter(newer), stock.parts.iter().filter(newer));
    assert_eq!(our_parts.collect::<Vec<_>>(), stock_parts.collect::<Vec<_>>());
    assert!(ours.parts.is_superset(&stock.parts), "{:?}, {:?}", ours.parts, stock.parts);

    let is = |path: &str, kinds: &[&str]| {
        kinds.iter().any(|kind| path == *kind || path.contains(kind) && kind.ends_with(['.', '[']))
    };
    let mut faults = Vec::new();
    for (path, &stocks) in &stock.numbers {
        let number = ours.numbers.get(path).copied();
        let fits = if is(path, &LIMITS) || path.starts_with("hugetlb[") {
            number == Some(stocks)
        } else {
            is(path, &ACCIDENTAL) || number.is_some_and(|number| number > 0 || stocks == 0)
        };
        if !fits {
            faults.push(format!("{path} is {number:?}, {stocks} in the stock shim's"));
        }
    }
    assert!(faults.is_empty(), "{faults:#?}");
}

#[test]
fn statistics_show_limits_and_use() {
    needs!(Controllers);
    const MIB: u64 = 1 << 20;
    let node = Node::shared();
    let resources = json!({
        "memory": {"limit": 64 * MIB},
        "pids": {"limit": 32},
        "cpu": {"quota": 10_000, "period": 100_000},
    });
    let spec =
        Spec::sh("dd if=/dev/zero of=/dev/shm/a bs=1M count=8; while :; do :; done").resources(resources);
    let container = node.container("limits", spec).started(&Io::default());
    let found = wait::until("8 MiB in use, and throttled", || {
        let found = flat(&container);
        (found.number("memory.shmem") == 8 * MIB && found.number("cpu.nr_throttled") > 0).then_some(found)
    });
    assert_eq!(found.number("memory.usage_limit"), 64 * MIB);
    assert_eq!(found.number("pids.limit"), 32);
    assert!((1..=32).contains(&found.number("pids.current")), "{}", found.number("pids.current"));
    assert!((8 * MIB..=64 * MIB).contains(&found.number("memory.usage")), "{}", found.number("memory.usage"));
    assert!(found.number("cpu.usage_usec") > 0 && found.number("cpu.throttled_usec") > 0);
}

#[test]
fn processes_killed_for_lack_of_memory_are_counted() {
    needs!(Controllers);
    let node = Node::shared();
    let resources = json!({"memory": {"limit": 32 << 20, "swap": 32 << 20}});
    let spec = Spec::sh("tail /dev/zero; sleep 100000 & wait").resources(resources);
    let container = node.container("oom", spec).started(&Io::default());
    wait::until_true("a process is killed", || flat(&container).number("memory_events.oom_kill") == 1);
    assert!(flat(&container).number("memory_events.oom") >= 1);
    // Kubernetes reads statistics after the end, too.
    container.kill(SIGKILL).expect("kill");
    assert_eq!(container.exit_status(), 137);
    let last = flat(&container);
    assert_eq!(last.number("memory_events.oom_kill"), 1);
    assert!(last.number("cpu.usage_usec") > 0);
}

#[test]
fn each_phase_has_statistics() {
    needs!(OurShim);
    let node = Node::shared();
    let container = node.container("phases", Spec::sleeping()).created(&Io::default());
    assert!(flat(&container).number("cpu.usage_usec") > 0, "created");
    container.start().expect("start");
    assert!(flat(&container).number("cpu.usage_usec") > 0, "running");
    let unit = systemd::unit_of(&container);
    process::succeed("systemctl", &["freeze", &unit]);
    assert!(flat(&container).number("cpu.usage_usec") > 0, "frozen");
    process::succeed("systemctl", &["thaw", &unit]);
    container.kill(SIGKILL).expect("kill");
    container.wait().expect("wait");
    assert_eq!(flat(&container).number("pids.current"), 0, "stopped");
    container.delete().expect("delete");
    assert_eq!(container.metrics(), None, "deleted");
}

#[test]
fn statistics_of_an_unknown_id_are_not_found() {
    needs!(OurShim);
    let node = Node::shared();
    let shim = Shim::connect(&node);
    let request = StatsRequest { id: "nobody".to_string(), ..Default::default() };
    let refusal = shim.call(async |client, context| client.stats(context, &request).await);
    assert_eq!(refusal.expect_err("no such task").0, Code::NOT_FOUND);
}
