//! Starts a program in another cgroup and in other namespaces than those of this process.
//!
//! The standard library can do neither. The child starts in its cgroup (clone3(2), `CLONE_INTO_CGROUP`): it is never a
//! member of the cgroup of this process, and no move between cgroups has to wait for an RCU grace period.
//!
//! With 1,000 containers, this process has 18,000 descriptors, and copies of them would take longer than all the rest of a
//! start. The child shares the table instead (`CLONE_FILES`), and its first step is a table of its own with nothing but the
//! standard descriptors (close_range(2), `CLOSE_RANGE_UNSHARE`, Linux 5.9). It opens what it needs through /proc.

use std::ffi::{CStr, CString, OsStr};
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Command, ExitStatus};
use std::sync::LazyLock;

use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::libc;
use rustix::process::{WaitId, WaitIdOptions, waitid};
use tokio::io::AsyncReadExt;
use tokio::net::unix::pipe;

use super::{child, ended, errno};

/// `CLONE_INTO_CGROUP` of <linux/sched.h>; the constant of libc does not have the width of the field.
pub(super) const INTO_CGROUP: u64 = 0x2_0000_0000;

/// What distinguishes a child from this process.
#[derive(Debug)]
pub struct Setup<'a> {
    /// The file that the child locks, see [`child::lock`].
    pub lock: &'a Path,
    /// The directory of the cgroup in which the child starts. `None`: the cgroup of this process.
    pub cgroup: Option<BorrowedFd<'a>>,
    /// The namespaces that the child enters, after it has the lock and before it runs the program.
    pub namespaces: Vec<OwnedFd>,
    /// The file that is its standard error. `None`: /dev/null.
    pub messages: Option<OwnedFd>,
}

/// A child of this process. Its pid is not used again until the caller has waited for it ([`Child::wait`]).
#[derive(Debug)]
pub struct Child {
    pid: u32,
    process: OwnedFd,
    /// `None` once [`Child::started`] was called.
    starting: Option<Starting>,
}

/// A child that may not run its program yet.
#[derive(Debug)]
struct Starting {
    /// Where the child reports: [`HAS_ALL`], and then why it can't run the program. Closed without a second report when the
    /// program runs.
    reports: OwnedFd,
    lent: Lent,
}

/// What the child opens again in a table of its own: this process has to keep the descriptors until then.
#[derive(Debug)]
struct Lent {
    reporter: OwnedFd,
    namespaces: Vec<OwnedFd>,
    messages: Option<OwnedFd>,
}

/// The first report of a child: it has opened all that it needs of its parent. Other reports are numbers of errors.
const HAS_ALL: i32 = 0;

impl Child {
    /// Its pid.
    pub fn id(&self) -> u32 {
        self.pid
    }

    /// Resolves when the child runs the program. That takes long if the program is on a disk that does not answer, so
    /// no thread waits for it. Needs the async runtime.
    ///
    /// # Errors
    /// The program can't be run, or a part of the [`Setup`] failed; [`child::LOCK_IS_HELD`] if another process holds the
    /// lock. The child is reaped.
    pub async fn started(&mut self) -> io::Result<()> {
        let Some(Starting { reports, lent }) = self.starting.take() else {
            return Ok(());
        };
        let mut reports = pipe::Receiver::from_owned_fd(reports)?;
        let mut report = [0; 4];
        tokio::select! {
            biased;
            read = reports.read_exact(&mut report) => drop(read?),
            // The child was killed before it could report.
            ended = ended(self.process.try_clone()?) => return ended,
        }
        // From here on, only the child can report.
        drop(lent);
        if i32::from_ne_bytes(report) == HAS_ALL {
            let mut failure = Vec::new();
            reports.read_to_end(&mut failure).await?;
            match <[u8; 4]>::try_from(failure.as_slice()) {
                Ok(failure) => report = failure,
                Err(_) => return Ok(()),
            }
        }
        self.wait().await?;
        Err(io::Error::from_raw_os_error(i32::from_ne_bytes(report)))
    }

    /// Resolves when the child has ended, and reaps it. Needs the async runtime.
    ///
    /// # Errors
    /// The kernel can't watch the child, or the child was reaped already.
    pub async fn wait(&mut self) -> io::Result<ExitStatus> {
        ended(self.process.try_clone()?).await?;
        self.reap()
    }

