//! Options of the runtime, with the names that runc's options have in containerd's configuration (pure, except for
//! reading a file that the configuration names).

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use serde::Deserialize;

use crate::cgroup;
use crate::files;
use crate::id::Namespace;
use crate::path_error::{PathError, io_error};
use crate::task::request::{Log, Runtime};

use super::criu;
use super::turns::{self, Busy};

/// The state directory that containerd-shim-runc-v2 uses, so that `runc --root` works as usual.
pub const DEFAULT_ROOT: &str = "/run/containerd/runc";
const DEFAULT_BINARY: &str = "runc";
const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// TOML of many short texts needs this much more memory than JSON while it is parsed.
const TOML_WEIGHT: u64 = 4;

/// The largest options file, in bytes.
const MAX_FILE_BYTES: u64 = 1 << 20;

/// Why the options are refused.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Too many bytes are being parsed.
    #[error("runtime options: {0}")]
    Busy(#[from] Busy),
    /// A path for criu is not usable.
    #[error("runtime options: {0}")]
    Criu(#[from] criu::Invalid),
    /// A file that the options name can't be read.
    #[error("runtime options: {0}")]
    File(#[from] PathError),
    /// The options are not TOML, a value has the wrong type, or a key does not exist.
    #[error("runtime options in {place}: {reason}")]
    Malformed {
        /// The source of the options.
        place: String,
        /// The error, on one line.
        reason: String,
    },
    /// The runtime's binary does not exist. Docker looks for the last words of the message, which are those of Go.
    #[error(
        "the OCI runtime {name:?} (option BinaryName) is not in {path}: executable file not found in $PATH"
    )]
    NoBinary {
        /// The text of the client.
        name: String,
        /// The directories that were searched.
        path: String,
    },
    /// The runtime's binary has a path at which there is none. Docker looks for the last words of the message.
    #[error("the OCI runtime {path:?} (option BinaryName) {flaw}")]
    NotABinary {
        /// The text of the client.
        path: String,
        /// What is wrong.
        flaw: &'static str,
    },
    /// A directory is not absolute.
    #[error("runtime options: Root {root:?} must be an absolute path without \"..\"")]
    Root {
        /// The text of the client.
        root: String,
    },
    /// A path is not a cgroup.
    #[error(
        "runtime options: ShimCgroup {cgroup:?} must be a path from the root of the cgroup hierarchy, such as \"/my.slice\", without \"..\""
    )]
    ShimCgroup {
        /// The text of the client.
        cgroup: String,
    },
    /// The log mode does not exist.
    #[error(
        "runtime options: Log {log:?} is not one of \"auto\", \"client\", \"journal\", \"tee\" and \"none\""
    )]
    Log {
        /// The text of the client.
        log: String,
    },
}

impl Error {
    /// An error in the options of this place.
    pub(crate) fn malformed(place: &str, reason: String) -> Self {
        Self::Malformed { place: place.to_owned(), reason }
    }
}

/// Options by their names in containerd's configuration. Every valid option of runc is accepted, even if it has no
/// effect here, so that a block copied from runc works.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "PascalCase", deny_unknown_fields, default)]
pub struct Options {
    /// The OCI runtime, a name or a path.
    pub binary_name: String,
    /// The OCI runtime's state directory; the namespace is added.
    pub root: String,
    /// `--no-pivot`
    pub no_pivot_root: bool,
    /// `--no-new-keyring`
    pub no_new_keyring: bool,
    /// Owner of the container's pipe ends.
    pub io_uid: u32,
    /// Group of the container's pipe ends.
    pub io_gid: u32,
    /// Where output goes: `auto`, `client`, `journal`, `tee` or `none`; empty means `auto`.
    pub log: String,
    /// Properties of the units of containers: name and GVariant text.
    pub properties: BTreeMap<String, String>,
    /// Properties that annotations may set in addition to the harmless ones, even if `properties` sets them.
    pub annotation_properties: Vec<String>,
    /// Containers may notify systemd (sd_notify(3)).
    pub notify: bool,
    /// How long a command of the OCI runtime may take, in seconds; 0 for the default.
    pub runtime_timeout_sec: u32,
    /// Has no effect: the form of `linux.cgroupsPath` decides how the shim reads it.
    pub systemd_cgroup: bool,
    /// The cgroup in which the OCI runtime creates the container and its execs, instead of one of the
    /// daemon's. (Under containerd-shim-runc-v2 the shim's own process lives there.)
    pub shim_cgroup: String,
    /// Has no effect: containerd 2.0 has removed it.
    pub criu_path: String,
    /// Has no effect: containerd translates it into a checkpoint.
    pub criu_image_path: String,
    /// criu's work directory for a restore, which is kept.
    pub criu_work_path: String,
    /// Has no effect in the shim: containerd reads it.
    pub task_api_address: String,
    /// Has no effect in the shim: containerd reads it.
    pub task_api_version: u32,
    /// Has no effect: containerd sends it with the options.
    pub type_url: String,
}

