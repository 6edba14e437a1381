//! What a process of a container inherits: the same under our shim and under the stock one, field by field, for an
//! init process and for an exec.

use std::collections::BTreeMap;
use std::fs;

use rustix::process::Pid;
use rustix::thread::{CoreSchedulingScope, core_scheduling_cookie};

use crate::common::node::{NAMESPACE, Node, OUR_RUNTIME, STOCK_RUNTIME, runtime_under_test};
use crate::common::process;
use crate::common::spec::Spec;
use crate::common::stdio::Fifos;
use crate::common::systemd::DropIn;
use crate::common::task::Io;
use crate::newcomer::ForContainerd;

/// Files of /proc/self that show what a process inherits.
const FILES: [&str; 9] = [
    "status",
    "limits",
    "oom_score_adj",
    "coredump_filter",
    "timerslack_ns",
    "personality",
    "loginuid",
    "environ",
    "autogroup",
];

/// Lines of these files whose values are different for each process: times and ids.
const OWN: [&str; 24] = [
    "SigQ",
    "Pid",
    "PPid",
    "Tgid",
    "Ngid",
    "NSpid",
    "NStgid",
    "NSpgid",
    "NSsid",
    "FDSize",
    "VmPeak",
    "VmSize",
    "VmHWM",
    "VmRSS",
    "VmData",
    "VmStk",
    "VmExe",
    "VmLib",
    "VmPTE",
    "RssAnon",
    "RssFile",
    "RssShmem",
    "voluntary_ctxt_switches",
    "nonvoluntary_ctxt_switches",
];

fn script() -> Vec<String> {
    let files = FILES.map(|name| format!("/proc/self/{name}"));
    ["/bin/grep".to_string(), "-a".to_string(), String::new()].into_iter().chain(files).collect()
}

/// File and key of each line, with its value.
fn attributes(text: &str) -> BTreeMap<String, String> {
    let mut found = BTreeMap::new();
    for line in text.lines() {
        let Some((file, rest)) = line.strip_prefix("/proc/self/").and_then(|line| line.split_once(':'))
        else {
            continue;
        };
        // Where a line has a name it ends with a colon (status) or with two blanks (limits).
        let (key, value) = rest.split_once(':').or_else(|| rest.split_once("  ")).unwrap_or(("", rest));
        if !OWN.contains(&key.trim()) && file != "autogroup" {
            found.insert(
                format!("{file} {}", key.trim()),
                value.split_whitespace().collect::<Vec<_>>().join(" "),
            );
        }
    }
    found
}

/// What an init process and an exec of a runtime inherit.
pub fn inherited(node: &Node, runtime: &str, terminal: bool) -> [BTreeMap<String, String>; 2] {
    let args = script();
    let args: Vec<_> = args.iter().map(String::as_str).collect();
    let spec = |args: &[&str]| if terminal { Spec::new(args).terminal() } else { Spec::new(args) };
    let io = |fifos: &Fifos| if terminal { fifos.terminal() } else { fifos.output() };
    // The client reads while the process runs: a terminal's output that nobody has read by Delete may be cut off.
    let read = |fifos: &Fifos, process: &dyn Fn() -> u32| {
        let (mut stdout, _stderr) = (fifos.stdout(), (!terminal).then(|| fifos.stderr()));
        let text = std::thread::scope(|scope| {
            let reader = scope.spawn(|| stdout.text());
            assert_eq!(process(), 0, "{runtime}");
            reader.join().expect("read the output")
        });
        attributes(&text.replace('\r', ""))
    };
    let fifos = Fifos::new("attributes");
    let init = read(&fifos, &|| {
        let container = node.container("attributes", spec(&args)).runtime(runtime).started(&io(&fifos));
        let status = container.exit_status();
        container.delete().expect("delete");
        status
    });
    let sleeping = node.container("attributes", Spec::sleeping()).runtime(runtime);
    let sleeping = sleeping.started(&Io::default());
    let fifos = Fifos::new("attributes");
    let exec = read(&fifos, &|| {
        let exec = sleeping.exec(spec(&args)).started(&io(&fifos));
        let status = exec.exit_status();
        exec.delete().expect("delete");
        status
    });
    [init, exec]
}

