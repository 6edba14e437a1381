//! Checked names: containerd's identifiers, and names of systemd units.
//!
//! A value of one of these types has been checked and is never checked again. Deserialising goes
//! through the same check, so a name from a file on disk is as good as one from a request.

use std::fmt;
use std::path::Path;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// Longest identifier containerd accepts (`pkg/identifiers`, containerd 1.6 to 2.4).
pub const MAX_IDENTIFIER: usize = 76;

/// Longest unit name systemd accepts, suffix included (`UNIT_NAME_MAX` minus the NUL).
pub const MAX_UNIT_NAME: usize = 255;

/// Why a name was refused. The offending text is quoted and shortened.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum InvalidName {
    /// The text is empty.
    #[error("{what} is empty")]
    Empty {
        /// The kind of name, e.g. "container id".
        what: &'static str,
    },
    /// The text is longer than the kind of name allows.
    #[error("{what} {text:?} is longer than {max} bytes")]
    TooLong {
        /// The kind of name.
        what: &'static str,
        /// The refused text.
        text: String,
        /// The longest text allowed, in bytes.
        max: usize,
    },
    /// A character, or its place, is not allowed.
    #[error("{what} {text:?} is not valid: {rule}")]
    Malformed {
        /// The kind of name.
        what: &'static str,
        /// The refused text.
        text: String,
        /// The rule that the text breaks.
        rule: &'static str,
    },
}

/// The beginning of a refused text, short enough for a message.
fn excerpt(text: &str) -> String {
    const SHOWN: usize = 80;
    if text.chars().count() <= SHOWN {
        return text.to_owned();
    }
    text.chars().take(SHOWN).chain("…".chars()).collect()
}

/// containerd's rule for names: runs of letters and digits, joined by single `.`, `_` or `-`.
fn check_identifier(what: &'static str, text: &str) -> Result<(), InvalidName> {
    if text.is_empty() {
        return Err(InvalidName::Empty { what });
    }
    if text.len() > MAX_IDENTIFIER {
        return Err(InvalidName::TooLong { what, text: excerpt(text), max: MAX_IDENTIFIER });
    }
    let joined_runs = text
        .split(['.', '_', '-'])
        .all(|run| !run.is_empty() && run.bytes().all(|b| b.is_ascii_alphanumeric()));
    if !joined_runs {
        return Err(InvalidName::Malformed {
            what,
            text: excerpt(text),
            rule: "use letters and digits, joined by single '.', '_' or '-'",
        });
    }
    Ok(())
}

/// systemd's rule for unit names: a type suffix and only characters that need no escape.
fn check_unit_name(what: &'static str, text: &str) -> Result<(), InvalidName> {
    if text.is_empty() {
        return Err(InvalidName::Empty { what });
    }
    if text.len() > MAX_UNIT_NAME {
        return Err(InvalidName::TooLong { what, text: excerpt(text), max: MAX_UNIT_NAME });
    }
    let known_suffix = [".service", ".slice", ".socket"]
        .iter()
        .any(|suffix| text.len() > suffix.len() && text.ends_with(suffix));
    let plain = text.bytes().all(|b| b.is_ascii_alphanumeric() || b":-_.\\".contains(&b));
    if !known_suffix || !plain {
        return Err(InvalidName::Malformed {
            what,
            text: excerpt(text),
            rule: "use letters, digits and \":-_.\\\", with a unit type as suffix",
        });
    }
    Ok(())
}

