//! Builds a small OCI spec, with the variations that tests need. By default it sets no resources, so that it works
//! without cgroup v2 controllers.

use prost_types::Any;
use serde_json::{Value, json};

/// The capabilities that containerd gives a container by default.
const CAPABILITIES: [&str; 14] = [
    "CAP_AUDIT_WRITE",
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_FOWNER",
    "CAP_FSETID",
    "CAP_KILL",
    "CAP_MKNOD",
    "CAP_NET_BIND_SERVICE",
    "CAP_NET_RAW",
    "CAP_SETFCAP",
    "CAP_SETGID",
    "CAP_SETPCAP",
    "CAP_SETUID",
    "CAP_SYS_CHROOT",
];

#[derive(Clone)]
pub struct Spec(Value, Vec<(String, String)>);

impl Spec {
    pub fn new(args: &[&str]) -> Spec {
        let namespaces: Vec<Value> =
            ["pid", "network", "ipc", "uts", "mount"].iter().map(|kind| json!({"type": kind})).collect();
        let mut spec = Spec(
            json!({
                "ociVersion": "1.1.0",
                "process": {
                    "args": args,
                    "cwd": "/",
                    "env": ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"],
                    "user": {"uid": 0, "gid": 0},
                    "noNewPrivileges": true,
                },
                "root": {"path": "rootfs"},
                "hostname": "e2e",
                "mounts": [
                    mount("proc", "proc", "/proc", &["nosuid", "noexec", "nodev"]),
                    mount("tmpfs", "tmpfs", "/dev", &["nosuid", "strictatime", "mode=755", "size=65536k"]),
                    mount("devpts", "devpts", "/dev/pts", &["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620"]),
                    mount("tmpfs", "shm", "/dev/shm", &["nosuid", "noexec", "nodev", "mode=1777"]),
                    mount("sysfs", "sysfs", "/sys", &["nosuid", "noexec", "nodev", "ro"]),
                    mount("cgroup", "cgroup", "/sys/fs/cgroup", &["nosuid", "noexec", "nodev", "ro"]),
                ],
                "linux": {"namespaces": namespaces},
            }),
            Vec::new(),
        );
        spec.set_capabilities(&CAPABILITIES);
        spec
    }

    /// A shell script as the container's init.
    pub fn sh(script: &str) -> Spec {
        Spec::new(&["/bin/sh", "-c", script])
    }

    /// A process that runs until it is killed.
    pub fn sleeping() -> Spec {
        Spec::new(&["/bin/sleep", "100000"])
    }

    pub fn user(mut self, uid: u32, gid: u32) -> Spec {
        self.0["process"]["user"] = json!({"uid": uid, "gid": gid});
        self
    }

    /// Sets the supplementary groups of the user.
    pub fn additional_gids(mut self, gids: &[u32]) -> Spec {
        self.0["process"]["user"]["additionalGids"] = json!(gids);
        self
    }

    pub fn cwd(mut self, path: &str) -> Spec {
        self.0["process"]["cwd"] = json!(path);
        self
    }

    /// Sets the capabilities to exactly these.
    pub fn capabilities(mut self, names: &[&str]) -> Spec {
        self.set_capabilities(names);
        self
    }

    /// Lets a program get more privileges than its caller, as a set-user-id file does.
    pub fn with_new_privileges(mut self) -> Spec {
        self.0["process"]["noNewPrivileges"] = json!(false);
        self
    }

    pub fn terminal(mut self) -> Spec {
        self.0["process"]["terminal"] = json!(true);
        self
    }

    /// Sets the initial size of the terminal.
    pub fn console_size(mut self, width: u32, height: u32) -> Spec {
        self.0["process"]["consoleSize"] = json!({"width": width, "height": height});
        self
    }

    pub fn env(mut self, variable: &str) -> Spec {
        self.list("/process/env").push(json!(variable));
        self
    }

    /// A bind mount of a host's directory; `options` are added to `rbind`.
    pub fn bind(mut self, source: &str, destination: &str, options: &[&str]) -> Spec {
        let options = [&["rbind"], options].concat();
        self.list("/mounts").push(mount("bind", source, destination, &options));
        self
    }

    /// For a container in the UTS namespace of another process, whose name it must not change.
    pub fn without_hostname(mut self) -> Spec {
        self.0["hostname"] = Value::Null;
        self
    }

    /// Sets the AppArmor profile of the process.
    pub fn apparmor(mut self, profile: &str) -> Spec {
        self.0["process"]["apparmorProfile"] = json!(profile);
        self
    }

    /// Removes the mount at `destination`.
    pub fn without_mount(mut self, destination: &str) -> Spec {
        self.list("/mounts").retain(|mount| mount["destination"] != destination);
        self
    }

