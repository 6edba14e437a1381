//! The standard streams of the launched process.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use nix::fcntl::{FcntlArg, FdFlag, OFlag, fcntl};
use nix::unistd::{Gid, Uid, fchown};
use rustix::fs::CWD;
use rustix::mount::{OpenTreeFlags, open_tree};

use crate::config;
use crate::oci::bundle::{self, Spec};
use crate::oci::profiles;
use crate::path_error::io_error;
use crate::stdio::fifo;
use crate::stdio::uri::Kind;
use crate::sys;
use crate::sys::interrupt::Interrupt;
use crate::task::wiring::{Copied, Input, Output};
use crate::telemetry;

use super::contract::{LAUNCH_CGROUP, NOTIFY_SOCKET, SEALED_RUNTIME, WATCHDOG_USEC};
use super::error::{Error, system};
use super::pipes;
use super::process::Process;

const NULL_DEVICE: &str = "/dev/null";

enum Stream {
    Null,
    /// The unit's own stream to the journal.
    Inherited,
    File(File),
}

/// The three streams. They are opened once, so that `launch` waits only once for a client that does not open its end.
pub(super) struct Streams {
    streams: [Stream; 3],
    /// The null device, if the process gets it. Each time it is opened, it needs a mount of its own.
    null: Option<File>,
}

impl Streams {
    pub(super) fn open(process: &Process<'_>) -> Result<Self, Error> {
        let wiring = process.wiring;
        if wiring.terminal {
            return Ok(Self { streams: [Stream::Null, Stream::Null, Stream::Null], null: None });
        }
        let access = Access::of(process);
        let stdin = match &wiring.stdin {
            // criu replaces a FIFO only with a FIFO.
            Input::Null | Input::File(_)
                if process.task.request.checkpoint.is_some() && process.exec.is_none() =>
            {
                Stream::File(access.give(empty_fifo(process)?)?)
            }
            Input::Null => Stream::Null,
            // Does not wait, as the daemon has the other end open.
            Input::Fifo(path) => Stream::File(access.give(fifo::open_blocking_reader(path)?)?),
            Input::File(path) => Stream::File(input_file(path)?),
        };
        let stdout = open_output(process, &access, &wiring.stdout, wiring.stdout_pipe())?;
        let stderr = open_output(process, &access, &wiring.stderr, wiring.stderr_pipe())?;
        Self::of([stdin, stdout, stderr])
    }

    fn of(streams: [Stream; 3]) -> Result<Self, Error> {
        let needs_null = streams.iter().any(|stream| matches!(stream, Stream::Null));
        Ok(Self { streams, null: needs_null.then(null_device).transpose()? })
    }

    /// Sets the streams of a command of the OCI runtime, and removes the variables for `launch` from its environment.
    pub(super) fn equip(&self, command: &mut Command) -> Result<(), Error> {
        command.env_remove(SEALED_RUNTIME).env_remove(LAUNCH_CGROUP);
        // With these, runc would make its own notify socket for the container, and wait for it at every start.
        command.env_remove(NOTIFY_SOCKET).env_remove(WATCHDOG_USEC);
        let [stdin, stdout, stderr] = self.to_stdio()?;
        command.stdin(stdin).stdout(stdout).stderr(stderr);
        // glibc's posix_spawn(3) leaves signal 32 ignored, which the container's process would inherit. With a group
        // to set (the one it has), the standard library does not use posix_spawn(3).
        command.gid(0);
        Ok(())
    }

    /// A writer of the input, which the OCI runtime inherits and holds until the restore is over. criu opens the input of a
    /// container of containerd-shim-runc-v2 a second time, and waits in open(2) for a writer: for ever if there is no input,
    /// or if the client has closed it. `None` if the input is no FIFO.
    pub(super) fn input_writer(&self) -> Result<Option<File>, Error> {
        let [Stream::File(input), ..] = &self.streams else { return Ok(None) };
        let path = PathBuf::from(format!("/proc/self/fd/{}", input.as_raw_fd()));
        if fifo::kind(&path) != Kind::Fifo {
            return Ok(None);
        }
        let writer = fifo::open_both(&path)?;
        fcntl(&writer, FcntlArg::F_SETFD(FdFlag::empty())).map_err(system("let a stream be inherited"))?;
        Ok(Some(writer))
    }

