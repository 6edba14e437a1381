//! containerd's CRI plugin as a kubelet uses it: pods with the bridge plugin of CNI, and containers in them.

use std::cell::RefCell;
use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use containerd_client::tonic;
use serde_json::{Value, json};
use tonic::codegen::http::uri::PathAndQuery;
use tonic::{Request, Response, Status};
use tonic_prost::ProstCodec;

use crate::channels::Channels;
use crate::common::leaks::{self, Traces};
use crate::common::node::{Need, Node, OUR_RUNTIME, STOCK_RUNTIME, unique};
use crate::common::stdio::Scratch;
use crate::common::{image, needs, process, systemd, wait};
use crate::cri_messages::*;
use crate::disturbed::{Disturbance, Warm};

const NAMESPACE: &str = "k8s.io";
/// The runtime under test, and runc.v2 with its pause container.
pub const HANDLER: &str = "tested";
pub const STOCK_HANDLER: &str = "stock";
const CONFIGURATION: &str = "/etc/containerd/config.toml";
const CNI_PLUGINS: &str = "/usr/lib/cni";
const CNI_DIRECTORY: &str = "/etc/cni/net.d";
const PAUSE_ARCHIVE: &str = "/usr/share/testbed/pause.tar";
const PAUSE_IMAGE: &str = "docker.io/testbed/pause:latest";

/// States of a container in CRI.
pub const RUNNING: i32 = 1;
pub const EXITED: i32 = 2;

/// A namespace of the node instead of the pod's, and one of the container alone.
pub const OF_CONTAINER: i32 = 1;
pub const OF_NODE: i32 = 2;

/// The first pod makes objects that stay, such as the bridge.
static WARM: Warm = Warm::new();

/// containerd with its CRI plugin. On drop, every pod is removed, and nothing may be left behind.
pub struct Cri {
    pub node: Node,
    disturbance: Disturbance,
    before: Traces,
    pods: RefCell<Vec<String>>,
}

impl Cri {
    pub fn new() -> Cri {
        let node = Node::exclusive();
        let mut cri =
            Cri { node, disturbance: Disturbance::None, before: Traces::take(), pods: RefCell::default() };
        if configure(&cri.node) {
            cri.load_images();
            WARM.forget();
        }
        WARM.up(|| {
            let pod = cri.pod("warm-up");
            cri.run(&pod, "warm-up", &["true"]);
            cri.remove(&pod);
        });
        cri.before = Traces::take();
        cri.disturbance = Disturbance::begin();
        cri
    }

    pub fn try_call<C: Call>(&self, request: C) -> Result<C::Response, Status> {
        let channel = self.node.channel();
        self.node.call(async move {
            let mut client = tonic::client::Grpc::new(channel);
            let ready = client.ready().await;
            ready.map_err(|error| Status::unavailable(format!("no connection to containerd: {error}")))?;
            let path = PathAndQuery::from_static(C::PATH);
            let answer: Result<Response<C::Response>, Status> =
                client.unary(Request::new(request), path, ProstCodec::default()).await;
            answer
        })
    }

    pub fn call<C: Call>(&self, request: C) -> C::Response {
        self.try_call(request).unwrap_or_else(|error| panic!("{}: {error:?}", C::PATH))
    }

    fn load_images(&self) {
        self.load_image("/usr/share/testbed/busybox.tar", image::IMAGE);
        if sandboxer().is_none() {
            self.load_pause_image();
        }
    }

    pub fn load_pause_image(&self) {
        self.load_image(PAUSE_ARCHIVE, PAUSE_IMAGE);
    }

    fn load_image(&self, archive: &str, name: &str) {
        process::succeed("ctr", &["--namespace", NAMESPACE, "image", "import", archive]);
        // The plugin learns of an image by an event.
        wait::until_true("CRI knows the image", || {
            let request = ImageStatusRequest { image: Some(ImageSpec { image: name.to_string() }) };
            self.call(request).image.is_some()
        });
    }

