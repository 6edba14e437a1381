//! Two containerds on one machine, such as the system's and that of Docker or k3s: one daemon serves both, and each gets the
//! events of its own tasks.

use std::fs;
use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::thread;

use containerd_client::types::v1::Status;
use containerd_shim_protos::api::{DeleteResponse, StartRequest};
use containerd_shim_protos::protobuf::Message;

use crate::common::image::IMAGE;
use crate::common::leaks;
use crate::common::node::{NAMESPACE, Need, Node, unique};
use crate::common::process::{self, Outcome};
use crate::common::shim::{self, Bundle, Shim};
use crate::common::spec::Spec;
use crate::common::stdio::Scratch;
use crate::common::systemd::{self, DAEMON_SERVICE};
use crate::common::task::Io;
use crate::common::{daemon, wait};
use crate::stuck::mount_of;

const STATE: &str = "/run/e2e-containerd";
const SOCKET: &str = "/run/e2e-containerd/containerd.sock";
/// On the file system of the first containerd, because some file systems do not support overlays.
const ROOT: &str = "/var/lib/containerd/e2e-second";

/// A second containerd. On drop, it is removed with everything that it has made.
struct Second {
    process: Child,
}

impl Second {
    fn start() -> Second {
        fs::create_dir_all(STATE).expect("make the second containerd's directory");
        let config = format!("{STATE}/config.toml");
        let text = format!(
            "version = 2\nroot = \"{ROOT}\"\nstate = \"{STATE}/state\"\n\
             disabled_plugins = [\"io.containerd.grpc.v1.cri\"]\n[grpc]\n  address = \"{SOCKET}\"\n"
        );
        fs::write(&config, text).expect("write the second containerd's configuration");
        let process = Command::new("containerd")
            .args(["--config", &config])
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("start a second containerd");
        let second = Second { process };
        wait::until_true("the second containerd answers", || second.ctr(&["version"]).code == Some(0));
        let imported = second.ctr(&["image", "import", "/usr/share/testbed/busybox.tar"]);
        assert_eq!(imported.code, Some(0), "{imported:?}");
        second
    }

    fn ctr(&self, args: &[&str]) -> Outcome {
        process::run("ctr", &[&["--address", SOCKET, "--namespace", NAMESPACE], args].concat())
    }
}

impl Drop for Second {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
        for dir in [STATE, ROOT] {
            let _ = fs::remove_dir_all(dir);
        }
    }
}

/// The lines of `ctr events`, until it is dropped.
struct Lines {
    process: Child,
    lines: mpsc::Receiver<String>,
}

impl Lines {
    fn of_second() -> Lines {
        let mut process = Command::new("ctr")
            .args(["--address", SOCKET, "events"])
            .stdout(Stdio::piped())
            .spawn()
            .expect("run ctr events");
        let stdout = process.stdout.take().expect("the output of ctr events");
        let (sender, lines) = mpsc::channel();
        thread::spawn(move || {
            for line in BufReader::new(stdout).lines().map_while(Result::ok) {
                if sender.send(line).is_err() {
                    return;
                }
            }
        });
        Lines { process, lines }
    }

    fn up_to(&self, topic: &str, id: &str) -> String {
        let mut seen = String::new();
        loop {
            let line = self.lines.recv_timeout(wait::LIMIT);
            let line = line.unwrap_or_else(|_| panic!("no {topic} event of {id}; seen:\n{seen}"));
            let found = line.contains(topic) && line.contains(id);
            seen = seen + &line + "\n";
            if found {
                return seen;
            }
        }
    }
}