    fn to_stdio(&self) -> Result<[Stdio; 3], Error> {
        let stdio = |stream: &Stream| match stream {
            Stream::Null => match &self.null {
                Some(device) => device.try_clone().map(Stdio::from),
                None => Ok(Stdio::null()),
            },
            Stream::Inherited => Ok(Stdio::inherit()),
            Stream::File(file) => file.try_clone().map(Stdio::from),
        };
        let [stdin, stdout, stderr] = self.streams.each_ref().map(stdio);
        let failed = |source| Error::System { action: "duplicate a stream", source };
        Ok([stdin.map_err(failed)?, stdout.map_err(failed)?, stderr.map_err(failed)?])
    }
}

fn open_output(
    process: &Process<'_>,
    access: &Access,
    output: &Output,
    own_pipe: Option<&str>,
) -> Result<Stream, Error> {
    let file = match (output, own_pipe) {
        (Output::Journal, _) => return Ok(Stream::Inherited),
        (Output::Fifo(path), _) => fifo::open_output(path, config::STDIO_LIMIT, &Interrupt::default())?,
        // The daemon's reader is in the descriptor store. A process that outlives its exec sees, after the Delete of the exec, that
        // nobody reads any more, as under containerd-shim-runc-v2. With a reader of its own, it would wait for ever.
        (Output::Copied(Copied { client: Some(_), .. }), Some(name)) if process.exec.is_some() => {
            fifo::open_writer(&process.dir.join(name))?
        }
        // Opened for both, so that it has a reader in any case.
        (Output::Copied(_) | Output::Logger, Some(name)) => fifo::open_both(&process.dir.join(name))?,
        // Writable, unlike under containerd-shim-runc-v2: programs do not expect EBADF.
        (Output::Null | Output::Copied(_) | Output::Logger, _) => return Ok(Stream::Null),
    };
    Ok(Stream::File(access.give(file)?))
}

/// What a process in the container needs to use its streams, and to open them again.
struct Access {
    /// The user and group that the options name, or that the container's root is mapped to.
    owner: (u32, u32),
    /// The SELinux label of the container's files. `None` if SELinux is not active, or if the container has no label.
    label: Option<String>,
}

impl Access {
    fn of(process: &Process<'_>) -> Self {
        let spec = || Spec::read(&process.task.request.bundle);
        Self { owner: process.task.runtime.io_owner, label: label(profiles::selinux_is_active(), spec) }
    }

    fn give(&self, stream: File) -> Result<File, Error> {
        let (uid, gid) = self.owner;
        if (uid, gid) != (0, 0) {
            fchown(&stream, Some(Uid::from_raw(uid)), Some(Gid::from_raw(gid)))
                .map_err(system("change the owner of a stream"))?;
        }
        // The label of a device of the client would be that of the device for the whole host.
        let is_fifo = stream.metadata().is_ok_and(|found| found.file_type().is_fifo());
        if let Some(label) = self.label.as_ref().filter(|_| is_fifo)
            && let Err(error) = profiles::set_selinux_label(&stream, label)
        {
            // The policy may let the container use the stream nevertheless.
            telemetry::say(&format!("can't give a stream the SELinux label {label:?}: {error}"));
        }
        Ok(stream)
    }
}

/// The label for streams. An SELinux policy lets a container use the pipes of containerd-shim-runc-v2, which have no name and
/// the label of that shim's process. FIFOs have the label of the directory in which they were made, usually one that
/// containers may not use: the kernel would replace such a stream with a null file when the container starts.
fn label(selinux_is_active: bool, spec: impl FnOnce() -> Result<Spec, bundle::Error>) -> Option<String> {
    if !selinux_is_active {
        return None;
    }
    match spec() {
        Ok(spec) => spec.mount_label().map(str::to_owned),
        Err(error) => {
            telemetry::say(&format!("can't find the SELinux label for streams: {error}"));
            None
        }
    }
}

