//! The bundle's `config.json`: reads a few fields, edits others, and leaves the rest unchanged.
//!
//! Edits work on untyped JSON: fields and values that no library knows yet are kept.

use std::collections::HashMap;
use std::fs;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use oci_spec::runtime::Mount;
use serde::Deserialize;
use serde::de::IgnoredAny;
use serde_json::Value;
use serde_json::value::{RawValue, to_raw_value};

use crate::files;
use crate::id::TaskId;
use crate::path_error::{PathError, io_error};

use super::canonical::{Members, Others, Shape, canonical};
use super::resources::{self, Resources};
use super::turns::{self, Busy, Turn};

mod cgroup_owner;

/// The annotation of CRI with the id of the pod's sandbox.
pub const SANDBOX_ID: &str = "io.kubernetes.cri.sandbox-id";

/// A larger spec is refused. For comparison, the kernel limits arguments and environment of a process to 2 MiB.
pub const MAX_CONFIG_BYTES: u64 = 16 << 20;

const CONFIG: &str = "config.json";

/// The bits of a file's mode that are permissions.
const MODE: u32 = 0o7777;

/// Why a bundle can't be used.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The directory or the file can't be read or written.
    #[error("bundle: {0}")]
    Io(#[from] PathError),
    /// Too many bytes are being parsed.
    #[error("bundle: {0}")]
    Busy(#[from] Busy),
    /// The file is larger than [`MAX_CONFIG_BYTES`].
    #[error("bundle: {path} is larger than {MAX_CONFIG_BYTES} bytes")]
    TooLarge {
        /// The file.
        path: PathBuf,
    },
    /// The file is not an OCI runtime spec.
    #[error("bundle: {path} is not a valid OCI runtime spec: {source}")]
    Malformed {
        /// The file.
        path: PathBuf,
        /// Why it can't be parsed.
        #[source]
        source: serde_json::Error,
    },
}

/// The fields of the spec that the shim reads. All other fields are for the OCI runtime.
#[derive(Debug, Default, Deserialize)]
pub struct Spec {
    #[serde(default)]
    annotations: Option<HashMap<String, String>>,
    /// The container's host name, empty if unset.
    #[serde(default)]
    pub hostname: String,
    #[serde(default)]
    mounts: Option<Vec<MountOptions>>,
    #[serde(default)]
    linux: Option<Linux>,
    #[serde(default)]
    hooks: Option<Hooks>,
    /// The memory for this value.
    #[serde(skip)]
    _turn: Option<Turn<'static>>,
}

#[derive(Debug, Deserialize)]
struct MountOptions {
    #[serde(default)]
    options: Option<Vec<String>>,
}

/// The client's hooks. `prestart` is deprecated, but still in use.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct Hooks {
    prestart: Option<Vec<IgnoredAny>>,
    create_runtime: Option<Vec<IgnoredAny>>,
    create_container: Option<Vec<IgnoredAny>>,
    start_container: Option<Vec<IgnoredAny>>,
    poststart: Option<Vec<IgnoredAny>>,
    poststop: Option<Vec<IgnoredAny>>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Linux {
    #[serde(default)]
    cgroups_path: Option<String>,
    #[serde(default)]
    rootfs_propagation: Option<String>,
    #[serde(default)]
    resources: Option<Box<RawValue>>,
    #[serde(default)]
    namespaces: Option<Vec<Namespace>>,
    #[serde(default)]
    uid_mappings: Option<Vec<IdMapping>>,
    #[serde(default)]
    gid_mappings: Option<Vec<IdMapping>>,
    #[serde(default)]
    mount_label: Option<String>,
}

/// A namespace of the container.
#[derive(Debug, Deserialize, PartialEq, Eq)]
pub struct Namespace {
    /// Its kind, such as `network`.
    #[serde(rename = "type", default)]
    pub kind: String,
    /// The file of an existing namespace, which the container joins; empty for a new one.
    #[serde(default)]
    pub path: PathBuf,
}

/// A range of ids of a user namespace. (Runtime spec, config-linux.md, "User namespace mappings".)
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct IdMapping {
    #[serde(default, rename = "containerID")]
    container: u32,
    #[serde(default, rename = "hostID")]
    host: u32,
    #[serde(default)]
    size: u32,
}

/// The fields of a spec that are read or edited here.
pub const SHAPE: Shape = Shape::Struct(&[
    ("annotations", Shape::Map(&Shape::Text)),
    ("hostname", Shape::Text),
    ("hooks", HOOKS),
    ("linux", LINUX),
    (
        "mounts",
        Shape::List(&Shape::Struct(&[
            ("destination", Shape::Text),
            ("type", Shape::Text),
            ("options", Shape::List(&Shape::Text)),
        ])),
    ),
    (
        "process",
        Shape::Struct(&[
            ("env", Shape::List(&Shape::Text)),
            ("user", Shape::Struct(&[("uid", Shape::Value)])),
        ]),
    ),
]);

const HOOKS: Shape = Shape::Struct(&[
    ("prestart", Shape::List(&Shape::Struct(&[]))),
    ("createRuntime", Shape::List(&Shape::Struct(&[]))),
    ("createContainer", Shape::List(&Shape::Struct(&[]))),
    ("startContainer", Shape::List(&Shape::Struct(&[]))),
    ("poststart", Shape::List(&Shape::Struct(&[]))),
    ("poststop", Shape::List(&Shape::Struct(&[]))),
]);

const LINUX: Shape = Shape::Struct(&[
    ("cgroupsPath", Shape::Text),
    ("gidMappings", ID_MAPPINGS),
    ("mountLabel", Shape::Text),
    ("namespaces", Shape::List(&Shape::Struct(&[("type", Shape::Text), ("path", Shape::Text)]))),
    ("resources", resources::SHAPE),
    ("rootfsPropagation", Shape::Text),
    ("uidMappings", ID_MAPPINGS),
]);

const ID_MAPPINGS: Shape = Shape::List(&Shape::Struct(&[
    ("containerID", Shape::Value),
    ("hostID", Shape::Value),
    ("size", Shape::Value),
]));

impl Spec {
    /// Reads the spec of a bundle. Blocks the thread while there are other large specs.
    ///
    /// # Errors
    /// The file is missing, too large, or not a spec.
    pub fn read(bundle: &Path) -> Result<Self, Error> {
        let path = bundle.join(CONFIG);
        let (text, turn) = read_in_turn(&path)?;
        let spec = Self::parse(&text).map_err(|source| Error::Malformed { path, source })?;
        Ok(Self { _turn: Some(turn), ..spec })
    }

    /// Reads a spec as Go's decoder does.
    ///
    /// # Errors
    /// The text is not a spec.
    pub fn parse(text: &[u8]) -> Result<Self, serde_json::Error> {
        // Refuse a spec here that `edit` could not edit later.
        Parts::of(&canonical(text, &SHAPE, Others::Kept)?)?;
        serde_json::from_str(&canonical(text, &SHAPE, Others::LeftOut)?)
    }

    /// The value of an annotation; `None` if it is absent or empty.
    pub fn annotation(&self, name: &str) -> Option<&str> {
        self.annotations.as_ref()?.get(name).map(String::as_str).filter(|value| !value.is_empty())
    }

    /// The pod's sandbox (pause container) that a container of CRI belongs to; a sandbox belongs to itself.
    pub fn sandbox(&self) -> Option<TaskId> {
        self.annotation(SANDBOX_ID).and_then(|id| TaskId::new(id).ok())
    }

    /// The annotations whose names begin with `prefix`, sorted by name: the rest of each name, and its value.
    pub fn annotations(&self, prefix: &str) -> Vec<(&str, &str)> {
        let all = self.annotations.iter().flatten();
        let mut found: Vec<_> =
            all.filter_map(|(name, value)| Some((name.strip_prefix(prefix)?, value.as_str()))).collect();
        found.sort_unstable();
        found
    }

    /// Whether the client has hooks. All of them find the rootfs mounted under containerd-shim-runc-v2, also those that run after
    /// the container.
    pub fn has_hooks(&self) -> bool {
        self.hooks.as_ref().is_some_and(|hooks| {
            let Hooks { prestart, create_runtime, create_container, start_container, poststart, poststop } =
                hooks;
            let all = [prestart, create_runtime, create_container, start_container, poststart, poststop];
            all.into_iter().flatten().any(|hooks| !hooks.is_empty())
        })
    }

    /// `linux.cgroupsPath`, empty if unset.
    pub fn cgroups_path(&self) -> &str {
        self.linux.as_ref().and_then(|linux| linux.cgroups_path.as_deref()).unwrap_or_default()
    }

    /// `linux.mountLabel`, the SELinux label of the files of the container; `None` if unset or empty.
    pub fn mount_label(&self) -> Option<&str> {
        self.linux.as_ref()?.mount_label.as_deref().filter(|label| !label.is_empty())
    }

    /// The user and group on the host that the container's root is mapped to, if the container has a user
    /// namespace of its own. An id without a mapping is root's.
    pub fn mapped_root(&self) -> Option<(u32, u32)> {
        let linux = self.linux.as_ref()?;
        let mut namespaces = linux.namespaces.iter().flatten();
        if !namespaces.any(|namespace| namespace.kind == "user") {
            return None;
        }
        let root = |mappings: &Option<Vec<IdMapping>>| {
            let mut mappings = mappings.iter().flatten();
            let root = mappings.find(|mapping| mapping.container == 0 && mapping.size > 0);
            root.map_or(0, |mapping| mapping.host)
        };
        Some((root(&linux.uid_mappings), root(&linux.gid_mappings)))
    }

    /// `linux.resources`, not checked yet.
    ///
    /// # Errors
    /// A value has the wrong type.
    pub fn resources(&self) -> Result<Resources, resources::Error> {
        match self.linux.as_ref().and_then(|linux| linux.resources.as_ref()) {
            Some(text) => Resources::parse(text.get().as_bytes()),
            None => Ok(Resources::default()),
        }
    }

    /// Whether mounts that are made in the container have to reach the host, because its rootfs or one of its
    /// mounts is shared with the host. Mounts in a mount namespace of the unit would not reach the host.
    pub fn shares_mounts_with_host(&self) -> bool {
        let shared = |word: &str| matches!(word, "shared" | "rshared");
        let rootfs =
            self.linux.as_ref().and_then(|linux| linux.rootfs_propagation.as_deref()).is_some_and(shared);
        let mounts = self.mounts.iter().flatten().flat_map(|mount| mount.options.iter().flatten());
        rootfs || mounts.map(String::as_str).any(shared)
    }
}

/// The changes of the shim to a spec.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Edits {
    /// `linux.cgroupsPath`
    pub cgroups_path: Option<PathBuf>,
    /// `annotations`: one to add, with its value, unless the client has set it.
    pub annotation: Option<(&'static str, PathBuf)>,
    /// `process.env`: variables to add.
    pub env: Vec<String>,
    /// `mounts`: files of the host to mount in the container. Each has its path on the host and its path in the container.
    pub binds: Vec<(PathBuf, String)>,
}

/// What [`edit`] finds in a spec.
#[derive(Debug, PartialEq, Eq)]
pub struct Found {
    /// The namespaces of the container.
    pub namespaces: Vec<Namespace>,
    /// The user on the host that the cgroup of the container must belong to, if not root.
    pub cgroup_owner: Option<u32>,
}

/// Edits a bundle's spec, replacing the file in one step. Returns the namespaces in it.
///
/// # Errors
/// As [`Spec::read`]; or the file can't be written, and the old file stays.
pub fn edit(bundle: &Path, edits: &Edits) -> Result<Found, Error> {
    let path = bundle.join(CONFIG);
    let (text, found) = edited_with(&read_config(&path)?, edits)
        .map_err(|source| Error::Malformed { path: path.clone(), source })?;
    if *edits != Edits::default() {
        let new = bundle.join(".config.json.new");
        let mode = fs::metadata(&path).map_err(io_error("read the mode of", &path))?.permissions();
        files::replace(&path, &new, mode.mode() & MODE, &text).map_err(io_error("replace", &path))?;
    }
    Ok(found)
}

/// Makes a new spec of the bundle's spec with all of its fields, or of `None` if the bundle has no spec: for a sandbox
/// without a spec from its client, containerd writes no file or an empty file. Blocks the thread while there are other
/// large specs.
///
/// # Errors
/// As [`Spec::read`]; or the file can't be written.
pub fn rewrite_whole(bundle: &Path, new: impl FnOnce(Option<Value>) -> Value) -> Result<(), Error> {
    let path = bundle.join(CONFIG);
    let (old, _turn) = match read_in_turn(&path) {
        Ok((text, turn)) if text.is_empty() || text == b"{}" => (None, Some(turn)),
        Ok((text, turn)) => {
            let old = serde_json::from_slice(&text).map_err(|source| Error::Malformed { path, source })?;
            (Some(old), Some(turn))
        }
        Err(Error::Io(error)) if error.io().kind() == io::ErrorKind::NotFound => (None, None),
        Err(error) => return Err(error),
    };
    write_whole(bundle, &new(old))
}

/// Writes the bundle's spec, and replaces an existing one.
///
/// # Errors
/// [`Error::Io`]
pub fn write_whole(bundle: &Path, spec: &Value) -> Result<(), Error> {
    let path = bundle.join(CONFIG);
    let new = bundle.join(".config.json.new");
    Ok(files::replace(&path, &new, 0o600, spec.to_string().as_bytes()).map_err(io_error("replace", &path))?)
}

/// The fields of a JSON object in their order, each as its original text.
type Fields<'t> = Members<&'t RawValue>;

/// The parts of a spec that an edit may need. The elements of the lists are not looked at, as there may be millions.
struct Parts<'t> {
    spec: Fields<'t>,
    linux: Fields<'t>,
    namespaces: Vec<Namespace>,
    process: Fields<'t>,
    annotations: Fields<'t>,
}

