//! systemd does not start the unit of a container or of an exec, because an administrator's settings keep it from that: the
//! error says which setting, and in which file.

use std::fs;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use crate::common::container::Container;
use crate::common::leaks::{self, Traces};
use crate::common::node::{Node, unique};
use crate::common::process;
use crate::common::spec::Spec;
use crate::common::systemd::{self, DropIn, escaped};
use crate::common::task::Io;
use crate::common::wait;

/// A drop-in for units whose names begin so, removed on drop.
struct For(PathBuf);

impl For {
    fn slices(beginning: &str, text: &str) -> For {
        let directory = PathBuf::from(format!("/run/systemd/system/{beginning}.slice.d"));
        fs::create_dir_all(&directory).expect("make the directory of a drop-in");
        fs::write(directory.join("50-e2e.conf"), text).expect("write a drop-in");
        For(directory)
    }
}

impl Drop for For {
    fn drop(&mut self) {
        // If the removal fails, the next test fails.
        let _ = fs::remove_dir_all(&self.0);
        let _ = process::run("systemctl", &["daemon-reload"]);
    }
}

/// Has containerd and the daemon make what they make once for a namespace, and keep.
fn warm(node: &Node, namespace: &str) {
    node.container("warm", Spec::sleeping()).namespace(namespace).started(&Io::default()).end();
}

/// The error of a Create that systemd prevents. The Create leaves nothing.
fn refusal(node: &Node, namespace: &str) -> String {
    let before = Traces::take();
    let container = node.container("refused", Spec::sleeping()).namespace(namespace).make();
    let error = container.create(&Io::default()).expect_err("systemd does not start the unit");
    let text = error.message().to_string();
    drop(container);
    leaks::assert_none("a unit that systemd does not start", &before);
    text
}

#[test]
fn a_setting_that_keeps_a_container_from_starting_is_named() {
    needs!(OurShim);
    let node = Node::exclusive();
    let namespace = unique("no-start");
    warm(&node, &namespace);
    let settings = [
        (
            "[Unit]\nConditionPathExists=/no/such\n",
            &["ConditionPathExists=/no/such in ", "50-e2e.conf is not met"],
        ),
        ("[Unit]\nAssertPathExists=!/etc\n", &["AssertPathExists=!/etc in ", "50-e2e.conf is not met"]),
        ("[Service]\nExecStartPre=/bin/false\n", &["/bin/false of ExecStartPre=", "ended with code 1"]),
        ("[Service]\nExecCondition=/bin/false\n", &["/bin/false of ExecCondition=", "ended with code 1"]),
        ("[Service]\nExecStartPost=/bin/false\n", &["/bin/false of ExecStartPost=", "ended with code 1"]),
        ("[Service]\nUser=no-such-user\n", &["step USER failed (exit code 217)", "50-e2e.conf"]),
        ("[Service]\nBindPaths=/no/such\n", &["step NAMESPACE failed (exit code 226)", "50-e2e.conf"]),
        // The program of the daemon, or the OCI runtime, runs and fails.
        ("[Service]\nDynamicUser=yes\n", &["DynamicUser=yes in ", "50-e2e.conf"]),
        ("[Service]\nTemporaryFileSystem=/run\n", &["TemporaryFileSystem=/run in ", "50-e2e.conf"]),
        ("[Service]\nCapabilityBoundingSet=\n", &["CapabilityBoundingSet= in ", "50-e2e.conf"]),
        ("[Service]\nSystemCallFilter=~@mount\n", &["SystemCallFilter=~@mount in ", "50-e2e.conf"]),
        ("[Service]\nLimitAS=1M\n", &["LimitAS=1M in ", "50-e2e.conf"]),
        ("[Service]\nTimeoutStartSec=1ms\n", &["TimeoutStartSec=1ms in ", "50-e2e.conf"]),
        // systemd is not asked to start the unit, or refuses to.
        ("[Service]\nType=oneshot\n", &["Type=oneshot in ", "50-e2e.conf: no container can be created"]),
        (
            "[Service]\nExecStart=\nExecStart=/bin/true\n",
            &["ExecStart=/bin/true in ", "no container can be created; remove this setting"],
        ),
        ("[Service]\nExecStart=/bin/true\n", &["ExecStart=/bin/true in ", "50-e2e.conf: no container"]),
        ("[Unit]\nRefuseManualStop=yes\n", &["RefuseManualStop=yes in ", "no container can be deleted"]),
        ("[Unit]\nRequires=no-such.service\n", &["not found", "Requires=no-such.service in "]),
    ];
    for (setting, words) in settings {
        let _drop_in = DropIn::for_namespace(&namespace, setting);
        let text = refusal(&node, &namespace);
        let unit = format!("containerd-{}-", escaped(&namespace));
        for word in words.iter().copied().chain([unit.as_str()]) {
            assert!(text.contains(word), "{setting}: {word:?} is not in: {text}");
        }
    }
    let container = node.container("allowed", Spec::sleeping()).namespace(&namespace).started(&Io::default());
    container.end();
}

