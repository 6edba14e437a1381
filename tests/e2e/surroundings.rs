//! Effects of systemd and of the administrator on containers: another target, hooks, namespaces, units that name a
//! container's unit.

use std::fs;

use crate::common::daemon;
use crate::common::image::IMAGE;
use crate::common::node::{NAMESPACE, Node, runtime_under_test, unique};
use crate::common::process;
use crate::common::spec::Spec;
use crate::common::stdio::{Fifos, Scratch, feed};
use crate::common::systemd::{self, Masked};
use crate::common::task::Io;
use crate::common::wait::until_true;
use crate::runtime_options::{Noting, runc_options};

#[test]
fn containers_and_execs_outlive_another_target() {
    let node = Node::exclusive();
    let container = node.container("isolate", Spec::sleeping()).started(&Io::default());
    let fifos = Fifos::new("isolate");
    let stdin = fifos.open_stdin();
    let mut stdout = fifos.stdout();
    let _stderr = fifos.stderr();
    let exec = container.exec(Spec::sh("read line; echo $line; exit 7")).started(&fifos.io());
    let (pid, stdin) = (container.pid(), stdin.file());
    process::succeed("systemctl", &["isolate", "multi-user.target"]);
    node.wait_for_containerd();
    feed(&stdin, b"survived\n");
    assert_eq!(exec.exit_status(), 7);
    assert_eq!(stdout.text(), "survived\n");
    assert_eq!(container.pid(), pid);
    assert!(process::runs(pid));
    let new = node.container("isolated", Spec::sh("exit 3")).started(&Io::default());
    assert_eq!(new.exit_status(), 3);
}

#[test]
fn hooks_have_the_oom_score_of_an_ordinary_process() {
    needs!(OurShim);
    let node = Node::exclusive();
    let place = Scratch::new("scores");
    let program = place.text("hook");
    write_program(&program, &format!("#!/bin/sh\ncat /proc/self/oom_score_adj >>{}\n", place.text("scores")));
    let moments = ["createRuntime", "poststart", "poststop"];
    let spec = moments.iter().fold(Spec::sleeping(), |spec, moment| spec.hook(moment, &program));
    let container = node.container("scores", spec).started(&Io::default());
    container.kill(9).expect("kill");
    assert_eq!(container.exit_status(), 137);
    container.delete().expect("delete");
    assert_eq!(place.read("scores"), "0\n".repeat(moments.len()));
}

#[test]
fn a_name_that_another_unit_keeps_loaded_can_be_used_again() {
    let node = Node::exclusive();
    let id = unique("kept");
    let first = node.container("kept", Spec::sleeping()).id(&id).started(&Io::default());
    let unit = systemd::unit_of(&first);
    let (watcher, after) = (unique("watcher"), format!("--property=After={unit}"));
    process::succeed("systemd-run", &["--quiet", "--unit", &watcher, &after, "sleep", "100000"]);
    drop(first);
    // More often than systemd starts a unit by default: five times in ten seconds.
    for _ in 0..8 {
        let again = node.container("kept", Spec::sleeping()).id(&id).started(&Io::default());
        assert_eq!(systemd::unit_of(&again), unit);
        assert!(systemd::is_active(&unit));
        for _ in 0..2 {
            let exec = again.exec(Spec::sh("exit 6")).id("same").started(&Io::default());
            assert_eq!(exec.exit_status(), 6);
            exec.delete().expect("delete the exec");
        }
        again.end();
    }
    process::succeed("systemctl", &["stop", &watcher]);
}

#[test]
fn a_masked_name_keeps_neither_a_container_nor_an_exec_from_running() {
    let node = Node::exclusive();
    let id = unique("masked");
    let unit = format!("containerd-{NAMESPACE}-{id}");
    let masked = Masked::new(&format!("{unit}.service"));
    drop(node.container("masked", Spec::sleeping()).id(&id).started(&Io::default()));
    drop(masked);
    let _masked = Masked::new(&format!("{unit}:probe.service"));
    let container = node.container("masked", Spec::sleeping()).id(&id).started(&Io::default());
    let exec = container.exec(Spec::sh("exit 7")).id("probe").started(&Io::default());
    assert_eq!(exec.exit_status(), 7);
    exec.delete().expect("delete the exec");
    container.end();
}

#[test]
fn the_slice_of_a_namespace_disappears_with_its_last_task() {
    needs!(OurShim);
    let node = Node::exclusive();
    let namespace = unique("slices");
    let slice = systemd::slice_of(&namespace);
    let container = |name: &str| node.container(name, Spec::sleeping()).namespace(&namespace);
    let (first, last) =
        (container("first").started(&Io::default()), container("last").started(&Io::default()));
    drop(first);
    assert!(systemd::is_active(&slice), "{slice} is needed for another task");
    drop(last);
    until_true("the slice is gone", || systemd::list_units(&slice).is_empty());
}

