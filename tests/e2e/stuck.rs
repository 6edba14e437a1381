//! Commands of the OCI runtime in uninterruptible sleep (state D), which no signal ends: they wait for a file system whose
//! server reads requests and never answers, as with a dead NFS server. A call fails after its limit, Delete works, other
//! containers are not affected, and everything that is stuck ends with the file system.

use std::fs::{self, File, OpenOptions};
use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use containerd_client::tonic::Code;
use containerd_shim_protos::api::{
    CreateTaskRequest, DeleteRequest, KillRequest, StartRequest, StateRequest, WaitRequest,
};
use containerd_shim_protos::protobuf::Message;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::stat::{Mode, SFlag, makedev, mknod};
use prost_types::Any;

use crate::bad_input;
use crate::common::container::Container;
use crate::common::leaks::{self, Traces};
use crate::common::node::{NAMESPACE, Node, unique};
use crate::common::spec::Spec;
use crate::common::stdio::Scratch;
use crate::common::task::{Io, SIGKILL};
use crate::common::{daemon, needs, process, shim, wait};
use crate::runtime_options::GenericOptions;

/// This is shorter than any limit of the daemon.
const SOON: Duration = Duration::from_secs(25);

/// A file system that answers its first request, but no other request.
struct DeadDisk {
    scratch: Scratch,
    /// This stays open, because the requests of a file system without a server fail.
    device: File,
}

impl DeadDisk {
    /// `None` if this kernel has no FUSE.
    fn mount() -> Option<DeadDisk> {
        const NODE: &str = "/dev/fuse";
        if !PathBuf::from(NODE).exists() {
            let mode = Mode::S_IRUSR | Mode::S_IWUSR;
            mknod(NODE, SFlag::S_IFCHR, mode, makedev(10, 229)).ok()?;
        }
        let mut device = OpenOptions::new().read(true).write(true).open(NODE).ok()?;
        let scratch = Scratch::new("dead-disk");
        fs::create_dir(scratch.join("mnt")).expect("make a mountpoint");
        let options = format!("fd={},rootmode=40000,user_id=0,group_id=0", device.as_raw_fd());
        let target = scratch.join("mnt");
        mount(Some("e2e"), &target, Some("fuse"), MsFlags::empty(), Some(options.as_str())).ok()?;
        let mut reader = device.try_clone().expect("a second descriptor");
        answer_init(&mut device);
        // The thread ends with the file system.
        thread::spawn(move || {
            let mut request = vec![0; 1 << 18];
            while reader.read(&mut request).is_ok_and(|length| length > 0) {}
        });
        Some(DeadDisk { scratch, device })
    }

    /// The command that waits for the file system.
    fn command(&self) -> String {
        format!("cat {}", self.scratch.text("mnt/file"))
    }

    /// The processes that wait for the file system, and that no signal ends.
    fn in_state_d(&self) -> Vec<u32> {
        let is_stuck = |pid: &u32| process::status(*pid, "State").is_some_and(|state| state.starts_with('D'));
        process::with_command_line(&self.command()).into_iter().filter(is_stuck).collect()
    }
}

/// Answers FUSE_INIT, which the kernel sends first (<linux/fuse.h>).
fn answer_init(device: &mut File) {
    let mut request = vec![0; 1 << 18];
    let length = device.read(&mut request).expect("read the first request");
    assert!(length >= 40 && request[4..8] == 26_u32.to_ne_bytes(), "the first request is FUSE_INIT");
    // Length, no error, the number of the request; then struct fuse_init_out, version 7.23 or later.
    let mut answer = Vec::new();
    answer.extend(80_u32.to_ne_bytes());
    answer.extend(0_u32.to_ne_bytes());
    answer.extend(&request[8..16]);
    answer.extend(7_u32.to_ne_bytes());
    answer.extend(31_u32.to_ne_bytes());
    answer.resize(80, 0);
    answer[36..40].copy_from_slice(&4096_u32.to_ne_bytes());
    device.write_all(&answer).expect("answer it");
}

