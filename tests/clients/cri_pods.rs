//! Pods and containers over CRI: life, output, networks, namespaces, and restarts of containerd.

use std::fs;

use crate::common::{daemon, disturb, process, systemd, wait};
use crate::cri::{
    Cri, EXITED, OF_NODE, RUNNING, has_network, has_user_namespaces, may_crash_containerd, unit_of,
};
use crate::cri_messages::*;

#[test]
fn a_container_runs_in_a_pod_and_its_exit_is_reported() {
    let cri = Cri::new();
    let pod = cri.pod("life");
    let container = cri.create(&pod, "one", &["sh", "-c", "echo out; echo err >&2; exit 7"], |_| ());
    assert_eq!(cri.status(&container).state, 0);
    cri.start(&container);
    let ended = cri.ended(&container);
    assert_eq!((ended.exit_code, ended.reason.as_str()), (7, "Error"), "{ended:?}");
    // containerd reads the clock for the start once Start has returned: a short process has ended by then.
    assert!(ended.started_at > 0 && ended.finished_at > 0, "{ended:?}");
    let mut log = container.log();
    log.sort();
    assert_eq!(log, ["stderr err", "stdout out"]);
    let good = cri.run(&pod, "two", &["true"]);
    let ended = cri.ended(&good);
    assert_eq!((ended.exit_code, ended.reason.as_str()), (0, "Completed"), "{ended:?}");
    cri.call(RemoveContainerRequest { container_id: container.id.clone() });
    let request = ContainerStatusRequest { container_id: container.id.clone(), verbose: false };
    assert!(cri.try_call(request).is_err());
}

#[test]
fn a_program_that_does_not_exist_fails_the_start() {
    let cri = Cri::new();
    let pod = cri.pod("missing");
    let container = cri.create(&pod, "missing", &["/there/is/no/such/program"], |_| ());
    let error = cri.try_call(StartContainerRequest { container_id: container.id.clone() }).unwrap_err();
    assert!(error.message().contains("no such file or directory"), "{error:?}");
    let ended = cri.status(&container);
    assert_eq!(
        (ended.state, ended.exit_code, ended.reason.as_str()),
        (EXITED, 128, "StartError"),
        "{ended:?}"
    );
}

#[test]
fn a_container_is_stopped_with_a_signal_and_then_killed() {
    let cri = Cri::new();
    let pod = cri.pod("stop");
    let ready = "echo ready; while :; do usleep 20000; done";
    let obedient = cri.run(&pod, "obedient", &["sh", "-c", &format!("trap 'exit 21' TERM; {ready}")]);
    let deaf = cri.run(&pod, "deaf", &["sh", "-c", &format!("trap '' TERM; {ready}")]);
    obedient.until_logged("ready");
    deaf.until_logged("ready");
    cri.stop(&obedient, 30);
    assert_eq!(cri.ended(&obedient).exit_code, 21);
    cri.stop(&deaf, 1);
    assert_eq!(cri.ended(&deaf).exit_code, 137);
    cri.stop(&deaf, 1);
}

#[test]
fn containers_of_a_pod_share_its_network_and_pods_reach_each_other() {
    if !has_network() {
        return;
    }
    let cri = Cri::new();
    let (server, client) = (cri.pod("server"), cri.pod("client"));
    let serve = "while :; do echo hello | nc -l -p 4000; done";
    let first = cri.run(&server, "first", &["sh", "-c", serve]);
    let second = cri.sleeping(&server, "second");
    let net = |container| process::namespace(cri.pid(container), "net");
    assert_eq!(net(&first), net(&second));
    assert_eq!(net(&first), process::namespace(cri.pause_pid(&server), "net"));
    let address = cri.address(&server);
    assert!(address.starts_with("10.98.0."), "{address}");
    let ask = format!("until echo | nc -w 2 {address} 4000 | grep hello; do usleep 50000; done");
    let asking = cri.run(&client, "asking", &["timeout", "20", "sh", "-c", &ask]);
    assert_eq!(cri.ended(&asking).exit_code, 0, "{:?}", asking.log());
    assert_eq!(cri.ask(&second, &["hostname"]), cri.ask(&first, &["hostname"]));
}

