//! Output and input while the daemon is killed again and again: no byte is missing, and no byte comes twice.

use std::thread;
use std::time::{Duration, Instant};

use crate::attached::{self, Client, each_kind_on};
use crate::common::bulk::Bulk;
use crate::common::daemon;
use crate::common::disturb::Disturbance;
use crate::common::node::{Node, number, unique};
use crate::common::spec::Spec;
use crate::common::stdio::{Fifos, Gate, feed};
use crate::common::systemd;
use crate::common::task::{Io, SIGTERM};
use crate::common::wait;
use crate::log_modes::limited;

/// The daemon is killed each time this number of further bytes has arrived.
const BYTES_PER_LIFE: usize = 700_000;

fn bulk() -> Bulk {
    Bulk::new(number("E2E_BYTES", 16 << 20, 6 << 20))
}

/// Asserts that the output of such a process, as init and as exec, arrives although the daemon is killed many times.
fn check_output(bulk: &Bulk, spec: Spec) {
    let node = Node::exclusive();
    each_kind_on(&node, bulk.bind(spec), |process, mut client| {
        let mut kills = 0;
        bulk.assert_arrives_while(&mut client.stdout, BYTES_PER_LIFE, || {
            daemon::kill_now();
            kills += 1;
        });
        assert_eq!(process.exit_status(), 0);
        process.delete().expect("delete");
        assert!(kills >= bulk.bytes() / (2 * BYTES_PER_LIFE), "only {kills} kills");
    });
    wait::until("the daemon serves again", daemon::serving);
}

#[test]
fn output_to_fifos_is_complete() {
    needs!(OurShim);
    let bulk = bulk();
    check_output(&bulk, Spec::sh(&bulk.script()));
}

#[test]
fn output_of_terminals_is_complete() {
    needs!(OurShim);
    let bulk = bulk();
    check_output(&bulk, Spec::sh(&format!("stty -opost; {}", bulk.script())).terminal());
}

/// Asserts that such a process, as init and as exec, returns all of its input.
fn check_both_ways(bulk: &Bulk, spec: Spec, ready: &str) {
    let node = Node::exclusive();
    let is_terminal = spec.has_terminal();
    each_kind_on(&node, spec, |process, mut client| {
        client.stdout.until(|bytes| bytes == ready.as_bytes());
        let Client { fifos: _fifos, stdin, mut stdout, stderr: _stderr } = client;
        thread::scope(|scope| {
            scope.spawn(move || {
                bulk.feed(&stdin);
                // A terminal would hang up at once, and lose the bytes that have not arrived.
                if !is_terminal {
                    process.close_stdin().expect("close stdin");
                }
            });
            bulk.assert_arrives_while(&mut stdout, BYTES_PER_LIFE, || {
                daemon::kill_now();
            });
        });
        assert_eq!(process.exit_status(), 0);
    });
    wait::until("the daemon serves again", daemon::serving);
}

#[test]
fn input_from_fifos_is_complete() {
    needs!(OurShim);
    check_both_ways(&bulk(), Spec::new(&["/bin/cat"]), "");
}

#[test]
fn input_of_terminals_is_complete() {
    needs!(OurShim);
    let bulk = bulk();
    let script = format!("stty raw -echo; echo ready; exec head -c {}", bulk.bytes());
    check_both_ways(&bulk, Spec::sh(&script).terminal(), "ready\n");
}

#[test]
fn output_in_the_journal_is_complete() {
    needs!(OurShim);
    check_journal("journal", false);
}

#[test]
fn output_in_the_journal_and_at_the_client_is_complete() {
    needs!(OurShim);
    check_journal("tee", true);
}

/// Writes numbered lines, some at a time, until SIGTERM, and then how many there were.
const COUNT: &str = "trap 'over=yes' TERM; i=0; while [ -z \"$over\" ]; do seq $((i+1)) $((i+500)); i=$((i+500)); \
     sleep 0.05; done; echo end $i";

/// The number of lines, once it has been written.
fn count<'a>(mut lines: impl Iterator<Item = &'a str>) -> Option<u32> {
    lines.find_map(|line| line.strip_prefix("end ")?.parse().ok())
}

