//! Names of units and slices (pure).
//!
//! `containerd-<namespace>-<id>.service`, in `containerd-<namespace>.slice`. Dashes of the
//! namespace are escaped, so that two pairs of namespace and id never share a name, and so that
//! `containerd-<namespace>-.service.d/` is the drop-in directory of just that namespace.

use crate::id::{
    ExecId, InvalidName, MAX_UNIT_NAME, Namespace, SHORT_ID, TaskId, TaskKey, UnitName, fnv1a, is_long_hex,
};
use crate::text;

/// Stem of the daemon's own units.
pub const DAEMON: &str = "containerd-shim-systemd-v1";
/// The daemon's socket unit.
pub const DAEMON_SOCKET: &str = "containerd-shim-systemd-v1.socket";
/// The daemon's service unit.
pub const DAEMON_SERVICE: &str = "containerd-shim-systemd-v1.service";
/// The slice of the daemon. The underscore keeps it apart from a namespace called `shim`.
pub const DAEMON_SLICE: &str = "containerd_shim.slice";
/// The slice that keeps the order of stops at shutdown. It is in the slice of the daemon.
pub const ORDER_SLICE: &str = "containerd_shim-order.slice";
pub const WAKE_SERVICE: &str = "containerd_shim-wake.service";
/// The slice that contains all others (systemd.slice(5)).
pub const ROOT_SLICE: &str = "-.slice";

/// The daemon's socket unit.
pub fn daemon_socket() -> UnitName {
    UnitName::constant(DAEMON_SOCKET)
}

/// The daemon's service unit.
pub fn daemon_service() -> UnitName {
    UnitName::constant(DAEMON_SERVICE)
}

/// The unit that waits for calls while the daemon is stopped.
pub fn wake_service() -> UnitName {
    UnitName::constant(WAKE_SERVICE)
}

/// The slice that keeps the order of stops at shutdown.
pub fn order_slice() -> UnitName {
    UnitName::constant(ORDER_SLICE)
}

/// What every container's unit name begins with.
pub const PREFIX: &str = "containerd-";

/// The names that a container's unit may have, best first. The next one is used if a name is taken.
///
/// An id of 64 hex digits is shortened to its first [`SHORT_ID`] digits, then to more: cAdvisor counts a unit with 64
/// digits in its name as an additional container. The last name has a hash, which is different for a second containerd.
pub fn candidates(key: &TaskKey) -> impl Iterator<Item = UnitName> + use<> {
    let owner = Some(key.owner.as_str()).filter(|owner| !owner.is_empty());
    let mark = owner.map_or_else(String::new, |owner| format!("+{owner}"));
    stems(&format!("{PREFIX}{}-", escape(key.namespace.as_str())), key.id.as_str(), &mark)
}

/// The names that an exec's unit may have, best first. A colon can't occur in an id.
pub fn exec_candidates(container: &UnitName, exec: &ExecId) -> impl Iterator<Item = UnitName> + use<> {
    stems(&format!("{}:", stem(container)), exec.as_str(), "")
}

/// The last stem has a hash of the whole name and the mark. It is the only one if all others are too long.
fn stems(prefix: &str, id: &str, mark: &str) -> impl Iterator<Item = UnitName> + use<> {
    let lengths: Vec<usize> =
        if is_long_hex(id) { (SHORT_ID..=40).step_by(4).collect() } else { vec![id.len()] };
    let plain = lengths.into_iter().map(|length| format!("{prefix}{}", &id[..length]));
    // Namespace `shim` and id `systemd-v1` would give the name of the daemon.
    let plain: Vec<_> = plain.filter(|stem| stem != DAEMON && fits(stem, SERVICE)).collect();
    let whole = format!("{prefix}{id}");
    let last = hashed(&whole, &format!("{whole}{mark}"), SERVICE);
    plain
        .into_iter()
        .map(|stem| UnitName::new(format!("{stem}{SERVICE}")))
        .chain([last])
        .filter_map(Result::ok)
}

const SERVICE: &str = ".service";

fn fits(stem: &str, suffix: &str) -> bool {
    stem.len() + suffix.len() <= MAX_UNIT_NAME
}

fn stem(service: &UnitName) -> &str {
    service.as_str().strip_suffix(".service").unwrap_or(service.as_str())
}

/// The unit of a `binary://` logger. It has the name of its process's unit, followed by that of an exec with an empty id,
/// which no exec can have.
///
/// # Errors
/// This happens only for names that no checked namespace and id can produce.
pub fn logger(process: &UnitName) -> Result<UnitName, InvalidName> {
    named(&format!("{}::log", stem(process)), SERVICE)
}

/// The slice of a namespace.
///
/// # Errors
/// As [`logger`].
pub fn namespace_slice(namespace: &Namespace) -> Result<UnitName, InvalidName> {
    slice(&format!("{PREFIX}{}", escape(namespace.as_str())))
}

