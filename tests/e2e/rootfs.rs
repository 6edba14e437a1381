//! The rootfs is mounted in the right namespace, and nothing stays mounted.

use std::fs;

use crate::common::container::Container;
use crate::common::node::{Node, unique};
use crate::common::shim::{self, Bundle};
use crate::common::spec::Spec;
use crate::common::stdio::{Fifos, Scratch};
use crate::common::task::{Io, SIGKILL};
use crate::common::{daemon, process, wait};

const BUNDLES: &str = "/run/containerd/io.containerd.runtime.v2.task";

/// Whether the rootfs is mounted in the mount namespace of this process.
fn mounted_in(pid: u32, container: &Container) -> bool {
    let point = format!("{BUNDLES}/{}/{}/rootfs", container.namespace, container.id);
    mount_points(pid).contains(&point)
}

fn mount_points(pid: u32) -> Vec<String> {
    let table = fs::read_to_string(format!("/proc/{pid}/mountinfo")).unwrap_or_default();
    table.lines().filter_map(|line| line.split(' ').nth(4)).map(str::to_string).collect()
}

#[test]
fn the_rootfs_is_not_mounted_in_the_hosts_namespace() {
    needs!(OurShim);
    let node = Node::shared();
    let container = node.container("private", Spec::sleeping()).started(&Io::default());
    assert!(!mounted_in(1, &container));
    assert!(process::status(container.pid(), "Name").is_some(), "it runs all the same");
}

#[test]
fn the_rootfs_is_mounted_in_the_hosts_namespace_where_propagation_needs_it() {
    let node = Node::shared();
    let volume = Scratch::new("volume");
    let specs = [
        ("shared rootfs", Spec::sleeping().rootfs_propagation("shared")),
        ("rshared rootfs", Spec::sleeping().rootfs_propagation("rshared")),
        ("rshared bind mount", Spec::sleeping().bind(volume.as_str(), "/volume", &["rshared"])),
    ];
    for (what, spec) in specs {
        let container = node.container("shared", spec).started(&Io::default());
        assert!(mounted_in(1, &container), "{what}");
        container.kill(SIGKILL).expect("kill");
        container.wait().expect("wait");
        container.delete().expect("delete");
        assert!(!mounted_in(1, &container), "{what}, after delete");
    }
}

#[test]
fn a_mount_in_a_bidirectional_volume_reaches_the_host() {
    let node = Node::shared();
    let volume = Scratch::new("volume");
    fs::create_dir(volume.join("inner")).expect("make a directory in the volume");
    let fifos = Fifos::new("bidirectional");
    let (mut stdout, _stderr) = (fifos.stdout(), fifos.stderr());
    let script = "trap 'umount /volume/inner; exit 0' TERM; \
                  mount -t tmpfs none /volume/inner && echo mounted; sleep 100000 & wait";
    let spec = Spec::sh(script).with_sys_admin().rootfs_propagation("rshared").bind(
        volume.as_str(),
        "/volume",
        &["rshared"],
    );
    let container = node.container("bidirectional", spec).started(&fifos.output());
    stdout.until(|bytes| bytes.ends_with(b"mounted\n"));
    let inner = volume.text("inner");
    assert!(mount_points(1).contains(&inner), "the host sees the container's mount");
    container.kill(15).expect("terminate");
    assert_eq!(container.exit_status(), 0);
    wait::until_true("the host's view is clean again", || !mount_points(1).contains(&inner));
}

#[test]
fn a_mount_of_the_host_reaches_a_volume_that_follows_it() {
    let node = Node::shared();
    let volume = Scratch::new("volume");
    fs::create_dir(volume.join("inner")).expect("make a directory in the volume");
    let fifos = Fifos::new("host-to-container");
    let (mut stdout, _stderr) = (fifos.stdout(), fifos.stderr());
    let script = "echo ready; until [ -e /volume/inner/mark ]; do sleep 0.05; done; exit 21";
    let spec = Spec::sh(script).rootfs_propagation("rslave").bind(volume.as_str(), "/volume", &["rslave"]);
    let container = node.container("host-to-container", spec).started(&fifos.output());
    stdout.until(|bytes| bytes == b"ready\n");
    let inner = volume.text("inner");
    process::succeed("mount", &["-t", "tmpfs", "none", &inner]);
    fs::write(volume.join("inner/mark"), "").expect("write into the new mount");
    let exit = container.wait();
    process::succeed("umount", &["--lazy", &inner]);
    assert_eq!(exit.expect("wait").status, 21);
}

#[test]
fn the_rootfs_is_the_snapshot_and_writable() {
    let node = Node::shared();
    let script = "echo kept > /mark && [ \"$(cat /mark)\" = kept ] && [ -x /bin/busybox ]";
    assert_eq!(node.container("write", Spec::sh(script)).started(&Io::default()).exit_status(), 0);
}