impl<'t> Parts<'t> {
    /// Parses all fields that an edit may need, so that a spec that was accepted once can be edited later.
    fn of(text: &'t str) -> Result<Self, serde_json::Error> {
        let spec: Fields<'_> = serde_json::from_str(text)?;
        let (linux, process): (Fields<'_>, Fields<'_>) = (member(&spec, "linux")?, member(&spec, "process")?);
        let _: Vec<IgnoredAny> = member(&process, "env")?;
        let _: Vec<IgnoredAny> = member(&spec, "mounts")?;
        let (namespaces, annotations) = (member(&linux, "namespaces")?, member(&spec, "annotations")?);
        Ok(Self { spec, linux, namespaces, process, annotations })
    }
}

#[cfg(test)]
fn edited(text: &[u8], edits: &Edits) -> Result<Vec<u8>, serde_json::Error> {
    edited_with(text, edits).map(|(text, _)| text)
}

/// The edited text, and what was found in it.
fn edited_with(text: &[u8], edits: &Edits) -> Result<(Vec<u8>, Found), serde_json::Error> {
    let text = canonical(text, &SHAPE, Others::Kept)?;
    let Parts { mut spec, mut linux, namespaces, mut process, mut annotations } = Parts::of(&text)?;
    let cgroup_owner = cgroup_owner::find(&spec, &linux, &process, &namespaces);
    let (annotation, new_annotations, cgroups_path, new_linux, env, new_process, mounts);
    if let Some((name, value)) = &edits.annotation
        && annotations.get(name).is_none()
    {
        annotation = to_raw_value(&value.to_string_lossy())?;
        annotations.insert(name, &annotation);
        new_annotations = to_raw_value(&annotations)?;
        spec.insert("annotations", &new_annotations);
    }
    if let Some(path) = &edits.cgroups_path {
        cgroups_path = to_raw_value(&path.to_string_lossy())?;
        linux.insert("cgroupsPath", &cgroups_path);
        new_linux = to_raw_value(&linux)?;
        spec.insert("linux", &new_linux);
    }
    if !edits.env.is_empty() {
        env = extended(process.get("env"), &edits.env)?;
        process.insert("env", &env);
        new_process = to_raw_value(&process)?;
        spec.insert("process", &new_process);
    }
    if !edits.binds.is_empty() {
        let bind = |(source, destination): &(PathBuf, String)| {
            let mut mount = Mount::default();
            mount.set_destination(destination.into()).set_source(Some(source.into()));
            mount.set_typ(Some("bind".to_owned())).set_options(Some(vec!["bind".to_owned()]));
            mount
        };
        mounts = extended(spec.get("mounts"), &edits.binds.iter().map(bind).collect::<Vec<_>>())?;
        spec.insert("mounts", &mounts);
    }
    Ok((serde_json::to_vec(&spec)?, Found { namespaces, cgroup_owner }))
}

