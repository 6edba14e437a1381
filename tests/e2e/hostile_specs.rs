//! Strange OCI specs: whatever becomes of the container, nothing else is affected, and nothing is left.

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use nix::sys::stat::Mode;
use nix::unistd::mkfifo;
use serde_json::{Value, json};

use crate::common::bystander::Bystander;
use crate::common::node::{Node, unique};
use crate::common::spec::Spec;
use crate::common::stdio::Scratch;
use crate::common::task::{Io, SIGKILL};
use crate::common::{process, systemd};
use crate::runtime_options::GenericOptions;

/// How long a Create may take that waits for nobody.
const SOON: Duration = Duration::from_secs(20);

/// Places in the hierarchy of cgroups that are no names, or that belong to others.
fn places() -> Vec<String> {
    let paths = [
        "..",
        "/..",
        "../..",
        "../../x",
        "/",
        "//",
        ".",
        "/.",
        "/a/../..",
        "/../../system.slice",
        "/system.slice",
        "/init.scope",
        "/init.scope/x",
        "/system.slice/dbus.service",
        "/containerd_shim.slice",
        "/containerd_shim.slice/containerd-shim-systemd-v1.service",
        "/containerd.slice",
        "system.slice:ssh:service",
        "system.slice:dbus:service",
        "-.slice:a:b",
        "-.slice:-:-",
        ":a:b",
        ":a:",
        "::",
        ":::",
        "a.slice::",
        "a.slice:a:",
        "a.slice:a/b:c",
        "a.slice:..:..",
        "a.slice:../x:../y",
        "a.slice:x:..",
        "a.slice:x:.",
        "a.slice:a\nb:c",
        "a.slice:%n:%n",
        "a.slice:x:%n\\x2f",
        "init.scope:a:b",
        "dbus.service:a:b",
        "a-.slice:x:y",
        "-a.slice:x:y",
        "a--b.slice:x:y",
        "/a.slice:x:y",
        "../a.slice:x:y",
        "a.slice/b.slice:x:y",
        "containerd_shim.slice:containerd-shim-systemd-v1:service",
        "system.slice:containerd-shim-systemd-v1:service",
        "a.slice:x:y.service",
        "a.slice:x:y.slice",
        "a\0b",
        "a\nb",
        "a.slice:x:\u{202e}",
        "cgroup.procs",
        "/cgroup.procs",
        "/cgroup.procs/x",
    ];
    let long = [
        "x".repeat(5000),
        "/x".repeat(3000),
        format!("a.slice:x:{}", "y".repeat(300)),
        format!("{}.slice:x:y", "z".repeat(300)),
        format!("{}a.slice:x:y", "a-".repeat(120)),
    ];
    paths.map(str::to_string).into_iter().chain(long).collect()
}

