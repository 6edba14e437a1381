//! `docker run`: output, input, exit codes, and the options that decide what a process sees.

use crate::common::stdio::Scratch;
use crate::common::{process, systemd, wait};
use crate::docker::{Docker, IMAGE, Settings, name};

#[test]
fn run_passes_on_output_and_exit_code() {
    let docker = Docker::new();
    let ran = docker.run_once(&[], &["sh", "-c", "echo to stdout; echo to stderr >&2; exit 7"]);
    assert_eq!((ran.code, ran.text().as_str(), ran.stderr.as_str()), (Some(7), "to stdout\n", "to stderr\n"));
    let ran = docker.run_once(&[], &["sh", "-c", "kill -KILL $$"]);
    assert_eq!(ran.code, Some(0), "the first process of a pid namespace has no default signals: {ran:?}");
    let ran = docker.run_once(&["--init"], &["sh", "-c", "kill -KILL $$"]);
    assert_eq!(ran.code, Some(137), "{ran:?}");
}

#[test]
fn run_reports_why_a_program_cannot_start() {
    let docker = Docker::new();
    for (program, code, words) in [
        ("/there/is/no/such/program", 127, "no such file or directory"),
        ("no-such-program", 127, "executable file not found in $PATH"),
        ("/etc/passwd", 126, "permission denied"),
        ("/etc", 126, "is a directory"),
    ] {
        let ran = docker.run_once(&[], &[program]);
        assert_eq!(ran.code, Some(code), "{program}: {ran:?}");
        assert!(ran.stderr.contains(words), "{program}: {ran:?}");
        assert_eq!(ran.text(), "", "{program}");
    }
}

#[test]
fn run_passes_on_input_up_to_its_end() {
    let docker = Docker::new();
    let input: Vec<u8> = (0..300_000u32).flat_map(u32::to_le_bytes).collect();
    let ran = docker.fed(&docker.run_arguments(&["--rm", "--interactive"], &["cat"]), &input);
    assert_eq!(ran.code, Some(0), "{}", ran.stderr);
    assert!(ran.stdout == input, "{} bytes of {} came back", ran.stdout.len(), input.len());
    let ran = docker.fed(&docker.run_arguments(&["--rm", "--interactive"], &["wc", "-c"]), b"");
    assert_eq!((ran.code, ran.text().trim()), (Some(0), "0"));
}

#[test]
fn run_shows_all_output_of_a_process_that_writes_much_and_ends() {
    let docker = Docker::new();
    let ran = docker.run_once(&[], &["sh", "-c", "seq 1 200000; seq 1 50000 >&2; exit 3"]);
    let numbers = |to: u32| (1..=to).map(|number| format!("{number}\n")).collect::<String>();
    assert_eq!(ran.code, Some(3));
    assert!(ran.text() == numbers(200_000), "{} bytes of stdout", ran.stdout.len());
    assert!(ran.stderr == numbers(50_000), "{} bytes of stderr", ran.stderr.len());
}

#[test]
fn run_in_a_terminal_is_a_dialogue() {
    let docker = Docker::new();
    let mut terminal = docker.in_terminal(&docker.run_arguments(&["--rm", "-it"], &["sh"]));
    terminal.until("# ");
    terminal.enter("while [ \"$(stty size)\" != '30 90' ]; do usleep 20000; done; tty; echo si''zed\n");
    assert!(terminal.until("sized").contains("/dev/"), "a terminal has a name");
    terminal.resize(101, 41);
    // The client passes the new size on when it gets SIGWINCH.
    terminal.enter("while [ \"$(stty size)\" != '41 101' ]; do usleep 20000; done; echo resi''zed\n");
    terminal.until("resized");
    // The program has printed that it runs, so control-C reaches it. Earlier, the shell would get control-C.
    terminal.enter("sh -c 'trap \"exit 30\" INT; echo wait\"\"ing; while :; do usleep 20000; done'\n");
    terminal.until("waiting");
    terminal.enter("\u{3}");
    terminal.enter("echo code $?; exit 9\n");
    terminal.until("code 30");
    assert_eq!(terminal.code(), Some(9));
}

