//! Runtime options: runc's own, CRI's generic ones, and unknown ones.

use std::fs;
use std::os::unix::fs::PermissionsExt;

use containerd_shim_protos::protobuf::Message as _;
use containerd_shim_protos::shim::oci::Options;
use prost::Message as _;
use prost_types::Any;

use crate::common::node::{Need, Node, unique};
use crate::common::shim::{Bundle, Shim};
use crate::common::spec::Spec;
use crate::common::stdio::Scratch;
use crate::common::task::{Io, SIGKILL};
use crate::common::{cgroup, systemd, wait};

/// `runtimeoptions.v1.Options`, which CRI sends to every runtime but runc's.
#[derive(Clone, PartialEq, prost::Message)]
pub struct GenericOptions {
    #[prost(string, tag = "1")]
    pub type_url: String,
    #[prost(string, tag = "2")]
    pub config_path: String,
    #[prost(string, tag = "3")]
    pub config_body: String,
}

impl GenericOptions {
    pub fn to_any(&self) -> Any {
        Any { type_url: "runtimeoptions.v1.Options".to_string(), value: self.encode_to_vec() }
    }
}

/// runc's options as an Any.
pub fn runc_options(change: impl FnOnce(&mut Options)) -> Any {
    let mut options = Options::new();
    change(&mut options);
    let value = options.write_to_bytes().expect("encode runc options");
    Any { type_url: "containerd.runc.v1.Options".to_string(), value }
}

/// An OCI runtime that records its command lines.
pub struct Noting {
    scratch: Scratch,
}

impl Noting {
    /// `before` is shell code that runs before the real runtime does.
    pub fn new(runtime: &str, before: &str) -> Noting {
        let scratch = Scratch::new("runtime");
        let path = scratch.join("runtime.sh");
        let script =
            format!("#!/bin/sh\necho \"$@\" >> {}\n{before}\nexec {runtime} \"$@\"\n", scratch.text("calls"));
        fs::write(&path, script).expect("write the runtime");
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).expect("make the runtime executable");
        Noting { scratch }
    }

    pub fn path(&self) -> String {
        self.scratch.text("runtime.sh")
    }

    /// How often its command of this name was called.
    pub fn calls_of(&self, command: &str) -> usize {
        let calls = self.scratch.read("calls");
        calls.lines().filter(|call| call.split(' ').any(|word| word == command)).count()
    }

    /// The command line of its `create`.
    fn create_call(&self) -> String {
        let calls = self.scratch.read("calls");
        let create = calls.lines().find(|call| call.split(' ').any(|word| word == "create"));
        create.unwrap_or_else(|| panic!("no create among the calls:\n{calls}")).to_string()
    }
}

/// Runs a container with these options to its end.
fn run(node: &Node, options: Any) {
    let container = node.container("options", Spec::sh("exit 14")).options(options).started(&Io::default());
    assert_eq!(container.exit_status(), 14);
    container.delete().expect("delete");
}

#[test]
fn crun_works_as_well_as_runc() {
    needs!(Crun);
    let node = Node::shared();
    run(&node, runc_options(|options| options.binary_name = "crun".to_string()));
    run(&node, runc_options(|options| options.binary_name = "/usr/bin/crun".to_string()));
}

/// crun moves the process to a cgroup below that of the container.
#[test]
fn a_container_that_manages_its_own_cgroup_keeps_its_limits_and_ends_whole() {
    needs!(Crun, OurShim);
    let node = Node::shared();
    let crun = runc_options(|options| options.binary_name = "crun".to_string());
    let spec = Spec::sh("sleep 1000 & wait").annotation("run.oci.delegate-cgroup", "payload");
    let container = node.container("delegated", spec).options(crun).started(&Io::default());
    let inner = cgroup::of(container.pid());
    assert!(inner.ends_with("payload"), "{}", inner.display());
    if Need::Controllers.missing().is_none() {
        for limit in [100, 200] {
            container.update(&serde_json::json!({"pids": {"limit": limit}})).expect("update");
            let of_unit = systemd::property(&systemd::unit_of(&container), "TasksMax");
            assert_eq!(of_unit, limit.to_string());
        }
    }
    container.kill_all(SIGKILL).expect("kill");
    assert_eq!(container.exit_status(), 137);
    container.delete().expect("delete");
    wait::until_true("its cgroup is removed", || !inner.exists());
}

