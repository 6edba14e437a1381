//! Makes the record of a new task from a Create call and its bundle. Changes nothing.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::Path;

use crate::cgroup::{self, cgroups_path};
use crate::files;
use crate::id::{TaskKey, UnitName};
use crate::oci::bundle::Spec;
use crate::oci::criu;
use crate::oci::resources::Resources;
use crate::oci::{containerd, metadata, runtime};
use crate::path_error::io_error;
use crate::services::Error;
use crate::stdio::{fifo, uri};
use crate::task::outbox::Outbox;
use crate::task::phase::Phase;
use crate::task::process::Process;
use crate::task::request::Containerd;
use crate::task::wiring::Wiring;
use crate::task::{Placement, Task, TaskMetadata};
use crate::unit::{name, search_path};

use super::Shim;
use super::additions;
use super::create::CreateTask;

/// The address of containerd for events, if neither the bundle nor the environment names one.
const DEFAULT_TTRPC: &str = "/run/containerd/containerd.sock.ttrpc";
const DEFAULT_GRPC: &str = "/run/containerd/containerd.sock";

impl Shim {
    /// Checks the request and the bundle, without side effects. Also returns the environment of the OCI runtime, in the
    /// format of /proc/PID/environ.
    pub(super) fn prepare(&self, call: CreateTask) -> Result<(Task, Vec<u8>), Error> {
        let CreateTask { key, request, stdio, options, .. } = call;
        check_bundle_path(&request.bundle)?;
        if let Some(images) = &request.checkpoint {
            criu::client_path("image path", images)?;
        }
        // Before the spec: whoever has a large one must not wait for a turn (`oci::turns`).
        let (options, recorded) = (options.read()?, containerd::read_containerd(&request.bundle)?);
        let spec = Spec::read(&request.bundle)?;
        let resources = spec.resources()?;
        check_resources(&resources)?;
        let (containerd, environment) = self.containerd_of(&key, recorded, &spec)?;
        let mut runtime = options.resolve(&key.namespace, &containerd.path)?;
        if runtime.io_owner == (0, 0) {
            // Otherwise the container's root could not open its own /dev/stdout: the owner of the inode would have no id in the
            // container.
            runtime.io_owner = spec.mapped_root().unwrap_or_default();
        }
        runtime.environment = self.store.environment(&key);
        let wiring = uri::wiring(&stdio, runtime.log, uri::Role::Init, fifo::kind)?;
        let wiring = Wiring { store_number: self.fds.next_number(), ..wiring };
        let wiring = if request.checkpoint.is_some() { wiring.for_restore() } else { wiring };
        let TaskMetadata { description, fields } = metadata::of(&key, &spec);
        let init = Process {
            unit: name::candidates(&key)
                .find(|unit| !search_path::has_file(unit))
                .ok_or(Error::NoUnitName { key: key.clone() })?,
            logger: None,
            stdio,
            wiring,
            description,
            phase: Phase::Creating { exit: None },
        };
        let task = Task {
            placement: placement(&key, &spec, request.checkpoint.is_some())?,
            fields,
            // Mounts by a hook or by a wrapper of the runtime must be visible on the host, or in the mount namespace of
            // containerd if it has one. There, containerd unmounts the rootfs when it removes the bundle.
            rootfs_on_host: !request.rootfs.is_empty()
                && (request.checkpoint.is_some()
                    || spec.shares_mounts_with_host()
                    || spec.has_hooks()
                    || !runtime::is_plain(&runtime.binary)),
            init,
            properties: additions::properties(
                &key.to_string(),
                &spec,
                options.properties,
                &options.annotation_properties,
            )?,
            notify: additions::notifies(&key.to_string(), &spec, options.notify)?,
            devices: additions::allowed_devices(&spec, &resources.devices, &runtime),
            execs: BTreeMap::new(),
            outbox: Outbox::default(),
            given_up: false,
            is_leftover: false,
            key,
            request,
            runtime,
            containerd,
        };
        Ok((task, environment))
    }

    /// The containerd that calls, and its environment: `start` wrote both into the bundle (`recorded`). containerd 2.x does
    /// not call `start` for the later containers of a pod; they belong to the containerd of their sandbox.
    fn containerd_of(
        &self,
        key: &TaskKey,
        recorded: Option<Containerd>,
        spec: &Spec,
    ) -> Result<(Containerd, Vec<u8>), Error> {
        let sandbox = spec.sandbox().and_then(|id| {
            self.tasks.registry.get(&self.tasks.own(&TaskKey { id, ..key.clone() }, &key.owner))
        });
        if let Some(mut found) = recorded {
            let environment = std::mem::take(&mut found.environment).join("\0").into_bytes();
            // A pod keeps it, also if the configuration of containerd has changed meanwhile.
            found.core_scheduling |= sandbox.is_some_and(|entry| entry.task().containerd.core_scheduling);
            return Ok((found, environment));
        }
        Ok(match sandbox.map(|entry| entry.task().clone()) {
            Some(sandbox) => (sandbox.containerd, environment_in(&sandbox.runtime.environment)?),
            None => {
                let containerd = Containerd {
                    ttrpc_address: DEFAULT_TTRPC.to_owned(),
                    grpc_address: DEFAULT_GRPC.to_owned(),
                    ..Containerd::default()
                };
                (containerd, Vec::new())
            }
        })
    }
}