#[test]
fn mounts_of_a_hook_are_on_the_host() {
    let node = Node::exclusive();
    let place = Scratch::new("hook");
    let (target, hook) = (place.text("net"), place.text("hook"));
    fs::write(&target, "").expect("make a mount point");
    let script = format!(
        "#!/bin/sh\npid=$(sed 's/.*\"pid\": *\\([0-9]*\\).*/\\1/' | tail -n 1)\nmount --bind /proc/$pid/ns/net {target}\n"
    );
    write_program(&hook, &script);
    let container =
        node.container("hook", Spec::sleeping().hook("createRuntime", &hook)).started(&Io::default());
    let mounted = inode(&target);
    let own = inode(&format!("/proc/{}/ns/net", container.pid()));
    process::succeed("umount", &[&target]);
    assert_eq!(mounted, own);
}

#[test]
fn an_oci_runtime_may_be_a_script() {
    let node = Node::shared();
    let place = Scratch::new("script");
    let runc = place.text("runc");
    write_program(&runc, "#!/bin/sh\nexec /usr/sbin/runc \"$@\"\n");
    let options = runc_options(|options| options.binary_name = runc);
    let container = node.container("script", Spec::sleeping()).options(options).started(&Io::default());
    let exec = container.exec_sh("exit 8");
    assert_eq!(exec.exit_status(), 8);
}

#[test]
fn the_oci_runtime_sees_containerds_environment() {
    let node = Node::exclusive();
    let directory = "/run/systemd/system/containerd.service.d";
    fs::create_dir_all(directory).expect("make the directory of drop-ins");
    let drop_in = format!("{directory}/e2e.conf");
    fs::write(&drop_in, "[Service]\nEnvironment=\"E2E_PROXY=one two\"\n").expect("write a drop-in");
    let restart = || {
        process::succeed("systemctl", &["daemon-reload"]);
        node.restart_containerd();
    };
    restart();
    let place = Scratch::new("environment");
    let seen = place.text("seen");
    let before =
        format!("for word; do case $word in create|start|exec|delete) env >>{seen}.$word;; esac; done");
    let noting = Noting::new("runc", &before);
    let options = runc_options(|options| options.binary_name = noting.path());
    let container = node.container("environment", Spec::sleeping()).options(options).started(&Io::default());
    assert_eq!(container.exec_sh("exit 2").exit_status(), 2);
    container.kill(9).expect("kill");
    assert_eq!(container.exit_status(), 137);
    container.delete().expect("delete");
    fs::remove_file(&drop_in).expect("remove the drop-in");
    restart();
    for verb in ["create", "start", "exec", "delete"] {
        let environment = place.read(&format!("seen.{verb}"));
        assert!(environment.contains("E2E_PROXY=one two\n"), "{verb}: {environment}");
        assert!(!environment.contains("NOTIFY_SOCKET="), "{verb}: {environment}");
    }
}

/// A job of containerd.service that lasts until this is dropped, while containerd answers calls.
struct Pending {
    drop_in: String,
}

impl Pending {
    /// Restarts containerd, with a command in this setting that does not end by itself. Returns once systemd is in this state, in
    /// which the command runs.
    fn new(node: &Node, setting: &str, state: &str) -> Self {
        let directory = "/run/systemd/system/containerd.service.d";
        fs::create_dir_all(directory).expect("make the directory of drop-ins");
        let pending = Self { drop_in: format!("{directory}/e2e-pending.conf") };
        let lines =
            format!("{setting}=-/bin/sleep infinity\nTimeoutStartSec=infinity\nTimeoutStopSec=infinity\n");
        fs::write(&pending.drop_in, format!("[Service]\n{lines}")).expect("write a drop-in");
        process::succeed("systemctl", &["daemon-reload"]);
        process::succeed("systemctl", &["reset-failed", "containerd.service"]);
        process::succeed("systemctl", &["restart", "--no-block", "containerd.service"]);
        until_true("the command runs", || systemd::property("containerd.service", "SubState") == state);
        node.wait_for_containerd();
        pending
    }
}

impl Drop for Pending {
    fn drop(&mut self) {
        // Errors of this clean-up show in the next test.
        process::run("systemctl", &["kill", "--kill-whom=control", "containerd.service"]);
        // Waits for the job.
        process::run("systemctl", &["start", "containerd.service"]);
        let _ = fs::remove_file(&self.drop_in);
        process::run("systemctl", &["daemon-reload"]);
    }
}

