//! The spec of a pod's sandbox (pure). It is the spec that containerd's CRI plugin would write for a pause container, with
//! the shim's own first process.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde_json::{Map, Value, json};

use crate::config;

/// The path of the first process in the sandbox.
pub const INIT: &str = "/sandbox";

/// The owner of a namespace.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Namespace {
    /// The pod. CRI's mode `CONTAINER` (for pids: one namespace for each container) concerns the containers only.
    #[default]
    Pod,
    Node,
}

/// The seccomp profile of a sandbox.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Seccomp {
    /// The OCI runtime sets none. The first process sets a filter of its own, which allows less than any default profile.
    #[default]
    Own,
    /// The OCI runtime sets the profile in this file of the node, in addition to the filter of the first process.
    File(PathBuf),
}

/// A range of ids of a user namespace.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IdRange {
    /// The first id in the pod.
    pub container: u32,
    /// The first id on the node.
    pub host: u32,
    /// The number of ids.
    pub size: u32,
}

/// A user namespace of the pod.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct UserNamespace {
    /// Users.
    pub uids: Vec<IdRange>,
    /// Groups.
    pub gids: Vec<IdRange>,
}

/// The DNS configuration of a pod.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Dns {
    /// Addresses of name servers.
    pub servers: Vec<String>,
    /// Domains to search.
    pub searches: Vec<String>,
    /// Options, see resolv.conf(5).
    pub options: Vec<String>,
}

/// An SELinux context; empty parts are the usual ones of containers.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Context {
    pub user: String,
    pub role: String,
    /// The type.
    pub kind: String,
    pub level: String,
}

/// A pod as CRI configures it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Pod {
    pub name: String,
    /// Its namespace in Kubernetes.
    pub namespace: String,
    /// Its UID in Kubernetes.
    pub uid: String,
    /// Its host name, empty for none.
    pub hostname: String,
    /// The directory of its containers' logs.
    pub log_directory: String,
    /// Its DNS configuration, `None` for the node's.
    pub dns: Option<Dns>,
    /// The parent of its cgroups, empty if kubelet names none.
    pub cgroup_parent: String,
    /// Whether the network namespace is the pod's or the node's.
    pub network: Namespace,
    /// Whether the pid namespace is the pod's or the node's.
    pub pid: Namespace,
    /// Whether the IPC namespace is the pod's or the node's.
    pub ipc: Namespace,
    /// The pod's user namespace, `None` for the node's.
    pub user: Option<UserNamespace>,
    /// Kernel parameters of its namespaces.
    pub sysctls: BTreeMap<String, String>,
    /// The user and group of the first process.
    pub run_as: (u32, u32),
    /// More groups of the first process.
    pub groups: Vec<u32>,
    /// The SELinux context of the first process.
    pub selinux: Option<Context>,
    /// The AppArmor profile of the first process.
    pub apparmor: Option<String>,
    /// Its seccomp profile.
    pub seccomp: Seccomp,
    /// The sum of the resources of its containers, if the client sends it.
    pub resources: Option<Resources>,
}

/// The sum of the resources of a pod's containers. It is no limit: containers without a limit add nothing to it. The spec has
/// these numbers as annotations, as that of a pause container (containerd, `internal/cri/annotations`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Resources {
    /// The period of the processor quota, in µs.
    pub cpu_period: i64,
    /// The processor quota in each period, in µs.
    pub cpu_quota: i64,
    /// The shares of the processors.
    pub cpu_shares: i64,
    /// The memory, in bytes.
    pub memory: i64,
}

/// The facts about the node on which the spec depends.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Node {
    /// Whether SELinux is enabled.
    pub selinux: bool,
    /// Whether AppArmor is enabled.
    pub apparmor: bool,
    /// The daemon's score for the OOM killer. An unprivileged daemon can't set a lower score.
    pub oom_score_adj: i32,
    /// The content of the seccomp profile that the pod names.
    pub seccomp: Option<Value>,
    /// The file of the user namespace that owns the pod's network namespace, if both namespaces exist already.
    pub user_namespace: Option<PathBuf>,
}

