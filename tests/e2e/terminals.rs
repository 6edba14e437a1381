//! Terminals through the API: the client's FIFOs lead to a pseudo-terminal, for init and for execs alike.

use std::time::{Duration, Instant};

use crate::attached::{self, each_kind};
use crate::common::bulk::Bulk;
use crate::common::node::{Node, number};
use crate::common::process;
use crate::common::spec::Spec;
use crate::common::stdio::feed;
use crate::common::task::{Io, SIGKILL, assert_refused};

/// Fills its terminal until nobody reads any more.
const FLOOD: &str = "while :; do echo flood; done";

/// A shell script in a terminal.
fn shell(script: &str) -> Spec {
    Spec::sh(script).terminal()
}

#[test]
fn output_comes_as_from_a_terminal() {
    each_kind(
        shell("[ -t 0 ] && [ -t 1 ] && [ -t 2 ] && echo out; echo err >&2; exit 5"),
        |process, mut client| {
            // The line discipline puts a return before each line feed.
            assert_eq!(client.stdout.text(), "out\r\nerr\r\n");
            assert_eq!(process.exit_status(), 5);
            assert!(process.state().expect("state").terminal);
        },
    );
}

#[test]
fn typed_input_is_echoed_and_read() {
    each_kind(shell("echo ready; read line; echo got $line; exit 6"), |process, mut client| {
        client.until("ready\r\n");
        client.enter("a word\n");
        assert_eq!(client.stdout.text(), "a word\r\ngot a word\r\n");
        assert_eq!(process.exit_status(), 6);
    });
}

#[test]
fn control_c_is_a_signal() {
    each_kind(shell("trap 'exit 7' INT; echo ready; sleep 100000 & wait"), |process, mut client| {
        client.until("ready\r\n");
        client.enter("\x03");
        assert_eq!(process.exit_status(), 7);
    });
}

#[test]
fn a_terminal_has_its_size_from_the_start_and_can_be_resized() {
    let spec = shell("stty size; while read line; do stty size; done").console_size(123, 45);
    each_kind(spec, |process, mut client| {
        client.until("45 123\r\n");
        process.resize(80, 25).expect("resize");
        client.enter("\n");
        client.until("25 80\r\n");
        process.resize(200, 60).expect("resize again");
        client.enter("\n");
        client.until("60 200\r\n");
        process.kill(SIGKILL).expect("kill");
        process.wait().expect("wait");
        // The answer of the stock shim for a stopped init depends on whether the shim itself is ending.
        if !process.exec.is_empty() {
            assert_refused(process.resize(80, 25));
        }
    });
}

#[test]
fn a_resize_is_announced_by_a_signal() {
    let script = "trap 'stty size; exit 8' WINCH; echo ready; sleep 100000 & wait";
    each_kind(shell(script), |process, mut client| {
        client.until("ready\r\n");
        process.resize(132, 43).expect("resize");
        assert_eq!(client.stdout.text(), "43 132\r\n");
        assert_eq!(process.exit_status(), 8);
    });
}

#[test]
fn a_resize_without_a_terminal_changes_nothing() {
    let node = Node::shared();
    let container = node.container("no-terminal", Spec::sleeping()).started(&Io::default());
    let exec = container.exec(Spec::sleeping()).added(&Io::default());
    exec.resize(80, 25).expect("resize what does not run");
    exec.start().expect("start");
    exec.resize(80, 25).expect("resize an exec");
    container.resize(80, 25).expect("resize init");
}

#[test]
fn a_raw_terminal_passes_every_byte_both_ways() {
    let bytes: Vec<u8> = (0..=255).collect();
    each_kind(shell("stty raw -echo; echo ready; exec head -c 256"), |process, mut client| {
        client.until("ready\n");
        feed(&client.stdin, &bytes);
        assert_eq!(client.stdout.rest(), bytes);
        assert_eq!(process.exit_status(), 0);
    });
}

