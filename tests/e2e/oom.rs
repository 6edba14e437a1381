//! Out of memory: clients get an event for each process that is killed, and administrators a line in the journal.

use nix::sys::signal::Signal;
use serde_json::json;

use crate::common::daemon::{self, Down};
use crate::common::node::Node;
use crate::common::spec::Spec;
use crate::common::task::{Io, SIGKILL};
use crate::common::{process, systemd, wait};

const MIB: u64 = 1 << 20;
/// Uses more memory than its limit.
const EAT: &str = "dd if=/dev/zero of=/dev/null bs=40M";
/// systemd's message about such a kill (sd-messages.h).
const UNIT_OUT_OF_MEMORY: &str = "fe6faa94e7774663a0da52717891d8ef";

fn small(script: &str) -> Spec {
    Spec::sh(script).resources(json!({"memory": {"limit": 15 * MIB, "swap": 15 * MIB}}))
}

#[test]
fn a_kill_for_lack_of_memory_is_published_before_the_exit() {
    needs!(Controllers);
    let node = Node::shared();
    let events = node.subscribe();
    for round in 0..5 {
        let container = node.container("oom", small(&format!("exec {EAT}"))).started(&Io::default());
        assert_eq!(container.exit_status(), 137);
        assert_eq!(
            events.names_up_to(&container, "exit"),
            ["create", "start", "oom", "exit"],
            "round {round}"
        );
    }
}

#[test]
fn a_child_that_is_killed_leaves_the_container_running() {
    needs!(Controllers);
    let node = Node::shared();
    let events = node.subscribe();
    let container =
        node.container("child", small(&format!("{EAT}; {EAT}; sleep 100000 & wait"))).started(&Io::default());
    assert_eq!(events.names_up_to(&container, "oom"), ["create", "start", "oom"]);
    assert_eq!(events.names_up_to(&container, "oom"), ["oom"]);
    wait::until_true("it continues", || container.pids().is_ok_and(|pids| pids.len() == 2));
    container.kill(SIGKILL).expect("kill");
    assert_eq!(container.exit_status(), 137);
    assert_eq!(events.names_up_to(&container, "exit"), ["exit"], "that was no lack of memory");
}

#[test]
fn the_kill_is_in_the_units_journal() {
    needs!(OurShim, Controllers);
    let node = Node::shared();
    let container = node.container("journal", small(&format!("exec {EAT}"))).started(&Io::default());
    assert_eq!(container.exit_status(), 137);
    let unit = format!("UNIT={}", systemd::unit_of(&container));
    let told = || systemd::messages(&[&unit]).iter().any(|message| message.contains("OOM killer"));
    wait::until_true("systemd's message", told);
}

/// Sends an entry to journald 20 times.
const SEND: &str = r#"
use Socket;
socket(my $journald, AF_UNIX, SOCK_DGRAM, 0) or die "socket: $!";
for (1 .. 20) {
    defined send($journald, $ARGV[0], 0, pack_sockaddr_un("/run/systemd/journal/socket")) or die "send: $!";
}
"#;

#[test]
fn no_other_user_reports_a_kill_in_the_name_of_systemd() {
    needs!(OurShim, Controllers);
    let node = Node::exclusive();
    let events = node.subscribe();
    let container = node.container("forged", small("exec sleep 100000")).started(&Io::default());
    let invocation = systemd::property(&systemd::unit_of(&container), "InvocationID");
    assert_eq!(invocation.len(), 32, "{invocation:?}");
    let pid = container.pid();
    let down = Down::begin();
    let entry = format!(
        "MESSAGE_ID={UNIT_OUT_OF_MEMORY}\nINVOCATION_ID={invocation}\nMESSAGE=killed by the OOM killer\n"
    );
    let user = ["--reuid=65534", "--regid=65534", "--clear-groups"];
    process::succeed("setpriv", &[&user[..], &["perl", "-e", SEND, &entry]].concat());
    let forged = || systemd::journal(&[&format!("INVOCATION_ID={invocation}"), "_UID=65534"]);
    wait::until_true("the entries are in the journal", || forged().len() == 20);
    // A process that is killed without a daemon makes the next daemon look for kills.
    daemon::signal(pid, Signal::SIGKILL);
    down.end();
    assert_eq!(container.exit_status(), 137);
    assert_eq!(events.names_up_to(&container, "exit"), ["create", "start", "exit"]);
}

#[test]
fn an_oom_kill_while_the_daemon_is_down_is_published_before_the_exit() {
    needs!(OurShim, Controllers);
    let node = Node::exclusive();
    let events = node.subscribe();
    let script = format!("read go; exec {EAT}");
    let fifos = crate::common::stdio::Fifos::new("down");
    let (_stdout, _stderr) = (fifos.stdout(), fifos.stderr());
    let container = node.container("down", small(&script)).started(&fifos.io());
    let pid = container.pid();
    let down = Down::begin();
    crate::common::stdio::feed(&fifos.stdin(), b"go\n");
    wait::until_true("it is killed", || !crate::common::process::exists(pid));
    down.end();
    assert_eq!(container.exit_status(), 137);
    assert_eq!(events.names_up_to(&container, "exit"), ["create", "start", "oom", "exit"]);
}