#[test]
fn a_pod_in_host_namespaces_has_the_namespaces_of_the_node() {
    if may_crash_containerd() {
        return;
    }
    let cri = Cri::new();
    let pod = cri.pod_with("of-node", |config| {
        // A pod in the node's network has the node's name.
        config.hostname.clear();
        let context = config.linux.as_mut().and_then(|linux| linux.security_context.as_mut());
        context.expect("a security context").namespace_options =
            Some(NamespaceOption { network: OF_NODE, pid: OF_NODE, ipc: OF_NODE, ..Default::default() });
    });
    let container = cri.sleeping(&pod, "of-node");
    for kind in ["net", "pid", "ipc"] {
        assert_eq!(process::namespace(cri.pid(&container), kind), process::namespace(1, kind), "{kind}");
    }
}

#[test]
fn a_pod_with_a_user_namespace_maps_its_users() {
    if !has_user_namespaces() {
        return;
    }
    let cri = Cri::new();
    const FIRST: u32 = 200_000;
    let mapping = IdMapping { host_id: FIRST, container_id: 0, length: 65_536 };
    let pod = cri.pod_with("mapped", |config| {
        let context = config.linux.as_mut().and_then(|linux| linux.security_context.as_mut());
        let options = context.and_then(|context| context.namespace_options.as_mut());
        options.expect("namespace options").userns_options =
            Some(UserNamespace { mode: 0, uids: vec![mapping.clone()], gids: vec![mapping.clone()] });
    });
    let (one, other) = (cri.sleeping(&pod, "one"), cri.sleeping(&pod, "other"));
    let pause = cri.pause_pid(&pod);
    for pid in [pause, cri.pid(&one), cri.pid(&other)] {
        assert_ne!(process::namespace(pid, "user"), process::namespace(1, "user"));
        assert_eq!(
            process::namespace(pid, "user"),
            process::namespace(pause, "user"),
            "one for the whole pod"
        );
        assert_eq!(process::namespace(pid, "net"), process::namespace(pause, "net"));
        let map = fs::read_to_string(format!("/proc/{pid}/uid_map")).expect("read a map");
        let numbers: Vec<&str> = map.split_whitespace().collect();
        assert_eq!(numbers, ["0", "200000", "65536"]);
    }
    let owner = process::status(cri.pid(&one), "Uid").expect("its user");
    assert!(owner.starts_with(&FIRST.to_string()), "root of the container is nobody on the node: {owner}");
    // The image, the files of the pod and new files belong to the container's root.
    let owners = "touch /new && stat -c '%u:%g' /bin/busybox /etc/hosts /etc/hostname /etc/resolv.conf /new";
    assert_eq!(cri.ask(&one, &["sh", "-c", owners]).lines().collect::<Vec<_>>(), ["0:0"; 5]);
    cri.ask(&one, &["sh", "-c", "echo shared >/dev/shm/file"]);
    assert_eq!(cri.ask(&other, &["cat", "/dev/shm/file"]), "shared");
    // The container's root may configure the pod's own objects, such as its network, but nothing else.
    assert_eq!(cri.ask(&one, &["cat", "/proc/sys/net/ipv4/ip_unprivileged_port_start"]), "0");
    if cri.is_ours() {
        daemon::killed();
    }
    assert_eq!(cri.ask(&other, &["id", "-u"]), "0");
}

#[test]
fn processes_end_with_their_container_in_a_shared_pid_namespace() {
    let cri = Cri::new();
    let pod = cri.pod_with("shared-pids", |config| {
        let context = config.linux.as_mut().and_then(|linux| linux.security_context.as_mut());
        context.expect("a security context").namespace_options = Some(NamespaceOption::default());
    });
    let one = cri.run(&pod, "one", &["sh", "-c", "sleep 100011 & echo ready; sleep 100012"]);
    let other = cri.sleeping(&pod, "other");
    one.until_logged("ready");
    let first =
        fs::read_to_string(format!("/proc/{}/cmdline", cri.pause_pid(&pod))).expect("read its command line");
    assert_eq!(cri.ask(&other, &["cat", "/proc/1/cmdline"]), first, "the pause process is the first one");
    assert!(cri.ask(&other, &["ps"]).contains("sleep 100011"));
    cri.stop(&one, 0);
    wait::until_true("its processes are gone", || process::with_command_line("sleep 10001").is_empty());
    assert_eq!(cri.status(&other).state, RUNNING);
}

