//! The place of containers in the cgroup tree, as the client requests it, and how agents find containers there.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::{Value, json};

use crate::common::container::Container;
use crate::common::node::{Node, unique};
use crate::common::spec::Spec;
use crate::common::systemd::{self, Cursor};
use crate::common::task::{Io, SIGKILL};
use crate::common::wait::until_true;
use crate::common::{cgroup, daemon, process};

const ROOT: &str = "/sys/fs/cgroup";

/// A new id in the form that Docker and Kubernetes use.
fn digest() -> String {
    // Backwards: units are named by the first digits.
    let name = unique("").bytes().rev().map(|byte| format!("{byte:02x}")).collect::<String>();
    format!("{name:0<64}")[..64].to_string()
}

fn path_of(container: &Container) -> String {
    let cgroup = cgroup::of(container.pid());
    cgroup.strip_prefix(ROOT).expect("in the tree").to_string_lossy().into_owned()
}

/// Every cgroup of the machine, the deepest last.
fn all_cgroups() -> Vec<PathBuf> {
    let mut found = vec![PathBuf::from(ROOT)];
    let mut next = 0;
    while let Some(directory) = found.get(next).cloned() {
        found.extend(systemd::directories(&directory));
        next += 1;
    }
    found
}

/// systemd removes the cgroups of a container one by one, does nothing else meanwhile, and leaves those that are too deep. So the
/// kernel limits them, in the unit's cgroup, which a container can't write.
#[test]
fn a_container_makes_a_limited_number_of_cgroups() {
    needs!(OurShim);
    let node = Node::exclusive();
    let container = node.container("cgroups", Spec::sleeping()).started(&Io::default());
    let (unit, cgroup) = (systemd::unit_of(&container), cgroup::of(container.pid()));
    assert_eq!(cgroup.parent(), systemd::cgroup(&unit).as_deref(), "the limits are above the container");
    // What a process of the container does in a cgroup namespace of its own.
    let until_refused = |next: &mut dyn FnMut(usize) -> PathBuf| {
        let refused = (1..10_000).find_map(|count| Some((count, fs::create_dir(next(count)).err()?)));
        let (count, error) = refused.expect("a limit");
        assert_eq!(error.kind(), std::io::ErrorKind::WouldBlock, "{error}");
        count
    };
    let mut deepest = cgroup.clone();
    let depth = until_refused(&mut |_| {
        deepest.push("d");
        deepest.clone()
    });
    let width = until_refused(&mut |count| cgroup.join(format!("w{count}")));
    assert_eq!((depth, depth + width), (64, 4097), "the cgroup of the container counts");
    container.kill(SIGKILL).expect("kill");
    assert_eq!(container.exit_status(), 137);
    container.delete().expect("delete");
    until_true("the cgroup of the unit is removed", || !cgroup.parent().is_some_and(Path::exists));
    node.container("after", Spec::sleeping()).started(&Io::default()).end();
}

/// As with runc's systemd driver: a systemd, a Docker or a Podman in the container can make cgroups.
#[test]
fn the_user_of_a_container_owns_a_cgroup_that_it_can_write() {
    needs!(OurShim);
    let node = Node::shared();
    let mounted = |option: &str| {
        let spec = Spec::sleeping().user(1234, 1234);
        let mut text: Value = serde_json::from_slice(&spec.to_json()).expect("a spec");
        let mounts = text["mounts"].as_array_mut().expect("mounts");
        let place = mounts.iter_mut().find(|mount| mount["destination"] == "/sys/fs/cgroup");
        place.expect("a mount of cgroups")["options"] = json!(["nosuid", "noexec", "nodev", option]);
        text["linux"]["namespaces"].as_array_mut().expect("namespaces").push(json!({"type": "cgroup"}));
        spec.with("/mounts", text["mounts"].take())
            .with("/linux/namespaces", text["linux"]["namespaces"].take())
    };
    for (option, owner) in [("rw", 1234), ("ro", 0)] {
        let container = node.container(option, mounted(option)).started(&Io::default());
        let cgroup = cgroup::of(container.pid());
        for file in ["", "cgroup.procs", "cgroup.threads", "cgroup.subtree_control"] {
            let found = fs::metadata(cgroup.join(file)).expect("the cgroup of the container");
            assert_eq!((found.uid(), found.gid()), (owner, 0), "{option}: {file:?}");
        }
        let unit = fs::metadata(cgroup.parent().expect("a parent")).expect("the cgroup of the unit");
        assert_eq!(unit.uid(), 0);
        container.end();
    }
}

#[test]
fn a_requested_slice_is_nested_as_its_name_says() {
    needs!(OurShim);
    let node = Node::shared();
    let id = digest();
    let spec =
        Spec::sleeping().cgroups_path(&format!("kubepods-besteffort-pode2e_1.slice:cri-containerd:{id}"));
    let container = node.container("nested", spec).id(&id).started(&Io::default());
    let short = &id[..12];
    assert_eq!(
        path_of(&container),
        format!(
            "kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-pode2e_1.slice/\
             containerd-default-{short}.service/cri-containerd-{id}.scope"
        )
    );
}