/// The score that containerd gives a pause container, so that the OOM killer ends the containers first.
const OOM_SCORE_ADJ: i32 = -998;

/// The spec of the sandbox `id`. Its network namespace is the one at `network`, or a new one if `network` is empty. `pod` is
/// `None` if the client has sent no configuration of a pod.
pub fn spec(id: &str, pod: Option<&Pod>, network: &str, node: &Node) -> Value {
    let usual = Pod::default();
    let configured = pod.unwrap_or(&usual);
    let mut spec = json!({
        "ociVersion": "1.0.2",
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc", "options": ["nosuid", "noexec", "nodev"]},
            {"destination": "/dev", "type": "tmpfs", "source": "tmpfs",
                "options": ["nosuid", "noexec", "strictatime", "mode=755", "size=64k"]},
        ],
        "annotations": annotations(id, pod),
        "linux": {
            "namespaces": namespaces(configured, network, node),
            "sysctl": sysctls(configured, pod.is_some()),
            "resources": {"devices": [{"allow": false, "access": "rwm"}]},
        },
    });
    if let Some(path) = cgroups_path(&configured.cgroup_parent, id) {
        spec["linux"]["cgroupsPath"] = path.into();
    }
    if let Some(user) = &configured.user {
        spec["linux"]["uidMappings"] = mappings(&user.uids);
        spec["linux"]["gidMappings"] = mappings(&user.gids);
    }
    if let Some(profile) = &node.seccomp {
        spec["linux"]["seccomp"] = profile.clone();
    }
    // Without a UTS namespace of its own, the name would be the node's.
    if configured.network == Namespace::Pod && !configured.hostname.is_empty() {
        spec["hostname"] = configured.hostname.clone().into();
    }
    let spec = with_init(spec, node);
    labelled(spec, configured, node)
}

/// Replaces the process and the rootfs of a spec with the first process of the shim and its rootfs.
pub fn with_init(mut spec: Value, node: &Node) -> Value {
    if !spec.is_object() {
        spec = Value::Object(Map::new());
    }
    spec["root"] = json!({"path": config::SANDBOX_ROOT, "readonly": true});
    spec["process"] = json!({
        "args": [INIT],
        "cwd": "/",
        "user": {"uid": 0, "gid": 0},
        "capabilities": {},
        "oomScoreAdj": OOM_SCORE_ADJ.max(node.oom_score_adj),
    });
    spec
}

fn labelled(mut spec: Value, pod: &Pod, node: &Node) -> Value {
    let process = &mut spec["process"];
    process["user"] = json!({"uid": pod.run_as.0, "gid": pod.run_as.1, "additionalGids": pod.groups});
    if let Some(context) = pod.selinux.as_ref().filter(|_| node.selinux) {
        process["selinuxLabel"] = label(context).into();
    }
    if let Some(profile) = pod.apparmor.as_ref().filter(|_| node.apparmor) {
        process["apparmorProfile"] = profile.clone().into();
    }
    spec
}

fn label(context: &Context) -> String {
    let part = |given: &str, usual: &str| if given.is_empty() { usual.to_owned() } else { given.to_owned() };
    let Context { user, role, kind, level } = context;
    [part(user, "system_u"), part(role, "system_r"), part(kind, "container_t"), part(level, "s0")].join(":")
}

fn annotations(id: &str, pod: Option<&Pod>) -> Map<String, Value> {
    let Some(pod) = pod else {
        return Map::new();
    };
    let values = [
        ("container-type", "sandbox"),
        ("sandbox-id", id),
        ("sandbox-name", &pod.name),
        ("sandbox-namespace", &pod.namespace),
        ("sandbox-uid", &pod.uid),
        ("sandbox-log-directory", &pod.log_directory),
    ];
    let resources = pod.resources.map(|Resources { cpu_period, cpu_quota, cpu_shares, memory }| {
        let numbers = [
            ("sandbox-cpu-period", cpu_period),
            ("sandbox-cpu-quota", cpu_quota),
            ("sandbox-cpu-shares", cpu_shares),
            ("sandbox-memory", memory),
        ];
        numbers.map(|(name, number)| (name, number.to_string()))
    });
    let texts = values.map(|(name, value)| (name, value.to_owned())).into_iter();
    let all = texts.chain(resources.into_iter().flatten());
    all.map(|(name, value)| (format!("io.kubernetes.cri.{name}"), value.into())).collect()
}

