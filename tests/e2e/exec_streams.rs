//! Output of execs in unusual cases: children that stay, slow or missing readers, files, loggers.

use std::fs::{File, remove_file};
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::thread;
use std::time::{Duration, Instant};

use crate::attached::{self, each_kind};
use crate::common::bulk::Bulk;
use crate::common::container::Container;
use crate::common::node::{Node, number};
use crate::common::spec::Spec;
use crate::common::stdio::{Fifos, Gate, Scratch, feed};
use crate::common::task::{Io, SIGKILL};
use crate::common::{daemon, process, wait};
use crate::logger::Logger;

/// The stock shim of containerd 1.7 waits 2 s for the output of children that stay before it completes a Delete.
const DELETE_LIMIT: Duration = Duration::from_secs(6);

fn sleeping(node: &Node) -> Container<'_> {
    node.container("streams", Spec::sleeping()).started(&Io::default())
}

#[test]
fn a_background_child_delays_no_wait_and_the_end_of_output_only_for_a_limit() {
    let node = Node::shared();
    let container = sleeping(&node);
    let (exec, mut client) = attached::exec(&container, Spec::sh("sleep 100000 & echo hi"));
    let started = Instant::now();
    assert_eq!(exec.exit_status(), 0);
    assert!(started.elapsed() < attached::WAIT_LIMIT, "Wait took {:?}", started.elapsed());
    let started = Instant::now();
    exec.delete().expect("delete");
    assert!(started.elapsed() < DELETE_LIMIT, "Delete took {:?}", started.elapsed());
    assert_eq!((client.stdout.text().as_str(), client.stderr.text().as_str()), ("hi\n", ""));
    assert_eq!(container.pids().expect("pids").len(), 2, "the child lives on");
}

/// A server that an exec has started continues or ends, as it likes, once nobody reads its output.
#[test]
fn a_child_that_writes_after_the_delete_of_its_exec_does_not_wait_for_ever() {
    let (node, gate) = (Node::shared(), Gate::new());
    let container = node.container("streams", gate.bind(Spec::sleeping())).started(&Io::default());
    let child = format!("{}; trap '' PIPE; while echo more; do :; done", Gate::WAIT);
    let (exec, mut client) = attached::exec(&container, Spec::sh(&format!("({child}) & echo hi")));
    assert_eq!(exec.exit_status(), 0);
    exec.delete().expect("delete");
    assert_eq!(client.stdout.text(), "hi\n");
    gate.open();
    wait::until_true("the child has ended", || container.pids().expect("pids").len() == 1);
}

/// How long five execs with some output take, one after the other.
fn five_execs(container: &Container) -> Duration {
    let started = Instant::now();
    for _ in 0..5 {
        let (exec, mut client) = attached::exec(container, Spec::sh("seq 1 20000"));
        assert!(client.stdout.text().ends_with("\n20000\n"));
        assert_eq!(exec.exit_status(), 0);
        exec.delete().expect("delete");
    }
    started.elapsed()
}

#[test]
fn a_reader_that_stops_delays_only_its_own_stream() {
    let node = Node::shared();
    let [container, other] = [(); 2].map(|()| sleeping(&node));
    let quiet = five_execs(&container);
    let flood = Spec::sh("while :; do echo flood; done");
    let (stuck, mut client) = attached::exec(&container, flood.clone());
    let (init_stuck, _unread) =
        attached::Client::attached(flood, |spec, io| node.container("stuck", spec).started(io));
    for beside in [&container, &other] {
        let flooded = five_execs(beside);
        assert!(
            flooded < quiet * 10 + Duration::from_secs(5),
            "five execs took {flooded:?}, {quiet:?} before"
        );
    }
    // Init continues when its reader continues. It can be killed while the reader does not read.
    let mut count = 0;
    client.stdout.each(|piece| {
        count += piece.len();
        count < 1 << 20
    });
    assert!(count >= 1 << 20, "{count} bytes");
    for process in [&*stuck, &*init_stuck] {
        process.kill(SIGKILL).expect("kill");
        assert_eq!(process.exit_status(), 137);
        process.delete().expect("delete with output unread");
    }
}

#[test]
fn a_reader_that_goes_away_harms_no_writer() {
    let gate = Scratch::new("gate");
    let script = "trap 'echo SIGPIPE >> /gate/trouble' PIPE; echo here; read go; \
                  seq 1 1000 || echo failed >> /gate/trouble; exit 5";
    let spec = Spec::sh(script).bind(gate.as_str(), "/gate", &["rw"]);
    each_kind(spec, |process, mut client| {
        client.until("here\n");
        drop((client.stdout, client.stderr));
        feed(&client.stdin, b"go\n");
        assert_eq!(process.exit_status(), 5);
        process.delete().expect("delete");
        assert_eq!(gate.read("trouble"), "");
    });
}

#[test]
fn much_output_is_complete() {
    let bulk = Bulk::new(number("E2E_BYTES", 1 << 30, 64 << 20));
    each_kind(bulk.bind(Spec::sh(&bulk.script())), |process, mut client| {
        bulk.assert_arrives(&mut client.stdout);
        assert_eq!(process.exit_status(), 0);
    });
}

