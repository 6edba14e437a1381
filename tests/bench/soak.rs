//! Runs many containers and execs in a row, and checks that nothing has grown: neither the memory and the descriptors
//! of the daemon, its descriptor store and the units of systemd, nor the match rules of the bus and the memory of PID
//! 1.

use super::common::container::Io;
use super::common::node::{Node, OUR_RUNTIME};
use super::common::spec::Spec;
use super::common::{daemon, process, systemd};
use super::container::Init;
use super::exec::Exec;
use super::latency::total;
use super::output::Output;

/// The number of measurements. The first one comes after a share of the work, when caches are filled.
const SHARES: usize = 10;

/// A quantity: its name, its largest growth between the first measurement and the last, and a function that reads it.
type Gauge = (&'static str, u64, fn() -> u64);

const GAUGES: [Gauge; 6] = [
    ("memory of the daemon (Pss), KiB", 1024, || process::pss_kib(daemon_pid()).unwrap_or_default()),
    ("descriptors of the daemon", 16, || daemon::open_files(daemon_pid()) as u64),
    ("descriptors in the store", 16, || daemon::stored() as u64),
    ("units of systemd", 8, || systemd::list_units("*").len() as u64),
    ("match rules of the bus", 8, match_rules),
    ("memory of PID 1 (Pss), KiB", 2048, || process::pss_kib(1).unwrap_or_default()),
];

/// Runs containers and execs, prints a table, and returns what has grown.
pub fn run(node: &Node, containers: usize, execs: usize) -> Vec<String> {
    let kept = node.container("soak", Spec::sleeping()).runtime(OUR_RUNTIME).started(&Io::default());
    let first_daemon = daemon_pid();
    let mut rows = Vec::new();
    print!("{:>12} {:>8}", "containers", "execs");
    GAUGES.iter().for_each(|(name, ..)| print!(" {name:>32}"));
    println!();
    for share in 1..=SHARES {
        for _ in of_share(containers, share) {
            total(Init::new(node, OUR_RUNTIME, &["/bin/true"], Some(Output::new(false))));
        }
        for _ in of_share(execs, share) {
            total(Exec::new(node, &kept, &["/bin/true"], Output::new(false)));
        }
        // Delete is answered before all signals of systemd have arrived.
        let row = GAUGES.map(|(.., read)| read());
        print!("{:>12} {:>8}", containers * share / SHARES, execs * share / SHARES);
        row.iter().for_each(|value| print!(" {value:>32}"));
        println!();
        rows.push(row);
    }
    let (first, last) = (rows[0], rows[SHARES - 1]);
    let mut grown: Vec<String> = Vec::new();
    for (index, (name, most, _)) in GAUGES.iter().enumerate() {
        if last[index] > first[index] + most {
            grown.push(format!("{name}: from {} to {}, more than {most}", first[index], last[index]));
        }
    }
    if daemon_pid() != first_daemon {
        grown.push("the daemon has ended in between".to_string());
    }
    grown
}

fn of_share(all: usize, share: usize) -> std::ops::Range<usize> {
    all * (share - 1) / SHARES..all * share / SHARES
}

fn daemon_pid() -> u32 {
    daemon::pid().expect("there is a daemon")
}

/// From the statistics of dbus-daemon; 0 if the bus has none.
fn match_rules() -> u64 {
    let call = [
        "call",
        "org.freedesktop.DBus",
        "/org/freedesktop/DBus",
        "org.freedesktop.DBus.Debug.Stats",
        "GetStats",
    ];
    let text = process::run("busctl", &call).text();
    let mut words = text.split_whitespace().skip_while(|word| *word != "\"MatchRules\"").skip(2);
    words.next().and_then(|number| number.parse().ok()).unwrap_or_default()
}