impl Drop for DeadDisk {
    fn drop(&mut self) {
        // Ends the processes that wait for the file system.
        let _ = umount2(&self.scratch.join("mnt"), MntFlags::MNT_FORCE | MntFlags::MNT_DETACH);
        let _ = &self.device;
    }
}

/// An OCI runtime in which one command waits for a disk.
struct Stuck {
    scratch: Scratch,
}

impl Stuck {
    fn at(verb: &str, disk: &DeadDisk) -> Stuck {
        let scratch = Scratch::new("stuck");
        let script = format!(
            "#!/bin/sh\ncase \" $* \" in *' {verb} '*) exec {command};; esac\nexec runc \"$@\"\n",
            command = disk.command()
        );
        fs::write(scratch.join("runtime.sh"), script).expect("write the runtime");
        fs::set_permissions(scratch.join("runtime.sh"), fs::Permissions::from_mode(0o755))
            .expect("make it executable");
        Stuck { scratch }
    }

    fn options(&self) -> Any {
        let body = format!("BinaryName = {:?}\nRuntimeTimeoutSec = 2", self.scratch.text("runtime.sh"));
        GenericOptions { config_body: body, ..Default::default() }.to_any()
    }
}

/// Operations that do not need the disk work at once.
fn assert_untouched(node: &Node, other: &Container) {
    let begun = Instant::now();
    assert_eq!(other.exec_sh("exit 4").exit_status(), 4);
    node.container("new", Spec::sleeping()).started(&Io::default()).end();
    assert!(begun.elapsed() < SOON, "{:?}", begun.elapsed());
}

/// As [`assert_untouched`], for longer than systemd's watchdog waits.
fn assert_untouched_for_long(node: &Node, other: &Container) {
    let begun = Instant::now();
    while begun.elapsed() < Duration::from_secs(12) {
        assert_untouched(node, other);
        wait::elapse(Duration::from_millis(500));
    }
}

/// The life of a container in which one command is stuck.
fn live(node: &Node, verb: &str, runtime: &Stuck) {
    let container = node.container("stuck", Spec::sleeping()).options(runtime.options()).make();
    let created = container.create(&Io::default());
    if verb == "create" {
        let refusal = created.expect_err("a create that is stuck");
        assert!(refusal.message().contains("did not start in time"), "{refusal}");
        return;
    }
    created.expect("create");
    let started = container.start();
    if verb == "start" {
        assert_eq!(started.expect_err("a start that is stuck").code(), Code::DeadlineExceeded);
    } else {
        started.expect("start");
    }
    if verb == "exec" {
        let exec = container.exec(Spec::sleeping()).added(&Io::default());
        let refusal = exec.start().expect_err("an exec that is stuck");
        assert!(refusal.message().contains("OCI runtime exec failed"), "{refusal}");
        exec.delete().expect("delete of an exec that is stuck");
    }
    container.kill(SIGKILL).expect("kill");
    assert_eq!(container.exit_status(), 137, "{verb}");
    container.delete().expect("delete");
}

#[test]
fn commands_that_no_signal_ends_fail_their_calls_and_nothing_else() {
    needs!(OurShim);
    let node = Node::exclusive();
    let other = node.container("other", Spec::sleeping()).started(&Io::default());
    let other_pid = other.pid();
    other.exec_sh("exit 0").end();
    let daemon = wait::until("the daemon serves", daemon::serving);
    let before = Traces::take();
    let mut stuck = Vec::new();
    for verb in ["create", "start", "exec", "delete"] {
        let Some(disk) = DeadDisk::mount() else {
            return needs::skip(needs::name_of(|| ()), "no FUSE here");
        };
        stuck.push((verb, Stuck::at(verb, &disk), disk));
    }
    thread::scope(|scope| {
        for (verb, runtime, _) in &stuck {
            let node = &node;
            scope.spawn(move || live(node, verb, runtime));
        }
        for (verb, _, disk) in &stuck {
            wait::until_true(&format!("{verb} waits for the disk"), || !disk.in_state_d().is_empty());
        }
        assert_untouched(&node, &other);
    });
    // All calls have their answers, and SIGKILL has ended none of these processes.
    for (verb, _, disk) in &stuck {
        assert!(!disk.in_state_d().is_empty(), "{verb}: it is in state D");
    }
    assert_untouched(&node, &other);
    for (_, runtime, disk) in stuck {
        let commands = disk.command();
        drop(disk);
        wait::until_true("what was stuck is gone", || process::with_command_line(&commands).is_empty());
        drop(runtime);
    }
    assert_eq!((other.pid(), daemon::serving()), (other_pid, Some(daemon)));
    leaks::assert_none("commands that were stuck", &before);
}

