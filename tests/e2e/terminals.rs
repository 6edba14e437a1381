//! Terminals through the API: the client's FIFOs lead to a pseudo-terminal, for init and for execs alike.

use std::fs::File;
use std::time::{Duration, Instant};

use crate::common::bulk::Bulk;
use crate::common::container::{Io, SIGKILL};
use crate::common::node::{Node, number};
use crate::common::process;
use crate::common::spec::Spec;
use crate::common::stdio::{Fifos, Reader, feed};
use crate::common::task::{Process, assert_refused};

/// The client's side of a process with a terminal.
struct Terminal {
    fifos: Fifos,
    stdin: File,
    stdout: Reader,
}

impl Terminal {
    /// Attaches to a process that `start` starts.
    fn attached<P>(start: impl FnOnce(&Io) -> P) -> (P, Terminal) {
        let fifos = Fifos::new("terminal");
        let stdout = fifos.stdout();
        let process = start(&fifos.terminal());
        let stdin = fifos.stdin();
        (process, Terminal { fifos, stdin, stdout })
    }

    fn enter(&self, text: &str) {
        feed(&self.stdin, text.as_bytes());
    }

    /// Reads until the output ends in this; returns it all.
    fn until(&mut self, end: &str) -> String {
        let bytes = self.stdout.until(|bytes| bytes.ends_with(end.as_bytes()));
        String::from_utf8_lossy(&bytes).into_owned()
    }
}

/// Checks a process with a terminal as init and as exec.
fn each_kind(spec: Spec, check: impl Fn(&Process, Terminal)) {
    let node = Node::shared();
    let spec = spec.terminal();
    {
        let (container, terminal) =
            Terminal::attached(|io| node.container("terminal", spec.clone()).started(io));
        check(&container, terminal);
    }
    let container = node.container("terminal", Spec::sleeping()).started(&Io::default());
    let (exec, terminal) = Terminal::attached(|io| container.exec(spec).started(io));
    check(&exec, terminal);
}

#[test]
fn output_comes_as_from_a_terminal() {
    each_kind(
        Spec::sh("[ -t 0 ] && [ -t 1 ] && [ -t 2 ] && echo out; echo err >&2; exit 5"),
        |process, mut terminal| {
            // The line discipline puts a return before each line feed.
            assert_eq!(terminal.stdout.text(), "out\r\nerr\r\n");
            assert_eq!(process.exit_status(), 5);
            assert!(process.state().expect("state").terminal);
        },
    );
}

#[test]
fn what_is_typed_is_echoed_and_read() {
    each_kind(Spec::sh("echo ready; read line; echo got $line; exit 6"), |process, mut terminal| {
        terminal.until("ready\r\n");
        terminal.enter("a word\n");
        assert_eq!(terminal.stdout.text(), "a word\r\ngot a word\r\n");
        assert_eq!(process.exit_status(), 6);
    });
}

#[test]
fn control_c_is_a_signal() {
    each_kind(Spec::sh("trap 'exit 7' INT; echo ready; cat"), |process, mut terminal| {
        terminal.until("ready\r\n");
        terminal.enter("\x03");
        assert_eq!(process.exit_status(), 7);
    });
}

#[test]
fn a_terminal_has_its_size_from_the_start_and_can_be_resized() {
    let spec = Spec::sh("stty size; while read line; do stty size; done").console_size(123, 45);
    each_kind(spec, |process, mut terminal| {
        terminal.until("45 123\r\n");
        process.resize(80, 25).expect("resize");
        terminal.enter("\n");
        terminal.until("25 80\r\n");
        process.resize(200, 60).expect("resize again");
        terminal.enter("\n");
        terminal.until("60 200\r\n");
        process.kill(SIGKILL).expect("kill");
        process.wait().expect("wait");
        // What the stock shim says of a stopped init depends on how far its own end is.
        if !process.exec.is_empty() {
            assert_refused(process.resize(80, 25));
        }
    });
}