    /// A pod in a network of its own.
    pub fn pod(&self, name: &str) -> Pod {
        self.pod_with(name, |_| ())
    }

    /// A pod whose configuration the test changes.
    pub fn pod_with(&self, name: &str, change: impl FnOnce(&mut PodSandboxConfig)) -> Pod {
        self.pod_by(HANDLER, name, change)
    }

    /// As the function above, with another runtime.
    pub fn pod_by(&self, handler: &str, name: &str, change: impl FnOnce(&mut PodSandboxConfig)) -> Pod {
        self.try_pod(handler, name, change).unwrap_or_else(|error| panic!("pod {name}: {error:?}"))
    }

    /// As the function above, for a pod that may be refused.
    pub fn try_pod(
        &self,
        handler: &str,
        name: &str,
        change: impl FnOnce(&mut PodSandboxConfig),
    ) -> Result<Pod, Status> {
        let scratch = Scratch::new("pod-logs");
        let name = unique(name);
        let metadata = PodSandboxMetadata {
            name: name.clone(),
            uid: name.clone(),
            namespace: "tests".to_string(),
            attempt: 0,
        };
        let linux = LinuxPodSandboxConfig {
            security_context: Some(LinuxSandboxSecurityContext {
                // A kubelet gives every container a pid namespace of its own.
                namespace_options: Some(NamespaceOption { pid: OF_CONTAINER, ..Default::default() }),
                ..Default::default()
            }),
            ..Default::default()
        };
        let mut config = PodSandboxConfig {
            metadata: Some(metadata),
            hostname: name,
            log_directory: scratch.as_str().to_string(),
            linux: Some(linux),
            ..Default::default()
        };
        change(&mut config);
        let request =
            RunPodSandboxRequest { config: Some(config.clone()), runtime_handler: handler.to_string() };
        let id = self.try_call(request)?.pod_sandbox_id;
        self.pods.borrow_mut().push(id.clone());
        Ok(Pod { id, config, scratch })
    }

    /// Creates a container; the test may change its configuration.
    pub fn create(
        &self,
        pod: &Pod,
        name: &str,
        command: &[&str],
        change: impl FnOnce(&mut ContainerConfig),
    ) -> Container {
        self.try_create(pod, name, command, change)
            .unwrap_or_else(|error| panic!("container {name}: {error:?}"))
    }

    /// As the function above, for a container that may be refused.
    pub fn try_create(
        &self,
        pod: &Pod,
        name: &str,
        command: &[&str],
        change: impl FnOnce(&mut ContainerConfig),
    ) -> Result<Container, Status> {
        let log = format!("{name}.log");
        let sandbox = pod.config.linux.as_ref().and_then(|linux| linux.security_context.as_ref());
        let security = LinuxContainerSecurityContext {
            namespace_options: sandbox.and_then(|context| context.namespace_options.clone()),
            privileged: false,
        };
        let mut config = ContainerConfig {
            metadata: Some(ContainerMetadata { name: name.to_string(), attempt: 0 }),
            image: Some(ImageSpec { image: image::IMAGE.to_string() }),
            command: command.iter().map(|word| word.to_string()).collect(),
            log_path: log.clone(),
            linux: Some(LinuxContainerConfig { resources: None, security_context: Some(security) }),
            ..Default::default()
        };
        change(&mut config);
        let request = CreateContainerRequest {
            pod_sandbox_id: pod.id.clone(),
            config: Some(config),
            sandbox_config: Some(pod.config.clone()),
        };
        Ok(Container { id: self.try_call(request)?.container_id, log: pod.scratch.join(&log) })
    }

    pub fn start(&self, container: &Container) {
        self.call(StartContainerRequest { container_id: container.id.clone() });
    }

    pub fn run(&self, pod: &Pod, name: &str, command: &[&str]) -> Container {
        let container = self.create(pod, name, command, |_| ());
        self.start(&container);
        container
    }