const SHARED_SOCKET: &str = "/run/containerd-shim-systemd-v1.sock";

/// The bytes of a Create call, for a test that does not wait for the answer.
fn send_create(bundle: &str, id: &str) -> UnixStream {
    let create = CreateTaskRequest { id: id.to_string(), bundle: bundle.to_string(), ..Default::default() };
    let mut request =
        bad_input::rpc("v3", "Create", NAMESPACE, create.write_to_bytes().expect("encode a Create"));
    request.timeout_nano = 0;
    let body = request.write_to_bytes().expect("encode a request");
    // The socket of a containerd that identifies itself only by its bundles.
    let mut stream = UnixStream::connect(SHARED_SOCKET).expect("connect");
    stream.write_all(&bad_input::frame(1, 1, body.len() as u32, &body)).expect("send a Create");
    stream.set_read_timeout(Some(SOON)).expect("limit reads");
    stream
}

/// Whether a thread of the daemon waits for a disk.
fn is_stuck(daemon: u32) -> bool {
    let status = |thread: &Path| fs::read_to_string(thread.join("status")).unwrap_or_default();
    process::threads(daemon).filter(|thread| status(thread).contains("State:\tD")).count() > 0
}

#[test]
fn bundles_on_a_disk_that_does_not_answer_delay_only_their_own_creates() {
    needs!(OurShim);
    let node = Node::exclusive();
    let other = node.container("other", Spec::sleeping()).started(&Io::default());
    other.exec_sh("exit 0").end();
    let daemon = wait::until("the daemon serves", daemon::serving);
    let before = Traces::take();
    let Some(disk) = DeadDisk::mount() else {
        return needs::skip(needs::name_of(|| ()), "no FUSE here");
    };
    // These are more calls than the daemon has threads for requests, with bundles in containerd's directory and
    // elsewhere.
    let ids: Vec<_> = (0..6).map(|_| unique("dead")).collect();
    let calls: Vec<_> = ids
        .iter()
        .enumerate()
        .map(|(number, id)| {
            let parent = if number % 2 == 0 { format!("mnt/{NAMESPACE}") } else { "mnt".to_string() };
            send_create(&disk.scratch.text(&format!("{parent}/{id}")), id)
        })
        .collect();
    wait::until_true("the disk is waited for", || is_stuck(daemon));
    assert_untouched_for_long(&node, &other);
    let daemon_shim = shim::Shim::connect(&node);
    for id in &ids {
        let request = StateRequest { id: id.clone(), ..Default::default() };
        let state = daemon_shim.call(async |client, context| client.state(context, &request).await);
        assert_eq!(state.expect_err("a task that is not created").0, ttrpc::Code::NOT_FOUND);
    }
    drop(daemon_shim);
    assert_eq!(daemon::serving(), Some(daemon));
    drop(disk);
    for mut call in calls {
        let mut answer = [0; 4096];
        let length = call.read(&mut answer).expect("an answer");
        assert!(length > 10, "an error");
    }
    assert_untouched(&node, &other);
    leaks::assert_none("bundles on a dead disk", &before);
}

