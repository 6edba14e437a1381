//! Every process in the cgroup of the daemon's service is killed, as by `systemctl kill`. Running commands of the OCI runtime
//! are completed, and no call fails.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::thread;

use containerd_client::tonic::Status;
use prost_types::Any;

use crate::attached::each_kind_on;
use crate::common::leaks::{self, Traces};
use crate::common::node::Node;
use crate::common::spec::Spec;
use crate::common::stdio::{Fifos, Scratch};
use crate::common::task::{Io, SIGKILL};
use crate::common::{daemon, process, wait};
use crate::runtime_options::runc_options;

/// An OCI runtime that, in one of its commands, waits as long as a file exists.
struct Held {
    scratch: Scratch,
}

/// Where the runtime waits: before or after the work of the real runtime.
const MOMENTS: [&str; 2] = ["before", "after"];

impl Held {
    fn at(moment: &str, verb: &str) -> Held {
        let scratch = Scratch::new("held");
        let (here, held) = (scratch.text("here"), scratch.text("held"));
        let script = format!(
            "#!/bin/sh\n\
             wait_at() {{ case \" $words \" in *' {verb} '*) [ $1 = {moment} ] || return; touch {here}\n\
             while [ -e {held} ]; do sleep 0.02; done;; esac; }}\n\
             words=$*; wait_at before; runc \"$@\"; code=$?; wait_at after; exit $code\n"
        );
        fs::write(scratch.join("runtime.sh"), script).expect("write the runtime");
        fs::set_permissions(scratch.join("runtime.sh"), fs::Permissions::from_mode(0o755))
            .expect("make it executable");
        fs::write(scratch.join("held"), "").expect("hold it");
        Held { scratch }
    }

    fn options(&self) -> Any {
        runc_options(|options| options.binary_name = self.scratch.text("runtime.sh"))
    }

    /// Makes a call; kills the daemon's cgroup while the runtime is held in it; lets the runtime continue when the next
    /// daemon serves.
    fn killed_during<T: Send>(&self, call: impl FnOnce() -> T + Send) -> T {
        thread::scope(|scope| {
            let called = scope.spawn(call);
            wait::until_true("the runtime is held", || self.scratch.join("here").exists());
            daemon::wait_for_another(daemon::kill_cgroup_now());
            fs::remove_file(self.scratch.join("held")).expect("let it continue");
            called.join().expect("the call does not panic")
        })
    }
}

/// After this container, the daemon has everything that it makes for its first container.
fn warm_up(node: &Node) {
    let first = node.container("first", Spec::sleeping()).started(&Io::default());
    first.kill(SIGKILL).expect("kill");
    first.exit_status();
    first.delete().expect("delete");
}

/// A container writes a line and ends with 7. Each call for the container and for an exec in it is interrupted at each moment.
#[test]
fn no_command_of_the_oci_runtime_dies_with_the_daemons_cgroup() {
    needs!(OurShim);
    let node = Node::exclusive();
    warm_up(&node);
    let before = Traces::take();
    for verb in ["create", "start", "exec", "delete"] {
        for moment in MOMENTS {
            let held = Held::at(moment, verb);
            let during = |at: &str, call: &mut (dyn FnMut() + Send)| {
                if at == verb { held.killed_during(call) } else { call() }
            };
            let fifos = Fifos::new("held");
            let (mut stdout, _stderr) = (fifos.stdout(), fifos.stderr());
            let container = node
                .container(
                    "held",
                    Spec::sh("echo begun; trap 'echo ended; exit 7' TERM; while :; do sleep 0.1; done"),
                )
                .options(held.options())
                .make();
            let place = format!("{moment} {verb}");
            let succeeded = |done: Result<u32, Status>| assert!(done.is_ok(), "{place}: {done:?}");
            during("create", &mut || succeeded(container.create(&fifos.output())));
            during("start", &mut || succeeded(container.start()));
            stdout.until(|bytes| bytes == b"begun\n");
            let exec = container.exec(Spec::sh("exit 6")).added(&Io::default());
            during("exec", &mut || succeeded(exec.start()));
            assert_eq!(exec.exit_status(), 6, "{place}");
            exec.delete().expect("delete the exec");
            container.kill(15).expect("kill");
            assert_eq!(container.exit_status(), 7, "{place}");
            during("delete", &mut || assert_eq!(container.delete().expect("delete").exit_status, 7));
            assert_eq!(stdout.text(), "ended\n", "{place}");
        }
    }
    leaks::assert_none("commands of the runtime beside a killed daemon", &before);
}

#[test]
fn containers_and_execs_work_while_the_daemons_cgroup_is_killed_again_and_again() {
    needs!(OurShim);
    let node = Node::exclusive();
    warm_up(&node);
    let before = Traces::take();
    daemon::cgroup_killed_during(|kills| {
        for turn in kills.turns(15, 15) {
            let status = turn % 200;
            let fifos = Fifos::new("amid");
            let (mut stdout, _stderr) = (fifos.stdout(), fifos.stderr());
            // On a busy machine, the exec could end before the container's shell has begun.
            let spec = Spec::sh(&format!("echo {status}; touch /dev/said; exec sleep 100000"));
            let container = node.container("amid", spec).started(&fifos.output());
            let exec =
                container.exec_sh(&format!("until [ -e /dev/said ]; do usleep 1000; done; exit {status}"));
            assert_eq!(exec.exit_status(), status);
            exec.delete().expect("delete the exec");
            container.kill(SIGKILL).expect("kill");
            assert_eq!(container.exit_status(), 137);
            assert_eq!(container.delete().expect("delete").exit_status, 137);
            assert_eq!(stdout.text(), format!("{status}\n"));
        }
    });
    leaks::assert_none("containers and many daemons", &before);
}

#[test]
fn terminals_work_while_the_daemons_cgroup_is_killed_again_and_again() {
    needs!(OurShim);
    let node = Node::exclusive();
    daemon::cgroup_killed_during(|kills| {
        for _ in kills.turns(4, 8) {
            let spec = Spec::sh("echo ready; read line; echo got $line; exit 6").terminal();
            each_kind_on(&node, spec, |process, mut client| {
                client.until("ready\r\n");
                client.enter("a word\n");
                assert_eq!(client.stdout.text(), "a word\r\ngot a word\r\n");
                assert_eq!(process.exit_status(), 6);
            });
        }
    });
}

#[test]
fn the_cgroups_of_the_oci_runtime_disappear() {
    needs!(OurShim);
    let node = Node::exclusive();
    warm_up(&node);
    process::succeed("systemctl", &["stop", "containerd-shim-systemd-v1.service"]);
    let left = process::run("find", &["/sys/fs/cgroup", "-name", "containerd-shim-runtime"]).text();
    assert_eq!(left, "");
}