#[test]
fn without_a_requested_path_a_container_is_in_the_slice_of_its_namespace() {
    needs!(OurShim);
    let node = Node::shared();
    for requested in ["", "/default/{id}", "/docker/{id}"] {
        let id = unique("own");
        let spec = Spec::sleeping().cgroups_path(&requested.replace("{id}", &id));
        let container = node.container("own", spec).id(&id).started(&Io::default());
        let wanted =
            format!("containerd.slice/containerd-default.slice/containerd-default-{id}.service/{id}");
        assert_eq!(path_of(&container), wanted, "{requested:?}");
    }
}

#[test]
fn containers_of_a_pod_without_a_parent_share_a_slice() {
    needs!(OurShim);
    let node = Node::shared();
    let pod = digest();
    let made = |kind: &str, id: &str| {
        let spec = Spec::sleeping()
            .cgroups_path(&format!("/k8s.io/{id}"))
            .annotation("io.kubernetes.cri.container-type", kind)
            .annotation("io.kubernetes.cri.sandbox-id", &pod)
            .annotation("io.kubernetes.cri.sandbox-name", "web-0")
            .annotation("io.kubernetes.cri.sandbox-namespace", "shop");
        node.container("pod", spec).namespace("k8s.io").id(id).started(&Io::default())
    };
    let (sandbox, member) = (made("sandbox", &pod), made("container", &digest()));
    let slice = |container: &Container| systemd::property(&systemd::unit_of(container), "Slice");
    assert_eq!(slice(&sandbox), slice(&member));
    assert!(slice(&sandbox).starts_with("containerd-k8s.io-"), "{}", slice(&sandbox));
    let description = systemd::property(&slice(&sandbox), "Description");
    assert_eq!(description, "Pod shop/web-0");
    let slice = slice(&sandbox);
    drop((sandbox, member));
    until_true("the slice goes after the last of them", || systemd::list_units(&slice).is_empty());
}

#[test]
fn many_pods_one_after_the_other_get_slices() {
    needs!(OurShim);
    let node = Node::shared();
    for _ in 0..40 {
        let pod = digest();
        let spec = Spec::sleeping()
            .cgroups_path(&format!("/k8s.io/{pod}"))
            .annotation("io.kubernetes.cri.container-type", "sandbox")
            .annotation("io.kubernetes.cri.sandbox-id", &pod);
        node.container("pod", spec).namespace("k8s.io").id(&pod).started(&Io::default());
    }
    until_true("the slices of pods are gone", || systemd::list_units("containerd-k8s.io-*.slice").is_empty());
}

/// cAdvisor treats a cgroup as a container if its last element has 64 letters or digits in a row and is no mount
/// unit. kubelet's summary uses the text after the last dash of a `.scope`.
#[test]
fn monitoring_agents_find_each_container_once_in_the_cgroup_of_its_processes() {
    needs!(OurShim);
    let node = Node::shared();
    let (id, exec) = (digest(), digest());
    let spec = Spec::sleeping().cgroups_path(&format!("kubepods-pode2e_2.slice:cri-containerd:{id}"));
    let container = node.container("found", spec).id(&id).started(&Io::default());
    let exec = container.exec(Spec::sleeping()).id(&exec).started(&Io::default());
    let last = |path: &Path| path.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let is_found = |name: &str| {
        let runs = name.split(|c: char| !c.is_ascii_lowercase() && !c.is_ascii_digit());
        !name.ends_with(".mount")
            && runs.into_iter().any(|run| run.len() >= 64 && (run.contains(&id) || run.contains(&exec.id)))
    };
    let found: Vec<PathBuf> = all_cgroups().into_iter().filter(|path| is_found(&last(path))).collect();
    assert_eq!(found, [cgroup::of(container.pid())], "one for the container, none for the exec");
    let procs = fs::read_to_string(found[0].join("cgroup.procs")).expect("cgroup.procs");
    for pid in [container.pid(), exec.pid()] {
        assert!(procs.lines().any(|line| line == pid.to_string()), "{pid} in {procs:?}");
    }
    let name = last(&found[0]);
    assert_eq!(name.strip_suffix(".scope").and_then(|name| name.rsplit('-').next()), Some(id.as_str()));
}

#[test]
fn a_foreign_path_is_honoured_with_a_warning() {
    needs!(OurShim);
    let node = Node::shared();
    let id = unique("foreign");
    let path = format!("/e2e-kubepods/burstable/pod1/{id}");
    let before = Cursor::now();
    let container =
        node.container("foreign", Spec::sleeping().cgroups_path(&path)).id(&id).started(&Io::default());
    assert_eq!(format!("/{}", path_of(&container)), path);
    let unit = format!("_SYSTEMD_UNIT={}", systemd::DAEMON_SERVICE);
    let warned = |entry: &Value| {
        entry["MESSAGE"].as_str().is_some_and(|text| text.contains(&id) && text.contains(&path))
    };
    until_true("the daemon has warned", || before.entries_since(&[&unit]).iter().any(warned));
    drop(container);
    for directory in ["e2e-kubepods/burstable/pod1", "e2e-kubepods/burstable", "e2e-kubepods"] {
        fs::remove_dir(Path::new(ROOT).join(directory)).expect("the client's own parents are empty");
    }
}

