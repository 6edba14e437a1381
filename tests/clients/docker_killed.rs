//! Docker at work while our daemon is killed several times a second.

use crate::common::daemon::{self, Kills};
use crate::docker::Docker;

/// As many kills as a test waits for, however fast the machine is.
const KILLS: u64 = 20;

fn killed_during(work: impl FnOnce(&Docker, &Kills)) {
    let docker = Docker::new();
    daemon::killed_during(|kills| work(&docker, kills));
}

#[test]
fn containers_run_and_end_while_our_daemon_is_killed() {
    needs!(OurShim);
    killed_during(|docker, kills| {
        for turn in kills.turns(4, KILLS) {
            let code = i32::try_from(turn % 100).expect("a small number");
            let ran = docker.run_once(&[], &["sh", "-c", &format!("seq 1 2000; exit {code}")]);
            let expected: String = (1..=2000).map(|number| format!("{number}\n")).collect();
            assert_eq!((ran.code, ran.stderr.as_str()), (Some(code), ""), "turn {turn}");
            assert!(ran.text() == expected, "turn {turn}: {} bytes", ran.stdout.len());
            let input = format!("turn {turn}\n");
            let ran = docker.fed(&docker.run_arguments(&["--rm", "-i"], &["cat"]), input.as_bytes());
            assert_eq!((ran.code, ran.text()), (Some(0), input), "{ran:?}");
        }
    });
}

#[test]
fn one_container_is_paused_and_restarted_while_our_daemon_is_killed() {
    needs!(OurShim);
    killed_during(|docker, kills| {
        let container = docker.sleeping(&[]);
        for turn in kills.turns(4, KILLS) {
            let pid = docker.pid(&container);
            docker.ok(&["pause", &container]);
            docker.ok(&["unpause", &container]);
            assert_eq!(docker.pid(&container), pid, "turn {turn}");
            docker.ok(&["restart", "--time", "20", &container]);
            assert_ne!(docker.pid(&container), pid, "turn {turn}");
        }
        docker.ok(&["stop", "--time", "20", &container]);
        assert_eq!(docker.inspect(&container, "{{.State.ExitCode}}"), "143");
    });
}
