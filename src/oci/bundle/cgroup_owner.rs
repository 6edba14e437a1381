//! The user who owns the cgroup of a container that may manage its own cgroups (pure).

use serde::Deserialize;

use super::{Fields, IdMapping, Namespace, member};

#[derive(Default, Deserialize)]
struct User {
    #[serde(default)]
    uid: u32,
}

#[derive(Deserialize)]
struct Mount {
    #[serde(default)]
    destination: String,
    #[serde(default, rename = "type")]
    kind: String,
    #[serde(default)]
    options: Option<Vec<String>>,
}

/// The user on the host that the container's process has, if the container has a cgroup namespace of its own and can write to it.
/// As runc with its systemd driver (specconv). `None` for root, and for a value of a wrong type, which the OCI runtime refuses.
pub(super) fn find(
    spec: &Fields<'_>,
    linux: &Fields<'_>,
    process: &Fields<'_>,
    namespaces: &[Namespace],
) -> Option<u32> {
    let has = |kind: &str| namespaces.iter().find(|namespace| namespace.kind == kind);
    has("cgroup").filter(|namespace| namespace.path.as_os_str().is_empty())?;
    let User { uid } = member(process, "user").ok()?;
    let owner = match has("user") {
        Some(_) => on_host(uid, &member::<Option<Vec<IdMapping>>>(linux, "uidMappings").ok()??)?,
        None => uid,
    };
    if owner == 0 {
        return None;
    }
    let mounts: Vec<Mount> = member(spec, "mounts").ok()?;
    let is_writable = |mount: &Mount| {
        mount.destination == "/sys/fs/cgroup"
            && ["cgroup", "cgroup2"].contains(&mount.kind.as_str())
            && !mount.options.iter().flatten().any(|option| option == "ro")
    };
    mounts.iter().any(is_writable).then_some(owner)
}

fn on_host(uid: u32, mappings: &[IdMapping]) -> Option<u32> {
    mappings.iter().find_map(|mapping| {
        let offset = uid.checked_sub(mapping.container).filter(|offset| *offset < mapping.size)?;
        mapping.host.checked_add(offset)
    })
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::super::{Edits, edited_with};

    fn spec() -> Value {
        json!({
            "process": {"user": {"uid": 1000}},
            "mounts": [{"destination": "/sys/fs/cgroup", "type": "cgroup", "options": ["nosuid", "rw"]}],
            "linux": {"namespaces": [{"type": "cgroup"}]},
        })
    }

    fn owner(spec: &Value) -> Option<u32> {
        edited_with(spec.to_string().as_bytes(), &Edits::default()).unwrap().1.cgroup_owner
    }

    #[test]
    fn the_user_of_the_process_owns_a_cgroup_that_the_container_can_write() {
        assert_eq!(owner(&spec()), Some(1000));
        for (place, value) in [
            ("/process/user/uid", json!(0)),
            ("/mounts/0/options/1", json!("ro")),
            ("/mounts/0/destination", json!("/sys/fs")),
            ("/mounts/0/type", json!("bind")),
            ("/linux/namespaces/0/type", json!("mount")),
            ("/linux/namespaces/0", json!({"type": "cgroup", "path": "/proc/1/ns/cgroup"})),
        ] {
            let mut spec = spec();
            *spec.pointer_mut(place).unwrap() = value;
            assert_eq!(owner(&spec), None, "{spec}");
        }
    }

    #[test]
    fn a_user_of_a_user_namespace_is_one_of_the_host() {
        let mut spec = spec();
        spec["linux"]["namespaces"] = json!([{"type": "user"}, {"type": "cgroup"}]);
        assert_eq!(owner(&spec), None, "without a map");
        spec["linux"]["uidMappings"] = json!([
            {"containerID": 0, "hostID": 200_000, "size": 1000},
            {"containerID": 1000, "hostID": 500_000, "size": 10},
        ]);
        for (uid, host) in [(0, Some(200_000)), (1000, Some(500_000)), (1009, Some(500_009)), (1010, None)] {
            spec["process"]["user"]["uid"] = json!(uid);
            assert_eq!(owner(&spec), host);
        }
    }
}