    /// A container that sleeps, and ends at SIGTERM.
    pub fn sleeping(&self, pod: &Pod, name: &str) -> Container {
        let script = "trap 'exit 143' TERM; echo ready; while :; do sleep 1000 & wait; done";
        let container = self.run(pod, name, &["sh", "-c", script]);
        // The kernel drops a SIGTERM for an init process that has no handler yet.
        container.until_logged("ready");
        container
    }

    pub fn status(&self, container: &Container) -> ContainerStatus {
        let request = ContainerStatusRequest { container_id: container.id.clone(), verbose: false };
        self.call(request).status.expect("a status")
    }

    /// The pid of a container's init process.
    pub fn pid(&self, container: &Container) -> u32 {
        let request = ContainerStatusRequest { container_id: container.id.clone(), verbose: true };
        pid_in(&self.call(request).info)
    }

    /// The pid of a pod's first process.
    pub fn pause_pid(&self, pod: &Pod) -> u32 {
        let request = PodSandboxStatusRequest { pod_sandbox_id: pod.id.clone(), verbose: true };
        pid_in(&self.call(request).info)
    }

    pub fn is_ready(&self, pod: &Pod) -> bool {
        const READY: i32 = 0;
        let request = PodSandboxStatusRequest { pod_sandbox_id: pod.id.clone(), verbose: false };
        self.call(request).status.expect("a status").state == READY
    }

    pub fn address(&self, pod: &Pod) -> String {
        let request = PodSandboxStatusRequest { pod_sandbox_id: pod.id.clone(), verbose: false };
        let status = self.call(request).status.expect("a status");
        status.network.expect("a pod has a network").ip
    }

    /// Waits for the end of a container.
    pub fn ended(&self, container: &Container) -> ContainerStatus {
        wait::until("a container has ended", || {
            Some(self.status(container)).filter(|now| now.state == EXITED)
        })
    }

    pub fn exec_sync(&self, container: &Container, command: &[&str]) -> ExecSyncResponse {
        self.call(ExecSyncRequest {
            container_id: container.id.clone(),
            cmd: command.iter().map(|word| word.to_string()).collect(),
            timeout: 60,
        })
    }

    /// The output of a command in a container. The command has to succeed.
    pub fn ask(&self, container: &Container, command: &[&str]) -> String {
        let ran = self.exec_sync(container, command);
        let (stdout, stderr) = (String::from_utf8_lossy(&ran.stdout), String::from_utf8_lossy(&ran.stderr));
        assert_eq!(ran.exit_code, 0, "{command:?}: {stdout}{stderr}");
        stdout.trim_end().to_string()
    }

    pub fn exec(&self, container: &Container, command: &[&str], tty: bool) -> Channels {
        let request = ExecRequest {
            container_id: container.id.clone(),
            cmd: command.iter().map(|word| word.to_string()).collect(),
            tty,
            stdin: true,
            stdout: true,
            stderr: !tty,
        };
        Channels::open(&self.call(request).url)
    }

    pub fn attach(&self, container: &Container, tty: bool) -> Channels {
        let container_id = container.id.clone();
        let request = AttachRequest { container_id, stdin: true, tty, stdout: true, stderr: !tty };
        Channels::open(&self.call(request).url)
    }

    pub fn stop(&self, container: &Container, timeout: i64) {
        self.call(StopContainerRequest { container_id: container.id.clone(), timeout });
    }

    /// Removes a pod, as a kubelet does.
    pub fn remove(&self, pod: &Pod) {
        self.remove_by_id(&pod.id);
    }

    fn remove_by_id(&self, id: &str) {
        self.call(StopPodSandboxRequest { pod_sandbox_id: id.to_string() });
        self.call(RemovePodSandboxRequest { pod_sandbox_id: id.to_string() });
        self.pods.borrow_mut().retain(|pod| pod != id);
    }

    /// Whether the runtime under test is ours.
    pub fn is_ours(&self) -> bool {
        self.node.runtime == OUR_RUNTIME
    }
}