    fn reap(&self) -> io::Result<ExitStatus> {
        use std::os::fd::AsFd;
        let status = waitid(WaitId::PidFd(self.process.as_fd()), WaitIdOptions::EXITED).map_err(errno)?;
        let status = status.ok_or(Errno::ECHILD)?;
        let code = status.exit_status().map(|code| (code & 0xff) << 8);
        Ok(ExitStatus::from_raw(code.or_else(|| status.terminating_signal()).unwrap_or_default()))
    }
}

/// What the child passes to execve(2).
struct Program {
    path: CString,
    /// The working directory.
    dir: Option<CString>,
    _args: Vec<CString>,
    _env: Vec<CString>,
    argv: Vec<*const libc::c_char>,
    envp: Vec<*const libc::c_char>,
}

impl Program {
    fn of(command: &Command) -> io::Result<Self> {
        let text = |word: &OsStr| CString::new(word.as_bytes());
        let words = std::iter::once(command.get_program()).chain(command.get_args());
        let args = words.map(text).collect::<Result<Vec<_>, _>>()?;
        let mut env = Vec::new();
        for (name, value) in command.get_envs() {
            if let Some(value) = value {
                env.push(CString::new([name.as_bytes(), b"=", value.as_bytes()].concat())?);
            }
        }
        let pointers = |words: &[CString]| {
            words.iter().map(|word| word.as_ptr()).chain(std::iter::once(std::ptr::null())).collect()
        };
        let (argv, envp) = (pointers(&args), pointers(&env));
        let dir = command.get_current_dir().map(|dir| text(dir.as_os_str())).transpose()?;
        Ok(Self { path: text(command.get_program())?, dir, _args: args, _env: env, argv, envp })
    }
}

/// Starts a child that becomes a program: path, arguments and environment are those of `command`, whose environment must
/// be complete (`env_clear`). The child runs in the working directory of `command`, if its namespaces have that directory. Its
/// standard output is /dev/null, its standard error the file for messages, and its standard input the lock file. The child takes
/// all signals, and the OOM killer regards it as an ordinary process. [`Child::started`] tells whether the program runs.
///
/// # Errors
/// The kernel makes no child. `ENODEV`: the cgroup has been removed meanwhile.
pub fn spawn(command: &Command, setup: Setup<'_>) -> io::Result<Child> {
    /// False on Linux 5.8 and earlier, and where a filter of system calls does not know it.
    static HAS_CLOSE_RANGE: LazyLock<bool> = LazyLock::new(|| {
        let last = libc::c_uint::MAX;
        // SAFETY: a plain system call. No descriptor has this number.
        unsafe { libc::syscall(libc::SYS_close_range, last, last, 0) == 0 }
    });
    spawn_with(command, setup, *HAS_CLOSE_RANGE)
}

/// As [`spawn`]. `shares`: the child shares the table of descriptors at first. Otherwise it has copies until it runs the program.
fn spawn_with(command: &Command, setup: Setup<'_>, shares: bool) -> io::Result<Child> {
    let program = Program::of(command)?;
    let lock = CString::new(setup.lock.as_os_str().as_bytes())?;
    let (reports, reporter) = nix::unistd::pipe2(OFlag::O_CLOEXEC)?;
    let lent = Lent { reporter, namespaces: setup.namespaces, messages: setup.messages };
    let parent = Parent::lending(&lent, shares)?;
    let mut process: libc::c_int = -1;
    // SAFETY: all zeroes is a valid clone_args: plain integers.
    let mut args: libc::clone_args = unsafe { std::mem::zeroed() };
    args.flags = libc::CLONE_PIDFD as u64;
    if shares {
        args.flags |= libc::CLONE_FILES as u64;
    }
    args.pidfd = std::ptr::from_mut(&mut process) as u64;
    args.exit_signal = libc::SIGCHLD as u64;
    if let Some(cgroup) = setup.cgroup {
        args.flags |= INTO_CGROUP;
        args.cgroup = cgroup.as_raw_fd() as u64;
    }
    // SAFETY: without `CLONE_VM` and without a stack of its own the call returns twice, as fork(2) does. The child has
    // a copy of this process's memory, and only makes system calls until it runs the program or ends.
    let pid = unsafe { libc::syscall(libc::SYS_clone3, &args, size_of::<libc::clone_args>()) };
    if pid == 0 {
        // SAFETY: this is the child.
        unsafe { be_child(&program, &lock, &parent) }
    }
    // For a removed cgroup, the kernel returns ENOENT or ENODEV (css_tryget_online_from_dir, cgroup_css_set_fork).
    let pid =
        Errno::result(pid).map_err(|errno| if errno == Errno::ENOENT { Errno::ENODEV } else { errno })?;
    // SAFETY: the kernel has just opened the descriptor for this process, and no other code owns it.
    let process = unsafe { OwnedFd::from_raw_fd(process) };
    Ok(Child {
        pid: u32::try_from(pid).map_err(|_| Errno::ESRCH)?,
        process,
        starting: Some(Starting { reports, lent }),
    })
}

