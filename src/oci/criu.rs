//! criu, with which the OCI runtime dumps and restores processes: what a client may request, what criu must be able to do,
//! and what criu must know about the streams of a container.
//!
//! The streams of a container are FIFOs on the host, which do not exist in the container's mount namespace. criu dumps
//! such a file only if it is declared as external, and restores it only from a descriptor that it inherits. The OCI
//! runtime declares only anonymous pipes. So `launch` declares the FIFOs in a configuration file of criu
//! (`CRIU_CONFIG_FILE`, criu(8)), and notes their names beside the images for the restore.

pub mod images;

use std::ffi::OsString;
use std::fmt::Write;
use std::fs;
use std::io::{self, Read, Seek, SeekFrom};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::OFlag;
use serde::{Deserialize, Serialize};

use crate::files;
use crate::path_error::{PathError, io_error};

/// The variable with the path of a configuration file (criu(8)).
pub const CONFIG_VARIABLE: &str = "CRIU_CONFIG_FILE";

/// The log of a dump in criu's work directory, as runc and crun name it.
pub const DUMP_LOG: &str = "dump.log";

/// The log of a restore in criu's work directory.
pub const RESTORE_LOG: &str = "restore.log";

/// The oldest usable version, major and minor: the first with `--skip-file-rwx-check`.
const OLDEST: (u32, u32) = (3, 17);

/// The file with the [`Notes`] among the images. containerd packs and unpacks it with them.
const NOTES: &str = "containerd-shim-systemd-v1.json";

/// The largest [`Notes`], in bytes.
const MAX_NOTES: u64 = 64 << 10;

/// The longest path that a client may name, as the kernel's.
const MAX_PATH: usize = 4096;

/// The largest log that is copied, in bytes.
const MAX_LOG: u64 = 64 << 20;

/// How much of the end of a log is searched for the success of a dump, in bytes.
const LOG_TAIL: u64 = 1 << 20;

/// A request for a checkpoint that is not valid.
#[derive(Debug, thiserror::Error)]
pub enum Invalid {
    /// A path is not usable.
    #[error(
        "checkpoint: {what} {path:?} must be an absolute path without \"..\" of at most {MAX_PATH} bytes"
    )]
    Path {
        /// The purpose of the path.
        what: &'static str,
        /// The beginning of the path.
        path: String,
    },
    /// The mode for cgroups does not exist.
    #[error("checkpoint: cgroups mode {mode:?} must be soft, full, strict or ignore")]
    CgroupsMode {
        /// The text of the client.
        mode: String,
    },
    /// A namespace of this kind can't be restored empty.
    #[error("checkpoint: namespace {namespace:?} can't be empty, only \"network\" can")]
    Namespace {
        /// The text of the client.
        namespace: String,
    },
}

/// A request for a checkpoint, checked.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Checkpoint {
    /// The directory for the images.
    pub image: PathBuf,
    /// criu's work directory, if the client names one. It is kept.
    pub work: Option<PathBuf>,
    /// The container ends with the checkpoint.
    pub exit: bool,
    /// Connections over TCP are dumped too.
    pub open_tcp: bool,
    /// Unix sockets whose other ends are outside of the container are dumped too.
    pub external_unix_sockets: bool,
    /// Terminals are dumped too.
    pub terminal: bool,
    /// Locks of files are dumped too.
    pub file_locks: bool,
    /// Namespaces that are restored empty.
    pub empty_namespaces: Vec<String>,
    /// How cgroups are dumped and restored.
    pub cgroups_mode: String,
}

impl Checkpoint {
    /// Checks what a client has sent.
    ///
    /// # Errors
    /// [`Invalid`]
    pub fn check(self) -> Result<Self, Invalid> {
        client_path("image path", &self.image)?;
        self.work.iter().try_for_each(|path| client_path("work path", path))?;
        let short = |text: &str| text.chars().take(80).collect();
        if !matches!(self.cgroups_mode.as_str(), "" | "soft" | "full" | "strict" | "ignore") {
            return Err(Invalid::CgroupsMode { mode: short(&self.cgroups_mode) });
        }
        match self.empty_namespaces.iter().find(|namespace| *namespace != "network") {
            Some(namespace) => Err(Invalid::Namespace { namespace: short(namespace) }),
            None => Ok(self),
        }
    }