/// A list of canonical JSON with more elements.
fn extended(
    list: Option<&&RawValue>,
    more: &[impl serde::Serialize],
) -> Result<Box<RawValue>, serde_json::Error> {
    let more = serde_json::to_string(more)?;
    let Some(list) = list.and_then(|list| list.get().strip_suffix(']')).filter(|list| *list != "[") else {
        return RawValue::from_string(more);
    };
    RawValue::from_string(format!("{list},{}", more.strip_prefix('[').unwrap_or_default()))
}

/// A member of an object; the default if the member is absent.
fn member<'t, T: Default + Deserialize<'t>>(object: &Fields<'t>, name: &str) -> Result<T, serde_json::Error> {
    object.get(name).map_or_else(|| Ok(T::default()), |value| serde_json::from_str(value.get()))
}

pub(super) fn read_config(path: &Path) -> Result<Vec<u8>, Error> {
    files::read_regular(path, MAX_CONFIG_BYTES).map_err(|source| match source.kind() {
        io::ErrorKind::FileTooLarge => Error::TooLarge { path: path.to_owned() },
        _ => io_error("read", path)(source).into(),
    })
}

/// As [`read_config`], once there is memory to parse the file. What is parsed from it must be dropped before the turn.
pub(super) fn read_in_turn(path: &Path) -> Result<(Vec<u8>, Turn<'static>), Error> {
    let size = fs::metadata(path).map_err(io_error("read", path))?.len().min(MAX_CONFIG_BYTES);
    let turn = turns::turn(size)?;
    match files::read_regular(path, size) {
        // The file has grown meanwhile, or it is larger than any spec.
        Err(error) if error.kind() == io::ErrorKind::FileTooLarge => drop(turn),
        read => return Ok((read.map_err(io_error("read", path))?, turn)),
    }
    let turn = turns::turn(MAX_CONFIG_BYTES)?;
    Ok((read_config(path)?, turn))
}

#[cfg(test)]
mod tests;
