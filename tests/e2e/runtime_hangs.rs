//! OCI runtimes that hang, by themselves or because of the container. Each command has a limit, a hung command can be
//! cancelled earlier, and none of its processes stay.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::thread;
use std::time::{Duration, Instant};

use containerd_client::tonic::{Code, Status};
use containerd_shim_protos::api::DeleteRequest;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use prost_types::Any;

use crate::common::container::Container;
use crate::common::exec::Exec;
use crate::common::leaks::{self, Traces};
use crate::common::node::{Node, unique};
use crate::common::shim::{Bundle, Shim, over_ttrpc};
use crate::common::spec::Spec;
use crate::common::stdio::Scratch;
use crate::common::systemd::{self, unit_of, unit_of_exec};
use crate::common::task::{Io, SIGKILL};
use crate::common::{daemon, process, wait};
use crate::runtime_options::GenericOptions;
use crate::stuck::mount_of;

/// Makes every `runc exec` hang: it opens the container's /etc/passwd.
const TRAP: &str = "mkdir -p /etc; rm -f /etc/passwd; mkfifo /etc/passwd; exec sleep 1000";

/// "At once" is much less than any limit.
const AT_ONCE: Duration = Duration::from_secs(10);

/// An OCI runtime that hangs in one of its commands as long as a file exists. It ignores signals that ask it to end, and so does
/// a process that it starts in a session of its own, whose parent has ended.
struct Hanging {
    scratch: Scratch,
}

impl Hanging {
    fn at(verb: &str) -> Hanging {
        let scratch = Scratch::new("hangs");
        let (trap, mark) = (scratch.text("trap"), scratch.text("mark"));
        let script = format!(
            "#!/bin/sh\ncase \" $* \" in *' {verb} '*) if [ -e {trap} ]; then\n\
             trap '' TERM INT HUP\n(setsid tail -f {mark} &)\ntouch {hung}\ntail -f {mark}\nfi;; esac\nexec runc \"$@\"\n",
            hung = scratch.text("hung")
        );
        fs::write(scratch.join("runtime.sh"), script).expect("write the runtime");
        fs::set_permissions(scratch.join("runtime.sh"), fs::Permissions::from_mode(0o755))
            .expect("make it executable");
        fs::write(scratch.join("mark"), "").expect("make the mark");
        fs::write(scratch.join("trap"), "").expect("set the trap");
        Hanging { scratch }
    }

    /// Runtime options that name it, and limit its commands to this number of seconds (0: the default).
    fn options(&self, seconds: u32) -> Any {
        options(&format!("BinaryName = {:?}\nRuntimeTimeoutSec = {seconds}", self.scratch.text("runtime.sh")))
    }

    fn hung(&self) -> PathBuf {
        self.scratch.join("hung")
    }

    fn until_it_hangs(&self) {
        wait::until_true("the runtime hangs", || self.hung().exists());
    }

    fn stop_hanging(&self) {
        fs::remove_file(self.scratch.join("trap")).expect("remove the trap");
    }

    /// Waits until this number of commands hangs, and then lets these commands continue as `runc`.
    fn release(&self, commands: usize) {
        let waiting = || process::with_command_line(&self.scratch.text("mark"));
        wait::until_true("all commands hang", || waiting().len() == 2 * commands);
        self.stop_hanging();
        for pid in waiting() {
            // The daemon may have killed this process already, because its command has ended.
            let _ = kill(Pid::from_raw(pid.cast_signed()), Signal::SIGKILL);
        }
    }

    /// Asserts that no process of the hung command runs any more.
    fn assert_gone(&self) {
        assert!(self.hung().exists(), "it did hang");
        let mark = self.scratch.text("mark");
        wait::until_true("all of the runtime is gone", || process::with_command_line(&mark).is_empty());
    }
}

fn options(body: &str) -> Any {
    GenericOptions { config_body: body.to_string(), ..Default::default() }.to_any()
}