/// The names of all options.
const NAMES: [&str; 19] = [
    "AnnotationProperties",
    "BinaryName",
    "CriuImagePath",
    "CriuPath",
    "CriuWorkPath",
    "IoGid",
    "IoUid",
    "Log",
    "NoNewKeyring",
    "NoPivotRoot",
    "Notify",
    "Properties",
    "Root",
    "RuntimeTimeoutSec",
    "ShimCgroup",
    "SystemdCgroup",
    "TaskApiAddress",
    "TaskApiVersion",
    "TypeUrl",
];

/// Options in the form in which the client sent them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum OptionsSource {
    /// A message, or no options.
    Given(Box<Options>),
    /// TOML text (`ConfigBody`).
    Toml(String),
    /// The path of a TOML file (`ConfigPath`).
    File(PathBuf),
}

impl Default for OptionsSource {
    fn default() -> Self {
        Self::Given(Box::default())
    }
}

impl OptionsSource {
    /// True if the options are in a file.
    #[cfg(any(test, fuzzing))]
    pub fn is_file(&self) -> bool {
        matches!(self, Self::File(_))
    }

    /// The options. Blocks the thread while many bytes of other options or specs are parsed.
    ///
    /// # Errors
    /// The file can't be read, or the TOML has other keys or types.
    pub fn read(self) -> Result<Options, Error> {
        let length = match &self {
            Self::Given(_) => 0,
            Self::Toml(text) => text.len() as u64,
            Self::File(path) => fs::metadata(path).map_or(0, |file| file.len().min(MAX_FILE_BYTES)),
        };
        let _turn = turns::turn(length * TOML_WEIGHT)?;
        match self {
            Self::Given(options) => Ok(*options),
            Self::Toml(text) => Options::from_toml(&text, "ConfigBody"),
            Self::File(path) => Options::from_file(&path),
        }
    }
}

impl Options {
    /// Parses TOML. containerd sends options in this form if it does not know the options of the runtime.
    ///
    /// # Errors
    /// [`Error::Malformed`], which names the key.
    pub fn from_toml(text: &str, place: &str) -> Result<Self, Error> {
        let exact = toml::from_str(text);
        // The error of the unchanged text has the right line number.
        exact
            .or_else(|error| Self::in_any_case(text).ok_or(error))
            .map_err(|error| Error::malformed(place, one_line(&error)))
    }

    /// Reads the options with names in any case, as containerd does for runc's options.
    fn in_any_case(text: &str) -> Option<Self> {
        Self::from_table(text.parse().ok()?).ok()
    }

    /// The first option whose value has a wrong type.
    fn of_wrong_type(text: &str) -> Option<&'static str> {
        let table: toml::Table = text.parse().ok()?;
        let is_wrong = |name: &&&str| {
            let given = table.iter().find(|(key, _)| name.eq_ignore_ascii_case(key));
            given.is_some_and(|(_, value)| {
                Self::from_table([((**name).to_owned(), value.clone())].into_iter().collect()).is_err()
            })
        };
        NAMES.iter().find(is_wrong).copied()
    }

    /// Reads the options of a table, with names in any case.
    ///
    /// # Errors
    /// It names the key.
    pub(crate) fn from_table(table: toml::Table) -> Result<Self, toml::de::Error> {
        let mut named = toml::Table::new();
        for (key, value) in table {
            let known = NAMES.iter().find(|name| name.eq_ignore_ascii_case(&key));
            let name = known.map_or(key, |name| (*name).to_owned());
            if named.contains_key(&name) {
                return Err(serde::de::Error::custom(format!("duplicate field `{name}`")));
            }
            named.insert(name, value);
        }
        named.try_into()
    }

    /// Parses a TOML file (`ConfigPath`). An error shows no text of the file but a key: the file may be another one
    /// than the client meant, with secrets.
    ///
    /// # Errors
    /// As [`Self::from_toml`], or the file can't be read.
    pub fn from_file(path: &Path) -> Result<Self, Error> {
        let text = files::read_regular(path, MAX_FILE_BYTES)
            .and_then(|text| String::from_utf8(text).map_err(|_| io::ErrorKind::InvalidData.into()))
            .map_err(io_error("read", path))?;
        let exact = toml::from_str(&text);
        exact.or_else(|error| Self::in_any_case(&text).ok_or(error)).map_err(|error: toml::de::Error| {
            let before = error.span().and_then(|span| text.get(..span.start)).unwrap_or_default();
            let line = before.matches('\n').count() + 1;
            let option = Self::of_wrong_type(&text).map_or(String::new(), |name| format!("{name}: "));
            let reason = format!("line {line}: {option}{}", without_values(error.message()));
            Error::malformed(&path.to_string_lossy(), reason)
        })
    }

    /// The OCI runtime that the options name. Its binary is searched in `path`, containerd's `PATH`.
    ///
    /// # Errors
    /// The binary does not exist, `Root` is relative, or `Log` is unknown.
    pub fn resolve(&self, namespace: &Namespace, path: &str) -> Result<Runtime, Error> {
        let path = if path.is_empty() { DEFAULT_PATH } else { path };
        let name = if self.binary_name.is_empty() { DEFAULT_BINARY } else { &self.binary_name };
        let root = Path::new(if self.root.is_empty() { DEFAULT_ROOT } else { &self.root });
        if !files::is_plain(root) {
            return Err(Error::Root { root: self.root.clone() });
        }
        if !self.criu_work_path.is_empty() {
            criu::client_path("work path (option CriuWorkPath)", Path::new(&self.criu_work_path))?;
        }
        Ok(Runtime {
            criu_work: PathBuf::from(&self.criu_work_path),
            binary: find(name, path).ok_or_else(|| not_found(name, path))?,
            root: root.join(namespace.as_str()),
            no_pivot: self.no_pivot_root,
            no_new_keyring: self.no_new_keyring,
            io_owner: (self.io_uid, self.io_gid),
            path: path.to_owned(),
            environment: PathBuf::new(),
            cgroup: shim_cgroup(&self.shim_cgroup)?,
            log: log_mode(&self.log)?,
            limit_sec: self.runtime_timeout_sec,
        })
    }
}

