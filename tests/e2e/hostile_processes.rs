//! Strange processes of execs: whatever the OCI runtime makes of them, nothing else is affected, and each can be deleted.

use serde_json::{Value, json};

use crate::common::bystander::Bystander;
use crate::common::node::Node;
use crate::common::spec::Spec;
use crate::common::task::{Io, SIGKILL};

/// A process by the changes that are made to one that sleeps: where, and what is there.
fn strange() -> Vec<(&'static str, Value)> {
    vec![
        ("/args", json!([])),
        ("/args", json!([""])),
        ("/args", json!(["/bin/sleep\0", "1000"])),
        ("/args", json!(["/bin/sleep", "x".repeat(3 << 20)])),
        ("/args", json!(vec!["x"; 100_000])),
        ("/args", json!(["/proc/self/exe"])),
        ("/args", json!(["/proc/self/fd/3"])),
        ("/args", json!(["/dev/zero"])),
        ("/args", json!(["/"])),
        ("/args", json!([format!("/{}", "x".repeat(5000))])),
        ("/args", json!(["a\nb\u{1b}[2J%n\\"])),
        ("/cwd", json!("")),
        ("/cwd", json!("tmp")),
        ("/cwd", json!("/../../..")),
        ("/cwd", json!("/proc/self/fd/7")),
        ("/cwd", json!("/a\nb\0c")),
        ("/cwd", json!(format!("/{}", "x/".repeat(3000)))),
        ("/env", json!(["", "=", "=x", "NAME", "A=B\nC=D", "A=\0"])),
        (
            "/env",
            json!([
                "_LIBCONTAINER_INITPIPE=3",
                "_LIBCONTAINER_LOGPIPE=4",
                "LISTEN_FDS=9",
                "NOTIFY_SOCKET=/run/systemd/notify"
            ]),
        ),
        ("/env", json!(["LD_PRELOAD=/no/such.so", "GODEBUG=x", "PATH="])),
        ("/env", json!([format!("A={}", "x".repeat(3 << 20))])),
        (
            "/rlimits",
            json!([{"type": "RLIMIT_NOFILE", "soft": 1, "hard": 1}, {"type": "RLIMIT_NOFILE", "soft": 9, "hard": 9}]),
        ),
        ("/rlimits", json!([{"type": "RLIMIT_NONE", "soft": 1, "hard": 1}])),
        ("/rlimits", json!([{"type": "RLIMIT_NOFILE", "soft": 9, "hard": 1}])),
        (
            "/rlimits",
            json!([{"type": "RLIMIT_NPROC", "soft": 0, "hard": 0}, {"type": "RLIMIT_AS", "soft": 1, "hard": 1}]),
        ),
        ("/rlimits", json!([{"type": "RLIMIT_NOFILE", "soft": u64::MAX, "hard": u64::MAX}])),
        ("/apparmorProfile", json!("no-such-profile\n")),
        ("/selinuxLabel", json!("a:b:c:d\n")),
        ("/scheduler", json!({"policy": "SCHED_FIFO", "priority": 99})),
        ("/scheduler", json!({"policy": "SCHED_DEADLINE", "runtime": u64::MAX, "deadline": 1, "period": 0})),
        ("/scheduler", json!({"policy": "SCHED_NONE", "nice": i32::MIN, "flags": ["SCHED_FLAG_NONE"]})),
        ("/ioPriority", json!({"class": "IOPRIO_CLASS_RT", "priority": 0})),
        ("/ioPriority", json!({"class": "IOPRIO_CLASS_NONE", "priority": -1})),
        ("/execCPUAffinity", json!({"initial": "0-999999", "final": "x"})),
        ("/capabilities", json!({"bounding": ["CAP_NONE", "", "\n"], "effective": ["CAP_SYS_ADMIN"]})),
        ("/capabilities", json!({"ambient": ["CAP_SYS_ADMIN"], "inheritable": ["ALL"]})),
        ("/user", json!({"uid": u32::MAX, "gid": u32::MAX})),
        ("/user", json!({"uid": -1, "gid": 1_u64 << 40})),
        ("/user", json!({"uid": 0, "gid": 0, "additionalGids": (0..70_000).collect::<Vec<u32>>()})),
        ("/user", json!({"uid": 0, "gid": 0, "umask": u32::MAX, "username": "../../etc/passwd\n"})),
        ("/noNewPrivileges", json!("maybe")),
        ("/oomScoreAdj", json!(-1000)),
        ("/oomScoreAdj", json!(99_999)),
        ("/consoleSize", json!({"width": u64::MAX, "height": 0})),
        ("/terminal", json!("yes")),
        ("/commandLine", json!("x".repeat(1 << 20))),
        ("/unknown", json!({"deep": {"deep": {"deep": [[[[[[[[]]]]]]]]}}})),
    ]
}

#[test]
fn a_strange_process_costs_nothing_but_its_exec() {
    needs!(OurShim);
    let node = Node::exclusive();
    let bystander = Bystander::new(&node);
    let container = node.container("strange", Spec::sleeping()).started(&Io::default());
    for (at, value) in strange() {
        let begun: String = format!("{at} {value}").chars().take(90).collect();
        let spec = Spec::sleeping().with(&format!("/process{at}"), value);
        let added = container.exec(spec).add(&Io::default());
        let outcome = match added {
            Err(refusal) => Err(refusal),
            Ok(exec) => {
                let started = exec.start().map(drop);
                if started.is_ok() {
                    exec.kill(SIGKILL).or_else(|_| exec.wait().map(drop)).expect("kill, or has ended");
                    exec.wait().expect("wait");
                }
                exec.delete().expect("delete");
                started
            }
        };
        match outcome {
            Ok(()) => println!("{begun}: runs"),
            Err(refusal) => {
                println!(
                    "{begun}: {:?} {}",
                    refusal.code(),
                    refusal.message().chars().take(200).collect::<String>()
                );
                assert!(refusal.message().len() < 20_000, "{begun}: {} bytes", refusal.message().len());
            }
        }
    }
    assert_eq!(container.exec_sh("exit 5").exit_status(), 5);
    container.end();
    drop(container);
    bystander.assert_all_untouched("strange processes");
}