/// The environment that the file of a sandbox has. The file is missing if an earlier version made the sandbox.
fn environment_in(path: &Path) -> Result<Vec<u8>, runtime::Error> {
    match fs::read(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        read => read
            .map_err(io_error("read", path))
            .map_err(|source| runtime::Error::Environment { verb: "create", source }),
    }
}

pub(super) fn check_bundle_path(bundle: &Path) -> Result<(), Error> {
    if files::is_plain(bundle) { Ok(()) } else { Err(Error::BundlePath(bundle.to_owned())) }
}

/// Checks that this machine can apply the limits.
pub(crate) fn check_resources(resources: &Resources) -> Result<(), Error> {
    resources.check()?;
    if resources.needs().next().is_some() {
        resources.check_controllers(&cgroup::controllers()?)?;
    }
    Ok(())
}

/// The slice of the unit and the cgroup of the container, as the client requests them.
fn placement(key: &TaskKey, spec: &Spec, restores: bool) -> Result<Placement, Error> {
    let ours = || -> Result<UnitName, Error> {
        Ok(match (key.namespace.as_str(), spec.sandbox()) {
            ("k8s.io", Some(sandbox)) => name::pod_slice(&key.namespace, &sandbox)?,
            _ => name::namespace_slice(&key.namespace)?,
        })
    };
    let requested = cgroups_path::parse(spec.cgroups_path(), &key.namespace, &key.id)?;
    // A client restores a container with the spec of the original, whose default path has another id.
    let requested = if restores && requested.is_default_of_another(&key.namespace) {
        cgroups_path::Requested::Default
    } else {
        requested
    };
    Ok(match requested {
        cgroups_path::Requested::Default => {
            Placement::Unit { slice: ours()?, child: cgroups_path::escape(key.id.as_str()) }
        }
        cgroups_path::Requested::Slice { slice, child } => {
            Placement::Unit { slice: UnitName::new(slice)?, child }
        }
        cgroups_path::Requested::Literal(path) => {
            if let Some(placement) = own_placement(key, &path)? {
                return Ok(placement);
            }
            // The OCI runtime would put the container beside these processes, and the end of the container would kill
            // them all: in /init.scope systemd itself, in /system.slice every service.
            if cgroup::is_in_use(&path)? {
                return Err(Error::CgroupInUse { path });
            }
            tracing::warn!(
                task = %key,
                "task {key}: its client insists on cgroup {}, outside of the unit: \
                 systemctl shows neither its processes nor its memory",
                path.display()
            );
            Placement::Foreign { slice: name::namespace_slice(&key.namespace)?, path }
        }
    })
}

