//! Converts containerd's messages to domain types, and back (pure).

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use containerd_shim_protos::api::{
    CreateTaskRequest, DeleteResponse, ExecProcessRequest, PidsResponse, ProcessInfo, StateResponse,
    Status as ApiStatus, WaitResponse,
};
use containerd_shim_protos::shim::oci::{self, ProcessDetails};
use containerd_shim_protos::types::mount::Mount as ApiMount;
use protobuf::well_known_types::any::Any;
use protobuf::well_known_types::timestamp::Timestamp;
use protobuf::{EnumOrUnknown, Message, MessageField};

use crate::config::STATE_DIR;
use crate::id::{ExecId, InvalidName, Namespace, Owner, ProcessKey, TaskId, TaskKey};
use crate::oci::criu::{self, Checkpoint};
use crate::oci::options::{Options, OptionsSource};
use crate::oci::{bundle, containerd};
use crate::ops::{AddExec, CreateTask, State, Status};
use crate::task::lifecycle::Exit;
use crate::task::request::{Create, Mount, Stdio};
use crate::transport::sockets::COUNT;

use super::messages::{
    GenericOptions, LinuxCheckpointOptions, LinuxCreateOptions, LinuxRuncOptions, SystemdOptions,
};

/// The key of the namespace in ttrpc metadata.
pub const NAMESPACE_KEY: &str = "containerd-namespace-ttrpc";

/// Marks a Delete of our own `delete` command in the metadata: the daemon kills first, and publishes nothing.
pub const CLEAN_UP_KEY: &str = "containerd-shim-systemd-clean-up";

/// Names the containerd that gives the task up, in the metadata of such a Delete.
pub const OWNER_KEY: &str = "containerd-shim-systemd-owner";