/// The end of a container kills all in its cgroup. In `/init.scope`, that is systemd.
#[test]
fn a_cgroup_with_processes_of_others_is_refused_and_they_live_on() {
    needs!(OurShim);
    let node = Node::shared();
    let parent = format!("/{}", unique("e2e-taken"));
    let directory = PathBuf::from(format!("{ROOT}{parent}"));
    let child = directory.join("child");
    fs::create_dir_all(&child).expect("make two cgroups");
    let mut stranger = Command::new("sleep").arg("1000").spawn().expect("start a process");
    fs::write(child.join("cgroup.procs"), stranger.id().to_string()).expect("move a process");
    // The process is in the requested cgroup, or in one below it.
    for taken in ["/init.scope", "/system.slice", &parent, &format!("{parent}/child")] {
        let container = node.container("intruder", Spec::sleeping().cgroups_path(taken)).make();
        let refusal = container.create(&Io::default()).expect_err(taken);
        assert!(refusal.message().contains(taken), "{taken}: {refusal}");
        drop(container);
        assert_eq!(stranger.try_wait().expect("look at the process"), None, "{taken}");
    }
    stranger.kill().expect("end the process");
    stranger.wait().expect("wait for its end");
    let empty = |path: &Path| {
        let events = fs::read_to_string(path.join("cgroup.events")).expect("read cgroup.events");
        events.contains("populated 0")
    };
    until_true("the cgroup is empty", || empty(&directory));
    // An empty cgroup is accepted.
    let container = node
        .container("guest", Spec::sleeping().cgroups_path(&format!("{parent}/child")))
        .started(&Io::default());
    drop(container);
    let _ = fs::remove_dir(child);
    fs::remove_dir(directory).expect("the client's own parent is empty");
}

/// A cgroup of nobody.
fn other_cgroup() -> PathBuf {
    let cgroup = PathBuf::from(format!("{ROOT}/{}", unique("e2e-moved")));
    fs::create_dir(&cgroup).expect("make a cgroup");
    cgroup
}

fn move_process(pid: u32, cgroup: &Path) {
    fs::write(cgroup.join("cgroup.procs"), pid.to_string()).expect("move a process");
}

/// Tools on a node can move processes, and a privileged container can move its own.
#[test]
fn a_kill_of_all_processes_reaches_init_in_another_cgroup() {
    needs!(OurShim);
    let node = Node::shared();
    let elsewhere = other_cgroup();
    let container = node.container("moved", Spec::sleeping()).started(&Io::default());
    let exec = container.exec(Spec::sleeping()).started(&Io::default());
    move_process(container.pid(), &elsewhere);
    container.kill_all(SIGKILL).expect("kill all");
    assert_eq!((container.exit_status(), exec.exit_status()), (137, 137));
    drop(exec);
    drop(container);
    fs::remove_dir(elsewhere).expect("the cgroup is empty");
}

#[test]
fn the_delete_of_a_created_container_ends_an_init_in_another_cgroup() {
    needs!(OurShim);
    let node = Node::shared();
    let elsewhere = other_cgroup();
    let container = node.container("moved", Spec::sleeping()).created(&Io::default());
    move_process(container.pid(), &elsewhere);
    container.delete().expect("delete");
    fs::remove_dir(elsewhere).expect("the cgroup is empty");
}

#[test]
fn the_next_daemon_can_kill_processes_in_another_cgroup() {
    needs!(OurShim);
    let node = Node::exclusive();
    let elsewhere = other_cgroup();
    let container = node.container("moved", Spec::sleeping()).started(&Io::default());
    let exec = container.exec(Spec::sleeping()).started(&Io::default());
    for pid in [container.pid(), exec.pid()] {
        move_process(pid, &elsewhere);
    }
    let killed = daemon::kill_now();
    daemon::wait_for_another(killed);
    exec.kill(SIGKILL).expect("kill the exec");
    assert_eq!(exec.exit_status(), 137);
    container.kill(SIGKILL).expect("kill init");
    assert_eq!(container.exit_status(), 137);
    drop(exec);
    drop(container);
    fs::remove_dir(elsewhere).expect("the cgroup is empty");
}

/// kubelet ends a pod in this way: it sends SIGKILL to all processes in the pod's cgroup, and stops the slice.
#[test]
fn a_pods_slice_can_be_stopped_with_its_containers() {
    needs!(OurShim);
    let node = Node::shared();
    let (id, slice) = (digest(), "e2epods-pode2e_3.slice");
    let spec = Spec::sleeping().cgroups_path(&format!("{slice}:cri-containerd:{id}"));
    let container = node.container("stopped", spec).id(&id).started(&Io::default());
    process::succeed("systemctl", &["stop", slice]);
    assert_eq!(container.exit_status(), 137);
    assert_eq!(container.delete().expect("delete").exit_status, 137);
}
