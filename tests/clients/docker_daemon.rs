//! Docker's daemon restarts or is killed, with and without `live-restore`.

use crate::common::{daemon, process, systemd, wait};
use crate::docker::{Docker, Settings};

const LIVE_RESTORE: Settings = Settings { by_default: false, live_restore: true };

/// Something that happens to Docker's daemon.
type Event = fn(&Docker);

const EVENTS: [(&str, Event); 2] = [("restart", Docker::restart), ("kill", |docker| docker.killed(|| ()))];

#[test]
fn containers_survive_restarts_and_kills_of_dockerd() {
    let docker = Docker::with(LIVE_RESTORE);
    let container = docker
        .background(&["-i"], &["sh", "-c", "while read -r line; do echo \"said $line\"; done; exit 19"]);
    let ticking = docker.background(
        &["--init"],
        &["sh", "-c", "n=0; while :; do n=$((n + 1)); echo tick $n; usleep 20000; done"],
    );
    let pids = [docker.pid(&container), docker.pid(&ticking)];
    for (name, happen) in EVENTS {
        happen(&docker);
        assert_eq!([docker.pid(&container), docker.pid(&ticking)], pids, "after {name}");
        assert_eq!(docker.ok(&["exec", &container, "echo", name]), name);
        let before = docker.ok(&["logs", &ticking]).lines().count();
        wait::until_true("it ticks on", || docker.ok(&["logs", &ticking]).lines().count() > before);
        let mut client = docker.in_terminal(&["attach", "--detach-keys", "ctrl-x", &container]);
        client.enter(&format!("{name}\n"));
        client.until(&format!("said {name}"));
    }
    let logs = docker.ok(&["logs", &ticking]);
    let ticks: Vec<u32> = logs.lines().filter_map(|line| line.strip_prefix("tick ")?.parse().ok()).collect();
    assert!(ticks.windows(2).all(|pair| pair[1] == pair[0] + 1), "a tick is missing or twice:\n{logs}");
    docker.ok(&["stop", &ticking]);
    docker.ok(&["restart", "--time", "1", &container]);
    assert_ne!(docker.pid(&container), pids[0]);
}

#[test]
fn exits_while_dockerd_is_down_are_known_after_its_restart() {
    let docker = Docker::with(LIVE_RESTORE);
    let container = docker
        .background(&[], &["sh", "-c", "trap 'exit 17' TERM; echo ready; while :; do usleep 20000; done"]);
    let again = docker.sleeping(&["--restart", "always"]);
    docker.logs_with(&container, "ready");
    let pids = [docker.pid(&container), docker.pid(&again)];
    docker.killed(|| {
        for pid in pids {
            daemon::signal(pid, nix::sys::signal::Signal::SIGTERM);
            wait::until_true("the container has ended", || !process::exists(pid));
        }
    });
    docker.until(&container, "{{.State.Status}} {{.State.ExitCode}}", "exited 17");
    docker.until(&again, "{{.State.Running}}", "true");
    assert_ne!(docker.pid(&again), pids[1]);
}

#[test]
fn without_live_restore_dockerd_ends_its_containers() {
    let docker = Docker::new();
    for (name, happen) in EVENTS {
        let container = docker.sleeping(&[]);
        // A dockerd that was killed stops what it finds, after which `unless-stopped` leaves it stopped.
        let policies: &[&str] = if name == "kill" { &["always"] } else { &["always", "unless-stopped"] };
        let with_policy = |policy: &&str| docker.sleeping(&["--restart", policy]);
        let restarted: Vec<String> = policies.iter().map(with_policy).collect();
        let stopped = ["always", "unless-stopped"].map(|policy| with_policy(&policy));
        for container in &stopped {
            docker.ok(&["stop", container]);
        }
        let running = std::iter::once(&container).chain(&restarted);
        let pids: Vec<u32> = running.map(|container| docker.pid(container)).collect();
        happen(&docker);
        docker.until(&container, "{{.State.Status}}", "exited");
        for (container, pid) in restarted.iter().zip(&pids[1..]) {
            docker.until(container, "{{.State.Running}}", "true");
            assert_ne!(docker.pid(container), *pid, "after {name}");
        }
        assert!(pids.iter().all(|pid| !process::runs(*pid)), "after {name}");
        // Docker starts a stopped container with the policy `always` again, and leaves the other one stopped.
        docker.until(&stopped[0], "{{.State.Running}}", "true");
        assert_eq!(docker.inspect(&stopped[1], "{{.State.Status}}"), "exited", "after {name}");
        docker.ok(&["start", &container]);
        assert_eq!(docker.ok(&["exec", &container, "echo", "on"]), "on");
    }
}

#[test]
fn dockerd_and_our_daemon_are_killed_at_once() {
    needs!(OurShim);
    let docker = Docker::with(LIVE_RESTORE);
    let container = docker.sleeping(&[]);
    let pid = docker.pid(&container);
    docker.killed(|| {
        daemon::kill_now();
    });
    assert_eq!(docker.pid(&container), pid);
    assert!(systemd::is_active(&docker.unit(&container)));
    assert_eq!(docker.ok(&["exec", &container, "echo", "on"]), "on");
    docker.ok(&["stop", &container]);
    assert_eq!(docker.inspect(&container, "{{.State.ExitCode}}"), "143");
}