#[test]
fn no_call_waits_for_a_job_of_containerds_service() {
    let node = Node::exclusive();
    let older = node.container("older", Spec::sleeping()).started(&Io::default());
    for (setting, state) in [("ExecStartPost", "start-post"), ("ExecStop", "stop")] {
        let pending = Pending::new(&node, setting, state);
        let container = node.container("pending", Spec::sleeping()).started(&Io::default());
        assert_eq!(container.exec_sh("exit 7").exit_status(), 7);
        assert_eq!(older.exec_sh("exit 8").exit_status(), 8);
        container.end();
        // As a command of containerd.service could.
        let (runtime, id) = (runtime_under_test(), unique("by-ctr"));
        let run = ["run", "--rm", "--cpu-shares", "0", "--runtime", &runtime, IMAGE, &id, "echo", "hello"];
        assert_eq!(process::succeed("ctr", &run).trim(), "hello");
        assert_eq!(systemd::property("containerd.service", "SubState"), state, "its job has not ended");
        drop(pending);
        node.wait_for_containerd();
    }
    older.end();
}

#[test]
fn the_slice_that_keeps_the_order_of_stops_is_started_again() {
    needs!(OurShim);
    let node = Node::exclusive();
    let container = node.container("order", Spec::sleeping()).started(&Io::default());
    let (unit, pid) = (systemd::unit_of(&container), container.pid());
    let names = |unit: &str, property: &str, name: &str| {
        systemd::property(unit, property).split_whitespace().any(|found| found == name)
    };
    let is_kept = || {
        systemd::is_active(systemd::ORDER_SLICE)
            && names(&unit, "After", systemd::ORDER_SLICE)
            && names(systemd::ORDER_SLICE, "After", "containerd.service")
            && names(systemd::ORDER_SLICE, "After", systemd::DAEMON_SERVICE)
            && names(systemd::ORDER_SLICE, "Conflicts", "shutdown.target")
    };
    until_true("the daemon has started the slice", is_kept);
    process::succeed("systemctl", &["stop", systemd::ORDER_SLICE]);
    assert!(!systemd::is_active(systemd::ORDER_SLICE));
    process::succeed("systemctl", &["daemon-reload"]);
    until_true("a reload starts it again", is_kept);
    process::succeed("systemctl", &["stop", systemd::ORDER_SLICE]);
    daemon::systemctl("restart");
    until_true("the next daemon starts it again", is_kept);
    // Also one that systemd has unloaded, as no unit names it any more.
    assert_eq!(container.pid(), pid);
    container.end();
    process::succeed("systemctl", &["stop", systemd::ORDER_SLICE]);
    process::succeed("systemctl", &["daemon-reload"]);
    until_true("it is made again", || systemd::is_active(systemd::ORDER_SLICE));
    assert!(names(systemd::ORDER_SLICE, "After", "containerd.service"));
}

/// containerd with a network and a mount namespace of its own.
struct Apart<'n> {
    node: &'n Node,
    drop_in: String,
    network: String,
}

impl<'n> Apart<'n> {
    fn new(node: &'n Node) -> Self {
        let directory = "/run/systemd/system/containerd.service.d";
        fs::create_dir_all(directory).expect("make the directory of drop-ins");
        let apart = Self { node, drop_in: format!("{directory}/e2e.conf"), network: unique("blue") };
        process::succeed("ip", &["netns", "add", &apart.network]);
        let lines = format!("NetworkNamespacePath=/run/netns/{}\nPrivateMounts=yes\n", apart.network);
        fs::write(&apart.drop_in, format!("[Service]\n{lines}")).expect("write a drop-in");
        apart.restart();
        apart
    }

    fn restart(&self) {
        process::succeed("systemctl", &["daemon-reload"]);
        self.node.restart_containerd();
    }

    /// Gives containerd the namespaces of the host back.
    fn end(&self) {
        fs::remove_file(&self.drop_in).expect("remove the drop-in");
        self.restart();
        process::succeed("ip", &["netns", "delete", &self.network]);
    }
}

/// A hook that adds its mount and network namespace to a file.
fn noting_namespaces(place: &Scratch) -> String {
    let hook = place.text("hook");
    let seen = place.text("seen");
    write_program(&hook, &format!("#!/bin/sh\nreadlink /proc/self/ns/mnt /proc/self/ns/net >>{seen}\n"));
    hook
}

/// The lines that such a hook writes in the namespaces of a process.
fn namespaces_of(pid: u32) -> String {
    format!("{}\n{}\n", process::namespace(pid, "mnt"), process::namespace(pid, "net"))
}

