//! Start, stop, kill, pause, restart, wait, remove, and Docker's events.

use nix::sys::signal::Signal;

use crate::common::{daemon, process, systemd, wait};
use crate::docker::{Docker, name};

#[test]
fn a_container_is_created_started_and_removed() {
    let docker = Docker::new();
    let arguments = docker.run_arguments(&[], &["sh", "-c", "echo once more; exit 8"]);
    let container = docker.ok(&[&["create"], &arguments[1..]].concat());
    assert_eq!(docker.inspect(&container, "{{.State.Status}}"), "created");
    for _ in 0..3 {
        docker.ok(&["start", &container]);
        assert_eq!(docker.ok(&["wait", &container]), "8");
        docker.until(&container, "{{.State.Status}} {{.State.ExitCode}}", "exited 8");
    }
    assert_eq!(docker.ok(&["logs", &container]), "once more\nonce more\nonce more");
    docker.ok(&["rm", &container]);
    assert_eq!(docker.run(&["inspect", &container]).code, Some(1));
}

#[test]
fn stop_sends_a_signal_and_then_kills() {
    let docker = Docker::new();
    let obedient = docker
        .background(&[], &["sh", "-c", "trap 'exit 21' TERM; echo ready; while :; do usleep 20000; done"]);
    docker.logs_with(&obedient, "ready");
    docker.ok(&["stop", &obedient]);
    assert_eq!(docker.inspect(&obedient, "{{.State.ExitCode}} {{.State.Running}}"), "21 false");
    let deaf =
        docker.background(&[], &["sh", "-c", "trap '' TERM; echo ready; while :; do usleep 20000; done"]);
    docker.logs_with(&deaf, "ready");
    docker.ok(&["stop", "--time", "1", &deaf]);
    assert_eq!(docker.inspect(&deaf, "{{.State.ExitCode}}"), "137");
    let other = docker.background(
        &["--stop-signal", "USR1"],
        &["sh", "-c", "trap 'exit 22' USR1; echo ready; while :; do usleep 20000; done"],
    );
    docker.logs_with(&other, "ready");
    docker.ok(&["stop", &other]);
    assert_eq!(docker.inspect(&other, "{{.State.ExitCode}}"), "22");
}

#[test]
fn kill_sends_any_signal() {
    let docker = Docker::new();
    let script = "trap 'echo got USR1' USR1; echo ready; while :; do usleep 20000; done";
    let container = docker.background(&[], &["sh", "-c", script]);
    docker.logs_with(&container, "ready");
    docker.ok(&["kill", "--signal", "USR1", &container]);
    docker.logs_with(&container, "got USR1");
    docker.ok(&["kill", &container]);
    assert_eq!(docker.ok(&["wait", &container]), "137");
    let again = docker.run(&["kill", &container]);
    assert!(again.code == Some(1) && again.stderr.contains("is not running"), "{again:?}");
}

#[test]
fn pause_freezes_every_process_and_unpause_thaws_them() {
    let docker = Docker::new();
    let container = docker.background(&[], &["sh", "-c", "while :; do echo tick; usleep 20000; done"]);
    docker.logs_with(&container, "tick");
    docker.ok(&["pause", &container]);
    assert_eq!(docker.inspect(&container, "{{.State.Status}} {{.State.Paused}}"), "paused true");
    let ticks = || docker.ok(&["logs", &container]).lines().count();
    // Output that was in transit when the processes stopped may still arrive.
    wait::until_true("no tick arrives while the container is paused", || {
        let before = ticks();
        wait::elapse(std::time::Duration::from_millis(200));
        ticks() == before
    });
    let again = docker.run(&["pause", &container]);
    assert!(again.code == Some(1) && again.stderr.contains("already paused"), "{again:?}");
    let before = ticks();
    docker.ok(&["unpause", &container]);
    wait::until_true("the container ticks again", || ticks() > before);
    docker.ok(&["pause", &container]);
    docker.ok(&["rm", "--force", &container]);
}

