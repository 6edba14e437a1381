//! References to units and the limits of the bus.

use std::fs;
use std::path::Path;

use crate::common::node::Node;
use crate::common::shim::socket;
use crate::common::spec::Spec;
use crate::common::systemd::Cursor;
use crate::common::task::Io;
use crate::common::{daemon, process, wait};

/// A limit of the bus, until it is dropped. The daemon reads it when it starts.
struct MatchRules;

impl MatchRules {
    const FILE: &str = "/etc/dbus-1/system.d/e2e.conf";

    fn limited_to(number: u32) -> MatchRules {
        let path = Path::new(Self::FILE);
        fs::create_dir_all(path.parent().expect("a directory")).expect("make the directory of the bus");
        let limit = format!("<limit name=\"max_match_rules_per_connection\">{number}</limit>");
        fs::write(path, format!("<busconfig>{limit}</busconfig>")).expect("write a limit of the bus");
        process::succeed("systemctl", &["reload", "dbus.service"]);
        MatchRules
    }
}

impl Drop for MatchRules {
    fn drop(&mut self) {
        let _ = fs::remove_file(Self::FILE);
        let _ = process::run("systemctl", &["reload", "dbus.service"]);
        let _ = process::run("systemctl", &["restart", "containerd-shim-systemd-v1.service"]);
    }
}

/// How many match rules systemd has.
fn match_rules_of_systemd() -> usize {
    let stats = [
        "org.freedesktop.DBus",
        "/org/freedesktop/DBus",
        "org.freedesktop.DBus.Debug.Stats",
        "GetAllMatchRules",
    ];
    let answer = process::succeed("busctl", &[&["--json=short", "call"], &stats[..]].concat());
    let answer: serde_json::Value = serde_json::from_str(&answer).expect("the rules of all connections");
    let connections = answer["data"][0].as_object().expect("a list of rules for each connection").values();
    let rules = connections.map(|rules| rules.as_array().expect("rules"));
    // Only systemd listens to what the bus asks it to activate.
    let is_of_systemd =
        |rule: &serde_json::Value| rule.to_string().contains("org.freedesktop.systemd1.Activator");
    rules.filter(|rules| rules.iter().any(is_of_systemd)).map(Vec::len).sum()
}

/// systemd has a match rule for each reference, and dbus-daemon allows it 512: as many as two daemons need for 256 containers. When
/// dbus-daemon refuses one, systemd 252 leaves the bus. 70 containers and a lower limit show the same.
#[test]
fn references_to_many_units_use_up_no_limit_of_the_bus() {
    needs!(OurShim);
    let node = Node::exclusive();
    socket();
    let _limit = MatchRules::limited_to(130);
    daemon::systemctl("restart");
    let before = Cursor::now();
    let start = |_| node.container("many", Spec::sleeping()).started(&Io::default());
    let containers: Vec<_> = (0..70).map(start).collect();
    for _ in 0..4 {
        daemon::systemctl("restart");
        wait::until("the daemon serves", daemon::serving);
        // systemd answers only if it is still on the bus.
        assert_eq!(containers[0].exec_sh("exit 7").exit_status(), 7);
        // There may be 18 references. Each may have a rule for this daemon and one for the earlier daemon.
        wait::until_true("the daemon has its references", || match_rules_of_systemd() > 18);
        let rules = match_rules_of_systemd();
        assert!(rules < 60, "{rules}");
    }
    let bus = before.entries_since(&["_COMM=dbus-daemon"]);
    let refused: Vec<_> =
        bus.iter().filter(|entry| entry["MESSAGE"].to_string().contains("match rules")).collect();
    assert!(refused.is_empty(), "{refused:?}");
    for container in containers {
        container.end();
    }
}