#[test]
fn a_terminal_without_input_has_carriage_returns() {
    let docker = Docker::new();
    let ran = docker.run_once(&["-t"], &["sh", "-c", "echo one; echo two >&2; exit 4"]);
    assert_eq!((ran.code, ran.text().as_str()), (Some(4), "one\r\ntwo\r\n"), "{ran:?}");
}

#[test]
fn an_init_reaps_children_and_passes_on_signals() {
    let docker = Docker::new();
    let script = "trap 'echo got it; exit 5' TERM; (true &); echo ready; while :; do sleep 0.05; done";
    let container = docker.background(&["--init"], &["sh", "-c", script]);
    docker.logs_with(&container, "ready");
    assert!(docker.ok(&["exec", &container, "cat", "/proc/1/comm"]).contains("docker-init"));
    // A `sleep` that has just ended is a zombie, too. The script reaps it, not the init.
    let zombies =
        "for one in /proc/[0-9]*/status; do grep -qs zombie $one && grep -s '^PPid:.1$' $one; done; true";
    wait::until_true("the init has reaped its children", || {
        docker.ok(&["exec", &container, "sh", "-c", zombies]).is_empty()
    });
    docker.ok(&["kill", "--signal", "TERM", &container]);
    assert_eq!(docker.ok(&["wait", &container]), "5");
    docker.logs_with(&container, "got it");
}

#[test]
fn options_reach_the_process() {
    let docker = Docker::new();
    let scratch = Scratch::new("docker-bind");
    let bind = format!("{}:/bound", scratch.as_str());
    let options = [
        &["--user", "1000:1000", "--env", "WORD=of the test", "--workdir", "/tmp", "--hostname", "its-name"]
            [..],
        &["--read-only", "--tmpfs", "/scratch", "--volume", &bind, "--ulimit", "nofile=123:456"],
        &["--cap-drop", "ALL", "--security-opt", "no-new-privileges", "--sysctl", "net.core.somaxconn=77"],
        &["--group-add", "4242", "--oom-score-adj", "300", "--add-host", "friend:192.0.2.7"],
    ]
    .concat();
    let script = "id -u; id -G; echo $WORD; pwd; hostname; touch /x 2>/dev/null || echo read-only; \
                  grep -c ' /scratch ' /proc/self/mounts; ulimit -n; ulimit -Hn; \
                  grep -E '^(CapEff|NoNewPrivs)' /proc/self/status | tr -d '\\t'; \
                  cat /proc/sys/net/core/somaxconn; cat /proc/self/oom_score_adj; \
                  grep -c '192.0.2.7.*friend' /etc/hosts";
    let ran = docker.run_once(&options, &["sh", "-c", script]);
    let expected = "1000\n1000 4242\nof the test\n/tmp\nits-name\nread-only\n1\n123\n456\n\
                    CapEff:0000000000000000\nNoNewPrivs:1\n77\n300\n1\n";
    assert_eq!((ran.code, ran.text().as_str()), (Some(0), expected), "{ran:?}");

    let ran = docker.run_once(&["--volume", &bind], &["sh", "-c", "echo written >/bound/file"]);
    assert_eq!(ran.code, Some(0), "{ran:?}");
    assert_eq!(scratch.read("file"), "written\n");
}