/// The message of a TOML error in one line. The parser shows the line of the text on separate lines.
pub(crate) fn one_line(error: &toml::de::Error) -> String {
    let text = error.to_string();
    let lines = text.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('|'));
    lines.collect::<Vec<_>>().join(" ")
}

/// The message of an error of TOML, without the value that serde puts into it.
fn without_values(message: &str) -> String {
    if message.starts_with("unknown field") {
        return message.to_owned();
    }
    match message.rsplit_once(", expected ") {
        Some((_, "u32")) => format!("expected a whole number from 0 to {}", u32::MAX),
        Some((_, "a map")) => "expected a table".to_owned(),
        Some((_, "a sequence")) => "expected a list".to_owned(),
        Some((_, "a boolean")) => "expected true or false".to_owned(),
        Some((_, expected)) => format!("expected {expected}"),
        None => message.split(['`', '"', '\n']).next().unwrap_or_default().trim_end().to_owned(),
    }
}

/// A path below the root of the cgroup hierarchy, as cgroups(7) and /proc/PID/cgroup write it.
fn shim_cgroup(text: &str) -> Result<Option<PathBuf>, Error> {
    if text.is_empty() {
        return Ok(None);
    }
    let path = Path::new(text);
    let is_plain = path
        .components()
        .all(|part| matches!(part, std::path::Component::RootDir | std::path::Component::Normal(_)));
    let is_below_root = path.parent().is_some() && !text.contains('\0');
    // The text is a path in the file system, and not one in the hierarchy.
    let is_doubled = path.starts_with(cgroup::ROOT);
    if path.is_absolute() && is_plain && is_below_root && !is_doubled {
        Ok(Some(path.to_owned()))
    } else {
        Err(Error::ShimCgroup { cgroup: text.to_owned() })
    }
}

fn log_mode(text: &str) -> Result<Log, Error> {
    match text {
        "" | "auto" => Ok(Log::Auto),
        "client" => Ok(Log::Client),
        "journal" => Ok(Log::Journal),
        "tee" => Ok(Log::Tee),
        "none" => Ok(Log::None),
        other => Err(Error::Log { log: other.chars().take(80).collect() }),
    }
}

/// The program of this name in `path`, or the program at this absolute path.
pub(crate) fn find(name: &str, path: &str) -> Option<PathBuf> {
    let executable =
        |path: &Path| path.is_file() && nix::unistd::access(path, nix::unistd::AccessFlags::X_OK).is_ok();
    if name.contains('/') {
        let path = PathBuf::from(name);
        return (path.is_absolute() && executable(&path)).then_some(path);
    }
    path.split(':').map(|dir| Path::new(dir).join(name)).find(|path| path.is_absolute() && executable(path))
}