    /// The options of the OCI runtime's command `checkpoint`.
    pub fn arguments(&self, work: &Path) -> Vec<OsString> {
        let mut arguments: Vec<OsString> =
            vec!["--image-path".into(), self.image.clone().into(), "--work-path".into(), work.into()];
        if !self.exit {
            arguments.push("--leave-running".into());
        }
        arguments.extend(self.shared_arguments());
        if !self.cgroups_mode.is_empty() {
            arguments.extend(["--manage-cgroups-mode".into(), (&self.cgroups_mode).into()]);
        }
        arguments
    }

    /// The options of the OCI runtime's command `restore`, for a checkpoint that this request made.
    pub fn restore_arguments(&self, images: &Path, work: &Path) -> Vec<OsString> {
        let mut arguments: Vec<OsString> =
            vec!["--image-path".into(), images.into(), "--work-path".into(), work.into()];
        arguments.extend(self.shared_arguments());
        arguments
    }

    /// The options that both a checkpoint and its restore need.
    fn shared_arguments(&self) -> Vec<OsString> {
        let flags = [
            (self.open_tcp, "--tcp-established"),
            (self.external_unix_sockets, "--ext-unix-sk"),
            (self.terminal, "--shell-job"),
            (self.file_locks, "--file-locks"),
        ];
        flags.iter().filter(|(is_set, _)| *is_set).map(|(_, flag)| flag.into()).collect()
    }

    /// The lines of a configuration that a checkpoint and its restore need both. crun has no option for empty namespaces.
    fn shared_config(&self) -> &'static str {
        if self.empty_namespaces.is_empty() { "" } else { "empty-ns net\n" }
    }
}

/// Checks a path that a client has named.
///
/// # Errors
/// [`Invalid::Path`]
pub fn client_path(what: &'static str, path: &Path) -> Result<(), Invalid> {
    let text = path.as_os_str().as_encoded_bytes();
    if files::is_plain(path) && text.len() < MAX_PATH && !text.contains(&0) {
        return Ok(());
    }
    Err(Invalid::Path { what, path: path.to_string_lossy().chars().take(200).collect() })
}

/// Why criu can't be used.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[serde(tag = "problem", rename_all = "snake_case")]
pub enum Problem {
    /// criu is not installed.
    #[error("criu is not installed: no program of this name is in {path:?}, the PATH of the OCI runtime")]
    Missing {
        /// The search path.
        path: String,
    },
    /// criu is too old.
    #[error("criu {version} is too old: {oldest} is the oldest that can be used", oldest = oldest())]
    Old { version: String },
    /// The OCI runtime has no support for criu.
    #[error("the OCI runtime can't make checkpoints: {reason}")]
    NoSupport {
        /// The error of the OCI runtime.
        reason: String,
    },
    /// The OCI runtime does not find the library of criu.
    #[error("the OCI runtime can't use criu: {reason}; install the library")]
    NoLibrary {
        /// The error of the OCI runtime.
        reason: String,
    },
    /// criu does not work on this machine.
    #[error("criu can't be used on this machine (criu check): {reason}")]
    Unusable {
        /// The error of criu.
        reason: String,
    },
}

impl Problem {
    /// The problem that a failure of the OCI runtime stands for. crun loads the library of criu before it does anything
    /// else, and not every build of it can. `None` for any other failure.
    pub fn of_runtime(reason: &str) -> Option<Self> {
        let short = || reason.chars().take(400).collect();
        if reason.contains("could not load `libcriu") {
            Some(Self::NoLibrary { reason: short() })
        } else if reason.to_lowercase().contains("compiled without criu support") {
            Some(Self::NoSupport { reason: short() })
        } else {
            None
        }
    }
}

fn oldest() -> String {
    format!("{}.{}", OLDEST.0, OLDEST.1)
}