#[test]
fn a_setting_of_a_slice_that_keeps_a_container_from_starting_is_named() {
    needs!(OurShim);
    let node = Node::exclusive();
    let namespace = unique("no-slice");
    warm(&node, &namespace);
    let own = systemd::slice_of(&namespace);
    for beginning in [own.trim_end_matches(".slice"), "containerd-"] {
        // Nobody checks the assertions of a slice that is up.
        wait::until_true("the slice is gone", || !systemd::is_active(&own));
        let _drop_in = For::slices(beginning, "[Unit]\nAssertPathExists=/no/such\n");
        let text = refusal(&node, &namespace);
        for word in [own.as_str(), "AssertPathExists=/no/such in ", "50-e2e.conf is not met"] {
            assert!(text.contains(word), "{beginning}: {word:?} is not in: {text}");
        }
    }
    // systemd starts a unit whose slice has a condition that is not met, in that slice.
    let _drop_in = For::slices("containerd-", "[Unit]\nConditionPathExists=/no/such\n");
    let container =
        node.container("in-slice", Spec::sleeping()).namespace(&namespace).started(&Io::default());
    assert_eq!(container.exec_sh("exit 7").exit_status(), 7);
    container.end();
}

/// How long an exec took to fail, and its error.
fn failed_exec(container: &Container) -> (Duration, String) {
    let exec = container.exec(Spec::sh("exit 3")).added(&Io::default());
    let begun = Instant::now();
    let error = exec.start().expect_err("systemd does not start the unit of an exec");
    let took = begun.elapsed();
    exec.delete().expect("delete an exec");
    (took, error.message().to_string())
}

#[test]
fn a_setting_that_keeps_an_exec_from_starting_is_named_at_once() {
    needs!(OurShim);
    let node = Node::exclusive();
    let namespace = unique("no-exec");
    let container = node.container("execs", Spec::sleeping()).namespace(&namespace).started(&Io::default());
    for (setting, word) in [
        ("[Unit]\nConditionPathExists=/no/such\n", "ConditionPathExists=/no/such in "),
        ("[Unit]\nAssertPathExists=/no/such\n", "AssertPathExists=/no/such in "),
        ("[Service]\nExecStartPre=/bin/false\n", "/bin/false of ExecStartPre="),
        ("[Service]\nUser=no-such-user\n", "step USER failed"),
        ("[Service]\nDynamicUser=yes\n", "DynamicUser=yes in "),
        ("[Service]\nLimitAS=1M\n", "LimitAS=1M in "),
        ("[Service]\nRestart=always\n", "Restart=always in "),
        ("[Service]\nExecStart=\nExecStart=/bin/true\n", "ExecStart=/bin/true in "),
    ] {
        let drop_in = DropIn::for_namespace(&namespace, setting);
        let (took, text) = failed_exec(&container);
        assert!(text.contains(word), "{setting}: {word:?} is not in: {text}");
        assert!(took < Duration::from_secs(20), "{setting}: {took:?}");
        drop(drop_in);
    }
    assert_eq!(container.exec_sh("exit 7").exit_status(), 7);
    container.end();
}