/// Fields that differ: the name, the value under our shim, and the value under the stock shim.
pub fn differences(ours: &BTreeMap<String, String>, stock: &BTreeMap<String, String>) -> Vec<String> {
    let names: std::collections::BTreeSet<_> = ours.keys().chain(stock.keys()).collect();
    let value = |of: &BTreeMap<String, String>, name: &str| of.get(name).cloned().unwrap_or_default();
    let differ = names.into_iter().filter(|name| ours.get(*name) != stock.get(*name));
    // With the stock shim this is the score of containerd plus 1, so a container inherits the protection of containerd
    // (usually -999) unless its client sets a value, as Docker and CRI do.
    let differ = differ.filter(|name| name.as_str() != "oom_score_adj ");
    differ
        .map(|name| format!("{name}: {:?}, stock shim {:?}", value(ours, name), value(stock, name)))
        .collect()
}

#[test]
fn a_process_inherits_the_same_attributes_as_under_the_stock_shim() {
    needs!(OurShim);
    let node = Node::exclusive();
    for terminal in [false, true] {
        let ours = inherited(&node, &runtime_under_test(), terminal);
        let stock = inherited(&node, STOCK_RUNTIME, terminal);
        for (kind, ours, stock) in [("init", &ours[0], &stock[0]), ("exec", &ours[1], &stock[1])] {
            assert!(ours.len() > 40, "{kind}, terminal {terminal}: only {} fields", ours.len());
            assert_eq!(ours.get("oom_score_adj ").map(String::as_str), Some("0"), "{kind}");
            let found = differences(ours, stock);
            assert!(found.is_empty(), "{kind}, terminal {terminal}:\n{}", found.join("\n"));
        }
    }
}

#[test]
fn the_cpus_of_pid_1_do_not_bind_containers() {
    needs!(OurShim);
    let node = Node::exclusive();
    let before = process::status(1, "Cpus_allowed_list").expect("affinity of PID 1");
    process::succeed("taskset", &["-cp", "0", "1"]);
    let found = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        let ours = inherited(&node, &runtime_under_test(), false);
        ours.map(|fields| fields.get("status Cpus_allowed_list").cloned())
    }));
    process::succeed("taskset", &["-cp", &before, "1"]);
    let [init, exec] = found.expect("run with PID 1 on one CPU");
    assert_eq!((init, exec), (Some(before.clone()), Some(before)));
}

/// How the kernel schedules a process, and where it takes the memory of the process from.
fn scheduling(pid: u32) -> BTreeMap<&'static str, String> {
    let read = |file: &str| fs::read_to_string(format!("/proc/{pid}/{file}")).unwrap_or_default();
    let stat = read("stat");
    // The fields after the name, which are the third one of proc_pid_stat(5) and those after it.
    let fields: Vec<_> = stat.rsplit(')').next().unwrap_or_default().split_whitespace().collect();
    let field = |number: usize| fields.get(number - 3).map(ToString::to_string).unwrap_or_default();
    let limits = read("limits");
    let timeout = limits.lines().find_map(|line| line.strip_prefix("Max realtime timeout"));
    BTreeMap::from([
        ("nice", field(19)),
        ("priority", field(40)),
        ("policy", field(41)),
        ("io", process::succeed("ionice", &["-p", &pid.to_string()]).trim().to_string()),
        ("memory", read("numa_maps").split_whitespace().nth(1).unwrap_or_default().to_string()),
        (
            "rttime",
            timeout.map(|limit| limit.split_whitespace().collect::<Vec<_>>().join(" ")).unwrap_or_default(),
        ),
    ])
}