macro_rules! name {
    ($(#[$doc:meta])* $name:ident, $what:literal, $check:ident) => {
        $(#[$doc])*
        #[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
        #[serde(try_from = "String", into = "String")]
        pub struct $name(Box<str>);

        impl $name {
            /// Checks the text.
            ///
            /// # Errors
            /// The rule that was broken, with the text.
            pub fn new(text: impl AsRef<str>) -> Result<Self, InvalidName> {
                let text = text.as_ref();
                $check($what, text)?;
                Ok(Self(text.into()))
            }

            /// The name as text.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl TryFrom<String> for $name {
            type Error = InvalidName;
            fn try_from(text: String) -> Result<Self, InvalidName> {
                Self::new(text)
            }
        }

        impl From<$name> for String {
            fn from(name: $name) -> String {
                name.0.into()
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }
    };
}

name!(
    /// A containerd namespace.
    Namespace, "namespace", check_identifier
);
name!(
    /// A container's id, unique within its namespace.
    TaskId, "container id", check_identifier
);
name!(
    /// An exec's id, unique within its container.
    ExecId, "exec id", check_identifier
);
name!(
    /// The name of a unit that exists or may exist: a service, slice or socket.
    UnitName, "unit name", check_unit_name
);

impl UnitName {
    /// The cgroup of a slice, below the root of the hierarchy: `a-b.slice` is in `a.slice`, and `-.slice` is the root itself
    /// (systemd.slice(5)).
    pub fn slice_cgroup(&self) -> PathBuf {
        let stem = self.as_str().trim_end_matches(".slice");
        if stem == "-" {
            return PathBuf::from("/");
        }
        let ends = stem.match_indices('-').map(|(at, _)| at).chain([stem.len()]);
        ends.map(|end| format!("{}.slice", &stem[..end]))
            .fold(PathBuf::from("/"), |path, part| path.join(part))
    }
}

/// Which containerd a task belongs to. Several may run on a node (the system's, Docker's, k3s's), and each has
/// namespaces and ids of its own.
///
/// A containerd is identified by the directory of its bundles. No two containerds share this directory, and Create, `start`
/// and `delete` all name it, unlike containerd's address. The text is empty for the usual directory, and a hash for any
/// other.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Owner(Box<str>);

/// Where containerd keeps its bundles if its configuration says nothing else.
const USUAL_BUNDLES: &str = "/run/containerd/io.containerd.runtime.v2.task";

impl Owner {
    /// Checks the text.
    ///
    /// # Errors
    /// It is neither empty nor a hash.
    pub fn new(text: impl AsRef<str>) -> Result<Self, InvalidName> {
        let (text, what) = (text.as_ref(), "owner");
        let is_hash = text.len() == 16 && text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
        if !text.is_empty() && !is_hash {
            let rule = "use 16 hexadecimal digits, or nothing";
            return Err(InvalidName::Malformed { what, text: excerpt(text), rule });
        }
        Ok(Self(text.into()))
    }

    /// The containerd to which this bundle (a path without symlinks) belongs: the usual one if the path has not the layout
    /// of a containerd.
    pub fn of_bundle(bundle: &Path, namespace: &Namespace, id: &TaskId) -> Self {
        let end = Path::new(namespace.as_str()).join(id.as_str());
        let bundles = bundle.ends_with(end).then(|| bundle.ancestors().nth(2)).flatten();
        match bundles {
            Some(bundles) if bundles != Path::new(USUAL_BUNDLES) => {
                Self(format!("{:016x}", fnv1a(bundles.as_os_str().as_encoded_bytes())).into())
            }
            Some(_) | None => Self::default(),
        }
    }

    /// True for the containerd with the usual directories.
    pub fn is_usual(&self) -> bool {
        self.0.is_empty()
    }

    /// The owner as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl TryFrom<String> for Owner {
    type Error = InvalidName;
    fn try_from(text: String) -> Result<Self, InvalidName> {
        Self::new(text)
    }
}

impl From<Owner> for String {
    fn from(owner: Owner) -> String {
        owner.0.into()
    }
}

/// FNV-1a, 64 bits: the same in all versions and on all machines. The hasher of std does not promise this.
pub fn fnv1a(bytes: &[u8]) -> u64 {
    const EMPTY: u64 = 0xcbf2_9ce4_8422_2325;
    continue_fnv1a(EMPTY, bytes)
}

fn continue_fnv1a(hash: u64, bytes: &[u8]) -> u64 {
    bytes.iter().fold(hash, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01b3))
}

/// As [`fnv1a`], for several fields. The length of each field counts too: `ab`, `c` and `a`, `bc` differ.
pub fn stable_hash(fields: &[&[u8]]) -> u64 {
    fields.iter().fold(fnv1a(&[]), |hash, field| {
        let hash = continue_fnv1a(hash, &(field.len() as u64).to_le_bytes());
        continue_fnv1a(hash, field)
    })
}

/// Identifies a task on this node: an id is unique only within its containerd and namespace.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct TaskKey {
    /// The containerd. Records of earlier versions do not have it.
    #[serde(default, skip_serializing_if = "Owner::is_usual")]
    pub owner: Owner,
    pub namespace: Namespace,
    /// The container's id.
    pub id: TaskId,
}

impl TaskKey {
    /// The task of the usual containerd.
    pub fn usual(namespace: Namespace, id: TaskId) -> Self {
        Self { owner: Owner::default(), namespace, id }
    }

    /// The key with the same namespace and id in another containerd.
    pub fn of(&self, owner: Owner) -> Self {
        Self { owner, ..self.clone() }
    }

    /// The init process of the task.
    pub fn init(&self) -> ProcessKey {
        ProcessKey { task: self.clone(), exec: None }
    }

    /// Id and owner in one word, for file names and command lines. No id has a plus sign.
    pub fn word(&self) -> String {
        if self.owner.is_usual() { self.id.to_string() } else { format!("{}+{}", self.id, self.owner.0) }
    }

    /// The reverse of [`Self::word`].
    ///
    /// # Errors
    /// A part is not valid.
    pub fn from_word(namespace: Namespace, word: &str) -> Result<Self, InvalidName> {
        let (id, owner) = word.split_once('+').map_or((word, None), |(id, owner)| (id, Some(owner)));
        let owner = owner.map(Owner::new).transpose()?.unwrap_or_default();
        Ok(Self { owner, namespace, id: TaskId::new(id)? })
    }
}

impl fmt::Display for TaskKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.id)
    }
}