/// Changes to a spec: where, and what is there.
fn changes() -> Vec<(&'static str, Value)> {
    let many = |value: Value, count: usize| vec![value; count];
    vec![
        ("/ociVersion", json!("x\n")),
        ("/hostname", json!("a\nb")),
        ("/hostname", json!("a\0b")),
        ("/hostname", json!("x".repeat(300))),
        ("/domainname", json!("%n\\")),
        ("/annotations", json!({"a": 7})),
        ("/annotations", json!([])),
        (
            "/annotations",
            json!({"": "", "\n": "\n", "a\0": "\0", "org.systemd.property.": "x", "org.systemd.property.Description\n": "'x'"}),
        ),
        (
            "/annotations",
            json!((0..10_000).map(|n| (format!("k{n}"), json!("v"))).collect::<serde_json::Map<_, _>>()),
        ),
        ("/annotations", json!({"x".repeat(1 << 20): "y".repeat(1 << 20)})),
        (
            "/annotations",
            json!(
                (0..3000)
                    .map(|n| (format!("org.systemd.property.Description{n}"), json!("'v'")))
                    .collect::<serde_json::Map<_, _>>()
            ),
        ),
        ("/hooks/createRuntime", json!([{"path": "relative"}])),
        ("/hooks/createRuntime", json!([{"path": "/no/such"}])),
        ("/hooks/createRuntime", json!([{"path": "/bin/false", "args": []}])),
        ("/hooks/createRuntime", json!([{"path": "/bin/sleep", "args": ["sleep", "1000"], "timeout": 1}])),
        ("/hooks/createRuntime", json!([{"path": "/bin/true", "timeout": -1}])),
        ("/hooks/createRuntime", json!([{"path": "/bin/true", "env": ["\n", "a\0"]}])),
        ("/hooks/createContainer", json!([{"path": "/bin/true", "args": vec!["x"; 100_000]}])),
        ("/hooks/poststop", json!([{"path": "/bin/false"}])),
        ("/hooks/poststart", json!([{"path": "/bin/false"}])),
        ("/hooks/startContainer", json!([{"path": "/no/such"}])),
        ("/hooks/none", json!([{"path": "/no/such"}])),
        ("/hooks", json!("x")),
        ("/mounts", json!([{"destination": "relative", "type": "tmpfs", "source": "none"}])),
        ("/mounts", json!([{"destination": "/../../..", "type": "tmpfs", "source": "none"}])),
        ("/mounts", json!([{"destination": "/proc", "type": "tmpfs", "source": "none"}])),
        (
            "/mounts",
            json!([{"destination": "/x", "type": "bind", "source": "/no/such", "options": ["rbind"]}]),
        ),
        (
            "/mounts",
            json!([{"destination": "/x\ny\\", "type": "bind", "source": "/tmp", "options": ["rbind", "none", "a=b\n", "rshared"]}]),
        ),
        ("/mounts", json!([{"destination": "/x", "type": "none\n", "source": "/dev/null"}])),
        (
            "/mounts",
            json!([{"destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup", "options": ["rw"]}]),
        ),
        ("/mounts", json!(many(json!({"destination": "/x", "type": "tmpfs", "source": "none"}), 300))),
        ("/linux/namespaces", json!([])),
        ("/linux/namespaces", json!([{"type": "none"}])),
        ("/linux/namespaces", json!([{"type": "pid"}, {"type": "pid"}, {"type": "mount"}])),
        ("/linux/namespaces", json!([{"type": "mount"}, {"type": "network", "path": "/proc/1/ns/net"}])),
        ("/linux/namespaces", json!([{"type": "mount"}, {"type": "network", "path": "/proc/1/ns/mnt"}])),
        (
            "/linux/namespaces",
            json!([{"type": "mount"}, {"type": "network", "path": "/run/dbus/system_bus_socket"}]),
        ),
        ("/linux/namespaces", json!([{"type": "mount"}, {"type": "network", "path": "/no\n/such\0"}])),
        ("/linux/namespaces", json!([{"type": "mount"}, {"type": "network", "path": "/run"}])),
        ("/linux/namespaces", json!([{"type": "mount"}, {"type": "network", "path": "../x"}])),
        ("/linux/namespaces", json!([{"type": "mount"}, {"type": "user", "path": "/proc/1/ns/user"}])),
        ("/linux/namespaces", json!([{"type": "mount"}, {"type": "pid", "path": "/proc/1/ns/pid"}])),
        ("/linux/namespaces", json!([{"type": "mount"}, {"type": "cgroup", "path": "/proc/1/ns/cgroup"}])),
        ("/linux/namespaces", json!([{"type": "mount"}, {"type": "time"}])),
        ("/root/path", json!("")),
        // The bundle itself: the OCI runtime creates mountpoints in it. It would create them in every other directory, too.
        ("/root/path", json!("rootfs/..")),
        ("/root/path", json!("/proc")),
        ("/root/path", json!("/no/such")),
        ("/root/path", json!("config.json")),
        ("/root/path", json!("x\n\0")),
        ("/root", json!(null)),
        ("/linux/devices", json!([{"path": "../../x", "type": "c", "major": 1, "minor": 3}])),
        ("/linux/devices", json!([{"path": "/dev/x", "type": "z", "major": -1, "minor": i64::MAX}])),
        ("/linux/devices", json!(many(json!({"path": "/dev/x", "type": "p"}), 1000))),
        (
            "/linux/resources/devices",
            json!([{"allow": true, "type": "a", "access": "rwm"}, {"allow": false, "type": "b", "major": i64::MIN, "minor": -1, "access": "m"}]),
        ),
        ("/linux/resources/unified", json!({"cgroup.kill": "1"})),
        ("/linux/resources/unified", json!({"cgroup.procs": "1"})),
        ("/linux/resources/unified", json!({"cgroup.threads": "1"})),
        ("/linux/resources/unified", json!({"cgroup.type": "threaded"})),
        (
            "/linux/seccomp",
            json!({"defaultAction": "SCMP_ACT_NOTIFY", "listenerPath": "/run/dbus/system_bus_socket"}),
        ),
        (
            "/linux/seccomp",
            json!({"defaultAction": "SCMP_ACT_ALLOW", "listenerPath": "/no/such\n", "syscalls": [{"names": ["mkdir"], "action": "SCMP_ACT_NOTIFY"}]}),
        ),
        (
            "/linux/seccomp",
            json!({"defaultAction": "SCMP_ACT_KILL_PROCESS", "architectures": ["x", "SCMP_ARCH_X86_64"]}),
        ),
        ("/linux/seccomp", json!({"defaultAction": "SCMP_ACT_ERRNO"})),
        (
            "/linux/seccomp",
            json!({"defaultAction": "SCMP_ACT_ALLOW", "syscalls": many(json!({"names": ["none"], "action": "SCMP_ACT_TRACE"}), 10_000)}),
        ),
        ("/linux/uidMappings", json!([{"containerID": 0, "hostID": 0, "size": u32::MAX}])),
        ("/linux/timeOffsets", json!({"monotonic": {"secs": i64::MAX, "nanosecs": u32::MAX}, "none": {}})),
        ("/linux/personality", json!({"domain": "LINUX32", "flags": ["x"]})),
        ("/linux/personality", json!({"domain": "none"})),
        ("/linux/intelRdt", json!({"closID": "../../x", "l3CacheSchema": "L3:0=\n"})),
        ("/linux/memoryPolicy", json!({"mode": "MPOL_BIND", "nodes": "0-9999999"})),
        ("/linux/rootfsPropagation", json!("none\n")),
        ("/linux/mountLabel", json!("a:b\n")),
        ("/linux/maskedPaths", json!(["/..", "", "relative", "/proc/1", "/a\0b"])),
        ("/linux/maskedPaths", json!(many(json!("/proc/kcore"), 2000))),
        ("/linux/readonlyPaths", json!(["/", "/../..", "\n"])),
        (
            "/linux/sysctl",
            json!({"net.none": "1", "kernel/../x": "1", "a\nb": "c", "net.ipv4.ip_forward": "1\n2"}),
        ),
        ("/linux/sysctl", json!({"net/../../1/oom_score_adj": "0"})),
        ("/linux", json!(null)),
        ("/process", json!(null)),
        ("/process/oomScoreAdj", json!(-1000)),
        ("/process/args", json!(["/proc/self/exe"])),
        ("/process/args", json!(["/bin/sleep", "x".repeat(1 << 20)])),
        (
            "/process/rlimits",
            json!([{"type": "RLIMIT_NPROC", "soft": 1, "hard": 1}, {"type": "RLIMIT_NPROC", "soft": 2, "hard": 2}, {"type": "RLIMIT_AS", "soft": 0, "hard": 0}]),
        ),
        ("/process/terminal", json!(7)),
        ("/process/consoleSize", json!({"width": -1})),
        ("/vm", json!({"kernel": {"path": "/x"}})),
        ("/windows", json!({"servicing": true})),
        ("/solaris", json!([])),
    ]
}