#[test]
fn restart_is_a_new_process_in_a_new_unit_of_the_same_name() {
    let docker = Docker::new();
    let container = docker.sleeping(&[]);
    let mut pids = vec![docker.pid(&container)];
    for _ in 0..3 {
        docker.ok(&["restart", &container]);
        let pid = docker.pid(&container);
        assert!(!pids.contains(&pid) && process::runs(pid), "{pid} after {pids:?}");
        assert!(!docker.is_ours() || systemd::main_pid(&docker.unit(&container)) == pid);
        pids.push(pid);
    }
    assert_eq!(docker.ok(&["exec", &container, "echo", "on"]), "on");
}

#[test]
fn a_policy_restarts_a_container_that_ends() {
    let docker = Docker::new();
    let always = docker.background(&["--restart", "always"], &["sh", "-c", "echo up; usleep 100000; exit 3"]);
    wait::until_true("three starts", || docker.ok(&["logs", &always]).lines().count() >= 3);
    docker.ok(&["stop", &always]);
    assert_eq!(docker.inspect(&always, "{{.State.Running}} {{.State.Restarting}}"), "false false");

    let limited = docker.background(&["--restart", "on-failure:2"], &["sh", "-c", "echo up; exit 4"]);
    docker.until(&limited, "{{.State.Status}} {{.RestartCount}}", "exited 2");
    assert_eq!(docker.ok(&["logs", &limited]), "up\nup\nup");

    let killed = docker.background(&["--restart", "always", "--init"], &["sleep", "100000"]);
    let first = docker.pid(&killed);
    daemon::signal(first, Signal::SIGKILL);
    wait::until_true("the killed container runs again", || {
        let state = docker.inspect(&killed, "{{.State.Running}} {{.State.Restarting}} {{.State.Pid}}");
        state.starts_with("true false") && !state.ends_with(&format!(" {first}"))
    });
    docker.ok(&["update", "--restart", "no", &killed]);
    daemon::signal(docker.pid(&killed), Signal::SIGKILL);
    docker.until(&killed, "{{.State.Status}} {{.State.ExitCode}}", "exited 137");
}

#[test]
fn wait_and_events_report_every_container() {
    let docker = Docker::new();
    let names: Vec<String> = (0..6).map(|number| name(&format!("many-{number}"))).collect();
    let since = process::succeed("date", &["+%s.%N"]);
    std::thread::scope(|scope| {
        for (number, name) in names.iter().enumerate() {
            let docker = &docker;
            scope.spawn(move || {
                let code = number.to_string();
                let ran =
                    docker.run_once(&["--name", name], &["sh", "-c", &format!("echo {name}; exit {code}")]);
                let outcome = (ran.code.map(|code| code.to_string()), ran.text());
                assert_eq!(outcome, (Some(code), format!("{name}\n")), "{}", ran.stderr);
            });
        }
    });
    let until = process::succeed("date", &["+%s.%N"]);
    let template = "{{.Action}} {{.Actor.Attributes.name}} {{.Actor.Attributes.exitCode}}";
    let events = docker.ok(&[
        "events",
        "--since",
        since.trim(),
        "--until",
        until.trim(),
        "--filter",
        "type=container",
        "--format",
        template,
    ]);
    for (number, name) in names.iter().enumerate() {
        let of: Vec<&str> = events
            .lines()
            .filter(|line| line.split(' ').nth(1) == Some(name))
            .filter_map(|line| line.split(' ').next())
            .filter(|action| ["create", "start", "die", "destroy"].contains(action))
            .collect();
        assert_eq!(of, ["create", "start", "die", "destroy"], "{name}:\n{events}");
        assert!(events.contains(&format!("die {name} {number}")), "{events}");
    }
}

#[test]
fn remove_with_force_kills_a_running_container() {
    let docker = Docker::new();
    let container = docker.background(&[], &["sh", "-c", "trap '' TERM INT HUP; while :; do sleep 1; done"]);
    docker.ok(&["exec", "--detach", &container, "sleep", "100004"]);
    let pid = docker.pid(&container);
    docker.ok(&["rm", "--force", &container]);
    assert!(!process::runs(pid));
    assert!(process::with_command_line("sleep 100004").is_empty());
}
