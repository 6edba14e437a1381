//! An exec from Exec to Delete: phases, exits, refusals, and the effects of its process spec.

use containerd_client::tonic::Code;
use containerd_client::types::v1::Status;
use containerd_shim_protos::protobuf::Message as _;
use containerd_shim_protos::shim::oci::ProcessDetails;

use crate::common::container::Container;
use crate::common::node::Node;
use crate::common::spec::Spec;
use crate::common::stdio::Fifos;
use crate::common::task::{Io, SIGKILL, SIGTERM, YEAR_ONE, assert_refused};
use crate::common::{process, wait};

/// A container to add execs to.
fn sleeping(node: &Node) -> Container<'_> {
    node.container("exec", Spec::sleeping()).started(&Io::default())
}

/// The output of an exec of this process, which has to exit with 0.
fn output(container: &Container, spec: Spec) -> String {
    let fifos = Fifos::new("output");
    let (mut stdout, mut stderr) = (fifos.stdout(), fifos.stderr());
    let exec = container.exec(spec).started(&fifos.output());
    let text = stdout.text();
    assert_eq!((exec.exit_status(), stderr.text().as_str()), (0, ""), "after {text:?}");
    exec.delete().expect("delete");
    text
}

#[test]
fn an_exec_runs_in_the_container_and_its_output_arrives() {
    let node = Node::shared();
    let container = sleeping(&node);
    let fifos = Fifos::new("exec");
    let (mut stdout, mut stderr) = (fifos.stdout(), fifos.stderr());
    let exec = container.exec(Spec::sh("hostname; echo err >&2; exit 5")).started(&fifos.output());
    assert_eq!((stdout.text().as_str(), stderr.text().as_str()), ("e2e\n", "err\n"));
    assert_eq!(exec.exit_status(), 5);
    assert_eq!(exec.delete().expect("delete").exit_status, 5);
    assert_eq!(container.phase(), Status::Running);
}

#[test]
fn state_reports_each_phase_of_an_exec() {
    let node = Node::shared();
    let container = sleeping(&node);
    let fifos = Fifos::new("state");
    let (_stdout, _stderr) = (fifos.stdout(), fifos.stderr());
    let exec = container.exec(Spec::sleeping()).added(&fifos.output());

    let created = exec.state().expect("state");
    assert_eq!((created.id.as_str(), created.status(), created.pid), (exec.id.as_str(), Status::Created, 0));
    assert_eq!(created.exited_at.map(|at| at.seconds), Some(YEAR_ONE));
    let io = fifos.output();
    assert_eq!((created.stdin, created.stdout, created.stderr), (io.stdin, io.stdout, io.stderr));

    let pid = exec.start().expect("start");
    assert!(pid > 0 && pid != container.pid() && process::runs(pid), "pid {pid}");
    let running = exec.state().expect("state");
    assert_eq!((running.status(), running.pid, running.exit_status), (Status::Running, pid, 0));

    exec.kill(SIGKILL).expect("kill");
    let exit = exec.wait().expect("wait");
    let stopped = exec.state().expect("state");
    assert_eq!((stopped.status(), stopped.pid, stopped.exit_status), (Status::Stopped, pid, 137));
    assert_eq!(stopped.exited_at, exit.at);

    let deleted = exec.delete().expect("delete");
    assert_eq!((deleted.id.as_str(), deleted.pid, deleted.exit_status), (exec.id.as_str(), pid, 137));
    assert_eq!(deleted.exited_at, exit.at);
    assert_eq!(exec.state().expect_err("state after delete").code(), Code::NotFound);
}

#[test]
fn wait_on_an_exec_answers_before_and_after_its_end_the_same() {
    let node = Node::shared();
    let container = sleeping(&node);
    let exec = container.exec(Spec::sh("exit 7")).added(&Io::default());
    let early = exec.waiting();
    assert_eq!(exec.phase(), Status::Created);
    assert!(!early.is_over());
    exec.start().expect("start");
    let early = early.exit().expect("a wait from before the start");
    assert_eq!(early.status, 7);
    assert_eq!(exec.wait().expect("a late wait"), early);
}

#[test]
fn kill_ends_an_exec_and_nothing_else() {
    let node = Node::shared();
    let container = sleeping(&node);
    let bystander = container.exec(Spec::sleeping()).started(&Io::default());
    for signal in [SIGTERM, SIGKILL] {
        let exec = container.exec(Spec::sleeping()).started(&Io::default());
        exec.kill(signal).expect("kill");
        assert_eq!(exec.exit_status(), 128 + signal);
        assert_eq!(exec.kill(signal).expect_err("kill a stopped exec").code(), Code::NotFound);
    }
    assert_eq!((bystander.phase(), container.phase()), (Status::Running, Status::Running));
}

