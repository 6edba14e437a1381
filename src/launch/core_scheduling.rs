//! Core scheduling: of the threads of a processor core, the kernel runs only processes with the same cookie at the same
//! time, so that none learns anything of another one through the core (Documentation/admin-guide/hw-vuln/core-scheduling.rst).
//!
//! With `SCHED_CORE` in its environment, the shim of a container or a pod makes a cookie under containerd-shim-runc-v2, and
//! whatever it starts inherits the cookie. Here, the processes of a container have no such parent: `launch` makes the cookie of
//! a container, or takes the one of the pod, and the process that the OCI runtime starts inherits it.

use std::path::Path;

use nix::errno::Errno;
use rustix::process::Pid;
use rustix::thread::{
    CoreSchedulingScope, core_scheduling_cookie, create_core_scheduling_cookie, gettid,
    pull_core_scheduling_cookie,
};

use crate::cgroup;
use crate::config;
use crate::id::{ExecId, TaskId, TaskKey};
use crate::oci::bundle::{self, Spec};
use crate::store::{self, Store};
use crate::task::Task;
use crate::telemetry;

/// The variable of containerd's `start`: `sched_core = true` of containerd 1.6 and 1.7, `env = ["SCHED_CORE=1"]` of 2.x.
const VARIABLE: &str = "SCHED_CORE";

/// Why a process gets no cookie.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The kernel refuses it.
    #[error("core scheduling, which containerd's configuration requests ({VARIABLE}), is not possible: {}", reason(*.0))]
    Refused(Errno),
    /// The spec, which names the pod, can't be read.
    #[error(transparent)]
    Bundle(#[from] bundle::Error),
    /// The record of the pod's sandbox can't be read.
    #[error(transparent)]
    Store(#[from] store::Error),
}

fn reason(errno: Errno) -> &'static str {
    match errno {
        Errno::EINVAL => "the kernel was built without CONFIG_SCHED_CORE",
        Errno::ENODEV => "no processor core of this machine has more than one thread, or SMT is switched off",
        errno => errno.desc(),
    }
}

/// Whether the caller of `start` wants core scheduling. Any value means yes, as for containerd-shim-runc-v2.
pub fn is_requested() -> bool {
    std::env::var_os(VARIABLE).is_some_and(|value| !value.is_empty())
}

/// Checks that core scheduling is possible, for the first container of a pod or a container without one. The others take what
/// their pod has, also if SMT is switched off by now.
///
/// # Errors
/// Core scheduling is not possible.
pub fn check(bundle: &Path, id: &TaskId) -> Result<(), Error> {
    // A sandbox of the Sandbox API has no spec.
    if Spec::read(bundle).is_ok_and(|spec| sandbox_of(&spec, id).is_some()) {
        return Ok(());
    }
    Kernel.cookie(gettid()).map(drop).map_err(Error::Refused)
}

/// Gives this process the cookie of its container or pod, if the task's containerd wants that. Only for a process with one
/// thread.
pub(super) fn join(task: &Task, exec: Option<&ExecId>) -> Result<(), Error> {
    if !task.containerd.core_scheduling {
        return Ok(());
    }
    let joined = match exec {
        // If another process has got the pid, the OCI runtime notices it.
        Some(_) => of_exec(&Kernel, task.init.pid().and_then(pid)),
        None => of_container(&Kernel, sandbox(task)?.as_ref().and_then(init)),
    };
    joined.map_err(Error::Refused)
}

/// The sandbox of a container's pod. `None` for the sandbox itself.
fn sandbox(task: &Task) -> Result<Option<Task>, Error> {
    let spec = Spec::read(&task.request.bundle)?;
    let Some(id) = sandbox_of(&spec, &task.key.id) else {
        return Ok(None);
    };
    Ok(Store::new(config::STATE_DIR).load_with(&TaskKey { id, ..task.key.clone() }, None)?)
}

/// The sandbox of the pod to which a container belongs. `None` for the sandbox itself, whose id is `own`.
fn sandbox_of(spec: &Spec, own: &TaskId) -> Option<TaskId> {
    spec.sandbox().filter(|id| id != own)
}

/// The init process of a task, if it has not ended.
fn init(task: &Task) -> Option<Pid> {
    let found = task.init.pid()?;
    // Another process may have got the pid.
    let own = task.cgroup()?;
    cgroup::of_process(found).is_ok_and(|cgroup| cgroup.starts_with(own)).then(|| pid(found)).flatten()
}

fn pid(number: u32) -> Option<Pid> {
    i32::try_from(number).ok().and_then(Pid::from_raw)
}

/// The calls of the kernel (prctl(2), `PR_SCHED_CORE`).
trait Cores {
    /// The cookie of a process; 0 if it has none.
    fn cookie(&self, process: Pid) -> Result<u64, Errno>;
    /// Gives this thread a new cookie.
    fn create(&self) -> Result<(), Errno>;
    /// Gives this thread the cookie of a process.
    fn share_from(&self, process: Pid) -> Result<(), Errno>;
}

fn of_container(cores: &impl Cores, sandbox: Option<Pid>) -> Result<(), Errno> {
    match sandbox.map(|pid| (pid, cores.cookie(pid))) {
        Some((pid, Ok(cookie))) if cookie != 0 => share(cores, pid),
        // The sandbox was made without a cookie, or has just ended.
        None | Some((_, Ok(_) | Err(Errno::ESRCH))) => cores.create(),
        Some((_, Err(Errno::ENODEV))) => {
            smt_is_off();
            Ok(())
        }
        Some((_, Err(errno))) => Err(errno),
    }
}