fn cases() -> Vec<(String, Spec)> {
    let begun = |text: String| text.chars().take(100).collect::<String>();
    let placed = places()
        .into_iter()
        .map(|path| (begun(format!("cgroupsPath {path:?}")), Spec::sleeping().cgroups_path(&path)));
    // runc sets no hostname in a namespace that is not the container's own.
    let spec_for = |at: &str| match at {
        "/linux/namespaces" => Spec::sleeping().with("/hostname", json!(null)),
        _ => Spec::sleeping(),
    };
    let changed = changes()
        .into_iter()
        .map(|(at, value)| (begun(format!("{at} {value}")), spec_for(at).with(at, value)));
    let map = |first: u32, size: u32| json!({"containerID": 0, "hostID": first, "size": size});
    let overlapping = json!([map(1000, 70_000), map(2000, 70_000)]);
    let users = [
        ("overlapping ids", overlapping),
        ("no ids", json!([map(0, 0)])),
        ("too many ids", json!([map(u32::MAX, u32::MAX)])),
        ("no mappings", json!([])),
        (
            "many mappings",
            json!(
                (0..400)
                    .map(|n| json!({"containerID": n, "hostID": n + 5000, "size": 1}))
                    .collect::<Vec<_>>()
            ),
        ),
    ]
    .map(|(what, mappings)| {
        let spec = Spec::sleeping().user_namespace(5000, 65_536).with("/linux/uidMappings", mappings.clone());
        (format!("user namespace with {what}"), spec.with("/linux/gidMappings", mappings))
    });
    placed.chain(changed).chain(users).collect()
}