fn namespaces(pod: &Pod, network: &str, node: &Node) -> Vec<Value> {
    let mut all = vec![json!({"type": "mount"})];
    if pod.network == Namespace::Pod {
        all.push(json!({"type": "uts"}));
        all.push(match network {
            "" => json!({"type": "network"}),
            path => json!({"type": "network", "path": path}),
        });
    }
    if pod.pid == Namespace::Pod {
        all.push(json!({"type": "pid"}));
    }
    if pod.ipc == Namespace::Pod {
        all.push(json!({"type": "ipc"}));
    }
    if pod.user.is_some() {
        all.push(match &node.user_namespace {
            None => json!({"type": "user"}),
            Some(path) => json!({"type": "user", "path": path}),
        });
    }
    all
}

/// The kernel parameters of the pod, with the two that containerd 2 sets by default for pods that have a network of their
/// own (`enable_unprivileged_ports`, `enable_unprivileged_icmp`): CRI does not pass them on.
fn sysctls(pod: &Pod, of_cri: bool) -> BTreeMap<String, String> {
    let mut all = pod.sysctls.clone();
    if of_cri && pod.network == Namespace::Pod {
        let mut usual = |name: &str, value: &str| {
            all.entry(name.to_owned()).or_insert_with(|| value.to_owned());
        };
        usual("net.ipv4.ip_unprivileged_port_start", "0");
        if pod.user.is_none() {
            usual("net.ipv4.ping_group_range", "0 2147483647");
        }
    }
    all
}

/// `linux.cgroupsPath`, in the form that CRI uses for the containers of the pod, so that all are in one slice.
fn cgroups_path(parent: &str, id: &str) -> Option<String> {
    let last = parent.trim_end_matches('/').rsplit('/').next().unwrap_or_default();
    match parent {
        "" => None,
        _ if last.ends_with(".slice") => Some(format!("{last}:cri-containerd:{id}")),
        _ => Some(format!("{}/{id}", parent.trim_end_matches('/'))),
    }
}