    pub fn rootfs_propagation(mut self, propagation: &str) -> Spec {
        self.0["linux"]["rootfsPropagation"] = json!(propagation);
        self
    }

    /// Adds CAP_SYS_ADMIN, with which the process may mount.
    pub fn with_sys_admin(mut self) -> Spec {
        self.set_capabilities(&[&CAPABILITIES[..], &["CAP_SYS_ADMIN"]].concat());
        self
    }

    pub fn in_host_namespace(mut self, kind: &str) -> Spec {
        self.list("/linux/namespaces").retain(|namespace| namespace["type"] != kind);
        self
    }

    /// Uses the namespace at `path`.
    pub fn in_namespace_of(self, kind: &str, path: &str) -> Spec {
        let mut spec = self.in_host_namespace(kind);
        spec.list("/linux/namespaces").push(json!({"type": kind, "path": path}));
        spec
    }

    /// Adds a user namespace whose ids begin at `first` on the host. The root user of that namespace can't mount sysfs of
    /// another network namespace, and can't mount a cgroup file system that is not mounted yet.
    pub fn user_namespace(mut self, first: u32, size: u32) -> Spec {
        self.list("/linux/namespaces").push(json!({"type": "user"}));
        let mapping = json!([{"containerID": 0, "hostID": first, "size": size}]);
        self.0["linux"]["uidMappings"] = mapping.clone();
        self.0["linux"]["gidMappings"] = mapping;
        self
    }

    pub fn cgroups_path(mut self, path: &str) -> Spec {
        self.0["linux"]["cgroupsPath"] = json!(path);
        self
    }

    pub fn annotation(mut self, key: &str, value: &str) -> Spec {
        self.0["annotations"][key] = json!(value);
        self
    }

    /// Adds a hook, a program of the host: `createRuntime`, `poststop`, …
    pub fn hook(mut self, moment: &str, path: &str) -> Spec {
        self.0["hooks"][moment] = json!([{"path": path}]);
        self
    }

    /// Sets `linux.resources`. Only for a guest with controllers.
    pub fn resources(mut self, resources: Value) -> Spec {
        self.0["linux"]["resources"] = resources;
        self
    }

    /// Sets a value at a JSON pointer. Objects on the way to it are created.
    pub fn with(mut self, pointer: &str, value: Value) -> Spec {
        let mut at = &mut self.0;
        for key in pointer.split('/').skip(1) {
            at = &mut at[key];
        }
        *at = value;
        self
    }

    /// Replaces a part of the JSON text, for JSON that no library writes.
    pub fn written(mut self, part: &str, by: &str) -> Spec {
        self.1.push((part.to_string(), by.to_string()));
        self
    }

    fn text(&self, value: &Value) -> Vec<u8> {
        let replace = |text: String, (part, by): &(String, String)| text.replace(part, by);
        self.1.iter().fold(value.to_string(), replace).into_bytes()
    }

    /// Sets the default path of containerd's clients, if the test has set no path.
    pub fn or_default_cgroups_path(self, namespace: &str, id: &str) -> Spec {
        if self.0["linux"]["cgroupsPath"].is_null() {
            self.cgroups_path(&format!("/{namespace}/{id}"))
        } else {
            self
        }
    }

    pub fn to_json(&self) -> Vec<u8> {
        self.text(&self.0)
    }

    pub fn to_any(&self) -> Any {
        Any {
            type_url: "types.containerd.io/opencontainers/runtime-spec/1/Spec".to_string(),
            value: self.to_json(),
        }
    }

    /// The process of the spec alone, for an exec.
    pub fn process_to_any(&self) -> Any {
        Any {
            type_url: "types.containerd.io/opencontainers/runtime-spec/1/Process".to_string(),
            value: self.text(&self.0["process"]),
        }
    }

    /// The same container with the process of [`Spec::sleeping`], for a test that runs this spec's process as an exec.
    pub fn sleeping_instead(&self) -> Spec {
        let mut spec = self.clone();
        spec.0["process"] = Spec::sleeping().0["process"].clone();
        spec
    }

    pub fn has_terminal(&self) -> bool {
        self.0["process"]["terminal"] == true
    }

    fn set_capabilities(&mut self, names: &[&str]) {
        self.0["process"]["capabilities"] =
            json!({"bounding": names, "effective": names, "permitted": names});
    }

    fn list(&mut self, pointer: &str) -> &mut Vec<Value> {
        self.0
            .pointer_mut(pointer)
            .and_then(Value::as_array_mut)
            .unwrap_or_else(|| panic!("no list at {pointer}"))
    }
}

fn mount(kind: &str, source: &str, destination: &str, options: &[&str]) -> Value {
    json!({"type": kind, "source": source, "destination": destination, "options": options})
}