impl UnitName {
    /// A name that is a constant of this program. A unit test checks each of them.
    pub(crate) fn constant(name: &'static str) -> Self {
        debug_assert!(check_unit_name("unit name", name).is_ok());
        Self(name.into())
    }
}

/// Identifies a process on this node: the init process of a task, or one of its execs.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct ProcessKey {
    pub task: TaskKey,
    /// The exec; `None` for the init process.
    pub exec: Option<ExecId>,
}

impl ProcessKey {
    /// The id under which a client knows the process: the exec's, or the container's.
    pub fn id(&self) -> &str {
        self.exec.as_ref().map_or(self.task.id.as_str(), ExecId::as_str)
    }
}

impl fmt::Display for ProcessKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.exec {
            None => self.task.fmt(f),
            Some(exec) => write!(f, "{} exec {exec}", self.task),
        }
    }
}

/// Number of digits of a hexadecimal id that clients show (`docker ps`, `crictl ps`).
pub const SHORT_ID: usize = 12;

/// True for the 64 lower-case hexadecimal digits that Docker, Kubernetes and nerdctl use as ids.
pub fn is_long_hex(id: &str) -> bool {
    id.len() == 64 && id.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_containerd_accepts_are_accepted() {
        for id in ["a", "web", "my-app.v1_2", "0123456789abcdef", &"x".repeat(76)] {
            assert_eq!(TaskId::new(id).map(|id| id.to_string()), Ok(id.to_owned()));
        }
    }

    #[test]
    fn names_that_containerd_refuses_are_refused() {
        for id in ["", "/", "..", "a/b", "a\0b", "-a", "a-", "a--b", "a.-b", "ä", &"x".repeat(77)] {
            assert!(TaskId::new(id).is_err(), "{id:?}");
        }
    }

    #[test]
    fn a_name_from_disk_is_checked_too() {
        assert!(serde_json::from_str::<TaskId>("\"../x\"").is_err());
        assert!(serde_json::from_str::<UnitName>("\"a b.service\"").is_err());
    }

    #[test]
    fn a_containerd_is_known_by_the_directory_of_its_bundles() {
        let (namespace, id) = (Namespace::new("n").unwrap(), TaskId::new("web").unwrap());
        let owner = |bundle: &str| Owner::of_bundle(Path::new(bundle), &namespace, &id);
        assert!(owner("/run/containerd/io.containerd.runtime.v2.task/n/web").is_usual());
        assert!(owner("/home/me/bundle").is_usual(), "no containerd's layout");
        let docker = owner("/run/docker/containerd/daemon/io.containerd.runtime.v2.task/n/web");
        assert!(!docker.is_usual());
        assert_ne!(docker, owner("/run/k3s/containerd/io.containerd.runtime.v2.task/n/web"));
        let key = TaskKey { owner: docker.clone(), namespace: namespace.clone(), id };
        assert_eq!(TaskKey::from_word(namespace.clone(), &key.word()), Ok(key.clone()));
        assert_eq!(key.of(Owner::default()).word(), "web");
        assert!(TaskKey::from_word(namespace, "web+../x").is_err());
        let json = r#"{"namespace":"n","id":"web"}"#;
        assert_eq!(serde_json::from_str::<TaskKey>(json).unwrap(), key.of(Owner::default()));
    }

    /// A later version compares such numbers with those that this version has written.
    #[test]
    fn a_stable_hash_never_changes() {
        assert_eq!(fnv1a(b"a"), 0xaf63_dc4c_8601_ec8c);
        assert_eq!(stable_hash(&[b"default", b"web"]), 0x3454_bea5_9653_4e6a);
        assert_ne!(stable_hash(&[b"ab", b"c"]), stable_hash(&[b"a", b"bc"]));
    }

    #[test]
    fn unit_names_need_a_type_and_plain_characters() {
        assert!(UnitName::new(r"containerd-a\x2db-c:d.service").is_ok());
        for name in
            ["", "x", ".service", "a/b.service", "a b.service", &format!("{}.service", "x".repeat(248))]
        {
            assert!(UnitName::new(name).is_err(), "{name:?}");
        }
    }

    #[test]
    fn a_refusal_quotes_only_the_beginning_of_a_long_text() {
        let message = TaskId::new("y".repeat(300)).map_err(|e| e.to_string());
        assert!(message.is_err_and(|m| m.len() < 200 && m.contains("yyy")));
    }
}
