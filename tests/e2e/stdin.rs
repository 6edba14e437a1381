//! Input of init and of execs: every byte arrives, the input ends when the client ends it and not before, and a
//! client that ignores its input does no harm.

use std::thread;

use crate::attached::{self, each_kind};
use crate::common::bulk::Bulk;
use crate::common::node::{Node, number};
use crate::common::spec::Spec;
use crate::common::stdio::Gate;
use crate::common::stdio::{Fifos, feed};
use crate::common::task::{Io, SIGKILL};

#[test]
fn input_arrives_and_ends_with_close_io() {
    let bytes: Vec<u8> = (0..=255).collect();
    each_kind(Spec::sh("cat; echo end"), |process, mut client| {
        feed(&client.stdin, &bytes);
        client.stdout.until(|seen| seen == bytes);
        process.close_stdin().expect("close stdin");
        process.close_stdin().expect("close stdin again");
        drop(client.stdin);
        assert_eq!(client.stdout.text(), "end\n");
        assert_eq!(process.exit_status(), 0);
    });
}

#[test]
fn stdin_ends_when_it_is_closed_after_the_client_has_gone() {
    each_kind(Spec::sh("cat; echo end"), |process, mut client| {
        client.enter("last words\n");
        drop(client.stdin);
        client.stdout.until(|bytes| bytes == b"last words\n");
        process.close_stdin().expect("close stdin");
        assert_eq!(client.stdout.text(), "end\n");
    });
}

/// The client has written and closed the input before the process runs the command that reads the input.
fn reads_early_input(command: &str) {
    let gate = Gate::new();
    let spec = gate.bind(Spec::sh(&format!("{}; {command}", Gate::WAIT)));
    each_kind(spec, |process, mut client| {
        client.enter("early\n");
        process.close_stdin().expect("close stdin");
        drop(client.stdin);
        gate.open();
        assert_eq!(client.stdout.text(), "early\n");
        assert_eq!(process.exit_status(), 0);
    });
}

#[test]
fn input_that_was_written_before_the_process_reads_is_not_lost() {
    reads_early_input("cat");
}

/// `/dev/stdin` is opened anew, as by `tar -xf /dev/stdin`. Opening a pipe without a writer does not wait, opening a FIFO does.
#[test]
fn stdin_can_be_opened_again_after_the_client_has_closed_it() {
    reads_early_input("cat /dev/stdin");
}

#[test]
fn stdin_stays_open_when_the_client_goes_away() {
    each_kind(Spec::sh("cat; echo end"), |process, mut client| {
        for line in ["one\n", "two\n", "three\n"] {
            client.enter(line);
            client.until(line);
            client = client.again();
        }
        process.close_stdin().expect("close stdin");
        drop(client.stdin);
        assert_eq!(client.stdout.text(), "end\n");
    });
}

#[test]
fn much_input_is_complete() {
    let bulk = Bulk::new(number("E2E_BYTES", 64 << 20, 8 << 20));
    each_kind(Spec::new(&["/bin/cat"]), |process, mut client| {
        let stdin = client.stdin;
        thread::scope(|scope| {
            scope.spawn(|| {
                bulk.feed(&stdin);
                process.close_stdin().expect("close stdin");
                drop(stdin);
            });
            bulk.assert_arrives(&mut client.stdout);
        });
        assert_eq!(process.exit_status(), 0);
    });
}

#[test]
fn a_client_that_never_opens_stdin_does_not_delay_the_start() {
    let node = Node::shared();
    let container = node.container("unopened", Spec::sleeping()).started(&Io::default());
    for terminal in [false, true] {
        let fifos = Fifos::new("unopened");
        let (mut stdout, _stderr) = (fifos.stdout(), fifos.stderr());
        let spec = Spec::sh("echo here; cat");
        let (spec, io) = if terminal { (spec.terminal(), fifos.terminal()) } else { (spec, fifos.io()) };
        let exec = container.exec(spec.clone()).started(&io);
        stdout.until(|bytes| bytes.starts_with(b"here"));
        exec.kill(SIGKILL).expect("kill");
        assert_eq!(exec.exit_status(), 137);
        exec.delete().expect("delete");

        let fifos = Fifos::new("unopened");
        let (mut stdout, _stderr) = (fifos.stdout(), fifos.stderr());
        let io = if terminal { fifos.terminal() } else { fifos.io() };
        let init = node.container("unopened", spec).started(&io);
        stdout.until(|bytes| bytes.starts_with(b"here"));
        init.kill(SIGKILL).expect("kill");
        assert_eq!(init.exit_status(), 137);
        init.delete().expect("delete");
    }
}

#[test]
fn unread_stdin_does_not_delay_the_exit() {
    let node = Node::shared();
    let container = node.container("unread", Spec::sleeping()).started(&Io::default());
    let (exec, client) = attached::exec(&container, Spec::sh("echo here; exec sleep 100000"));
    // The input fills every buffer between the client and the process.
    let writer = thread::spawn(move || {
        use std::io::Write;
        let mut stdin = &client.stdin;
        while stdin.write_all(&[b'x'; 4096]).is_ok() {}
    });
    exec.kill(SIGKILL).expect("kill");
    assert_eq!(exec.exit_status(), 137);
    exec.delete().expect("delete with input unread");
    writer.join().expect("the client's writes end with an error, not in a wait for ever");
}