#[test]
fn output_of_a_process_that_ends_at_once_is_complete() {
    let node = Node::shared();
    let container = sleeping(&node);
    for round in 0..30 {
        let (exec, mut client) = attached::exec(&container, Spec::sh("seq 1 5000; echo err >&2"));
        if round % 2 == 0 {
            assert_eq!(exec.exit_status(), 0, "before the output is read");
        }
        let text = client.stdout.text();
        assert!(text.ends_with("\n5000\n") && text.lines().count() == 5000, "round {round}: {}", text.len());
        assert_eq!((client.stderr.text().as_str(), exec.exit_status()), ("err\n", 0));
        exec.delete().expect("delete");
    }
}

#[test]
fn output_that_is_read_after_delete_is_complete() {
    let node = Node::shared();
    let container = sleeping(&node);
    let (exec, mut client) = attached::exec(&container, Spec::sh("seq 1 5000"));
    assert_eq!(exec.exit_status(), 0);
    exec.delete().expect("delete");
    assert_eq!(client.stdout.text().lines().count(), 5000);
}

#[test]
fn an_exec_without_client_stdio_can_write_and_reads_nothing() {
    needs!(OurShim); // the stock shim opens /dev/null for reading only
    let node = Node::shared();
    let container = sleeping(&node);
    let exec = container.exec_sh("[ -z \"$(cat)\" ] && echo out && echo err >&2 && exit 32");
    assert_eq!(exec.exit_status(), 32);
}

#[test]
fn an_exec_whose_start_failed_starts_again_for_the_same_client() {
    let node = Node::shared();
    let programs = Scratch::new("programs");
    let spec = Spec::sleeping().bind(programs.as_str(), "/programs", &["rw"]);
    let container = node.container("again", spec).started(&Io::default());
    for terminal in [false, true] {
        let fifos = Fifos::new("again");
        let (mut stdout, mut stderr) = (fifos.stdout(), fifos.stderr());
        let stdin = fifos.open_stdin();
        let spec = Spec::new(&["/programs/late"]);
        let (spec, io) = if terminal { (spec.terminal(), fifos.terminal()) } else { (spec, fifos.io()) };
        let exec = container.exec(spec).added(&io);
        for _ in 0..2 {
            exec.start().expect_err("there is no such program yet");
        }
        let stdin = stdin.file();
        feed(&stdin, b"early\n");
        let mut late = File::options();
        let late = late.write(true).create_new(true).mode(0o755).open(programs.join("late"));
        late.and_then(|mut late| late.write_all(b"#!/bin/sh\nexec cat\n")).expect("make the program");
        exec.start().expect("start it now");
        feed(&stdin, b"late\n");
        if terminal {
            // Without input the terminal would hang up at once, and lose output.
            // The terminal echoes each line, and cat repeats it, in any order of the two lines.
            let text = stdout.until(|bytes| bytes.len() >= 2 * "early\r\nlate\r\n".len());
            let text = String::from_utf8_lossy(&text).into_owned();
            let mut lines: Vec<_> = text.lines().collect();
            lines.sort_unstable();
            assert_eq!(lines, ["early", "early", "late", "late"]);
            exec.kill(SIGKILL).expect("kill");
            exec.exit_status();
        } else {
            drop(stdin);
            exec.close_stdin().expect("CloseIO");
            assert_eq!((stdout.text().as_str(), stderr.text().as_str()), ("early\nlate\n", ""));
            assert_eq!(exec.exit_status(), 0);
        }
        exec.delete().expect("delete");
        remove_file(programs.join("late")).expect("remove the program");
    }
}

/// containerd's client library waits for the end of the output before it returns the error of the start.
#[test]
fn the_client_of_an_exec_whose_start_failed_sees_the_end_of_its_output() {
    needs!(OurShim); // the stock shim has not opened the FIFOs then
    let node = Node::shared();
    let container = sleeping(&node);
    for terminal in [false, true] {
        let fifos = Fifos::new("failed");
        let (mut stdout, mut stderr) = (fifos.stdout(), fifos.stderr());
        let spec = Spec::new(&["/no/such/program"]);
        let (spec, io) = if terminal { (spec.terminal(), fifos.terminal()) } else { (spec, fifos.output()) };
        let exec = container.exec(spec).added(&io);
        exec.start().expect_err("there is no such program");
        assert_eq!(stdout.text(), "");
        if !terminal {
            assert_eq!(stderr.text(), "");
        }
        exec.delete().expect("delete");
    }
}

#[test]
fn one_stream_alone_is_enough() {
    needs!(OurShim); // the stock shim refuses
    let node = Node::shared();
    let container = sleeping(&node);
    let fifos = Fifos::new("one");
    let mut stdout = fifos.stdout();
    let io = Io { stderr: String::new(), ..fifos.output() };
    let exec = container.exec(Spec::sh("echo out; echo err >&2; exit 33")).started(&io);
    assert_eq!(stdout.text(), "out\n");
    assert_eq!(exec.exit_status(), 33);
}

