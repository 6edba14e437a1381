//! The standard streams of the launched process.

use std::fs::{File, OpenOptions};
use std::os::fd::AsRawFd;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use nix::unistd::{Gid, Uid, fchown};
use rustix::fs::CWD;
use rustix::mount::{OpenTreeFlags, open_tree};

use crate::config;
use crate::stdio::fifo;
use crate::stdio::uri::Kind;
use crate::sys;
use crate::task::wiring::{Input, Output};

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
        let stdin = match &wiring.stdin {
            // criu replaces a FIFO only with a FIFO.
            Input::Null if process.task.request.checkpoint.is_some() && process.exec.is_none() => {
                Stream::File(owned(process, empty_fifo(process)?)?)
            }
            Input::Null => Stream::Null,
            // Does not wait, as the daemon has the other end open.
            Input::Fifo(path) => Stream::File(owned(process, fifo::open_blocking_reader(path)?)?),
        };
        let stdout = open_output(process, &wiring.stdout, wiring.stdout_pipe())?;
        let stderr = open_output(process, &wiring.stderr, wiring.stderr_pipe())?;
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

fn open_output(process: &Process<'_>, output: &Output, own_pipe: Option<&str>) -> Result<Stream, Error> {
    let file = match (output, own_pipe) {
        (Output::Journal, _) => return Ok(Stream::Inherited),
        (Output::Fifo(path), _) => fifo::open_output(path, config::STDIO_LIMIT)?,
        // Opened for both, so that it has a reader while the daemon is down.
        (Output::Copied(_) | Output::Logger, Some(name)) => fifo::open_both(&process.dir.join(name))?,
        // Writable, unlike under containerd-shim-runc-v2: programs do not expect EBADF.
        (Output::Null | Output::Copied(_) | Output::Logger, _) => return Ok(Stream::Null),
    };
    Ok(Stream::File(owned(process, file)?))
}

/// Changes the owner of a stream to the user that the options name, or that the container's root is mapped to, so that a
/// program in the container can open its own stream again.
fn owned(process: &Process<'_>, stream: File) -> Result<File, Error> {
    let (uid, gid) = process.task.runtime.io_owner;
    if (uid, gid) != (0, 0) {
        fchown(&stream, Some(Uid::from_raw(uid)), Some(Gid::from_raw(gid)))
            .map_err(system("change the owner of a stream"))?;
    }
    Ok(stream)
}

/// A FIFO without a writer: every read gets end of file.
fn empty_fifo(process: &Process<'_>) -> Result<File, Error> {
    let path = process.dir.join(pipes::NO_INPUT);
    if fifo::kind(&path) != Kind::Fifo {
        fifo::make(&path)?;
    }
    Ok(fifo::open_blocking_reader(&path)?)
}

/// The null device of the host. A process in the container whose user id is that of root on the host owns the device, and could
/// change its mode or owner for the whole host through its own stream. So the device is opened over a read-only mount
/// that nobody else has. Before Linux 5.12, it is opened as containerd-shim-runc-v2 does.
fn null_device() -> Result<File, Error> {
    let open = |path: &Path| OpenOptions::new().read(true).write(true).open(path);
    let guarded = || {
        let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
        let mount = open_tree(CWD, NULL_DEVICE, flags)?;
        sys::mount_attributes::make_read_only(&mount)?;
        open(&PathBuf::from(format!("/proc/self/fd/{}", mount.as_raw_fd())))
    };
    let opened = guarded().or_else(|_| open(Path::new(NULL_DEVICE)));
    opened.map_err(|source| Error::System { action: "open /dev/null", source })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};
    use std::os::unix::fs::{MetadataExt, PermissionsExt};

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