impl Drop for Cri {
    fn drop(&mut self) {
        self.disturbance.end();
        let pods = self.pods.take();
        if std::thread::panicking() {
            // A second panic would hide the first.
            for id in pods {
                let _ = self.try_call(StopPodSandboxRequest { pod_sandbox_id: id.clone() });
                let _ = self.try_call(RemovePodSandboxRequest { pod_sandbox_id: id });
            }
            return;
        }
        pods.iter().for_each(|id| self.remove_by_id(id));
        leaks::assert_none("pods", &self.before);
    }
}

pub struct Pod {
    pub id: String,
    config: PodSandboxConfig,
    scratch: Scratch,
}

pub struct Container {
    pub id: String,
    log: PathBuf,
}

impl Container {
    /// The lines of the container's log: stream and text.
    pub fn log(&self) -> Vec<String> {
        let text = fs::read_to_string(&self.log).unwrap_or_default();
        // A line has the time, the stream, a mark for whole or partial lines, and the text.
        text.lines()
            .map(|line| {
                let mut words = line.splitn(4, ' ').skip(1);
                let stream = words.next().unwrap_or_default();
                format!("{stream} {}", words.nth(1).unwrap_or_default())
            })
            .collect()
    }

    pub fn log_path(&self) -> &Path {
        &self.log
    }

    /// Waits until the log has a line that ends in this.
    pub fn until_logged(&self, text: &str) {
        wait::until_true(&format!("{text:?} is in the log"), || {
            self.log().iter().any(|line| line.ends_with(text))
        });
    }

    /// The unit of the container under our runtime.
    pub fn unit(&self) -> String {
        unit_of(&self.id)
    }
}

pub fn unit_of(id: &str) -> String {
    format!("containerd-k8s.io-{}.service", &id[..12])
}

fn pid_in(info: &std::collections::HashMap<String, String>) -> u32 {
    let text = info.get("info").map(String::as_str).unwrap_or_default();
    let info: Value = serde_json::from_str(text).unwrap_or_else(|error| panic!("{text:?}: {error}"));
    let pid = info["pid"].as_u64().unwrap_or_else(|| panic!("no pid in {info}"));
    u32::try_from(pid).expect("a pid is a small number")
}

/// The sandbox controller that containerd 2 uses for pods; `None` for the default one, which runs a pause container.
fn sandboxer() -> Option<String> {
    std::env::var("CLIENTS_SANDBOXER").ok()
}

/// Whether the shim makes the sandboxes of pods in this run. If not, notes that the calling test is skipped.
pub fn has_shim_sandboxes() -> bool {
    let has = sandboxer().as_deref() == Some("shim");
    if !has {
        needs::skip("cri_sandbox", "the sandboxes of this run are pause containers");
    }
    has
}

/// containerd 2.1 crashes (nil pointer) instead of making the bundle of a sandbox that the shim makes in the node's
/// network. Newer versions make a spec for this case.
pub fn may_crash_containerd() -> bool {
    let crashes = sandboxer().is_some();
    if crashes {
        needs::skip("cri_pods", "containerd 2.1 crashes in its own code");
    }
    crashes
}

/// Whether pods can have a user namespace: containerd 2 makes their networks in it, and its overlay snapshotter has layers with
/// mapped ids.
pub fn has_user_namespaces() -> bool {
    is_containerd_2("cri_pods", "this containerd makes no user namespaces for pods")
}

/// Whether containerd is version 2. If not, notes that the calling test is skipped.
pub fn is_containerd_2(test: &str, reason: &str) -> bool {
    let version = process::succeed("containerd", &["--version"]);
    let version = version.split_whitespace().nth(2).unwrap_or_default();
    let is_2 = version.trim_start_matches('v').starts_with("2.");
    if !is_2 {
        needs::skip(test, reason);
    }
    is_2
}