/// A FIFO without a writer: every read gets end of file.
fn empty_fifo(process: &Process<'_>) -> Result<File, Error> {
    let path = process.dir.join(pipes::NO_INPUT);
    if fifo::kind(&path) != Kind::Fifo {
        fifo::make(&path)?;
    }
    Ok(fifo::open_blocking_reader(&path)?)
}

/// The null device of the host.
fn null_device() -> Result<File, Error> {
    let opened = open_guarded(Path::new(NULL_DEVICE), OpenOptions::new().read(true).write(true));
    opened.map_err(|source| Error::System { action: "open /dev/null", source })
}

/// A regular file or a device of the client, as input. As under containerd-shim-runc-v2, the process can't write to it.
fn input_file(path: &Path) -> Result<File, Error> {
    // Does not wait for a FIFO or a device that replaced the file since its kind was checked.
    let flags = OFlag::O_NONBLOCK | OFlag::O_NOCTTY;
    let opened = open_guarded(path, OpenOptions::new().read(true).custom_flags(flags.bits()));
    let opened = opened.map_err(io_error("open", path)).map_err(fifo::Error::from)?;
    fcntl(&opened, FcntlArg::F_SETFL(OFlag::empty())).map_err(system("set the mode of the input"))?;
    Ok(opened)
}