/// The slice of a pod whose client named no parent slice: in the namespace's slice, named after the short id of the pod's
/// sandbox.
///
/// # Errors
/// As [`logger`].
pub fn pod_slice(namespace: &Namespace, sandbox: &TaskId) -> Result<UnitName, InvalidName> {
    let pod = escape(short(sandbox.as_str(), SHORT_ID));
    slice(&format!("{PREFIX}{}-{pod}", escape(namespace.as_str())))
}

/// True for a slice made by [`pod_slice`]: the daemon removes it once it is empty.
pub fn is_pod_slice(slice: &UnitName) -> bool {
    let stem = slice.as_str().trim_end_matches(".slice");
    stem.strip_prefix(PREFIX).is_some_and(|rest| rest.contains('-'))
}

fn slice(stem: &str) -> Result<UnitName, InvalidName> {
    named(stem, ".slice")
}

/// Joins stem and suffix. The end of a name that is too long is replaced by a stable hash.
fn named(stem: &str, suffix: &str) -> Result<UnitName, InvalidName> {
    if fits(stem, suffix) { UnitName::new(format!("{stem}{suffix}")) } else { hashed(stem, stem, suffix) }
}

fn hashed(stem: &str, of: &str, suffix: &str) -> Result<UnitName, InvalidName> {
    let hash = format!(":{:016x}", fnv1a(of.as_bytes()));
    let keep = stem.len().min(MAX_UNIT_NAME - suffix.len() - hash.len());
    UnitName::new(format!("{}{hash}{suffix}", &stem[..keep]))
}

/// A short name that is unique for a unit, for paths that are limited in length.
pub fn short_name(unit: &UnitName) -> String {
    format!("{:016x}", fnv1a(unit.as_str().as_bytes()))
}

fn escape(text: &str) -> String {
    text.replace('-', "\\x2d")
}

fn short(id: &str, digits: usize) -> &str {
    if is_long_hex(id) { &id[..digits.min(id.len())] } else { id }
}

/// The D-Bus object path of a unit. Every byte except letters and digits, and a leading digit, is written as `_xx`.
pub fn object_path(unit: &str) -> String {
    let mut path = String::from(OBJECT_PREFIX);
    for (i, byte) in unit.bytes().enumerate() {
        if byte.is_ascii_alphabetic() || (i > 0 && byte.is_ascii_digit()) {
            path.push(byte.into());
        } else {
            path.push_str(&format!("_{byte:02x}"));
        }
    }
    path
}

/// The unit of a D-Bus object path, the reverse of [`object_path`]. `None` for other objects.
pub fn from_object_path(path: &str) -> Option<UnitName> {
    let escaped = path.strip_prefix(OBJECT_PREFIX)?;
    let mut name = Vec::with_capacity(escaped.len());
    let mut bytes = escaped.bytes();
    while let Some(byte) = bytes.next() {
        if byte == b'_' {
            name.push(text::hex_byte([bytes.next()?, bytes.next()?])?);
        } else {
            name.push(byte);
        }
    }
    UnitName::new(String::from_utf8(name).ok()?).ok()
}

/// The prefix of all object paths of units.
const OBJECT_PREFIX: &str = "/org/freedesktop/systemd1/unit/";

#[cfg(test)]
mod tests {
    use super::*;
    use crate::id::Owner;

    fn key(namespace: &str, id: &str) -> TaskKey {
        TaskKey::usual(Namespace::new(namespace).unwrap(), TaskId::new(id).unwrap())
    }

    fn name(namespace: &str, id: &str) -> String {
        candidates(&key(namespace, id)).next().unwrap().to_string()
    }

    #[test]
    fn the_daemons_own_units_have_valid_names() {
        for unit in [daemon_socket(), daemon_service(), wake_service(), order_slice()] {
            assert_eq!(UnitName::new(unit.as_str()), Ok(unit));
        }
    }

    #[test]
    fn a_plain_id_is_the_units_name() {
        assert_eq!(name("default", "web-1"), "containerd-default-web-1.service");
    }

    #[test]
    fn dashes_can_not_make_two_tasks_share_a_unit() {
        assert_eq!(name("a-b", "c"), r"containerd-a\x2db-c.service");
        assert_ne!(name("a-b", "c"), name("a", "b-c"));
    }

    #[test]
    fn a_hex_id_is_shortened_and_can_grow() {
        let id = "0123456789abcdef".repeat(4);
        assert_eq!(name("moby", &id), "containerd-moby-0123456789ab.service");
        let names: Vec<String> = candidates(&key("moby", &id)).map(String::from).collect();
        assert_eq!(names[1], "containerd-moby-0123456789abcdef.service");
        let distinct: std::collections::HashSet<&String> = names.iter().collect();
        assert_eq!(distinct.len(), names.len());
    }