fn trapped<'n>(node: &'n Node, seconds: u32) -> Container<'n> {
    let options = options(&format!("RuntimeTimeoutSec = {seconds}"));
    let container = node.container("trap", Spec::sh(TRAP)).options(options).started(&Io::default());
    // The first exec makes objects that stay.
    container.exec(Spec::sleeping()).id("first").added(&Io::default()).delete().expect("delete");
    wait::until_true("the trap is set", || {
        fs::metadata(format!("/proc/{}/root/etc/passwd", container.pid()))
            .is_ok_and(|found| std::os::unix::fs::FileTypeExt::is_fifo(&found.file_type()))
            && fs::read_to_string(format!("/proc/{}/comm", container.pid()))
                .is_ok_and(|name| name == "sleep\n")
    });
    container
}

/// Runs `act` while the exec's start hangs in the container. Returns the result of the start.
fn while_it_hangs(container: &Container, exec: &Exec, act: impl FnOnce()) -> Result<u32, Status> {
    thread::scope(|scope| {
        let started = scope.spawn(|| exec.start());
        wait::until_true("the exec hangs in the container", || {
            container.pids().is_ok_and(|pids| pids.iter().any(|pid| waits_for_a_writer(*pid)))
        });
        act();
        started.join().expect("the start does not panic")
    })
}

/// True if the process waits in the kernel's `open` of a FIFO.
fn waits_for_a_writer(pid: u32) -> bool {
    process::threads(pid)
        .filter_map(|thread| fs::read_to_string(thread.join("wchan")).ok())
        .any(|at| at == "wait_for_partner")
}

/// After this container, the daemon has everything that it makes for its first container.
fn warm_up(node: &Node) {
    node.container("first", Spec::sleeping()).created(&Io::default()).delete().expect("delete");
}

#[test]
fn an_exec_that_its_container_makes_hang_is_deleted_at_once_and_leaves_nothing() {
    needs!(OurShim);
    let node = Node::exclusive();
    let container = trapped(&node, 0);
    let before = Traces::take();
    for round in 0..3 {
        let exec = container.exec(Spec::sleeping()).id("probe").added(&Io::default());
        let refusal = while_it_hangs(&container, &exec, || {
            let begun = Instant::now();
            exec.delete().expect("delete of an exec that is being started");
            assert!(begun.elapsed() < AT_ONCE, "{:?}", begun.elapsed());
        });
        let refusal = refusal.expect_err("a start that hung");
        assert!(refusal.message().contains("was deleted before it had started"), "round {round}: {refusal}");
        assert_eq!(container.pids().expect("pids"), [container.pid()], "round {round}");
    }
    leaks::assert_none("execs that hang and are deleted", &before);
}

#[test]
fn an_exec_that_hangs_fails_after_its_limit_and_can_be_tried_again() {
    needs!(OurShim);
    let node = Node::exclusive();
    let container = trapped(&node, 5);
    let before = Traces::take();
    let exec = container.exec(Spec::sleeping()).added(&Io::default());
    let refusal = while_it_hangs(&container, &exec, || {}).expect_err("a start that hangs");
    assert!(
        refusal.message().contains("OCI runtime exec failed") && refusal.message().contains("within 5 s"),
        "{refusal}"
    );
    assert_eq!(container.pids().expect("pids"), [container.pid()]);
    fs::remove_file(format!("/proc/{}/root/etc/passwd", container.pid())).expect("remove the trap");
    exec.start().expect("a second start");
    exec.kill(SIGKILL).expect("kill");
    assert_eq!(exec.exit_status(), 137);
    exec.delete().expect("delete");
    leaks::assert_none("an exec that hung", &before);
}

#[test]
fn the_end_of_init_ends_an_exec_that_hangs() {
    needs!(OurShim);
    let node = Node::exclusive();
    let runtime = Hanging::at("exec");
    warm_up(&node);
    let before = Traces::take();
    // `runc exec` may hang inside of the container, where it dies with init, or outside.
    let inside = trapped(&node, 0);
    let exec = inside.exec(Spec::sleeping()).added(&Io::default());
    // The result does not matter: runc reports success for a process that is killed before it runs its program.
    let _ = while_it_hangs(&inside, &exec, || inside.kill(SIGKILL).expect("kill"));
    assert_eq!(inside.exit_status(), 137);
    inside.delete().expect("delete");
    let spec = Spec::sleeping();
    let outside = node.container("outside", spec).options(runtime.options(0)).started(&Io::default());
    let exec = outside.exec(Spec::sleeping()).added(&Io::default());
    thread::scope(|scope| {
        let started = scope.spawn(|| exec.start());
        runtime.until_it_hangs();
        outside.kill(SIGKILL).expect("kill");
        started.join().expect("no panic").expect_err("a start in a container that has ended");
    });
    assert_eq!(outside.exit_status(), 137);
    outside.delete().expect("delete");
    runtime.assert_gone();
    drop((inside, outside));
    leaks::assert_none("execs that hung when their containers ended", &before);
}