#[test]
fn mounts_are_propagated_as_requested() {
    let cri = Cri::new();
    let pod = cri.pod_with("mounts", |config| {
        let context = config.linux.as_mut().and_then(|linux| linux.security_context.as_mut());
        context.expect("a security context").privileged = true;
    });
    let shared = crate::common::stdio::Scratch::new("propagated");
    process::succeed("mount", &["--bind", shared.as_str(), shared.as_str()]);
    process::succeed("mount", &["--make-shared", shared.as_str()]);
    fs::create_dir(shared.join("inside")).expect("make a directory");
    let container = cri.create(&pod, "mounts", &["sleep", "100000"], |config| {
        const BIDIRECTIONAL: i32 = 2;
        config.mounts.push(Mount {
            container_path: "/shared".to_string(),
            host_path: shared.as_str().to_string(),
            readonly: false,
            propagation: BIDIRECTIONAL,
        });
        let context = config.linux.as_mut().and_then(|linux| linux.security_context.as_mut());
        context.expect("a security context").privileged = true;
    });
    cri.start(&container);
    cri.ask(&container, &["mount", "-t", "tmpfs", "none", "/shared/inside"]);
    cri.ask(&container, &["sh", "-c", "echo seen >/shared/inside/file"]);
    assert_eq!(shared.read("inside/file"), "seen\n");
    cri.stop(&container, 0);
    process::succeed("umount", &["--recursive", shared.as_str()]);
}

#[test]
fn a_log_continues_in_a_new_file_after_rotation() {
    let cri = Cri::new();
    let pod = cri.pod("rotated");
    let container =
        cri.run(&pod, "rotated", &["sh", "-c", "n=0; while :; do n=$((n + 1)); echo $n; usleep 20000; done"]);
    wait::until_true("there are lines", || container.log().len() > 3);
    let rotated = container.log_path().with_extension("old");
    fs::rename(container.log_path(), &rotated).expect("rename the log");
    cri.call(ReopenContainerLogRequest { container_id: container.id.clone() });
    wait::until_true("there are lines in the new file", || container.log().len() > 3);
    cri.stop(&container, 0);
    cri.ended(&container);
    let old = fs::read_to_string(rotated).expect("read the old log").lines().count();
    let numbers: Vec<String> = container.log();
    let expected: Vec<String> = (0..numbers.len()).map(|line| format!("stdout {}", old + 1 + line)).collect();
    assert_eq!(numbers, expected);
}

#[test]
fn pods_continue_when_containerd_is_killed() {
    let cri = Cri::new();
    let pod = cri.pod("survivor");
    let container = cri.sleeping(&pod, "survivor");
    let ticking =
        cri.run(&pod, "ticking", &["sh", "-c", "n=0; while :; do n=$((n + 1)); echo $n; usleep 20000; done"]);
    let short = cri.run(
        &pod,
        "short",
        &["sh", "-c", "trap 'exit 17' TERM; echo ready; while :; do usleep 20000; done"],
    );
    short.until_logged("ready");
    let pids = || [cri.pid(&container), cri.pid(&ticking), cri.pause_pid(&pod)];
    let before = pids();
    let short_pid = cri.pid(&short);
    process::succeed("systemctl", &["kill", "--signal=KILL", "--kill-whom=main", "containerd.service"]);
    daemon::signal(short_pid, nix::sys::signal::Signal::SIGTERM);
    wait::until_true("the short container has ended", || !process::exists(short_pid));
    disturb::start_containerd();
    cri.node.wait_for_containerd();
    wait::until_true("CRI answers", || {
        cri.try_call(ContainerStatusRequest { container_id: container.id.clone(), verbose: false }).is_ok()
    });
    assert_eq!(pids(), before);
    // containerd-shim-runc-v2 does not keep an exit for a containerd that is away: CRI says 255.
    assert_eq!(cri.ended(&short).exit_code, if cri.is_ours() { 17 } else { 255 });
    assert_eq!(cri.ask(&container, &["echo", "on"]), "on");
    let lines = ticking.log().len();
    wait::until_true("it ticks on", || ticking.log().len() > lines);
    cri.stop(&container, 30);
    assert_eq!(cri.ended(&container).exit_code, 143);
}

#[test]
fn the_unit_shows_pod_and_container() {
    needs!(OurShim);
    let cri = Cri::new();
    let pod = cri.pod("shown");
    let container = cri.sleeping(&pod, "named");
    let unit = container.unit();
    assert_eq!(systemd::main_pid(&unit), cri.pid(&container));
    assert_eq!(systemd::main_pid(&unit_of(&pod.id)), cri.pause_pid(&pod));
    let description = systemd::property(&unit, "Description");
    assert!(description.contains("shown") && description.contains("named"), "{description}");
}