/// A CNI plugin that makes no network, for suites that have no CNI plugins. A pod gets an address, but nobody answers
/// there.
const NO_NETWORK: &str = r#"#!/bin/sh
cat >/dev/null
case $CNI_COMMAND in
ADD) printf '{"cniVersion":"0.4.0","interfaces":[{"name":"%s","sandbox":"%s"}],
    "ips":[{"version":"4","address":"10.98.0.5/24","interface":0}]}' "$CNI_IFNAME" "$CNI_NETNS" ;;
VERSION) echo '{"cniVersion":"0.4.0","supportedVersions":["0.3.1","0.4.0"]}' ;;
esac
"#;

/// Whether pods reach each other. They do not if [`NO_NETWORK`] is the plugin.
pub fn has_network() -> bool {
    let plugin = fs::read(format!("{CNI_PLUGINS}/bridge"));
    let has = plugin.is_ok_and(|bytes| bytes != NO_NETWORK.as_bytes());
    if !has {
        needs::skip("cri_pods", "there are no CNI plugins in this suite");
    }
    has
}

fn add_missing_plugins() {
    for name in ["bridge", "loopback"] {
        let path = format!("{CNI_PLUGINS}/{name}");
        if !Path::new(&path).exists() {
            fs::create_dir_all(CNI_PLUGINS).expect("make the directory of CNI's plugins");
            fs::write(&path, NO_NETWORK).expect("write a plugin");
            fs::set_permissions(&path, Permissions::from_mode(0o755)).expect("make a plugin executable");
        }
    }
}

/// Gives containerd a configuration with the runtime under test, unless it has that already. Returns whether it
/// restarted.
fn configure(node: &Node) -> bool {
    // The plugin gives every pod CPU shares, unless its configuration turns cgroups off, and a score for the OOM killer
    // that root in nspawn may not set.
    let without_cgroups = Need::Controllers.missing().is_some();
    let plugin = "plugins.\"io.containerd.grpc.v1.cri\"";
    let runtime = &node.runtime;
    let stock_options =
        |handler| format!("[{plugin}.containerd.runtimes.{handler}.options]\nSystemdCgroup = true\n");
    let options = if *runtime == OUR_RUNTIME { String::new() } else { stock_options(HANDLER) };
    let stock = format!(
        "[{plugin}.containerd.runtimes.{STOCK_HANDLER}]\nruntime_type = \"{STOCK_RUNTIME}\"\n{}",
        stock_options(STOCK_HANDLER)
    );
    let sandboxer = sandboxer().map_or(String::new(), |kind| format!("sandboxer = \"{kind}\"\n"));
    let text = format!(
        "version = 2\n\
         [{plugin}]\nsandbox_image = \"{PAUSE_IMAGE}\"\ndisable_cgroup = {without_cgroups}\n\
         restrict_oom_score_adj = {without_cgroups}\n\
         [{plugin}.containerd]\ndefault_runtime_name = \"{HANDLER}\"\n\
         [{plugin}.cni]\nbin_dir = \"{CNI_PLUGINS}\"\nconf_dir = \"{CNI_DIRECTORY}\"\n\
         [{plugin}.containerd.runtimes.{HANDLER}]\nruntime_type = \"{runtime}\"\n\
         pod_annotations = [\"*\"]\ncontainer_annotations = [\"*\"]\n{sandboxer}{options}{stock}"
    );
    if fs::read_to_string(CONFIGURATION).is_ok_and(|now| now == text)
        && systemd::is_active("containerd.service")
    {
        return false;
    }
    let network = json!({
        "cniVersion": "0.4.0",
        "name": "tests",
        "plugins": [{
            "type": "bridge",
            "bridge": "cni-tests",
            "isGateway": true,
            "ipam": { "type": "host-local", "subnet": "10.98.0.0/24" },
        }],
    });
    add_missing_plugins();
    fs::create_dir_all(CNI_DIRECTORY).expect("make CNI's directory");
    fs::write(format!("{CNI_DIRECTORY}/10-tests.conflist"), network.to_string())
        .expect("write CNI's network");
    fs::write(CONFIGURATION, text).expect("write containerd's configuration");
    node.restart_containerd();
    true
}