#[test]
fn crun_fails_as_clearly_as_runc() {
    needs!(Crun);
    let node = Node::shared();
    let crun = runc_options(|options| options.binary_name = "crun".to_string());
    let container = node.container("crun", Spec::new(&["/no/such/command"])).options(crun).make();
    let refusal =
        container.create(&Io::default()).and_then(|_| container.start()).expect_err("no such command");
    let text = refusal.message().to_lowercase();
    assert!(text.contains("no such file or directory") || text.contains("executable file"), "{text}");
}

#[test]
fn runcs_options_reach_its_command_line() {
    let node = Node::shared();
    let noting = Noting::new("runc", "");
    let root = Scratch::new("root");
    let mine = root.as_str().to_string();
    run(
        &node,
        runc_options(|options| {
            options.binary_name = noting.path();
            options.root = mine.clone();
            options.no_new_keyring = true;
        }),
    );
    let call = noting.create_call();
    assert!(call.contains(&format!("--root {mine}/default ")), "{call}");
    assert!(call.contains("--no-new-keyring"), "{call}");
    assert!(!call.contains("--no-pivot") && !call.contains("--systemd-cgroup"), "{call}");
    assert_eq!(fs::read_dir(root.join("default")).into_iter().flatten().count(), 0, "no state is left");

    let noting = Noting::new("runc", "");
    run(
        &node,
        runc_options(|options| {
            options.binary_name = noting.path();
            options.no_pivot_root = true;
        }),
    );
    let call = noting.create_call();
    assert!(call.contains("--no-pivot") && !call.contains("--no-new-keyring"), "{call}");
}

#[test]
fn io_uid_and_io_gid_own_the_containers_stdio() {
    let node = Node::shared();
    let fifos = crate::common::stdio::Fifos::new("io-uid");
    let (mut stdout, _stderr) = (fifos.stdout(), fifos.stderr());
    // runc gives stdio to the container's user, whoever owns it, but does not change the group.
    let options = runc_options(|options| {
        options.io_uid = 1000;
        options.io_gid = 2000;
    });
    let spec = Spec::sh("exec stat -L -c %u:%g /proc/self/fd/1").user(1000, 1000);
    let container = node.container("io-uid", spec).options(options).started(&fifos.output());
    assert_eq!(stdout.text(), "1000:2000\n");
    assert_eq!(container.exit_status(), 0);
}

/// `containerd.linux.runc.CreateOptions`: what clients of containerd up to 1.7 send as task options to a runtime
/// whose name does not begin with io.containerd.runc.
#[derive(Clone, PartialEq, prost::Message)]
struct LinuxCreateOptions {
    #[prost(bool, tag = "1")]
    no_pivot_root: bool,
    #[prost(bool, tag = "8")]
    no_new_keyring: bool,
    #[prost(string, tag = "9")]
    shim_cgroup: String,
    #[prost(uint32, tag = "10")]
    io_uid: u32,
    #[prost(uint32, tag = "11")]
    io_gid: u32,
}

#[test]
fn task_options_of_older_clients_are_understood() {
    needs!(OurShim);
    let node = Node::shared();
    let cgroup = format!("/{}", unique("shim-cgroup"));
    let options = LinuxCreateOptions {
        no_pivot_root: true,
        no_new_keyring: true,
        shim_cgroup: cgroup.clone(),
        io_uid: 1000,
        io_gid: 1000,
    };
    let type_url = "containerd.linux.runc.CreateOptions".to_string();
    run(&node, Any { type_url, value: options.encode_to_vec() });
    // The OCI runtime was in the cgroup, and has left it.
    fs::remove_dir(format!("/sys/fs/cgroup{cgroup}")).expect("remove the cgroup");
}

#[test]
fn nothing_is_left_in_a_shim_cgroup() {
    needs!(OurShim);
    let node = Node::shared();
    let cgroup = format!("/{}", unique("shim-cgroup"));
    let options = runc_options(|options| options.shim_cgroup = cgroup.clone());
    let container = node.container("in-cgroup", Spec::sleeping()).options(options).started(&Io::default());
    let (deleted, kept) = (container.exec_sh("exit 3"), container.exec_sh("exit 4"));
    assert_eq!((deleted.exit_status(), kept.exit_status()), (3, 4));
    deleted.delete().expect("delete an exec");
    container.end();
    let cgroup = format!("/sys/fs/cgroup{cgroup}");
    wait::until_true("the client can remove its cgroup", || fs::remove_dir(&cgroup).is_ok());
}