#[test]
fn a_running_exec_can_be_neither_started_nor_deleted() {
    let node = Node::shared();
    let container = sleeping(&node);
    let exec = container.exec(Spec::sleeping()).started(&Io::default());
    assert_refused(exec.start());
    assert_refused(exec.delete());
    assert_eq!(exec.phase(), Status::Running);
    exec.kill(SIGKILL).expect("kill");
    exec.wait().expect("wait");
    assert_refused(exec.start());
}

#[test]
fn an_exec_that_was_never_started_can_only_be_deleted() {
    let node = Node::shared();
    let container = sleeping(&node);
    let exec = container.exec(Spec::sleeping()).added(&Io::default());
    let refusal = exec.kill(SIGKILL).expect_err("kill what does not run");
    assert_eq!(refusal.code(), Code::FailedPrecondition);
    assert!(refusal.message().contains("process not created"), "{refusal}");
    assert_eq!(exec.phase(), Status::Created);
    let deleted = exec.delete().expect("delete");
    assert_eq!((deleted.pid, deleted.exit_status), (0, 0));
    assert_eq!(exec.state().expect_err("state after delete").code(), Code::NotFound);
}

#[test]
fn an_exec_id_is_in_use_until_delete() {
    let node = Node::shared();
    let container = sleeping(&node);
    let other = sleeping(&node);
    let add = || container.exec(Spec::sh("exit 3")).id("same").add(&Io::default());
    let first = add().expect("add");
    assert_eq!(add().map(drop).expect_err("add again").code(), Code::AlreadyExists);
    first.start().expect("start");
    assert_eq!(first.exit_status(), 3);
    assert_eq!(add().map(drop).expect_err("add after the exit").code(), Code::AlreadyExists);
    let elsewhere = other.exec(Spec::sh("exit 4")).id("same").started(&Io::default());
    assert_eq!(elsewhere.exit_status(), 4, "an id counts in its container only");
    first.delete().expect("delete");
    let again = add().expect("add after delete");
    again.start().expect("start");
    assert_eq!(again.exit_status(), 3);
}

#[test]
fn an_exec_with_the_containers_id_is_refused() {
    needs!(OurShim); // the stock shim accepts the id, and the exit then looks like the container's
    let node = Node::shared();
    let container = sleeping(&node);
    let refusal =
        container.exec(Spec::sleeping()).id(&container.id).add(&Io::default()).map(drop).expect_err("its id");
    assert!([Code::InvalidArgument, Code::AlreadyExists].contains(&refusal.code()), "{refusal}");
    assert!(refusal.message().contains(&container.id), "{refusal}");
}

#[test]
fn ids_of_every_shape_work_for_execs() {
    let node = Node::shared();
    let container = sleeping(&node);
    for id in ["a", "a.b_c-d", "1", "UPPER.Case", &"x".repeat(76), &"0123456789abcdef".repeat(4)] {
        let exec = container.exec(Spec::sh("exit 8")).id(id).started(&Io::default());
        assert_eq!(exec.exit_status(), 8, "{id}");
        exec.delete().unwrap_or_else(|error| panic!("delete {id}: {error}"));
    }
    for id in ["", "a/b", "..", "-a", "a--b", "a:b", "a b", &"x".repeat(77)] {
        let refusal = container.exec(Spec::sleeping()).id(id).add(&Io::default()).map(drop).expect_err(id);
        assert_eq!(refusal.code(), Code::InvalidArgument, "{id:?}: {refusal}");
    }
}

#[test]
fn calls_for_unknown_execs_are_not_found() {
    let node = Node::shared();
    let container = sleeping(&node);
    let unknown = container.process("unknown");
    let refusals = [
        ("state", unknown.state().map(drop)),
        ("start", unknown.start().map(drop)),
        ("kill", unknown.kill(SIGKILL)),
        ("wait", unknown.wait().map(drop)),
        ("resize", unknown.resize(80, 25)),
        ("close stdin", unknown.close_stdin()),
        ("delete", unknown.delete().map(drop)),
    ];
    for (call, refusal) in refusals {
        assert_eq!(refusal.expect_err(call).code(), Code::NotFound, "{call}");
    }
}

#[test]
fn a_stopped_task_takes_no_exec() {
    let node = Node::shared();
    let container = sleeping(&node);
    container.kill(SIGKILL).expect("kill");
    container.wait().expect("wait");
    assert_refused(container.exec(Spec::sleeping()).add(&Io::default()).map(drop));
}