#[test]
fn a_binary_logger_of_an_exec_gets_the_id_of_the_exec() {
    let node = Node::shared();
    let container = sleeping(&node);
    let logger = Logger::new("exec 5>&-");
    let script = "echo out; echo err >&2; seq 1 20000";
    let exec = container.exec(Spec::sh(script)).started(&logger.io("binary", "?key=value"));
    assert_eq!(exec.exit_status(), 0);
    exec.delete().expect("delete");
    logger.ended();
    assert_eq!(logger.scratch.read("out").lines().count(), 20_001);
    assert_eq!(logger.scratch.read("err"), "err\n");
    assert_eq!(logger.scratch.read("args"), "key value\n");
    let env = logger.scratch.read("env");
    for expected in
        [format!("CONTAINER_ID={}", exec.id), format!("CONTAINER_NAMESPACE={}", container.namespace)]
    {
        assert!(env.lines().any(|line| line == expected), "{expected} in {env}");
    }
}

#[test]
fn a_missing_logger_program_fails_the_start_of_an_exec() {
    let node = Node::shared();
    let container = sleeping(&node);
    let uri = "binary:///no/such/logger".to_string();
    let io = Io { stdout: uri.clone(), stderr: uri, ..Io::default() };
    // Exec or Start may report the error.
    let refused = container.exec(Spec::sleeping()).add(&io).and_then(|exec| exec.start().map(drop));
    let refusal = refused.expect_err("no logger");
    assert!(refusal.message().contains("/no/such/logger"), "{refusal}");
    assert!(process::runs(container.pid()));
}

#[test]
fn output_of_many_execs_at_once_is_not_mixed_up() {
    let node = Node::shared();
    let container = sleeping(&node);
    thread::scope(|scope| {
        for number in 0..20 {
            let container = &container;
            scope.spawn(move || {
                let script = format!("i=0; while [ $i -lt 500 ]; do echo {number}; i=$((i+1)); done");
                let (exec, mut client) = attached::exec(container, Spec::sh(&script));
                assert_eq!(client.stdout.text(), format!("{number}\n").repeat(500));
                assert_eq!(exec.exit_status(), 0);
            });
        }
    });
    wait::until_true("only init is left", || container.pids().is_ok_and(|pids| pids.len() == 1));
}

#[test]
fn clients_that_never_open_their_fifos_delay_no_other_client() {
    needs!(OurShim);
    let node = Node::exclusive();
    let slow = node.container("slow", Spec::sleeping()).started(&Io::default());
    let other = node.container("other", Spec::sleeping()).started(&Io::default());
    let fifos: Vec<_> = (0..80).map(|_| Fifos::new("slow")).collect();
    let execs: Vec<_> =
        fifos.iter().map(|fifos| slow.exec(Spec::sh("true")).added(&fifos.output())).collect();
    std::thread::scope(|scope| {
        let (begun, starting) = std::sync::mpsc::channel();
        for exec in &execs {
            let begun = begun.clone();
            scope.spawn(move || {
                begun.send(()).expect("report that a start begins");
                // No client reads: the start fails after its limit.
                exec.start().expect_err("nobody has opened the FIFO");
            });
        }
        execs.iter().for_each(|_| starting.recv().expect("a start begins"));
        let unloaded = std::time::Instant::now();
        assert_eq!(other.exec_sh("exit 3").exit_status(), 3);
        let new = node.container("new", Spec::sh("exit 4")).started(&Io::default());
        assert_eq!(new.exit_status(), 4);
        // The starts wait for 30 s. If this took less, nobody has waited for them.
        assert!(unloaded.elapsed() < std::time::Duration::from_secs(20), "{:?}", unloaded.elapsed());
    });
}

/// A client whose call has failed gives up, and nobody opens its FIFOs any more.
#[test]
fn a_start_that_waits_for_its_client_ends_with_the_exec_or_its_container() {
    needs!(OurShim);
    /// The daemon waits for the client for 30 s.
    const LIMIT: Duration = Duration::from_secs(10);
    let node = Node::exclusive();
    let container = sleeping(&node);
    let fifos = [Fifos::new("deleted"), Fifos::new("killed")];
    let [deleted, killed] =
        fifos.each_ref().map(|fifos| container.exec(Spec::sh("true")).added(&fifos.output()));
    thread::scope(|scope| {
        let starts = [&deleted, &killed].map(|exec| scope.spawn(|| exec.start()));
        for fifos in &fifos {
            let fifo = fifos.output().stdout;
            wait::until_true("the daemon waits for the client", || daemon::has_open(&fifo));
        }
        let begun = Instant::now();
        deleted.delete().expect("delete the exec");
        assert!(begun.elapsed() < LIMIT, "Delete took {:?}", begun.elapsed());
        let begun = Instant::now();
        container.kill(SIGKILL).expect("kill");
        assert_eq!(container.exit_status(), 137);
        assert!(begun.elapsed() < LIMIT, "the exit took {:?}", begun.elapsed());
        for start in starts {
            start.join().expect("the start ends").expect_err("nobody has opened the FIFO");
        }
    });
}