/// Numbered lines from an init and an exec: once each in the journal, and at the client. The machine's speed decides how
/// many lines there are in one life of the daemon, so they have no limit.
fn check_journal(mode: &str, has_client: bool) {
    let node = Node::exclusive();
    let fifos = [(); 2].map(|()| Fifos::new("journal"));
    let mut readers = fifos.each_ref().map(|fifos| (fifos.stdout(), fifos.stderr()));
    let [init_io, exec_io] =
        fifos.each_ref().map(|fifos| if has_client { fifos.output() } else { Io::default() });
    let container = |spec| node.container(&unique("journal"), spec).options(limited(mode, u32::MAX));
    let init = container(Spec::sh(COUNT)).started(&init_io);
    let host = container(Spec::sleeping()).started(&Io::default());
    let exec = host.exec(Spec::sh(COUNT)).started(&exec_io);
    let (seen, kills) = daemon::killed_during(|kills| {
        thread::scope(|scope| {
            let clients = readers
                .each_mut()
                .map(|(stdout, _)| scope.spawn(|| if has_client { stdout.text() } else { String::new() }));
            kills.wait_for(20);
            init.kill(SIGTERM).expect("end the init process");
            exec.kill(SIGTERM).expect("end the exec");
            assert_eq!((init.exit_status(), exec.exit_status()), (0, 0));
            let seen = clients.map(|client| client.join().expect("the client does not panic"));
            (seen, kills.count())
        })
    });
    for (what, unit, seen) in
        [("init", systemd::unit_of(&init), &seen[0]), ("exec", systemd::unit_of(&host), &seen[1])]
    {
        if has_client {
            let written = count(seen.lines());
            let written = written.unwrap_or_else(|| panic!("{what} at the client: no end of {seen:.80}"));
            assert_counts(&format!("{what} at the client"), seen.lines(), written);
        }
        let mut messages = Vec::new();
        // journald may read its messages late.
        let written = wait::within(wait::LIMIT, || {
            messages = systemd::messages(&["--unit", &unit]);
            count(messages.iter().map(String::as_str))
        });
        let others = messages.iter().filter(|message| message.parse::<u32>().is_err());
        println!("other lines of {what}: {:?}", others.collect::<Vec<_>>());
        let written =
            written.unwrap_or_else(|| panic!("{what} in the journal: no end of {}", messages.len()));
        let messages = messages.iter().map(String::as_str);
        // If a client waits for the output, an incomplete line must reach it.
        let torn = if has_client { kills } else { 0 };
        assert_counts_again(&format!("{what} in the journal"), messages, written, torn);
    }
}

/// The numbers among the lines are 1 to `last`. systemd has its own lines in the journal.
fn assert_counts<'a>(what: &str, lines: impl Iterator<Item = &'a str>, last: u32) {
    let numbers: Vec<u32> = lines.filter_map(|line| line.parse().ok()).collect();
    let first = numbers.iter().zip(1..=last).position(|(number, expected)| *number != expected);
    if let Some(at) = first {
        let around = &numbers[at.saturating_sub(2)..(at + 3).min(numbers.len())];
        panic!("{what}: {around:?} where {} has to be; {} numbers", at + 1, numbers.len());
    }
    assert_eq!(numbers.len(), last as usize, "{what}");
}

/// As `assert_counts`, except that up to 4096 bytes may come twice after each kill: the killed daemon had sent
/// them, but had not recorded that yet. `torn` lines may be split or have a part twice. No line is missing.
fn assert_counts_again<'a>(what: &str, lines: impl Iterator<Item = &'a str>, last: u32, mut torn: u64) {
    const PIECE: u32 = 4096;
    let mut next = 1;
    for number in lines.filter_map(|line| line.parse::<u32>().ok()) {
        let follows = |next: u32| number <= next && number + PIECE > next;
        if follows(next) {
            next = number + 1;
        } else if torn > 0 && follows(next + 1) {
            torn -= 1;
            next = number + 1;
        } else {
            assert!(torn > 0, "{what}: {number} where {next} has to be");
            torn -= 1;
        }
    }
    assert_eq!(next, last + 1, "{what}");
}

#[test]
fn stdin_stays_open_until_close_io() {
    needs!(OurShim);
    let node = Node::exclusive();
    each_kind_on(&node, Spec::sh("cat; echo end"), |process, mut client| {
        client.enter("one\n");
        client.until("one\n");
        daemon::killed();
        client.enter("two\n");
        client.until("two\n");
        // After this, only the shim has the FIFO open, and the shim ends, too.
        drop(client.stdin);
        daemon::killed();
        client.stdin = client.fifos.stdin();
        client.enter("three\n");
        client.until("three\n");
        process.close_stdin().expect("close stdin");
        daemon::killed();
        client.enter("four\n");
        client.until("four\n");
        drop(client.stdin);
        assert_eq!(client.stdout.text(), "end\n");
        assert_eq!(process.exit_status(), 0);
    });
}