/// Opens a file of the host that a process in the container gets. A process whose user id is that of root on the host owns
/// the file, and could change its mode, its owner or (opened again) its content through its own stream. So the file is opened
/// over a read-only mount that nobody else has. Before Linux 5.12, it is opened as containerd-shim-runc-v2 does.
fn open_guarded(path: &Path, options: &OpenOptions) -> io::Result<File> {
    let guarded = || {
        let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
        let mount = open_tree(CWD, path, flags)?;
        sys::mount_attributes::make_read_only(&mount)?;
        options.open(PathBuf::from(format!("/proc/self/fd/{}", mount.as_raw_fd())))
    };
    guarded().or_else(|_| options.open(path))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};
    use std::os::unix::fs::{MetadataExt, PermissionsExt};

    use rustix::fs::fgetxattr;

    const LABEL: &str = "system_u:object_r:container_file_t:s0:c1,c2";

    fn spec(text: &str) -> Result<Spec, bundle::Error> {
        Spec::parse(text.as_bytes())
            .map_err(|source| bundle::Error::Malformed { path: PathBuf::new(), source })
    }

    #[test]
    fn streams_get_the_label_of_the_containers_files_where_selinux_is_active() {
        let labelled = || spec(&format!(r#"{{"linux":{{"mountLabel":"{LABEL}"}}}}"#));
        assert_eq!(label(true, labelled).as_deref(), Some(LABEL));
        assert_eq!(label(false, || unreachable!("the spec is not read")), None);
        assert_eq!(label(true, || spec("{}")), None);
        assert_eq!(label(true, || spec("x")), None);
    }

    fn label_of(file: &File) -> Option<Vec<u8>> {
        let mut value = Vec::with_capacity(256);
        let read = fgetxattr(file, profiles::SELINUX_ATTRIBUTE, rustix::buffer::spare_capacity(&mut value));
        read.ok().map(|_| value)
    }

    /// A tmpfs is what /run is. Its labels are ordinary attributes if no SELinux is active.
    #[test]
    fn a_fifo_has_the_label_and_nothing_else_gets_it() {
        let dir = tempfile::tempdir_in("/dev/shm").unwrap();
        if !nix::unistd::geteuid().is_root() || profiles::selinux_is_active() {
            return;
        }
        let (pipe, file) = (dir.path().join("pipe"), dir.path().join("file"));
        fifo::make(&pipe).unwrap();
        let access = Access { owner: (7, 8), label: Some(LABEL.to_owned()) };
        for stream in [fifo::open_blocking_reader(&pipe).unwrap(), fifo::open_both(&pipe).unwrap()] {
            let given = access.give(stream).unwrap();
            let found = given.metadata().unwrap();
            assert_eq!((found.uid(), found.gid()), (7, 8));
            assert_eq!(label_of(&given), Some(format!("{LABEL}\0").into_bytes()));
        }
        let file = access.give(File::create(&file).unwrap()).unwrap();
        assert_eq!(label_of(&file), None);
        let null = Access { owner: (0, 0), ..access }.give(File::open(NULL_DEVICE).unwrap()).unwrap();
        assert_eq!(label_of(&null), None);
    }

    #[test]
    fn a_stream_without_a_label_stays_usable() {
        let dir = tempfile::tempdir().unwrap();
        let pipe = dir.path().join("pipe");
        fifo::make(&pipe).unwrap();
        for label in [None, Some("no\0label".to_owned())] {
            let stream = fifo::open_both(&pipe).unwrap();
            assert!(Access { owner: (0, 0), label }.give(stream).is_ok());
        }
    }

    #[test]
    fn the_null_device_is_opened_once_for_all_streams() {
        let dir = tempfile::tempdir().unwrap();
        let streams = Streams::of([Stream::Null, Stream::Null, Stream::Null]).unwrap();
        let [stdin, stdout, stderr] = streams.to_stdio().unwrap();
        let script = "cp /proc/$$/fdinfo/0 /proc/$$/fdinfo/1 /proc/$$/fdinfo/2 \"$0\"";
        let mut shell = Command::new("sh");
        let shell = shell.arg("-c").arg(script).arg(dir.path()).stdin(stdin).stdout(stdout).stderr(stderr);
        assert!(shell.status().unwrap().success());
        // The kernel shows over which mount a file was opened.
        let mounts = ["0", "1", "2"].map(|fd| {
            let text = std::fs::read_to_string(dir.path().join(fd)).unwrap();
            text.lines().find(|line| line.starts_with("mnt_id:")).unwrap().to_owned()
        });
        assert!(mounts.iter().all(|mount| *mount == mounts[0]), "{mounts:?}");
    }

    #[test]
    fn a_file_as_input_is_read_from_its_beginning_and_can_not_be_changed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("input");
        std::fs::write(&path, "hello").unwrap();
        let mut text = String::new();
        let mut input = input_file(&path).unwrap();
        assert_eq!((input.read_to_string(&mut text).unwrap(), text.as_str()), (5, "hello"));
        assert!(input.write_all(b"gone").is_err());
        if nix::unistd::geteuid().is_root() {
            let again = format!("/proc/self/fd/{}", input.as_raw_fd());
            let opened = OpenOptions::new().write(true).open(again);
            assert_eq!(opened.unwrap_err().kind(), std::io::ErrorKind::ReadOnlyFilesystem);
        }
        assert_eq!(input_file(Path::new(NULL_DEVICE)).unwrap().read(&mut [0]).unwrap(), 0);
        assert!(input_file(&dir.path().join("missing")).is_err());
    }

    #[test]
    fn nobody_can_change_the_null_device_through_a_stream() {
        let mut null = null_device().unwrap();
        assert_eq!((null.read(&mut [0]).unwrap(), null.write(b"gone").unwrap()), (0, 4));
        assert_eq!(null.metadata().unwrap().rdev(), std::fs::metadata(NULL_DEVICE).unwrap().rdev());
        if !nix::unistd::geteuid().is_root() {
            return;
        }
        let mode = std::fs::metadata(NULL_DEVICE).unwrap().permissions();
        for path in [format!("/proc/self/fd/{}", null.as_raw_fd()), format!("/dev/fd/{}", null.as_raw_fd())] {
            let changed = std::fs::set_permissions(path, PermissionsExt::from_mode(mode.mode()));
            assert_eq!(changed.unwrap_err().kind(), std::io::ErrorKind::ReadOnlyFilesystem);
        }
        let changed = null.set_permissions(mode);
        assert_eq!(changed.unwrap_err().kind(), std::io::ErrorKind::ReadOnlyFilesystem);
    }
}