/// Checks the output of `criu --version`.
///
/// # Errors
/// [`Problem::Old`], [`Problem::Unusable`]
pub fn check_version(output: &str) -> Result<(), Problem> {
    let version = output.lines().find_map(|line| line.trim().strip_prefix("Version:")).map(str::trim);
    let Some(version) = version else {
        return Err(Problem::Unusable { reason: "criu --version prints no version".to_owned() });
    };
    let mut numbers = version.split(['.', '-', ' ']).map_while(|number| number.parse::<u32>().ok());
    let found = (numbers.next().unwrap_or_default(), numbers.next().unwrap_or_default());
    if found >= OLDEST { Ok(()) } else { Err(Problem::Old { version: version.chars().take(40).collect() }) }
}

/// What a restore must know about its checkpoint in addition to the images.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Notes {
    /// The streams of the container that were FIFOs: number, and criu's name for the file.
    pub streams: Vec<(u8, String)>,
    #[serde(default)]
    pub request: Checkpoint,
}

impl Notes {
    /// Reads the notes in the directory of the images. Images without notes were made by another runtime.
    ///
    /// # Errors
    /// The file can't be read, or is not valid.
    pub fn read(images: &Path) -> io::Result<Self> {
        let text = match files::read_regular(&images.join(NOTES), MAX_NOTES) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Self::default()),
            text => text?,
        };
        let notes: Self = serde_json::from_slice(&text)?;
        let is_valid = notes.streams.len() <= 3
            && notes.streams.iter().all(|(number, name)| *number <= 2 && is_file_name(name));
        let request = Checkpoint { image: "/".into(), work: None, ..notes.request.clone() };
        if !is_valid || request.check().is_err() {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "the shim has not written these notes"));
        }
        Ok(notes)
    }

    /// Writes the notes to the directory of the images. Makes the directory if it does not exist.
    ///
    /// # Errors
    /// The directory can't be made, or the file can't be written.
    pub fn write(&self, images: &Path) -> io::Result<()> {
        make_dir(images)?;
        let new = images.join(format!(".{NOTES}.new"));
        files::replace(&images.join(NOTES), &new, 0o600, &serde_json::to_vec(self)?)
    }

    /// The configuration for a dump.
    pub fn dump_config(&self) -> String {
        let mut text = self.request.shared_config().to_owned();
        for (_, name) in &self.streams {
            // Writing to a string does not fail.
            let _ = writeln!(text, "external {name}");
        }
        text
    }

    /// The configuration for a restore. The streams of the new container have the numbers of the old ones.
    pub fn restore_config(&self) -> String {
        let mut text = self.request.shared_config().to_owned();
        for (number, name) in &self.streams {
            let _ = writeln!(text, "inherit-fd fd[{number}]:{name}");
        }
        if !self.streams.is_empty() {
            // The client of the restored container may have made its FIFOs with other permissions.
            text.push_str("skip-file-rwx-check\n");
        }
        text
    }
}

/// Makes a directory of criu, for root only, if it does not exist. runc makes it itself, crun does not.
///
/// # Errors
/// The directory can't be made, for example because its parent does not exist, or because a file has its name.
pub fn make_dir(dir: &Path) -> io::Result<()> {
    match fs::DirBuilder::new().mode(0o700).create(dir) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => match fs::metadata(dir)?.is_dir() {
            true => Ok(()),
            false => Err(Errno::ENOTDIR.into()),
        },
        made => made,
    }
}

/// Removes the log of an earlier command of criu, which must not be mistaken for the log of the next one.
///
/// # Errors
/// The log can't be removed.
pub fn remove_log(log: &Path) -> Result<(), PathError> {
    match fs::remove_file(log) {
        Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => {
            Ok(())
        }
        removed => removed.map_err(io_error("remove", log)),
    }
}

/// The annotation with the path of a configuration file of criu, for runc and crun.
pub const CONFIG_ANNOTATION: &str = "org.criu.config";

