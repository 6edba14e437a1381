//! `docker attach` and `docker logs`.

use std::process::{Command, Stdio};

use nix::sys::signal::Signal;

use crate::common::{daemon, wait};
use crate::docker::{Docker, name};

#[test]
fn attach_is_a_dialogue_and_several_clients_can_attach() {
    let docker = Docker::new();
    let container = docker
        .background(&["-it"], &["sh", "-c", "while read -r line; do echo \"said $line\"; done; exit 13"]);
    let mut first = docker.in_terminal(&["attach", &container]);
    first.enter("one\n");
    first.until("said one");
    let mut second = docker.in_terminal(&["attach", &container]);
    second.enter("two\n");
    first.until("said two");
    second.until("said two");
    // The keys that detach a client.
    second.enter("\u{10}\u{11}");
    assert!(second.code().is_some(), "the detached client has exited");
    first.enter("three\n");
    first.until("said three");
    drop(first);
    assert_eq!(docker.inspect(&container, "{{.State.Running}}"), "true");
    let mut third = docker.in_terminal(&["attach", &container]);
    third.enter("four\n");
    third.until("said four");
    // The test waits for this, because a client whose terminal is not in raw mode yet would lose the keys.
    third.enter("\u{4}");
    assert_eq!(third.code(), Some(13));
    let logs = docker.ok(&["logs", &container]);
    for word in ["one", "two", "three", "four"] {
        assert!(logs.contains(&format!("said {word}")), "{logs}");
    }
}

#[test]
fn a_container_survives_a_kill_of_its_client() {
    let docker = Docker::new();
    let container =
        docker.background(&["--interactive"], &["sh", "-c", "while :; do echo tick; usleep 20000; done"]);
    let mut client = Command::new("docker")
        .args(["attach", &container])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .expect("run docker attach");
    client.kill().expect("kill docker attach");
    client.wait().expect("wait for docker attach");
    let before = docker.ok(&["logs", &container]).lines().count();
    wait::until_true("it ticks on", || docker.ok(&["logs", &container]).lines().count() > before);
}

#[test]
fn run_in_the_foreground_passes_on_signals() {
    let docker = Docker::new();
    let name = name("foreground");
    let script = "trap 'echo got TERM; exit 14' TERM; echo ready; while :; do usleep 20000; done";
    let client = Command::new("docker")
        .args(docker.run_arguments(&["--name", &name], &["sh", "-c", script]))
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .expect("run docker run");
    wait::until_true("the container is there", || docker.run(&["inspect", &name]).code == Some(0));
    docker.logs_with(&name, "ready");
    daemon::signal(client.id(), Signal::SIGTERM);
    let output = client.wait_with_output().expect("wait for docker run");
    assert_eq!(output.status.code(), Some(14), "{output:?}");
    assert_eq!(String::from_utf8_lossy(&output.stdout), "ready\ngot TERM\n");
}

#[test]
fn logs_are_followed_to_the_end() {
    let docker = Docker::new();
    let script = "for n in $(seq 1 100); do echo line $n; usleep 5000; done";
    let container = docker.background(&[], &["sh", "-c", script]);
    let followed = docker.ok(&["logs", "--follow", &container]);
    let expected: Vec<String> = (1..=100).map(|number| format!("line {number}")).collect();
    assert_eq!(followed.lines().collect::<Vec<_>>(), expected);
    assert_eq!(docker.ok(&["logs", "--tail", "2", &container]), "line 99\nline 100");
    assert_eq!(docker.inspect(&container, "{{.State.ExitCode}}"), "0");
}