fn of_exec(cores: &impl Cores, init: Option<Pid>) -> Result<(), Errno> {
    share(cores, init.ok_or(Errno::ESRCH)?)
}

/// Under containerd-shim-runc-v2, what exists keeps its cookie when SMT is switched off, and new processes in it can be started.
fn share(cores: &impl Cores, process: Pid) -> Result<(), Errno> {
    match cores.share_from(process) {
        Err(Errno::ENODEV) => {
            smt_is_off();
            Ok(())
        }
        shared => shared,
    }
}

fn smt_is_off() {
    telemetry::say(&format!(
        "SMT is switched off: a process is started without the cookie for core scheduling ({VARIABLE})"
    ));
}

struct Kernel;

impl Cores for Kernel {
    fn cookie(&self, process: Pid) -> Result<u64, Errno> {
        core_scheduling_cookie(process, CoreSchedulingScope::Thread).map_err(errno)
    }

    fn create(&self) -> Result<(), Errno> {
        create_core_scheduling_cookie(gettid(), CoreSchedulingScope::Thread).map_err(errno)
    }

    fn share_from(&self, process: Pid) -> Result<(), Errno> {
        pull_core_scheduling_cookie(process, CoreSchedulingScope::Thread).map_err(errno)
    }
}

fn errno(error: rustix::io::Errno) -> Errno {
    Errno::from_raw(error.raw_os_error())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::oci::bundle::SANDBOX_ID;
    use std::cell::Cell;

    /// A kernel in which process 7 has cookie 70, and process 8 has none.
    struct Fake {
        smt: bool,
        own: Cell<u64>,
    }

    const NEW: u64 = 99;

    impl Cores for Fake {
        fn cookie(&self, process: Pid) -> Result<u64, Errno> {
            match process.as_raw_nonzero().get() {
                _ if !self.smt => Err(Errno::ENODEV),
                7 => Ok(70),
                8 => Ok(0),
                1 => Err(Errno::EPERM),
                _ => Err(Errno::ESRCH),
            }
        }

        fn create(&self) -> Result<(), Errno> {
            if !self.smt {
                return Err(Errno::ENODEV);
            }
            self.own.set(NEW);
            Ok(())
        }

        fn share_from(&self, process: Pid) -> Result<(), Errno> {
            self.own.set(self.cookie(process)?);
            Ok(())
        }
    }

    /// The cookie that a process gets, with the pid of the other process.
    fn got(
        smt: bool,
        join: impl Fn(&Fake, Option<Pid>) -> Result<(), Errno>,
        other: i32,
    ) -> Result<u64, Errno> {
        let kernel = Fake { smt, own: Cell::new(0) };
        join(&kernel, Pid::from_raw(other)).map(|()| kernel.own.get())
    }

    #[test]
    fn the_containers_of_a_pod_and_their_execs_share_a_cookie() {
        assert_eq!(got(true, of_container, 0), Ok(NEW), "a container alone, or a sandbox");
        assert_eq!(got(true, of_container, 7), Ok(70), "a container of a pod");
        assert_eq!(got(true, of_container, 8), Ok(NEW), "a sandbox of an earlier version");
        assert_eq!(got(true, of_container, 6), Ok(NEW), "a sandbox that has ended");
        assert_eq!(got(true, of_container, 1), Err(Errno::EPERM));
        assert_eq!(got(true, of_exec, 7), Ok(70));
        assert_eq!(got(true, of_exec, 0), Err(Errno::ESRCH), "the container has ended");
    }

    #[test]
    fn without_smt_only_what_has_a_cookie_already_is_extended() {
        assert_eq!(got(false, of_container, 0), Err(Errno::ENODEV));
        assert_eq!(got(false, of_container, 7), Ok(0));
        assert_eq!(got(false, of_exec, 7), Ok(0));
    }

    #[test]
    fn an_error_names_the_variable_and_the_reason() {
        for (errno, reason) in [
            (Errno::EINVAL, "without CONFIG_SCHED_CORE"),
            (Errno::ENODEV, "SMT is switched off"),
            (Errno::EPERM, "Operation not permitted"),
        ] {
            let error = Error::Refused(errno).to_string();
            assert!(error.contains(VARIABLE) && error.ends_with(reason), "{error}");
        }
    }

    /// The kernel gives this thread a cookie, or there is an error that people understand.
    #[test]
    fn start_fails_if_the_kernel_makes_no_cookie_but_not_for_a_pod_that_exists() {
        let made = std::thread::spawn(|| {
            Kernel.create()?;
            Kernel.cookie(gettid())
        });
        let made = made.join().unwrap();
        let dir = tempfile::tempdir().unwrap();
        let checked = |sandbox: &str| {
            let spec = serde_json::json!({"annotations": {(SANDBOX_ID): sandbox}});
            std::fs::write(dir.path().join("config.json"), spec.to_string()).unwrap();
            check(dir.path(), &TaskId::new("web").unwrap()).map_err(|error| error.to_string())
        };
        assert_eq!(checked("pod"), Ok(()), "a container of a pod");
        match made {
            Ok(cookie) => {
                assert_ne!(cookie, 0);
                assert_eq!((checked("web"), checked("")), (Ok(()), Ok(())));
            }
            Err(errno) => {
                assert!(matches!(errno, Errno::EINVAL | Errno::ENODEV), "{errno}");
                for own in ["web", ""] {
                    assert!(checked(own).unwrap_err().ends_with(reason(errno)));
                }
            }
        }
    }
}