#[test]
fn a_task_whose_bundle_is_on_a_disk_that_no_longer_answers_can_be_killed_and_deleted() {
    needs!(OurShim);
    let node = Node::exclusive();
    let other = node.container("other", Spec::sleeping()).started(&Io::default());
    let image = node.container("image", Spec::sleeping()).make();
    let (shim, bundle, id) = (shim::Shim::connect(&node), shim::Bundle::new("bundle"), unique("lost"));
    let mut request = bundle.request(&id);
    request.rootfs = image.mounts.iter().map(mount_of).collect();
    shim.create(request).expect("create");
    let start = StartRequest { id: id.clone(), ..Default::default() };
    shim.call(async |client, context| client.start(context, &start).await).expect("start");
    let Some(disk) = DeadDisk::mount() else {
        return needs::skip(needs::name_of(|| ()), "no FUSE here");
    };
    // The path of the bundle leads to the dead disk from now on.
    let covered = bundle.path().to_string();
    mount(Some(&disk.scratch.join("mnt")), covered.as_str(), None::<&str>, MsFlags::MS_BIND, None::<&str>)
        .expect("cover the bundle");
    let begun = Instant::now();
    for _ in 0..2 {
        let state = StateRequest { id: id.clone(), ..Default::default() };
        let state = shim.call(async |client, context| client.state(context, &state).await).expect("state");
        assert!(process::runs(state.pid));
        assert_untouched(&node, &other);
        daemon::kill_now();
        wait::within(Duration::from_secs(60), daemon::serving).expect("the next daemon serves");
    }
    let kill = KillRequest { id: id.clone(), signal: SIGKILL, ..Default::default() };
    shim.call(async |client, context| client.kill(context, &kill).await).expect("kill");
    let wait = WaitRequest { id: id.clone(), ..Default::default() };
    let exit = shim.call(async |client, context| client.wait(context, &wait).await).expect("wait");
    assert_eq!(exit.exit_status, 137);
    let delete = DeleteRequest { id: id.clone(), ..Default::default() };
    shim.call(async |client, context| client.delete(context, &delete).await).expect("delete");
    println!("after {:?}", begun.elapsed());
    let _ = umount2(covered.as_str(), MntFlags::MNT_DETACH);
    drop(disk);
    assert_untouched(&node, &other);
}

/// More than the daemon has threads for blocking work.
const MANY: usize = 70;

#[test]
fn a_runtime_on_a_disk_that_no_longer_answers_holds_up_only_its_own_containers() {
    needs!(OurShim);
    let node = Node::exclusive();
    let other = node.container("other", Spec::sleeping()).started(&Io::default());
    other.exec_sh("exit 0").end();
    let daemon = wait::until("the daemon serves", daemon::serving);
    let runtimes = Scratch::new("runtimes");
    // The daemon makes a copy of each runtime of this name.
    fs::copy("/usr/sbin/runc", runtimes.join("runc")).expect("copy the runtime");
    let body = format!("BinaryName = {:?}\nRuntimeTimeoutSec = 2", runtimes.text("runc"));
    let container = |name: &str| {
        let options = GenericOptions { config_body: body.clone(), ..Default::default() }.to_any();
        node.container(name, Spec::sleeping()).options(options).created(&Io::default())
    };
    // The daemon keeps the copy for a while.
    container("first").end();
    let before = Traces::take();
    // More than the daemon has threads for requests.
    let created: Vec<_> = (0..4).map(|_| container("created")).collect();
    let running = container("running");
    running.start().expect("start");
    let execs: Vec<_> = (0..MANY).map(|_| running.exec(Spec::sleeping()).added(&Io::default())).collect();
    let Some(disk) = DeadDisk::mount() else {
        return needs::skip(needs::name_of(|| ()), "no FUSE here");
    };
    let covered = runtimes.as_str().to_string();
    mount(Some(&disk.scratch.join("mnt")), covered.as_str(), None::<&str>, MsFlags::MS_BIND, None::<&str>)
        .expect("cover the runtime");
    thread::scope(|scope| {
        let starting: Vec<_> = execs.iter().map(|exec| scope.spawn(|| exec.start())).collect();
        let starts: Vec<_> = created.iter().map(|container| scope.spawn(|| container.start())).collect();
        wait::until_true("the disk is waited for", || is_stuck(daemon));
        assert_untouched(&node, &other);
        for start in starts {
            let refusal = start.join().expect("start does not panic").expect_err("a start that is stuck");
            assert_eq!(refusal.code(), Code::DeadlineExceeded, "{refusal}");
        }
        for container in &created {
            container.kill(SIGKILL).expect("kill");
            assert_eq!(container.exit_status(), 137);
            container.delete().expect("delete without the runtime");
        }
        assert_untouched(&node, &other);
        assert_eq!(daemon::serving(), Some(daemon));
        let _ = umount2(covered.as_str(), MntFlags::MNT_DETACH);
        drop(disk);
        for start in starting {
            // Its disk is gone, or the runtime below it was found.
            let _ = start.join().expect("start does not panic");
        }
    });
    assert_untouched(&node, &other);
    assert_eq!((daemon::serving(), running.exec_sh("exit 6").exit_status()), (Some(daemon), 6));
    running.end();
    drop((execs, created, running, runtimes));
    leaks::assert_none("a runtime on a dead disk", &before);
}

