//! `docker exec`, health checks, `docker top` and `docker cp`.

use std::fs;

use crate::common::stdio::Scratch;
use crate::docker::{Docker, IMAGE, Settings};

#[test]
fn exec_passes_on_output_input_and_exit_code() {
    let docker = Docker::new();
    let container = docker.sleeping(&["--env", "WORD=of the container"]);
    let ran = docker.run(&["exec", &container, "sh", "-c", "echo $WORD; echo error >&2; exit 11"]);
    assert_eq!((ran.code, ran.text().as_str()), (Some(11), "of the container\n"), "{ran:?}");
    assert_eq!(ran.stderr, "error\n");
    let input = vec![b'x'; 1 << 20];
    let ran = docker.fed(&["exec", "--interactive", &container, "cat"], &input);
    assert!(ran.code == Some(0) && ran.stdout == input, "{} bytes, {}", ran.stdout.len(), ran.stderr);
    let options = ["exec", "--user", "1000", "--workdir", "/home/user", "--env", "MORE=yes"];
    let ran = docker.run(&[&options[..], &[&container, "sh", "-c", "id -u; pwd; echo $MORE"]].concat());
    assert_eq!((ran.code, ran.text().as_str()), (Some(0), "1000\n/home/user\nyes\n"), "{ran:?}");
    let ran = docker.run(&["exec", "--tty", &container, "sh", "-c", "tty; exit 2"]);
    assert_eq!(ran.code, Some(2), "{ran:?}");
    assert!(ran.text().starts_with("/dev/pts/") && ran.text().ends_with("\r\n"), "{ran:?}");
}

#[test]
fn exec_in_a_terminal_is_a_dialogue() {
    let docker = Docker::new();
    let container = docker.sleeping(&[]);
    let mut terminal = docker.in_terminal(&["exec", "-it", &container, "sh"]);
    terminal.until("# ");
    terminal.enter("while [ \"$(stty size)\" != '30 90' ]; do usleep 20000; done; echo si''zed\n");
    terminal.until("sized");
    terminal.enter("exit 12\n");
    assert_eq!(terminal.code(), Some(12));
}

#[test]
fn exec_reports_why_a_program_cannot_start() {
    let docker = Docker::new();
    let container = docker.sleeping(&[]);
    let version = docker.ok(&["version", "--format", "{{.Server.Version}}"]);
    let major: u32 = version.split('.').next().unwrap_or_default().parse().expect("a version");
    // Docker 26 returns the same code in both cases.
    let missing = if major < 28 { 126 } else { 127 };
    for (program, code, words) in [
        ("/there/is/no/such/program", missing, "no such file or directory"),
        ("no-such-program", missing, "executable file not found in $PATH"),
        ("/etc/passwd", 126, "permission denied"),
    ] {
        for options in [&["exec"][..], &["exec", "-t"], &["exec", "-i"]] {
            let ran = docker.fed(&[options, &[&container, program]].concat(), b"");
            assert_eq!(ran.code, Some(code), "{program}: {ran:?}");
            assert!((ran.text() + &ran.stderr).contains(words), "{program}: {ran:?}");
        }
    }
    assert_eq!(docker.ok(&["exec", &container, "echo", "on"]), "on");
    docker.ok(&["pause", &container]);
    let ran = docker.run(&["exec", &container, "true"]);
    assert!(ran.code == Some(1) && ran.stderr.contains("paused"), "{ran:?}");
    docker.ok(&["unpause", &container]);
    docker.ok(&["stop", &container]);
    let ran = docker.run(&["exec", &container, "true"]);
    assert!(ran.code == Some(1) && ran.stderr.contains("not running"), "{ran:?}");
}

#[test]
fn many_execs_at_once_have_their_own_output() {
    let docker = Docker::new();
    let container = docker.sleeping(&[]);
    std::thread::scope(|scope| {
        for number in 0..6 {
            let (docker, container) = (&docker, &container);
            scope.spawn(move || {
                let script = format!("seq {number} 1000; exit {number}");
                let ran = docker.run(&["exec", container, "sh", "-c", &script]);
                assert_eq!(ran.code, Some(number), "{ran:?}");
                let expected: String = (number..=1000).map(|line| format!("{line}\n")).collect();
                assert_eq!(ran.text(), expected);
            });
        }
    });
}