impl Drop for Lines {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

#[test]
fn one_daemon_serves_two_containerds() {
    needs!(OurShim);
    let node = Node::exclusive();
    let first = node.container("first", Spec::sleeping()).started(&Io::default());
    let daemon = systemd::main_pid(DAEMON_SERVICE);
    let second = Second::start();
    let events = Lines::of_second();
    let shares = if Need::Controllers.missing().is_some() { &["--cpu-shares", "0"][..] } else { &[] };
    let id = unique("second");
    let head = ["run", "--rm", "--runtime", &node.runtime];
    let command = [IMAGE, &id, "sh", "-c", "echo of the second; exit 5"];
    let outcome = second.ctr(&[&head, shares, &command].concat());
    assert_eq!((outcome.code, outcome.text().as_str()), (Some(5), "of the second\n"), "{outcome:?}");
    let seen = events.up_to("/tasks/delete", &id);
    for topic in ["/tasks/create", "/tasks/start", "/tasks/exit"] {
        assert!(seen.contains(topic), "{topic} is not in:\n{seen}");
    }
    assert!(!seen.contains(&first.id), "an event of the other containerd's task:\n{seen}");
    assert_eq!(systemd::main_pid(DAEMON_SERVICE), daemon);
    assert!(process::runs(first.pid()), "the first one's container runs on");
}

#[test]
fn two_containerds_have_tasks_of_the_same_name() {
    needs!(OurShim);
    let node = Node::exclusive();
    let first = node.container("twin", Spec::sleeping()).started(&Io::default());
    let pid = first.pid();
    let second = Second::start();
    let shares = if Need::Controllers.missing().is_some() { &["--cpu-shares", "0"][..] } else { &[] };
    let run = |command: &[&str]| {
        let head = ["run", "--detach", "--null-io", "--runtime", &node.runtime];
        second.ctr(&[&head, shares, &[IMAGE, &first.id], command].concat())
    };
    let status = || second.ctr(&["task", "ls"]).text();
    let remove = |task: bool| {
        if task {
            let removed = second.ctr(&["task", "rm", &first.id]);
            assert_eq!(removed.code, Some(0), "{removed:?}");
        }
        second.ctr(&["container", "rm", &first.id]);
    };

    // A Create that fails in one containerd is rolled back in that containerd only.
    let failed = run(&["/there/is/no/such/program"]);
    assert_ne!(failed.code, Some(0), "{failed:?}");
    remove(false);
    assert_eq!((first.pid(), first.phase()), (pid, Status::Running));

    let started = run(&["sleep", "100000"]);
    assert_eq!(started.code, Some(0), "{started:?}");
    assert!(status().contains("RUNNING"), "{}", status());
    daemon::killed();
    assert!(status().contains("RUNNING"), "{}", status());
    let said = second.ctr(&["task", "exec", "--exec-id", "e", &first.id, "echo", "of the second"]);
    assert_eq!(said.text(), "of the second\n", "{said:?}");
    assert_eq!((first.pid(), first.phase()), (pid, Status::Running));
    assert_eq!(first.exec_sh("exit 4").exit_status(), 4);

    second.ctr(&["task", "kill", "--signal", "KILL", &first.id]);
    wait::until_true("the second one's task has ended", || status().contains("STOPPED"));
    assert_eq!((first.pid(), first.phase()), (pid, Status::Running));
    remove(true);
    assert_eq!((first.pid(), first.phase()), (pid, Status::Running));
    first.end();
}

/// Where containerd keeps the bundles of tasks, and of sandboxes that a shim makes.
const TASKS: &str = "io.containerd.runtime.v2.task";
const SANDBOXES: &str = "io.containerd.sandbox.controller.v1.shim";

/// Calls the shim over the socket that `start` names for this bundle.
fn called_for<'n>(node: &'n Node, bundle: &Bundle, id: &str) -> Shim<'n> {
    let outcome = shim::start(bundle, id, &[("MAX_SHIM_VERSION", "2")], &[]);
    let answer: serde_json::Value = serde_json::from_slice(&outcome.stdout).expect("an answer in JSON");
    let address = answer["address"].as_str().expect("an address");
    Shim::at(node, address.strip_prefix("unix://").expect("the path of a socket"))
}