#[test]
fn a_runtime_root_on_a_disk_that_no_longer_answers_holds_up_only_its_own_containers() {
    needs!(OurShim);
    let node = Node::exclusive();
    let other = node.container("other", Spec::sleeping()).started(&Io::default());
    other.exec_sh("exit 0").end();
    let daemon = wait::until("the daemon serves", daemon::serving);
    let before = Traces::take();
    let roots = Scratch::new("roots");
    let body = format!("Root = {:?}\nRuntimeTimeoutSec = 2", roots.as_str());
    // More than the daemon has threads for requests.
    let ended: Vec<_> = (0..3)
        .map(|_| {
            let options = GenericOptions { config_body: body.clone(), ..Default::default() }.to_any();
            let container =
                node.container("ended", Spec::sleeping()).options(options).started(&Io::default());
            container.kill(SIGKILL).expect("kill");
            assert_eq!(container.exit_status(), 137);
            container
        })
        .collect();
    let Some(disk) = DeadDisk::mount() else {
        return needs::skip(needs::name_of(|| ()), "no FUSE here");
    };
    let covered = roots.as_str().to_string();
    mount(Some(&disk.scratch.join("mnt")), covered.as_str(), None::<&str>, MsFlags::MS_BIND, None::<&str>)
        .expect("cover the state of the runtime");
    thread::scope(|scope| {
        let deletes: Vec<_> = ended.iter().map(|container| scope.spawn(|| container.delete())).collect();
        wait::until_true("the disk is waited for", || is_stuck(daemon));
        assert_untouched_for_long(&node, &other);
        for delete in deletes {
            let refusal = delete.join().expect("delete does not panic").expect_err("a delete that is stuck");
            assert!(refusal.message().contains("do not answer"), "{refusal}");
        }
    });
    assert_eq!(daemon::serving(), Some(daemon));
    let _ = umount2(covered.as_str(), MntFlags::MNT_DETACH);
    drop(disk);
    wait::until_true("nothing waits for the disk", || !is_stuck(daemon));
    for container in &ended {
        container.delete().expect("delete once the disk answers");
    }
    assert_untouched(&node, &other);
    drop((ended, roots));
    leaks::assert_none("the state of a runtime on a dead disk", &before);
}

/// A mount of containerd's API in that of a shim.
/// The same mount for a request over ttrpc.
pub fn mount_of(from: &containerd_client::types::Mount) -> containerd_shim_protos::types::mount::Mount {
    let mut mount = containerd_shim_protos::types::mount::Mount::new();
    mount.type_ = from.r#type.clone();
    mount.source = from.source.clone();
    mount.target = from.target.clone();
    mount.options = from.options.clone();
    mount
}