/// Why a message can't be converted.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A name is not valid.
    #[error(transparent)]
    Name(#[from] InvalidName),
    /// The metadata names no namespace, and the socket is for all of them.
    #[error(
        "the request has no namespace: containerd before 2.0 names none, and at most {COUNT} of its \
         namespaces can have tasks at once; delete the tasks of a namespace that is not needed"
    )]
    NoNamespace,
    /// The metadata names no namespace, and the lease of the socket is gone.
    #[error(
        "the request has no namespace: containerd before 2.0 names none, and the file in {STATE_DIR}/.sockets \
         that says which one the socket is for is gone; restart containerd, which then gets another socket"
    )]
    NoLease,
    /// The options have an unknown type.
    #[error(
        "runtime options have the unknown type {0:?}: use containerd.runc.v1.Options, \
         runtimeoptions.v1.Options or containerd.systemd.v1.Options"
    )]
    UnknownOptions(String),
    /// The options of a sandbox have an unknown type.
    #[error("options of the sandbox have the unknown type {0:?}: use runtime.v1.PodSandboxConfig, or none")]
    UnknownSandbox(String),
    /// A number is not the id of a user or group.
    #[error("{0} is not the id of a user or group")]
    NoId(i64),
    /// What `start` wrote into the bundle can't be read.
    #[error(transparent)]
    Bundle(#[from] bundle::Error),
    /// A message in the request can't be decoded.
    #[error("{what} of type {type_url:?} can't be decoded: {source}")]
    Broken {
        /// The part of the request.
        what: &'static str,
        type_url: String,
        /// The mistake.
        source: Box<protobuf::Error>,
    },
    /// The request for a checkpoint is not valid.
    #[error(transparent)]
    Checkpoint(#[from] criu::Invalid),
    /// `ConfigBody` is not UTF-8.
    #[error("ConfigBody of the runtime options is not UTF-8 text")]
    NotText,
    /// A message can't be encoded.
    #[error("can't encode a message: {0}")]
    Encode(Box<protobuf::Error>),
}

/// The task of a request.
///
/// # Errors
/// The id is not valid.
pub fn key(namespace: Namespace, id: &str) -> Result<TaskKey, Error> {
    Ok(TaskKey::usual(namespace, TaskId::new(id)?))
}

/// The process of a request; an empty exec id means the init process.
///
/// # Errors
/// An id is not valid.
pub fn process(namespace: Namespace, id: &str, exec: &str) -> Result<ProcessKey, Error> {
    let exec = if exec.is_empty() { None } else { Some(ExecId::new(exec)?) };
    Ok(ProcessKey { task: key(namespace, id)?, exec })
}

/// An Exec request.
///
/// # Errors
/// An id is not valid, or missing.
pub fn exec(namespace: Namespace, request: ExecProcessRequest) -> Result<AddExec, Error> {
    // An empty id would mean the init process.
    let exec = ExecId::new(&request.exec_id)?;
    Ok(AddExec {
        task: key(namespace, &request.id)?,
        exec,
        stdio: Stdio {
            stdin: request.stdin,
            stdout: request.stdout,
            stderr: request.stderr,
            terminal: request.terminal,
        },
        spec: request.spec.into_option().unwrap_or_default().value,
    })
}

/// The namespace that a request names; containerd before 2.0 names none.
///
/// # Errors
/// It is not valid.
pub fn namespace(metadata: &HashMap<String, Vec<String>>) -> Result<Option<Namespace>, Error> {
    let named = metadata.get(NAMESPACE_KEY).and_then(|values| values.first());
    Ok(named.map(Namespace::new).transpose()?)
}

/// The containerd on whose behalf our own `delete` command calls; `None` for any other caller.
///
/// # Errors
/// The name is not valid.
pub fn gives_up(metadata: &HashMap<String, Vec<String>>) -> Result<Option<Owner>, Error> {
    if !metadata.contains_key(CLEAN_UP_KEY) {
        return Ok(None);
    }
    let owner = metadata.get(OWNER_KEY).and_then(|values| values.first());
    Ok(Some(owner.map(Owner::new).transpose()?.unwrap_or_default()))
}

/// A Create request.
///
/// # Errors
/// The id is not valid, or the options are not known.
pub fn create(namespace: Namespace, request: CreateTaskRequest) -> Result<CreateTask, Error> {
    Ok(CreateTask {
        key: key(namespace, &request.id)?,
        options: options(request.options.as_ref())?,
        request: Create {
            bundle: PathBuf::from(request.bundle),
            rootfs: request.rootfs.into_iter().map(mount).collect(),
            sandbox: None,
            checkpoint: (!request.checkpoint.is_empty()).then(|| request.checkpoint.into()),
            // Only the caller knows the socket of the request.
            has_lease: None,
        },
        stdio: Stdio {
            stdin: request.stdin,
            stdout: request.stdout,
            stderr: request.stderr,
            terminal: request.terminal,
        },
    })
}

/// A Checkpoint request.
///
/// # Errors
/// The options are not known, or a path or a mode in them is not valid.
pub fn checkpoint(path: String, options: Option<&Any>) -> Result<Checkpoint, Error> {
    let image = PathBuf::from(path);
    let some = |path: String| (!path.is_empty()).then(|| path.into());
    let any = options.filter(|any| !any.type_url.is_empty());
    let request = match any.map(|any| (any, any.type_url.rsplit('/').next().unwrap_or_default())) {
        None => Checkpoint { image, ..Checkpoint::default() },
        Some((any, "containerd.runc.v1.CheckpointOptions")) => {
            let runc: oci::CheckpointOptions = decode("checkpoint options", any)?;
            Checkpoint {
                image,
                work: some(runc.work_path),
                exit: runc.exit,
                open_tcp: runc.open_tcp,
                external_unix_sockets: runc.external_unix_sockets,
                terminal: runc.terminal,
                file_locks: runc.file_locks,
                empty_namespaces: runc.empty_namespaces,
                cgroups_mode: runc.cgroups_mode,
            }
        }
        Some((any, "containerd.linux.runc.CheckpointOptions")) => {
            let linux: LinuxCheckpointOptions = decode("checkpoint options", any)?;
            Checkpoint {
                image,
                work: some(linux.work_path),
                exit: linux.exit,
                open_tcp: linux.open_tcp,
                external_unix_sockets: linux.external_unix_sockets,
                terminal: linux.terminal,
                file_locks: linux.file_locks,
                empty_namespaces: linux.empty_namespaces,
                cgroups_mode: linux.cgroups_mode,
            }
        }
        Some((any, _)) => return Err(Error::UnknownOptions(any.type_url.clone())),
    };
    Ok(request.check()?)
}

/// A mount of a request.
pub fn mount(mount: ApiMount) -> Mount {
    Mount { kind: mount.type_, source: mount.source, target: mount.target, options: mount.options }
}

/// Runtime options in any of the messages that carry them.
///
/// # Errors
/// The type is not known, or the message is broken.
pub fn options(any: Option<&Any>) -> Result<OptionsSource, Error> {
    let Some(any) = any.filter(|any| !any.type_url.is_empty()) else {
        return Ok(OptionsSource::default());
    };
    // Go writes bare type names; other languages write a host and a slash before the name.
    match any.type_url.rsplit('/').next().unwrap_or_default() {
        "containerd.runc.v1.Options" => {
            let runc: oci::Options = decode("runtime options", any)?;
            Ok(OptionsSource::Given(Box::new(Options {
                binary_name: runc.binary_name,
                root: runc.root,
                no_pivot_root: runc.no_pivot_root,
                no_new_keyring: runc.no_new_keyring,
                io_uid: runc.io_uid,
                io_gid: runc.io_gid,
                systemd_cgroup: runc.systemd_cgroup,
                shim_cgroup: runc.shim_cgroup,
                criu_image_path: runc.criu_image_path,
                criu_work_path: runc.criu_work_path,
                ..Options::default()
            })))
        }
        // Clients of containerd up to 1.7 send these two to a runtime whose name does not begin with
        // io.containerd.runc. The fields about checkpoints have their own message.
        "containerd.linux.runc.CreateOptions" => {
            let linux: LinuxCreateOptions = decode("task options", any)?;
            Ok(OptionsSource::Given(Box::new(Options {
                no_pivot_root: linux.no_pivot_root,
                no_new_keyring: linux.no_new_keyring,
                shim_cgroup: linux.shim_cgroup,
                io_uid: linux.io_uid,
                io_gid: linux.io_gid,
                criu_image_path: linux.criu_image_path,
                criu_work_path: linux.criu_work_path,
                ..Options::default()
            })))
        }
        "containerd.linux.runc.RuncOptions" => {
            let linux: LinuxRuncOptions = decode("runtime options", any)?;
            Ok(OptionsSource::Given(Box::new(Options {
                binary_name: linux.runtime,
                root: linux.runtime_root,
                systemd_cgroup: linux.systemd_cgroup,
                ..Options::default()
            })))
        }
        "containerd.systemd.v1.Options" => {
            let ours: SystemdOptions = decode("runtime options", any)?;
            Ok(OptionsSource::Given(Box::new(Options {
                binary_name: ours.binary_name,
                root: ours.root,
                no_pivot_root: ours.no_pivot_root,
                no_new_keyring: ours.no_new_keyring,
                io_uid: ours.io_uid,
                io_gid: ours.io_gid,
                log: ours.log,
                properties: ours.properties.into_iter().collect(),
                annotation_properties: ours.annotation_properties.into_iter().collect(),
                notify: ours.notify,
                runtime_timeout_sec: ours.runtime_timeout_sec,
                ..Options::default()
            })))
        }
        "runtimeoptions.v1.Options" => {
            let generic: GenericOptions = decode("runtime options", any)?;
            if !generic.config_path.is_empty() {
                return Ok(OptionsSource::File(generic.config_path.into()));
            }
            String::from_utf8(generic.config_body).map(OptionsSource::Toml).map_err(|_| Error::NotText)
        }
        _ => Err(Error::UnknownOptions(any.type_url.clone())),
    }
}

/// The runtime options that `start` left in the bundle, for a call that carries none.
///
/// # Errors
/// The file can't be read, or as [`options`].
pub fn options_of_start(bundle: &Path) -> Result<OptionsSource, Error> {
    let written = containerd::read_options(bundle)?;
    let broken = |source| Error::Broken {
        what: "runtime options",
        type_url: "google.protobuf.Any".to_owned(),
        source: Box::new(source),
    };
    let any = Any::parse_from_bytes(&written).map_err(broken)?;
    options(Some(&any))
}

fn decode<M: Message>(what: &'static str, any: &Any) -> Result<M, Error> {
    M::parse_from_bytes(&any.value).map_err(|source| Error::Broken {
        what,
        type_url: any.type_url.clone(),
        source: Box::new(source),
    })
}

/// A State response. Without an exit its time is Go's zero time, in year 1.
pub fn state(id: &str, state: State) -> StateResponse {
    let stdio = state.stdio;
    let status = match state.status {
        Status::Created => ApiStatus::CREATED,
        Status::Running => ApiStatus::RUNNING,
        Status::Paused => ApiStatus::PAUSED,
        Status::Stopped => ApiStatus::STOPPED,
    };
    StateResponse {
        id: id.to_owned(),
        bundle: state.bundle.to_string_lossy().into_owned(),
        pid: pid(state.pid),
        status: EnumOrUnknown::new(status),
        stdin: stdio.stdin,
        stdout: stdio.stdout,
        stderr: stdio.stderr,
        terminal: stdio.terminal,
        exit_status: state.exit.map_or(0, |exit| exit.status),
        exited_at: MessageField::some(state.exit.map_or_else(never, |exit| time(exit.at_usec))),
        ..StateResponse::default()
    }
}

pub fn wait(exit: Exit) -> WaitResponse {
    WaitResponse {
        exit_status: exit.status,
        exited_at: MessageField::some(time(exit.at_usec)),
        ..WaitResponse::default()
    }
}

/// A pid in containerd's messages, where 0 means that there is no process.
pub fn pid(pid: Option<u32>) -> u32 {
    pid.unwrap_or_default()
}

/// A Delete response. A process that never ran has exit status 0, and Go's zero time, in year 1.
pub fn delete(deleted: Option<u32>, exit: Option<Exit>) -> DeleteResponse {
    DeleteResponse {
        pid: pid(deleted),
        exit_status: exit.map_or(0, |exit| exit.status),
        exited_at: MessageField::some(exit.map_or_else(never, |exit| time(exit.at_usec))),
        ..DeleteResponse::default()
    }
}

/// A Pids response. The details of a process name its exec.
///
/// # Errors
/// The message can't be encoded.
pub fn pids(pids: Vec<(u32, Option<ExecId>)>) -> Result<PidsResponse, Error> {
    let process = |(pid, exec): (u32, Option<ExecId>)| {
        let details = |exec: ExecId| {
            let details = ProcessDetails { exec_id: exec.to_string(), ..ProcessDetails::default() };
            any("containerd.runc.v1.ProcessDetails", &details)
        };
        let info = exec.map(details).transpose()?.into();
        Ok(ProcessInfo { pid, info, ..ProcessInfo::default() })
    };
    let processes = pids.into_iter().map(process).collect::<Result<_, Error>>()?;
    Ok(PidsResponse { processes, ..PidsResponse::default() })
}

/// A time, given in microseconds since 1970.
pub fn time(usec: u64) -> Timestamp {
    Timestamp {
        seconds: i64::try_from(usec / 1_000_000).unwrap_or(i64::MAX),
        nanos: i32::try_from(usec % 1_000_000 * 1000).unwrap_or_default(),
        ..Timestamp::default()
    }
}

/// Go's zero time.
fn never() -> Timestamp {
    Timestamp { seconds: -62_135_596_800, ..Timestamp::default() }
}

/// A message together with its type URL.
///
/// # Errors
/// The message can't be encoded.
pub(super) fn any(name: &str, message: &impl Message) -> Result<Any, Error> {
    let value = message.write_to_bytes().map_err(|error| Error::Encode(Box::new(error)))?;
    Ok(Any { type_url: name.to_owned(), value, ..Any::default() })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(type_url: &str, value: Vec<u8>) -> Result<OptionsSource, Error> {
        options(Some(&Any { type_url: type_url.to_owned(), value, ..Any::default() }))
    }

    #[test]
    fn options_are_understood_in_every_message() {
        let runc = oci::Options { binary_name: "crun".to_owned(), ..oci::Options::default() };
        for type_url in ["containerd.runc.v1.Options", "type.googleapis.com/containerd.runc.v1.Options"] {
            let source = of(type_url, runc.write_to_bytes().unwrap()).unwrap();
            assert_eq!(source.read().unwrap().binary_name, "crun");
        }
        let body =
            GenericOptions { config_body: b"BinaryName = \"crun\"".to_vec(), ..GenericOptions::default() };
        let source = of("runtimeoptions.v1.Options", body.write_to_bytes().unwrap()).unwrap();
        assert_eq!(source.read().unwrap().binary_name, "crun");
        let ours = SystemdOptions { root: "/run/x".to_owned(), ..SystemdOptions::default() };
        let source = of("containerd.systemd.v1.Options", ours.write_to_bytes().unwrap()).unwrap();
        assert_eq!(source.read().unwrap().root, "/run/x");
        assert_eq!(options(None).unwrap(), OptionsSource::default());
    }

    #[test]
    fn options_of_an_unknown_type_are_refused_by_name() {
        let error = of("example.com/x.Options", Vec::new()).unwrap_err();
        assert!(error.to_string().contains("example.com/x.Options"));
        assert!(of("containerd.runc.v1.Options", vec![0xff]).is_err());
    }

    #[test]
    fn a_namespace_is_checked() {
        assert_eq!(namespace(&HashMap::new()).unwrap(), None);
        let metadata = HashMap::from([(NAMESPACE_KEY.to_owned(), vec!["a/b".to_owned()])]);
        assert!(matches!(namespace(&metadata), Err(Error::Name(_))));
    }

    #[test]
    fn a_running_task_has_exited_in_the_year_one() {
        let running = State {
            status: Status::Running,
            pid: Some(1),
            exit: None,
            bundle: "/b".into(),
            stdio: Stdio::default(),
        };
        let state = state("a", running);
        assert_eq!(state.exited_at.seconds, -62_135_596_800);
    }
}