#[test]
fn containers_are_created_in_containerds_own_namespaces() {
    let node = Node::exclusive();
    let apart = Apart::new(&node);
    let containerd = systemd::main_pid("containerd.service").to_string();
    let place = Scratch::new("private");
    let inside = ["-t", &containerd, "--mount", "mount", "-t", "tmpfs", "none", place.as_str()];
    process::succeed("nsenter", &inside);
    process::succeed("nsenter", &["-t", &containerd, "--mount", "touch", &place.text("inside")]);
    let spec = Spec::sh("test -e /place/inside && exec sleep 100000; exit 1")
        .in_host_namespace("network")
        .bind(place.as_str(), "/place", &["ro"]);
    let container = node.container("private", spec).started(&Io::default());
    assert_eq!(container.exec_sh("exit 9").exit_status(), 9);
    let found = inode(&format!("/proc/{}/ns/net", container.pid()));
    let wanted = inode(&format!("/run/netns/{}", apart.network));
    container.end();
    apart.end();
    assert_eq!(found, wanted);
}

#[test]
fn hooks_of_start_and_delete_run_in_containerds_own_namespaces() {
    let node = Node::exclusive();
    let apart = Apart::new(&node);
    let wanted = namespaces_of(systemd::main_pid("containerd.service"));
    let place = Scratch::new("hooks");
    let hook = noting_namespaces(&place);
    let spec = Spec::sleeping().hook("poststart", &hook).hook("poststop", &hook);
    let container = node.container("hooks-apart", spec).started(&Io::default());
    let started = place.read("seen");
    container.end();
    let ended = place.read("seen");
    apart.end();
    assert_ne!(wanted, namespaces_of(1));
    assert_eq!(started, wanted);
    assert_eq!(ended, wanted.repeat(2));
}

/// The first command of a hook. A hook gets the state of the container, with the path of the bundle.
const BUNDLE: &str = r#"bundle=$(sed 's/.*"bundle":"\([^"]*\)".*/\1/')"#;

#[test]
fn every_hook_finds_the_rootfs() {
    let node = Node::exclusive();
    let place = Scratch::new("rootfs");
    let hook = place.text("hook");
    let seen = place.text("seen");
    write_program(&hook, &format!("#!/bin/sh\n{BUNDLE}\ntest -e $bundle/rootfs/bin && echo yes >>{seen}\n"));
    let wrong = ["poststop", "createRuntime"].into_iter().filter(|moment| {
        let spec = Spec::sleeping().hook(moment, &hook);
        node.container("rootfs", spec).started(&Io::default()).end();
        let lines = fs::read_to_string(&seen).unwrap_or_default();
        fs::remove_file(&seen).is_err() || lines != "yes\n"
    });
    assert_eq!(wrong.collect::<Vec<_>>(), [""; 0]);
}

#[test]
fn every_hook_runs_in_the_bundle() {
    let node = Node::exclusive();
    let place = Scratch::new("directory");
    let (hook, seen) = (place.text("hook"), place.text("seen"));
    let compare = r#"[ "$(pwd -P)" = "$(readlink -f "$bundle")" ] && echo yes || pwd -P"#;
    write_program(&hook, &format!("#!/bin/sh\n{BUNDLE}\n{{ {compare}; }} >>{seen}\n"));
    for moment in ["createRuntime", "poststart", "poststop"] {
        let spec = Spec::sleeping().hook(moment, &hook);
        node.container("directory", spec).started(&Io::default()).end();
        assert_eq!(fs::read_to_string(&seen).unwrap_or_default(), "yes\n", "{moment}");
        fs::remove_file(&seen).expect("remove");
    }
}

#[test]
fn a_task_outlives_the_namespaces_in_which_it_was_created() {
    needs!(OurShim);
    let node = Node::exclusive();
    let apart = Apart::new(&node);
    let place = Scratch::new("hooks");
    let hook = noting_namespaces(&place);
    let spec = Spec::sleeping().hook("poststart", &hook).hook("poststop", &hook);
    let before = namespaces_of(systemd::main_pid("containerd.service"));
    let container = node.container("hooks-moved", spec).created(&Io::default());
    apart.end();
    container.start().expect("start");
    assert_eq!(container.exec_sh("exit 9").exit_status(), 9);
    container.end();
    // runc runs the first hook at the end of its `create`.
    assert_eq!(place.read("seen"), before + &namespaces_of(1));
}

fn write_program(path: &str, text: &str) {
    use std::os::unix::fs::PermissionsExt;
    fs::write(path, text).expect("write a program");
    fs::set_permissions(path, fs::Permissions::from_mode(0o755)).expect("make it executable");
}

fn inode(path: &str) -> u64 {
    use std::os::unix::fs::MetadataExt;
    fs::metadata(path).unwrap_or_else(|error| panic!("{path}: {error}")).ino()
}