    #[test]
    fn each_of_several_containerds_has_a_last_name_of_its_own() {
        for (namespace, id) in [
            ("default", "web".to_owned()),
            ("moby", "ab".repeat(32)),
            (&vec!["a"; 38].join("-"), "x".repeat(76)),
        ] {
            let key = key(namespace, &id);
            let owners =
                ["", "0123456789abcdef", "fedcba9876543210"].map(|owner| key.of(Owner::new(owner).unwrap()));
            let names = owners.map(|key| candidates(&key).collect::<Vec<_>>());
            for (at, own) in names.iter().enumerate() {
                let mut others = names.iter().enumerate().filter(|(other, _)| *other != at);
                assert!(others.all(|(_, other)| !other.contains(own.last().unwrap())), "{own:?}");
            }
        }
    }

    #[test]
    fn the_name_of_an_execs_unit_follows_that_of_its_container() {
        let unit = candidates(&key("default", "web")).next().unwrap();
        let name = |exec: &str| exec_candidates(&unit, &ExecId::new(exec).unwrap()).map(String::from).next();
        assert_eq!(name("sh-1").unwrap(), "containerd-default-web:sh-1.service");
        assert_eq!(name(&"ab".repeat(32)).unwrap(), "containerd-default-web:abababababab.service");
        let long = candidates(&key(&"n".repeat(76), &"i".repeat(76))).next().unwrap();
        let exec = exec_candidates(&long, &ExecId::new("e".repeat(76)).unwrap()).next().unwrap();
        assert!(exec.as_str().len() <= MAX_UNIT_NAME && exec != long);
    }

    #[test]
    fn no_container_can_take_the_daemons_name() {
        let unit = name("shim", "systemd-v1");
        assert_ne!(unit, DAEMON_SERVICE);
        assert!(unit.starts_with("containerd-shim-systemd-v1:"), "{unit}");
    }

    #[test]
    fn a_name_that_is_too_long_keeps_its_beginning_and_stays_stable() {
        let dashes = vec!["a"; 38].join("-");
        let id = "x".repeat(76);
        let unit = name(&dashes, &id);
        assert!(unit.starts_with(r"containerd-a\x2da\x2d"), "{unit}");
        assert_eq!(unit, name(&dashes, &id));
        assert_ne!(unit, name(&dashes, &"x".repeat(75)));
    }

    #[test]
    fn the_name_of_a_loggers_unit_follows_that_of_its_container() {
        let unit = candidates(&key("default", "web")).next().unwrap();
        assert_eq!(logger(&unit).unwrap().as_str(), "containerd-default-web::log.service");
    }

    #[test]
    fn a_container_whose_id_ends_like_a_unit_has_a_logger_and_execs_of_its_own() {
        let unit = |id| candidates(&key("default", id)).next().unwrap();
        assert_ne!(logger(&unit("web")), logger(&unit("web.service")));
        let exec = |id| exec_candidates(&unit(id), &ExecId::new("e").unwrap()).next().unwrap();
        assert_eq!(exec("web.service").as_str(), "containerd-default-web.service:e.service");
    }

    #[test]
    fn slices_nest() {
        let namespace = Namespace::new("k8s.io").unwrap();
        let pod = pod_slice(&namespace, &TaskId::new("ab".repeat(32)).unwrap()).unwrap();
        assert_eq!(namespace_slice(&namespace).unwrap().as_str(), "containerd-k8s.io.slice");
        assert_eq!(pod.as_str(), "containerd-k8s.io-abababababab.slice");
        assert_eq!(
            pod.slice_cgroup(),
            std::path::PathBuf::from(
                "/containerd.slice/containerd-k8s.io.slice/containerd-k8s.io-abababababab.slice"
            )
        );
        let root = UnitName::new(ROOT_SLICE).unwrap();
        assert_eq!(root.slice_cgroup(), std::path::Path::new("/"));
        assert!(is_pod_slice(&pod) && !is_pod_slice(&namespace_slice(&namespace).unwrap()));
        let dashed = namespace_slice(&Namespace::new("a-b").unwrap()).unwrap();
        assert!(!is_pod_slice(&dashed), "an escaped dash makes no pod");
    }

    #[test]
    fn object_paths_go_both_ways() {
        let unit = UnitName::new(r"containerd-a\x2db-1.service").unwrap();
        let path = object_path(unit.as_str());
        assert_eq!(path, "/org/freedesktop/systemd1/unit/containerd_2da_5cx2db_2d1_2eservice");
        assert_eq!(from_object_path(&path), Some(unit));
        assert_eq!(from_object_path("/org/freedesktop/systemd1"), None);
        assert_eq!(from_object_path("/org/freedesktop/systemd1/unit/a_2"), None);
    }
}