fn mappings(ranges: &[IdRange]) -> Value {
    let one =
        |range: &IdRange| json!({"containerID": range.container, "hostID": range.host, "size": range.size});
    ranges.iter().map(one).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pod() -> Pod {
        Pod {
            name: "dns".to_owned(),
            namespace: "kube".to_owned(),
            hostname: "dns-1".to_owned(),
            ..Pod::default()
        }
    }

    fn kinds(spec: &Value) -> Vec<String> {
        let all = spec["linux"]["namespaces"].as_array().unwrap();
        all.iter().map(|namespace| namespace["type"].as_str().unwrap().to_owned()).collect()
    }

    #[test]
    fn a_pod_has_namespaces_of_its_own_and_the_network_that_it_is_given() {
        let spec = spec("id", Some(&pod()), "/run/netns/x", &Node::default());
        assert_eq!(kinds(&spec), ["mount", "uts", "network", "pid", "ipc"]);
        assert_eq!(spec["linux"]["namespaces"][2]["path"], "/run/netns/x");
        assert_eq!(spec["hostname"], "dns-1");
        assert_eq!(spec["process"]["args"], json!(["/sandbox"]));
        assert_eq!(spec["annotations"]["io.kubernetes.cri.sandbox-name"], "dns");
        assert_eq!(spec["linux"]["sysctl"]["net.ipv4.ip_unprivileged_port_start"], "0");
        assert_eq!(spec["linux"]["cgroupsPath"], Value::Null);
    }

    #[test]
    fn the_resources_of_a_pod_are_annotations_and_no_limits() {
        let resources = Resources { cpu_period: 100_000, cpu_quota: 50_000, cpu_shares: 2, memory: 1 << 20 };
        let spec = |resources| spec("id", Some(&Pod { resources, ..pod() }), "", &Node::default());
        let (with, without) = (spec(Some(resources)), spec(None));
        let named = |name: &str| &with["annotations"][format!("io.kubernetes.cri.sandbox-{name}")];
        let found = ["cpu-period", "cpu-quota", "cpu-shares", "memory"].map(named);
        assert_eq!(found, [&json!("100000"), &json!("50000"), &json!("2"), &json!("1048576")]);
        assert_eq!(with["linux"], without["linux"]);
        assert_eq!(without["annotations"]["io.kubernetes.cri.sandbox-memory"], Value::Null);
    }

    #[test]
    fn a_pod_of_the_node_has_the_nodes_namespaces_and_name() {
        let node = Namespace::Node;
        let pod = Pod { network: node, pid: node, ipc: node, ..pod() };
        let spec = spec("id", Some(&pod), "", &Node::default());
        assert_eq!(kinds(&spec), ["mount"]);
        assert_eq!(spec["hostname"], Value::Null);
        assert_eq!(spec["linux"]["sysctl"], json!({}));
    }

    #[test]
    fn the_sandbox_of_another_client_is_no_pod() {
        let spec = spec("id", None, "", &Node::default());
        assert_eq!(kinds(&spec), ["mount", "uts", "network", "pid", "ipc"]);
        assert_eq!((&spec["annotations"], &spec["linux"]["sysctl"]), (&json!({}), &json!({})));
    }

    #[test]
    fn a_pod_and_its_containers_are_in_the_same_slice() {
        let path = |parent: &str| cgroups_path(parent, "id");
        assert_eq!(path(""), None);
        assert_eq!(
            path("/kubepods.slice/kubepods-podx.slice").as_deref(),
            Some("kubepods-podx.slice:cri-containerd:id")
        );
        assert_eq!(path("/kubepods/podx/").as_deref(), Some("/kubepods/podx/id"));
    }

    #[test]
    fn the_pods_own_parameters_win() {
        let mut pod = pod();
        pod.sysctls.insert("net.ipv4.ip_unprivileged_port_start".to_owned(), "80".to_owned());
        let spec = spec("id", Some(&pod), "", &Node::default());
        assert_eq!(spec["linux"]["sysctl"]["net.ipv4.ip_unprivileged_port_start"], "80");
    }

    #[test]
    fn security_labels_are_set_if_the_kernel_supports_them() {
        let context = Context { level: "s0:c1,c2".to_owned(), ..Context::default() };
        let pod = Pod { selinux: Some(context), apparmor: Some("strict".to_owned()), ..pod() };
        let process = |node: &Node| spec("id", Some(&pod), "", node)["process"].clone();
        let without = process(&Node::default());
        assert_eq!((&without["selinuxLabel"], &without["apparmorProfile"]), (&Value::Null, &Value::Null));
        let with = process(&Node { selinux: true, apparmor: true, ..Node::default() });
        assert_eq!(with["selinuxLabel"], "system_u:system_r:container_t:s0:c1,c2");
        assert_eq!(with["apparmorProfile"], "strict");
    }

    #[test]
    fn a_daemon_gives_no_lower_oom_score_than_its_own() {
        let score = |own| {
            let node = Node { oom_score_adj: own, ..Node::default() };
            spec("id", None, "", &node)["process"]["oomScoreAdj"].clone()
        };
        assert_eq!((score(-999), score(0)), (json!(-998), json!(0)));
    }

    #[test]
    fn the_spec_of_a_client_keeps_everything_but_its_process() {
        let given = json!({"hostname": "x", "process": {"args": ["sh"]}, "future": 1});
        let spec = with_init(given, &Node::default());
        assert_eq!((&spec["hostname"], &spec["future"]), (&json!("x"), &json!(1)));
        assert_eq!(spec["process"]["args"], json!([INIT]));
        assert_eq!(with_init(spec.clone(), &Node::default()), spec);
    }
}
