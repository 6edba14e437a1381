//! Every user may send signals over the system bus. The daemon believes only those of systemd.

use std::fs;
use std::thread;

use crate::common::container::Container;
use crate::common::events::Event;
use crate::common::node::{Node, unique};
use crate::common::spec::Spec;
use crate::common::task::Io;
use crate::common::{daemon, process, systemd, wait};

/// The daemon's names on the bus. Every user can see them.
pub fn names() -> Vec<String> {
    let pid = wait::until("the daemon serves", daemon::serving).to_string();
    let list = process::succeed("busctl", &["--system", "--no-pager", "--no-legend", "list"]);
    let columns = list.lines().map(|line| line.split_whitespace().collect::<Vec<_>>());
    let its = columns.filter(|columns| columns.get(1) == Some(&pid.as_str()) && columns[0].starts_with(':'));
    let names: Vec<String> = its.map(|columns| columns[0].to_string()).collect();
    assert!(!names.is_empty(), "the daemon has no name: {list}");
    names
}

/// Sends a signal to each of the daemon's names and as a broadcast, as the user `nobody` and as root.
fn forge(signal: &[&str]) {
    let to = names().into_iter().map(|name| vec![format!("--destination={name}")]);
    for destination in to.chain([vec![]]) {
        let destination: Vec<&str> = destination.iter().map(String::as_str).collect();
        let emit = [&["busctl", "--system"], destination.as_slice(), &["emit"], signal].concat();
        process::succeed(
            "setpriv",
            &[&["--reuid=65534", "--regid=65534", "--clear-groups"], emit.as_slice()].concat(),
        );
        process::succeed(emit[0], &emit[1..]);
    }
}

/// As systemd spells it in an object path.
pub fn object(unit: &str) -> String {
    let plain = |byte: u8| byte.is_ascii_alphanumeric();
    let escaped = unit
        .bytes()
        .map(|byte| if plain(byte) { char::from(byte).to_string() } else { format!("_{byte:02x}") });
    format!("/org/freedesktop/systemd1/unit/{}", escaped.collect::<String>())
}

/// Sends the signal that systemd sends when the main process of a unit has exited with 42.
fn forge_exit(unit: &str, pid: u32) {
    let pid = pid.to_string();
    let header = |interface, member| vec![interface, member, "sa{sv}as", "org.freedesktop.systemd1.Service"];
    let exit = ["ExecMainCode", "i", "1", "ExecMainStatus", "i", "42", "MainPID", "u", "0"];
    for (interface, member) in [
        ("org.freedesktop.DBus.Properties", "PropertiesChanged"),
        ("org.example.Properties", "PropertiesChanged"),
    ] {
        let object = object(unit);
        let start = [vec![object.as_str()], header(interface, member)].concat();
        forge(&[&start[..], &["3"], &exit, &["0"]].concat());
        forge(&[&start[..], &["4"], &exit, &["ExecMainPID", "u", &pid], &["0"]].concat());
    }
}

fn exits_of(events: &[Event]) -> Vec<(String, u32)> {
    let exits = events.iter().filter_map(|event| match event {
        Event::Exit(exit) => Some((exit.id.clone(), exit.exit_status)),
        _ => None,
    });
    exits.collect()
}

fn sleeping(node: &Node) -> Container<'_> {
    node.container("forged", Spec::sleeping()).started(&Io::default())
}

#[test]
fn nobody_can_end_a_task_or_forge_its_exit_code() {
    needs!(OurShim);
    let node = Node::exclusive();
    let container = sleeping(&node);
    let exec = container.exec(Spec::sleeping()).started(&Io::default());
    let events = node.subscribe();
    forge_exit(&systemd::unit_of_exec(&container, &exec), exec.pid());
    forge_exit(&systemd::unit_of(&container), container.pid());
    // When this exec has ended, the daemon has read all earlier signals.
    assert_eq!(container.exec_sh("exit 7").exit_status(), 7);
    assert!(process::runs(exec.pid()) && process::runs(container.pid()));

    exec.kill(9).expect("kill the exec");
    assert_eq!(exec.exit_status(), 137, "an exit that is true is still noticed");
    container.kill(9).expect("kill");
    assert_eq!(container.exit_status(), 137);
    let exits = exits_of(&events.up_to(&container, "exit"));
    assert!(exits.iter().all(|(_, status)| [7, 137].contains(status)), "{exits:?}");
    assert_eq!(exits.len(), 3, "one for each process: {exits:?}");
}

