//! containerd is restarted, and finds the current state of every task.

use containerd_client::types::v1::Status;

use crate::attached;
use crate::common::node::Node;
use crate::common::process;
use crate::common::spec::Spec;
use crate::common::stdio::Fifos;
use crate::common::task::{Io, SIGKILL};

#[test]
fn containerd_finds_running_and_created_tasks_again() {
    let node = Node::exclusive();
    let running = node.container("running", Spec::sleeping()).started(&Io::default());
    let created = node.container("created", Spec::sh("exit 17")).created(&Io::default());
    let pids = (running.pid(), created.pid());

    node.restart_containerd();
    assert_eq!((running.pid(), created.pid()), pids);
    assert_eq!(running.state().expect("state").status(), Status::Running);
    assert_eq!(created.state().expect("state").status(), Status::Created);

    let events = node.subscribe();
    created.start().expect("start a task that was created before the restart");
    assert_eq!(created.exit_status(), 17);
    running.kill(SIGKILL).expect("kill a task that ran before the restart");
    assert_eq!(running.exit_status(), 137);
    assert_eq!(events.exit_of(&running).exit_status, 137);
    for container in [running, created] {
        container.delete().expect("delete");
    }
}

#[test]
fn a_stopped_task_keeps_its_exit_code_over_a_containerd_restart() {
    needs!(OurShim); // containerd reaps a stopped task of the stock shim, since its Pids is empty
    let node = Node::exclusive();
    let stopped = node.container("stopped", Spec::sh("exit 23")).started(&Io::default());
    let exit = stopped.wait().expect("wait");
    node.restart_containerd();
    assert_eq!(stopped.state().expect("state").status(), Status::Stopped);
    assert_eq!(stopped.wait().expect("wait after the restart"), exit);
    assert_eq!(stopped.delete().expect("delete").exit_status, 23);
}

#[test]
fn an_exit_while_containerd_is_down_is_known_afterwards() {
    needs!(OurShim); // as above
    let node = Node::exclusive();
    let container = node.container("meanwhile", Spec::sh("trap 'exit 29' TERM; sleep 100000 & wait"));
    let container = container.started(&Io::default());
    let pid = container.pid();
    process::succeed("systemctl", &["stop", "containerd.service"]);
    process::run("kill", &["-KILL", &pid.to_string()]);
    process::succeed("systemctl", &["start", "containerd.service"]);
    node.wait_for_containerd();
    assert_eq!(container.exit_status(), 137);
    assert_eq!(container.delete().expect("delete").exit_status, 137);
}

#[test]
fn output_continues_over_a_containerd_restart() {
    let node = Node::exclusive();
    let fifos = Fifos::new("over");
    let (mut stdout, _stderr) = (fifos.stdout(), fifos.stderr());
    let script = "trap 'seq 1 1000; exit 0' TERM; echo before; sleep 100000 & wait";
    let container = node.container("over", Spec::sh(script)).started(&fifos.output());
    stdout.until(|bytes| bytes == b"before\n");
    node.restart_containerd();
    container.kill(15).expect("terminate");
    let text = stdout.text();
    assert!(text.ends_with("\n1000\n") && text.lines().count() == 1000, "{} lines", text.lines().count());
    assert_eq!(container.exit_status(), 0);
}

#[test]
fn containerd_finds_execs_again() {
    let node = Node::exclusive();
    let container = node.container("execs", Spec::sleeping()).started(&Io::default());
    let (running, mut client) =
        attached::exec(&container, Spec::sh("while read line; do echo got $line; done"));
    let (shell, mut terminal) =
        attached::exec(&container, Spec::sh("echo ready; while :; do read go; stty size; done").terminal());
    terminal.until("ready\r\n");
    let stopped = container.exec_sh("exit 23");
    let exit = stopped.wait().expect("wait");
    let added = container.exec(Spec::sh("exit 24")).added(&Io::default());
    let pid = running.pid();

    node.restart_containerd();
    assert_eq!((running.phase(), running.pid()), (Status::Running, pid));
    client.enter("after\n");
    client.until("got after\n");
    assert_eq!((shell.phase(), shell.state().expect("state").terminal), (Status::Running, true));
    shell.resize(91, 19).expect("resize");
    terminal.enter("\n");
    terminal.until("19 91\r\n");
    assert_eq!(stopped.wait().expect("wait"), exit);
    assert_eq!(stopped.delete().expect("delete").exit_status, 23);
    added.start().expect("start an exec that was added before the restart");
    assert_eq!(added.exit_status(), 24);
    running.close_stdin().expect("close stdin");
    drop(client.stdin);
    assert_eq!(client.stdout.text(), "");
    assert_ne!(running.exit_status(), 137, "it ended by itself");
}