#[test]
fn an_exec_that_hangs_while_the_daemon_is_killed_can_be_deleted() {
    needs!(OurShim);
    let node = Node::exclusive();
    let container = trapped(&node, 0);
    let before = Traces::take();
    let exec = container.exec(Spec::sleeping()).added(&Io::default());
    while_it_hangs(&container, &exec, || {
        daemon::killed();
        let begun = Instant::now();
        exec.delete().expect("delete");
        assert!(begun.elapsed() < AT_ONCE, "{:?}", begun.elapsed());
    })
    .expect_err("a start that hung");
    assert_eq!(container.pids().expect("pids"), [container.pid()]);
    leaks::assert_none("an exec that hung when the daemon was killed", &before);
}

#[test]
fn stopping_the_unit_of_an_exec_that_hangs_ends_all_its_processes() {
    needs!(OurShim);
    let node = Node::exclusive();
    let container = trapped(&node, 0);
    let before = Traces::take();
    let exec = container.exec(Spec::sleeping()).added(&Io::default());
    while_it_hangs(&container, &exec, || {
        process::succeed("systemctl", &["stop", &unit_of_exec(&container, &exec)]);
    })
    .expect_err("a start whose unit was stopped");
    assert_eq!(container.pids().expect("pids"), [container.pid()]);
    exec.delete().expect("delete");
    leaks::assert_none("an exec whose unit was stopped", &before);
}

#[test]
fn a_create_that_hangs_fails_after_its_limit_and_leaves_nothing() {
    needs!(OurShim);
    let node = Node::exclusive();
    let runtime = Hanging::at("create");
    warm_up(&node);
    let before = Traces::take();
    let container = node.container("hung", Spec::sleeping()).options(runtime.options(5)).make();
    let refusal = container.create(&Io::default()).expect_err("a create that hangs");
    assert!(refusal.message().contains("did not start in time"), "{refusal}");
    runtime.assert_gone();
    runtime.stop_hanging();
    container.create(&Io::default()).expect("the id can be used again");
    container.delete().expect("delete");
    drop(container);
    leaks::assert_none("a create that hung", &before);
}

#[test]
fn a_hook_that_hangs_fails_the_create_after_its_limit() {
    needs!(OurShim);
    let node = Node::exclusive();
    let scratch = Scratch::new("hook");
    let hook = scratch.join("hook.sh");
    fs::write(&hook, format!("#!/bin/sh\nsetsid tail -f {0} &\ntail -f {0}\n", scratch.text("hook.sh")))
        .expect("write a hook");
    fs::set_permissions(&hook, fs::Permissions::from_mode(0o755)).expect("make it executable");
    warm_up(&node);
    let before = Traces::take();
    let spec = Spec::sleeping().hook("createRuntime", &scratch.text("hook.sh"));
    let shim_cgroup = format!("/{}", unique("shim-cgroup"));
    for more in [String::new(), format!("ShimCgroup = {shim_cgroup:?}")] {
        let options = options(&format!("RuntimeTimeoutSec = 2\n{more}"));
        let container = node.container("hook", spec.clone()).options(options).make();
        container.create(&Io::default()).expect_err("a hook that hangs");
        let mark = scratch.text("hook.sh");
        wait::until_true("the hook is gone", || process::with_command_line(&mark).is_empty());
    }
    let shim_cgroup = format!("/sys/fs/cgroup{shim_cgroup}");
    wait::until_true("the client can remove its cgroup", || fs::remove_dir(&shim_cgroup).is_ok());
    leaks::assert_none("a hook that hung", &before);
}