/// The same for an init process and for an exec of a runtime.
fn scheduling_under(node: &Node, runtime: &str) -> [BTreeMap<&'static str, String>; 2] {
    let container = node.container("scheduled", Spec::sleeping()).runtime(runtime).started(&Io::default());
    let exec = container.exec(Spec::sleeping()).added(&Io::default());
    let found = [container.pid(), exec.start().expect("start an exec")].map(scheduling);
    exec.end();
    container.end();
    found
}

#[test]
fn a_process_is_scheduled_as_containerd_is() {
    needs!(OurShim);
    let node = Node::exclusive();
    let usual = scheduling_under(&node, OUR_RUNTIME);
    assert_eq!(usual, scheduling_under(&node, STOCK_RUNTIME));
    let containerd = ForContainerd::new(
        &node,
        "[Service]\nNice=5\nCPUSchedulingPolicy=batch\nIOSchedulingClass=best-effort\nIOSchedulingPriority=7\n\
         NUMAPolicy=bind\nNUMAMask=0\nLimitRTTIME=7s\n",
    );
    let ours = scheduling_under(&node, OUR_RUNTIME);
    assert_eq!(ours, scheduling_under(&node, STOCK_RUNTIME));
    for (found, usual) in ours.iter().zip(&usual) {
        let value = |name: &str| found.get(name).map(String::as_str);
        assert_eq!((value("nice"), value("policy"), value("memory")), (Some("5"), Some("3"), Some("bind:0")));
        assert_ne!(value("io"), usual.get("io").map(String::as_str));
        assert_eq!(value("rttime"), Some("7000000 7000000 us"));
    }
    // What the administrator sets for the units of a namespace holds.
    let drop_in = DropIn::for_namespace(NAMESPACE, "[Service]\nNice=9\nCPUSchedulingPolicy=idle\n");
    let [init, _exec] = scheduling_under(&node, OUR_RUNTIME);
    drop((drop_in, containerd));
    assert_eq!((init["nice"].as_str(), init["policy"].as_str()), ("9", "5"));
    assert_eq!((&init["io"], &init["memory"]), (&ours[0]["io"], &ours[0]["memory"]));
}

#[test]
fn core_scheduling_is_as_under_the_stock_shim() {
    needs!(OurShim);
    let node = Node::exclusive();
    let containerd = ForContainerd::new(&node, "[Service]\nEnvironment=SCHED_CORE=1\n");
    let make = |runtime: &str| node.container("cores", Spec::sleeping()).runtime(runtime).make();
    let (stock, ours) = (make(STOCK_RUNTIME), make(OUR_RUNTIME));
    let (stock_created, ours_created) = (stock.create(&Io::default()), ours.create(&Io::default()));
    let cookie = |pid: u32| {
        let pid = i32::try_from(pid).ok().and_then(Pid::from_raw).expect("a pid");
        core_scheduling_cookie(pid, CoreSchedulingScope::Thread).expect("a cookie")
    };
    match stock_created {
        Ok(_) => {
            ours_created.expect("create");
            ours.start().expect("start");
            let exec = ours.exec(Spec::sleeping()).added(&Io::default());
            let cookies = [ours.pid(), exec.start().expect("start an exec")].map(cookie);
            exec.end();
            assert_ne!(cookies[0], 0);
            assert_eq!(cookies[0], cookies[1]);
            assert_ne!(cookies[0], cookie(stock.pid()));
        }
        // The kernel or the processor can't do it.
        Err(error) => {
            assert!(error.message().contains("sched core"), "{error}");
            let error = ours_created.expect_err("core scheduling is not possible");
            assert!(error.message().contains("(SCHED_CORE), is not possible"), "{error}");
        }
    }
    drop((stock, ours));
    drop(containerd);
    assert!(make(OUR_RUNTIME).create(&Io::default()).is_ok(), "without the variable");
}