/// The configuration for a restore that overrides the options of the OCI runtime. The OCI runtime starts criu in the cgroup
/// of the new container, where the processes have to stay, but criu would move them to the cgroup of the dumped container.
/// runc 1.1 has an option against this, but does not pass it to criu. `usual` is the OCI runtime's own configuration file,
/// which this configuration replaces.
pub fn overriding_config(usual: &Path) -> String {
    let text = files::read_regular(usual, MAX_NOTES).unwrap_or_default();
    format!("{}\nmanage-cgroups=ignore\n", String::from_utf8_lossy(&text))
}

/// criu's name of an open file: its mount and its inode, both in hexadecimal (`dump_one_reg_file`, files-reg.c).
fn file_name(mount: u64, inode: u64) -> String {
    format!("file[{mount:x}:{inode:x}]")
}

fn is_file_name(name: &str) -> bool {
    let inner = name.strip_prefix("file[").and_then(|rest| rest.strip_suffix(']'));
    let is_hex =
        |text: &str| (1..=16).contains(&text.len()) && text.bytes().all(|byte| byte.is_ascii_hexdigit());
    inner.and_then(|inner| inner.split_once(':')).is_some_and(|(mount, inode)| is_hex(mount) && is_hex(inode))
}

/// criu's name of the file that these processes have open and that is at `path`. `None` if no process has it open.
///
/// # Errors
/// The file at `path` can't be read.
pub fn open_file(path: &Path, pids: &[u32]) -> io::Result<Option<String>> {
    let wanted = fs::metadata(path)?;
    let is_it = |found: &fs::Metadata| found.dev() == wanted.dev() && found.ino() == wanted.ino();
    for pid in pids {
        let dir = PathBuf::from(format!("/proc/{pid}/fd"));
        // The process may have ended.
        for entry in fs::read_dir(&dir).into_iter().flatten().flatten() {
            if fs::metadata(entry.path()).is_ok_and(|found| is_it(&found))
                && let Some(mount) = mount_of(*pid, &entry.file_name())
            {
                return Ok(Some(file_name(mount, wanted.ino())));
            }
        }
    }
    Ok(None)
}

/// The number of the mount through which a descriptor was opened (proc_pid_fdinfo(5)).
fn mount_of(pid: u32, descriptor: &std::ffi::OsStr) -> Option<u64> {
    let text = fs::read_to_string(Path::new(&format!("/proc/{pid}/fdinfo")).join(descriptor)).ok()?;
    text.lines().find_map(|line| line.strip_prefix("mnt_id:"))?.trim().parse().ok()
}

/// The first error in a log of criu, without its time. It causes the errors after it.
pub fn first_error(log: &str) -> Option<String> {
    let error = log.lines().find_map(|line| line.split_once("Error ").map(|(_, error)| error));
    error.map(|error| error.chars().take(400).collect())
}

/// The text of a log of criu, up to [`MAX_LOG`]. `None` if there is no log.
pub fn read_log(log: &Path) -> Option<Vec<u8>> {
    let mut text = Vec::new();
    open_log(log)?.take(MAX_LOG).read_to_end(&mut text).ok()?;
    Some(text)
}

/// True if a dump has succeeded, according to the end of its log.
pub fn has_dumped(log: &Path) -> bool {
    let read = || {
        let mut file = open_log(log)?;
        let length = file.metadata().ok()?.len();
        file.seek(SeekFrom::Start(length.saturating_sub(LOG_TAIL))).ok()?;
        let mut text = Vec::new();
        file.take(LOG_TAIL).read_to_end(&mut text).ok()?;
        Some(text)
    };
    read().is_some_and(|text| String::from_utf8_lossy(&text).contains("Dumping finished successfully"))
}

/// Opens a log in a directory that the client chose: anything but a file is refused, and a FIFO does not block.
fn open_log(log: &Path) -> Option<fs::File> {
    let flags = OFlag::O_NONBLOCK | OFlag::O_NOFOLLOW;
    let file = fs::File::options().read(true).custom_flags(flags.bits()).open(log).ok()?;
    file.metadata().is_ok_and(|found| found.is_file()).then_some(file)
}

#[cfg(test)]
mod tests;