#[test]
fn nobody_can_say_that_systemd_is_gone_or_somebody_else() {
    needs!(OurShim);
    let node = Node::exclusive();
    let container = sleeping(&node);
    const BUS: [&str; 5] = [
        "/org/freedesktop/DBus",
        "org.freedesktop.DBus",
        "NameOwnerChanged",
        "sss",
        "org.freedesktop.systemd1",
    ];
    for new in ["", ":1.1", ":1.999999", "org.freedesktop.DBus"] {
        forge(&[&BUS[..], &[":1.0", new]].concat());
    }
    const RELOADING: [&str; 5] =
        ["/org/freedesktop/systemd1", "org.freedesktop.systemd1.Manager", "Reloading", "b", "false"];
    forge(&RELOADING);
    container.kill(9).expect("kill");
    assert_eq!(container.exit_status(), 137);
}

#[test]
fn nobody_can_say_that_a_job_has_ended() {
    needs!(OurShim);
    let node = Node::exclusive();
    let pipe = std::env::temp_dir().join(unique("forged-job"));
    nix::unistd::mkfifo(&pipe, nix::sys::stat::Mode::S_IRUSR | nix::sys::stat::Mode::S_IWUSR)
        .expect("mkfifo");
    let script = format!("#!/bin/sh\ncat {}\n", pipe.display());
    let hook = pipe.with_extension("sh");
    fs::write(&hook, script).expect("write a hook");
    process::succeed("chmod", &["755", &hook.to_string_lossy()]);
    // The start job of the unit lasts until a process has written to the pipe.
    let spec = Spec::sleeping().hook("createRuntime", &hook.to_string_lossy());
    let container = node.container("forged", spec).make();
    let unit = systemd::unit_of(&container);
    thread::scope(|scope| {
        let create = scope.spawn(|| container.create(&Io::default()));
        let job = wait::until("the unit has a job", || {
            Some(systemd::property(&unit, "Job")).filter(|job| !job.is_empty() && job != "0")
        });
        let object = format!("/org/freedesktop/systemd1/job/{job}");
        for result in ["failed", "done"] {
            let header =
                ["/org/freedesktop/systemd1", "org.freedesktop.systemd1.Manager", "JobRemoved", "uoss"];
            forge(&[&header[..], &[&job, &object, &unit, result]].concat());
        }
        fs::write(&pipe, "").expect("let the hook end");
        create.join().expect("create does not panic").expect("create");
    });
    container.start().expect("start");
    assert_eq!(container.exec_sh("exit 7").exit_status(), 7);
    for file in [&pipe, &hook] {
        fs::remove_file(file).expect("tidy up");
    }
}

#[test]
fn more_calls_at_once_than_the_bus_allows_all_succeed() {
    needs!(OurShim);
    let node = Node::exclusive();
    let container = sleeping(&node);
    container.kill(9).expect("kill");
    container.wait().expect("wait");
    // The daemon queries systemd about a stopped task, and the queries wait during a reload.
    thread::scope(|scope| {
        let reload = scope.spawn(|| process::succeed("systemctl", &["daemon-reload"]));
        let asked: Vec<_> = (0..300).map(|_| scope.spawn(|| container.metrics().is_some())).collect();
        let answered = asked.into_iter().filter_map(|asked| asked.join().ok()).filter(|has| *has).count();
        assert_eq!(answered, 300);
        reload.join().expect("reload");
    });
}