/// Why [`find`] finds nothing.
fn not_found(name: &str, path: &str) -> Error {
    if !name.contains('/') {
        return Error::NoBinary { name: name.to_owned(), path: path.to_owned() };
    }
    let flaw = match Path::new(name) {
        path if path.is_relative() => "must be a name or an absolute path",
        path if path.exists() => "is not a file that can be executed: permission denied",
        _ => "does not exist: no such file or directory",
    };
    Error::NotABinary { path: name.to_owned(), flaw }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_case_of_a_name_does_not_matter() {
        for name in NAMES {
            let error = Options::from_toml(&format!("{} = [[]]", name.to_lowercase()), "x").unwrap_err();
            assert!(error.to_string().contains("unknown field"), "{error}");
            // An unknown name would be refused as such.
            let exact = toml::from_str::<Options>(&format!("{name} = [[]]")).unwrap_err();
            assert!(!exact.to_string().contains("unknown field"), "{name}: {exact}");
        }
        let text = "binaryName = \"crun\"\nsystemdcgroup = true\nIOUID = 7\n[properties]\nTasksMax = \"5\"\n";
        let options = Options::from_toml(text, "x").unwrap();
        assert_eq!((options.binary_name.as_str(), options.systemd_cgroup, options.io_uid), ("crun", true, 7));
        assert_eq!(options.properties.get("TasksMax").map(String::as_str), Some("5"));
        assert!(Options::from_toml("Root = \"/a\"\nroot = \"/b\"", "x").is_err());
    }

    #[test]
    fn a_block_copied_from_runc_works() {
        let text =
            "BinaryName = \"crun\"\nSystemdCgroup = true\nRoot = \"/run/x\"\nCriuWorkPath = \"\"\nIoUid = 7";
        let options = Options::from_toml(text, "ConfigBody").unwrap();
        assert_eq!(
            (options.binary_name.as_str(), options.root.as_str(), options.io_uid),
            ("crun", "/run/x", 7)
        );
    }

    #[test]
    fn properties_of_units_are_a_table() {
        let text = "Log = \"tee\"\n[Properties]\nTimeoutStopSec = \"5\"\nAfter = \"['a.service']\"";
        let options = Options::from_toml(text, "ConfigBody").unwrap();
        let properties: Vec<_> = options.properties.iter().map(|(name, value)| (&**name, &**value)).collect();
        assert_eq!(properties, [("After", "['a.service']"), ("TimeoutStopSec", "5")]);
        let error = Options::from_toml("[Properties]\nTimeoutStopSec = 5", "ConfigBody").unwrap_err();
        assert!(error.to_string().contains("TimeoutStopSec"), "{error}");
    }

    #[test]
    fn an_unknown_key_is_named() {
        let error = Options::from_toml("BinaryNmae = \"crun\"", "ConfigBody").unwrap_err();
        let text = format!("{error}");
        assert!(text.contains("BinaryNmae") && text.contains("ConfigBody"), "{text}");
    }

    #[test]
    fn an_error_in_a_file_shows_its_line_number_and_no_text_of_the_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        for text in [
            "root:hunter2:1\n",
            "# a\nRoot = hunter2\n",
            "\nIoUid = \"hunter2",
            "Root = [ \"hunter2\" ]",
            "a = 1\nIoUid = \"hunter2\"",
            "Root = \"a\"\nRoot = \"hunter2\"",
        ] {
            std::fs::write(&path, text).unwrap();
            let error = Options::from_file(&path).unwrap_err().to_string();
            assert!(!error.contains("hunter2") && !error.contains('\n'), "{error}");
            let line = 1 + text.trim_end().matches('\n').count();
            assert!(error.contains(&format!("{}: line {line}: ", path.display())), "{error}");
        }
    }

    #[test]
    fn a_binary_that_is_not_there_is_named() {
        let namespace = Namespace::new("default").unwrap();
        let options = Options { binary_name: "no-such-runtime".to_owned(), ..Options::default() };
        let error = options.resolve(&namespace, "/usr/bin:/bin").unwrap_err();
        assert!(error.to_string().contains("no-such-runtime"));
        let relative = Options { binary_name: "./sh".to_owned(), ..Options::default() };
        assert!(relative.resolve(&namespace, "/bin").is_err());
    }

    #[test]
    fn an_unknown_log_mode_is_named() {
        assert_eq!(log_mode("tee").unwrap(), Log::Tee);
        let options =
            Options { log: "syslog".to_owned(), binary_name: "sh".to_owned(), ..Options::default() };
        let error = options.resolve(&Namespace::new("default").unwrap(), "/bin").unwrap_err();
        assert!(error.to_string().contains("syslog") && error.to_string().contains("journal"), "{error}");
    }

    #[test]
    fn the_namespace_is_part_of_the_root() {
        let namespace = Namespace::new("k8s.io").unwrap();
        let options = Options { binary_name: "sh".to_owned(), ..Options::default() };
        let runtime = options.resolve(&namespace, "/nowhere:/bin").unwrap();
        assert_eq!(runtime.root, Path::new("/run/containerd/runc/k8s.io"));
        assert_eq!(runtime.binary, Path::new("/bin/sh"));
        let relative = Options { root: "x/y".to_owned(), binary_name: "sh".to_owned(), ..Options::default() };
        assert!(matches!(relative.resolve(&namespace, "/bin"), Err(Error::Root { .. })));
    }
}