/// How a child finds what its parent lends.
struct Parent {
    pid: libc::pid_t,
    /// The number of the reporter in the table that the child begins with.
    number: RawFd,
    /// That table is the one of the parent.
    shares: bool,
    reporter: CString,
    namespaces: Vec<CString>,
    messages: Option<CString>,
}

impl Parent {
    fn lending(lent: &Lent, shares: bool) -> io::Result<Self> {
        let pid = std::process::id();
        let path = |fd: &OwnedFd| CString::new(format!("/proc/{pid}/fd/{}", fd.as_raw_fd()));
        Ok(Self {
            pid: pid.try_into().map_err(|_| Errno::ESRCH)?,
            number: lent.reporter.as_raw_fd(),
            shares,
            reporter: path(&lent.reporter)?,
            namespaces: lent.namespaces.iter().map(path).collect::<Result<_, _>>()?,
            messages: lent.messages.as_ref().map(path).transpose()?,
        })
    }

    /// Opens a descriptor of the parent. `ESRCH` once the parent has ended: another process may have its pid.
    ///
    /// # Safety
    /// As [`be_child`].
    unsafe fn open(&self, path: &CStr, access: libc::c_int) -> Result<RawFd, Errno> {
        // SAFETY: as in `be_child`.
        unsafe {
            let opened = open(path, access)?;
            if libc::getppid() == self.pid { Ok(opened) } else { Err(Errno::ESRCH) }
        }
    }
}

/// Becomes the program. If that fails, reports the error and ends.
///
/// # Safety
/// To be called in a child of clone3(2) only. Everything in here must be async-signal-safe, and must not change the
/// table of descriptors before [`own_table`] has returned.
unsafe fn be_child(program: &Program, lock: &CStr, parent: &Parent) -> ! {
    // SAFETY: system calls, on memory that the parent has prepared and on descriptors of this child.
    unsafe {
        if parent.shares
            && let Err(errno) = own_table()
        {
            fail(parent.number, errno);
        }
        let Ok(reporter) = parent.open(&parent.reporter, libc::O_WRONLY) else {
            // The parent has ended, or has given up this child.
            libc::_exit(127);
        };
        let failed = match prepare(lock, parent, reporter) {
            Ok(()) => {
                if let Some(dir) = &program.dir {
                    // A program is better run elsewhere than not at all: `delete` must work without the bundle.
                    libc::chdir(dir.as_ptr());
                }
                libc::execve(program.path.as_ptr(), program.argv.as_ptr(), program.envp.as_ptr());
                Errno::last()
            }
            Err(errno) => errno,
        };
        fail(reporter, failed)
    }
}

/// Replaces the table that this child shares with its parent by one that has the standard descriptors only. The kernel copies
/// no other descriptor. Without the copies, the clients of other containers get the end of their streams although the program
/// of this child may be on a disk that does not answer.
///
/// # Safety
/// As [`be_child`].
unsafe fn own_table() -> Result<(), Errno> {
    let first = libc::STDERR_FILENO.unsigned_abs() + 1;
    // SAFETY: a plain system call. No other thread runs in this child, and the parent keeps its own table.
    let done =
        unsafe { libc::syscall(libc::SYS_close_range, first, libc::c_uint::MAX, libc::CLOSE_RANGE_UNSHARE) };
    Errno::result(done).map(drop)
}

/// # Safety
/// As [`be_child`].
unsafe fn open(path: &CStr, access: libc::c_int) -> Result<RawFd, Errno> {
    // SAFETY: a plain system call. The path outlives it.
    Errno::result(unsafe { libc::open(path.as_ptr(), access | libc::O_CLOEXEC) })
}