/// The directories of the tasks with an id.
fn directories(id: &str) -> Vec<String> {
    let parent = leaks::task_directory(id).parent().expect("the directory of a namespace").to_owned();
    let all = match fs::read_dir(parent) {
        Ok(all) => all.flatten(),
        // The namespace has no task any more.
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Vec::new(),
        Err(error) => panic!("list the tasks: {error}"),
    };
    let names = all.map(|entry| entry.file_name().to_string_lossy().into_owned());
    names.filter(|name| name.split('+').next() == Some(id)).collect()
}

/// containerd 2.3 and later calls no `start` for a container of a pod, and keeps its bundle in another directory than that of the
/// sandbox.
#[test]
fn delete_ends_a_container_of_a_sandbox_and_no_namesake() {
    needs!(OurShim);
    let node = Node::exclusive();
    let (first, second) = (Scratch::new("first"), Scratch::new("second"));
    let (pod, id) = (unique("pod"), unique("twin"));
    let sandbox = Bundle::of(&first, SANDBOXES, &pod);
    let (bundle, other) = (Bundle::of(&first, TASKS, &id), Bundle::of(&second, TASKS, &id));
    let images = [(); 2].map(|()| node.container("image", Spec::sleeping()).make());
    let run = |shim: &Shim, bundle: &Bundle, image: usize| {
        let mut request = bundle.request(&id);
        request.rootfs = images[image].mounts.iter().map(mount_of).collect();
        let pid = shim.create(request).expect("create").pid;
        let start = StartRequest { id: id.clone(), ..Default::default() };
        shim.call(async |client, context| client.start(context, &start).await).expect("start");
        pid
    };
    let delete = |bundle: &Bundle| {
        let outcome = shim::delete(bundle, &id);
        assert_eq!(outcome.code, Some(0), "{}", outcome.stderr);
        DeleteResponse::parse_from_bytes(&outcome.stdout).expect("a DeleteResponse")
    };
    let pid = run(&called_for(&node, &sandbox, &pod), &bundle, 0);
    let twin = run(&called_for(&node, &other, &id), &other, 1);
    assert_eq!(directories(&id).len(), 2);
    let deleted = delete(&bundle);
    assert_eq!((deleted.pid, deleted.exit_status), (pid, 137));
    wait::until_true("its process is gone", || !process::exists(pid));
    // The second time, there is no task.
    assert_eq!(delete(&bundle).pid, 0);
    assert_eq!(directories(&id).len(), 1);
    assert!(process::runs(twin), "the task of the other containerd");
    assert_eq!(delete(&other).pid, twin);
    assert_eq!(directories(&id), Vec::<String>::new());
}

#[test]
fn a_task_does_not_touch_one_of_another_shim_with_its_name() {
    needs!(OurShim);
    let node = Node::exclusive();
    let second = Second::start();
    let shares = if Need::Controllers.missing().is_some() { &["--cpu-shares", "0"][..] } else { &[] };
    let head = ["run", "--detach", "--null-io", "--runtime", "io.containerd.runc.v2"];
    let id = unique("twin-of-runc");
    let started = second.ctr(&[&head, shares, &[IMAGE, &id, "sleep", "100000"]].concat());
    assert_eq!(started.code, Some(0), "{started:?}");
    let runs = || second.ctr(&["task", "exec", "--exec-id", "e", &id, "true"]).code == Some(0);

    let failing = node.container("twin", Spec::new(&["/there/is/no/such/program"])).id(&id).make();
    failing.create(&Io::default()).expect_err("there is no such program");
    drop(failing);
    assert!(runs(), "a Create that failed has ended the task of the other shim");

    let first = node.container("twin", Spec::sleeping()).id(&id).started(&Io::default());
    assert_eq!(first.exec_sh("exit 4").exit_status(), 4);
    daemon::killed();
    first.end();
    assert!(runs(), "the end of a task has ended the task of the other shim");

    second.ctr(&["task", "kill", "--signal", "KILL", &id]);
    wait::until_true("the second one's task has ended", || {
        second.ctr(&["task", "ls"]).text().contains("STOPPED")
    });
    second.ctr(&["task", "rm", &id]);
    second.ctr(&["container", "rm", &id]);
}