#[test]
fn terminals_continue_over_restarts_of_the_daemon() {
    needs!(OurShim);
    let script = "echo ready; while read line; do [ -z $line ] || exit 7; stty size; done";
    for disturbance in [Disturbance::Kill, Disturbance::Restart] {
        let node = Node::exclusive();
        each_kind_on(&node, Spec::sh(script).terminal().console_size(80, 25), |process, mut client| {
            client.until("ready\r\n");
            disturbance.pass(&node);
            client.enter("\n");
            client.until("25 80\r\n");
            process.resize(91, 19).expect("resize");
            disturbance.pass(&node);
            client.enter("\n");
            client.until("19 91\r\n");
            let mut client = client.again();
            disturbance.pass(&node);
            client.enter("\n");
            client.until("19 91\r\n");
            client.enter("end\n");
            assert_eq!(process.exit_status(), 7);
            client.stdout.rest();
        });
    }
}

#[test]
fn a_terminal_whose_input_was_closed_before_a_restart_hangs_up_once_the_client_is_gone() {
    needs!(OurShim);
    // PID 1 of a pid namespace only gets signals for which it has a trap.
    let script = "trap 'exit 9' HUP; echo ready; while :; do read line && echo got $line; done";
    for disturbance in [Disturbance::Kill, Disturbance::Restart] {
        let node = Node::exclusive();
        each_kind_on(&node, Spec::sh(script).terminal(), |process, mut client| {
            client.until("ready\r\n");
            process.close_stdin().expect("close stdin");
            disturbance.pass(&node);
            client.enter("more\n");
            client.until("got more\r\n");
            disturbance.pass(&node);
            drop(client.stdin);
            assert_eq!(process.exit_status(), 9);
        });
    }
}

#[test]
fn the_output_of_a_process_continues_after_a_restart_if_its_client_has_removed_the_fifo_of_its_input() {
    needs!(OurShim);
    let (node, gate) = (Node::exclusive(), Gate::new());
    let script = format!("cat; echo waits; {}; echo end", Gate::WAIT);
    each_kind_on(&node, gate.bind(Spec::sh(&script)), |process, mut client| {
        process.close_stdin().expect("close stdin");
        drop(client.stdin);
        client.stdout.until(|bytes| bytes == b"waits\n");
        client.fifos.remove_stdin();
        daemon::killed();
        gate.open();
        assert_eq!(client.stdout.text(), "end\n");
        assert_eq!(process.exit_status(), 0);
    });
}

#[test]
fn output_that_is_written_while_there_is_no_daemon_arrives() {
    needs!(OurShim);
    let node = Node::exclusive();
    for spec in [
        Spec::sh("read go; seq 1 1000"),
        Spec::sh("stty -opost -echo; echo ready; read go; seq 1 1000").terminal(),
    ] {
        let is_terminal = spec.has_terminal();
        let container = node.container("unheard", spec.sleeping_instead()).started(&Io::default());
        let (exec, mut client) = attached::exec(&container, spec);
        if is_terminal {
            client.until("ready\n");
        }
        // The daemon may or may not have passed the line on when it ends. The line arrives in both cases.
        feed(&client.stdin, b"go\n");
        let down = daemon::Down::begin();
        down.end();
        assert_eq!(client.stdout.text().lines().count(), 1000);
        assert_eq!(exec.exit_status(), 0);
    }
}

/// The time for which a Delete waits for a child's output counts from the first daemon that waited.
#[test]
fn a_delete_waits_no_longer_for_the_output_of_a_child_if_the_daemon_is_killed_meanwhile() {
    needs!(OurShim);
    let node = Node::exclusive();
    let container = node.container("streams", Spec::sleeping()).started(&Io::default());
    let (exec, mut client) = attached::exec(&container, Spec::sh("sleep 100000 & echo hi"));
    assert_eq!(exec.exit_status(), 0);
    // Each daemon is killed before the wait of the Delete is over.
    let mut killer = daemon::Killer::begin(daemon::kill_now, Duration::from_millis(500));
    let started = Instant::now();
    exec.delete().expect("delete");
    let (took, kills) = (started.elapsed(), killer.kills.count());
    killer.end();
    assert!(took < Duration::from_secs(10), "Delete took {took:?} over {kills} kills");
    assert!(kills > 0, "Delete took only {took:?}");
    assert_eq!(client.stdout.text(), "hi\n");
}