#[test]
fn an_exec_in_the_background_outlives_its_client_and_ends_with_the_container() {
    let docker = Docker::new();
    let container = docker.sleeping(&[]);
    docker.ok(&["exec", "--detach", &container, "sh", "-c", "echo $$ >/pid; exec sleep 100001"]);
    docker.ok(&["exec", &container, "sh", "-c", "until [ -s /pid ]; do usleep 10000; done"]);
    let top = docker.ok(&["top", &container, "-o", "pid,args"]);
    assert!(top.contains("sleep 100001"), "{top}");
    docker.ok(&["stop", &container]);
    assert_eq!(docker.inspect(&container, "{{.State.ExitCode}}"), "143");
    docker.ok(&["start", &container]);
    let top = docker.ok(&["top", &container, "-o", "pid,args"]);
    assert!(!top.contains("sleep 100001"), "{top}");
}

#[test]
fn health_checks_are_execs_of_dockers_daemon() {
    let docker = Docker::new();
    let options = ["--health-interval", "200ms", "--health-retries", "1", "--health-cmd"];
    let container = docker.sleeping(&[&options[..], &["echo checked; test ! -e /ill"]].concat());
    docker.until(&container, "{{.State.Health.Status}}", "healthy");
    docker.ok(&["exec", &container, "touch", "/ill"]);
    docker.until(&container, "{{.State.Health.Status}}", "unhealthy");
    let last = docker.inspect(&container, "{{range .State.Health.Log}}{{.ExitCode}} {{.Output}}{{end}}");
    assert!(last.contains("1 checked"), "{last}");
}

#[test]
fn top_lists_the_processes_of_a_container() {
    let docker = Docker::new();
    let container = docker.background(&[], &["sh", "-c", "sleep 100002 & exec sleep 100003"]);
    let listed = || docker.ok(&["top", &container, "-o", "pid,args"]);
    crate::common::wait::until_true("both processes are listed", || listed().contains("sleep 100002"));
    let listed = listed();
    let line = listed.lines().find(|line| line.contains("sleep 100003"));
    let pid = line.and_then(|line| line.split_whitespace().next()).unwrap_or_else(|| panic!("{listed}"));
    assert_eq!(pid, docker.pid(&container).to_string());
    let answer =
        docker.api("GET", &format!("/containers/{container}/top?ps_args=-o%20pid,comm"), None).json();
    assert_eq!(answer["Processes"].as_array().map(Vec::len), Some(2), "{answer}");
}

#[test]
fn files_are_copied_in_both_directions() {
    let docker = Docker::new();
    let scratch = Scratch::new("docker-cp");
    fs::write(scratch.join("in"), "from outside").expect("write a file");
    let container = docker.sleeping(&[]);
    let inside = format!("{container}:/tmp/inside");
    docker.ok(&["cp", &scratch.text("in"), &inside]);
    assert_eq!(docker.ok(&["exec", &container, "cat", "/tmp/inside"]), "from outside");
    docker.ok(&["exec", &container, "sh", "-c", "echo -n from inside >/tmp/inside"]);
    docker.ok(&["cp", &inside, &scratch.text("running")]);
    docker.ok(&["pause", &container]);
    docker.ok(&["cp", &inside, &scratch.text("paused")]);
    docker.ok(&["unpause", &container]);
    docker.ok(&["stop", &container]);
    docker.ok(&["cp", &inside, &scratch.text("stopped")]);
    let copies = ["running", "paused", "stopped"].map(|name| scratch.read(name));
    assert_eq!(copies, ["from inside"; 3]);
}

#[test]
fn execs_work_with_the_default_runtime_and_after_a_commit() {
    let docker = Docker::with(Settings { by_default: true, ..Settings::default() });
    let container = docker.ok(&["run", "--detach", "--init", IMAGE, "sleep", "100000"]);
    docker.ok(&["exec", &container, "sh", "-c", "echo kept >/kept"]);
    let image = docker.ok(&["commit", &container]);
    assert_eq!(docker.ok(&["run", "--rm", &image, "cat", "/kept"]), "kept");
    assert!(docker.ok(&["diff", &container]).contains("A /kept"));
    docker.ok(&["rmi", "--force", &image]);
}