/// # Safety
/// As [`be_child`].
unsafe fn report(reporter: RawFd, what: i32) {
    let text = what.to_ne_bytes();
    // SAFETY: a plain system call. The text outlives it.
    unsafe { libc::write(reporter, text.as_ptr().cast(), text.len()) };
}

/// # Safety
/// As [`be_child`].
unsafe fn fail(reporter: RawFd, why: Errno) -> ! {
    // SAFETY: ends this child, which nobody but the parent waits for.
    unsafe {
        report(reporter, why as i32);
        libc::_exit(127)
    }
}

/// # Safety
/// As [`be_child`].
unsafe fn prepare(lock: &CStr, parent: &Parent, reporter: RawFd) -> Result<(), Errno> {
    /// More than containerd's namespaces of mounts and of the network.
    const MOST_NAMESPACES: usize = 8;
    // SAFETY: as in `be_child`.
    unsafe {
        let mut namespaces = [-1; MOST_NAMESPACES];
        if parent.namespaces.len() > MOST_NAMESPACES {
            return Err(Errno::EINVAL);
        }
        for (namespace, path) in namespaces.iter_mut().zip(&parent.namespaces) {
            *namespace = parent.open(path, libc::O_RDONLY)?;
        }
        // A program is better run without its messages than not at all.
        let messages = match &parent.messages {
            Some(path) => parent.open(path, libc::O_WRONLY).ok(),
            None => None,
        };
        report(reporter, HAS_ALL);
        child::begin_as_usual()?;
        // The Rust runtime ignores SIGPIPE, and a program would inherit that.
        libc::signal(libc::SIGPIPE, libc::SIG_DFL);
        let nothing = open(c"/dev/null", libc::O_RDWR)?;
        for (opened, standard) in
            [(nothing, libc::STDOUT_FILENO), (messages.unwrap_or(nothing), libc::STDERR_FILENO)]
        {
            Errno::result(libc::dup2(opened, standard))?;
        }
        child::lock(lock)?;
        child::be_ordinary_to_the_oom_killer();
        for namespace in namespaces.iter().take(parent.namespaces.len()) {
            // 0: a namespace of any kind.
            Errno::result(libc::setns(*namespace, 0))?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sys::resource::{Resource, getrlimit};
    use std::fs;

    fn setup(lock: &Path) -> Setup<'_> {
        Setup { lock, cgroup: None, namespaces: Vec::new(), messages: None }
    }

    fn shell(script: &str) -> Command {
        let mut command = Command::new("/bin/sh");
        command.arg("-c").arg(script).env_clear().env("WORD", "two words");
        command
    }

    #[tokio::test]
    async fn a_child_has_its_arguments_and_environment_and_its_end_is_known() {
        let dir = tempfile::tempdir().unwrap();
        let (out, lock) = (dir.path().join("out"), dir.path().join("lock"));
        let script = format!("echo \"$WORD\" >{}; exit 7", out.display());
        let mut child = spawn(&shell(&script), setup(&lock)).unwrap();
        assert_eq!(child.wait().await.unwrap().code(), Some(7));
        assert_eq!(fs::read_to_string(&out).unwrap(), "two words\n");
        let mut killed = spawn(&shell("kill -9 $$"), setup(&lock)).unwrap();
        assert_eq!(killed.wait().await.unwrap().signal(), Some(9));
    }

    #[tokio::test]
    async fn a_child_runs_in_the_directory_of_its_command_if_there_is_one() {
        let dir = tempfile::tempdir().unwrap();
        let (out, lock) = (dir.path().join("out"), dir.path().join("lock"));
        let here = std::env::current_dir().unwrap();
        for (wanted, found) in [(dir.path(), dir.path()), (Path::new("/no/such/directory"), &here)] {
            let mut command = shell(&format!("pwd -P >{}", out.display()));
            command.current_dir(wanted);
            assert!(spawn(&command, setup(&lock)).unwrap().wait().await.unwrap().success());
            assert_eq!(fs::read_to_string(&out).unwrap().trim_end(), found.to_str().unwrap());
        }
    }

    #[tokio::test]
    async fn a_child_has_the_memory_limit_that_this_process_had_at_first() {
        let dir = tempfile::tempdir().unwrap();
        let (out, lock) = (dir.path().join("out"), dir.path().join("lock"));
        let script = format!("ulimit -d >{}", out.display());
        let mut limits = Vec::new();
        for _ in 0..2 {
            spawn(&shell(&script), setup(&lock)).unwrap().wait().await.unwrap();
            limits.push(fs::read_to_string(&out).unwrap());
            child::limit_data(1 << 40).unwrap();
        }
        assert_eq!(limits[0], limits[1]);
        assert_eq!(getrlimit(Resource::RLIMIT_DATA).unwrap().0, 1 << 40);
    }

    #[tokio::test]
    async fn a_program_that_is_not_there_is_an_error_and_leaves_no_child() {
        let dir = tempfile::tempdir().unwrap();
        let mut command = Command::new("/no/such/program");
        command.env_clear();
        let mut child = spawn(&command, setup(&dir.path().join("lock"))).unwrap();
        let error = child.started().await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::NotFound);
        assert!(child.wait().await.is_err(), "it was reaped");
    }

    #[tokio::test]
    async fn a_program_gets_no_descriptor_of_this_process() {
        use std::os::fd::AsFd;
        let dir = tempfile::tempdir().unwrap();
        let (out, lock) = (dir.path().join("out"), dir.path().join("lock"));
        let inherited = nix::unistd::dup(fs::File::open("/dev/null").unwrap().as_fd()).unwrap();
        let number = inherited.as_raw_fd();
        let script =
            format!("test -e /proc/self/fd/{number} && echo open >{0} || echo closed >{0}", out.display());
        let mut child = spawn(&shell(&script), setup(&lock)).unwrap();
        child.started().await.unwrap();
        child.wait().await.unwrap();
        assert_eq!(fs::read_to_string(&out).unwrap(), "closed\n");
        assert!(fs::File::from(inherited).metadata().is_ok(), "this process still has it");
    }

    #[tokio::test]
    async fn a_child_enters_the_namespaces_that_it_was_lent() {
        for shares in [true, false] {
            let dir = tempfile::tempdir().unwrap();
            let (out, lock) = (dir.path().join("out"), dir.path().join("lock"));
            let own = fs::File::open("/proc/self/ns/uts").unwrap();
            let setup = Setup { namespaces: vec![own.into()], ..setup(&lock) };
            let mut child =
                spawn_with(&shell(&format!("echo entered >{}", out.display())), setup, shares).unwrap();
            let entered = child.started().await;
            if nix::unistd::geteuid().is_root() {
                entered.unwrap();
                assert!(child.wait().await.unwrap().success());
                assert_eq!(fs::read_to_string(&out).unwrap(), "entered\n");
            } else {
                assert_eq!(entered.unwrap_err().raw_os_error(), Some(Errno::EPERM as i32));
            }
        }
    }

    #[tokio::test]
    async fn what_a_child_says_is_in_the_file_for_messages() {
        for shares in [true, false] {
            let dir = tempfile::tempdir().unwrap();
            let lock = dir.path().join("lock");
            let messages = super::super::bounded_file::Messages::new();
            let setup = Setup { messages: messages.file().map(OwnedFd::from), ..setup(&lock) };
            let mut child = spawn_with(&shell("echo out; echo no library >&2"), setup, shares).unwrap();
            child.started().await.unwrap();
            child.wait().await.unwrap();
            assert_eq!(messages.text(), "no library");
        }
    }

    #[tokio::test]
    async fn a_child_that_is_killed_at_once_is_not_waited_for() {
        let dir = tempfile::tempdir().unwrap();
        let lock = dir.path().join("lock");
        let mut child = spawn(&shell("exit 0"), setup(&lock)).unwrap();
        super::super::tree::kill(child.id());
        let started = child.started().await;
        assert!(started.is_ok(), "{started:?}");
        let ended = child.wait().await.unwrap();
        assert!(ended.signal() == Some(9) || ended.success(), "{ended}");
    }

    #[tokio::test]
    async fn a_second_child_does_not_get_the_lock_of_the_first() {
        let dir = tempfile::tempdir().unwrap();
        let lock = dir.path().join("lock");
        let mut first = spawn(&shell("sleep 1000"), setup(&lock)).unwrap();
        first.started().await.unwrap();
        let error = spawn(&shell("exit 0"), setup(&lock)).unwrap().started().await.unwrap_err();
        assert_eq!(error.raw_os_error(), Some(child::LOCK_IS_HELD as i32));
        super::super::tree::kill(first.id());
        first.wait().await.unwrap();
        spawn(&shell("exit 0"), setup(&lock)).unwrap().wait().await.unwrap();
    }
}