#[test]
fn privileges_and_namespaces_are_as_requested() {
    let docker = Docker::new();
    let ran = docker
        .run_once(&["--privileged"], &["sh", "-c", "mkdir /new && mount -t tmpfs none /new && echo mounted"]);
    assert_eq!((ran.code, ran.text().as_str()), (Some(0), "mounted\n"), "{ran:?}");
    let host = process::namespace(std::process::id(), "pid");
    let ran = docker.run_once(&["--pid", "host"], &["readlink", "/proc/self/ns/pid"]);
    assert_eq!(ran.text().trim(), host, "{ran:?}");
    let first = docker.sleeping(&["--ipc", "shareable"]);
    let theirs = format!("container:{first}");
    let namespaces = ["pid", "net", "ipc"].map(|kind| process::namespace(docker.pid(&first), kind));
    let script = "for kind in pid net ipc; do readlink /proc/self/ns/$kind; done";
    let ran =
        docker.run_once(&["--pid", &theirs, "--network", &theirs, "--ipc", &theirs], &["sh", "-c", script]);
    assert_eq!(ran.text().lines().collect::<Vec<_>>(), namespaces, "{ran:?}");
}

#[test]
fn containers_communicate_over_dockers_bridge() {
    let docker = Docker::new();
    let server =
        docker.background(&["--init"], &["sh", "-c", "while :; do echo hello | nc -l -p 4000; done"]);
    let address = docker.inspect(&server, "{{.NetworkSettings.IPAddress}}");
    let script = format!("until echo | nc -w 2 {address} 4000 | grep hello; do usleep 50000; done");
    let ran = docker.run_once(&[], &["timeout", "20", "sh", "-c", &script]);
    assert_eq!((ran.code, ran.text().as_str()), (Some(0), "hello\n"), "{ran:?}");
}

#[test]
fn the_unit_shows_the_container() {
    needs!(OurShim);
    let docker = Docker::new();
    let container = docker.sleeping(&["--hostname", "shown-name", "--cgroup-parent", "e2e-docker.slice"]);
    let unit = docker.unit(&container);
    assert!(systemd::is_active(&unit), "{unit}");
    assert_eq!(systemd::property(&unit, "Slice"), "e2e-docker.slice");
    assert_eq!(systemd::main_pid(&unit), docker.pid(&container));
    let description = systemd::property(&unit, "Description");
    assert!(description.contains("shown-name"), "{description}");
    docker.ok(&["rm", "--force", &container]);
    assert_eq!(systemd::property(&unit, "LoadState"), "not-found");
}

#[test]
fn a_named_runtime_and_the_default_one_are_the_same() {
    let docker = Docker::with(Settings { by_default: true, ..Settings::default() });
    assert_eq!(docker.ok(&["info", "--format", "{{.DefaultRuntime}} {{.CgroupDriver}}"]), "named systemd");
    let ran = docker.run(&["run", "--rm", IMAGE, "sh", "-c", "echo by default; exit 6"]);
    assert_eq!((ran.code, ran.text().as_str()), (Some(6), "by default\n"), "{ran:?}");
    let ran = docker.run(&["run", "--rm", "--runtime", "named", IMAGE, "echo", "by name"]);
    assert_eq!((ran.code, ran.text().as_str()), (Some(0), "by name\n"), "{ran:?}");
    let container = docker.ok(&["run", "--detach", "--init", IMAGE, "sleep", "100000"]);
    assert!(!docker.is_ours() || systemd::is_active(&docker.unit(&container)));
    assert_eq!(docker.ok(&["exec", &container, "echo", "an exec"]), "an exec");
}

#[test]
fn a_build_runs_its_steps_with_the_default_runtime() {
    let docker = Docker::with(Settings { by_default: true, ..Settings::default() });
    let tag = name("built");
    let text =
        format!("FROM {IMAGE}\nRUN echo of the build >/file && sh -c 'exit 0'\nCMD [\"cat\", \"/file\"]\n");
    let built = docker.fed(&["build", "--quiet", "--tag", &tag, "-"], text.as_bytes());
    assert_eq!(built.code, Some(0), "{built:?}");
    assert_eq!(docker.ok(&["run", "--rm", &tag]), "of the build");
    docker.ok(&["rmi", "--force", &tag]);
}