#[test]
fn an_exec_that_was_added_before_init_died_can_not_start() {
    let node = Node::shared();
    let container = sleeping(&node);
    let exec = container.exec(Spec::sleeping()).added(&Io::default());
    container.kill(SIGKILL).expect("kill");
    container.wait().expect("wait");
    assert_eq!(exec.start().expect_err("no init").code(), Code::FailedPrecondition);
    assert_eq!(exec.phase(), Status::Created);
    exec.delete().expect("delete");
}

#[test]
fn a_created_task_takes_execs() {
    let node = Node::shared();
    let container = node.container("created", Spec::sleeping()).created(&Io::default());
    assert_eq!(output(&container, Spec::sh("hostname")), "e2e\n");
    assert_eq!(container.phase(), Status::Created);
}

#[test]
fn a_missing_command_fails_the_start_with_the_runtimes_own_message() {
    let node = Node::shared();
    let container = sleeping(&node);
    for terminal in [false, true] {
        let fifos = Fifos::new("missing");
        let (_stdout, _stderr) = (fifos.stdout(), fifos.stderr());
        let spec = Spec::new(&["/no/such/command"]);
        let (spec, io) = if terminal { (spec.terminal(), fifos.terminal()) } else { (spec, fifos.output()) };
        let exec = container.exec(spec).added(&io);
        let refusal = exec.start().expect_err("no such command");
        let text = refusal.message();
        assert!(
            text.contains("no such file or directory") || text.contains("executable file not found"),
            "{text}"
        );
        let state = exec.state().expect("state");
        assert_eq!((state.status(), state.pid), (Status::Created, 0));
        assert_eq!(exec.delete().expect("delete").exit_status, 0);
    }
}

#[test]
fn environment_directory_and_user_are_those_of_the_execs_own_spec() {
    let node = Node::shared();
    let container = node.container("spec", Spec::sleeping().env("OF_INIT=1")).started(&Io::default());
    let spec = Spec::sh("pwd; echo $OF_EXEC; echo [$OF_INIT]; id -u; id -g; id -G");
    let spec = spec.env("OF_EXEC=a b\"'%$n").cwd("/usr/bin").user(1000, 2000).additional_gids(&[3000, 4000]);
    let text = output(&container, spec.clone());
    assert_eq!(text, "/usr/bin\na b\"'%$n\n[]\n1000\n2000\n2000 3000 4000\n");
}

#[test]
fn arguments_arrive_as_they_are() {
    let node = Node::shared();
    let container = sleeping(&node);
    let strange = ["%n %% $HOME ${HOME}", "", " a  b ", "'\"\\", "ä\n\t;", "@-:+!/bin/true"];
    let args = [&["/usr/bin/printf", "[%s]"][..], &strange].concat();
    assert_eq!(output(&container, Spec::new(&args)), strange.map(|arg| format!("[{arg}]")).concat());
}

#[test]
fn capabilities_are_those_of_the_execs_own_spec() {
    let node = Node::shared();
    let container = sleeping(&node);
    let effective = |names: &[&str]| {
        let spec = Spec::sh("grep CapEff /proc/self/status").capabilities(names);
        let line = output(&container, spec);
        u64::from_str_radix(line.trim_start_matches("CapEff:").trim(), 16).expect("a mask")
    };
    assert_eq!(effective(&[]), 0);
    assert_eq!(effective(&["CAP_CHOWN", "CAP_KILL"]), 1 << 0 | 1 << 5);
}

#[test]
fn pids_names_the_exec_of_each_process() {
    let node = Node::shared();
    let container = sleeping(&node);
    let exec = container.exec_sh("exec >/dev/null 2>&1; sleep 100000 & sleep 100000 & wait");
    let processes = wait::until("init, the exec and its children", || {
        container.processes().ok().filter(|processes| processes.len() == 4)
    });
    let told = processes.iter().filter_map(|process| Some((process.pid, process.info.as_ref()?)));
    let told: Vec<(u32, String)> = told
        .map(|(pid, info)| {
            assert!(info.type_url.ends_with("containerd.runc.v1.ProcessDetails"), "{info:?}");
            (pid, ProcessDetails::parse_from_bytes(&info.value).expect("ProcessDetails").exec_id)
        })
        .collect();
    assert_eq!(told, [(exec.pid(), exec.id.clone())]);
    assert!(processes.iter().any(|process| process.pid == container.pid()));
}
