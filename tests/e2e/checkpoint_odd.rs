//! Images that are no checkpoint, places that can't hold one, and checkpoints of other containers. The tests call the shim
//! directly, because containerd keeps the images of this shim to itself.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::thread;

use containerd_shim_protos::api::{
    DeleteRequest, KillRequest, StartRequest, StateRequest, Status, WaitRequest,
};
use containerd_shim_protos::types::mount::Mount;

use crate::common::checkpoint::{COUNTING, last, take};
use crate::common::container::Container;
use crate::common::leaks::{self, STATE_DIRECTORY, Traces};
use crate::common::node::{NAMESPACE, Node, unique};
use crate::common::shim::{Bundle, Refusal, Shim};
use crate::common::spec::Spec;
use crate::common::stdio::Scratch;
use crate::common::task::{Io, SIGTERM};
use crate::common::{process, systemd, wait};

/// Output to a file, for which nobody has to make FIFOs.
fn output(scratch: &Scratch, name: &str) -> Io {
    let uri = format!("file://{}", scratch.text(name));
    Io { stdout: uri.clone(), stderr: uri, ..Io::default() }
}

/// Waits until a counting container has counted further, and returns the number.
fn counts_on(scratch: &Scratch, name: &str) -> u32 {
    let before = scratch.read(name).lines().count();
    wait::until_true("it counts", || scratch.read(name).lines().count() > before + 4);
    let output = scratch.read(name);
    // The last line may be incomplete.
    last(output.rsplit_once('\n').expect("a line").0.as_bytes())
}

/// A task that exists in the shim only.
struct Copy<'s, 'n> {
    shim: &'s Shim<'n>,
    id: String,
    bundle: Bundle,
    scratch: Scratch,
    rootfs: Vec<Mount>,
}

impl<'s, 'n> Copy<'s, 'n> {
    /// A copy in the rootfs of `container`, which has no task of its own.
    fn new(shim: &'s Shim<'n>, container: &Container) -> Self {
        let mounts = container.mounts.iter().map(|mount| Mount {
            type_: mount.r#type.clone(),
            source: mount.source.clone(),
            target: mount.target.clone(),
            options: mount.options.clone(),
            ..Mount::default()
        });
        let rootfs = mounts.collect();
        Self { shim, id: unique("copy"), bundle: Bundle::new("copy"), scratch: Scratch::new("copy"), rootfs }
    }

    fn create(&self, images: &Path, spec: &Spec, rootfs: &[Mount]) -> Result<(), Refusal> {
        self.bundle.write_config(&spec.to_json());
        let io = output(&self.scratch, "out");
        let mut request = self.bundle.request(&self.id);
        request.checkpoint = images.to_str().expect("a path is text here").to_string();
        (request.stdout, request.stderr) = (io.stdout, io.stderr);
        request.rootfs = rootfs.to_vec();
        self.shim.create(request).map(drop)
    }

    fn start(&self) -> Result<u32, Refusal> {
        let request = StartRequest { id: self.id.clone(), ..Default::default() };
        self.shim
            .call(async |client, context| client.start(context, &request).await)
            .map(|started| started.pid)
    }

    fn state(&self) -> (Status, u32) {
        let request = StateRequest { id: self.id.clone(), ..Default::default() };
        let state =
            self.shim.call(async |client, context| client.state(context, &request).await).expect("state");
        (state.status.enum_value().expect("a status"), state.pid)
    }

    fn end(&self) -> u32 {
        let kill = KillRequest { id: self.id.clone(), signal: SIGTERM, ..Default::default() };
        self.shim.call(async |client, context| client.kill(context, &kill).await).expect("kill");
        let wait = WaitRequest { id: self.id.clone(), ..Default::default() };
        let waited = self.shim.call(async |client, context| client.wait(context, &wait).await).expect("wait");
        self.delete();
        waited.exit_status
    }

    fn delete(&self) {
        let request = DeleteRequest { id: self.id.clone(), ..Default::default() };
        self.shim.call(async |client, context| client.delete(context, &request).await).expect("delete");
    }

    fn unit(&self) -> String {
        format!("containerd-{NAMESPACE}-{}.service", self.id)
    }
}

/// The log of criu that an error names at its end. It has the first error of criu, as the message has.
fn assert_names_log(what: &str, reason: &str) {
    let log = reason.rsplit(' ').next().unwrap_or_default();
    assert!(log.starts_with('/') && log.ends_with(".log"), "{what}: {reason}");
    let text = fs::read_to_string(log).unwrap_or_else(|error| panic!("{what}: {log}: {error}: {reason}"));
    assert!(text.contains("Error"), "{what}: {text}");
}