#[test]
fn a_resize_is_told_by_a_signal() {
    let script = "trap 'stty size; exit 8' WINCH; echo ready; sleep 100000 & wait";
    each_kind(Spec::sh(script), |process, mut terminal| {
        terminal.until("ready\r\n");
        process.resize(132, 43).expect("resize");
        assert_eq!(terminal.stdout.text(), "43 132\r\n");
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
    each_kind(Spec::sh("stty raw -echo; echo ready; exec head -c 256"), |process, mut terminal| {
        terminal.until("ready\n");
        feed(&terminal.stdin, &bytes);
        assert_eq!(terminal.stdout.rest(), bytes);
        assert_eq!(process.exit_status(), 0);
    });
}

#[test]
fn a_background_child_does_not_keep_the_terminals_output_open() {
    let node = Node::shared();
    let container = node.container("holder", Spec::sleeping()).started(&Io::default());
    let script = "trap '' HUP; sleep 100000 & echo $!; exit 9";
    let (exec, mut terminal) =
        Terminal::attached(|io| container.exec(Spec::sh(script).terminal()).started(io));
    let started = Instant::now();
    assert_eq!(exec.exit_status(), 9);
    assert!(started.elapsed() < Duration::from_secs(2), "Wait took {:?}", started.elapsed());
    exec.delete().expect("delete");
    terminal.stdout.rest();
    assert_eq!(container.pids().expect("pids").len(), 2, "the child lives on");
}

#[test]
fn much_output_of_a_terminal_is_complete() {
    let bulk = Bulk::new(number("E2E_BYTES", 100 << 20, 8 << 20));
    let node = Node::shared();
    let spec = Spec::sh(&format!("stty -opost; {}", bulk.script())).terminal();
    {
        let (container, mut terminal) =
            Terminal::attached(|io| node.container("much", bulk.bind(spec.clone())).started(io));
        bulk.assert_arrives(&mut terminal.stdout);
        assert_eq!(container.exit_status(), 0);
    }
    let container = node.container("much", bulk.bind(Spec::sleeping())).started(&Io::default());
    let (exec, mut terminal) = Terminal::attached(|io| container.exec(spec).started(io));
    bulk.assert_arrives(&mut terminal.stdout);
    assert_eq!(exec.exit_status(), 0);
}

#[test]
fn a_terminal_hangs_up_when_stdin_is_closed_and_the_client_gone() {
    // PID 1 of a pid namespace hears only what it has a trap for.
    let script = "trap 'exit 9' HUP; echo ready; while :; do read line && echo got $line; done";
    each_kind(Spec::sh(script), |process, mut terminal| {
        terminal.until("ready\r\n");
        let Terminal { stdin, stdout, fifos } = terminal;
        // A client that goes away is no end: it may come back.
        drop(stdin);
        let mut terminal = Terminal { stdin: fifos.stdin(), stdout, fifos };
        terminal.enter("again\n");
        terminal.until("got again\r\n");
        process.close_stdin().expect("close stdin");
        drop(terminal.stdin);
        assert_eq!(process.exit_status(), 9);
    });
}

#[test]
fn a_client_may_leave_a_terminal_and_come_back() {
    each_kind(Spec::sh("echo one; read x; echo two; read x; exit 3"), |process, mut terminal| {
        terminal.until("one\r\n");
        terminal.enter("\n");
        terminal.until("two\r\n");
        let Terminal { stdin, stdout, fifos } = terminal;
        drop((stdin, stdout));
        let terminal = Terminal { stdin: fifos.stdin(), stdout: fifos.stdout(), fifos };
        terminal.enter("\n");
        assert_eq!(process.exit_status(), 3);
    });
}

#[test]
fn a_terminal_that_is_not_read_delays_no_other() {
    let node = Node::shared();
    let container = node.container("twenty", Spec::sleeping()).started(&Io::default());
    let spec = Spec::sh("while read line; do echo got $line; done").terminal();
    let (_flooding, _unread) = Terminal::attached(|io| {
        container.exec(Spec::sh("while :; do echo flood; done").terminal()).started(io)
    });
    let mut others: Vec<_> =
        (0..19).map(|_| Terminal::attached(|io| container.exec(spec.clone()).started(io))).collect();
    let started = Instant::now();
    for round in 0..5 {
        for (_, terminal) in &mut others {
            terminal.enter(&format!("{round}\n"));
            terminal.until(&format!("got {round}\r\n"));
        }
    }
    assert!(started.elapsed() < Duration::from_secs(5), "a hundred lines took {:?}", started.elapsed());
}

#[test]
fn an_unread_terminal_can_be_killed_and_deleted() {
    let node = Node::shared();
    let container = node.container("unread", Spec::sleeping()).started(&Io::default());
    let (exec, terminal) = Terminal::attached(|io| {
        container.exec(Spec::sh("while :; do echo flood; done").terminal()).started(io)
    });
    exec.kill(SIGKILL).expect("kill");
    assert_eq!(exec.exit_status(), 137);
    exec.delete().expect("delete with output unread");
    drop(terminal);
    assert!(process::exists(container.pid()));
}