#[test]
fn a_process_that_a_hook_left_behind_delays_nothing_even_with_its_output_open() {
    needs!(OurShim);
    let node = Node::exclusive();
    warm_up(&node);
    for (number, streams) in ["", " </dev/null >/dev/null 2>&1"].into_iter().enumerate() {
        let scratch = Scratch::new("left");
        let hook = scratch.join("hook.sh");
        // Unlike other programs, sleep does not end when nobody reads its output any more.
        let program = format!("sleep 98765{number}.{}", std::process::id());
        fs::write(&hook, format!("#!/bin/sh\n{program}{streams} &\n")).expect("write a hook");
        fs::set_permissions(&hook, fs::Permissions::from_mode(0o755)).expect("make it executable");
        let left = || process::with_command_line(&program);
        let hook = scratch.text("hook.sh");
        let before = Traces::take();
        let spec = Spec::sh("exit 6").hook("poststop", &hook);
        let container = node.container("left", spec).started(&Io::default());
        assert_eq!(container.exit_status(), 6);
        let begun = Instant::now();
        container.delete().expect("delete");
        let limit = if streams.is_empty() { 3 * AT_ONCE } else { AT_ONCE };
        assert!(begun.elapsed() < limit, "took {:?}", begun.elapsed());
        // The hook may have ended before its child executes sleep.
        wait::until_true("what a hook leaves behind lives on", || left().len() == 1);
        left().into_iter().for_each(|pid| daemon::signal(pid, nix::sys::signal::Signal::SIGKILL));
        wait::until_true("they are gone", || left().is_empty());
        daemon::systemctl("restart");
        wait::until("the daemon serves", daemon::serving);
        leaks::assert_none("hooks that left processes", &before);
    }
}

#[test]
fn a_start_that_hangs_fails_after_its_limit_and_can_be_tried_again() {
    needs!(OurShim);
    let node = Node::exclusive();
    let runtime = Hanging::at("start");
    let container =
        node.container("hung", Spec::sleeping()).options(runtime.options(5)).created(&Io::default());
    let refusal = container.start().expect_err("a start that hangs");
    assert_eq!(refusal.code(), Code::DeadlineExceeded, "{refusal}");
    assert!(refusal.message().contains("OCI runtime start failed"), "{refusal}");
    runtime.assert_gone();
    runtime.stop_hanging();
    container.start().expect("a second start");
    container.kill(SIGKILL).expect("kill");
    assert_eq!(container.exit_status(), 137);
}

#[test]
fn a_start_that_hangs_ends_soon_after_init() {
    needs!(OurShim);
    let node = Node::exclusive();
    let runtime = Hanging::at("start");
    let container =
        node.container("hung", Spec::sleeping()).options(runtime.options(0)).created(&Io::default());
    thread::scope(|scope| {
        let started = scope.spawn(|| container.start());
        runtime.until_it_hangs();
        container.kill(SIGKILL).expect("kill");
        started.join().expect("no panic").expect_err("a start of what has ended");
    });
    runtime.assert_gone();
    assert_eq!(container.exit_status(), 137);
    container.delete().expect("delete");
}

#[test]
fn a_delete_that_hangs_is_completed_without_the_runtime_after_its_limit() {
    needs!(OurShim);
    let node = Node::exclusive();
    let runtime = Hanging::at("delete");
    warm_up(&node);
    let before = Traces::take();
    let container =
        node.container("hung", Spec::sleeping()).options(runtime.options(5)).started(&Io::default());
    container.kill(SIGKILL).expect("kill");
    assert_eq!(container.exit_status(), 137);
    container.delete().expect("delete");
    runtime.assert_gone();
    drop(container);
    leaks::assert_none("a delete that hung", &before);
}