fn cut(file: PathBuf) {
    let length = fs::metadata(&file).expect("the image is there").len();
    File::options().write(true).open(file).and_then(|file| file.set_len(length / 2)).expect("cut an image");
}

/// What criu dumped of the first process.
fn core_of_init(images: &Path) -> PathBuf {
    let names = fs::read_dir(images).expect("images").flatten().map(|entry| entry.path());
    let mut cores: Vec<_> = names
        .filter(|path| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("core-")))
        .collect();
    cores.sort();
    cores.remove(0)
}

/// What is odd, what it does to a copy of good images, and what the error says.
type OddImages = (&'static str, fn(&Path), &'static str);

const ODD_IMAGES: [OddImages; 7] = [
    ("an empty directory", empty, "no checkpoint"),
    (
        "another directory",
        |copy| {
            empty(copy);
            fs::copy("/etc/hosts", copy.join("inventory.img")).expect("copy a file");
            fs::write(copy.join("descriptors.json"), "[]").expect("write a file");
        },
        "criu",
    ),
    (
        "a file",
        |copy| {
            fs::remove_dir_all(copy).expect("remove the copy");
            fs::write(copy, "").expect("write a file");
        },
        "directory",
    ),
    ("nothing", |copy| fs::remove_dir_all(copy).expect("remove the copy"), "no such file"),
    ("half of a process", |copy| cut(core_of_init(copy)), "criu"),
    ("half of the memory", |copy| cut(copy.join("pages-1.img")), "pages-1.img is damaged"),
    ("half of our notes", |copy| cut(copy.join("containerd-shim-systemd-v1.json")), "the notes of the shim"),
];

fn empty(dir: &Path) {
    fs::remove_dir_all(dir).expect("remove the copy");
    fs::create_dir(dir).expect("make a directory");
}

#[test]
fn odd_images_are_refused_by_name_and_the_id_can_be_used_again() {
    needs!(OurShim, Criu);
    let node = Node::exclusive();
    // The daemon keeps connections until they close: both are older than what is counted.
    let (shim, other) = (Shim::connect(&node), Shim::connect(&node));
    let scratch = Scratch::new("odd");
    drop(node.container("warm", Spec::sleeping()).started(&Io::default()));
    let before = Traces::take();
    let spec = Spec::sh(COUNTING).bind(scratch.as_str(), "/held", &["rw"]);
    let original = node.container("original", spec.clone()).started(&output(&scratch, "original"));
    let count = counts_on(&scratch, "original");
    let good = scratch.join("good \t'\"$;%\\é{}images");
    take(&shim, &original, good.to_str().expect("text"), |_| {}).expect("checkpoint");
    let (first, second) =
        (node.container("first", Spec::sleeping()).make(), node.container("second", Spec::sleeping()).make());
    let copy = Copy::new(&shim, &first);

    let is_refused = |what: &str, images: &Path, spec: &Spec, rootfs: &[Mount], expected: &str| {
        let created = copy.create(images, spec, rootfs);
        let is_created = created.is_ok();
        let (code, reason) = created.map(|()| 0).and_then(|_| copy.start()).expect_err(what);
        println!("{what}: {code:?}: {reason}");
        assert!(reason.to_lowercase().contains(&expected.to_lowercase()), "{what}: {reason}");
        if expected == "criu" {
            assert_names_log(what, &reason);
        }
        assert!(!systemd::is_active(&copy.unit()), "{what}");
        if is_created {
            assert_eq!(copy.state(), (Status::CREATED, 0), "{what}");
            copy.delete();
        }
    };
    let odd = scratch.join("odd");
    let make_odd = |change: fn(&Path)| {
        let good = good.to_str().expect("text");
        process::succeed("rm", &["--recursive", "--force", &scratch.text("odd")]);
        process::succeed("cp", &["--archive", "--no-target-directory", good, &scratch.text("odd")]);
        change(&odd);
    };
    for (what, change, expected) in ODD_IMAGES {
        make_odd(change);
        is_refused(what, &odd, &spec, &copy.rootfs, expected);
    }
    // A Start can be repeated. The log of the first attempt is not that of the second one, in which criu does not run.
    make_odd(|copy| cut(copy.join("inventory.img")));
    copy.create(&odd, &spec, &copy.rootfs).expect("create");
    let (_, reason) = copy.start().expect_err("half of the inventory");
    assert_names_log("half of the inventory", &reason);
    make_odd(empty);
    let (_, reason) = copy.start().expect_err("nothing any more");
    assert!(reason.contains("no checkpoint") && !reason.contains("the log of criu"), "{reason}");
    copy.delete();
    is_refused(
        "a container with fewer mounts",
        &good,
        &spec.clone().without_mount("/held"),
        &copy.rootfs,
        "criu",
    );
    is_refused("a container with another rootfs", &good, &spec, &[], "criu");

    // The good images, twice at the same time, once with the id that all the others had.
    let twin = Copy::new(&other, &second);
    thread::scope(|scope| {
        for copy in [&copy, &twin] {
            let (good, spec) = (&good, &spec);
            scope.spawn(move || {
                copy.create(good, spec, &copy.rootfs).expect("create");
                let pid = copy.start().expect("restore");
                assert_eq!(copy.state(), (Status::RUNNING, pid));
                assert_eq!(systemd::main_pid(&copy.unit()), pid);
            });
        }
    });
    for copy in [&copy, &twin] {
        assert!(counts_on(&copy.scratch, "out") >= count, "it continues the count");
        assert_eq!(copy.end(), 7);
    }
    counts_on(&scratch, "original");
    drop((copy, twin, first, second, original));
    leaks::assert_none("odd images", &before);
}