/// The placement in a bundle that an earlier attempt of the same Create has already rewritten.
fn own_placement(key: &TaskKey, path: &Path) -> Result<Option<Placement>, Error> {
    let parts: Vec<_> = path.iter().filter_map(|part| part.to_str()).collect();
    let [.., slice, unit, child] = parts[..] else {
        return Ok(None);
    };
    if !name::candidates(key).any(|own| own.as_str() == unit) {
        return Ok(None);
    }
    // The cgroup of the root slice is the root of all cgroups.
    let slice = if slice == "/" { name::ROOT_SLICE } else { slice };
    Ok(Some(Placement::Unit { slice: UnitName::new(slice)?, child: child.to_owned() }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::id::{Namespace, TaskId};
    use crate::oci::bundle::SANDBOX_ID;
    use crate::oci::options::{Options, OptionsSource};
    use crate::services::Delivery;
    use crate::simulation::harness::World;
    use crate::task::request::Mount;

    fn key(namespace: &str) -> TaskKey {
        TaskKey::usual(Namespace::new(namespace).unwrap(), TaskId::new("web").unwrap())
    }

    /// The placement of a container with this path and with this annotation of CRI.
    fn placed(namespace: &str, path: &str, sandbox: Option<&str>, restores: bool) -> Placement {
        let annotations = sandbox.map(|id| serde_json::json!({(SANDBOX_ID): id}));
        let spec = serde_json::json!({"linux": {"cgroupsPath": path}, "annotations": annotations});
        let spec = Spec::parse(spec.to_string().as_bytes()).unwrap();
        placement(&key(namespace), &spec, restores).unwrap()
    }

    fn unit(slice: &str, child: &str) -> Placement {
        Placement::Unit { slice: UnitName::new(slice).unwrap(), child: child.to_owned() }
    }

    #[test]
    fn a_default_path_means_the_slice_of_the_namespace_or_of_the_pod() {
        let ours = unit("containerd-default.slice", "web");
        assert_eq!(placed("default", "", None, false), ours);
        assert_eq!(placed("default", "/default/web", None, false), ours);
        assert_eq!(
            placed("default", "", Some("pod"), false),
            ours,
            "a pod of another namespace than Kubernetes'"
        );
        assert_eq!(placed("k8s.io", "", Some("pod"), false), unit("containerd-k8s.io-pod.slice", "web"));
        assert_eq!(placed("k8s.io", "", None, false), unit("containerd-k8s.io.slice", "web"));
    }

    #[test]
    fn a_client_chooses_a_slice_or_a_cgroup_outside_of_the_unit() {
        let chosen = unit("kubepods-a.slice", "cri-containerd-abc.scope");
        assert_eq!(placed("k8s.io", "kubepods-a.slice:cri-containerd:abc", Some("pod"), false), chosen);
        let foreign = Placement::Foreign {
            slice: UnitName::new("containerd-default.slice").unwrap(),
            path: "/elsewhere/web".into(),
        };
        assert_eq!(placed("default", "/elsewhere/web", None, false), foreign);
        let relative = placed("default", "elsewhere/web", None, false);
        assert_eq!(
            relative.cgroup(&UnitName::new("a.service").unwrap()),
            Path::new("/system.slice/elsewhere/web")
        );
    }

    #[test]
    fn the_default_path_of_the_original_is_none_of_a_restored_container() {
        assert!(matches!(placed("default", "/default/original", None, false), Placement::Foreign { .. }));
        let ours = unit("containerd-default.slice", "web");
        assert_eq!(placed("default", "/default/original", None, true), ours);
    }

    #[test]
    fn a_path_that_an_earlier_attempt_has_written_gives_the_same_placement() {
        let own = "/containerd.slice/containerd-default.slice/containerd-default-web.service/web";
        assert_eq!(placed("default", own, None, false), unit("containerd-default.slice", "web"));
        let own = "/kubepods.slice/kubepods-a.slice/containerd-default-web.service/docker-abc.scope";
        assert_eq!(placed("default", own, None, false), unit("kubepods-a.slice", "docker-abc.scope"));
        let in_root = placed("default", "-.slice:docker:abc", None, false);
        assert_eq!(in_root, unit("-.slice", "docker-abc.scope"));
        let own = in_root.cgroup(&name::candidates(&key("default")).next().unwrap());
        assert_eq!(own, Path::new("/containerd-default-web.service/docker-abc.scope"));
        assert_eq!(placed("default", own.to_str().unwrap(), None, false), in_root);
        let other = "/containerd.slice/containerd-default.slice/containerd-default-other.service/web";
        assert!(matches!(placed("default", other, None, false), Placement::Foreign { .. }));
    }

    #[test]
    fn only_a_missing_file_is_an_empty_environment() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("environment");
        assert_eq!(environment_in(&path).unwrap(), b"");
        fs::write(&path, "A=b\0").unwrap();
        assert_eq!(environment_in(&path).unwrap(), b"A=b\0");
        let error = environment_in(dir.path()).unwrap_err();
        assert!(matches!(error, runtime::Error::Environment { verb: "create", .. }), "{error}");
    }

    #[test]
    fn the_containers_of_a_pod_with_core_scheduling_have_it_whatever_start_says() {
        let world = World::new("cores");
        let bundle = |id: &str, core_scheduling: bool| {
            let bundle = world.state_dir().with_file_name(id);
            fs::create_dir(&bundle).unwrap();
            let spec = serde_json::json!({"annotations": {(SANDBOX_ID): "pod"}});
            fs::write(bundle.join("config.json"), spec.to_string()).unwrap();
            let caller = Containerd { core_scheduling, ..Containerd::default() };
            containerd::write_containerd(&bundle, &caller).unwrap();
            let mut call = world.create_call();
            call.key.id = TaskId::new(id).unwrap();
            call.request.bundle = bundle;
            call
        };
        let (pod, later, other) = (bundle("pod", true), bundle("web", false), bundle("other", false));
        fs::write(other.request.bundle.join("config.json"), "{}").unwrap();
        let found = world.live(move |shim| async move {
            shim.create(pod, Delivery::First).await.unwrap();
            [later, other].map(|call| shim.prepare(call).unwrap().0.containerd.core_scheduling)
        });
        assert_eq!(found, Some([true, false]));
    }

    #[test]
    fn hooks_of_every_moment_find_the_rootfs_on_the_host() {
        let world = World::new("hooks");
        // Any other OCI runtime may be a wrapper that mounts something.
        let runc = world.state_dir().with_file_name("runc");
        fs::copy("/bin/true", &runc).unwrap();
        for (hooks, expected) in [("{}", false), (r#"{"poststop":[{"path":"/bin/true"}]}"#, true)] {
            let mut call = world.create_call();
            let spec = format!(r#"{{"hooks":{hooks}}}"#);
            fs::write(call.request.bundle.join("config.json"), spec).unwrap();
            call.request.rootfs.push(Mount::default());
            let options = Options { binary_name: runc.display().to_string(), ..Options::default() };
            call.options = OptionsSource::Given(Box::new(options));
            let on_host = world.live(|shim| async move { shim.prepare(call).unwrap().0.rootfs_on_host });
            assert_eq!(on_host, Some(expected), "{hooks}");
        }
    }
}