#[test]
fn a_background_child_does_not_keep_the_terminals_output_open() {
    let node = Node::shared();
    let container = node.container("holder", Spec::sleeping()).started(&Io::default());
    let script = "trap '' HUP; sleep 100000 & echo $!; exit 9";
    let (exec, mut client) = attached::exec(&container, shell(script));
    let started = Instant::now();
    assert_eq!(exec.exit_status(), 9);
    assert!(started.elapsed() < attached::WAIT_LIMIT, "Wait took {:?}", started.elapsed());
    exec.delete().expect("delete");
    client.stdout.rest();
    assert_eq!(container.pids().expect("pids").len(), 2, "the child lives on");
}

#[test]
fn much_output_of_a_terminal_is_complete() {
    let bulk = Bulk::new(number("E2E_BYTES", 100 << 20, 8 << 20));
    let spec = bulk.bind(shell(&format!("stty -opost; {}", bulk.script())));
    each_kind(spec, |process, mut client| {
        bulk.assert_arrives(&mut client.stdout);
        assert_eq!(process.exit_status(), 0);
    });
}

#[test]
fn a_terminal_hangs_up_when_stdin_is_closed_and_the_client_gone() {
    // PID 1 of a pid namespace only gets signals for which it has a trap.
    let script = "trap 'exit 9' HUP; echo ready; while :; do read line && echo got $line; done";
    each_kind(shell(script), |process, mut client| {
        client.until("ready\r\n");
        // The terminal stays open when its client closes it: the client may open it again.
        let mut client = client.again();
        client.enter("again\n");
        client.until("got again\r\n");
        process.close_stdin().expect("close stdin");
        drop(client.stdin);
        assert_eq!(process.exit_status(), 9);
    });
}

#[test]
fn a_client_may_leave_a_terminal_and_come_back() {
    each_kind(shell("echo one; read x; echo two; read x; echo three; exit 3"), |process, mut client| {
        client.until("one\r\n");
        client.enter("\n");
        client.until("two\r\n");
        let mut client = client.again();
        client.enter("\n");
        client.until("three\r\n");
        assert_eq!(process.exit_status(), 3);
    });
}

#[test]
fn a_terminal_that_is_not_read_delays_no_other() {
    let node = Node::shared();
    let container = node.container("twenty", Spec::sleeping()).started(&Io::default());
    let spec = shell("while read line; do echo got $line; done");
    let mut others: Vec<_> = (0..19).map(|_| attached::exec(&container, spec.clone())).collect();
    let mut hundred_lines = || {
        let started = Instant::now();
        for round in 0..5 {
            for (_, client) in &mut others {
                client.enter(&format!("{round}\n"));
                client.until(&format!("got {round}\r\n"));
            }
        }
        started.elapsed()
    };
    let quiet = hundred_lines();
    let (_flooding, _unread) = attached::exec(&container, shell(FLOOD));
    let flooded = hundred_lines();
    assert!(
        flooded < quiet * 10 + Duration::from_secs(5),
        "a hundred lines took {flooded:?}, {quiet:?} before"
    );
}

#[test]
fn an_unread_terminal_can_be_killed_and_deleted() {
    let node = Node::shared();
    let container = node.container("unread", Spec::sleeping()).started(&Io::default());
    let (exec, client) = attached::exec(&container, shell(FLOOD));
    exec.kill(SIGKILL).expect("kill");
    assert_eq!(exec.exit_status(), 137);
    exec.delete().expect("delete with output unread");
    drop(client);
    assert!(process::runs(container.pid()));
}

#[test]
fn a_terminal_that_every_program_has_closed_can_be_opened_again() {
    let script = "T=$(tty); read go; exec 0<&- 1>&- 2>&-; sleep 0.3; seq 1 5000 >$T; read word <$T; echo got $word >$T";
    each_kind(shell(script), |process, mut client| {
        client.enter("go\n");
        client.until("\r\n5000\r\n");
        client.enter("again\n");
        client.until("got again\r\n");
        assert_eq!(process.exit_status(), 0);
    });
}

#[test]
fn output_that_is_read_after_the_exit_is_complete() {
    each_kind(shell("for i in $(seq 200); do echo line $i; done"), |process, mut client| {
        assert_eq!(process.exit_status(), 0);
        process.delete().expect("delete");
        let lines: String = (1..=200).map(|i| format!("line {i}\r\n")).collect();
        assert_eq!(client.stdout.text(), lines);
    });
}