/// A tmpfs, until it is dropped.
struct Tmpfs(String);

impl Tmpfs {
    fn mount(path: String, options: &str) -> Self {
        fs::create_dir_all(&path).expect("make a mountpoint");
        process::succeed("mount", &["-t", "tmpfs", "-o", options, "tmpfs", &path]);
        Self(path)
    }
}

impl Drop for Tmpfs {
    fn drop(&mut self) {
        process::run("umount", &["--lazy", &self.0]);
    }
}

#[test]
fn images_that_can_not_be_written_are_an_error_by_name_and_the_container_continues() {
    needs!(OurShim, Criu);
    let node = Node::exclusive();
    let shim = Shim::connect(&node);
    let scratch = Scratch::new("places");
    drop(node.container("warm", Spec::sleeping()).started(&Io::default()));
    let before = Traces::take();
    let container = node.container("places", Spec::sh(COUNTING)).started(&output(&scratch, "out"));
    counts_on(&scratch, "out");
    fs::write(scratch.join("file"), "").expect("write a file");
    let full = Tmpfs::mount(scratch.text("full"), "size=16k");
    let read_only = Tmpfs::mount(scratch.text("read-only"), "ro");
    let (good, work) = (scratch.text("good"), Some(scratch.text("work")));
    let places = [
        ("a file", scratch.text("file"), None, "Not a directory"),
        ("below a file", scratch.text("file/images"), None, "Not a directory"),
        ("below nothing", scratch.text("missing/images"), None, "No such file"),
        ("a read-only disk", scratch.text("read-only"), None, "Read-only file system"),
        ("below a read-only disk", scratch.text("read-only/images"), None, "Read-only file system"),
        ("a full disk", scratch.text("full"), work.clone(), "criu"),
        ("a file, with a work path that has an old log", scratch.text("file"), work, "Not a directory"),
        (
            "a read-only work path",
            good.clone(),
            Some(scratch.text("read-only/work")),
            "Read-only file system",
        ),
        ("a work path that is a file", good.clone(), Some(scratch.text("file")), "Not a directory"),
    ];
    for (what, images, work, expected) in places {
        let request = |options: &mut containerd_shim_protos::shim::oci::CheckpointOptions| {
            options.work_path = work.unwrap_or_default();
        };
        let (code, reason) = take(&shim, &container, &images, request).expect_err(what);
        println!("{what}: {code:?}: {reason}");
        assert!(reason.contains(expected), "{what}: {reason}");
        if expected == "criu" {
            assert_names_log(what, &reason);
        } else {
            assert!(!reason.contains("the log of criu"), "{what}: criu did not run: {reason}");
        }
        assert_eq!(container.phase(), containerd_client::types::v1::Status::Running, "{what}");
        counts_on(&scratch, "out");
        let work = format!("{STATE_DIRECTORY}/{NAMESPACE}/{}/criu-dump", container.id);
        assert!(!Path::new(&work).exists(), "{what}: criu's work directory is removed");
    }
    take(&shim, &container, &good, |_| {}).expect("a checkpoint in the place of those that failed");
    take(&shim, &container, &good, |_| {}).expect("and another one in its place");
    drop((full, read_only, container));
    leaks::assert_none("images that can't be written", &before);
}