#[test]
fn an_invalid_shim_cgroup_is_refused_with_an_error_that_names_it() {
    needs!(OurShim);
    let node = Node::shared();
    for path in ["relative", "/", "/a/../../b", "/a/\0b", "/sys/fs/cgroup/my.slice"] {
        let options = runc_options(|options| options.shim_cgroup = path.to_string());
        let container = node.container("no-cgroup", Spec::sleeping()).options(options).make();
        let refusal = container.create(&Io::default()).expect_err(path);
        assert!(refusal.message().contains("ShimCgroup"), "{path}: {refusal}");
    }
}

#[test]
fn root_of_a_user_namespace_can_open_its_output_again() {
    let node = Node::shared();
    let fifos = crate::common::stdio::Fifos::new("user-namespace");
    let (mut stdout, mut stderr) = (fifos.stdout(), fifos.stderr());
    let spec = Spec::sh("echo out >/dev/stdout && echo err >/dev/stderr").user_namespace(100_000, 65_536);
    // Under the stock shim the client has to name the owner.
    let options = runc_options(|options| {
        options.io_uid = 100_000;
        options.io_gid = 100_000;
    });
    for options in [Some(options), None] {
        if options.is_none() && Need::OurShim.missing().is_some() {
            continue;
        }
        let builder = node.container("user-namespace", spec.clone());
        let container = match options {
            Some(options) => builder.options(options),
            None => builder,
        }
        .started(&fifos.output());
        assert_eq!(container.exit_status(), 0);
    }
    let _ = (stdout.until(|seen| seen.ends_with(b"\n")), stderr.until(|seen| seen.ends_with(b"\n")));
}

#[test]
fn an_unknown_runtime_binary_is_named_in_the_error() {
    let node = Node::shared();
    let options = runc_options(|options| options.binary_name = "/no/such/runc".to_string());
    let container = node.container("no-runc", Spec::sleeping()).options(options).make();
    let refusal = container.create(&Io::default()).expect_err("no runc");
    assert!(refusal.message().contains("/no/such/runc"), "{refusal}");
}

#[test]
fn a_container_without_options_gets_the_defaults() {
    let node = Node::shared();
    run(&node, Any { type_url: "containerd.runc.v1.Options".to_string(), value: Vec::new() });
}

#[test]
fn cris_generic_options_are_understood() {
    needs!(OurShim);
    let node = Node::shared();
    let in_body = Noting::new("runc", "");
    let body = format!("BinaryName = \"{}\"\nNoNewKeyring = true\nSystemdCgroup = false\n", in_body.path());
    run(&node, GenericOptions { config_body: body, ..Default::default() }.to_any());
    assert!(in_body.create_call().contains("--no-new-keyring"));

    let in_file = Noting::new("runc", "");
    let scratch = Scratch::new("config");
    fs::write(scratch.join("options.toml"), format!("BinaryName = \"{}\"\n", in_file.path()))
        .expect("write options");
    run(&node, GenericOptions { config_path: scratch.text("options.toml"), ..Default::default() }.to_any());
    assert!(!in_file.create_call().contains("--no-new-keyring"));

    run(&node, GenericOptions::default().to_any());
}

#[test]
fn options_that_cant_be_read_are_named_in_the_error() {
    needs!(OurShim);
    let node = Node::shared();
    let shim = Shim::connect(&node);
    let bundle = Bundle::new("options");
    let generic = |options: GenericOptions| ("runtimeoptions.v1.Options", options.encode_to_vec());
    let cases = [
        ("example.com.v1.Strange", ("example.com.v1.Strange", vec![1, 2, 3])),
        ("containerd.runc.v1.Options", ("containerd.runc.v1.Options", vec![0xff; 8])),
        (
            "BinaryName",
            generic(GenericOptions { config_body: "BinaryName = 7".to_string(), ..Default::default() }),
        ),
        (
            "/no/such.toml",
            generic(GenericOptions { config_path: "/no/such.toml".to_string(), ..Default::default() }),
        ),
    ];
    for (named, (type_url, value)) in cases {
        let mut request = bundle.request("options");
        let mut any = containerd_shim_protos::protobuf::well_known_types::any::Any::new();
        any.type_url = type_url.to_string();
        any.value = value;
        request.options = Some(any).into();
        let (code, text) = shim.create(request).expect_err(named);
        assert_eq!(code, ttrpc::Code::INVALID_ARGUMENT, "{named}: {text}");
        assert!(text.contains(named), "{named} is not in: {text}");
    }
}