/// A spec that makes the OCI runtime hang: it waits for a writer, or it is frozen.
#[test]
fn a_spec_that_hangs_the_runtime_fails_after_its_limit() {
    needs!(OurShim);
    let node = Node::exclusive();
    let bystander = Bystander::new(&node);
    let scratch = Scratch::new("hangs");
    mkfifo(&scratch.join("fifo"), Mode::S_IRWXU).expect("make a FIFO");
    let namespaces = json!([{"type": "mount"}, {"type": "network", "path": scratch.text("fifo")}]);
    let specs = [
        (
            "a FIFO as a namespace",
            Spec::sleeping().with("/hostname", json!(null)).with("/linux/namespaces", namespaces),
        ),
        ("a frozen cgroup", Spec::sleeping().resources(json!({"unified": {"cgroup.freeze": "1"}}))),
    ];
    for (what, spec) in specs {
        let options =
            GenericOptions { config_body: "RuntimeTimeoutSec = 2".to_string(), ..Default::default() };
        let container = node.container("hangs", spec).options(options.to_any()).make();
        let since = Instant::now();
        let refusal = container.create(&Io::default()).expect_err(what);
        println!("{what}: {refusal} {:?}", since.elapsed());
        assert!(since.elapsed() < SOON, "{what}: {:?}", since.elapsed());
        bystander.assert_untouched(what);
    }
    drop(scratch);
    bystander.assert_all_untouched("specs that hang the runtime");
}

#[test]
fn a_strange_spec_costs_nothing_but_its_container() {
    needs!(OurShim);
    let node = Node::exclusive();
    let hostname = process::succeed("cat", &["/proc/sys/kernel/hostname"]);
    let bystander = Bystander::new(&node);
    let dbus = systemd::main_pid("dbus.service");
    let filter = std::env::var("E2E_CASE").unwrap_or_default();
    for (what, spec) in cases().into_iter().filter(|(what, _)| what.contains(&filter)) {
        let since = Instant::now();
        let container = node.container("strange", spec).id(&unique("strange")).try_make();
        let Ok(container) = container else {
            println!("{what}: containerd refuses it");
            continue;
        };
        let outcome = container.create(&Io::default()).and_then(|_| container.start()).map(drop);
        if outcome.is_ok() {
            let _ = container.kill(SIGKILL);
            container.wait().unwrap_or_else(|error| panic!("{what}: wait: {error}"));
        }
        if let Err(error) = container.delete() {
            assert!(outcome.is_err(), "{what}: delete: {error}");
        }
        match outcome {
            Ok(()) => println!("{what}: runs {:?}", since.elapsed()),
            Err(refusal) => {
                println!(
                    "{what}: {:?} {} {:?}",
                    refusal.code(),
                    refusal.message().chars().take(250).collect::<String>(),
                    since.elapsed()
                );
                assert!(refusal.message().len() < 20_000, "{what}: {} bytes", refusal.message().len());
            }
        }
        assert!(since.elapsed() < SOON, "{what}: {:?}", since.elapsed());
    }
    assert_eq!(systemd::main_pid("dbus.service"), dbus);
    assert_eq!(process::succeed("cat", &["/proc/sys/kernel/hostname"]), hostname);
    assert!(!Path::new("/run/e2e-pwned").exists());
    assert_eq!(fs::read_to_string("/proc/1/comm").expect("PID 1"), "systemd\n");
    bystander.assert_all_untouched("strange specs");
}