#[test]
fn deletes_that_hang_hold_no_thread_of_the_daemon() {
    needs!(OurShim);
    let node = Node::exclusive();
    let runtime = Hanging::at("delete");
    // Those for streams are always there.
    let threads = || {
        let daemon = systemd::main_pid(systemd::DAEMON_SERVICE);
        let all = process::threads(daemon);
        let names = all.filter_map(|thread| fs::read_to_string(thread.join("comm")).ok());
        names.filter(|name| name.trim_end() != "streams").count()
    };
    let containers: Vec<_> = (0..12)
        .map(|_| node.container("hung", Spec::sleeping()).options(runtime.options(0)).started(&Io::default()))
        .collect();
    for container in &containers {
        container.kill(SIGKILL).expect("kill");
        assert_eq!(container.exit_status(), 137);
    }
    // Fewer than the calls that hang.
    let few = containers.len() - 1;
    wait::until_true("the threads for what was before are gone", || threads() <= few);
    thread::scope(|scope| {
        let deletes: Vec<_> = containers.iter().map(|container| scope.spawn(|| container.delete())).collect();
        wait::until_true("systemd stops the unit meanwhile", || {
            systemd::list_units(&unit_of(&containers[0])).is_empty()
        });
        wait::until_true("the daemon has few threads", || threads() <= few);
        assert!(deletes.iter().all(|delete| !delete.is_finished()), "they hang meanwhile");
        runtime.release(containers.len());
        for delete in deletes {
            delete.join().expect("no panic").expect("delete");
        }
    });
    runtime.assert_gone();
}

#[test]
fn a_delete_succeeds_although_the_runtime_cant_read_its_state() {
    needs!(OurShim);
    let node = Node::exclusive();
    warm_up(&node);
    let before = Traces::take();
    let container = node.container("cut-off", Spec::sleeping()).started(&Io::default());
    let state = format!("/run/containerd/runc/{}/{}/state.json", container.namespace, container.id);
    let file = fs::OpenOptions::new().write(true).open(&state).expect("open the state");
    file.set_len(1000).expect("cut the state off");
    container.kill(SIGKILL).expect("kill");
    assert_eq!(container.exit_status(), 137);
    container.delete().expect("delete");
    container.create(&Io::default()).expect("the id can be used again");
    container.delete().expect("delete");
    drop(container);
    leaks::assert_none("a delete without the runtime", &before);
}

/// containerd calls no `delete` for a container in a sandbox of the shim.
#[test]
fn a_delete_ends_a_create_whose_client_has_given_it_up() {
    needs!(OurShim);
    let node = Node::exclusive();
    drop(node.container("warm", Spec::sleeping()).started(&Io::default()));
    let image = node.container("image", Spec::sleeping()).make();
    let before = Traces::take();
    let (scratch, bundle, id) = (Scratch::new("late"), Bundle::new("late"), unique("late"));
    let runtime = scratch.join("runtime.sh");
    // Longer than a Delete waits.
    let script = format!(
        "#!/bin/sh\ncase \" $* \" in *' create '*) runc \"$@\" || exit 1\ntouch {}\nexec sleep 20;; esac\nexec runc \"$@\"\n",
        scratch.text("created")
    );
    fs::write(&runtime, script).expect("write the runtime");
    fs::set_permissions(&runtime, fs::Permissions::from_mode(0o755)).expect("make it executable");
    let mut request = bundle.request(&id);
    request.options = Some(over_ttrpc(options(&format!("BinaryName = {runtime:?}")))).into();
    request.rootfs = image.mounts.iter().map(mount_of).collect();
    let [creates, deletes] = [(); 2].map(|()| Shim::connect(&node));
    thread::scope(|scope| {
        let created = scope.spawn(|| creates.create(request));
        wait::until_true("the runtime has created the container", || scratch.join("created").exists());
        let (request, begun) = (DeleteRequest { id: id.clone(), ..Default::default() }, Instant::now());
        let deleted = deletes.call(async |client, context| client.delete(context, &request).await);
        assert_eq!(deleted.expect_err("a task that is not created").0, ttrpc::Code::NOT_FOUND);
        assert!(begun.elapsed() < AT_ONCE, "{:?}", begun.elapsed());
        let created = created.join().expect("the Create does not panic");
        assert_eq!(created.expect_err("it was deleted").0, ttrpc::Code::CANCELLED);
    });
    drop((creates, deletes));
    leaks::assert_none("a create that was given up", &before);
}
