//! A criu that hangs: Kill and Delete end it, and none of its processes stay.

use std::fs;
use std::thread;
use std::time::{Duration, Instant};

use containerd_client::tonic::Code;
use containerd_client::types::v1::Status;

use crate::common::checkpoint::{COUNTING, Criu, last, options, take};
use crate::common::leaks::{self, Traces};
use crate::common::node::Node;
use crate::common::shim::Shim;
use crate::common::spec::Spec;
use crate::common::stdio::{Fifos, Scratch};
use crate::common::task::{Io, SIGKILL, SIGTERM};
use crate::common::{daemon, process, systemd, wait};

/// Much shorter than any limit of the daemon, and long enough for a machine that QEMU emulates.
const SOON: Duration = Duration::from_secs(60);

/// A criu that passes all checks, and hangs when it has to dump or restore.
struct Hanging {
    scratch: Scratch,
    _criu: Criu,
}

impl Hanging {
    fn new() -> Self {
        let scratch = Scratch::new("hanging");
        let script = format!(
            "#!/bin/sh\ncase $1 in check) exit 0;; --version) echo Version: 4.1; exit 0;; esac\n\
             trap '' TERM INT HUP\ntouch {hung}\ntail -f {mark}\n",
            hung = scratch.text("hung"),
            mark = scratch.text("mark"),
        );
        fs::write(scratch.join("mark"), "").expect("make the mark");
        Self { scratch, _criu: Criu::replaced(Some(&script)) }
    }

    /// Waits until the criu that was started last hangs.
    fn until_it_hangs(&self) {
        wait::until_true("criu hangs", || fs::remove_file(self.scratch.join("hung")).is_ok());
    }

    /// Asserts that no process of the hung criu runs any more.
    fn assert_gone(&self) {
        let mark = self.scratch.text("mark");
        wait::until_true("all of criu is gone", || process::with_command_line(&mark).is_empty());
    }
}

#[test]
fn a_restore_that_hangs_is_ended_by_a_kill_and_by_a_delete() {
    needs!(OurShim, Criu);
    let node = Node::exclusive();
    drop(node.container("warm", Spec::sleeping()).started(&Io::default()));
    let before = Traces::take();
    let fifos = Fifos::new("original");
    let (mut stdout, _stderr) = (fifos.stdout(), fifos.stderr());
    let original = node.container("original", Spec::sh(COUNTING)).started(&fifos.io());
    stdout.until(|bytes| bytes.ends_with(b"3\n"));
    let images = original.checkpoint(options(|_| {})).expect("checkpoint");
    original.end();

    let copied = Fifos::new("copied");
    let (mut stdout, _stderr) = (copied.stdout(), copied.stderr());
    let copy = node.container("copy", Spec::sh(COUNTING)).make();
    copy.create_from(&images, &copied.io()).expect("create");
    let unit = systemd::unit_of(&copy);
    {
        let criu = Hanging::new();
        for signal in [SIGTERM, SIGKILL] {
            let began = thread::scope(|scope| {
                let start = scope.spawn(|| copy.start());
                criu.until_it_hangs();
                let began = Instant::now();
                copy.kill(signal).expect("kill");
                let error = start.join().expect("the start").expect_err("it was killed");
                assert_eq!(error.code(), Code::Cancelled, "{error}");
                assert!(error.message().contains("killed or deleted while criu worked"), "{error}");
                began
            });
            assert!(began.elapsed() < SOON, "{:?}", began.elapsed());
            criu.assert_gone();
            assert_eq!((copy.phase(), copy.pid()), (Status::Created, 0), "as before the start");
            assert!(!systemd::is_active(&unit));
        }
        copy.kill(SIGKILL).expect_err("it has no process");
    }
    copy.start().expect("the same restore, with another criu");
    assert!(last(&stdout.until(|bytes| bytes.ends_with(b"\n"))) >= 3);
    copy.kill(SIGTERM).expect("kill");
    assert_eq!(copy.exit_status(), 7);
    copy.delete().expect("delete");

    for killed in [false, true] {
        copy.create_from(&images, &copied.io()).expect("create");
        let criu = Hanging::new();
        thread::scope(|scope| {
            let start = scope.spawn(|| copy.start());
            criu.until_it_hangs();
            if killed {
                daemon::killed();
            }
            let began = Instant::now();
            copy.delete().expect("delete");
            assert!(began.elapsed() < SOON, "{:?}", began.elapsed());
            start.join().expect("the start").expect_err("it was deleted");
        });
        criu.assert_gone();
    }
    drop((copy, images, original));
    crate::common::checkpoint::remove_unpacked();
    leaks::assert_none("restores that hang", &before);
}

#[test]
fn a_checkpoint_that_hangs_ends_with_its_task() {
    needs!(OurShim, Criu);
    let node = Node::exclusive();
    let shim = Shim::connect(&node);
    let scratch = Scratch::new("images");
    drop(node.container("warm", Spec::sleeping()).started(&Io::default()));
    let before = Traces::take();
    let criu = Hanging::new();
    for (paused, killed, exit) in [(false, false, true), (true, false, false), (false, true, false)] {
        let fifos = Fifos::new("dumped");
        let (mut stdout, _stderr) = (fifos.stdout(), fifos.stderr());
        let container = node.container("dumped", Spec::sh(COUNTING)).started(&fifos.io());
        stdout.until(|bytes| bytes.ends_with(b"3\n"));
        if paused {
            container.pause().expect("pause");
        }
        thread::scope(|scope| {
            let taken = scope
                .spawn(|| take(&shim, &container, &scratch.text("images"), |options| options.exit = exit));
            criu.until_it_hangs();
            if killed {
                daemon::killed();
            }
            let began = Instant::now();
            container.delete().expect_err("it runs");
            container.kill(SIGKILL).expect("kill");
            assert_eq!(container.exit_status(), 137);
            container.delete().expect("delete");
            assert!(began.elapsed() < SOON, "{:?}", began.elapsed());
            let (code, reason) = taken.join().expect("the checkpoint").expect_err("the task was killed");
            if !killed {
                assert_eq!(code, ttrpc::Code::CANCELLED, "{reason}");
            }
        });
        criu.assert_gone();
    }
    drop(criu);
    leaks::assert_none("checkpoints that hang", &before);
}