#[test]
fn nothing_stays_mounted() {
    let node = Node::shared();
    for propagation in ["rslave", "rshared"] {
        let sleeping = Spec::sleeping().rootfs_propagation(propagation);

        let container = node.container("deleted", sleeping.clone()).started(&Io::default());
        container.kill(SIGKILL).expect("kill");
        container.wait().expect("wait");
        container.delete().expect("delete");
        assert!(!mounted_in(1, &container), "after delete, {propagation}");

        let container = node.container("killed", sleeping.clone()).started(&Io::default());
        process::succeed("kill", &["-KILL", &container.pid().to_string()]);
        assert_eq!(container.exit_status(), 137);
        container.delete().expect("delete");
        assert!(!mounted_in(1, &container), "after kill -9 from outside, {propagation}");

        let failing = Spec::new(&["/no/such/command"]).rootfs_propagation(propagation);
        let container = node.container("failed", failing).make();
        container.create(&Io::default()).and_then(|_| container.start()).expect_err("no such command");
        let _ = container.delete(); // a failed Create has no task, a failed Start has
        assert!(!mounted_in(1, &container), "after a failed create, {propagation}");

        let mut container = node.container("half", sleeping).make();
        let mut second = container.mounts[0].clone();
        second.options = vec!["lowerdir=/no/such/layer:/no/such/layer".to_string()];
        container.mounts.push(second);
        container.create(&Io::default()).expect_err("a second mount that fails");
        assert!(!mounted_in(1, &container), "after a rootfs that could be mounted by half, {propagation}");
    }
}

#[test]
fn a_rootfs_is_unmounted_also_if_symlinks_lead_to_its_bundle() {
    needs!(OurShim);
    let _node = Node::exclusive();
    let bundle = Bundle::new("symlinked");
    let rootfs = format!("{}/rootfs", bundle.path());
    process::succeed("mount", &["-t", "tmpfs", "none", &rootfs]);
    let link = format!("/run/{}", unique("e2e-link"));
    std::os::unix::fs::symlink(bundle.path(), &link).expect("make a symlink to the bundle");
    let deleted = shim::delete_by(&bundle, &link, "symlinked");
    assert_eq!(deleted.code, Some(0), "{deleted:?}");
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").expect("read the mounts");
    assert!(!mounts.contains(&rootfs), "{rootfs} is still mounted");
    std::fs::remove_file(link).expect("remove the symlink");
}

/// A helper of mount(8) for a file system whose server is a process, as fuse-overlayfs is.
struct Helper {
    scratch: Scratch,
}

impl Helper {
    const PATH: &str = "/usr/sbin/mount.fuse3.e2e";

    fn install() -> Helper {
        let scratch = Scratch::new("fuse");
        let server = scratch.text("server");
        fs::write(&server, "#!/bin/sh\nwhile :; do sleep 1000; done\n").expect("write the server");
        let script = format!(
            "#!/bin/sh\nmount -t overlay -o \"$4\" overlay \"$2\" || exit 1\n\
             setsid sh -c '/bin/sh {server} </dev/null >/dev/null 2>&1 &'\n"
        );
        fs::write(Self::PATH, script).expect("write the helper");
        for path in [&server, Self::PATH] {
            process::succeed("chmod", &["0755", path]);
        }
        Helper { scratch }
    }

    fn servers(&self) -> usize {
        process::with_command_line(&format!("/bin/sh {}", self.scratch.text("server"))).len()
    }
}

impl Drop for Helper {
    fn drop(&mut self) {
        let _ = fs::remove_file(Self::PATH);
    }
}

#[test]
fn the_server_of_a_file_system_in_user_space_ends_with_its_container() {
    needs!(OurShim);
    let node = Node::exclusive();
    let helper = Helper::install();
    let make = |spec: Spec| {
        let mut container = node.container("fuse", spec).make();
        container.mounts.iter_mut().for_each(|mount| mount.r#type = "fuse3.e2e".to_string());
        container
    };
    let volume = Scratch::new("volume");
    let shared = Spec::sleeping().bind(volume.as_str(), "/volume", &["rshared"]);
    for (what, spec) in [("private", Spec::sleeping()), ("on the host", shared)] {
        let container = make(spec.clone());
        container.create(&Io::default()).expect(what);
        container.start().expect(what);
        assert_eq!(helper.servers(), 1, "{what}");
        assert_eq!(container.exec_sh("exit 4").exit_status(), 4);
        daemon::killed();
        assert_eq!(helper.servers(), 1, "{what}: the server of a container that runs");
        container.kill(SIGKILL).expect("kill");
        assert_eq!(container.exit_status(), 137);
        container.delete().expect("delete");
        wait::until_true("the server is gone", || helper.servers() == 0);

        let container = make(spec.clone());
        container.create(&Io::default()).expect(what);
        container.end();
        wait::until_true("the server of a container that never ran is gone", || helper.servers() == 0);
    }
    let failing = make(Spec::new(&["/no/such/program"]));
    failing.create(&Io::default()).expect_err("a program that does not exist");
    wait::until_true("the server of a failed create is gone", || helper.servers() == 0);
}
